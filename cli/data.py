"""`denim data`: look at a data set before training on it, and pack it into shards."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from denim.nim.data import Manifest, Source

COMMANDS = {
    "index": "decode every image once and keep the result (training does so at the first use of a folder)",
    "check": "list every image that cannot be read, with the reason",
    "stats": "print the classes, sizes and formats of the images, and the mean and std of their channels",
    "preview": "write a picture of what a model sees in training, clean and with noise",
    "pack": "write the images as WebDataset shards that keep their ids and labels",
}
NAMES = ("digits", "cifar10", "cifar100")
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
COLUMNS, SHOWN, GAP = 8, 224, 8  # of a preview: images per row, their side (about) and their distance in pixels


def index(folder: Annotated[Path, tyro.conf.Positional], split: str | None = None, cache: Path | None = None) -> None:
    """Decode every image once and keep the result in a manifest, which training uses.

    Where DALI is installed, each image is also tried with it, so that the first epoch need not do that.

    Args:
        folder: Folder of class folders or of images, or of split folders (train, test, ...) that hold those.
        split: Split to index, such as train or test; without it, every split of the folder.
        cache: Folder for the manifest; without it, the user's cache.
    """
    from denim.nim.data import open_manifest
    from denim.nim.data.dali_loader import dali_version, problem
    from denim.nim.data.indexing import try_with_dali
    from denim.nim.text import printable

    for name in _splits(folder, split):
        start = time.perf_counter()
        manifest, title = open_manifest(folder, name, labelled=False, cache=cache)
        took, decoded, by_dali = time.perf_counter() - start, manifest.decoded, ""
        if problem() is None:
            manifest = try_with_dali(manifest, dali_version())
            count = sum(manifest.dali(row) == dali_version() for row in range(manifest.valid))
            by_dali = f"; {count} for DALI, tried in {time.perf_counter() - start - took:.1f} s"
        print(
            f"{printable(title)}: {manifest.valid} images in {len(manifest.classes)} classes, "
            f"{len(manifest) - manifest.valid} bad; {decoded} decoded in {took:.1f} s{by_dali}; "
            f"manifest {printable(manifest.file)}"
        )
        _say_passed_over(title, manifest)


def check(
    folder: Annotated[Path, tyro.conf.Positional],
    split: str | None = None,
    out: Path | None = None,
    cache: Path | None = None,
) -> None:
    """List every image that cannot be read, with the reason. The exit status is 1 if there is one.

    Args:
        folder: Folder of class folders or of images, or of split folders (train, test, ...) that hold those.
        split: Split to check, such as train or test; without it, every split of the folder.
        out: Text file that also gets the list, one image per line, with a tab before the reason.
        cache: Folder for the manifest; without it, the user's cache.
    """
    from denim.nim.data import open_manifest
    from denim.nim.files import atomic_write
    from denim.nim.text import printable

    bad, total = [], 0
    for name in _splits(folder, split):
        manifest, title = open_manifest(folder, name, labelled=False, cache=cache)
        _say_passed_over(title, manifest)
        total += len(manifest)
        bad += [(manifest.where(row), manifest.fault(row)) for row in range(manifest.valid, len(manifest))]
    if out is not None:
        with atomic_write(out) as staged:  # names byte for byte as the file system has them
            staged.write_bytes(b"".join(os.fsencode(f"{path}\t{fault}\n") for path, fault in bad))
    for path, fault in bad:
        print(f"{printable(path)}: {printable(fault)}")
    print(f"{len(bad)} of {total} images in {printable(folder)} cannot be read ({len(bad) / total:.2%})")
    if bad:
        raise SystemExit(1)


def stats(
    folder: Annotated[str, tyro.conf.Positional],
    split: str | None = None,
    num_images: int = 10_000,
    seed: int = 0,
    cache: Path | None = None,
) -> None:
    """Print the classes, sizes and formats of the images, and the mean and std of their channels as presets take them.

    Every image has the same weight in mean and std, whatever its size.

    Args:
        folder: Folder of class folders or of images, or of split folders (train, test, ...) that hold those; or one of
            digits, cifar10 and cifar100.
        split: Split to describe, such as train or test; without it, every split of the folder.
        num_images: Number of images, drawn at random, over which mean and std are taken; 0 takes all.
        seed: Seed of that random choice.
        cache: Folder for the manifest; without it, the user's cache.
    """
    from denim.nim.data import ManifestSource, open_manifest, open_source

    if num_images < 0:
        raise ValueError(f"num_images must not be negative, and 0 takes all, got {num_images}")
    for name in ([split] if split else ["train", "test"]) if folder in NAMES else _splits(Path(folder), split):
        if folder in NAMES:
            _describe(open_source(folder, name, cache=cache), {}, num_images, seed)
        else:
            manifest, title = open_manifest(folder, name, labelled=False, cache=cache)
            source = ManifestSource(manifest, title, max_bad=1)
            _describe(source, manifest.format_counts(), num_images, seed)
            _say_passed_over(title, manifest)


def preview(
    folder: Annotated[str, tyro.conf.Positional],
    split: str = "train",
    sigma: float = 70.0,
    size: int = 224,
    count: int = 8,
    out: Path = Path("preview.png"),
    crop_scale: tuple[float, float] | None = (0.2, 1.0),
    flip: bool = True,
    channels: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    cache: Path | None = None,
) -> None:
    """Write a picture of the first images that `denim pretrain` takes with the same seed, clean and with noise.

    Args:
        folder: Folder of class folders, of images or of shards, or of split folders (train, test, ...) that hold those;
            or one of digits, cifar10 and cifar100.
        split: Split to show, such as train or test.
        sigma: Standard deviation of the noise, in 0-255 pixel levels.
        size: Side of the crops that the model sees, in pixels.
        count: Number of images in the picture.
        out: File of the picture, a PNG.
        crop_scale: Smallest and largest area of the random crops, as shares of the image; None takes no crops.
        flip: Mirror each image left-right with probability 1/2.
        channels: Channels that the images are converted to, 1 or 3; without it, those of the data.
        seed: Seed of the run.
        epoch: Epoch of the run, counted from 0.
        cache: Folder for the manifest; without it, the user's cache.
    """
    import torch

    from denim.kernels import Domain, derive_seeds
    from denim.nim import add_noise
    from denim.nim.data import TorchLoader, TrainView, open_source
    from denim.nim.files import atomic_write
    from denim.nim.sigma import MAX_SIGMA, is_level, warn_of_unit_sigma
    from denim.nim.text import printable

    if not is_level(sigma):
        raise ValueError(
            f"sigma takes a finite noise level of 0-255 pixel levels, 0 or more, at most {MAX_SIGMA:g}, got {sigma}"
        )
    warn_of_unit_sigma(sigma)
    view = TrainView(size, crop_scale, flip=flip)
    source = open_source(folder, split, channels, labelled=False, max_bad=1, cache=cache)
    if not 1 <= count <= len(source):
        raise ValueError(f"{source.name} has {len(source)} images, and count is {count}")
    batch = next(TorchLoader(source, view, count, seed=seed, max_bad=1).epoch(epoch))
    seeds = derive_seeds(seed, Domain.TRAINING, batch.ids, epoch)
    noisy = add_noise(batch.images, torch.full((count,), sigma), seeds)

    # A picture cannot show values outside [0, 1].
    noisy = (255 * noisy.movedim(1, -1).clamp(0, 1)).round().to(torch.uint8)
    titles = [printable(source.classes[label]) for label in batch.labels.tolist()]
    heading = f"{printable(source.name)}, epoch {epoch}, seed {seed}: clean, and with sigma {sigma:g}"
    sheet = _sheet(batch.images, noisy, titles, heading)
    with atomic_write(out) as staged:
        sheet.save(staged, format="PNG")
    print(printable(out))


def _sheet(above: Tensor, below: Tensor, titles: Sequence[str], heading: str) -> Image.Image:
    """Pairs of images, uint8 (B, H, W, C), one above the other under a title, with `COLUMNS` pairs per row.

    A pixel of a small image becomes a square of pixels; no image is resampled.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, side = len(titles), above.shape[1]
    scale = max(1, round(SHOWN / side))
    shown = side * scale
    font, line = ImageFont.load_default(15), 22
    width, height = shown + GAP, 2 * shown + line + 2 * GAP
    rows, columns = -(-count // COLUMNS), min(count, COLUMNS)
    top = line + 2 * GAP
    least = int(font.getlength(heading)) + GAP
    sheet = Image.new("RGB", (GAP + max(columns * width, least), top + rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), heading, "black", font)
    for k, title in enumerate(titles):
        x, y = GAP + k % COLUMNS * width, top + k // COLUMNS * height
        while font.getlength(title) > shown:
            title = title.rstrip("…")[:-1] + "…"
        draw.text((x, y), title, "black", font)
        for number, images in enumerate((above, below)):
            image = Image.fromarray(images[k].squeeze(-1).numpy()).resize((shown, shown), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y + line + number * (shown + GAP // 2)))
    return sheet


def pack(
    folder: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    split: str | None = None,
    shard_size: str = "256MB",
    max_bad: float = 0.01,
    cache: Path | None = None,
) -> None:
    """Write WebDataset shards. Training on them takes the same order, crops and noise as training on the folder.

    Args:
        folder: Folder of class folders, of images or of shards, or of split folders (train, test, ...) that hold those.
        out: New folder for the shards, or for split folders of shards.
        split: Split to pack, such as train or test; without it, every split of the folder.
        shard_size: Length of a shard: a number of bytes, or of kB, MB or GB such as 256MB.
        max_bad: Largest share of images that may be unreadable; they are left out, and above it nothing is written.
        cache: Folder for the manifest; without it, the user's cache.
    """
    from denim.nim.data import ManifestSource, open_manifest
    from denim.nim.data.shards import pack as pack_shards
    from denim.nim.text import printable

    length = re.fullmatch(r"(\d+(?:\.\d+)?)(|kB|MB|GB)", shard_size)
    if length is None:
        raise ValueError(f"shard_size is a number of bytes, or of kB, MB or GB like 256MB, got {shard_size!r}")
    shard_bytes = int(float(length[1]) * UNITS[length[2]])
    folder, out = folder.expanduser(), out.expanduser().resolve()
    if out.is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies in {folder}, whose images it would belong to: name a folder elsewhere")
    for name in _splits(folder, split):
        start = time.perf_counter()
        manifest, title = open_manifest(folder, name, labelled=False, cache=cache)
        source = ManifestSource(manifest, title, max_bad=max_bad)  # warns of bad ones, and refuses too many
        is_part = title.endswith(f"/{name}")
        target = out / name if is_part else out
        packed = pack_shards(manifest, target, name if is_part else "images", shard_bytes)
        for line in packed.lost:
            print(printable(line))
        print(
            f"{printable(title)}: {packed.samples} images in {packed.shards} shards, {packed.bytes / 1e6:.1f} MB, in "
            f"{printable(target)}; "
            f"{len(source.skipped) + len(packed.lost)} bad ones left out; {time.perf_counter() - start:.1f} s"
        )


def _say_passed_over(title: str, manifest: Manifest) -> None:
    from denim.nim.data.listing import count_passed_over
    from denim.nim.text import printable

    if said := count_passed_over(manifest.passed_over):
        print(f"{printable(title)}: {printable(said)}")


def _splits(folder: Path, split: str | None) -> list[str]:
    """The splits to open: the one asked for, or all; for a folder without split folders a name that opens it whole."""
    from denim.nim.data.sources import splits

    if split is not None:
        return [split]
    return (splits(folder) if folder.is_dir() else []) or ["all"]


def _describe(source: Source, formats: dict[str, int], num_images: int, seed: int) -> None:
    import numpy as np
    from rich.table import Table

    from denim.nim.data import Subset
    from denim.nim.text import open_console, printable

    console = open_console()
    console.print(
        f"{printable(source.name)}: {len(source)} images in {len(source.classes)} classes, {len(source.skipped)} bad"
    )
    table = Table("class", "images", box=None)
    for name, count in zip(source.classes, source.labels.bincount(minlength=len(source.classes)).tolist(), strict=True):
        table.add_row(printable(name) or "(none)", str(count))
    console.print(table)
    quantiles = (0, 0.05, 0.5, 0.95, 1)
    table = Table("pixels", "least", "5 %", "median", "95 %", "most", box=None)
    for what, column in zip(("width", "height"), source.sizes.numpy().T, strict=True):
        table.add_row(what, *(f"{value:.0f}" for value in np.quantile(column, quantiles)))
    console.print(table)
    if formats:
        console.print("formats: " + ", ".join(f"{name} {count}" for name, count in formats.items()))
    chosen: Source = source if num_images == 0 or num_images >= len(source) else Subset(source, num_images, seed)
    mean, std = channel_moments(chosen)
    console.print(f"over {len(chosen)} images, in [0, 1]: mean={mean} std={std}", soft_wrap=True)


def channel_moments(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel over all pixels, in [0, 1] units, rounded to four digits.

    Every image has the same weight, whatever its size.
    """
    import numpy as np

    levels = np.arange(256) / 255
    total = np.zeros((2, source.channels))
    for k in _progress(len(source)):
        # By counting levels: pixels as float64 would take 24 bytes each.
        shares = np.array(source.read(k).histogram(), np.float64).reshape(-1, 256)
        shares /= shares.sum(1, keepdims=True)
        total += shares @ levels, shares @ levels**2
    mean, square = total / len(source)
    std = np.sqrt(square - mean**2)
    return tuple(round(float(x), 4) for x in mean), tuple(round(float(x), 4) for x in std)


def _progress(count: int) -> Iterable[int]:
    from rich.progress import track

    from denim.nim.text import open_console

    console = open_console(stderr=True)
    return track(range(count), "pixels", console=console, disable=not console.is_terminal)
