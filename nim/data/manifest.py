"""The manifest: every sample of a data set with its id, label, place, size and validity, decoded once and kept.

One safetensors file, memory-mapped: opening it reads its header, and a column takes memory as it is used. Rows of valid
images come first, so that sample k of a source is row k; what cannot be decoded follows with its reason.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from denim.nim.data.decode import EXTENSIONS, LARGE, MachineError, Place, Verdict, judge_all, open_place
from denim.nim.data.processes import CHUNK, ask_processes
from denim.nim.files import atomic_write

__all__ = [
    "Listing",
    "Manifest",
    "ManifestError",
    "cache_folder",
    "count_passed_over",
    "index",
    "list_images",
    "passed_over",
    "sample_id",
    "try_with_dali",
]

VERSION = "2"
IN_PROCESS = 256  # up to so many images, starting processes takes longer than decoding
NAMED = 5  # images that a message names
# Of a manifest; "shard" and "offsets" where images are members of shards.
COLUMNS: dict[str, type[np.generic]] = {
    "ids": np.int64,
    "labels": np.int64,
    "bytes": np.int64,
    "mtimes": np.int64,
    "sizes": np.int32,
    "formats": np.uint8,
    "plain": np.uint8,
    "dali": np.uint8,
    "faults": np.int32,
    "ends": np.int64,
    "paths": np.uint8,
    "shard": np.int32,
    "offsets": np.int64,
}
KINDS = 20  # of what is passed over, that are told apart
# What systems and network storage put among a user's folders: thumbnails, waste, copies. Their pictures are nobody's.
SYSTEM_FOLDERS = frozenset((
    "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "lost+found",
    "System Volume Information",
))  # fmt: skip


class ManifestError(ValueError):
    """A manifest is missing, damaged, of another version or of other files."""


def sample_id(path: str) -> int:
    """The id of a sample: the 8-byte BLAKE2b hash of its path, read as a little-endian int64.

    Args:
        path: below the folder that holds the class folders, with slashes ("cat/0001.jpg").
    """
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "little", signed=True)


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


class Listing:
    """The samples of a data set before any of them is decoded, in their order.

    Args:
        root: folder below which paths and shards are.
        classes: class names; label k is `classes[k]`.
        shards: tar files below `root` that hold the images, if images are not files of their own.

    Attributes:
        passed_over: what lies there and is no sample: how often, and the first of them, by kind.
    """

    def __init__(self, root: Path, classes: Sequence[str], shards: Sequence[str] = ()) -> None:
        self.root = root
        self.classes = tuple(classes)
        self.shards = tuple(shards)
        self.paths = bytearray()
        self.ends, self.labels, self.bytes, self.mtimes = array("q"), array("q"), array("q"), array("q")
        self.ids, self.shard, self.offsets = array("q"), array("q"), array("q")
        self.passed_over: dict[str, tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self.ends)

    def add(self, path: str, label: int, size: int, mtime: int) -> None:
        """One file.

        Args:
            path: below `root`, with slashes.
            label: its class.
            size: in bytes; -1 for what is no regular file, which makes it a bad image.
            mtime: time of the last change, in ns.
        """
        self.paths += os.fsencode(path)
        self.ends.append(len(self.paths))
        self.labels.append(label)
        self.bytes.append(size)
        self.mtimes.append(mtime)

    def add_member(self, path: str, label: int, size: int, mtime: int, id: int, shard: int, offset: int) -> None:
        """One member of a shard; all samples of a listing are members then.

        Args:
            path: its name in the shard.
            label: its class.
            size: in bytes.
            mtime: of the shard, in ns.
            id: any int64; distinct.
            shard: its shard is `shards[shard]`.
            offset: of its first byte in the shard.
        """
        self.add(path, label, size, mtime)
        self.ids.append(id)
        self.shard.append(shard)
        self.offsets.append(offset)

    def pass_over(self, kind: str, path: str) -> None:
        """Count something that is no sample.

        Args:
            kind: what it is, for people.
            path: below `root`.
        """
        if kind not in self.passed_over and len(self.passed_over) >= KINDS:
            kind = "of further kinds"
        count, first = self.passed_over.get(kind, (0, path))
        self.passed_over[kind] = count + 1, first

    def pass_over_file(self, path: str) -> None:
        """Count a file that is no sample for its name."""
        name = path.rpartition("/")[2]
        ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path would cost as much as stat)
        if ending in EXTENSIONS:
            kind = "images outside of the class folders"
        else:
            kind = f"ending in {ending}" if ending else "without an ending"
        self.pass_over(passed_over(name) or kind, path)

    def path(self, row: int) -> str:
        """The path of a sample below `root`, or its name in its shard."""
        return os.fsdecode(bytes(self.paths[self.ends[row - 1] if row else 0 : self.ends[row]]))

    def place(self, row: int) -> Place:
        """Where the bytes of a sample are."""
        if self.shard:
            return _place(self.root, self.shards[self.shard[row]], self.bytes[row], self.offsets[row])
        return _place(self.root, self.path(row), self.bytes[row], -1)

    def where(self, row: int) -> str:
        """The path of a sample, or "shard.tar:member", for messages."""
        return str(self.root / (f"{self.shards[self.shard[row]]}:{self.path(row)}" if self.shard else self.path(row)))

    def sample_ids(self) -> npt.NDArray[np.int64]:
        """Ids, int64 (N,): those given to `add_member`, or those of the paths.

        Raises:
            ValueError: two samples have the same.
        """
        ids = np.array(self.ids or [sample_id(self.path(row)) for row in range(len(self))], np.int64)
        order = np.argsort(ids, kind="stable")
        twins = np.flatnonzero(ids[order][1:] == ids[order][:-1])
        if len(twins):
            first, second = order[twins[0]], order[twins[0] + 1]
            raise ValueError(
                f"{self.where(first)} and {self.where(second)} have the same id {ids[first]}, and all that is random "
                "about a sample is keyed by its id: rename or remove one of them"
            )
        return ids

    def key(self) -> str:
        """A digest of all there is in the listing, and of nothing else: not of `root`."""
        digest = hashlib.blake2b(json.dumps((self.classes, self.shards, self.passed_over)).encode(), digest_size=16)
        for column in (self.paths, self.ends, self.labels, self.bytes, self.mtimes, self.ids, self.shard, self.offsets):
            digest.update(column)
        return digest.hexdigest()


def list_images(root: Path, classes: Sequence[str]) -> Listing:
    """The image files below a folder, at any depth, through links too, sorted by the parts of their paths.

    Hidden files and folders, folders of thumbnails and of waste, and files whose extension is not that of an image are
    passed over and counted.

    Args:
        root: folder.
        classes: its class folders; none for a flat folder, all of which is then one class "".

    Raises:
        OSError: a folder cannot be read.
    """
    listing = Listing(root, classes or ("",))
    for label, prefix in enumerate(f"{name}/" for name in classes) if classes else [(0, "")]:
        _walk(listing, root / prefix, prefix, label, frozenset())
    if classes:
        for name in sorted(os.listdir(root)):  # noqa: PTH208 (names alone)
            if name not in classes:
                listing.pass_over_file(name)
    return listing


def passed_over(name: str) -> str:
    """What kind of file or folder has this name, if it is one that no data set means; else "".

    Args:
        name: of a file or folder, without what is above it.
    """
    return "hidden" if name.startswith(".") else f"named {name}" if name in SYSTEM_FOLDERS else ""


def count_passed_over(kinds: Mapping[str, tuple[int, str]]) -> str:
    """What was passed over, in words; empty where nothing was.

    Args:
        kinds: see `Listing.passed_over`.
    """
    said = [f"{count} {kind} (first: {first})" for kind, (count, first) in kinds.items()]
    return f"passed over: {', '.join(said)}" if said else ""


def _walk(listing: Listing, folder: Path, prefix: str, label: int, above: frozenset[tuple[int, int]]) -> None:
    own = folder.stat()
    if (own.st_dev, own.st_ino) in above:
        listing.pass_over("links to a folder above them", prefix.rstrip("/"))
        return
    above |= {(own.st_dev, own.st_ino)}
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if kind := passed_over(entry.name):
            listing.pass_over(kind, prefix + entry.name)
        elif entry.is_dir():
            _walk(listing, folder / entry.name, f"{prefix}{entry.name}/", label, above)
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:  # noqa: PTH122 (a Path would cost as much as stat)
            try:
                info = entry.stat()
                size, mtime = (info.st_size if stat.S_ISREG(info.st_mode) else -1), info.st_mtime_ns
            except OSError:  # a link to nothing
                size, mtime = -1, 0
            listing.add(prefix + entry.name, label, size, mtime)
        else:
            listing.pass_over_file(prefix + entry.name)


class Manifest:
    """The samples of a data set, valid ones first.

    Args:
        file: where it is.
        root: the folder of the data set.
        key: of what it has to be the manifest; None takes it as it is.
        checked: whether this process, or the one that it is a part of, has opened it before: its values are believed.

    Attributes:
        file: as above.
        root: as above.
        key: as above.
        classes: class names; label k is `classes[k]`.
        passed_over: what lies there and is no sample: how often, and the first of them, by kind.
        valid: number of valid images; rows from there on are bad ones.
        decoded: number of images that were decoded to make it; 0 for one that was only opened.
        ids: int64 (rows,).
        labels: int64 (rows,).
        sizes: int32 (rows, 2), width and height of the upright image in pixels; 0 for bad ones.
        bytes: int64 (rows,), length of the encoded image; -1 for what is no regular file.

    Raises:
        ManifestError: no such file, truncated, of another version, of another key, or with values that cannot be: a
            label that no class has, or a path that leads out of `root`.
    """

    def __init__(self, file: Path, root: Path, key: str | None = None, *, checked: bool = False) -> None:
        self.file, self.root, self.decoded = file, root, 0
        try:
            with safetensors.safe_open(file, framework="pt") as content:
                header: dict[str, str] = content.metadata() or {}
                columns: dict[str, Tensor] = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise ManifestError(f"no manifest {file}") from None
        except (SafetensorError, OSError) as error:
            raise ManifestError(f"the manifest {file} is truncated or damaged: {error}") from error
        if header.get("denim_manifest") != VERSION:
            found = header.get("denim_manifest")
            what = f"version {found} of the manifest" if found else "no manifest of Denim"
            raise ManifestError(f"{file} is {what}, expected version {VERSION}")
        self._columns = {name: column.numpy() for name, column in columns.items()}
        try:
            self.key = header["key"]
            self.limit: int | None = json.loads(header["limit"])
            self.classes: tuple[str, ...] = tuple(json.loads(header["classes"]))
            self._shards: list[str] = json.loads(header["shards"])
            self._formats: list[str] = json.loads(header["formats"])
            self._reasons: list[str] = json.loads(header["reasons"])
            self._trials: list[str] = json.loads(header["trials"])
            said: dict[str, list[Any]] = json.loads(header["passed_over"])
            self.passed_over = {kind: (int(count), str(first)) for kind, (count, first) in said.items()}
            self.ids, self.labels, self.sizes = columns["ids"], columns["labels"], columns["sizes"]
            self.bytes = columns["bytes"]
            self.valid = len(self) - len(columns["faults"])
            if not checked and (why := self._inconsistency()):
                raise ManifestError(f"the manifest {file} is damaged: {why}")
        except KeyError as error:
            raise ManifestError(f"the manifest {file} is damaged: it has no {error}") from error
        except (TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ManifestError):
                raise
            raise ManifestError(f"the manifest {file} is damaged: {error}") from error
        if key is not None and key != self.key:
            raise ManifestError(f"the manifest {file} is that of another folder, or {root} has changed since")

    def _inconsistency(self) -> str:
        """Why `write` cannot have made it; empty if it can: then all that is read later is in its range."""
        columns, rows = self._columns, len(self)
        lists = (self.classes, self._shards, self._formats, self._reasons, self._trials)
        if not all(isinstance(name, str) for names in lists for name in names):
            return "its names are not text"
        expected = {name: dtype for name, dtype in COLUMNS.items() if self._shards or name not in ("shard", "offsets")}
        for name, dtype in expected.items():
            if columns[name].dtype != dtype or columns[name].ndim != 1 + (name == "sizes"):
                return f"its column {name} is {columns[name].dtype} {columns[name].shape}"
        fits = all(len(columns[name]) == rows for name in expected if name not in ("faults", "paths"))
        fits = fits and columns["sizes"].shape[1] == 2
        ends, paths = columns["ends"], columns["paths"]
        if not fits or self.valid < 0 or int(ends[-1:].sum()) != len(paths) or (np.diff(ends, prepend=0) < 0).any():
            return "its columns do not fit together"
        most = 2**63 - 1
        ranges = {
            "labels": (columns["labels"], 0, len(self.classes) - 1),
            "sizes": (columns["sizes"], 0, most),
            "sizes of valid images": (columns["sizes"][: self.valid], 1, most),
            "bytes": (columns["bytes"], -1, most),
            "formats": (columns["formats"], 0, len(self._formats) - 1),
            "plain": (columns["plain"], 0, 1),
            "dali": (columns["dali"], 0, len(self._trials) - 1),
            "faults": (columns["faults"], 0, len(self._reasons) - 1),
        }
        if self._shards:
            ranges |= {"shard": (columns["shard"], 0, len(self._shards) - 1), "offsets": (columns["offsets"], 0, most)}
        for name, (column, least, largest) in ranges.items():
            if column.size and not least <= int(column.min()) <= int(column.max()) <= largest:
                return f"its column {name} is out of range"
        outside = [name for name in self._shards if "/" in name or name in ("", ".", "..")]
        if not self._shards:
            starts = np.concatenate(([0], ends))[:rows]
            absolute = np.flatnonzero(paths[starts[starts < len(paths)]] == ord("/"))
            # Hardly any path has two dots in a row: only those that have are looked at.
            dotted = np.flatnonzero((paths[:-1] == ord(".")) & (paths[1:] == ord(".")))
            suspects = {*absolute.tolist(), *np.searchsorted(ends, dotted, "right").tolist()}
            outside = [path for row in suspects if (path := self.path(row)).startswith("/") or ".." in path.split("/")]
        return f"{outside[0]!r} is not below its folder" if outside else ""

    def __reduce__(self) -> tuple[Callable[..., Manifest], tuple[type[Manifest], Path, Path, str]]:
        # Another process maps the same pages instead of receiving a copy.
        return _reopened, (type(self), self.file, self.root, self.key)

    def __len__(self) -> int:
        """Number of rows, valid or not."""
        return len(self.ids)

    def path(self, row: int) -> str:
        """The path of a sample below `root`, or its name in its shard."""
        ends = self._columns["ends"]
        path: bytes = self._columns["paths"][ends[row - 1] if row else 0 : ends[row]].tobytes()
        return os.fsdecode(path)

    def where(self, row: int) -> str:
        """The path of a sample, or "shard.tar:member", for messages."""
        shard = self._shard(row)
        return str(self.root / f"{shard}:{self.path(row)}" if shard else self.root / self.path(row))

    def image_format(self, row: int) -> str:
        """The format of the content: see `Verdict`; empty for a bad one."""
        return self._formats[int(self._columns["formats"][row])]

    def is_plain(self, row: int) -> bool:
        """Whether any decoder sees the same picture in a sample; see `Verdict`."""
        return bool(self._columns["plain"][row])

    def dali(self, row: int) -> str:
        """What DALI makes of a sample, where it was asked; see `Verdict`."""
        return self._trials[int(self._columns["dali"][row])]

    def fault(self, row: int) -> str:
        """Why a sample cannot be used; empty for a valid one."""
        return "" if row < self.valid else self._reasons[self._columns["faults"][row - self.valid]]

    def place(self, row: int) -> Place:
        """Where the bytes of a sample are."""
        offset = int(self._columns["offsets"][row]) if self._shards else -1
        return _place(self.root, self._shard(row) or self.path(row), int(self.bytes[row]), offset)

    def open(self, row: int) -> BinaryIO:
        """The encoded image of a sample, as a binary file.

        Raises:
            OSError: no such file, or a shard that ends before the image does.
        """
        return open_place(self.place(row))

    def keep(self, file: Path) -> None:
        """Copy it to `file`, in one step: what a run began with stays, whatever is indexed anew later.

        Raises:
            OSError: it cannot be written; nothing half-written is left.
        """
        with atomic_write(file) as staged:
            shutil.copyfile(self.file, staged)

    def format_counts(self) -> dict[str, int]:
        """How many valid images there are of each format, the most frequent first."""
        counts = np.bincount(self._columns["formats"][: self.valid], minlength=len(self._formats))
        return {self._formats[k]: int(counts[k]) for k in np.argsort(-counts, kind="stable") if counts[k]}

    def _shard(self, row: int) -> str:
        return self._shards[self._columns["shard"][row]] if self._shards else ""

    def verdicts(self, listing: Listing) -> Iterator[tuple[int, Verdict]]:
        """What the decoder said of those samples of a listing that are as they were: same id, length and time.

        Yields:
            The row in the listing, and the verdict.
        """
        if not len(self):
            return
        ids, columns = listing.sample_ids(), self._columns
        order = np.argsort(columns["ids"])
        rows = order[np.searchsorted(columns["ids"], ids, sorter=order).clip(max=len(order) - 1)]
        same = columns["ids"][rows] == ids
        same &= columns["bytes"][rows] == np.array(listing.bytes)
        same &= columns["mtimes"][rows] == np.array(listing.mtimes)
        for row, own in zip(np.flatnonzero(same).tolist(), rows[same].tolist(), strict=True):
            yield row, self.verdict(own)

    def verdict(self, row: int) -> Verdict:
        """What the decoder said of a sample."""
        width, height = self.sizes[row].tolist()
        plain, dali = self.is_plain(row), self.dali(row)
        return Verdict(width, height, self.image_format(row), self.fault(row), plain, dali=dali)

    def _replace_trials(self, words: Sequence[str]) -> None:
        """Write it again, with other words of DALI on its samples."""
        trials = _Numbers()
        columns = self._columns | {"dali": np.array([trials[word] for word in words], np.uint8)}
        with safetensors.safe_open(self.file, framework="np") as content:
            header = content.metadata() | {"trials": json.dumps(list(trials))}
        _save(self.file, columns, header)

    @staticmethod
    def write(file: Path, listing: Listing, verdicts: Sequence[Verdict], key: str) -> None:
        """Write the manifest of a listing; an earlier one is replaced in one step.

        Args:
            file: its path.
            listing: the samples.
            verdicts: what the decoder says of each.
            key: what `Manifest` and `index` will compare: the listing's own, or any string that changes with it.

        Raises:
            ValueError: two samples have the same id.
            OSError: it cannot be written; nothing half-written is left.
        """
        # Valid ones first, in the order of the listing.
        order = np.argsort([bool(verdict.fault) for verdict in verdicts], kind="stable")
        formats, reasons, trials = _Numbers(), _Numbers(), _Numbers()
        paths = [bytes(os.fsencode(listing.path(row))) for row in order]
        columns: dict[str, npt.NDArray[Any]] = {
            "ids": listing.sample_ids()[order],
            "labels": np.array(listing.labels, np.int64)[order],
            "bytes": np.array(listing.bytes, np.int64)[order],
            "mtimes": np.array(listing.mtimes, np.int64)[order],
            "sizes": np.array([verdict[:2] for verdict in verdicts], np.int32).reshape(-1, 2)[order],
            "formats": np.array([formats[verdict.format] for verdict in verdicts], np.uint8)[order],
            "plain": np.array([verdict.plain for verdict in verdicts], np.uint8)[order],
            "dali": np.array([trials[verdict.dali] for verdict in verdicts], np.uint8)[order],
            "faults": np.array([reasons[verdicts[row].fault] for row in order if verdicts[row].fault], np.int32),
            "ends": np.cumsum([len(path) for path in paths], dtype=np.int64),
            "paths": np.frombuffer(b"".join(paths), np.uint8),
        }
        if listing.shards:
            columns["shard"] = np.array(listing.shard, np.int32)[order]
            columns["offsets"] = np.array(listing.offsets, np.int64)[order]
        header = {
            "denim_manifest": VERSION,
            "key": key,
            "limit": json.dumps(Image.MAX_IMAGE_PIXELS),
            "passed_over": json.dumps(listing.passed_over),
            **{
                name: json.dumps(list(values))
                for name, values in (
                    ("classes", listing.classes),
                    ("shards", listing.shards),
                    ("formats", formats),
                    ("reasons", reasons),
                    ("trials", trials),
                )
            },
        }
        _save(file, columns, header)


def _save(file: Path, columns: dict[str, npt.NDArray[Any]], header: dict[str, str]) -> None:
    try:
        with atomic_write(file) as staged:
            safetensors.numpy.save_file(columns, staged, metadata=header)
    except SafetensorError as error:  # the disk is full, say
        raise OSError(f"cannot write the manifest {file}: {error}") from error


def _reopened(kind: type[Manifest], file: Path, root: Path, key: str) -> Manifest:
    return kind(file, root, key, checked=True)


class _Numbers(dict[str, int]):
    """Numbers strings in the order in which they come."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(text, len(self))


