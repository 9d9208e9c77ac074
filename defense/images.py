"""The images of an evaluation: what may be given as data, and what identifies each image before it is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import PIL
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from denim.kernels import check_pixels
from denim.nim.data import Batch, EncodedSource, EvalView, Loader, PlannedLoader, TrainView
from denim.nim.data.dali_loader import dali_version
from denim.nim.data.decode import MachineError
from denim.nim.ranks import Ranks

__all__ = ["Images", "as_loader", "batches_of", "identify", "identify_all", "pixels_of", "same_again"]

Array = npt.NDArray[Any]

BATCH = 256  # images of a dataset or of tensors that are in memory at a time
READERS = 8  # threads that read encoded images


@dataclass(frozen=True)
class Images:
    """Images by what identifies them, in the order of their loader.

    Attributes:
        ids: int64 (N,), sample ids.
        labels: int64 (N,).
        digests: uint64 (N, 2), of the image, its id and its label.
        steps: int64 (N,), the batch that has it.
        indices: int64 (N,), its index in the source of a `PlannedLoader`; -1 elsewhere.
    """

    ids: Array
    labels: Array
    digests: Array
    steps: Array
    indices: Array

    def __len__(self) -> int:
        """Number of images, N."""
        return len(self.ids)

    def at(self, rows: Array) -> Images:
        """These images, int or bool (M,)."""
        return Images(self.ids[rows], self.labels[rows], self.digests[rows], self.steps[rows], self.indices[rows])

    @classmethod
    def joined(cls, parts: Sequence[Images]) -> Images:
        """The images of any number of parts, one after the other."""
        none = np.zeros(0, np.int64)
        whole = (cls(none, none, np.zeros((0, 2), np.uint64), none, none), *parts)
        return cls(*(np.concatenate([getattr(part, field.name) for part in whole]) for field in fields(cls)))


def identify_all(loader: Loader, ranks: Ranks) -> tuple[Images, Images]:
    """The images of this process and those of all, by rank.

    A loader that was made for as many ranks yields those of its own. The batches of another one are divided here.

    Raises:
        RankError: another rank has failed.
        BadSamplesError, MachineError: see `identify`.
    """
    with ranks.together():
        divided = getattr(loader, "world", 1) == ranks.world
        own = identify(loader, lambda step: divided or step % ranks.world == ranks.rank)
    return own, Images.joined(ranks.gather(own))


def identify(loader: Loader, is_own: Callable[[int], bool]) -> Images:
    """What identifies the images of a loader's epoch 0.

    An image of a `PlannedLoader` with `EvalView` or `TrainView` is what its file or its source holds, as the view and
    the decoder of this version make pixels of it: nothing is decoded. Other loaders are asked for their pixels, so all
    of them are decoded here.

    Args:
        loader: its epoch 0 is read, or planned.
        is_own: whether the images of a batch, by its step, are those of this process.

    Raises:
        BadSamplesError: more images cannot be read than the loader allows.
        MachineError: the machine cannot read an image.
    """
    if _is_described(loader):
        return _from_source(cast(PlannedLoader, loader), is_own)
    return _from_pixels(loader, is_own)


def same_again(loader: Loader, images: Images, batch: Batch) -> Array:
    """Whether images are still what they were identified as, after they were decoded; bool (B,).

    Args:
        loader: that has decoded the batch.
        images: its images, as `identify` found them.
        batch: the same images, in the same order.
    """
    if not _is_described(loader):
        return np.asarray((_pixel_digests(batch) == images.digests).all(axis=1))
    planned = cast(PlannedLoader, loader)
    digest = _source_digest(planned)
    again = np.zeros(len(images), dtype=bool)
    for row, (index, sample, label) in enumerate(zip(images.indices, images.ids, images.labels, strict=True)):
        try:
            again[row] = (digest(int(index), int(sample), int(label)) == images.digests[row]).all()
        except MachineError:
            raise
        except OSError:
            again[row] = False
    return again


def _is_described(loader: Loader) -> bool:
    """Whether the loader says, without decoding, what its images are made of."""
    return isinstance(loader, PlannedLoader) and isinstance(loader.view, (EvalView, TrainView))


def _from_source(loader: PlannedLoader, is_own: Callable[[int], bool]) -> Images:
    steps, indices = [], []
    for step in filter(is_own, range(loader.steps_per_epoch)):
        chosen, real = loader.plan(0, step)
        indices.append(chosen[real])
        steps.append(np.full(int(real.sum()), step))
    index, step_of = (
        np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64) for parts in (indices, steps)
    )
    ids, labels = loader.source.ids.numpy()[index], loader.source.labels.numpy()[index]
    digest = _source_digest(loader)

    def look(row: int) -> Array | str:
        try:
            return digest(int(index[row]), int(ids[row]), int(labels[row]))
        except MachineError:
            raise
        except OSError as error:
            return str(error)

    if isinstance(loader.source, EncodedSource):
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(look, range(len(index)), chunksize=64))
    else:
        found = [look(row) for row in range(len(index))]
    bad = {int(index[row]): words for row, words in enumerate(found) if isinstance(words, str)}
    loader.record(bad)
    kept = np.array([not isinstance(words, str) for words in found], dtype=bool)
    digests = np.array([words for words in found if not isinstance(words, str)], np.uint64).reshape(-1, 2)
    return Images(ids[kept], labels[kept], digests, step_of[kept], index[kept])


def _source_digest(loader: PlannedLoader) -> Callable[[int, int, int], Array]:
    """From index, id and label of an image to its digest."""
    source, view = loader.source, loader.view
    decoder = (
        f"dali {dali_version()} {getattr(loader, 'device', 'cpu')}"
        if loader.backend == "dali"
        else f"pillow {PIL.__version__}"
    )
    # Evaluation has one view of an image; views of training are keyed by the seed and the id.
    how = f"{decoder} {view!r} {source.channels} {'' if isinstance(view, EvalView) else loader.seed}".encode()

    def digest(index: int, sample: int, label: int) -> Array:
        if isinstance(source, EncodedSource):
            return _words(how, sample, label, source.encoded(index))
        image = source.read(index)
        return _words(how, sample, label, f"{image.mode} {image.size}".encode(), image.tobytes())

    return digest


def _from_pixels(loader: Loader, is_own: Callable[[int], bool]) -> Images:
    parts = []
    for step, padded in enumerate(loader.epoch(0)):
        if is_own(step):
            batch = padded.counted()
            where, nowhere = np.full(len(batch.ids), step), np.full(len(batch.ids), -1)
            ids, labels = batch.ids.cpu().numpy(), batch.labels.cpu().numpy()
            parts.append(Images(ids, labels, _pixel_digests(batch), where, nowhere))
    return Images.joined(parts)


def _pixel_digests(batch: Batch) -> Array:
    """uint64 (B, 2)."""
    images = batch.images.cpu().contiguous().numpy()
    rows = zip(batch.ids.tolist(), batch.labels.tolist(), images, strict=True)
    how = f"pixels {images.dtype} {images.shape[1:]}".encode()
    return np.array([_words(how, sample, label, image.tobytes()) for sample, label, image in rows], np.uint64).reshape(
        -1, 2
    )


def _words(how: bytes, sample: int, label: int, *content: bytes) -> Array:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(b"%d %d %d " % (len(how), sample, label) + how)
    for part in content:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return np.frombuffer(digest.digest(), "<u8")


def pixels_of(batch: Batch, device: torch.device) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1], float32, of the images of a batch, uint8 or float (B, H, W, C)."""
    images = batch.images.to(device).permute(0, 3, 1, 2)
    return images if images.is_floating_point() else images.float() / 255


