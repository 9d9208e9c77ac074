"""Loaders: batches of uint8 images with labels and sample ids, in an order that (seed, epoch) alone decides."""

from __future__ import annotations

import functools
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from denim.nim.data.decode import MachineError
from denim.nim.data.order import Order, keyed_words
from denim.nim.data.sources import Source
from denim.nim.data.views import View, sample_rng
from denim.nim.stopping import leave_signals_to_parent

__all__ = ["BadSamplesError", "Batch", "Loader", "PlannedLoader", "TorchLoader", "to_device"]

LAST = ("drop", "keep", "pad")
NAMED = 20  # bad samples that a message names; the state has them all


class BadSamplesError(ValueError):
    """More samples than the limit allows cannot be read; the message has the list."""


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        images: uint8 (B, H, W, C).
        labels: int64 (B,).
        ids: int64 (B,), the ids of the samples in their source. They stay on the host, wherever the images lie: what is
            keyed by them on the host (levels, mixing) would have to wait for the device.
        real: bool (B,), False for rows that fill a place and must not be counted. None: all rows count.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    real: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with images, labels and `real` on `device` (see `to_device`)."""
        real = None if self.real is None else to_device(self.real, device)
        return Batch(to_device(self.images, device), to_device(self.labels, device), self.ids, real)

    def counted(self) -> Batch:
        """The batch without the rows that are not real."""
        if self.real is None:
            return self
        return Batch(self.images[self.real], self.labels[self.real], self.ids[self.real.to(self.ids.device)])


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. From the host to a CUDA device it is copied without waiting for what the device does.

    Such a copy is from pinned memory. From other memory the driver would first wait for the stream.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Loader(Protocol):
    """Batches by (epoch, step). Two numbers and the samples that were found bad are all the state there is."""

    steps_per_epoch: int

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, ..., `steps_per_epoch - 1` of an epoch, the same whatever ran before."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, fit for JSON; "bad" maps ids of samples to why they cannot be read."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what an earlier loader of the same run knew."""
        ...