def _place(root: Path, path: str, length: int, offset: int) -> Place:
    return Place(os.path.join(root, path), offset, length)  # noqa: PTH118 (a Path would cost as much as stat)


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
        return manifest
    file = _writable(folders) / name
    with _locked(file.with_suffix(".journal")) as journal:
        if (manifest := _current(places, root, key)) is not None:  # another process was faster
            return manifest
        listing = samples()
        names = list(zip(listing.sample_ids().tolist(), listing.bytes, listing.mtimes, strict=True))
        verdicts: dict[int, Verdict] = {}
        for place in places:
            with contextlib.suppress(ManifestError):
                if (earlier := Manifest(place, root)).limit == Image.MAX_IMAGE_PIXELS:
                    verdicts.update(earlier.verdicts(listing))
        known = dict(_read_journal(journal))
        verdicts.update((row, known[name]) for row, name in enumerate(names) if name in known)
        todo = [row for row in range(len(listing)) if row not in verdicts]
        failed: dict[int, str] = {}
        for rows, new in _judge(listing, todo):
            failed |= {row: verdict.fault for row, verdict in zip(rows, new, strict=True) if verdict.passing}
            judged = ((names[row], verdict) for row, verdict in zip(rows, new, strict=True) if not verdict.passing)
            entries = [(*name, *verdict) for name, verdict in judged]
            journal.write(json.dumps(entries).encode() + b"\n")
            journal.flush()
            verdicts.update(zip(rows, new, strict=True))
        if failed:
            some = "; ".join(f"{listing.where(row)}: {fault}" for row, fault in [*failed.items()][:NAMED])
            raise MachineError(
                f"{len(failed)} of {len(listing)} images below {root} could not be read for the machine's sake: {some}"
                ". They do not count as bad ones: remove the cause, or these files, and index again; what was decoded "
                "is kept"
            )
        Manifest.write(file, listing, [verdicts[row] for row in range(len(listing))], key)
        file.with_suffix(".journal").unlink()
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
        with os.fdopen(handle, "a+b") as file:
            with contextlib.suppress(OSError):  # a file system without locks: two processes may do the work twice
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return
        # Whoever had it has finished and removed it: what is open here has no name any more.


