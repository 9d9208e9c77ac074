"""`denim bench kernels`: the fused operations against what a user would have otherwise, on the device that is here.

Every case is checked before it is timed: the fused result, gradients included, against the chain of PyTorch operations
in float64 on the same noise. What is compared: the chain run eagerly, the chain under `torch.compile`, on a GPU a
kernel written naively, and a copy of as many bytes as the operation must move at least.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from denim.benchmarks import baselines
from denim.kernels.attack_step import attack_step
from denim.kernels.decode_patches import decode_patches
from denim.kernels.noise import normal_noise
from denim.kernels.noise_patchify import noise_patchify
from denim.kernels.patch_loss import patch_loss

__all__ = [
    "CASES",
    "Case",
    "Providers",
    "Record",
    "WrongResultError",
    "environment",
    "measure",
    "peak_memory",
    "run",
    "select",
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Name: side of the image and of a patch.
GEOMETRIES = {"224/16": (224, 16), "32/4": (32, 4)}
# Images of 224/16. Of 32/4 there are 16 times as many, about a third of the pixels.
BATCH = {"cpu": 16, "cuda": 256}
SMALL_IMAGES = 16
# Larger than any L2, so that a GPU finds nothing of the last call there.
FLUSH = 2**28


class WrongResultError(RuntimeError):
    """A fused operation disagrees with its chain, so no time is given for it."""


@dataclass(frozen=True)
class Providers:
    """One case, ready to run: every provider returns the result and, behind it, the gradients."""

    fused: Callable[[], tuple[Tensor, ...]]
    chain: Callable[[], tuple[Tensor, ...]]
    """As a user would run it, with noise of its own."""
    compiled: Callable[[], tuple[Tensor, ...]]
    """Compiles when it is first called."""
    expected: Callable[[], tuple[Tensor, ...]]
    """The chain in float64, with the noise of the fused operation."""
    batch: int
    minimum: int
    """Bytes when each pass reads its inputs once and writes its outputs once."""
    naive: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """One operation on one kind of input."""

    operation: str
    geometry: str
    what: str
    prepare: Callable[[int, int, int, torch.device], Providers]
    """From batch, side, patch size and device."""

    @property
    def name(self) -> str:
        """What `only` selects by."""
        return f"{self.operation}, {self.geometry}, {self.what}"


@dataclass(frozen=True)
class Record:
    """What one case gave. `ratios` are times over that of the fused operation: above 1 it is the faster one."""

    case: str
    operation: str
    device: str
    batch: int
    error: float
    """Largest error of the fused result, in units of what is allowed."""
    minimum_bytes: int
    best_seconds: dict[str, float]
    median_seconds: dict[str, float]
    gigabytes_per_second: float
    """Minimum bytes in the best time."""
    copy_share: float
    """Best time of a copy of as many bytes, over that of the fused operation."""
    ratios: dict[str, float]
    peak_bytes: dict[str, int]
    """Allocated at once during a call, outputs included."""
    absent: dict[str, str] = field(default_factory=dict)
    """Providers that did not run, and why."""


def _passes(
    function: Callable[..., Tensor], given: Mapping[str, Tensor], wrt: Sequence[str], upstream: Tensor | None
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and backward to `wrt` where there are any."""
    leaves = {name: value.detach().requires_grad_(name in wrt) for name, value in given.items()}
    inputs = [leaves[name] for name in wrt]

    def call() -> tuple[Tensor, ...]:
        result = function(**leaves)
        return (result, *torch.autograd.grad(result, inputs, upstream)) if wrt else (result,)

    return call


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _providers(
    fused: Callable[..., Tensor],
    chain: Callable[..., Tensor],
    given: Mapping[str, Tensor],
    *,
    wrt: Sequence[str] = (),
    reread: Sequence[str] = (),
    exact: Callable[..., Tensor] | None = None,
    naive: Callable[[], object] | None = None,
) -> Providers:
    """Providers that share their inputs.

    Args:
        fused: of the tensors in `given`.
        chain: likewise.
        given: the tensors.
        wrt: of which gradients are taken.
        reread: which the backward pass cannot do without.
        exact: the chain on float64 tensors and the noise of the fused operation; by default `chain`.
        naive: the naive kernel.
    """
    with torch.no_grad():
        result = fused(**given)
    generator = torch.Generator(result.device).manual_seed(1)
    upstream = None
    minimum = sum(value.nbytes for value in given.values()) + result.nbytes
    if wrt:
        upstream = torch.randn(result.shape, generator=generator, device=result.device).to(result.dtype)
        minimum += upstream.nbytes + sum(given[name].nbytes for name in (*reread, *wrt))
    doubled = {name: _double(value) for name, value in given.items()}
    # Static shapes and no guard that could let a graph break pass for a compiled chain.
    compiled = torch.compile(chain, fullgraph=True, dynamic=False)
    return Providers(
        fused=_passes(fused, given, wrt, upstream),
        chain=_passes(chain, given, wrt, upstream),
        compiled=_passes(compiled, given, wrt, upstream),
        expected=_passes(exact or chain, doubled, wrt, None if upstream is None else _double(upstream)),
        batch=next(iter(given.values())).shape[0],
        minimum=minimum,
        naive=naive,
    )


