"""The processes of one training, as torchrun starts them: who they are, and what they tell each other.

Here are the messages between hosts, which are small and go through Gloo on any machine. Gradients are those of
`denim.nim.parallel`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["RankError", "Ranks", "is_first_process", "joined"]

NAMING_SECONDS = 10  # in which the ranks that wait for another agree on which one it is


def is_first_process() -> bool:
    """Whether this process was started alone, or by torchrun as rank 0: the one that prints for all."""
    return int(os.environ.get("RANK") or 0) == 0


class RankError(RuntimeError):
    """Another rank has failed, or does not answer. The message names it."""


class Ranks:
    """The ranks of a training, and this one among them. One process that was started alone is rank 0 of 1.

    Every method that exchanges something must be called by all ranks, in the same order.

    Args:
        timeout: seconds that one rank waits for another.
        group: whether there is a process group of torch.

    Attributes:
        rank: of this process, 0 <= rank < world.
        world: number of ranks.
        local_rank: of this process among those of its machine.
        messages: Gloo group of the hosts' messages; None for one process.
        checkpoints: Gloo group of the thread that writes checkpoints; None for one process.
    """

    def __init__(self, timeout: float = 600.0, group: bool = False) -> None:
        self.timeout = timeout
        self.rank = dist.get_rank() if group else 0
        self.world = dist.get_world_size() if group else 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank)) if group else 0
        several = self.world > 1
        self.messages = _gloo(timeout) if several else None
        self.checkpoints = _gloo(timeout) if several else None
        self._naming = _gloo(NAMING_SECONDS) if several else None

    def close(self) -> None:
        """Give up the groups. Nothing can be exchanged after it."""
        for group in (self.messages, self.checkpoints, self._naming):
            if group is not None:
                dist.destroy_process_group(group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints for all."""
        return self.rank == 0

    def agree(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank. No rank goes on before all have come here.

        Raises:
            RankError: a rank has not come within `timeout` seconds. The message names it.
        """
        if self.world == 1:
            return list(flags)
        gathered = torch.tensor(flags, dtype=torch.int32)
        with self.naming():
            dist.all_reduce(gathered, dist.ReduceOp.MAX, group=self.messages)
        return [bool(flag) for flag in gathered.tolist()]

    @contextmanager
    def naming(self) -> Iterator[None]:
        """What Gloo raises inside, because a rank is gone or does not answer, becomes an error that names the rank.

        Raises:
            RankError: see above.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or "gloo" not in str(error).lower():
                raise
            raise RankError(f"rank {self.rank} has waited for the others in vain: {self._who(error)}") from error

    def _who(self, error: RuntimeError) -> str:
        """Which ranks do not answer, as far as the others can tell."""
        try:
            dist.monitored_barrier(self._naming, timedelta(seconds=NAMING_SECONDS), wait_all_ranks=True)
        except RuntimeError as barrier:
            return str(barrier).splitlines()[0]
        return str(error).splitlines()[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, by rank. Values are pickled: they come from processes of the same training."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.messages)
        return values

    def share(self, value: Any, group: dist.ProcessGroup | None = None) -> Any:
        """Rank 0's value, on every rank.

        Args:
            value: of rank 0; that of the others is ignored.
            group: that carries it; by default `messages`.
        """
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group or self.messages)
        return values[0]

    def barrier(self, group: dist.ProcessGroup | None = None) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(group or self.messages)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank inside fails on all, so that none waits for one that has gone.

        Raises:
            RankError: another rank has failed, and this one has not.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        words = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, text in enumerate(words):
            if text is not None:
                raise RankError(f"rank {rank} has failed: {text}")

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Rank 0 is inside before all others, which find what it has made: an index in the cache, a compiled kernel.

        What fails on one rank fails on all, as in `together`.
        """
        with self.together():
            if self.is_first:
                yield
        with self.together():
            if not self.is_first:
                yield


def _gloo(seconds: float) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    assert isinstance(group, dist.ProcessGroup)  # and not the mark of a rank outside of it: all ranks are in it
    return group


@contextmanager
def joined(device: torch.device, timeout: float = 600.0, *, alone: bool = False) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, and leave them at the end.

    A process group that is there already is used, and stays. So does the one that is made of torchrun's processes,
    until they end: the next training of the same processes uses it again.

    Args:
        device: of this process's training; its type decides between NCCL and Gloo for gradients.
        timeout: seconds that one rank waits for another.
        alone: make a group for a process that was started alone, too (FSDP needs one).
    """
    there, launched = dist.is_initialized(), "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not there and not launched and not alone:
        yield Ranks(timeout)
        return
    if not there:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        place: dict[str, Any] = {}
        if not launched:
            place = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **place)
        if launched:
            atexit.register(_leave)
    ranks = Ranks(timeout, group=True)
    try:
        yield ranks
    finally:
        ranks.close()
        if not there and not launched:
            _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