def _read_journal(journal: BinaryIO) -> Iterator[tuple[tuple[int, int, int], Verdict]]:
    """Verdicts of an interrupted call by id, length and time of change."""
    header = json.dumps([VERSION, Image.MAX_IMAGE_PIXELS]).encode() + b"\n"
    journal.seek(0)
    if journal.readline() != header:
        journal.truncate(0)
        journal.write(header)
        return
    whole = journal.tell()
    for line in journal:
        if not line.endswith(b"\n"):  # cut off where the process was killed
            break
        whole += len(line)
        for number, length, mtime, *verdict in json.loads(line):
            yield (number, length, mtime), Verdict(*verdict)
    journal.truncate(whole)


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
    that is killed goes on where it was (the journal beside the manifest has what was done).

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
    with _locked(manifest.file.with_suffix(".journal")) as journal:
        manifest = Manifest(manifest.file, manifest.root, manifest.key)
        names = list(
            zip(manifest.ids.tolist(), manifest.bytes.tolist(), manifest._columns["mtimes"].tolist(), strict=True)
        )
        known = {name: verdict.dali for name, verdict in _read_journal(journal) if verdict.dali in said}
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
            journal.write(json.dumps(entries).encode() + b"\n")
            journal.flush()
        manifest._replace_trials(words)
        manifest.file.with_suffix(".journal").unlink()
    return Manifest(manifest.file, manifest.root, manifest.key)