def as_loader(data: Any) -> Loader:
    """A loader of what is given as data, whose batches may have float32 images in [0, 1] too.

    Args:
        data: a `Loader`; a `DataLoader` of torch, which must not shuffle, or a `Dataset`, with items (image, label); or
            a pair of tensors (images, labels). Images are (C, H, W), float in [0, 1] or uint8; a dataset may have
            images of Pillow, of one size, or arrays uint8 (H, W, C). Sample ids are positions.

    Raises:
        TypeError: it is none of these.
        ValueError: a loader that shuffles, or tensors that do not fit together.
    """
    if hasattr(data, "epoch") and hasattr(data, "steps_per_epoch"):
        return cast(Loader, data)
    if isinstance(data, (tuple, list)) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        images, labels = data
        if len(images) != len(labels):
            raise ValueError(f"images and labels must be as many, got {len(images)} and {len(labels)}")
        return _Items(lambda rows: (images[rows.start : rows.stop], labels[rows.start : rows.stop]), len(images))
    if isinstance(data, DataLoader):
        if isinstance(data.sampler, RandomSampler):
            raise ValueError(  # noqa: TRY004
                "the DataLoader shuffles, and an image is known by its position: give it shuffle=False"
            )
        return _Batches(data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        items = cast(Any, data)

        def read(rows: range) -> tuple[Any, Any]:
            images, labels = zip(*((item[0], item[1]) for item in map(items.__getitem__, rows)), strict=True)
            return images, labels

        return _Items(read, len(items))
    raise TypeError(
        "data must be a loader, a DataLoader or a Dataset of (image, label), or a pair of tensors (images, labels), "
        f"got {type(data).__name__}"
    )


class _Given:
    """A loader of what others have decoded. It knows of no bad images: what cannot be read is an error."""

    def state(self) -> dict[str, Any]:
        """No image is bad."""
        return {"bad": {}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on with."""


class _Items(_Given):
    """Batches of images that are read by position.

    Args:
        read: from positions to images and labels.
        count: number of images.
    """

    def __init__(self, read: Callable[[range], tuple[Any, Any]], count: int) -> None:
        self._read, self._count = read, count
        self.steps_per_epoch = -(-count // BATCH)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on; every epoch is the same."""
        for step in range(start_step, self.steps_per_epoch):
            rows = range(step * BATCH, min((step + 1) * BATCH, self._count))
            yield _batch(*self._read(rows), rows.start)


class _Batches(_Given):
    """Batches of a DataLoader of torch; those before `start_step` are loaded too."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        # Not known of a stream.
        self.steps_per_epoch = 0 if isinstance(loader.dataset, IterableDataset) else len(loader)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on; every epoch is the same."""
        first = 0
        for step, item in enumerate(self._loader):
            batch = _batch(*_pair(item), first)
            first += len(batch.ids)
            if step >= start_step:
                yield batch


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, (tuple, list)) and len(item) >= 2:
        return item[0], item[1]
    raise ValueError(f"the DataLoader must give (images, labels), got {type(item).__name__}")


def _batch(images: Any, labels: Any, first: int) -> Batch:
    """A batch of images (C, H, W) and their labels, whose ids are positions."""
    given = images if isinstance(images, Tensor) else torch.stack([_tensor(image) for image in images])
    truth = torch.as_tensor(labels)
    if given.dim() != 4 or given.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (C, H, W) with 1 or 3 channels, got {tuple(given.shape[1:])}")
    if truth.dim() != 1 or truth.is_floating_point():
        raise ValueError(f"labels must be one class number for each image, got {truth.dtype} {tuple(truth.shape)}")
    if given.dtype != torch.uint8:
        check_pixels(given)
        given = given.float()
    ids = torch.arange(first, first + len(given))
    return Batch(given.permute(0, 2, 3, 1), truth.long(), ids)


def _tensor(image: Any) -> Tensor:
    """(C, H, W)."""
    if isinstance(image, Tensor):
        return image
    array = np.array(image)
    return torch.from_numpy(array[:, :, None] if array.ndim == 2 else array).permute(2, 0, 1)


def batches_of(loader: Loader, steps: Array) -> Iterator[tuple[int, Batch]]:
    """The batches of some ascending steps of epoch 0, with their steps; others are decoded only where they must be."""
    if not len(steps):
        return
    runs = [range(int(steps[0]), int(steps[-1]) + 1)]
    if isinstance(loader, (PlannedLoader, _Items)):  # what they pass over costs nothing
        ends = np.flatnonzero(np.diff(steps) > 1)
        runs = [range(int(part[0]), int(part[-1]) + 1) for part in np.split(steps, ends + 1)]
    wanted = set(steps.tolist())
    for run in runs:
        for step, batch in zip(run, loader.epoch(0, run.start), strict=False):
            if step in wanted:
                yield step, batch.counted()