class PlannedLoader(ABC):
    """What the backends share: which sample stands where, which samples are bad, and what stands in for those.

    **Order.** A permutation of (seed, epoch) (see `Order`), cut into global batches of `batch_size * world`, cut by
    rank: rank r has positions `step * batch_size * world + r * batch_size` and the `batch_size - 1` after it. So the
    ranks' batches together do not depend on their number, and an epoch is as long on every rank, in every epoch.

    **Bad samples.** A sample that cannot be read when it is needed is bad for the rest of the run. Another one stands
    in for it, with its own label and id: candidate k is word k of a generator keyed by (seed, epoch, id of the bad
    sample), modulo the number of samples; the first that is not bad itself is taken. So a batch is a function of
    (seed, epoch, step) and of which samples are bad. Where every image counts once (`last` is "keep" or "pad"), such
    rows are marked as not real. Each rank knows what it has met: `load_state` takes the states of all ranks, one
    after the other.

    Args:
        source: images.
        view: from a Pillow image and a generator to uint8 (H, W, C), the same shape for all images.
        batch_size: B, images of this rank.
        seed: any int64.
        shuffle: permute in every epoch; otherwise the order of the source.
        last: what becomes of a last global batch that is not full. "drop" leaves it out; "keep" makes it smaller (for
            one rank; several must stay in step); "pad" fills it with samples from the start of the order, marked in
            `Batch.real`.
        rank: of this process, 0 <= rank < world.
        world: number of ranks.
        max_bad: largest share of samples that may be bad, those that were left out of the source included.

    Raises:
        ValueError: a value outside its range, an empty source, "drop" with fewer images than a global batch, or
            "keep" where ranks would get batches of different sizes.
    """

    backend: ClassVar[str]

    def __init__(
        self,
        source: Source,
        view: View,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        last: str = "drop",
        rank: int = 0,
        world: int = 1,
        max_bad: float = 0.01,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if last not in LAST:
            raise ValueError(f"last must be {', '.join(LAST[:-1])} or {LAST[-1]}, got {last!r}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0..world - 1, got rank {rank} of {world}")
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a share and must lie in [0, 1], got {max_bad}")
        count, together = len(source), batch_size * world
        if count == 0:
            raise ValueError(f"{source.name} has no images")
        whole, rest = divmod(count, together)
        if last == "drop" and whole == 0:
            raise ValueError(
                f"{source.name} has {count} images, less than one batch of {together}, and last='drop' leaves out what "
                "does not fill a batch: take a smaller batch_size"
            )
        if last == "keep" and world > 1 and rest:
            raise ValueError(
                f"{source.name} has {count} images, no multiple of {world} ranks x {batch_size}, and last='keep' would "
                "give the ranks batches of different sizes: take last='pad'"
            )
        self.source = source
        self.view = view
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.last = last
        self.rank = rank
        self.world = world
        self.max_bad = max_bad
        self.steps_per_epoch = whole + (rest > 0 and last != "drop")
        # Index in the source -> why it cannot be read.
        self.bad: dict[int, str] = {}
        self._order: tuple[int, Order] | None = None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches `start_step`, ..., `steps_per_epoch - 1` of an epoch, as this rank sees them.

        Raises:
            ValueError: `start_step` outside 0..steps_per_epoch (at `steps_per_epoch` nothing is left).
            BadSamplesError: while iterating; more samples are bad than `max_bad` allows.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step must be in 0..{self.steps_per_epoch}, got {start_step}")
        return self._batches(epoch, start_step)

    @abstractmethod
    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]: ...

    def plan(
        self, epoch: int, step: int, bad: Mapping[int, str] | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """What batch `step` of an epoch consists of, given what is bad.

        Args:
            epoch: number of the epoch.
            step: 0 <= step < steps_per_epoch.
            bad: indices that must not be read; by default those that this loader knows of.

        Returns:
            Indices in the source, int64 (B,), and which of these rows are real, bool (B,).

        Raises:
            BadSamplesError: every sample is bad.
        """
        bad = self.bad if bad is None else bad
        count = len(self.source)
        start = (step * self.world + self.rank) * self.batch_size
        stop = min(start + self.batch_size, count) if self.last == "keep" else start + self.batch_size
        places = np.arange(start, stop)
        real = places < count
        chosen = places % count
        if self.shuffle:
            chosen = self._order_of(epoch).at(chosen)
        if bad:
            for row, index in enumerate(chosen.tolist()):
                if index in bad:
                    chosen[row] = self._replacement(epoch, index, bad)
                    real[row] &= self.last == "drop"
        return chosen, real

    def gather(self, images: Tensor, chosen: npt.NDArray[np.int64], real: npt.NDArray[np.bool_]) -> Batch:
        """The batch of these images, which `plan` chose, with labels on their device."""
        batch = Batch(
            images, self.source.labels[chosen], self.source.ids[chosen], None if real.all() else torch.from_numpy(real)
        )
        return batch if images.device.type == "cpu" else batch.to(images.device)

    def record(self, found: Mapping[int, str]) -> None:
        """Take note of samples that cannot be read, with one warning.

        Args:
            found: index in the source -> why.

        Raises:
            BadSamplesError: now more are bad than `max_bad` allows.
        """
        new = {index: reason for index, reason in found.items() if index not in self.bad}
        if not new:
            return
        self._note(new)
        warnings.warn(
            f"{len(new)} images of {self.source.name} can no longer be read; others stand in for them: "
            f"{_listed(list(new.values()))}",
            stacklevel=3,
        )

    def exceeded(self, bad: Mapping[int, str]) -> bool:
        """Whether the run must stop with so many bad samples: above `max_bad`, or nothing left."""
        count, left_out = len(self.source), len(self.source.skipped)
        return len(bad) == count or len(bad) + left_out > self.max_bad * (count + left_out)

    def state(self) -> dict[str, Any]:
        """The backend, a digest of the source's ids, and "bad": id of every bad sample, as text -> why."""
        ids = self.source.ids[list(self.bad)].tolist()
        bad = {str(sample_id): reason for sample_id, reason in zip(ids, self.bad.values(), strict=True)}
        return {"backend": self.backend, "count": len(self.source), "ids": self._digest, "bad": bad}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Add what an earlier loader of the same run, on this or another rank, found bad.

        Raises:
            ValueError: the state is that of another backend (its pixels differ) or of other data, or no such state.
            BadSamplesError: now more are bad than `max_bad` allows.
        """
        bad = state.get("bad")
        if not {"backend", "count", "ids"} <= state.keys() or not isinstance(bad, Mapping):
            raise ValueError(f"this is no state of a loader: {str(dict(state))[:60]}")
        if any(not isinstance(text, str) for entry in bad.items() for text in entry):
            raise ValueError("the state of the loader must give bad samples by id, with why they cannot be read")
        if state["backend"] != self.backend:
            raise ValueError(
                f"the run began with the loader {state['backend']!r}, whose pixels are not quite those of "
                f"{self.backend!r}: resume it with --loader {state['backend']}"
            )
        if (state["count"], state["ids"]) != (len(self.source), self._digest):
            raise ValueError(
                f"{self.source.name} is not what the run began with: it had {state['count']} images and has "
                f"{len(self.source)}, or has others; restore the files that were added, removed or damaged"
            )
        known = np.array([int(sample_id) for sample_id in state["bad"]], dtype=np.int64)
        reasons = {int(sample_id): reason for sample_id, reason in state["bad"].items()}
        ids = self.source.ids.numpy()
        self._note({int(index): reasons[int(ids[index])] for index in np.flatnonzero(np.isin(ids, known))})

    def _note(self, bad: Mapping[int, str]) -> None:
        self.bad.update(bad)
        if self.bad and self.exceeded(self.bad):
            faults = [*self.bad.values(), *self.source.skipped]
            raise BadSamplesError(
                f"{len(faults)} of {len(self.source) + len(self.source.skipped)} images of {self.source.name} cannot "
                f"be read, more than max_bad = {self.max_bad:g} allows: {_listed(faults)}"
            )

    @functools.cached_property
    def _digest(self) -> str:
        return hashlib.blake2b(np.ascontiguousarray(self.source.ids.numpy()).data, digest_size=16).hexdigest()

    def _order_of(self, epoch: int) -> Order:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Order(len(self.source), self.seed, epoch)
        return self._order[1]

    def _replacement(self, epoch: int, index: int, bad: Mapping[int, str]) -> int:
        if len(bad) == len(self.source):
            raise BadSamplesError(f"no image of {self.source.name} can be read: {_listed(list(bad.values()))}")
        words = keyed_words(self.seed, epoch, int(self.source.ids[index]), 2)
        while True:
            candidate = int(words.random_raw()) % len(self.source)
            if candidate not in bad:
                return candidate


class TorchLoader(PlannedLoader):
    """Decodes with Pillow, in this process or in torch's worker processes.

    The view of a sample depends on (seed, epoch, its id) alone: batches are the same for any number of workers and any
    `start_step`, and what lies before `start_step` is not decoded. The global torch generator is neither read nor
    seeded. Batches lie on the CPU.

    Arguments that are not listed here are those of `PlannedLoader`.

    Args:
        workers: processes that decode; 0 decodes in this one.
        pin_memory: leave the images in pinned memory, from which a copy to a CUDA device does not wait.

    Raises:
        ValueError: negative workers, and as `PlannedLoader`.
        MachineError: while iterating; the machine cannot read an image. No image is bad for that.
        ChildProcessError: while iterating; a worker process died (killed, or out of memory).
    """

    backend = "torch"

    def __init__(
        self,
        source: Source,
        view: View,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        last: str = "drop",
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        max_bad: float = 0.01,
        pin_memory: bool = False,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers must not be negative, got {workers}")
        super().__init__(
            source, view, batch_size, seed=seed, shuffle=shuffle, last=last, rank=rank, world=world, max_bad=max_bad
        )
        self.workers = workers
        self.pin_memory = pin_memory

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        # A generator of its own: DataLoader would otherwise draw a seed for its workers from the global one.
        loaded = iter(
            DataLoader(
                _Decoder(self, epoch),
                batch_size=None,
                sampler=range(start_step, self.steps_per_epoch),
                num_workers=self.workers,
                pin_memory=self.pin_memory,
                worker_init_fn=leave_signals_to_parent,
                generator=torch.Generator(),
            )
        )
        for step in range(start_step, self.steps_per_epoch):
            try:
                decoded: _Decoded = next(loaded)
            except RuntimeError as error:
                if "DataLoader worker (pid" not in str(error):
                    raise
                raise ChildProcessError(
                    f"a process that decodes images of {self.source.name} died before step {step} of epoch {epoch}: "
                    f"{error}; if memory ran out, take fewer workers (now {self.workers}) or a smaller batch; a run "
                    "goes on from its last checkpoint when resumed"
                ) from error
            decoded = self._checked(decoded)
            if self.bad and not self.bad.keys().isdisjoint(decoded.chosen.tolist()):
                # The worker began before an earlier batch, of another worker, found bad what it took.
                decoded = self._checked(_Decoder(self, epoch)[step])
            yield self.gather(decoded.images, decoded.chosen, decoded.real)

    def _checked(self, decoded: _Decoded) -> _Decoded:
        if decoded.failure:
            raise MachineError(decoded.failure)
        self.record(decoded.found)
        return decoded


@dataclass(frozen=True)
class _Decoded:
    """A batch on its way from a worker, images in shared memory, and what the worker found bad for it.

    `failure` is a fault of the machine, for which the run has to stop.
    """

    images: Tensor
    chosen: npt.NDArray[np.int64]
    real: npt.NDArray[np.bool_]
    found: dict[int, str]
    failure: str = ""

    def pin_memory(self) -> _Decoded:
        """The same, its images in pinned memory; torch's thread for that asks for it."""
        return replace(self, images=self.images.pin_memory())


class _Decoder(Dataset[_Decoded]):
    """The batches of one epoch, by step."""

    def __init__(self, loader: TorchLoader, epoch: int) -> None:
        self.loader = loader
        self.epoch = epoch
        # A copy: what the loader knows must come from batches that it has handed out, wherever those were decoded.
        self.bad = dict(loader.bad)

    def __getitem__(self, step: int) -> _Decoded:
        loader = self.loader
        views: dict[int, npt.NDArray[np.uint8]] = {}
        found: dict[int, str] = {}
        while True:
            chosen, real = loader.plan(self.epoch, step, self.bad)
            indices, ids = chosen.tolist(), loader.source.ids[chosen].tolist()
            for index, sample_id in zip(indices, ids, strict=True):
                if index not in views and index not in self.bad:
                    try:
                        image = loader.source.read(index)
                    except MachineError as error:
                        return _Decoded(torch.empty(0, dtype=torch.uint8), chosen, real, found, str(error))
                    except OSError as error:
                        self.bad[index] = found[index] = str(error)
                    else:
                        views[index] = loader.view(image, sample_rng(loader.seed, self.epoch, sample_id))
            if views.keys() >= set(indices):
                images = np.stack([views[index] for index in indices])
                return _Decoded(torch.from_numpy(images), chosen, real, found)
            if loader.exceeded(self.bad):
                # Without images: `record` stops the run, with its own words and in its own process.
                return _Decoded(torch.empty(0, dtype=torch.uint8), chosen, real, found)


def _listed(faults: list[str]) -> str:
    more = len(faults) - NAMED
    return "; ".join(faults[:NAMED]) + (f"; and {more} more" if more > 0 else "")
