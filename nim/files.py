"""Files and folders that appear whole or not at all, and the JSON that Denim writes and reads again."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "DamagedFileError",
    "WriteError",
    "append_text",
    "atomic_folder",
    "atomic_write",
    "check_path",
    "json_lines",
    "parse_json",
    "process_has_ended",
    "read_json",
    "read_json_lines",
    "remove_folder",
    "sweep",
    "translated",
]

# A name before it is final: a random part, where the process that made it runs (`_place`), and its number there. Names
# of earlier versions have the random part alone.
UNFINISHED = re.compile(r"\.denim-\w{8}(?:-(?P<place>\w{8})-(?P<process>\d{1,9}))?\.part")
# What a killed process can leave behind: those, and the file that safetensors writes beside its target.
LEFTOVERS = re.compile(rf"{UNFINISHED.pattern}|\.tmp\w{{6}}")
ADVICE = {
    errno.ENOSPC: "make room there and run the same command again",
    errno.EDQUOT: "make room there and run the same command again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that can be written to, or change its permissions",
    errno.EPERM: "choose a folder that can be written to, or change its permissions",
}
# What writing to an open file can raise.
REFUSALS = {*ADVICE, errno.EFBIG, errno.EIO}


class WriteError(OSError):
    """A file or folder cannot be written. The message says which, why and what to do; `errno` is the system's.

    Args:
        number: the system's error number.
        path: of what was to be written.
    """

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(number, os.strerror(number), str(path))

    def __str__(self) -> str:
        advice = f"; {ADVICE[self.errno]}" if self.errno in ADVICE else ""
        return f"cannot write {self.filename}: {self.strerror}{advice}"


class DamagedFileError(ValueError):
    """A JSON file of Denim's own does not hold what Denim writes there."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on failure it is removed.

    The file gets the permissions that the process's umask leaves. What processes of this machine that have been killed
    left half-written beside it is removed.

    Raises:
        WriteError: the system refuses, also within the block: errors of safetensors and torch.save are translated.
    """
    with translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_dead(path.parent)
        staged = _new_name(path.parent)
        try:
            staged.touch(exist_ok=False)
            mode = staged.stat().st_mode & 0o777
            yield staged
            _set_mode(staged, mode)
            _sync(staged)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which must not exist; on success it takes that name in one step.

    The folder gets the permissions that the process's umask leaves. Leftovers beside it are removed as by
    `atomic_write`.

    Raises:
        WriteError: the system refuses, also within the block: errors of safetensors and torch.save are translated.
    """
    with translated(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_dead(path.parent)
        staged = _new_name(path.parent)
        try:
            staged.mkdir()
            yield staged
            for file in staged.rglob("*"):
                if file.is_file():
                    _sync(file)
            staged.rename(path)
        except WriteError as error:  # of a file in it, by a name that nobody knows
            raise WriteError(error.errno or 0, path) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder, which loses its name in one step: what a killed process leaves of it is for `sweep`.

    Raises:
        OSError: it cannot be removed.
    """
    path = path.rename(_new_name(path.parent))
    shutil.rmtree(path)


def check_path(path: Path) -> None:
    """Check that the libraries that write a run or an evaluation take its path: Linux allows any bytes, they UTF-8.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path} is not UTF-8, and safetensors and TensorBoard take no other paths: choose a folder with another "
            "name"
        ) from error


def append_text(path: Path, text: str) -> None:
    """Append to a file, which is made where absent. A link in its place is refused.

    Raises:
        WriteError: the system refuses; a part of the text may have been written (see `read_json_lines`).
    """
    # Where a link leads, a folder that came from elsewhere decides.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with translated(path), os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8") as handle:
        handle.write(text)


def sweep(folder: Path) -> None:
    """Remove what killed processes have left half-written in a folder and in the folders in it.

    Only for the one process that may write there (`denim.nim.owner.owned`): it removes what others are writing.
    """
    for entry in (*folder.glob(".*"), *folder.glob("*/.*")):
        if LEFTOVERS.fullmatch(entry.name):
            _remove(entry)


def process_has_ended(process: int) -> bool:
    """Whether there is certainly no process of a number where this one runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        pass
    return False


def read_json(path: Path, entries: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The object in a JSON file that Denim has written.

    Args:
        path: of the file.
        entries: types of the entries that it must have, by name; it may have others.

    Raises:
        DamagedFileError: the file does not hold a JSON object with these entries.
        OSError: the file cannot be read.
    """
    return parse_json(path.read_bytes(), str(path), entries)


