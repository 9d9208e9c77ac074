"""Build cases executed: launchers on tensors of a few images, their results held against the operators in float64."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from denim.benchmarks.machine_code import cases
from denim.benchmarks.machine_code.ptx.launch import Launch, run_on_cpu
from denim.benchmarks.machine_code.ptx.traps import Trap
from denim.kernels import attack_step_triton, decode_patches_triton, noise_patchify_triton, patch_loss_triton

__all__ = ["Agreement", "Outcome", "run_case", "run_cases"]

BATCH = 2
# Elements in front of and behind an output, which kernels must leave alone.
GUARD = 512
# float32 roundings: half the distance from 1 to the next number.
ROUNDING = 2.0**-24


class Agreement(NamedTuple):
    """How a result compares with the operator in float64.

    A value must lie between the roundings, to the result's dtype, of the least and the largest value that float32
    arithmetic may give. Where these two are the same number, as for most values of 16 bits, that is all bits of it.
    """

    result: str
    values: int
    outside: int
    """Values that lie elsewhere or were not written."""
    exact: float
    """Share of the values other than zero whose bits are all determined."""

    @property
    def holds(self) -> bool:
        return self.outside == 0


class Outcome(NamedTuple):
    """What came of a case."""

    agreements: tuple[Agreement, ...]
    warp_instructions: int
    failure: str
    """A trap or an error; empty if there was none."""

    @property
    def holds(self) -> bool:
        return not self.failure and all(agreement.holds for agreement in self.agreements)


def _side(case: cases.Case) -> int:
    """Of an image whose last program is partly empty.

    Kernels are specialised as in the sizes of real work: those are multiples of 16 elements, as here.
    """
    configuration = case.configuration
    return 56 if "patch 14" in configuration else 96 if "patch 32" in configuration else 48


def _real(generator: torch.Generator) -> Callable[..., Tensor]:
    """Stands for `cases._empty`: random values instead of none."""

    def make(
        *shape: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        if dtype == torch.uint8:
            values = torch.randint(0, 256, shape, generator=generator, dtype=dtype)
        elif dtype == torch.bool:
            values = torch.rand(shape, generator=generator) < 0.6
        elif dtype == torch.int64:
            values = torch.randint(-(2**62), 2**62, shape, generator=generator)
        else:
            values = (torch.randn(shape, generator=generator) * 0.5 + 0.5).to(dtype)
        return values.contiguous(memory_format=layout) if layout == torch.channels_last else values

    return make


def _guarded(made: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Stands for `torch.empty`: NaN, with more NaN around it that is remembered."""

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        memory = torch.full((size.numel() + 2 * GUARD,), float("nan"), dtype=dtype)
        made.append((memory[:GUARD], memory[GUARD + size.numel() :]))
        return memory[GUARD : GUARD + size.numel()].view(size)

    return empty


def _wide(argument: Any) -> Any:
    """An operator's argument for float64: bytes become pixels (B, C, H, W)."""
    if isinstance(argument, torch.dtype):
        return torch.float64
    if isinstance(argument, Tensor) and argument.dtype == torch.uint8:
        return argument.permute(0, 3, 1, 2).double() / 255
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument


# What each result may be off by before it is rounded to its dtype, from the launcher's arguments and the exact result.


def _patches_allowed(arguments: tuple[Any, ...], exact: Tensor) -> Tensor:
    """The noise contract: 1e-5 per normal number; and roundings of the pixel, the product and the sum."""
    sigma, std = float(arguments[1].max()), float(min(arguments[5]))
    return 1e-5 * sigma / (255 * std) + 6 * ROUNDING * (exact.abs() + 2 / std)


def _pixels_allowed(arguments: tuple[Any, ...], exact: Tensor) -> float:
    """A rounding for every summand, each of a sum of at most as many of the largest; for 1 / std; for the product."""
    grad, std = arguments[0], min(arguments[4])
    count, largest = grad.shape[:-3].numel(), float(grad.abs().max())
    return float((count + 2) * count * ROUNDING * largest / std)


def _relative(share: float) -> Callable[[tuple[Any, ...], Tensor], float]:
    """A share of the largest value: sums over a patch, and the approximate root and division in front of them."""
    return lambda arguments, exact: share * float(exact.abs().max())


def _decoded_allowed(arguments: tuple[Any, ...], exact: Tensor) -> float:
    """Pixels in [0, 1] after statistics over a patch; a classifier's normalisation divides by its std."""
    return float(2e-5 / min(arguments[10], default=1.0))


_Allowed = Callable[[tuple[Any, ...], Tensor], Tensor | float]


class _Launcher(NamedTuple):
    module: Any
    name: str
    operator: Any
    results: dict[str, _Allowed | None]
    """What each may be off by; None: the operator promises its own bits, in the launcher's dtypes."""
    jumps: float = 0.0
    """Share of values that may be off by more: a gradient jumps where a pixel is at the edge of being clamped."""


