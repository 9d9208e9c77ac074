"""Where images come from: a folder of images, scikit-learn's digits, or CIFAR by name."""

from __future__ import annotations

import copy
import errno
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from denim.kernels import Domain, derive_seeds, noise_words
from denim.nim.data.decode import (
    EXTENSIONS,
    MachineError,
    decode,
    is_machines,
    patiently,
    read_content,
    reason,
)
from denim.nim.data.indexing import cache_folder, index
from denim.nim.data.listing import count_passed_over, list_images, passed_over
from denim.nim.data.manifest import Manifest
from denim.nim.data.shards import ShardManifest, list_shards, open_shards

__all__ = [
    "Cifar",
    "Digits",
    "EncodedSource",
    "ImageFolder",
    "ManifestSource",
    "Source",
    "Subset",
    "hold_out",
    "match_classes",
    "open_manifest",
    "open_source",
    "splits",
]

SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
DIGITS_TEST_IMAGES = 600
GONE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG))
NAMED = 5  # bad files or classes that a message names; `skipped` has all files


class Source(Protocol):
    """Labelled images with random access. Index, label and id of a sample belong together.

    Attributes:
        name: for logs and reports.
        classes: class names; label k is `classes[k]`.
        channels: 1 or 3.
        labels: int64 (N,).
        ids: int64 (N,), any values, distinct. Everything random about a sample is keyed by its id.
        sizes: int32 (N, 2), width and height of the upright image in pixels.
        skipped: "path: reason" of every file that could not be read and is not part of the source.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    labels: Tensor
    ids: Tensor
    sizes: Tensor
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        """Number of readable images, N."""
        ...

    def where(self, index: int) -> str:
        """The place of image `index`, for messages: a path, "shard.tar:member" or "digits/test:17"."""
        ...

    def read(self, index: int) -> Image.Image:
        """Image `index` (0 <= index < N), decoded and upright: mode L for one channel, RGB for three.

        Raises:
            MachineError: the machine cannot read it: no permission, a failing disk, no memory. It is not a bad image.
            OSError: it could be read when the source was made and no longer can; the message names it.
        """
        ...


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A source of encoded images, for decoders other than Pillow."""

    def encoded(self, index: int) -> bytes:
        """Image `index` as it is in its file.

        Raises:
            MachineError, OSError: see `read`.
        """
        ...

    def plain_length(self, index: int) -> int:
        """Length of the encoded image if any decoder sees the same picture in it (see `Verdict`); -1 if not.

        What is not plain, or has another length now, only `read` may decode.
        """
        ...

    def dali(self, index: int) -> str:
        """What DALI makes of it, where it was asked; see `Verdict`."""
        ...


class _Arrays:
    """A source in memory."""

    skipped: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        images: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int64],
        classes: Sequence[str],
    ) -> None:
        """Images: (N, H, W) or (N, H, W, 3)."""
        self.name, self.classes, self.channels = name, tuple(classes), 1 if images.ndim == 3 else 3
        self.labels, self.ids = torch.from_numpy(labels), torch.from_numpy(ids)
        self.sizes = torch.tensor([images.shape[2], images.shape[1]], dtype=torch.int32).expand(len(images), 2)
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def where(self, index: int) -> str:
        """Name and position of image `index`."""
        return f"{self.name}:{index}"

    def read(self, index: int) -> Image.Image:
        """Image `index`, of mode L or RGB."""
        return Image.fromarray(self._images[index])


class Digits(_Arrays):
    """The 1,797 handwritten digits that ship with scikit-learn: 8x8, one channel, no download.

    The split is fixed and stratified: 600 test images, 1,197 training images. Ids are positions in the full set.
    Intensities 0..16 become pixel levels 0..255.

    Args:
        split: "train" or "test".

    Raises:
        ValueError: another split.
    """

    def __init__(self, split: str) -> None:
        _check_split("digits", split)
        # Imported here: scikit-learn takes longer to import than the rest of the package and serves digits alone.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=DIGITS_TEST_IMAGES, random_state=0, stratify=digits.target
        )
        chosen = np.sort(train if split == "train" else test).astype(np.int64)
        images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        labels = digits.target[chosen].astype(np.int64)
        super().__init__(f"digits/{split}", images, labels, chosen, [str(digit) for digit in range(10)])


