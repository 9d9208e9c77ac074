"""WebDataset shards: tar files whose members are images and what belongs to them; written, indexed, read by offset.

A sample is a run of members that share a key, the part of the name before the first dot of its last component
("cat/0001" in "cat/0001.jpg"); what follows is the extension. Its image is the member with the extension of an image,
its label the whole number in the member "cls", or that under "label" in the member "json", counted from 0.

Shards are read at any position, in the order of the loader, which is exact: the same batch at the same step, on any
number of ranks, after any resume. They are not streamed from front to back: that takes a buffer that shuffles, and a
batch would then depend on the size of the buffer, the number of readers and the step at which a run resumed. A sample
costs one request to the storage. Where requests are slow, have many under way (workers), or copy the shards to a local
disk, which is fast for a few large files.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from denim.nim.data.decode import EXTENSIONS
from denim.nim.data.indexing import index
from denim.nim.data.listing import Listing, sample_id
from denim.nim.data.manifest import Manifest
from denim.nim.files import atomic_write, read_json, translated
from denim.nim.text import open_console

__all__ = ["Packed", "ShardManifest", "list_members", "list_shards", "open_shards", "pack"]

BLOCK = 512  # of a tar archive: a header is one, contents are padded to whole ones
OPEN_SHARDS = 256  # descriptors that a process keeps; systems allow 1024 or more
PADDING = 1 << 20  # zeros at the end: writers fill the last record, of 10 KiB as a rule
CHUNK = 1 << 20  # bytes of zeros that are looked through at a time
FACTS = 1 << 22  # bytes of a "cls" or "json" member at most: the names of 100,000 classes fit
CLASSES = 1 << 24  # a larger number is no label
FORMAT_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif"}  # others: the name of the format
_T = TypeVar("_T")
RECORD = ".denim-pack.json"  # in a folder of shards: which call made it, and what that could not read


def list_shards(folder: Path) -> list[str]:
    """Names of the tar files in a folder, sorted; none where folders or images lie beside them.

    Raises:
        ValueError: they are compressed.
    """
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    if any(entry.is_dir() or entry.suffix.lower() in EXTENSIONS for entry in entries):
        return []
    shards = sorted(entry.name for entry in entries if entry.suffix == ".tar")
    compressed = sorted(entry.name for entry in entries if re.search(r"\.(tgz|tar\.\w+)$", entry.name))
    if compressed and not shards:
        raise ValueError(
            f"{folder / compressed[0]} is compressed, and members of a shard are read at any position: decompress it "
            "to a .tar file (images hardly grow by that)"
        )
    return shards


def open_shards(
    root: Path,
    shards: Sequence[str],
    *,
    others: Sequence[str] = (),
    labelled: bool = True,
    check: Callable[[Sequence[str]], None] = lambda classes: None,
    cache: Path | None = None,
    part: str = "",
) -> Manifest:
    """The manifest of the images in shards: the one that is there if none of them has changed, else brought up to date.

    Shards of `pack` give the ids, labels, classes and order of what was packed. In others, the id of a sample is that
    of "shard/key" (see `sample_id`), for keys often begin anew in each shard: it stays when shards are added, removed
    or listed in another order. Hidden members are ignored, and so are those with other extensions. Classes are the
    labels that occur, in the order of their numbers; where no member says the name of a class, it is the number.

    Of a shard that is truncated, or damaged between members, the part before is used, and the rest counts as one bad
    image.

    Args:
        root: folder of the shards.
        shards: their names.
        others: names of files beside them that are passed over.
        labelled: False takes samples without labels too; where one has none, all have the class "".
        check: called with the names of the classes before any image is decoded; may raise.
        cache: folder to keep the manifest in, instead of `cache_folder()`.
        part: see `index`.

    Raises:
        ValueError: a file is no tar archive, or has no images; a sample has no label, or several images; two samples
            have the same id; a label has several names, or a name several labels.
        OSError: a shard cannot be read, or the manifest cannot be written.
    """
    stamps = []
    for shard in shards:
        info = (root / shard).stat()
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            raise ValueError(f"{root / shard} is not a regular file: replace it, or remove it")
        stamps.append((shard, info.st_size, info.st_mtime_ns))
    key = hashlib.blake2b(json.dumps([stamps, *sorted(others)]).encode(), digest_size=16).hexdigest()

    def samples() -> Listing:
        listing = list_members(root, shards, labelled=labelled)
        for name in others:
            listing.pass_over_file(name)
        check(listing.classes)
        return listing

    made = index(root, key, samples, cache, part)
    check(made.classes)
    if labelled and made.classes == ("",):  # from a call without labels; this one finds the sample that has none
        list_members(root, shards)
    manifest = ShardManifest(made.file, root, key, checked=True)
    manifest.decoded = made.decoded
    return manifest


class ShardManifest(Manifest):
    """A manifest of members of shards. It keeps shards open, since opening is a request to the storage too.

    A shard that is replaced or removed goes on being read where it is open.
    """

    def open(self, row: int) -> BinaryIO:
        """The encoded image of a sample, as a binary file. Any number of threads may call it at once.

        Raises:
            OSError: no such shard, one that ends before the image does, or one with something else at its place.
        """
        file, offset, length = self.place(row)
        if length < 0:
            return super().open(row)
        shard = _opened(file, int(self._columns["mtimes"][row]))
        # By position: threads and forked processes share the descriptor. `shard` keeps it open until this returns.
        content = os.pread(shard.number, BLOCK + length, offset - BLOCK)
        if len(content) < BLOCK + length:
            raise OSError(f"{file} ends {BLOCK + length - len(content)} bytes before the image does")
        if not _is_header(content[:BLOCK], self.path(row), length):
            raise OSError(f"{file} has changed since it was indexed: the image is no longer at its place")
        return io.BytesIO(content[BLOCK:])


def _is_header(block: bytes, path: str, length: int) -> bool:
    """Whether a block can be the header of this member. Times of change will not do: a copy has another one."""
    name, size, whole = block[:100].split(b"\0")[0], block[124:136].strip(b" \0"), os.fsencode(path)
    # A name that is longer than its field, or not ASCII, may stand elsewhere, and something like it here.
    fits = whole.endswith(name) or len(whole) > 100 or not whole.isascii()
    return bool(name) and fits and re.fullmatch(rb"[0-7]+", size) is not None and int(size, 8) == length


class _Descriptor:
    """An open file, until nobody holds this: a thread may still read when the cache lets go of it."""

    def __init__(self, file: str) -> None:
        self.number = os.open(file, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(OPEN_SHARDS)
def _opened(file: str, _mtime: int) -> _Descriptor:
    return _Descriptor(file)


class _Sample(NamedTuple):
    name: str  # of the image
    size: int
    offset: int
    id: int
    position: int | None  # in what it was packed from
    label: int | None
    titles: dict[int, str]  # names of classes that it says


def list_members(root: Path, shards: Sequence[str], *, labelled: bool = True) -> Listing:
    """The images in shards, by their headers alone. Arguments and errors: see `open_shards`."""
    found, positions, titles = Listing(root, (), shards), array("q"), dict[int, str]()
    complete = True
    for number, shard in enumerate(_progress(shards, "listing shards")):
        mtime = (root / shard).stat().st_mtime_ns
        for name, size, offset, id, position, label, said in _samples(root / shard, found):
            if label is None and labelled:
                raise ValueError(
                    f"{root / shard}:{name} has no label: expected a whole number from 0 in a member with the "
                    'extension "cls", or under "label" in one with the extension "json"'
                )
            complete &= label is not None
            for k, title in said.items():
                if titles.setdefault(k, title) != title:
                    raise ValueError(
                        f"label {k} is class {title!r} in {root / shard}:{name}, and {titles[k]!r} in an earlier "
                        "sample: these shards are of different data sets"
                    )
            found.add_member(name, label or 0, size, mtime, id, number, offset)
            positions.append(len(positions) if position is None else position)
    if not len(found):
        raise ValueError(f"no images in the shards in {root}: expected members with {' '.join(sorted(EXTENSIONS))}")
    names = (
        {label: titles.get(label, str(label)) for label in sorted({*found.labels, *titles})} if complete else {0: ""}
    )
    numbers = {label: number for number, label in enumerate(names)}
    if len(set(names.values())) < len(names):
        twin = next(name for name in names.values() if [*names.values()].count(name) > 1)
        raise ValueError(f"several labels in the shards in {root} have the class {twin!r}: give each class one label")
    listing = Listing(root, [*names.values()], shards)
    listing.passed_over = found.passed_over
    for row in np.argsort(positions, kind="stable").tolist():
        label = numbers[found.labels[row]] if complete else 0
        place = found.bytes[row], found.mtimes[row], found.ids[row], found.shard[row], found.offsets[row]
        listing.add_member(found.path(row), label, *place)
    return listing


def _samples(shard: Path, listing: Listing) -> list[_Sample]:
    """The images of a shard. Members that belong to none of them are passed over in `listing`."""
    samples: list[_Sample] = []
    with shard.open("rb") as file:
        archive = _Archive(file)
        visible = (member for member in archive if not _passes_over(listing, shard, member))
        for key, members in groupby(visible, lambda member: _key_and_extension(member.name)[0]):
            images: list[tarfile.TarInfo] = []
            dotted: list[tarfile.TarInfo] = []
            others: list[str] = []
            facts: dict[str, Any] = {}
            for member in members:
                extension = _key_and_extension(member.name)[1]
                if f".{extension}" in EXTENSIONS:
                    images.append(member)
                elif f".{extension.rpartition('.')[2]}" in EXTENSIONS:
                    dotted.append(member)
                elif extension in ("json", "cls") and member.isreg() and member.size <= FACTS:
                    facts |= _facts(extension, os.pread(file.fileno(), member.size, member.offset_data))
                else:
                    others.append(member.name)
            if len(images) > 1 or (dotted and not images):
                raise ValueError(
                    f"{shard}: which image belongs to the key {key!r}? {', '.join(m.name for m in images + dotted)}: "
                    "a key ends at the first dot of a file name; pack these images with other names"
                )
            for name in others + [member.name for member in dotted]:
                listing.pass_over_file(f"{shard.name}:{name}")
            if facts and not images:
                listing.pass_over("labels without an image", f"{shard.name}:{key}")
            for image in images:
                size = image.size if image.isreg() and not image.issparse() else -1
                id = facts.get("id", sample_id(f"{shard.name}/{key}"))
                place = image.name, size, image.offset_data, id
                samples.append(_Sample(*place, facts.get("position"), facts.get("label"), facts.get("titles", {})))
        cut_off = len(samples) > 1 and samples[-1].label is None and samples[-2].label is not None
        if archive.damage is None and not archive.marked and cut_off:
            archive.damage = archive.end
        if archive.damage is not None:
            if cut_off:
                samples.pop()  # its label was to follow
            name = f"(what was after byte {archive.damage})"
            samples.append(_Sample(name, BLOCK, archive.damage, sample_id(f"{shard.name}/{name}"), None, 0, {}))
    return samples


class _Archive:
    """The members of a tar file up to its real end, folders left out.

    An archive ends with two blocks of zeros, and more where the writer fills a record. What follows them is read where
    it is an archive too (`cat a.tar b.tar`); a file that ends with a whole member has lost nothing.

    Attributes:
        marked: whether the last archive in the file has its end mark.
        damage: position of the first byte that belongs to no member and no end mark; None where there is none.
        end: the length of the file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.marked, self.end = False, os.fstat(file.fileno()).st_size
        self.damage: int | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        start: int | None = 0
        while start is not None:
            stop = yield from self._one(start)
            start = None
            if stop is not None:
                self.marked = os.pread(self._file.fileno(), BLOCK, stop) == bytes(BLOCK)
                after = self._after_zeros(stop)
                if after == self.end:
                    # A crash of the system leaves zeros too, and more of them.
                    self.damage = stop if self.end - stop > PADDING else None
                elif self.marked:
                    start = after
                else:
                    self.damage = stop

    def _one(self, start: int) -> Generator[tarfile.TarInfo, None, int | None]:
        """The members of the archive that begins at a position. Returns where it stops; None where it is damaged."""
        self._file.seek(start)
        stop, whole, empty = start, start, True
        try:
            tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115 (all that is open is the file)
            stop = tar.offset
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                # Some versions of Python take a negative length, and go back and forth for ever.
                if member.size < 0 or tar.offset <= whole:
                    break
                empty, whole = False, tar.offset
                if not member.isdir():
                    yield member
                if tar.offset > self.end and (member.issparse() or member.offset_data + member.size > self.end):
                    self.damage = self.end
                    return None
            stop = tar.offset
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            if empty and start == 0 and not isinstance(error, RecursionError):
                raise ValueError(f"{self._file.name} is no tar archive ({error}): replace it, or remove it") from error
        if empty and start > 0:
            self.damage = start
            return None
        return max(stop, whole)

    def _after_zeros(self, position: int) -> int:
        """The first block from a position on that has anything but zeros; the end of the file where none has."""
        while position < self.end:
            content = os.pread(self._file.fileno(), CHUNK, position)
            zeros = len(content) - len(content.lstrip(b"\0"))
            if zeros < len(content):
                return position + zeros // BLOCK * BLOCK
            position += len(content)
        return self.end


