"""Indexing: makes the manifest of a data set, keeps it in the user's cache, and goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from denim.nim.data.decode import LARGE, MachineError, Verdict, judge_all
from denim.nim.data.listing import Listing
from denim.nim.data.manifest import VERSION, Manifest, ManifestError
from denim.nim.data.processes import CHUNK, ask_processes
from denim.nim.files import DamagedFileError, json_lines, translated

__all__ = [
    "cache_folder",
    "index",
    "try_with_dali",
]

IN_PROCESS = 256  # up to so many images, starting processes takes longer than decoding
NAMED = 5  # images that a message names
# Endings of the files beside a manifest that hold what is done: of an indexing, and of a trial with DALI.
JOURNAL, TRIAL = ".journal", ".trial"


def cache_folder() -> Path:
    """The folder for what Denim keeps between runs: $XDG_CACHE_HOME/denim, or ~/.cache/denim.

    Where there is no home folder either, it is a folder of this user's among the temporary files.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "denim"
    except RuntimeError:  # neither $HOME nor an entry in the list of users, as in many containers
        return _temporary_folder()


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / f"denim-{os.getuid()}"


def index(root: Path, key: str, samples: Callable[[], Listing], cache: Path | None = None, part: str = "") -> Manifest:
    """The manifest of a data set: the one that is there if it still holds, else one made by decoding what is new.

    It is kept in the user's cache, never among the data: a manifest that came with a data set could name any file of
    the machine as one of its images. Samples of an earlier manifest that have the same name, length and time of change
    are not decoded again, nor are those that an interrupted call had done (a journal beside the manifest has them). Of
    several processes that ask at once, one does the work.

    Args:
        root: folder of the data set.
        key: changes whenever the samples do, as `Listing.key` does.
        samples: makes the listing; called where there is something to decode.
        cache: folder to keep the manifest in, instead of `cache_folder()`.
        part: name of the part of the folder that the manifest is of, where one folder has several.

    Raises:
        ValueError: two samples have the same id.
        OSError: the manifest cannot be written; what was decoded is in the journal.
    """
    name = file_name(root, part)
    folders = [cache] if cache is not None else [cache_folder() / "manifests", _temporary_folder() / "manifests"]
    places = [folder / name for folder in folders if _is_trusted(folder)]
    if (manifest := _current(places, root, key)) is not None:
        _remove_left_journal(manifest.file.with_suffix(JOURNAL))
        return manifest
    file = _writable(folders) / name
    with _locked(file.with_suffix(JOURNAL)) as journal:
        if (manifest := _current(places, root, key)) is not None:  # another process was faster
            return manifest
        listing = samples()
        names = list(zip(listing.sample_ids().tolist(), listing.bytes, listing.mtimes, strict=True))
        verdicts: dict[int, Verdict] = {}
        for place in places:
            with contextlib.suppress(ManifestError):
                if (earlier := Manifest(place, root)).limit == Image.MAX_IMAGE_PIXELS:
                    verdicts.update(earlier.verdicts(listing))
        known = _read_journal(journal, file.with_suffix(JOURNAL))
        verdicts.update((row, known[name]) for row, name in enumerate(names) if name in known)
        todo = [row for row in range(len(listing)) if row not in verdicts]
        failed: dict[int, str] = {}
        for rows, new in _judge(listing, todo):
            failed |= {row: verdict.fault for row, verdict in zip(rows, new, strict=True) if verdict.passing}
            judged = ((names[row], verdict) for row, verdict in zip(rows, new, strict=True) if not verdict.passing)
            _write_journal(journal, [(*name, *verdict) for name, verdict in judged])
            verdicts.update(zip(rows, new, strict=True))
        if failed:
            some = "; ".join(f"{listing.where(row)}: {fault}" for row, fault in [*failed.items()][:NAMED])
            raise MachineError(
                f"{len(failed)} of {len(listing)} images below {root} could not be read for the machine's sake: {some}"
                ". They do not count as bad ones: remove the cause, or these files, and index again; what was decoded "
                "is kept"
            )
        Manifest.write(file, listing, [verdicts[row] for row in range(len(listing))], key)
        file.with_suffix(JOURNAL).unlink()
    manifest = Manifest(file, root, key)
    manifest.decoded = len(todo)
    return manifest


def file_name(root: Path, part: str = "") -> str:
    """The name of the manifest of a folder, or of a part of it, which holds for its absolute path."""
    place = os.fsencode(root.resolve()) + b"\0" + os.fsencode(part)
    return f"{hashlib.blake2b(place, digest_size=16).hexdigest()}.safetensors"


def _writable(folders: Sequence[Path]) -> Path:
    """The first of these folders that can be written to. It is made where it is absent."""
    faults = []
    for folder in folders:
        try:
            folder.parent.mkdir(0o700, parents=True, exist_ok=True)
            folder.mkdir(0o700, exist_ok=True)
            if not _is_trusted(folder) or not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            faults.append(f"{folder} ({error.strerror})")
            continue
        if faults:
            warnings.warn(
                f"manifests cannot be kept in {faults[0]} and are kept in {folder} for now: let XDG_CACHE_HOME name a "
                "folder that can be written to",
                stacklevel=5,
            )
        return folder
    raise OSError(
        f"the manifest cannot be written to {' or '.join(faults)}: name another folder for it (cache, --cache), or let "
        "XDG_CACHE_HOME name one"
    )


def _is_trusted(folder: Path) -> bool:
    """Whether nobody but this user has put it there: where all may write, others can leave links and files."""
    if folder.parent != _temporary_folder():
        return True
    try:
        info = folder.parent.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022


