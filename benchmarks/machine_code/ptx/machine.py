"""Executes parsed PTX: all threads of many programs at once, one numpy operation per instruction.

Lanes that diverge are run block by block, those furthest behind first, so that they meet again where their paths join.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from denim.benchmarks.machine_code.ptx.counts import Counts
from denim.benchmarks.machine_code.ptx.memory import Buffer, GlobalMemory
from denim.benchmarks.machine_code.ptx.parser import Address, Instruction, Kernel, as_tuple
from denim.benchmarks.machine_code.ptx.programs import SPECIAL, WARP, Array, Launched, Mask, Programs
from denim.benchmarks.machine_code.ptx.steps import Step, step
from denim.benchmarks.machine_code.ptx.traps import BarrierNotReached, Trap, UnknownInstruction

__all__ = ["Machine"]

# Lanes that run at once: arrays of this length stay in cache.
LANES = 1 << 14
_BARRIERS = ("bar.sync", "barrier.sync")
_CONTROL = ("bra", "bra.uni", "ret", "exit", *_BARRIERS)


# --- blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after another, the last of which may end it (`_CONTROL`)."""

    steps: tuple[tuple[Step, Instruction], ...]
    end: Instruction | None
    target: int
    """The block that a branch goes to, or one behind the last for a return."""


def _context(kernel: Kernel, instruction: Instruction) -> str:
    return f"kernel {kernel.name}, {instruction.place or 'no source line'}, `{instruction.text}`"


def _check_names(kernel: Kernel, instruction: Instruction) -> None:
    known = {"_", *SPECIAL, *kernel.local, *kernel.constants, *(name for name, _ in kernel.parameters)}
    for operand in instruction.operands:
        for part in as_tuple(operand.base if isinstance(operand, Address) else operand):
            if isinstance(part, str) and part not in known:
                raise UnknownInstruction(f"{part} is not implemented")


@functools.lru_cache(maxsize=512)
def _blocks(kernel: Kernel) -> tuple[Block, ...]:
    starts = {0, *kernel.labels.values()}
    starts |= {k + 1 for k, instruction in enumerate(kernel.code) if instruction.opcode in _CONTROL}
    ordered = sorted(start for start in starts if start < len(kernel.code))
    number = {start: k for k, start in enumerate(ordered)} | {len(kernel.code): len(ordered)}
    blocks = []
    for start, end in zip(ordered, [*ordered[1:], len(kernel.code)], strict=True):
        code = list(kernel.code[start:end])
        last = code.pop() if code[-1].opcode in _CONTROL else None
        steps = []
        for instruction in code:
            try:
                _check_names(kernel, instruction)
                steps.append((step(instruction), instruction))
            except UnknownInstruction as trap:
                raise UnknownInstruction(f"{_context(kernel, instruction)}: {trap}") from None
        target = len(ordered)
        if last is not None and last.opcode.startswith("bra"):
            target = number[kernel.labels[str(last.operands[0])]]
        if last is not None and last.opcode in _BARRIERS and (last.operands != (0,) or last.guard):
            raise UnknownInstruction(f"{_context(kernel, last)}: a barrier other than that of all threads")
        blocks.append(Block(tuple(steps), last, target))
    return tuple(blocks)