class Cifar(_Arrays):
    """CIFAR-10 or CIFAR-100, downloaded once by torchvision: 32x32, 50,000 training and 10,000 test images.

    Ids are positions in the training set, and for test images 50,000 on.

    Args:
        name: "cifar10" or "cifar100".
        split: "train" or "test".
        channels: 3 (RGB) or 1 (luma).
        cache: folder of the download; None takes `cache_folder()`.

    Raises:
        ValueError: another name, split or number of channels.
        OSError: it is not there and cannot be downloaded.
    """

    def __init__(self, name: str, split: str, channels: int = 3, cache: Path | None = None) -> None:
        from torchvision.datasets import CIFAR10, CIFAR100

        kinds = {"cifar10": CIFAR10, "cifar100": CIFAR100}
        if name not in kinds:
            raise ValueError(f"expected 'cifar10' or 'cifar100', got {name!r}")
        _check_split(name, split)
        _check_channels(channels)
        folder, kind = cache or cache_folder(), kinds[name]
        try:
            data = kind(str(folder), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:  # no network, or a download that does not match its checksum
            raise OSError(
                f"{name} is not in {folder} and cannot be downloaded from {kind.url} ({error}): fetch it on a machine "
                f"with internet and put {kind.filename} into {folder}, or name a folder of images"
            ) from error
        images = data.data
        if channels == 1:
            images = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])
        ids = np.arange(len(images), dtype=np.int64) + (0 if split == "train" else 50_000)
        super().__init__(f"{name}/{split}", images, np.array(data.targets, np.int64), ids, data.classes)


class ManifestSource:
    """The valid images of a manifest: files, or members of shards.

    Args:
        manifest: with at least one image.
        name: for logs and reports.
        channels: 3 (RGB) or 1 (luma).
        max_bad: the share of images, at most, that may be bad. They are left out, listed in `skipped` and summed up in
            one warning.
        every_class: whether each class must have a valid image.

    Raises:
        ValueError: more bad images than `max_bad`, with the first of them; no valid image at all, or none of some
            class; wrong channels or `max_bad`.
    """

    def __init__(
        self, manifest: Manifest, name: str, channels: int = 3, max_bad: float = 0.01, *, every_class: bool = True
    ) -> None:
        _check_channels(channels)
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a share of the images, from 0 to 1, got {max_bad}")
        self.name, self.classes, self.channels = name, manifest.classes, channels
        self.manifest, valid, total = manifest, manifest.valid, len(manifest)
        self.skipped = tuple(f"{manifest.where(row)}: {manifest.fault(row)}" for row in range(valid, total))
        if not valid:
            raise ValueError(f"none of the {total} images below {manifest.root} can be read: {_shorten(self.skipped)}")
        self.labels, self.ids, self.sizes = manifest.labels[:valid], manifest.ids[:valid], manifest.sizes[:valid]
        barren = np.flatnonzero(self.labels.bincount(minlength=len(self.classes)).numpy() == 0)
        if every_class and len(barren):
            raise ValueError(
                f"no readable image for class {', '.join(repr(self.classes[label]) for label in barren)} in "
                f"{manifest.root}: add images or take the class away"
                f"{'; ' + _shorten(self.skipped) if self.skipped else ''}"
            )
        if self.skipped:
            found = f"{len(self.skipped)} of {total} images below {manifest.root} cannot be read"
            if len(self.skipped) > max_bad * total:
                raise ValueError(
                    f"{found}, more than max_bad = {max_bad:.2%} of them: {_shorten(self.skipped)}. "
                    f"`denim data check {manifest.root}` lists all; repair or remove them, or allow more"
                )
            warnings.warn(f"{found} and are left out: {_shorten(self.skipped)}", stacklevel=3)

    def __len__(self) -> int:
        return self.manifest.valid

    def where(self, index: int) -> str:
        """The path of image `index`, or "shard.tar:member"."""
        return self.manifest.where(index)

    def read(self, index: int) -> Image.Image:
        """Image `index`, decoded and upright, in mode L or RGB.

        Raises:
            MachineError: the machine cannot read it.
            OSError: it could be read when the source was made and no longer can, or has another size.
        """
        width, height = self.sizes[index].tolist()
        try:
            return patiently(lambda: decode(self._content(index), self.channels, (width, height)))
        except Exception as error:  # Pillow's decoders raise nearly anything on malformed files
            raise self._failure(index, error) from error

    def encoded(self, index: int) -> bytes:
        """Image `index` as it is in its file.

        Raises:
            MachineError: the machine cannot read it.
            OSError: the file, or that part of the shard, is no longer there.
        """
        try:
            return patiently(lambda: self._content(index))
        except (OSError, ValueError, MemoryError) as error:
            raise self._failure(index, error) from error

    def image_format(self, index: int) -> str:
        """The format of its content: see `Verdict`."""
        return self.manifest.image_format(index)

    def plain_length(self, index: int) -> int:
        """Its length when it was indexed, if any decoder sees the same picture in it (see `Verdict`); -1 if not."""
        return int(self.manifest.bytes[index]) if self.manifest.is_plain(index) else -1

    def dali(self, index: int) -> str:
        """What DALI makes of it, where it was asked; see `Verdict`."""
        return self.manifest.dali(index)

    def _content(self, index: int) -> bytes:
        with self.manifest.open(index) as file:
            return read_content(file)

    def _failure(self, index: int, error: Exception) -> OSError:
        # What has been removed is bad; but if the whole data set is gone, a disk has.
        gone = isinstance(error, OSError) and error.errno in GONE and self.manifest.root.is_dir()
        if is_machines(error) and not gone:
            return MachineError(
                f"{self.where(index)} cannot be read: {reason(error)}. The machine is at fault and not the image, "
                "which does not count as a bad one: remove the cause, then start again or resume"
            )
        return OSError(f"{self.where(index)} was readable at the start and no longer is: {reason(error)}")


