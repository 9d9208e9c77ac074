"""`denim bench data`: speed and memory of the loaders on the user's own images, beside those of other loaders.

All decode the same files on as many threads or processes, cut random windows of the same distribution, resize them
bicubically with anti-aliasing, flip half of them, and give batches of uint8. They take turns in one process, and the
best turn counts, since other work on the machine only ever adds time. Memory is that of a process for each. A sample
of the images is used again and again, so they come from memory and not from the disk; and the first epoch of Denim's
loader for DALI, in which it tries each image alone, is not timed.
"""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from denim.benchmarks.timing import measure
from denim.nim.data.dali_loader import DaliLoader, problem
from denim.nim.data.loader import TorchLoader
from denim.nim.data.sources import EncodedSource, ManifestSource, Subset, open_manifest
from denim.nim.data.views import TrainView, sample_rng

__all__ = ["LOADERS", "WHAT", "Comparison", "Record", "Task", "compare", "open_task", "reason", "run"]

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
EPOCH = 1 << 18  # images in an epoch at least, since some loaders need more time to begin one than for a batch
IMAGES = 2000  # of the folder, at most
WARM_UP = 8  # batches
FEWEST = 4  # batches in a turn
SAMPLING = 0.02  # seconds between two looks at the memory


@dataclass(frozen=True)
class Task:
    """The work of the loaders.

    Attributes:
        source: images.
        files: their paths; None where they are in shards.
        size: side of the views in pixels.
        batch_size: images of a batch.
        workers: threads or processes that decode.
    """

    source: EncodedSource
    files: tuple[str, ...] | None
    size: int
    batch_size: int
    workers: int

    @property
    def view(self) -> TrainView:
        """Random windows and flips."""
        return TrainView(self.size, crop_scale=SCALE, crop_ratio=RATIO)


@dataclass(frozen=True)
class Record:
    """Measurements of a loader.

    Attributes:
        name: one of `LOADERS`.
        images_per_second: in its best turn.
        peak_bytes: memory at most, of its processes together, beyond what a process has that has made none. None
            where it was not asked for, or cannot be measured (it takes Linux).
    """

    name: str
    images_per_second: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """Difference between DALI's and Pillow's views of the same images, in levels of 255."""

    images: int
    mean: float
    most: int