class Machine:
    """One launch of a kernel.

    Args:
        kernel: from `parse`.
        grid: programs in each dimension, up to three.
        parameters: bytes of each of the kernel's parameters, in order.
        memory: what the launch may access.
        shared: bytes of shared memory of a program.
        approximation: how wrong the approximate functions (`arithmetic.GRANTED`) are, as a share of the largest error
            that PTX grants them: 0 for the nearest float32, 1 for the worst; the sign varies from value to value.
        count: whether accesses to memory are counted, in `counts`.
        unordered: as in `SharedMemory`.

    Raises:
        UnknownInstruction: an instruction that is not implemented. All are looked at before any is executed.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        parameters: Sequence[bytes],
        memory: Sequence[Buffer],
        shared: int = 0,
        approximation: float = 0.0,
        count: bool = False,
        unordered: bool = False,
    ) -> None:
        if kernel.threads % WARP:
            raise UnknownInstruction(f"kernel {kernel.name} has {kernel.threads} threads, not whole warps of {WARP}")
        names = [name for name, _ in kernel.parameters]
        if len(names) != len(parameters):
            raise ValueError(f"kernel {kernel.name} has {len(names)} parameters, got {len(parameters)}")
        x, y, z = (*grid, 1, 1)[:3]
        places = itertools.accumulate((len(parameter) for parameter in parameters), initial=0)
        self._constants = {name: np.frombuffer(data, np.uint8) for name, data in kernel.constants.items()}
        buffers = [Buffer(array.ctypes.data, array.nbytes, name) for name, array in self._constants.items()]
        self.launched = Launched(
            kernel,
            (x, y, z),
            np.frombuffer(b"".join(parameters), np.uint8),
            GlobalMemory([*memory, *buffers]),
            {
                **dict(zip(names, places, strict=False)),
                **{name: array.ctypes.data for name, array in self._constants.items()},
            },
            shared,
            approximation,
            unordered,
            Counts() if count else None,
        )
        self.blocks = _blocks(kernel)
        # How often a warp, and how often a lane, has executed each block.
        self.executed = np.zeros(len(self.blocks), np.int64)
        self.executed_by_lanes = np.zeros(len(self.blocks), np.int64)

    @property
    def warp_instructions(self) -> int:
        """Instructions of warps so far: one counts once, however many of the warp's lanes execute it."""
        return int(self.executed @ self._sizes)

    @property
    def counts(self) -> Counts | None:
        """What has been counted so far; None unless it was asked for."""
        counts = self.launched.counts
        if counts is not None:
            counts.warp_instructions = self.warp_instructions
            counts.thread_instructions = int(self.executed_by_lanes @ self._sizes)
        return counts

    @property
    def _sizes(self) -> Array:
        return np.array([len(block.steps) + (block.end is not None) for block in self.blocks], np.int64)

    def run(self, programs: Sequence[int] | None = None) -> None:
        """Execute programs, by their index in the grid (x runs fastest); by default all, in order.

        Raises:
            Trap: see `traps`. The message says where.
        """
        chosen = range(math.prod(self.launched.grid)) if programs is None else programs
        at_once = max(1, LANES // self.launched.kernel.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(chosen), at_once):
                _Paths(self, Programs(self.launched, np.array(chosen[first : first + at_once], np.int64))).follow()


class _Paths:
    """Where each lane of some programs is, and which wait at a barrier of their program."""

    def __init__(self, machine: Machine, programs: Programs) -> None:
        self.machine, self.programs = machine, programs
        self.at = np.zeros(programs.lanes, np.int64)
        self.waiting = np.zeros(programs.lanes, bool)

    def follow(self) -> None:
        """Execute blocks until all lanes have returned."""
        blocks = self.machine.blocks
        while True:
            ready = (self.at < len(blocks)) & ~self.waiting
            if ready.any():
                number = int(self.at[ready].min())
                here = ready & (self.at == number)
                self.machine.executed[number] += int(here.reshape(-1, WARP).any(1).sum())
                self.machine.executed_by_lanes[number] += int(here.sum())
                self._execute(blocks[number], number, here)
            elif self.waiting.any():
                self._meet()
            else:
                return

    def _execute(self, block: Block, number: int, here: Array) -> None:
        programs, everywhere = self.programs, bool(here.all())
        self.at[here] = number + 1
        instruction: Instruction | None = None
        try:
            for do, instruction in block.steps:
                active = None if everywhere else here
                if instruction.guard is not None:
                    active = self._guarded(instruction, active)
                    if active is not None and not active.any():
                        continue
                do(programs, active)
                programs.tainted = None
            instruction = block.end
            if instruction is not None:
                going = here if instruction.guard is None else here & self._guarded(instruction, here)
                if instruction.opcode in _BARRIERS:
                    self.waiting[going] = True
                else:
                    self.at[going] = block.target
        except Trap as trap:
            assert instruction is not None
            lanes = np.asarray(trap.lanes)
            first = f" ({self._name(int(lanes[0]))}, the first of {len(lanes)})" if len(lanes) else ""
            context = _context(self.machine.launched.kernel, instruction)
            raise type(trap)(f"{trap}{first}: {context}", lanes) from None

    def _guarded(self, instruction: Instruction, active: Mask) -> Mask:
        assert instruction.guard is not None
        register, wanted = instruction.guard
        predicate = self.programs.read(register, active)
        predicate = predicate if wanted else ~predicate
        if active is None:
            return None if predicate.all() else np.broadcast_to(predicate, (self.programs.lanes,))
        return active & predicate

    def _meet(self) -> None:
        """No lane can go on: the threads of every program that is not done must all be at a barrier."""
        waiting = self.waiting.reshape(-1, self.machine.launched.kernel.threads)
        missing = waiting.any(1, keepdims=True) & ~waiting
        if missing.any():
            lane = self._name(int(missing.argmax()))
            kernel = self.machine.launched.kernel.name
            raise BarrierNotReached(
                f"kernel {kernel}: {lane} has returned, and others of its program wait at a barrier"
            )
        met = np.flatnonzero(waiting.all(1))
        self.programs.barriers[met] += 1
        self.programs.shared.barrier(met)
        self.waiting[:] = False

    def _name(self, lane: int) -> str:
        programs = self.programs
        return f"thread {int(programs.thread[lane])} of program {int(programs.index[programs.program[lane]])}"