class ImageFolder(ManifestSource):
    """A folder of class folders: `root/<split>/<class>/**/image` or, without split folders, `root/<class>/**/image`.

    Without split folders every split is the same, whole set. Classes are the class folders in sorted order. The id of
    an image is that of its path below the folder that holds the class folders ("cat/0001.jpg", see `sample_id`), so it
    stays when files are added, removed or listed in another order. Hidden files and folders, folders of thumbnails
    (`@eaDir`, `__MACOSX`, ...) and files whose extension is not that of an image are passed over; the manifest counts
    them (`Manifest.passed_over`). A split folder among folders with images that have no name of a split is an error:
    it may be a class.

    A folder of WebDataset shards (`root/<split>/*.tar`, or `root/*.tar` with the split as a word in the names) is taken
    too, with the ids and classes that `open_shards` says.

    Every image is decoded once, by as many processes as there are processors; the manifest keeps the result, and only
    files that are new or have changed since are decoded when the folder is opened again (see `index`). What cannot be
    decoded, or is larger than `PIL.Image.MAX_IMAGE_PIXELS`, is left out, listed in `skipped`, and summed up in one
    warning. Damage that leaves a JPEG decodable is not noticed. What is done to the pixels: see `decode`.

    Args:
        root: folder.
        split: "train", "test", ...: any name of a folder below `root`, if it has such.
        channels: 3 (RGB) or 1 (luma).
        labelled: False lets a class have no image, and takes a flat folder too: where there are images beside class
            folders, or no class folders at all, every image below counts, and all have the class "".
        classes: names of classes, see `match_classes`; a folder that has others is refused before it is indexed, and
            classes without images are allowed.
        max_bad: the share of images, at most, that may be bad.
        cache: folder to keep the manifest in, instead of `cache_folder()`.
        kept: a manifest of this folder (`Manifest.keep`), taken as it is: what has changed since shows when it is read.

    Raises:
        ValueError: `root` is missing, no folder or empty; it has split folders, but not this one, or class folders
            beside them; there are no class folders; a class has no image, or none that can be read, and `classes` was
            not given; the folder has classes that are not in `classes`; no file at all can be read; more than `max_bad`
            cannot; wrong channels or `max_bad`.
        OSError: a folder cannot be read, or the manifest cannot be written.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        channels: int = 3,
        *,
        labelled: bool = True,
        classes: Sequence[str] | int | None = None,
        max_bad: float = 0.01,
        cache: Path | None = None,
        kept: Path | None = None,
    ) -> None:
        _check_channels(channels)
        manifest, name = open_manifest(root, split, labelled=labelled, classes=classes, cache=cache, kept=kept)
        super().__init__(manifest, name, channels, max_bad, every_class=labelled and classes is None)


class _Part:
    """Some images of a source, in a given order.

    Args:
        source: the whole.
        chosen: int64 (M,), indices in it.
        name: for logs and reports.
    """

    def __init__(self, source: Source, chosen: Tensor, name: str) -> None:
        self._chosen = chosen
        self._source = source
        self.name, self.classes, self.channels = name, source.classes, source.channels
        self.labels, self.ids = source.labels[self._chosen], source.ids[self._chosen]
        self.sizes = source.sizes[self._chosen]
        self.skipped: tuple[str, ...] = ()  # the whole has counted them against its limit
        if isinstance(source, EncodedSource):  # else this is none either
            self.encoded: Callable[[int], bytes] = self._encoded
            self.plain_length: Callable[[int], int] = self._plain_length
            self.dali: Callable[[int], str] = self._dali

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Image.Image:
        """Image number `index` of the part."""
        return self._source.read(int(self._chosen[index]))

    def where(self, index: int) -> str:
        """Its place in the whole."""
        return self._source.where(int(self._chosen[index]))

    def _encoded(self, index: int) -> bytes:
        assert isinstance(self._source, EncodedSource)
        return self._source.encoded(int(self._chosen[index]))

    def _dali(self, index: int) -> str:
        assert isinstance(self._source, EncodedSource)
        return self._source.dali(int(self._chosen[index]))

    def _plain_length(self, index: int) -> int:
        assert isinstance(self._source, EncodedSource)
        return self._source.plain_length(int(self._chosen[index]))


class Subset(_Part):
    """A fixed random part of a source, in random order: its beginning is random too, as a gallery wants it.

    The choice is a function of the seed and the ids.

    Args:
        source: the whole.
        count: number of images, at most those of the source.
        seed: any int64.

    Raises:
        ValueError: more images than there are, or none.
    """

    def __init__(self, source: Source, count: int, seed: int = 0) -> None:
        if not 0 < count <= len(source):
            raise ValueError(f"a subset of {source.name} has 1 to {len(source)} images, got {count}")
        super().__init__(source, _words(source, Domain.SUBSET, seed).argsort(stable=True)[:count], source.name)


def hold_out(source: Source, share: float, seed: int = 0) -> tuple[Source, Source]:
    """Two parts of a source: the images to train on, and about a share of all that is held out for validation.

    An image is held out if a word that its id and the seed key, divided by 2^32, is below the share. So no other image
    has a say in it: images that are added later move none from one part to the other.

    Args:
        source: the whole.
        share: 0 < share < 1.
        seed: any int64.

    Raises:
        ValueError: the share is outside its range, no image is held out, or a class has no image left to train on.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of images that are held out must be between 0 and 1, got {share}")
    held = _words(source, Domain.HELD_OUT, seed) < share * 2**32
    chosen = [torch.nonzero(which).squeeze(-1) for which in (~held, held)]
    if not len(chosen[1]):
        raise ValueError(f"a share of {share:g} of the {len(source)} images of {source.name} holds out none")
    counts = [source.labels[part].bincount(minlength=len(source.classes)) for part in chosen]
    if lost := torch.nonzero((counts[0] == 0) & (counts[1] > 0)).flatten().tolist():
        raise ValueError(
            f"with a share of {share:g} of {source.name} held out, {len(lost)} of {len(source.classes)} classes have "
            f"no image left to train on: {_shorten([repr(source.classes[label]) for label in lost], ', ')}. Take a "
            "smaller share, or another seed"
        )
    return _Part(source, chosen[0], source.name), _Part(source, chosen[1], f"{source.name}, held out")