def read_json_lines(path: Path, entries: Mapping[str, type] | None = None) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines that grows by `append_text`; none if there is no such file.

    Args, errors: see `json_lines`.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [value for value, _ in json_lines(file, path, entries)]


def json_lines(
    file: BinaryIO, path: Path, entries: Mapping[str, type] | None = None
) -> Iterator[tuple[dict[str, Any], int]]:
    """The objects in the lines of a file, from where it stands, each with the position of the end of its line.

    A last line without its end is left out: the process that wrote it was killed, or the disk was full.

    Args:
        file: that is read.
        path: its name, for messages.
        entries: types of the entries that each object must have, by name; it may have others.

    Raises:
        DamagedFileError: another line does not hold a JSON object with these entries.
        OSError: the file cannot be read.
    """
    end = file.tell()
    for number, line in enumerate(file, 1):
        end += len(line)
        if line.endswith(b"\n"):
            yield parse_json(line, f"line {number} of {path}", entries), end


def parse_json(content: bytes, name: str, entries: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The object in the content of a JSON file that Denim has written.

    Args:
        content: of the file, or of a line of it.
        name: of that file or line, for messages.
        entries: types of the entries that it must have, by name; it may have others.

    Raises:
        DamagedFileError: it is no JSON object with these entries.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or brackets in brackets without end
        raise DamagedFileError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedFileError(f"{name} holds {content[:20]!r}, expected a JSON object in braces")
    for entry, kind in (entries or {}).items():
        if entry not in value:
            raise DamagedFileError(f"{name} has no entry {entry!r}")
        if type(value[entry]) is not kind:  # in Python True is an int
            raise DamagedFileError(
                f"{name} has {str(value[entry])[:40]!r} as {entry!r}, expected a value of type {kind.__name__}"
            )
    return value


def _new_name(folder: Path) -> Path:
    # The functions of tempfile make files and folders that their owner alone can read, whatever the umask allows.
    return folder / f".denim-{secrets.token_hex(4)}-{_place()}-{os.getpid()}.part"


@functools.cache
def _place() -> str:
    """Where the number of a process means this process: the machine and, on Linux, the namespace of a container."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 (it leads to no path)
    return hashlib.sha256(f"{socket.gethostname()} {namespace}".encode()).hexdigest()[:8]


def _sweep_dead(folder: Path) -> None:
    """Remove what processes of this machine that have ended left half-written in a folder that others may write to."""
    with contextlib.suppress(OSError):  # what cannot be listed or removed is no reason not to write
        for entry in folder.glob(".denim-*.part"):
            found = UNFINISHED.fullmatch(entry.name)
            if found and found["place"] == _place() and process_has_ended(int(found["process"])):
                _remove(entry)


def _remove(entry: Path) -> None:
    """Remove a file, a link or a folder, which another process may be removing, too."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _set_mode(file: Path, mode: int) -> None:
    """Undo what a library did to the permissions of a file that it replaced (safetensors: 0600)."""
    if file.stat().st_mode & 0o777 != mode:
        with contextlib.suppress(OSError):  # some network and foreign file systems know no permissions
            file.chmod(mode)


def _sync(file: Path) -> None:
    """Write a file's content to disk before it is renamed: else a power cut could leave the new name without it."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Inside, whatever says that the system refuses to write `path` becomes a `WriteError`; other errors pass.

    Raises:
        WriteError: see above.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number = _system_error(error, path.parent)
        if number is None:
            raise
        raise WriteError(number, path) from error


def _system_error(error: BaseException, folder: Path) -> int | None:
    """The system's number of an error in writing to a folder, or None for an error of another kind."""
    if isinstance(error, OSError):
        if isinstance(error.filename, (str, bytes)):  # an error that names a file elsewhere is about what was read
            return error.errno if Path(os.fsdecode(error.filename)).is_relative_to(folder) else None
        return error.errno if error.errno in REFUSALS else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, in the words of Rust's std::io
        return int(found[1])
    # torch.save raises a RuntimeError while it handles the OSError of the file that it was given.
    return _system_error(error.__context__, folder) if error.__context__ is not None else None