def open_task(
    folder: Path,
    split: str = "train",
    size: int = 224,
    batch_size: int = 64,
    workers: int = 2,
    cache: Path | None = None,
) -> Task:
    """The task for a folder of images, or of shards.

    Args:
        folder: see `ImageFolder`; class folders are not needed.
        split: see `ImageFolder`.
        size: see `Task`.
        batch_size: see `Task`.
        workers: see `Task`.
        cache: see `ImageFolder`.

    Raises:
        ValueError: sizes that are not positive, a batch larger than the folder, and as `ImageFolder`.
        OSError: as `ImageFolder`.
    """
    for name, value in (("size", size), ("batch_size", batch_size), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    manifest, name = open_manifest(folder, split, labelled=False, cache=cache)
    whole = ManifestSource(manifest, name, max_bad=1)
    source = cast(EncodedSource, Subset(whole, min(IMAGES, len(whole))))
    files = tuple(source.where(index) for index in range(len(source)))
    if batch_size > len(source):
        raise ValueError(f"{name} has {len(source)} images, less than a batch of {batch_size}: take a smaller one")
    return Task(source, None if manifest.place(0).offset >= 0 else files, size, batch_size, workers)


class _Repeated:
    """A source that repeats another one until an epoch has at least `EPOCH` images."""

    def __init__(self, source: EncodedSource) -> None:
        times = -(-EPOCH // len(source))
        self.name, self.classes, self.channels = source.name, source.classes, source.channels
        self.skipped: tuple[str, ...] = ()
        self.labels, self.sizes = source.labels.repeat(times), source.sizes.repeat(times, 1)
        self.ids = torch.arange(len(self.labels))
        self._source = source

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, index: int) -> str:
        return self._source.where(index % len(self._source))

    def read(self, index: int) -> Image.Image:
        return self._source.read(index % len(self._source))

    def encoded(self, index: int) -> bytes:
        return self._source.encoded(index % len(self._source))

    def dali(self, index: int) -> str:
        return self._source.dali(index % len(self._source))

    def plain_length(self, index: int) -> int:
        return self._source.plain_length(index % len(self._source))


def _dali(task: Task) -> Iterator[Tensor]:
    first = DaliLoader(task.source, task.view, task.batch_size, workers=task.workers, last="pad")
    for _ in first.epoch(0):
        pass
    loader = DaliLoader(_Repeated(task.source), task.view, task.batch_size, workers=task.workers)
    loader.sound[:] = np.tile(first.sound, len(loader.sound) // len(first.sound))
    for epoch in itertools.count():
        yield from (batch.images for batch in loader.epoch(epoch))


def _torch(task: Task) -> Iterator[Tensor]:
    loader = TorchLoader(_Repeated(task.source), task.view, task.batch_size, workers=task.workers)
    for epoch in itertools.count():
        yield from (batch.images for batch in loader.epoch(epoch))


class _Files(Dataset[tuple[Tensor, int]]):
    """A data set like torchvision's ImageFolder."""

    def __init__(self, task: Task) -> None:
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms import v2

        assert task.files is not None
        self.files, self.labels = task.files, task.source.labels.tolist()
        self.load = default_loader
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(task.size, SCALE, RATIO, v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        index %= len(self.files)
        return self.transform(self.load(self.files[index])), self.labels[index]


def _torchvision(task: Task) -> Iterator[Tensor]:
    loader = DataLoader(
        _Files(task), task.batch_size, shuffle=True, num_workers=task.workers, generator=torch.Generator()
    )
    while True:
        yield from (images.permute(0, 2, 3, 1) for images, _ in loader)


def _dali_reader(task: Task) -> Iterator[Tensor]:
    dali: Any = importlib.import_module("nvidia.dali")
    fn, types = dali.fn, dali.types
    pipeline = dali.Pipeline(batch_size=task.batch_size, num_threads=task.workers, device_id=None, seed=0)
    with pipeline:
        assert task.files is not None
        encoded, labels = fn.readers.file(
            files=list(task.files), labels=task.source.labels.tolist(), random_shuffle=True
        )
        images = fn.decoders.image_random_crop(encoded, random_area=SCALE, random_aspect_ratio=RATIO)
        images = fn.resize(images, size=[task.size] * 2, interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()), labels)
    while True:
        yield torch.utils.dlpack.from_dlpack(pipeline.run()[0].as_tensor())


def _pillow(task: Task) -> Iterator[Tensor]:
    source, view = task.source, task.view
    for step in itertools.count():
        first = step * task.batch_size
        indices = [index % len(source) for index in range(first, first + task.batch_size)]
        views = [view(source.read(index), sample_rng(0, step, index)) for index in indices]
        yield torch.from_numpy(np.stack(views))


LOADERS: dict[str, Callable[[Task], Iterator[Tensor]]] = {
    "dali": _dali,
    "torch": _torch,
    "torchvision": _torchvision,
    "dali-reader": _dali_reader,
    "pillow": _pillow,
}
WHAT = {
    "dali": "Denim's, decoded by DALI",
    "torch": "Denim's, decoded by Pillow",
    "torchvision": "ImageFolder and DataLoader",
    "dali-reader": "DALI's own reader and shuffling",
    "pillow": "no loader: one process decodes",
}


def reason(name: str, task: Task) -> str | None:
    """Why a loader, one of `LOADERS`, cannot do the task; None if it can."""
    if name in ("dali", "dali-reader") and (missing := problem()) is not None:
        return missing
    if name in ("torchvision", "dali-reader") and task.files is None:
        return "it reads files, and these images are in shards"
    return None


def compare(task: Task, images: int = 256) -> Comparison:
    """Load the same batches with DALI and with Pillow.

    Args:
        task: what to load.
        images: how many, about.

    Raises:
        RuntimeError: they are not of the same samples, or not of the same shape.
    """
    loaders = [kind(task.source, task.view, task.batch_size) for kind in (DaliLoader, TorchLoader)]
    steps = min(-(-images // task.batch_size), loaders[0].steps_per_epoch)
    apart = []
    for ours, theirs in itertools.islice(zip(*(loader.epoch(0) for loader in loaders), strict=True), steps):
        if not torch.equal(ours.ids, theirs.ids) or ours.images.shape != theirs.images.shape:
            raise RuntimeError("the loaders dali and torch give different batches")
        apart.append((ours.images.short() - theirs.images.short()).abs())
    together = torch.cat(apart)
    return Comparison(len(together), together.float().mean().item(), int(together.max()))


def run(
    task: Task,
    names: tuple[str, ...] = tuple(LOADERS),
    *,
    seconds: float = 3.0,
    rounds: int = 3,
    memory: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> tuple[list[Record], dict[str, str]]:
    """Measure loaders.

    Args:
        task: what they do.
        names: of `LOADERS`.
        seconds: of a turn.
        rounds: turns of each.
        memory: measure it too, which takes as long again as a turn.
        report: told what is measured next.

    Returns:
        Records, in the order of `names`, and for each loader that cannot do it the reason.

    Raises:
        ValueError: an unknown loader, or a number that is not positive.
        RuntimeError: a loader gave something else than uint8 (B, size, size, 3).
    """
    if unknown := [name for name in names if name not in LOADERS]:
        raise ValueError(f"loaders are {', '.join(LOADERS)}; got {', '.join(unknown)}")
    if seconds <= 0 or rounds < 1:
        raise ValueError(f"seconds and rounds must be positive, got {seconds} and {rounds}")
    absent = {name: why for name in names if (why := reason(name, task)) is not None}
    present = [name for name in names if name not in absent]
    best = dict.fromkeys(present, 0.0)
    for number in range(rounds):
        for name in present:
            report(f"{name}: turn {number + 1} of {rounds}")
            best[name] = max(best[name], _turn(name, task, seconds))
    peaks: dict[str, int | None] = {}
    for name in present if memory else ():
        report(f"{name}: memory")
        peaks[name] = _peak(name, task)
    return [Record(name, best[name], peaks.get(name)) for name in present], absent


def _turn(name: str, task: Task, seconds: float) -> float:
    """Images per second."""
    batches = LOADERS[name](task)
    for images in itertools.islice(batches, WARM_UP):
        expected = (task.batch_size, task.size, task.size, 3)
        if (images.dtype, tuple(images.shape)) != (torch.uint8, expected):
            raise RuntimeError(f"{name} gives {images.dtype} {tuple(images.shape)}, expected uint8 {expected}")
    call = functools.partial(next, batches)
    times = measure({name: call}, torch.device("cpu"), seconds=seconds, least=FEWEST)[name].seconds
    # The mean, since batches that were made in advance take no time.
    rate = len(times) * task.batch_size / sum(times)
    del batches, call  # ends its threads and processes
    gc.collect()
    return rate


def _peak(name: str, task: Task) -> int | None:
    if not Path("/proc/self/smaps_rollup").exists():
        return None
    context = multiprocessing.get_context("spawn")  # with nothing of this process
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(name, task, send))
    process.start()
    send.close()
    try:
        peak: int = receive.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures the memory of {name} died") from None
    finally:
        process.join()
    return peak


def _measure_memory(name: str, task: Task, send: Connection) -> None:
    # torch's workers may abort, and say so, when they are stopped in the middle of a batch. It was seen to work before.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    before, peak, done = _memory(), 0, threading.Event()
    batches = LOADERS[name](task)
    next(batches)  # forks its workers, which a process with threads should not

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, _memory())
            if done.wait(SAMPLING):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in itertools.islice(batches, 2 * WARM_UP):
        pass
    done.set()
    watcher.join()
    send.send(peak - before)


def _memory() -> int:
    """Bytes that this process and its children have written, each page once; files that they map do not count."""
    total, processes = 0, ["self"]
    while processes:
        folder = Path("/proc", processes.pop())
        try:
            for line in (folder / "smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("Pss_Anon", "Pss_Shmem"):
                    total += int(value.split()[0]) * 1024
            for task in (folder / "task").iterdir():
                processes += (task / "children").read_text().split()
        except OSError:  # it has ended
            continue
    return total
