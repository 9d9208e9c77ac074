"""The manifest: every sample of a data set with its id, label, place, size and validity, decoded once and kept.

One safetensors file, memory-mapped: opening it reads its header, and a column takes memory as it is used. Rows of valid
images come first, so that sample k of a source is row k; what cannot be decoded follows with its reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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

from denim.nim.data.decode import Place, Verdict, open_place
from denim.nim.data.listing import Listing, place_below
from denim.nim.files import atomic_write

__all__ = [
    "VERSION",
    "Manifest",
    "ManifestError",
]

VERSION = "3"
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


class ManifestError(ValueError):
    """A manifest is missing, damaged, of another version or of other files."""


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
        ManifestError: no such file, truncated, of another version, of another key, not as it was written (by its
            digest), or with values that cannot be: a label that no class has, or a path that leads out of `root`.
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
        if not checked and header.get("digest") != _digest(self._columns, header):
            raise ManifestError(f"the manifest {file} is damaged: its digest is not that of its content")
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
        return place_below(self.root, self._shard(row) or self.path(row), int(self.bytes[row]), offset)

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
            header: dict[str, str] = content.metadata() | {"trials": json.dumps(list(trials))}
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


def _save(file: Path, columns: Mapping[str, npt.NDArray[Any]], header: Mapping[str, str]) -> None:
    header = {**header, "digest": _digest(columns, header)}
    # In a folder of its own: in the user's cache, what a killed process has left is told from what others write. Who
    # writes a manifest has its lock.
    folder = file.with_suffix(".part")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic_write(folder / file.name) as staged:
            safetensors.numpy.save_file(dict(columns), staged, metadata=header)
        (folder / file.name).replace(file)
    except SafetensorError as error:  # the disk is full, say
        raise OSError(f"cannot write the manifest {file}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _digest(columns: Mapping[str, npt.NDArray[Any]], header: Mapping[str, str]) -> str:
    """Of all that a manifest holds: a flipped bit may leave every value in its range."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(
        json.dumps({name: text for name, text in header.items() if name != "digest"}, sort_keys=True).encode()
    )
    for name, column in sorted(columns.items()):
        digest.update(f"{name} {column.dtype} {column.shape}".encode())
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _reopened(kind: type[Manifest], file: Path, root: Path, key: str) -> Manifest:
    return kind(file, root, key, checked=True)


class _Numbers(dict[str, int]):
    """Numbers strings in the order in which they come."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(text, len(self))
