"""Records of an evaluation: one for each (defense, attack, image), in SQLite, packed into columns batch by batch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from denim.nim.files import DamagedFileError, WriteError

__all__ = ["RecordColumns", "Records"]

Array = npt.NDArray[Any]

# "Deni" as the application of the file, and the version of its tables.
APPLICATION, VERSION = 0x44656E69, 2
KEPT = "CREATE TABLE kept (key BLOB PRIMARY KEY, content BLOB NOT NULL, digest BLOB NOT NULL)"
SCHEMA = (
    """CREATE TABLE cells (
        number INTEGER PRIMARY KEY,
        key BLOB NOT NULL UNIQUE,
        target BLOB NOT NULL,
        random INTEGER NOT NULL,
        defense TEXT NOT NULL,
        attack TEXT NOT NULL
    )""",
    """CREATE TABLE blocks (
        number INTEGER PRIMARY KEY,
        cell INTEGER NOT NULL REFERENCES cells (number),
        count INTEGER NOT NULL,
        images BLOB NOT NULL,
        ids BLOB NOT NULL,
        labels BLOB NOT NULL,
        predictions BLOB NOT NULL,
        missed BLOB NOT NULL,
        flags BLOB NOT NULL,
        gradients BLOB NOT NULL,
        digest BLOB NOT NULL,
        seconds REAL
    )""",
    KEPT,
    "CREATE INDEX blocks_of_cell ON blocks (cell)",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)
# From files of an earlier version to the next one.
UPGRADES = {1: ("ALTER TABLE blocks ADD COLUMN seconds REAL", KEPT, "PRAGMA user_version = 2")}
# What is appended is on the disk: it outlives a power cut.
SYNCHRONOUS = "FULL"
# How the columns of a block are stored: their numbers, little-endian, and how many of them a record has; None is any.
LAYOUT: dict[str, tuple[str, int | None]] = {
    "images": ("<u8", 2),
    "ids": ("<i8", 1),
    "labels": ("<i4", 1),
    "predictions": ("<u2", None),
    "missed": ("<i4", 1),
    "flags": ("u1", 1),
    "gradients": ("<i4", 1),
}
# What is wrong, by the primary code of an error of SQLite, as the system would number it.
REFUSALS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
}


@dataclass(frozen=True)
class RecordColumns:
    """Records of one defense under one attack, as columns of N entries.

    Attributes:
        images: uint64 (N, 2), digests of the images with their ids and labels.
        ids: int64 (N,), sample ids.
        labels: int32 (N,).
        predictions: uint16 (N, R), classes on the score draws. R is 1 for a deterministic defense.
        missed: int32 (N,), confirmation draws that did not give the label; -1 where none were made.
        flags: uint8 (N,). `ZERO_GRADIENT`: the gradient was zero at some step. `BAD_GRADIENT`: it was not finite.
        gradients: int32 (N,), backward passes that the attack spent; -1 where it does not say.
        seconds: float64 (N,), share of an image in the time of the pass that made its record; NaN where not known.
    """

    images: Array
    ids: Array
    labels: Array
    predictions: Array
    missed: Array
    flags: Array
    gradients: Array
    seconds: Array

    ZERO_GRADIENT = 1
    BAD_GRADIENT = 2

    def __len__(self) -> int:
        """Number of records, N."""
        return len(self.images)

    def at(self, rows: Array) -> RecordColumns:
        """The records of these rows, int (M,)."""
        return RecordColumns(*(getattr(self, field.name)[rows] for field in fields(self)))

    def find(self, images: Array, *, confirmed: bool = False) -> Array:
        """Where the record of each image is.

        Args:
            images: uint64 (M, 2), digests.
            confirmed: take no records without confirmation draws.

        Returns:
            int64 (M,), rows of these columns; -1 where there is no such record.
        """
        rows = np.flatnonzero(self.missed >= 0) if confirmed else np.arange(len(self))
        if not len(rows):
            return np.full(len(images), -1)
        # By the first word of the digest, records with confirmation draws first: an image that was attacked again for
        # its confirmation draws has two records with the same predictions.
        rows = rows[np.lexsort((self.missed[rows] < 0, self.images[rows, 0]))]
        places = np.searchsorted(self.images[rows, 0], images[:, 0]).clip(max=len(rows) - 1)
        found: Array = rows[places]
        return np.where((self.images[found] == images).all(axis=1), found, -1)


class Records:
    """The records in the folder of an evaluation.

    Each process of an evaluation appends to a file of its own, `records.sqlite` or, of rank r > 0, `records-r.sqlite`,
    and reads those of all. A file has a table of cells and one of blocks. A cell has a key, the digest of all that its
    records were computed from but the image; a block has the records of one batch in one cell, each column as one
    blob, a digest of them, and the seconds that they took. To append a block is one transaction: a process that is
    killed loses the block that it was writing, and SQLite takes back what it has left half-written when the file is
    opened the next time.

    A third table keeps what is not of one image, such as the findings of health checks, under keys of the same kind.

    One block is one row, so that 50,000 images are a few hundred rows: a row for each image would be a Python object
    for each image on the way from SQLite to NumPy.

    Args:
        folder: of the evaluation; nothing is written there before `append`.
        rank: of this process.

    Raises:
        DamagedFileError: a file holds something else, or its content has changed.
        WriteError: the system refuses to open a file.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.file = folder / (f"records-{rank}.sqlite" if rank else "records.sqlite")
        self._own: sqlite3.Connection | None = None
        self._all: dict[Path, sqlite3.Connection] = {}
        try:
            for file in sorted(folder.glob("records*.sqlite")):
                self._all[file] = _opened(file, "rw")
        except BaseException:
            self.close()
            raise
        self._own = self._all.get(self.file)
        self._numbers: dict[bytes, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for connection in self._all.values():
            connection.close()
        self._all.clear()

    def is_random(self, target: bytes) -> bool | None:
        """Whether a target draws at random, as the records say that were made of it; None if there are none.

        Raises:
            DamagedFileError, WriteError: see `Records`.
        """
        for file, connection in self._all.items():
            with _translated(file):
                row = connection.execute("SELECT random FROM cells WHERE target = ?", (target,)).fetchone()
            if row is not None:
                return bool(row[0])
        return None

    def cell(self, key: bytes) -> RecordColumns:
        """All records of a cell, none where there is no such cell.

        Raises:
            DamagedFileError, WriteError: see `Records`.
        """
        blobs: dict[str, list[bytes]] = {name: [] for name in LAYOUT}
        seconds = [np.empty(0)]
        count, draws = 0, set()
        for file, connection in self._all.items():
            with _translated(file):
                rows = connection.execute(
                    f"SELECT blocks.number, count, digest, seconds, {', '.join(LAYOUT)} FROM blocks "
                    "JOIN cells ON cells.number = cell WHERE key = ? ORDER BY blocks.number",
                    (key,),
                )
                for number, size, digest, spent, *columns in rows:
                    fits = all(isinstance(column, bytes) for column in columns) and _digest(columns) == digest
                    if not fits or not size:
                        raise _damaged(file, f"what it holds as block {number} has changed since it was written")
                    count += size
                    seconds.append(np.full(size, math.nan if spent is None else spent / size))
                    draws.add(len(columns[3]) // (2 * size))
                    for name, column in zip(LAYOUT, columns, strict=True):
                        blobs[name].append(column)
        if len(draws) > 1:
            raise _damaged(self.file, f"records of one cell have {' and '.join(map(str, sorted(draws)))} predictions")
        arrays = {}
        for name, (kind, width) in LAYOUT.items():
            flat = np.frombuffer(b"".join(blobs.pop(name)), kind)
            shape = (count,) if width == 1 else (count, width or max(draws, default=1))
            if flat.size != np.prod(shape):
                raise _damaged(self.file, f"its column {name} has {flat.size} numbers for {count} records")
            arrays[name] = flat.reshape(shape)
        return RecordColumns(**arrays, seconds=np.concatenate(seconds))

    def kept(self, key: bytes) -> Any:
        """What `keep` was given with a key; None where there is nothing.

        Raises:
            DamagedFileError, WriteError: see `Records`.
        """
        for file, connection in self._all.items():
            with _translated(file):
                row = connection.execute("SELECT content, digest FROM kept WHERE key = ?", (key,)).fetchone()
            if row is not None:
                if not isinstance(row[0], bytes) or _digest([row[0]]) != row[1]:
                    raise _damaged(file, "what it keeps beside the records has changed since it was written")
                return json.loads(row[0])
        return None

    def keep(self, key: bytes, content: Any) -> None:
        """Keep something beside the records: a result that is not of one image. It replaces what has that key.

        Args:
            key: digest of all that it was computed from.
            content: for JSON.

        Raises:
            DamagedFileError, WriteError: see `Records`; nothing has been kept then.
        """
        text = json.dumps(content).encode()
        with _translated(self.file):
            own = self._opened_own()
            with _transaction(own):
                own.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", (key, text, _digest([text])))

    def append(self, key: bytes, target: bytes, is_random: bool, names: tuple[str, str], block: RecordColumns) -> None:
        """Append the records of a batch, all or none of them.

        Args:
            key: of the cell.
            target: digest of the defense.
            is_random: whether its draws differ.
            names: of the defense and the attack, for people who look into the file.
            block: the records, at least one.

        Raises:
            ValueError: a class does not fit into the 16 bits of a prediction.
            DamagedFileError, WriteError: see `Records`; nothing has been appended then.
        """
        largest = int(np.asarray(block.predictions).max(initial=0))
        if largest > np.iinfo(np.uint16).max:
            raise ValueError(f"records hold classes up to {np.iinfo(np.uint16).max}, got {largest}")
        columns = [
            np.ascontiguousarray(getattr(block, name)).astype(kind).tobytes() for name, (kind, _) in LAYOUT.items()
        ]
        with _translated(self.file):
            own = self._opened_own()
            with _transaction(own):
                if key not in self._numbers:
                    own.execute(
                        "INSERT OR IGNORE INTO cells (key, target, random, defense, attack) VALUES (?, ?, ?, ?, ?)",
                        (
                            key,
                            target,
                            is_random,
                            *(name.encode("utf-8", "backslashreplace").decode() for name in names),
                        ),
                    )
                    (number,) = own.execute("SELECT number FROM cells WHERE key = ?", (key,)).fetchone()
                else:
                    number = self._numbers[key]
                own.execute(
                    f"INSERT INTO blocks (cell, count, digest, seconds, {', '.join(LAYOUT)}) "
                    f"VALUES (?, ?, ?, ?, {', '.join('?' * len(LAYOUT))})",
                    (number, len(block), _digest(columns), float(block.seconds.sum()), *columns),
                )
            self._numbers[key] = number

    def _opened_own(self) -> sqlite3.Connection:
        """The connection to the file of this process, which is made where absent."""
        if self._own is None:
            self._own = self._all[self.file] = _opened(self.file, "rwc")
        return self._own


def _digest(columns: list[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=8)
    for column in columns:
        digest.update(len(column).to_bytes(8, "little"))
        digest.update(column)
    return digest.digest()


def _opened(file: Path, mode: str) -> sqlite3.Connection:
    """A connection to a file, which is made where absent and the mode is "rwc"."""
    if file.is_symlink():  # where it leads, a folder that came from elsewhere decides
        raise WriteError(errno.ELOOP, file)
    with _translated(file):
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None)
        try:
            connection.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            # A file from elsewhere may hold triggers and views: they must not call functions of this process.
            connection.execute("PRAGMA trusted_schema = OFF")
            # A process that was killed while it made the file has left it without tables.
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                with _transaction(connection):
                    for statement in SCHEMA:
                        connection.execute(statement)
            if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
                raise _damaged(file, "it is a database of something else")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version in UPGRADES:
                with _transaction(connection):
                    # Another rank may have been first.
                    while (version := connection.execute("PRAGMA user_version").fetchone()[0]) in UPGRADES:
                        for statement in UPGRADES[version]:
                            connection.execute(statement)
            if version != VERSION:
                raise DamagedFileError(
                    f"{file} has records of version {version}, and this Denim reads version {VERSION}: take another "
                    "folder, or the Denim that wrote it"
                )
        except BaseException:
            connection.close()
            raise
    return connection


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Inside, statements are done all or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite itself takes back what a full disk has refused
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _translated(file: Path) -> Iterator[None]:
    """Inside, errors of SQLite become those of other files of Denim."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in REFUSALS:
            raise WriteError(REFUSALS[code], file) from error
        raise _damaged(file, str(error)) from error


def _damaged(file: Path, why: str) -> DamagedFileError:
    return DamagedFileError(f"{file} is damaged: {why}; move it away, and its records are computed anew")
