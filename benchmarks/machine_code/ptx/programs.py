# mypy: disable-error-code="no-any-return"
"""Programs that run together: their registers, their memories and their warps.

A lane is a thread of one of them. A register is an array with an element per lane, or with one element where all lanes
hold the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denim.benchmarks.machine_code.ptx import arithmetic
from denim.benchmarks.machine_code.ptx.counts import Counts
from denim.benchmarks.machine_code.ptx.forms import Form
from denim.benchmarks.machine_code.ptx.memory import PROGRAM, GlobalMemory, LocalMemory, SharedMemory
from denim.benchmarks.machine_code.ptx.parser import Kernel, Register, as_tuple
from denim.benchmarks.machine_code.ptx.traps import PartialWarp, Trap, Undefined

__all__ = ["BITS", "SPECIAL", "WARP", "Array", "Launched", "Mask", "Programs"]

Array = NDArray[Any]
Mask = Array | None
"""Lanes that execute; None for all."""

WARP = 32
# How registers are held, by their width in bytes; 0 is a predicate's.
BITS = {0: np.dtype(np.bool_)} | {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}
# Registers that tell a thread where it is, and the variable that stands for the program's shared memory.
SPECIAL = frozenset(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz") | {
    "%laneid",
    "%warpid",
    "global_smem",
}


@dataclass(frozen=True)
class Launched:
    """What all programs of a launch share."""

    kernel: Kernel
    grid: tuple[int, int, int]
    parameters: Array
    """Bytes of the kernel's parameters, one after another."""
    memory: GlobalMemory
    addresses: dict[str, int]
    """Of the parameters, from zero on, and of the module's variables."""
    shared: int
    """Bytes of a program."""
    approximation: float
    """How wrong approximate functions are, as a share of the error that PTX grants."""
    unordered: bool
    """As in `SharedMemory`."""
    counts: Counts | None
    """Gets every access to global and shared memory, if it is wanted."""


def _extended(value: Array, width: int) -> Array:
    """A value as the bits of a register, extended by its sign if it has one."""
    if value.dtype.itemsize < width and value.dtype.kind != "b":
        kind = "i" if value.dtype.kind == "i" else "u"
        value = value.astype(f"{kind}{width}") if value.dtype.kind in "iu" else value.view(f"u{value.dtype.itemsize}")
        if value.dtype.itemsize < width:
            value = value.astype(f"u{width}")
    return value.view(BITS[width]) if value.dtype != BITS[width] else value


@functools.lru_cache(maxsize=512)
def _never_written(kernel: Kernel) -> dict[int, Array]:
    """Registers that no instruction writes, which stand for values that LLVM leaves open: all ones, so NaN as floats.

    Such values occur where the compiler computes on pairs of which it needs one half.
    """
    written = {
        operand
        for instruction in kernel.code
        if not instruction.opcode.startswith("st.") and instruction.operands
        for operand in as_tuple(instruction.operands[0])
    }
    free = (register for register in kernel.registers if register not in written)
    return {
        register.number: np.full(1, -1 if register.width else True).astype(BITS[register.width]) for register in free
    }