def _statistics(like: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {"mean": torch.tensor(MEAN, dtype=dtype, device=like), "std": torch.tensor(STD, dtype=dtype, device=like)}


def _images(batch: int, side: int, device: torch.device, pixels: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(0, 256, (batch, side, side, 3), generator=generator, dtype=torch.uint8, device=device)
    return images if pixels == "uint8" else (images / 255).permute(0, 3, 1, 2).contiguous()


def _prediction(batch: int, side: int, patch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(2)
    shape = (batch, (side // patch) ** 2, patch * patch * 3)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _noise(
    batch: int,
    side: int,
    patch: int,
    device: torch.device,
    *,
    pixels: str = "uint8",
    dtype: torch.dtype = torch.float32,
    levels: tuple[int, ...] = (),
    draws: tuple[int, ...] = (),
    backward: bool = False,
) -> Providers:
    # A sweep holds as much as the other cases.
    batch = max(1, batch // math.prod((*levels, *draws)))
    generator = torch.Generator(device).manual_seed(3)
    seeds = torch.randint(-(2**63), 2**63 - 1, (*draws, batch), generator=generator, device=device)
    images = _images(batch, side, device, pixels)
    sigma = torch.rand((*levels, batch), generator=generator, device=device) * 150
    flat, exact_flat = _statistics(device), _statistics(device, torch.float64)

    def fused(images: Tensor, sigma: Tensor) -> Tensor:
        return noise_patchify(images, sigma, seeds, patch_size=patch, mean=MEAN, std=STD, dtype=dtype)

    def chain(images: Tensor, sigma: Tensor) -> Tensor:
        return baselines.noisy_patches(images, sigma, **flat, patch_size=patch, draws=draws, dtype=dtype)

    def exact(images: Tensor, sigma: Tensor) -> Tensor:
        noise = normal_noise(seeds, (side, side, 3)).movedim(-1, -3).double()
        return baselines.noisy_patches(
            images, sigma, **exact_flat, patch_size=patch, noise=noise, draws=draws, dtype=torch.float64
        )

    def naive() -> None:
        from denim.benchmarks import baselines_triton

        for level, seed in itertools.product(sigma.reshape(-1, batch), range(math.prod(draws))):
            baselines_triton.launch(images, level, seed, patch, flat["mean"], flat["std"], dtype)

    return _providers(
        fused,
        chain,
        {"images": images, "sigma": sigma},
        wrt=("images",) if backward else (),
        exact=exact,
        naive=None if backward else naive,
    )


def _loss(
    batch: int,
    side: int,
    patch: int,
    device: torch.device,
    *,
    pixels: str = "uint8",
    dtype: torch.dtype = torch.float32,
    norm_pix: bool = True,
    masked: bool = False,
    backward: bool = False,
) -> Providers:
    prediction, images = _prediction(batch, side, patch, device, dtype), _images(batch, side, device, pixels)
    given = {"prediction": prediction, "images": images}
    if masked:
        generator = torch.Generator(device).manual_seed(4)
        given["mask"] = torch.rand(prediction.shape[:2], generator=generator, device=device) < 0.75
    flat, exact_flat = _statistics(device), _statistics(device, torch.float64)
    return _providers(
        functools.partial(patch_loss, patch_size=patch, mean=MEAN, std=STD, norm_pix=norm_pix),
        functools.partial(baselines.reconstruction_loss, **flat, patch_size=patch, norm_pix=norm_pix),
        given,
        wrt=("prediction",) if backward else (),
        reread=tuple(given),
        exact=functools.partial(baselines.reconstruction_loss, **exact_flat, patch_size=patch, norm_pix=norm_pix),
    )


def _decode(
    batch: int,
    side: int,
    patch: int,
    device: torch.device,
    *,
    statistics: str | None = None,
    pixels: str = "uint8",
    dtype: torch.dtype = torch.float32,
    normalize: bool = False,
    backward: bool = False,
) -> Providers:
    prediction = _prediction(batch, side, patch, device, dtype)
    options: dict[str, Any] = {"img_size": (side, side), "patch_size": patch, "statistics": statistics}
    flat, exact_flat = _statistics(device), _statistics(device, torch.float64)
    source = {}
    if statistics == "input":
        source = {"source": _images(batch, side, device, pixels)}
    if statistics == "noisy":
        generator = torch.Generator(device).manual_seed(5)
        noise = torch.randn(prediction.shape, generator=generator, device=device) * 1.5
        source = {"source": noise.to(dtype), "sigma": torch.rand(batch, generator=generator, device=device) * 150}
    # Where a pixel lies on the edge of the clamp, rounding decides whether it has a gradient.
    doubled: dict[str, Any] = {name: _double(value) for name, value in source.items()}
    for _ in range(2):
        exact = baselines.unclamped_pixels(prediction.double(), **exact_flat, **options, **doubled)
        edge = ((exact - 0.5).abs() - 0.5).abs() < 1e-4
        prediction = torch.where(baselines.patchify_planes(edge, patch), prediction + 0.25, prediction)
    given = {"prediction": prediction, **source}
    wrt = ["prediction"] if backward else []
    if backward and "source" in source and source["source"].is_floating_point():
        wrt.append("source")
    pairs: dict[str, dict[str, Any]] = {kind: {} for kind in ("fused", "chain", "exact")}
    if normalize:
        pairs = {
            "fused": {"normalize": (MEAN, STD)},
            "chain": {"normalize": (flat["mean"], flat["std"])},
            "exact": {"normalize": (exact_flat["mean"], exact_flat["std"])},
        }
    return _providers(
        functools.partial(decode_patches, mean=MEAN, std=STD, **options, **pairs["fused"]),
        functools.partial(baselines.decoded_pixels, **flat, **options, **pairs["chain"]),
        given,
        wrt=wrt,
        reread=tuple(given),
        exact=functools.partial(baselines.decoded_pixels, **exact_flat, **options, **pairs["exact"]),
    )


def _attack(
    batch: int, side: int, patch: int, device: torch.device, *, dtype: torch.dtype = torch.float32
) -> Providers:
    generator = torch.Generator(device).manual_seed(6)
    origin = _images(batch, side, device, "float32").to(dtype)
    offset = torch.rand(origin.shape, generator=generator, device=device) * 0.1 - 0.05
    given = {
        "pixels": (origin + offset).clamp(0, 1).to(dtype),
        "origin": origin,
        "gradient": torch.randn(origin.shape, generator=generator, device=device).to(dtype),
        "step_size": torch.rand(batch, generator=generator, device=device) * 0.02,
        "epsilon": torch.rand(batch, generator=generator, device=device) * 0.06,
    }
    return _providers(attack_step, baselines.linf_step, given)


FORWARD, BOTH = "forward", "forward + backward"
BF16 = torch.bfloat16
PREPARE: dict[str, Callable[..., Providers]] = {
    "attack_step": _attack,
    "decode_patches": _decode,
    "noise_patchify": _noise,
    "patch_loss": _loss,
}
# Operation, what of it, options of its `PREPARE`.
KINDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("attack_step", "float32", {}),
    ("attack_step", "bfloat16", {"dtype": BF16}),
    *(
        ("decode_patches", f"{what}, {passes}", {**options, "backward": passes == BOTH})
        for passes in (FORWARD, BOTH)
        for what, options in (
            ("raw, float32", {}),
            ("input, float32, float32", {"statistics": "input", "pixels": "float32"}),
            ("input, uint8, bfloat16", {"statistics": "input", "dtype": BF16}),
            ("noisy, float32", {"statistics": "noisy"}),
        )
    ),
    (
        "decode_patches",
        f"input, float32, float32, to a classifier's patches, {BOTH}",
        {"statistics": "input", "pixels": "float32", "normalize": True, "backward": True},
    ),
    ("noise_patchify", "uint8 -> float32", {}),
    ("noise_patchify", "uint8 -> bfloat16", {"dtype": BF16}),
    ("noise_patchify", "uint8 -> bfloat16, 4 levels of 2 draws", {"dtype": BF16, "levels": (4,), "draws": (2,)}),
    ("noise_patchify", f"float32 -> float32, {BOTH}", {"pixels": "float32", "backward": True}),
    *(
        ("patch_loss", f"{what}, {passes}", {**options, "backward": passes == BOTH})
        for passes in (FORWARD, BOTH)
        for what, options in (
            ("uint8, float32", {}),
            ("uint8, bfloat16", {"dtype": BF16}),
            ("float32, float32", {"pixels": "float32"}),
        )
    ),
    ("patch_loss", f"uint8, float32, masked, {BOTH}", {"masked": True, "backward": True}),
    ("patch_loss", f"uint8, float32, raw target, {BOTH}", {"norm_pix": False, "backward": True}),
)
CASES = tuple(
    Case(operation, geometry, what, functools.partial(PREPARE[operation], **options))
    for geometry in GEOMETRIES
    for operation, what, options in KINDS
)


def select(only: Sequence[str]) -> list[Case]:
    """The cases whose name contains one of the words; all, if there are none.

    Raises:
        ValueError: a word is in no name.
    """
    for word in only:
        if not any(word in case.name for case in CASES):
            valid = "\n".join(f"  {case.name}" for case in CASES)
            raise ValueError(f"no case has {word!r} in its name; these are the cases:\n{valid}")
    return [case for case in CASES if not only or any(word in case.name for word in only)]


def check(name: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compare results with float64 ones; return the largest error in units of what is allowed.

    Allowed are 1e-5 of the largest value, which is what the noise contract grants a normal and some ten roundings of
    float32 take, and the rounding of a narrower result.

    Raises:
        WrongResultError: an error is larger, or a shape is another.
    """
    worst = 0.0
    for position, (value, exact) in enumerate(zip(got, expected, strict=True)):
        what = f"gradient {position}" if position else "result"
        if value.shape != exact.shape:
            raise WrongResultError(
                f"{name}: the {what} has shape {tuple(value.shape)}, the chain's {tuple(exact.shape)}"
            )
        exact = exact.detach()
        allowed = 1e-5 * exact.abs().max() + torch.finfo(value.dtype).eps * exact.abs()
        error = ((value.detach().double() - exact).abs() / allowed).max().item()
        if not error <= 1:  # written so that NaN fails
            raise WrongResultError(f"{name}: the {what} is off by {error:.3g} times what is allowed; no time is given")
        worst = max(worst, error)
    return worst


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    functions: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of every call, in rounds in which each function has its turn.

    On a CPU wall time with warm caches; on a GPU the time between two events, with nothing left in the L2.

    Args:
        functions: by name; each has run before.
        device: that they run on.
        seconds: after which no round begins.
        least: rounds at least.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, function in functions.items():
            if flush is None:
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
            else:
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                flush.zero_()
                events[0].record()
                function()
                events[1].record()
                torch.cuda.synchronize(device)
                times[name].append(events[0].elapsed_time(events[1]) / 1000)
    return times


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call has allocated at once, beyond what there was before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Every allocation and release of torch's own allocator, which compiled code uses too, in the order of time.
    with (
        mock.patch.dict(os.environ, KINETO_LOG_LEVEL="99"),  # it tells of itself, and of missing GPUs
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        function()
    results = profiler.profiler.kineto_results
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    sizes = [size for _, size in sorted(events, key=lambda event: event[0])]
    return max(itertools.accumulate(sizes), default=0)


def environment(device: torch.device) -> dict[str, Any]:
    """What times depend on: device, versions, threads."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def chains_may_run(device: torch.device) -> Iterator[None]:
    """Leaves the global generators as they were, and lets one chain be compiled for every case.

    Chains draw from those generators, and torch compiles a function for eight kinds of input by default.
    """
    import torch._dynamo.config

    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch._dynamo.config.patch(recompile_limit=4 * len(CASES)),
    ):
        yield


def prepare(case: Case, device: torch.device, batch: int | None = None) -> tuple[Providers, float]:
    """A case's providers, and the error of the fused one in units of what is allowed.

    Args:
        case: of `CASES`.
        device: a CPU or CUDA device.
        batch: as for `run`.

    Raises:
        WrongResultError: the fused operation disagrees with its chain.
    """
    images = (batch or BATCH[device.type]) * (1 if case.geometry == "224/16" else SMALL_IMAGES)
    providers = case.prepare(images, *GEOMETRIES[case.geometry], device)
    return providers, check(case.name, providers.fused(), providers.expected())


def compare(
    case: Case, device: torch.device, batch: int | None = None, *, seconds: float = 1.0, compile: bool = True
) -> Record:
    """Check and time one case, within `chains_may_run`. Arguments and errors are those of `run`."""
    providers, error = prepare(case, device, batch)
    functions: dict[str, Callable[[], object]] = {"fused": providers.fused, "chain": providers.chain}
    absent = {}
    providers.chain()
    if compile:
        try:
            providers.compiled()
            functions["compiled"] = providers.compiled
        except Exception as failure:  # no compiler, or one without headers: as many errors as there are compilers
            absent["compiled"] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}"
    else:
        absent["compiled"] = "not asked for"
    if providers.naive is not None and device.type == "cuda":
        providers.naive()
        functions["naive"] = providers.naive
    else:
        absent["naive"] = "runs on a GPU, forward noise_patchify alone"
    source = torch.zeros(max(1, providers.minimum // 2), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    _synchronize(device)
    times = measure({**functions, "copy": lambda: target.copy_(source)}, device, seconds)
    best = {name: min(values) for name, values in times.items()}
    return Record(
        case=case.name,
        operation=case.operation,
        device=str(device),
        batch=providers.batch,
        error=error,
        minimum_bytes=providers.minimum,
        best_seconds=best,
        median_seconds={name: statistics.median(values) for name, values in times.items()},
        gigabytes_per_second=providers.minimum / best["fused"] / 1e9,
        copy_share=best["copy"] / best["fused"],
        ratios={name: best[name] / best["fused"] for name in functions if name != "fused"},
        peak_bytes={name: peak_memory(function, device) for name, function in functions.items()},
        absent=absent,
    )


def run(
    device: torch.device | str = "cpu",
    only: Sequence[str] = (),
    batch: int | None = None,
    *,
    seconds: float = 1.0,
    compile: bool = True,
    report: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Check and time the fused operations.

    Args:
        device: a CPU or CUDA device.
        only: words; the cases with one of them in their names are run.
        batch: images of 224/16, of 32/4 sixteen times as many; by default 16 on a CPU and 256 on a GPU. Sweeps divide
            it by their levels and draws.
        seconds: of timing per case, five rounds at least. Compilation comes on top.
        compile: compare with the chain under `torch.compile` too.
        report: called with each record as it is made.

    Returns:
        One record per case.

    Raises:
        ValueError: an unknown case, a batch below 1, or a CUDA device where there is none.
        WrongResultError: a fused operation disagrees with its chain.
    """
    where = torch.device(device)
    if where.type not in BATCH:
        raise ValueError(f"device must be cpu or cuda, got {device}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for and torch sees no GPU; use cpu, or see `denim doctor`")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    cases = select(only)
    records: list[Record] = []
    with chains_may_run(where):
        for case in cases:
            records.append(compare(case, where, batch, seconds=seconds, compile=compile))
            if report is not None:
                report(records[-1])
    return records
