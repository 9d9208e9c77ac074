"""Cases executed: what the launchers compile, run on the CPU and held against the definition in float64."""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from denim.benchmarks.case import BACKWARD, FORWARD, Case, ImageCase, expected, stored_by_interpreter
from denim.benchmarks.cases import CASES
from denim.benchmarks.machine_code.cases import launch
from denim.benchmarks.machine_code.ptx.counts import Counts
from denim.benchmarks.machine_code.ptx.launch import Launch, run_on_cpu
from denim.benchmarks.machine_code.ptx.traps import Trap
from denim.kernels.dispatch import GPU

__all__ = ["Agreement", "Job", "Outcome", "interpret_case", "resized", "run_case", "run_jobs"]

# Elements in front of and behind an output, which kernels must leave alone: more than the largest program stores.
GUARD = 1 << 14


class Agreement(NamedTuple):
    """How a result compares with the definition in float64.

    A value must lie between the roundings, to the result's dtype, of the least and the largest value that float32
    arithmetic may give. Where these two are the same number, as for most values of 16 bits, that is all bits of it.
    """

    result: str
    values: int
    outside: int
    """Values that lie elsewhere or were not written."""
    exact: float
    """Share of the values other than zero whose bits are all determined."""


class Outcome(NamedTuple):
    """What came of a case."""

    agreements: tuple[Agreement, ...]
    warp_instructions: int
    failure: str
    """A trap or an error; empty if there was none."""
    counts: tuple[tuple[str, Counts], ...] = ()
    """Of each launch the kernel and what was counted, if that was asked for."""

    @property
    def holds(self) -> bool:
        return not self.failure and not any(agreement.outside for agreement in self.agreements)


class Job(NamedTuple):
    """A case to be executed."""

    name: str
    """Operation and name of a case of `denim.benchmarks.cases`."""
    capability: int
    """Compute capability of the GPU to compile for, as 90."""
    as_built: bool = False
    """The passes that are built ahead of time, compiled as for real work (`resized`); else all, in the case's size."""
    approximation: float = 0.0
    """As in `run_on_cpu`."""


def resized(case: Case) -> Case:
    """The case in a small size that compiles to the same code as real work: its last programs are partly empty.

    Kernels are compiled anew where sizes are multiples of 16 elements, which those of real work are, and these.
    """
    side = {14: 56, 32: 96}.get(case.patch, 48) if isinstance(case, ImageCase) else 48
    return case.resized(2, side)


def _untouched(memory: Tensor) -> Tensor:
    return memory.isnan() if memory.is_floating_point() else memory == torch.iinfo(memory.dtype).min


def _guarded(made: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Stands for `torch.empty`: NaN (of integers the lowest), with more of it around, which is remembered."""

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        fill = math.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        memory = torch.full((size.numel() + 2 * GUARD,), fill, dtype=dtype)
        made.append((memory[:GUARD], memory[GUARD + size.numel() :]))
        return memory[GUARD : GUARD + size.numel()].view(size)

    return empty


def _compare(
    name: str,
    got: Tensor,
    exact: Tensor,
    error: Tensor | float,
    store: Callable[[Tensor, torch.dtype], Tensor] = Tensor.to,
) -> Agreement:
    lowest, highest = (store(bound, got.dtype) for bound in (exact - error, exact + error))
    inside = ((lowest <= got) & (got <= highest)) | (got.isnan() & exact.isnan())
    determined = (lowest == highest)[exact != 0].double().mean()
    return Agreement(name, got.numel(), int((~inside).sum()), float(determined))


def _results(
    case: Case, names: Sequence[str], parts: Sequence[str], inputs: dict[str, Tensor], upstream: Tensor | None, gpu: GPU
) -> Iterator[Any]:
    """(name, result) of the passes; the names are those of the result and of the gradients."""
    if FORWARD in parts or "sum" in parts:
        yield names[0], launch(case, FORWARD, case.arguments(inputs), gpu)
    if BACKWARD in parts and upstream is not None:
        gradients = launch(case, BACKWARD, case.backward_arguments(inputs, upstream), gpu)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        yield from zip(names[1:], gradients, strict=False)


def run_case(
    case: Case, parts: Sequence[str], capability: int, *, approximation: float = 0.0, count: bool = False
) -> Outcome:
    """Execute passes of a case on the CPU, and compare what they store with the definition in float64.

    Args:
        case: of `denim.benchmarks.cases`, in its own size or `resized`.
        parts: passes of `case.triton_kernels`.
        capability: compute capability of the GPU to compile for, as 90.
        approximation: as in `run_on_cpu`.
        count: as in `run_on_cpu`.
    """
    machine = run_on_cpu(capability, approximation=approximation, count=count)
    return _run_case(case, parts, GPU("ptx", 32), machine, Tensor.to)


def interpret_case(case: Case, parts: Sequence[str]) -> Outcome:
    """As `run_case`, in Triton's interpreter: this process has imported Triton with TRITON_INTERPRET=1."""
    return _run_case(case, parts, GPU("plain", 32), contextlib.nullcontext([]), stored_by_interpreter)


def _run_case(
    case: Case,
    parts: Sequence[str],
    gpu: GPU,
    machine: contextlib.AbstractContextManager[list[Launch]],
    store: Callable[[Tensor, torch.dtype], Tensor],
) -> Outcome:
    inputs = case.inputs("cpu")
    reference = case.fused(**inputs)
    upstream = case.upstream(inputs, reference) if case.leaves else None
    exact, errors = expected(case, inputs, upstream)
    if case.bitwise:
        exact[0], errors[0] = reference, 0.0
    names = ["result", *(f"gradient of {leaf}" for leaf in case.leaves)]
    definition = {name: (value, error) for name, value, error in zip(names, exact, errors, strict=False)}
    made: list[tuple[Tensor, Tensor]] = []
    launches: list[Launch] = []
    agreements: list[Agreement] = []
    failure = ""
    try:
        allocations = mock.patch.object(torch, "empty", _guarded(made))
        with machine as launches, allocations:
            results = list(_results(case, names, parts, inputs, upstream, gpu))
        agreements = [_compare(name, got, *definition[name], store) for name, got in results]
    except Trap as trap:
        failure = f"{type(trap).__name__}: {trap}"
    if not all(bool(_untouched(guard).all()) for guards in made for guard in guards):
        failure = failure or "a kernel wrote beside its output"
    counts = tuple((launch.kernel, launch.counts) for launch in launches if launch.counts is not None)
    return Outcome(tuple(agreements), sum(launch.warp_instructions for launch in launches), failure, counts)


def _run(job: Job) -> Outcome:
    torch.set_num_threads(1)
    (case,) = (case for case in CASES if f"{case.operation}, {case.name}" == job.name)
    given = (resized(case), case.built) if job.as_built else (case, tuple(case.triton_kernels))
    return run_case(*given, job.capability, approximation=job.approximation)


def run_jobs(jobs: Sequence[Job], workers: int | None = None) -> dict[Job, Outcome]:
    """`run_case` for many jobs, in processes of their own.

    Args:
        jobs: those that differ in the approximation alone compile once if they stand apart.
        workers: processes; by default as many as there are processors.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), context) as pool:
        return dict(zip(jobs, pool.map(_run, jobs), strict=True))
