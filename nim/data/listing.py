"""The listing: the samples of a data set before any of them is decoded, and what lies among them and is no sample."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from denim.nim.data.decode import EXTENSIONS, Place

__all__ = [
    "Listing",
    "count_passed_over",
    "list_images",
    "passed_over",
    "place_below",
    "sample_id",
]

KINDS = 20  # of what is passed over, that are told apart
# What systems and network storage put among a user's folders: thumbnails, waste, copies. Their pictures are nobody's.
SYSTEM_FOLDERS = frozenset((
    "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "lost+found",
    "System Volume Information",
))  # fmt: skip


def sample_id(path: str) -> int:
    """The id of a sample: the 8-byte BLAKE2b hash of its path, read as a little-endian int64.

    Args:
        path: below the folder that holds the class folders, with slashes ("cat/0001.jpg").
    """
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "little", signed=True)


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
            return place_below(self.root, self.shards[self.shard[row]], self.bytes[row], self.offsets[row])
        return place_below(self.root, self.path(row), self.bytes[row], -1)

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


def place_below(root: Path, path: str, length: int, offset: int) -> Place:
    """The place of a file, or of a part of it, whose path is below a folder."""
    return Place(os.path.join(root, path), offset, length)  # noqa: PTH118 (a Path would cost as much as stat)