class Programs:
    """Their state. `index` holds the place of each program in the grid (x runs fastest)."""

    def __init__(self, launch: Launched, index: Array) -> None:
        kernel, grid = launch.kernel, launch.grid
        self.launch, self.index = launch, index
        self.lanes = len(index) * kernel.threads
        self.thread = np.tile(np.arange(kernel.threads), len(index))
        self.program = np.repeat(np.arange(len(index)), kernel.threads)
        # The carry of extended sums is one predicate more.
        self.carry = Register(len(kernel.registers), 0, "the carry")
        self.registers: list[Array | None] = [None] * (len(kernel.registers) + 1)
        for place, value in _never_written(kernel).items():
            self.registers[place] = value
        # Lanes in which a register has no value, for registers that have one in some lanes.
        self.undefined: dict[int, Array] = {}
        # Lanes in which the instruction that is executed has read a register without a value.
        self.tainted: Mask = None
        self.shared = SharedMemory(len(index), kernel.threads, launch.shared, launch.unordered)
        self.local = LocalMemory(self.lanes, kernel.local_size)
        self.barriers = np.zeros(len(index), np.int64)
        program = np.repeat(index, kernel.threads)
        self._named = {
            "%tid.x": self.thread,
            "%ctaid.x": program % grid[0],
            "%ctaid.y": program // grid[0] % grid[1],
            "%ctaid.z": program // grid[0] // grid[1],
            "%laneid": self.thread % WARP,
            "%warpid": self.thread // WARP,
        }
        uniform = {
            "%tid.y": 0,
            "%tid.z": 0,
            "%ntid.x": kernel.threads,
            "%ntid.y": 1,
            "%ntid.z": 1,
            **{f"%nctaid.{axis}": size for axis, size in zip("xyz", grid, strict=True)},
            "global_smem": 0,
            **kernel.local,
            **launch.addresses,
        }
        self._named |= {name: np.array([value]) for name, value in uniform.items()}

    # Registers.

    def _without(self, register: Register, active: Mask) -> Mask:
        """Executing lanes in which a register has no value; None if there are none."""
        if self.registers[register.number] is None:
            return np.ones(self.lanes, bool) if active is None else active
        missing = self.undefined.get(register.number) if self.undefined else None
        if missing is not None and active is not None:
            missing = missing & active
        return missing if missing is not None and missing.any() else None

    def read(self, register: Register, active: Mask) -> Array:
        """What an instruction acts on: an address, a predicate, a value that memory gets.

        Raises:
            Undefined: an executing lane has no value there.
        """
        missing = self._without(register, active)
        if missing is not None:
            raise Undefined(
                f"{register.name}, or what it was computed from, is read before it is written", np.flatnonzero(missing)
            )
        value = self.registers[register.number]
        assert value is not None
        return value

    def compute(self, register: Register, active: Mask) -> Array:
        """An operand of which an instruction makes a value: `write` leaves that undefined in the lanes where this is.

        Compilers compute in all lanes where they need the results of some. Triton 3.6 loads the sums of warps in as
        many lanes as there are warps, adds them up in all lanes, and stores the sum of the first.
        """
        missing = self._without(register, active)
        if missing is not None:
            self.tainted = missing if self.tainted is None else self.tainted | missing
        value = self.registers[register.number]
        return np.zeros(1, BITS[register.width]) if value is None else value

    def write(self, register: Register, value: Array, active: Mask) -> None:
        index, tainted = register.number, self.tainted
        value = _extended(value, register.width)
        if active is None:
            missing = tainted
        else:
            old = self.registers[index]
            missing = ~active if old is None else self.undefined.get(index) if self.undefined else None
            if old is not None and missing is not None:
                missing = missing & ~active
            if tainted is not None:
                missing = tainted & active if missing is None else missing | (tainted & active)
            value = np.where(active, value, value.dtype.type(0) if old is None else old)
        if missing is not None:
            self.undefined[index] = missing
        elif self.undefined:
            self.undefined.pop(index, None)
        self.registers[index] = value

    def named(self, name: str) -> Array:
        """A special register (`SPECIAL`), or the address of a variable."""
        return self._named[name]

    def approximated(self, exact: Array, form: Form, source: Array) -> Array:
        """An approximate function's float64 result as float32, with the error that the launch asks for."""
        if share := self.launch.approximation:
            bits = np.ascontiguousarray(source).view(np.uint32)
            # One bit of a hash of the argument (Knuth's multiplicative one).
            sign = ((bits * np.uint32(0x9E3779B1)) >> np.uint32(31)).astype(np.float64) * 2 - 1
            size = np.abs(exact)
            if form.granted in ("sin", "cos"):
                size = np.ones_like(exact)
            elif form.granted == "lg2":
                size = np.maximum(size, 1)
            error = share * arithmetic.GRANTED[form.granted] * sign * size
            exact = np.where(np.isfinite(exact), exact + error, exact)
        result = exact.astype(np.float32)
        return arithmetic.flush(result) if form.flushes else result

    # Memories.

    def load(self, memory: str, address: Array, size: int, lanes: Array) -> Array:
        self._count("load", memory, address, size, lanes)
        try:
            if memory == "shared":
                return self.shared.load(self.program[lanes], self.thread[lanes], address, size)
            if memory == "local":
                return self.local.load(lanes, address, size)
            return self.launch.memory.load(address, size, *self._who(lanes))
        except Trap as trap:
            trap.lanes = lanes[np.asarray(trap.lanes, np.int64)]
            raise

    def store(self, memory: str, address: Array, data: Array, lanes: Array) -> None:
        self._count("store", memory, address, data.shape[1], lanes)
        try:
            if memory == "shared":
                self.shared.store(self.program[lanes], self.thread[lanes], address, data)
            elif memory == "local":
                self.local.store(lanes, address, data)
            else:
                self.launch.memory.store(address, data, *self._who(lanes))
        except Trap as trap:
            trap.lanes = lanes[np.asarray(trap.lanes, np.int64)]
            raise

    def _count(self, kind: str, memory: str, address: Array, size: int, lanes: Array) -> None:
        if self.launch.counts is not None and memory == "global":
            self.launch.counts.global_access(kind, address, size, lanes)
        elif self.launch.counts is not None and memory == "shared":
            self.launch.counts.shared_access(address, size, lanes)

    def _who(self, lanes: Array) -> tuple[Array, Array]:
        """Numbers of threads in the launch, and barriers that their programs have passed."""
        program = self.program[lanes]
        return self.index[program] * PROGRAM + self.thread[lanes], self.barriers[program]

    # Warps.

    def check_warps(self, members: Array, active: Mask) -> None:
        """The lanes that execute must be those that the instruction's mask names."""
        named = (members.reshape(-1, WARP) >> np.arange(WARP, dtype=np.uint32)) & np.uint32(1) == 1
        here = np.ones((1, WARP), bool) if active is None else active.reshape(-1, WARP)
        wrong = here & ((here != named).any(1)[:, None] | (members != members.max(1)[:, None]))
        if wrong.any():
            raise PartialWarp(
                "an instruction of a warp, not executed by the lanes that it names", np.flatnonzero(wrong)
            )

    def warp_barrier(self, members: Array, active: Mask) -> None:
        self.check_warps(np.broadcast_to(members, (self.lanes,)).reshape(-1, WARP), active)
        lanes = np.arange(0, self.lanes, WARP)
        if active is not None:
            lanes = lanes[active.reshape(-1, WARP).any(1)]
        self.shared.warp_barrier(self.program[lanes], self.thread[lanes] // WARP)