def _words(source: Source, domain: Domain, seed: int) -> Tensor:
    """A word for each image, keyed by its id: int64 (N,) that holds uint32 values."""
    return noise_words(derive_seeds(seed, domain, source.ids), 1).squeeze(-1)


def open_source(
    name_or_path: str | Path,
    split: str,
    channels: int | None = None,
    *,
    labelled: bool = True,
    classes: Sequence[str] | int | None = None,
    max_bad: float = 0.01,
    cache: Path | None = None,
    kept: Path | None = None,
) -> Source:
    """The source that a user named.

    Args:
        name_or_path: "digits", "cifar10", "cifar100", or the path of a folder of images or of shards (see
            `ImageFolder`).
        split: "train", "test", ...
        channels: 1 or 3; None takes what the source has (digits 1, others 3).
        labelled: False takes a flat folder too.
        classes: those of a model or of another split: the labels are numbered as these are (see `match_classes`).
        max_bad: the share of images, at most, that may be bad.
        cache: folder for manifests and downloads, instead of the usual places.
        kept: for a folder, the manifest to take as it is.

    Raises:
        ValueError: neither a known name nor a folder; channels that the source does not have; and what the source
            itself raises.
        OSError: what the source itself raises.
    """
    source: Source
    if name_or_path == "digits":
        if channels not in (None, 1):
            raise ValueError(f"digits has one channel, got channels={channels}")
        source = Digits(split)
    elif name_or_path in ("cifar10", "cifar100"):
        source = Cifar(str(name_or_path), split, channels or 3, cache)
    else:
        source = ImageFolder(
            name_or_path, split, 3 if channels is None else channels,
            labelled=labelled, classes=classes, max_bad=max_bad, cache=cache, kept=kept,
        )  # fmt: skip
    return source if classes is None else match_classes(source, classes)


