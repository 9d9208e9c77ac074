"""What is built ahead of time: the kernels of the passes that a row of `denim.benchmarks.cases` calls `built`.

A build calls the operation's own launcher on tensors without memory (device "meta") in the sizes of real work, so a
kernel is specialised as on the GPU, and the grid tells how many programs an image takes, tails included. The rows are
chosen so that every branch that is decided when a kernel is built is built: not the product of all options.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from denim.benchmarks import cases
from denim.benchmarks.case import BACKWARD, FORWARD, SIDE, Case
from denim.benchmarks.machine_code.builds import CONSUMER
from denim.kernels.dispatch import GPU, launcher

__all__ = ["BATCH", "BUILDS", "Build", "Work", "launch"]

BATCH = 64


class Work(NamedTuple):
    """What one launch does: the sizes that its machine instructions and bytes are divided by."""

    images: int
    elements: int
    """Output elements; of a loss, elements of the prediction."""
    moved: int
    """Bytes that the kernel reads and writes, a tensor counted as often as the kernel goes through it."""
    minimum: int
    """Bytes when every input is read once and every output written once."""
    written: int
    """Bytes of the outputs."""
    trips: tuple[int, ...] = ()
    """How often the kernel's loops run, outermost first."""
    stores: tuple[str, ...] = ()
    """Dtypes of the outputs."""


@dataclass(frozen=True)
class Build:
    """One kernel in one configuration: a pass of a case."""

    case: Case
    part: str

    @property
    def operation(self) -> str:
        """Operation and pass, where an operation has several."""
        return f"{self.case.operation} {self.part}" if len(self.case.triton_kernels) > 1 else self.case.operation

    @property
    def name(self) -> str:
        """What `--only` and the budgets call it."""
        return f"{self.operation}, {self.case.name}"

    def built_for(self, target: str) -> bool:
        """Whether the report has the build for a target.

        Consumer GPUs run the code of the others with fewer warps, so the first case of every pass stands for the rest.
        """
        return target not in CONSUMER or self == FIRST[self.operation]

    @property
    def draws_numbers(self) -> str:
        """ "normal" or "uniform", if the kernel draws random numbers."""
        return self.case.draws_numbers if self.part == FORWARD else ""

    @property
    def module(self) -> ModuleType:
        """The module of the kernels, which imports Triton."""
        _, launch = launcher(_operator(self.case, self.part))
        return importlib.import_module(launch.__module__)

    @property
    def kernel(self) -> Any:
        """The Triton kernel."""
        return getattr(self.module, self.case.triton_kernels[self.part])

    @property
    def kernels(self) -> list[Any]:
        """All kernels that the launcher starts, in its order."""
        return [getattr(self.module, name) for name in self.case.launched(self.part == BACKWARD)]

    def arguments(self) -> tuple[Case, tuple[Any, ...]]:
        """The case in the sizes of real work, and the launcher's arguments without memory."""
        case = self.case.resized(BATCH, SIDE)
        inputs = case.inputs("meta")
        arguments = case.arguments(inputs)
        if self.part == BACKWARD:
            result = getattr(torch.ops.denim, case.operation)(*arguments)
            arguments = case.backward_arguments(inputs, case.upstream(inputs, result))
        return case, arguments

    def launch(self, target: GPUTarget) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Call the launcher without memory: the tensors that it reads, and those that it returns."""
        case, arguments = self.arguments()
        instructions = "ptx" if target.backend == "cuda" else "gcn"
        outputs = launch(case, self.part, arguments, GPU(instructions, target.warp_size))
        given = tuple(argument for argument in arguments if isinstance(argument, Tensor))
        return given, outputs if isinstance(outputs, tuple) else (outputs,)

    def work(self, given: Sequence[Tensor], outputs: Sequence[Tensor], programs: Sequence[int]) -> Work:
        """What the kernel does.

        Args:
            given: tensors that the launcher reads.
            outputs: that it returns.
            programs: of every kernel that it starts.
        """
        case = self.case.resized(BATCH, SIDE)
        given, outputs = case.kernel_tensors(self.part, given, outputs)
        written, elements = sum(output.nbytes for output in outputs), sum(output.numel() for output in outputs)
        trips, read = case.loops(self.part), sum(tensor.nbytes for tensor in given)
        again = 0
        if self.part not in (FORWARD, BACKWARD):
            # It sums up a float32 of each program of the kernel before.
            elements, read = programs[0], 4 * programs[0]
            trips = (math.ceil(elements / self.module.PARTIALS),)
        elif elements == 1:
            # A float32 of each program, which the next kernel sums up.
            elements, written = given[0].numel(), 4 * programs[0]
        else:
            inputs = case.inputs("meta")
            again = sum(
                (times - 1) * inputs[name].nbytes
                for name, times in case.passes_over(self.part).items()
                if name in inputs
            )
        minimum = read + written
        stores = tuple({str(output.dtype).removeprefix("torch.") for output in outputs if output.numel()})
        return Work(BATCH, elements, minimum + again, minimum, written, trips, stores)


def _operator(case: Case, part: str) -> str:
    return f"{case.operation}_backward" if part == BACKWARD else case.operation


def launch(case: Case, part: str, arguments: Sequence[Any], gpu: GPU, **more: Any) -> Any:
    """Call the launcher of a pass as the operator does on a GPU.

    Args:
        case: of `denim.benchmarks.cases`.
        part: a pass, key of `case.triton_kernels`.
        arguments: of the operator, from `case.arguments` or `case.backward_arguments`.
        gpu: what the kernels are built for.
        more: options of the launcher.

    Returns:
        What the launcher returns: a tensor or several.
    """
    _, run = launcher(_operator(case, part))
    options: dict[str, Any] = {}
    if "configurations" in inspect.signature(run).parameters:
        every = importlib.import_module(run.__module__).CONFIGURATIONS
        by_threads = {item if isinstance(item, int) else item[0]: item for item in every}
        threads = case.threads or next(iter(by_threads))
        options["configurations"] = (by_threads.get(threads, threads),)
    return run(*arguments, gpu=gpu, **options, **more)


BUILDS: tuple[Build, ...] = tuple(Build(case, part) for case in cases.CASES for part in case.built)
FIRST = {one.operation: one for one in reversed(BUILDS)}