def _passes_over(listing: Listing, shard: Path, member: tarfile.TarInfo) -> bool:
    """Whether a member belongs to no sample by its name, as those that macOS and packers put between the others."""
    name = member.name.rpartition("/")[2]
    passed = name.startswith(".") or (name.startswith("__") and name.endswith("__"))
    if passed:
        listing.pass_over("hidden", f"{shard.name}:{member.name}")
    return passed


def _key_and_extension(name: str) -> tuple[str, str]:
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _facts(extension: str, content: bytes) -> dict[str, Any]:
    """What a "cls" or "json" member says of label, and one of `pack` of id, position and names of classes too."""
    facts: dict[str, Any] = {}
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return facts
    if extension == "cls":
        said = {"label": said}
    if not isinstance(said, dict):
        return facts
    if type(said.get("label")) is int and 0 <= said["label"] < CLASSES:
        facts["label"] = said["label"]
    match said:
        case {"denim": {"id": int(id), "position": int(position), **rest}} if _is_int64(id) and _is_int64(position):
            facts |= {"id": id, "position": position}
            names = rest.get("classes")
            facts["titles"] = dict(enumerate(map(str, names))) if isinstance(names, list) else {}
            if "label" in facts and "class" in said:
                facts["titles"][facts["label"]] = str(said["class"])
    return facts


