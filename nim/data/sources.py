"""Where images come from: scikit-learn's digits, or a folder of class folders."""

from __future__ import annotations

import hashlib
import os
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from denim.kernels import Domain, derive_seeds, noise_words

__all__ = ["Digits", "ImageFolder", "Source", "Subset", "open_source"]

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"))
# Decoders by content, not by extension. Others stay shut: Pillow would start Ghostscript for PostScript named .jpg.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
DIGITS_TEST_IMAGES = 600
NAMED = 5  # bad files that a message names; `skipped` has them all


class Source(Protocol):
    """Labelled images with random access. Index, label and id of a sample belong together.

    Attributes:
        name: for logs and reports.
        classes: class names; label k is `classes[k]`.
        channels: 1 or 3.
        labels: int64 (N,).
        ids: int64 (N,), any values, distinct. Everything random about a sample is keyed by its id.
        skipped: "path: reason" of every file that could not be read and is not part of the source.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    labels: Tensor
    ids: Tensor
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        """Number of readable images, N."""
        ...

    def read(self, index: int) -> Image.Image:
        """Image `index` (0 <= index < N), decoded and upright: mode L for one channel, RGB for three."""
        ...


class Digits:
    """The 1,797 handwritten digits that ship with scikit-learn: 8x8, one channel, no download.

    The split is fixed and stratified: 600 test images, 1,197 training images. Ids are positions in the full set.
    Intensities 0..16 become pixel levels 0..255.

    Args:
        split: "train" or "test".

    Raises:
        ValueError: another split.
    """

    def __init__(self, split: str) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"digits has the splits 'train' and 'test', got {split!r}")
        # Imported here: scikit-learn takes longer to import than the rest of the package and serves digits alone.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=DIGITS_TEST_IMAGES, random_state=0, stratify=digits.target
        )
        chosen = np.sort(train if split == "train" else test)
        self.name = f"digits/{split}"
        self.classes = tuple(str(digit) for digit in range(10))
        self.channels = 1
        self.labels = torch.from_numpy(digits.target[chosen].astype(np.int64))
        self.ids = torch.from_numpy(chosen.astype(np.int64))
        self.skipped: tuple[str, ...] = ()
        self._images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Image.Image:
        """Image `index` as an 8x8 image of mode L."""
        return Image.fromarray(self._images[index])


class ImageFolder:
    """A folder of class folders: `root/<split>/<class>/**/image` or, without split folders, `root/<class>/**/image`.

    Without split folders every split is the same, whole set. Classes are the class folders in sorted order. The id of
    an image is the 8-byte BLAKE2b hash, read as int64, of its path below the folder that holds the class folders
    ("cat/0001.jpg"), so it stays when files are added, removed or listed in another order. Hidden files and folders
    are ignored, and so are files whose extension is not that of an image.

    Every image is decoded once, by a pool of threads, before anything else happens: what cannot be decoded, or is
    larger than `PIL.Image.MAX_IMAGE_PIXELS`, is left out, listed in `skipped`, and summed up in one warning. Damage
    that leaves a JPEG decodable is not noticed. EXIF orientation is applied; greyscale, CMYK, palette and 16-bit
    images are converted; an alpha channel is dropped; of several frames the first counts.

    Args:
        root: folder.
        split: "train", "test", ...: any name of a folder below `root`, if it has such.
        channels: 3 (RGB) or 1 (luma).

    Raises:
        ValueError: `root` is missing, no folder or empty; it has split folders, but not this one; there are no class
            folders; a class has no image, or none that can be read; no file at all can be read; wrong channels.
    """

    def __init__(self, root: str | Path, split: str, channels: int = 3) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (greyscale) or 3 (RGB), got {channels}")
        base, self.name = _class_root(Path(root).expanduser(), split)
        self.classes = tuple(folder.name for folder in _subfolders(base))
        if not self.classes:
            raise ValueError(
                f"no class folders in {base}: expected {base}/<class>/<image> "
                f"or {Path(root)}/<split>/<class>/<image>, one folder for each class"
            )
        self.channels = channels

        found = [(path, label) for label, name in enumerate(self.classes) for path in _image_files(base / name)]
        if not found:
            raise ValueError(f"no images below {base}: expected files ending in {' '.join(sorted(EXTENSIONS))}")
        with warnings.catch_warnings(), ThreadPool() as pool:
            # Pillow only warns between one and two times MAX_IMAGE_PIXELS: here that is an error like the rest.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            faults = pool.map(self._fault, [path for path, _ in found], chunksize=64)

        bad = [f"{path}: {fault}" for (path, _), fault in zip(found, faults, strict=True) if fault]
        good = [item for item, fault in zip(found, faults, strict=True) if not fault]
        self.skipped = tuple(bad)
        if not good:
            raise ValueError(f"none of the {len(found)} images below {base} can be read: {_shorten(bad)}")
        barren = sorted(set(range(len(self.classes))) - {label for _, label in good})
        if barren:
            raise ValueError(
                f"no readable image for class {', '.join(repr(self.classes[label]) for label in barren)} in {base}: "
                f"add images or remove the folder{'; ' + _shorten(bad) if bad else ''}"
            )
        if bad:
            warnings.warn(
                f"{len(bad)} of {len(found)} images below {base} cannot be read and are left out: {_shorten(bad)}",
                stacklevel=2,
            )
        self._paths = [path for path, _ in good]
        self.labels = torch.tensor([label for _, label in good], dtype=torch.int64)
        self.ids = torch.tensor([_path_id(path.relative_to(base)) for path in self._paths], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> Image.Image:
        """Image `index`, decoded and upright, in mode L or RGB.

        Raises:
            OSError: the file was readable when the source was made and no longer is.
        """
        path = self._paths[index]
        try:
            return _decode(path, self.channels)
        except Exception as error:
            raise OSError(f"{path} was readable at the start and no longer is: {_reason(error)}") from error

    def _fault(self, path: Path) -> str:
        """Why `path` cannot be read; empty if it can."""
        try:
            _decode(path, self.channels)
        except Exception as error:  # Pillow's decoders raise nearly anything on malformed files
            return _reason(error)
        return ""


class Subset:
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
        words = noise_words(derive_seeds(seed, Domain.SUBSET, source.ids), 1).squeeze(-1)
        self._chosen = words.argsort(stable=True)[:count]
        self._source = source
        self.name, self.classes, self.channels = source.name, source.classes, source.channels
        self.labels, self.ids, self.skipped = source.labels[self._chosen], source.ids[self._chosen], source.skipped

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Image.Image:
        """Image number `index` of the subset."""
        return self._source.read(int(self._chosen[index]))


def open_source(name_or_path: str | Path, split: str, channels: int | None = None) -> Source:
    """The source that a user named.

    Args:
        name_or_path: "digits", or the path of a folder of class folders (see `ImageFolder`).
        split: "train", "test", ...
        channels: 1 or 3; None takes what the source has (digits 1, folders 3).

    Raises:
        ValueError: neither a known name nor a folder; channels that the source does not have; and what the source
            itself raises.
    """
    if name_or_path == "digits":
        if channels not in (None, 1):
            raise ValueError(f"digits has one channel, got channels={channels}")
        return Digits(split)
    if not Path(name_or_path).expanduser().is_dir():
        raise ValueError(
            f"no data set {str(name_or_path)!r}: expected 'digits' or the path of a folder of class folders "
            "(<folder>/<split>/<class>/<image> or <folder>/<class>/<image>)"
        )
    return ImageFolder(name_or_path, split, 3 if channels is None else channels)


def _class_root(root: Path, split: str) -> tuple[Path, str]:
    """The folder that holds the class folders, and the name of the source."""
    if not root.is_dir():
        raise ValueError(f"no folder {root}" if not root.exists() else f"{root} is a file, expected a folder")
    if not any(root.iterdir()):
        raise ValueError(f"{root} is empty: expected <split>/<class>/<image> or <class>/<image> in it")
    name = root.resolve().name
    if (root / split).is_dir():
        return root / split, f"{name}/{split}"
    # Without this, a data set that calls its test set "val" would become one with the classes "train" and "val".
    others = [folder.name for folder in _subfolders(root) if folder.name.lower() in SPLIT_NAMES]
    if others:
        raise ValueError(f"{root} has no split {split!r}, it has {', '.join(map(repr, others))}")
    return root, name


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    """Images below `folder`, at any depth, through links too, sorted by path."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in EXTENSIONS)


def _path_id(path: Path) -> int:
    digest = hashlib.blake2b(os.fsencode(path.as_posix()), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _decode(path: Path, channels: int) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        upright = ImageOps.exif_transpose(image)  # decodes, whether or not there is something to turn
    mode = "L" if channels == 1 else "RGB"
    if upright.mode == mode:
        return upright
    if upright.mode.startswith("I;16"):
        # Pillow would clip at 255. The high byte is what it takes of 16-bit RGB.
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    elif upright.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {upright.mode} (32 bits) have no defined range: convert the file to 8 bits")
    elif upright.mode == "P":
        upright = upright.convert("RGBA")
    return upright.convert(mode)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"  # Pillow's own text repeats the path
    return f"{error}" or type(error).__name__


def _shorten(bad: list[str]) -> str:
    more = len(bad) - NAMED
    return "; ".join(bad[:NAMED]) + (f"; and {more} more" if more > 0 else "")
