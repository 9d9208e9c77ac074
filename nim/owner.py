"""One writer for a folder: a lock that a process holds while it writes there, and that names it to all others."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from denim.nim.files import DamagedFileError, WriteError, check_path, parse_json, process_has_ended, sweep

if TYPE_CHECKING:
    from denim.nim.ranks import Ranks

__all__ = ["LOCK_FILE", "OwnedError", "is_owned", "owned", "owned_by_first"]

LOCK_FILE = ".owner.json"
_handles: set[int] = set()


class OwnedError(ValueError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Inside, this process alone writes to a folder. What killed processes have left half-written there is removed.

    The lock is the system's (flock) on a file in the folder, and ends with the process that holds it, however that
    ends. On a file system without such locks the file alone is the lock; there the lock of a process that has ended is
    recognised on the machine where it ran.

    Args:
        folder: made where absent, and removed at the end if it was and is empty.

    Raises:
        ValueError: its path is not UTF-8 (see `check_path`).
        OwnedError: another process has the folder; the message says which, on which machine, and since when.
        WriteError: the folder cannot be made or written to.
    """
    check_path(folder)
    is_new = not folder.exists()
    file = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(file)
    except OwnedError:
        raise
    except OSError as error:
        raise WriteError(error.errno or 0, folder) from error
    _handles.add(handle)
    try:
        record = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # the disk is full: a process that is refused cannot say by whom
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(record).encode())
        sweep(folder)
        yield
    finally:
        file.unlink(missing_ok=True)
        _handles.discard(handle)
        os.close(handle)
        if is_new:
            with contextlib.suppress(OSError):  # it has content
                folder.rmdir()


@contextlib.contextmanager
def owned_by_first(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, the processes of one job alone write to a folder: rank 0 holds the lock for all (see `owned`).

    Args:
        folder: see `owned`.
        ranks: the processes of the job.

    Raises:
        RankError: on the other ranks, where rank 0 does not get the folder; there, see `owned`.
    """
    with contextlib.ExitStack() as stack:
        with ranks.together():
            if ranks.is_first:
                stack.enter_context(owned(folder))
        yield


def is_owned(folder: Path) -> bool:
    """Whether a process, this one or another, writes to a folder (`owned`), as far as this machine can tell."""
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # First the record: where its process has ended, the lock is left alone, for the next owner may be taking it.
        if _has_ended(_record(handle)):
            return False
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # it is held, or this file system has no locks, and the file says that somebody has the folder
        return True
    finally:
        os.close(handle)
    return False


def _lock(file: Path) -> int:
    """A descriptor of the file, which is locked."""
    while True:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        is_new = True
        try:
            handle = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            is_new = False
            try:
                handle = os.open(file, flags)
            except FileNotFoundError:  # its holder has just ended
                continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OwnedError(_refusal(file, handle)) from None
        except OSError:  # a file system without locks: who has made the file holds it
            if not is_new:
                if not _has_ended(_record(handle)):
                    advice = f" (this file system has no locks: if that process has ended, remove {file})"
                    raise OwnedError(_refusal(file, handle) + advice) from None
                file.unlink(missing_ok=True)
                os.close(handle)
                continue
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # its holder has removed it between our two calls


def _record(handle: int) -> dict[str, Any]:
    with contextlib.suppress(DamagedFileError, OSError):  # its holder has not written it yet
        return parse_json(os.pread(handle, 4096, 0), LOCK_FILE)
    return {}


def _refusal(file: Path, handle: int) -> str:
    record = _record(handle)
    if not record:
        time.sleep(0.1)  # the holder writes its name right after it has locked the file
        record = _record(handle)
    os.close(handle)
    who = "another process writes to it"
    if record:
        who = f"process {record.get('pid')} on {record.get('host')} has been writing to it since {record.get('since')}"
    return f"{file.parent} is in use: {who}; wait for its end, or take another folder"


def _has_ended(record: dict[str, Any]) -> bool:
    """Whether the process of a record has certainly ended; another machine's processes cannot be looked up."""
    pid = record.get("pid")
    return record.get("host") == socket.gethostname() and isinstance(pid, int) and process_has_ended(pid)


def _close_in_child() -> None:
    """A forked child, such as a loader's worker, must not go on holding what its parent holds."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()


os.register_at_fork(after_in_child=_close_in_child)