_OPERATORS = torch.ops.denim
_GRADIENTS: dict[str, _Allowed | None] = {
    "gradient of the prediction": _relative(1e-5),
    "gradient of the source": _relative(1e-4),
}
_LAUNCHERS = (
    _Launcher(noise_patchify_triton, "launch", _OPERATORS.noise_patchify, {"patches": _patches_allowed}),
    _Launcher(
        noise_patchify_triton, "launch_backward", _OPERATORS.noise_patchify_backward, {"pixels": _pixels_allowed}
    ),
    _Launcher(patch_loss_triton, "launch", _OPERATORS.patch_loss, {"loss": _relative(1e-5)}),
    _Launcher(patch_loss_triton, "launch_backward", _OPERATORS.patch_loss_backward, {"gradient": _relative(1e-5)}),
    _Launcher(decode_patches_triton, "launch", _OPERATORS.decode_patches, {"decoded": _decoded_allowed}),
    _Launcher(decode_patches_triton, "launch_backward", _OPERATORS.decode_patches_backward, _GRADIENTS, 2e-5),
    _Launcher(attack_step_triton, "launch", _OPERATORS.attack_step, {"step": None}),
    _Launcher(attack_step_triton, "launch_start", _OPERATORS.attack_start, {"start": None}),
)


def _sized(launcher: _Launcher, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random numbers to noise levels and step sizes as they occur."""
    changed = list(arguments)
    if launcher.name == "launch" and launcher.module is noise_patchify_triton:
        changed[1] = arguments[1].abs() * 150
    if launcher.module is decode_patches_triton:
        place = 2 if launcher.name == "launch" else 3
        changed[place] = None if arguments[place] is None else arguments[place].abs() * 100
    if launcher.module is attack_step_triton:
        changed[3:] = [size * 0.1 for size in arguments[3:4]] + [size.abs() * 0.1 for size in arguments[4:]]
        if launcher.name == "launch_start":
            changed[2] = arguments[2].abs() * 0.1
    return tuple(changed)


def _compare(launcher: _Launcher, arguments: tuple[Any, ...], results: Any) -> Iterator[Agreement]:
    promised = None in launcher.results.values()
    exacts = launcher.operator(*(arguments if promised else map(_wide, arguments)))
    pairs = [(results, exacts)] if isinstance(results, Tensor) else zip(results, exacts, strict=True)
    for (name, allow), (result, exact) in zip(launcher.results.items(), pairs, strict=True):
        if result.numel() == 0:
            continue
        allowed = 0.0 if allow is None else allow(arguments, exact)
        lowest, highest = (bound.to(result.dtype) for bound in (exact - allowed, exact + allowed))
        outside = int((~((lowest <= result) & (result <= highest))).sum())
        outside = max(0, outside - int(launcher.jumps * result.numel()))
        yield Agreement(name, result.numel(), outside, float((lowest == highest)[exact != 0].double().mean()))


@contextlib.contextmanager
def _replaced(case: cases.Case, found: list[Agreement], made: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """The case's launchers on random tensors, compared."""
    generator = torch.Generator().manual_seed(0)

    def checked(launcher: _Launcher, launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            arguments = _sized(launcher, arguments)
            with mock.patch.object(torch, "empty", _guarded(made)):
                results = launch(*arguments, **options)
            found.extend(_compare(launcher, arguments, results))
            return results

        return run

    real = _real(generator)
    with contextlib.ExitStack() as stack:
        for launcher in _LAUNCHERS:
            launch = checked(launcher, getattr(launcher.module, launcher.name))
            stack.enter_context(mock.patch.object(launcher.module, launcher.name, launch))
        for name, value in (("_empty", real), ("BATCH", BATCH), ("SIDE", _side(case))):
            stack.enter_context(mock.patch.object(cases, name, value))
        like = mock.patch.object(torch, "empty_like", lambda tensor: real(*tensor.shape, dtype=tensor.dtype))
        stack.enter_context(like)
        yield


def run_case(case: cases.Case, capability: int, *, approximation: float = 0.0) -> Outcome:
    """Execute a build case on the CPU, and compare what it stores with the operators in float64.

    Args:
        case: of `cases.CASES`.
        capability: compute capability of the GPU to compile for, as 90.
        approximation: as in `run_on_cpu`.
    """
    found: list[Agreement] = []
    made: list[tuple[Tensor, Tensor]] = []
    launches: list[Launch] = []
    failure = ""
    try:
        with _replaced(case, found, made), run_on_cpu(capability, approximation=approximation) as launches:
            case.launch(GPUTarget("cuda", capability, 32))
    except Trap as trap:
        failure = f"{type(trap).__name__}: {trap}"
    if not all(bool(guard.isnan().all()) for guards in made for guard in guards):
        failure = failure or "a kernel wrote beside its output"
    return Outcome(tuple(found), sum(launch.warp_instructions for launch in launches), failure)


def _job(name: str, capability: int, approximation: float) -> Outcome:
    torch.set_num_threads(1)
    return run_case(next(case for case in cases.CASES if case.name == name), capability, approximation=approximation)


def run_cases(
    jobs: Sequence[tuple[str, int, float]], workers: int | None = None
) -> dict[tuple[str, int, float], Outcome]:
    """`run_case` for many jobs, in processes of their own.

    Args:
        jobs: name of a case, capability and approximation, as for `run_case`. Those that share the first two compile
            once if they stand apart.
        workers: processes; by default as many as there are processors.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), context) as pool:
        return dict(zip(jobs, pool.map(_job, *zip(*jobs, strict=True)), strict=True))