def _is_int64(value: int) -> bool:
    return -(1 << 63) <= value < 1 << 63


class Packed(NamedTuple):
    """What `pack` wrote.

    Attributes:
        shards: number of files.
        samples: number of images.
        bytes: length of all files.
        lost: "path: reason" of every image that could no longer be read and is not in.
    """

    shards: int
    samples: int
    bytes: int
    lost: tuple[str, ...]


def pack(manifest: Manifest, folder: Path, name: str, shard_bytes: int = 256_000_000) -> Packed:
    """Write the valid images of a manifest to `folder/name-000000.tar`, ..., which then are all there, or none.

    A sample is a json member and the image, whose bytes are unchanged. The json holds label, class, path, and under
    "denim" id and position, and that of the first sample of a shard all classes, so that a source made from the shards
    is the same as one made from `manifest`: its batches, crops and noise too. Samples lie in the order of their ids,
    which is a random one if those are hashes, as readers want that stream shards. The same manifest gives the same
    bytes.

    Shards are made in a hidden folder beside `folder` that takes its name at the end. A call that was interrupted, or
    found the disk full, leaves the shards that were finished there, and the same call goes on after them. Where one is
    finished, the same call does nothing.

    Args:
        manifest: with at least one valid image.
        folder: a new one, or empty.
        name: of the shards.
        shard_bytes: length of a shard, up to one image more or less.

    Raises:
        ValueError: `folder` has something else in it, or a damaged record of an earlier call; no images; `shard_bytes`
            below 1; another process is at it.
        OSError: not enough space, or it cannot be written.
    """
    if not manifest.valid:
        raise ValueError(f"none of the {len(manifest)} images below {manifest.root} can be read")
    if shard_bytes < 1:
        raise ValueError(f"a shard has at least 1 byte, got {shard_bytes}")
    order = np.argsort(manifest.ids[: manifest.valid].numpy().view(np.uint64))
    # Two headers, a json that mostly takes one block, and the image.
    costs = BLOCK * (3 + -(-manifest.bytes.numpy()[order] // BLOCK))
    shard_of = np.unique((np.cumsum(costs) - costs) // shard_bytes, return_inverse=True)[1]
    parts = np.split(order, np.flatnonzero(np.diff(shard_of)) + 1)
    names = [f"{name}-{number:06d}.tar" for number in range(len(parts))]
    call = json.dumps([manifest.key, str(manifest.root.resolve()), name, shard_bytes]).encode()
    plan = hashlib.blake2b(call, digest_size=16).hexdigest()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        lost = _lost(folder, plan)
        if lost is None:
            raise ValueError(f"{folder} exists already: name another folder, or delete it")
    else:
        staging = folder.parent / f".{folder.name}.packing"
        with translated(folder), _sole(staging, plan) as lost:
            missing = np.bincount(shard_of, costs)[[not (staging / name).exists() for name in names]].sum()
            if missing > (free := shutil.disk_usage(staging).free):
                raise OSError(f"{folder} needs {missing / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")
            try:
                for rows, name in _progress(list(zip(parts, names, strict=True)), "packing"):
                    if not (staging / name).exists():
                        with atomic_write(staging / name) as staged:
                            if new := _write(staged, manifest, rows):
                                lost += new
                                _keep(staging, plan, lost)
            except OSError as error:
                why = os.strerror(error.errno) if error.errno else error
                raise OSError(
                    f"cannot write {folder / name}: {why}. What is finished is in {staging}: the same call goes on "
                    "there, or delete it"
                ) from error
            staging.rename(folder)
    length = sum((folder / name).stat().st_size for name in names)
    return Packed(len(names), len(order) - len(lost), length, tuple(lost))


@contextlib.contextmanager
def _sole(staging: Path, plan: str) -> Iterator[list[str]]:
    """The folder, with nothing in it but whole shards of this plan, and for no other process meanwhile.

    Yields:
        What earlier calls could not read.
    """
    staging.mkdir(parents=True, exist_ok=True)
    # Not through a link: what is in the folder is removed.
    handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is packing in {staging}") from None
        except OSError:  # a file system without locks
            pass
        lost = _lost(staging, plan)
        for entry in staging.iterdir():
            if lost is None or entry.suffix not in (".tar", ".json"):  # what is half-written ends otherwise
                entry.unlink()
        if lost is None:
            _keep(staging, plan, lost := [])
        yield lost
    finally:
        os.close(handle)


def _lost(folder: Path, plan: str) -> list[str] | None:
    """What could not be read, from the record in a folder; None where it has none of this plan.

    Raises:
        DamagedFileError: the record is damaged.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    record = read_json(file, {"plan": str, "lost": list})
    return [str(line) for line in record["lost"]] if record["plan"] == plan else None


def _keep(folder: Path, plan: str, lost: list[str]) -> None:
    with atomic_write(folder / RECORD) as staged:
        staged.write_text(json.dumps({"plan": plan, "lost": lost}))


def _write(file: Path, manifest: Manifest, rows: npt.NDArray[np.int64]) -> list[str]:
    """One shard; returns what is not in it, and why."""
    lost: list[str] = []
    with file.open("wb") as tar:
        for row in rows.tolist():
            try:
                with manifest.open(row) as image:
                    content = image.read()
            except OSError as error:
                lost.append(f"{manifest.path(row)}: {error.strerror or error}")
                continue
            if len(content) != manifest.bytes[row]:
                lost.append(f"{manifest.path(row)}: has changed since it was indexed")
                continue
            id, label = int(manifest.ids[row]), int(manifest.labels[row])
            facts: dict[str, Any] = {"path": manifest.path(row), "denim": {"id": id, "position": row}}
            if manifest.classes != ("",):
                facts = {"label": label, "class": manifest.classes[label], **facts}
                if not tar.tell():  # a class without an image keeps its number
                    facts["denim"]["classes"] = manifest.classes
            # Hexadecimal and of one length: no dots, and sorted as the samples are.
            key, kind = f"{id & (1 << 64) - 1:016x}", manifest.image_format(row)
            for extension, part in (
                ("json", json.dumps(facts).encode()),
                (FORMAT_EXTENSIONS.get(kind, kind.lower()), content),
            ):
                # All else is constant: nothing of the machine or the time gets in.
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(part)
                tar.write(member.tobuf(tarfile.USTAR_FORMAT) + part + bytes(-len(part) % BLOCK))
        tar.write(bytes(2 * BLOCK))
    return lost


def _progress(items: Sequence[_T], what: str) -> Iterable[_T]:
    from rich.progress import track

    console = open_console(stderr=True)
    return track(items, what, console=console, disable=not console.is_terminal)