def match_classes(source: Source, classes: Sequence[str] | int) -> Source:
    """The same images, their labels numbered as `classes` numbers the names: label k is `classes[k]`.

    Wherever two lists of classes meet (a model and a data set, a training and a test set), names decide which classes
    are the same, for the numbers of a data set change with each class that is missing. Classes without an image are
    named in a warning.

    Args:
        source: labelled images.
        classes: names, all different. Or, for a model that stores none, the number of its classes: then numbers are
            matched if the names in the source are those numbers ("0", "1", ...), or if there are as many classes.

    Raises:
        ValueError: the source has a class that is not among them.
    """
    numbers = _class_numbers(source.classes, classes, source.name)
    matched = copy.copy(source)
    matched.labels = torch.tensor(numbers, dtype=torch.int64)[source.labels]
    if isinstance(classes, int):
        names = dict(zip(numbers, source.classes, strict=True))
        matched.classes = tuple(names.get(number, str(number)) for number in range(classes))
    else:
        matched.classes = tuple(classes)
    absent = np.flatnonzero(matched.labels.bincount(minlength=len(matched.classes)).numpy() == 0)
    if len(absent):
        named = _shorten([repr(matched.classes[number]) for number in absent], ", ")
        warnings.warn(
            f"{source.name} has no images of {len(absent)} of {len(matched.classes)} classes: {named}", stacklevel=2
        )
    return matched


def _class_numbers(found: Sequence[str], classes: Sequence[str] | int, where: str) -> list[int]:
    """The number in `classes` of every class that was found."""
    if isinstance(classes, int):
        if all(name.isdecimal() and name == str(int(name)) and int(name) < classes for name in found):
            return [int(name) for name in found]
        if len(found) == classes:
            return list(range(classes))
        raise ValueError(
            f"{where} has {len(found)} classes ({_shorten(found, ', ')}), and a model that stores no names of classes "
            f"has {classes}: nothing says which is which. Write the names, in the order of the model's outputs, under "
            '"classes" in its config.json'
        )
    numbers = {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in found if name not in numbers]:
        raise ValueError(
            f"{where} has {len(unknown)} of {len(found)} classes that are not among the {len(classes)} expected ones: "
            f"{_shorten([repr(name) for name in unknown], ', ')}. Expected: "
            f"{_shorten([repr(name) for name in classes], ', ')}. Classes are matched by name: rename these, or take "
            "them away"
        )
    return [numbers[name] for name in found]


def open_manifest(
    root: str | Path,
    split: str,
    *,
    labelled: bool = True,
    classes: Sequence[str] | int | None = None,
    cache: Path | None = None,
    kept: Path | None = None,
) -> tuple[Manifest, str]:
    """The manifest of a folder of images, valid or not, and the name of the source. Arguments: see `ImageFolder`.

    Raises:
        ValueError: `root` is missing, no folder or empty; it has split folders, but not this one; there are no class
            folders, or no images; there are classes that are not in `classes`.
        OSError: a folder cannot be read, or the manifest cannot be written.
    """
    root = Path(root).expanduser()
    base, name = _class_root(root, split)

    def check(found: Sequence[str]) -> None:
        if classes is not None:
            _class_numbers(found, classes, str(base))

    if shards := list_shards(base):
        if kept is not None:
            return ShardManifest(kept, base), name
        others = sorted({entry.name for entry in base.iterdir()} - {*shards}) + _beside(root, base)
        part = [shard for shard in shards if split in _name_parts(shard)] if base == root else []
        if part:
            others += [shard for shard in shards if not {split, *SPLIT_NAMES} & {*_name_parts(shard.lower())}]
            shards, name = part, f"{name}/{split}"
        manifest = open_shards(
            base, shards, others=others, labelled=labelled, check=check, cache=cache, part=split if part else ""
        )
        return manifest, name
    if kept is not None:
        return Manifest(kept, base), name
    found = tuple(folder.name for folder in _subfolders(base))
    if not labelled and _has_images(base):
        found = ()
    elif labelled and not found:
        raise ValueError(
            f"no class folders in {base}: expected {base}/<class>/<image> "
            f"or {root}/<split>/<class>/<image>, one folder for each class"
        )
    check(found)
    listing = list_images(base, found)
    for path in _beside(root, base):
        listing.pass_over_file(path)
    if not len(listing):
        raise ValueError(
            f"no images below {base}: expected files ending in {' '.join(sorted(EXTENSIONS))}, or shards ending in "
            f".tar with no folders beside them; {count_passed_over(listing.passed_over) or 'it has no files at all'}"
        )
    return index(base, listing.key(), lambda: listing, cache), name


