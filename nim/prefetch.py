"""Batches that wait on the device before a step needs them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from denim.nim.data import Batch, Loader, to_device

__all__ = ["Inputs", "prefetched"]

AHEAD = 2  # parts that wait on the device beside the one in use


class Inputs(NamedTuple):
    """What one part of an update needs.

    Attributes:
        tensors: arguments of the task by name, on the device.
        loader: state of the loader once it had yielded this part, for a checkpoint.
    """

    tensors: dict[str, Tensor]
    loader: dict[str, Any]


def prefetched(
    loader: Loader,
    prepare: Callable[[Batch, int], dict[str, Tensor]],
    device: torch.device,
    *,
    first: int,
    per_epoch: int,
    stop: int,
    threaded: bool | None = None,
) -> Generator[Inputs, None, None]:
    """The inputs of parts `first`, ..., `stop - 1` of a run, an epoch having `per_epoch` of them.

    For a CUDA device a thread reads and prepares the next parts and copies them there on a stream of its own, while the
    device computes. Elsewhere the same cores would do both, and each part is made when it is asked for. The result is
    the same.

    Args:
        loader: yields the parts.
        prepare: tensors by name, on any device, from a part and its epoch.
        device: where the tensors are wanted.
        first: number of the first part.
        per_epoch: parts of an epoch that are used; the loader may have more.
        stop: number of the part after the last.
        threaded: whether there is a thread; by default for CUDA.

    Raises:
        Whatever the loader or `prepare` raises, at the part where it was raised.
    """
    if not (device.type == "cuda" if threaded is None else threaded):
        for batch, epoch in _parts(loader, first, per_epoch, stop):
            yield Inputs(_moved(prepare(batch, epoch), device), loader.state())
        return
    done = threading.Event()
    ready: queue.Queue[tuple[Inputs, Any] | BaseException | None] = queue.Queue(AHEAD)

    def put(item: tuple[Inputs, Any] | BaseException | None) -> None:
        while not done.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def work() -> None:
        try:
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            for batch, epoch in _parts(loader, first, per_epoch, stop):
                with torch.cuda.stream(stream):
                    tensors = _moved(prepare(batch, epoch), device)
                    copied = stream.record_event() if stream is not None else None
                put((Inputs(tensors, loader.state()), copied))
                if done.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            inputs, copied = item
            if copied is not None:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(copied)
                for tensor in inputs.tensors.values():
                    tensor.record_stream(stream)  # its memory is not free before this stream has used it
            yield inputs
    finally:
        done.set()
        thread.join()


def _parts(loader: Loader, first: int, per_epoch: int, stop: int) -> Iterator[tuple[Batch, int]]:
    while first < stop:
        epoch, step = divmod(first, per_epoch)
        last = min(per_epoch, step + stop - first)
        batches = loader.epoch(epoch, step)
        for _ in range(step, last):
            yield next(batches), epoch
        first += last - step


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: to_device(tensor, device) for name, tensor in tensors.items()}
