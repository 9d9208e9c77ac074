"""Triton launches on CPU tensors, executed from the PTX that they compile to."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from denim.benchmarks.machine_code.ptx.counts import Counts
from denim.benchmarks.machine_code.ptx.machine import Machine
from denim.benchmarks.machine_code.ptx.memory import Buffer
from denim.benchmarks.machine_code.ptx.parser import parse
from denim.benchmarks.machine_code.ptx.traps import UnknownInstruction

__all__ = ["Launch", "execute", "run_on_cpu"]


@dataclass(frozen=True)
class Launch:
    """One launch that has been executed."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    """Of a program."""
    ptx: str
    warp_instructions: int
    """Instructions that warps executed; one counts once, however many of the warp's lanes execute it."""
    counts: Counts | None = None
    """Accesses to memory and divergence, if `run_on_cpu` was asked to count."""


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, target: object, launches: Sequence[Launch]) -> None:
        self.target, self.launches = target, launches

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Compiled kernels are cached per device: no number that a GPU has.
        return 1000 + int(self.target.arch)  # type: ignore[attr-defined]

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """For `triton.autotune`: the fewest instructions win."""

        def instructions(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
            before = len(self.launches)
            call()
            return [float(sum(launch.warp_instructions for launch in self.launches[before:]))] * len(quantiles)

        return instructions


def _flattened(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of each argument that the compiled kernel takes: no constants, and tuples by their elements."""
    if isinstance(kind, tuple | list):
        for inner, element in zip(kind, value, strict=True):
            yield from _flattened(inner, element)
    elif kind != "constexpr":
        yield str(kind), value


def _packed(kind: str, value: Any) -> bytes:
    if kind.startswith("*"):
        return int(value.data_ptr()).to_bytes(8, "little")
    if kind in ("fp32", "fp64"):
        return np.array(value, {"fp32": np.float32, "fp64": np.float64}[kind]).tobytes()
    if kind[0] in "iu" and kind[1:].isdigit():
        bits = max(8, int(kind[1:]))
        return (int(value) % (1 << bits)).to_bytes(bits // 8, "little")
    raise UnknownInstruction(f"a kernel argument of type {kind} is not implemented")


def _buffer(value: Any, name: str) -> Buffer | None:
    """The memory of a tensor, from its first element to its last."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        found = f"a tensor on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"argument {name} is {found}; run_on_cpu takes CPU tensors")
    if value.numel() == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return Buffer(value.data_ptr(), (last + 1) * value.element_size(), f"{name} {tuple(value.shape)}")


def execute(
    compiled: Any,
    arguments: Mapping[str, Any],
    grid: Sequence[int],
    *,
    approximation: float = 0.0,
    programs: Callable[[int], Sequence[int]] | None = None,
    count: bool = False,
    unordered: bool = False,
) -> Launch:
    """Execute one launch of a kernel that Triton has compiled for an NVIDIA GPU.

    Args:
        compiled: from `triton.compile`.
        arguments: by name, without the constants.
        grid: programs in each dimension.
        approximation: as in `run_on_cpu`.
        programs: as in `run_on_cpu`.
        count: as in `run_on_cpu`.
        unordered: as in `SharedMemory`; `run_on_cpu` does not allow it.

    Raises:
        ValueError, Trap: as `run_on_cpu`.
    """
    packed: list[bytes] = []
    buffers: list[Buffer] = []
    for name, value in arguments.items():
        for kind, element in _flattened(compiled.src.signature[name], value):
            packed.append(_packed(kind, element))
            if kind.startswith("*") and (buffer := _buffer(element, name)):
                buffers.append(buffer)
    ptx = compiled.asm["ptx"]
    kernel = parse(ptx)
    # Behind the arguments come pointers to scratch memory, which kernels that need none leave alone.
    packed += [bytes(8)] * (len(kernel.parameters) - len(packed))
    machine = Machine(kernel, grid, packed, buffers, compiled.metadata.shared, approximation, count, unordered)
    machine.run(None if programs is None else programs(int(np.prod(grid))))
    return Launch(kernel.name, tuple(grid), kernel.threads, ptx, machine.warp_instructions, machine.counts)


@contextlib.contextmanager
def run_on_cpu(
    capability: int = 90,
    *,
    approximation: float = 0.0,
    programs: Callable[[int], Sequence[int]] | None = None,
    count: bool = False,
) -> Iterator[list[Launch]]:
    """Within the block, Triton kernels are compiled for an NVIDIA GPU and executed on CPU tensors, instruction by
    instruction, with every access checked.

    No GPU and no driver is needed: Triton brings its compiler. ::

        @triton.jit
        def scale(x, out, factor, n, BLOCK: tl.constexpr):
            i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            tl.store(out + i, tl.load(x + i, mask=i < n) * factor, mask=i < n)

        x = torch.randn(1000)
        out = torch.empty_like(x)
        with run_on_cpu(capability=90) as launches:
            scale[(4,)](x, out, 2.0, 1000, BLOCK=256)
        assert torch.equal(out, 2 * x)
        print(launches[0].warp_instructions)

    A kernel may access its tensor arguments and nothing else: an access beyond the first or the last element of each,
    even within the same storage, is a trap. `traps` lists the others.

    Not for threads: Triton's driver and its launches are replaced for the whole process while the block runs.

    Args:
        capability: compute capability, 10 times major plus minor: 80, 90, 100, ...
        approximation: how wrong approximate functions (sine, base-2 logarithm, ...) are, as a share of the largest
            error that PTX grants them.
        programs: takes the number of programs of a launch, and says which of them run; by default all.
        count: whether every launch also counts its accesses to memory (`Launch.counts`), which takes longer.

    Yields:
        The launches, in order, as they are executed.

    Raises:
        ValueError: Triton interprets (TRITON_INTERPRET=1) instead of compiling, or an argument is not on the CPU.
        Trap: see `traps`; all name the kernel, the line of its source, the instruction, the program and the thread.

    Source: "PTX ISA" (NVIDIA), version 8.8 and before.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise ValueError("Triton interprets kernels (TRITON_INTERPRET=1); unset it, before Triton is imported")
    launches: list[Launch] = []
    compile_or_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = compile_or_run(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return compiled
        given = {name: value for name, value in kwargs.items() if name in self.arg_names}
        bound = inspect.signature(self.fn).bind(*args, **given)
        bound.apply_defaults()
        sizes = grid(bound.arguments) if callable(grid) else grid
        options: dict[str, Any] = {"approximation": approximation, "programs": programs, "count": count}
        launches.append(execute(compiled, bound.arguments, sizes, **options))
        return compiled

    before = driver._active
    driver.set_active(_Driver(GPUTarget("cuda", capability, 32), launches))
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = compile_or_run
        driver._active = before
