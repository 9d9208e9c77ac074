"""Loaders: batches of uint8 images with labels and sample ids, in an order that (seed, epoch) alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from denim.nim.data.sources import Source
from denim.nim.data.views import View, sample_rng

__all__ = ["Batch", "Loader", "TorchLoader"]


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        images: uint8 (B, H, W, C).
        labels: int64 (B,).
        ids: int64 (B,), the ids of the samples in their source.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on `device`."""
        images, labels, ids = (x.to(device, non_blocking=non_blocking) for x in (self.images, self.labels, self.ids))
        return Batch(images, labels, ids)


class Loader(Protocol):
    """Batches by (epoch, step): two numbers are all the state there is."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, ..., `steps_per_epoch - 1` of an epoch, the same whatever ran before."""
        ...


class TorchLoader:
    """Decodes with Pillow, in this process or in torch's worker processes.

    The epoch order is a permutation that depends on (seed, epoch) alone, the view of a sample depends on (seed, epoch,
    its id) alone: batches are the same for any number of workers and any `start_step`, and what lies before
    `start_step` is not decoded. The global torch generator is neither read nor seeded.

    A later loader on NVIDIA DALI serves the same protocol: it is handed this order and these windows.

    Args:
        source: images.
        view: from a Pillow image and a generator to uint8 (H, W, C), the same shape for all images.
        batch_size: B.
        seed: any int64.
        shuffle: permute in every epoch; otherwise the order of the source.
        drop_last: leave out the last batch if it is not full; otherwise it is smaller.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        ValueError: batch_size below 1, negative workers, empty source, or `drop_last` with fewer images than a batch.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        if len(source) == 0:
            raise ValueError(f"{source.name} has no images")
        if drop_last and len(source) < batch_size:
            raise ValueError(
                f"{source.name} has {len(source)} images, less than one batch of {batch_size}, and drop_last leaves "
                "out what does not fill a batch: take a smaller batch_size or drop_last=False"
            )
        self.source = source
        self.view = view
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.workers = workers
        self.steps_per_epoch = len(source) // batch_size if drop_last else -(-len(source) // batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, ..., `steps_per_epoch - 1` of an epoch.

        Raises:
            ValueError: `start_step` outside 0..steps_per_epoch (at `steps_per_epoch` nothing is left).
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must be in 0..{self.steps_per_epoch}, got {start_step}")
        batches = _Batches(self, epoch)
        # A generator of its own: DataLoader would otherwise draw a seed for its workers from the global one.
        return iter(
            DataLoader(
                batches,
                batch_size=None,
                sampler=range(start_step, self.steps_per_epoch),
                num_workers=self.workers,
                generator=torch.Generator(),
            )
        )


class _Batches(Dataset[Batch]):
    """The batches of one epoch, by step."""

    def __init__(self, loader: TorchLoader, epoch: int) -> None:
        self.loader = loader
        self.epoch = epoch
        self.order = _permutation(len(loader.source), loader.seed, epoch) if loader.shuffle else None

    def __getitem__(self, step: int) -> Batch:
        loader, source = self.loader, self.loader.source
        start, stop = step * loader.batch_size, min((step + 1) * loader.batch_size, len(source))
        chosen = np.arange(start, stop) if self.order is None else self.order[start:stop]
        ids = source.ids[chosen]
        views = [
            loader.view(source.read(index), sample_rng(loader.seed, self.epoch, sample_id))
            for index, sample_id in zip(chosen.tolist(), ids.tolist(), strict=True)
        ]
        return Batch(torch.from_numpy(np.stack(views)), source.labels[chosen], ids)


def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    # Sorted raw words, because NumPy promises those (and not `permutation`) to be the same in every release. They are
    # those of sample 0 from 2^128 counts on, where no view gets.
    words = sample_rng(seed, epoch, 0).bit_generator
    assert isinstance(words, np.random.Philox)
    return np.argsort(words.jumped().random_raw(count), kind="stable")