def _current(places: list[Path], root: Path, key: str) -> Manifest | None:
    for place in places:
        if not place.is_file():
            continue
        try:
            manifest = Manifest(place, root)
        except ManifestError as error:
            warnings.warn(f"{error}; it is made anew", stacklevel=4)
            continue
        if manifest.key == key and manifest.limit == Image.MAX_IMAGE_PIXELS:
            return manifest
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The journal, open, while no other process has it."""
    while True:
        # No link is followed: it would have its target overwritten.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(path, flags, 0o600)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(f"{path} is not a regular file: remove it")
        with translated(path), os.fdopen(handle, "a+b") as file:
            with contextlib.suppress(OSError):  # a file system without locks: two processes may do the work twice
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return


def _remove_left_journal(path: Path) -> None:
    """Remove the journal of a manifest that holds all of it: their process was killed right after it wrote that.

    A journal that another process has locked stays. So does one that cannot be removed: it is in nobody's way.
    """
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(handle)


def _write_journal(journal: BinaryIO, entries: Sequence[tuple[object, ...]]) -> None:
    """Append a line of verdicts: for each sample id, length, time of change, and the fields of `Verdict`."""
    journal.write(_line({"digest": _digest(entries), "verdicts": entries}))
    journal.flush()


def _line(content: Mapping[str, object]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _digest(entries: Sequence[Sequence[object]]) -> str:
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=8).hexdigest()


def _read_journal(journal: BinaryIO, path: Path) -> dict[tuple[int, int, int], Verdict]:
    """Verdicts of an interrupted call by id, length and time of change.

    What is cut off or damaged at the end is removed, for the next line is appended. So is all of a journal of another
    version, or of another limit of pixels.
    """
    header = {"manifest": VERSION, "limit": Image.MAX_IMAGE_PIXELS}
    known: dict[tuple[int, int, int], Verdict] = {}
    whole = 0
    journal.seek(0)
    try:
        lines = json_lines(journal, path)
        if next(lines, ({}, 0))[0] == header:
            whole = len(_line(header))
            for number, (line, end) in enumerate(lines, 2):
                entries = line.get("verdicts")
                if not isinstance(entries, list) or line.get("digest") != _digest(entries):
                    raise DamagedFileError(f"line {number} of {path} is not as it was written")
                known.update(((id, length, mtime), Verdict(*verdict)) for id, length, mtime, *verdict in entries)
                whole = end
    except DamagedFileError as error:
        warnings.warn(f"{error}: what it says of images from there on is found out anew", stacklevel=4)
    journal.truncate(whole)
    if not whole:
        journal.write(_line(header))
    return known


def _judge(listing: Listing, todo: list[int]) -> Iterator[tuple[list[int], list[Verdict]]]:
    """The decoder's word on samples, chunk by chunk, in any order."""
    if len(todo) > IN_PROCESS:
        yield from ask_processes("judge", listing.place, todo, "indexing")
        return
    for start in range(0, len(todo), CHUNK):
        rows = todo[start : start + CHUNK]
        yield rows, judge_all(map(listing.place, rows))


def try_with_dali(manifest: Manifest, version: str) -> Manifest:
    """The same manifest, with DALI's word on all images that it may be handed, so that no epoch has to ask for it.

    Each is decoded alone, in processes of their own. One that ends them is refused, and named in a warning. What
    another version of DALI said is asked anew. Of several processes that call it at once, one does the work; a call
    that is killed goes on where it was (a journal of its own beside the manifest has what was done).

    Args:
        manifest: that `index` made; its file is replaced.
        version: of the DALI that is installed.

    Raises:
        OSError: processes do not start, or the manifest cannot be written.
    """
    said = (version, f"-{version}")
    small = manifest.sizes[: manifest.valid].long().prod(1) <= LARGE
    rows = [row for row in small.nonzero().flatten().tolist() if manifest.is_plain(row)]
    if all(manifest.dali(row) in said for row in rows):
        return manifest
    file = manifest.file
    # The lock of the indexing, which writes the same manifest, and a journal of its own.
    with _locked(file.with_suffix(JOURNAL)), _locked(file.with_suffix(TRIAL)) as journal:
        manifest = Manifest(manifest.file, manifest.root, manifest.key)
        names = list(
            zip(manifest.ids.tolist(), manifest.bytes.tolist(), manifest._columns["mtimes"].tolist(), strict=True)
        )
        kept = _read_journal(journal, file.with_suffix(TRIAL))
        known = {name: verdict.dali for name, verdict in kept.items() if verdict.dali in said}
        words = [known.get(names[row], manifest.dali(row)) for row in range(len(manifest))]
        todo = [row for row in rows if words[row] not in said]
        for chunk, answers in ask_processes("dali", manifest.place, todo, "trying with DALI"):
            entries = []
            for row, answer in zip(chunk, answers, strict=True):
                if isinstance(answer, str):
                    warnings.warn(
                        f"DALI {version} dies of {manifest.where(row)}, which Pillow will decode", stacklevel=2
                    )
                if answer is not None:
                    words[row] = version if answer is True else f"-{version}"
                    entries.append((*names[row], *manifest.verdict(row)._replace(dali=words[row])))
            _write_journal(journal, entries)
        manifest._replace_trials(words)
        for ending in (TRIAL, JOURNAL):
            file.with_suffix(ending).unlink()
    return Manifest(manifest.file, manifest.root, manifest.key)