def splits(root: Path) -> list[str]:
    """The splits of a folder of images, in sorted order; none where it holds the images themselves.

    They are its folders with the name of a split or, of a folder of shards, the words in names of shards
    ("imagenet-train-000000.tar") that are names of splits.
    """
    folders = [folder.name for folder in _subfolders(root)]
    names = folders or {word for shard in list_shards(root) for word in _name_parts(shard)}
    return sorted(name for name in names if name.lower() in SPLIT_NAMES)


def _name_parts(shard: str) -> list[str]:
    return re.findall("[A-Za-z]+", shard)


def _class_root(root: Path, split: str) -> tuple[Path, str]:
    """The folder that holds the class folders, and the name of the source."""
    if not root.exists():
        raise ValueError(
            f"no data set {str(root)!r}: expected 'digits', 'cifar10', 'cifar100' or the path of a folder of images "
            "(<folder>/<split>/<class>/<image> or <folder>/<class>/<image>)"
        )
    if not root.is_dir():
        raise ValueError(f"{root} is a file, expected a folder")
    if not any(root.iterdir()):
        raise ValueError(f"{root} is empty: expected <split>/<class>/<image> or <class>/<image> in it")
    name = root.resolve().name
    _refuse_ambiguity(root, split)
    if (root / split).is_dir():
        return root / split, f"{name}/{split}"
    # Without this, a data set that calls its test set "val" would become one with the classes "train" and "val".
    if (others := splits(root)) and split not in others:
        raise ValueError(f"{root} has no split {split!r}, it has {', '.join(map(repr, others))}")
    return root, name


def _refuse_ambiguity(root: Path, split: str) -> None:
    """Raise where a folder may be a split or a class: "train" among "bus" and "car" is both."""
    folders = _subfolders(root)
    named = [folder for folder in folders if _is_split(folder)]
    if not named or ((root / split).is_dir() and split.lower() not in SPLIT_NAMES):
        return
    others = [folder for folder in folders if folder not in named and _holds_images(folder, frozenset())]
    if others:
        raise ValueError(
            f"{root} has {', '.join(repr(folder.name) for folder in named)} beside {len(others)} folders with images "
            f"that have no name of a split ({_shorten([repr(folder.name) for folder in others], ', ')}). If "
            f"{named[0].name!r} is a split, name its own folder, {named[0]}, or move the other folders elsewhere; if "
            f"it is a class, move all class folders into a new folder 'train' in {root}"
        )


def _holds_images(folder: Path, above: frozenset[tuple[int, int]]) -> bool:
    """Whether there is an image, or a shard, anywhere below."""
    own = folder.stat()
    if (own.st_dev, own.st_ino) in above:
        return False
    above |= {(own.st_dev, own.st_ino)}
    with os.scandir(folder) as scan:
        entries = [entry for entry in scan if not passed_over(entry.name)]
    files = (entry for entry in entries if not entry.is_dir())
    if any(os.path.splitext(entry.name)[1].lower() in {".tar", *EXTENSIONS} for entry in files):  # noqa: PTH122
        return True
    return any(_holds_images(folder / entry.name, above) for entry in entries if entry.is_dir())


def _beside(root: Path, base: Path) -> list[str]:
    """What lies beside the split folders, relative to one of them."""
    if base == root:
        return []
    return [f"../{entry.name}" for entry in sorted(root.iterdir()) if not _is_split(entry)]


def _is_split(entry: Path) -> bool:
    return entry.name.lower() in SPLIT_NAMES and entry.is_dir()


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not passed_over(entry.name))


def _has_images(folder: Path) -> bool:
    names = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return any(entry.suffix.lower() in EXTENSIONS and not entry.is_dir() for entry in names)


def _check_split(name: str, split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"{name} has the splits 'train' and 'test', got {split!r}")


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (greyscale) or 3 (RGB), got {channels}")


def _shorten(items: Sequence[str], separator: str = "; ") -> str:
    more = len(items) - NAMED
    return separator.join(items[:NAMED]) + (f"{separator}and {more} more" if more > 0 else "")
