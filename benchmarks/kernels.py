"""`denim bench kernels`: the fused operations against what a user would run without them, on the device that is here.

Every benchmark is checked before it is timed: the fused result, gradients included, against the definition in float64
(`denim.benchmarks.cases`). What is compared: the chain of PyTorch operations run eagerly, the chain under
`torch.compile`, on a GPU a kernel written naively, and a copy of as many bytes as the operation must move at least.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from denim.benchmarks.case import BOTH, SIDE, Case, expected, passes, share_of_error
from denim.benchmarks.cases import CASES
from denim.benchmarks.timing import Times, WrongResultError, measure, peak_memory

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Providers",
    "Record",
    "WrongResultError",
    "compare",
    "prepare",
    "run",
    "select",
]

# Images of 224 x 224. Of 32 x 32 there are 16 times as many, about a third of the pixels.
BATCH = {"cpu": 16, "cuda": 256}
SMALL_IMAGES = 16


@dataclass(frozen=True)
class Providers:
    """One benchmark, ready to run: every provider but the copy returns the result and, behind it, the gradients."""

    fused: Callable[[], tuple[Tensor, ...]]
    chain: Callable[[], tuple[Tensor, ...]]
    """As a user would run it, with noise of its own."""
    compiled: Callable[[], tuple[Tensor, ...]]
    """Compiles when it is first called."""
    copy: Callable[[], object]
    """Moves `minimum` bytes: reads half and writes half."""
    batch: int
    shape: str
    """Of the first input and of the result."""
    minimum: int
    """Bytes when each pass reads its inputs once and writes its outputs once."""
    naive: Callable[[], object] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A case in a size of real work, forward or forward and backward."""

    case: Case
    side: int
    what: str
    """`FORWARD` or `BOTH`."""

    @property
    def operation(self) -> str:
        """Name in `denim.kernels`."""
        return self.case.operation

    @property
    def name(self) -> str:
        """What `only` selects by."""
        return f"{self.operation}, {self.side} x {self.side}, {self.case.name}, {self.what}"


BENCHMARKS = tuple(
    sorted(
        (Benchmark(case, side, what) for case in CASES for what in case.timed for side in case.sides),
        key=lambda benchmark: (-benchmark.side, benchmark.operation),
    )
)


@dataclass(frozen=True)
class Record:
    """What one benchmark gave. `ratios` are times over that of the fused operation: above 1 it is the faster one."""

    case: str
    operation: str
    device: str
    batch: int
    """Images."""
    shape: str
    """Of the first input and of the result. Levels and draws stand in front of the batch."""
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
    methods: dict[str, str]
    """How each was timed: see `denim.benchmarks.timing`."""
    cold: bool
    """Whether the L2 cache was overwritten before every call."""
    absent: dict[str, str] = field(default_factory=dict)
    """Providers that did not run, and why."""

    @property
    def faster(self) -> list[str]:
        """The baselines that take less time than the fused operation."""
        return [name for name, ratio in self.ratios.items() if ratio < 1]


def select(only: Sequence[str]) -> list[Benchmark]:
    """The benchmarks whose name contains one of the words; all, if there are none.

    Raises:
        ValueError: a word is in no name.
    """
    for word in only:
        if not any(word in benchmark.name for benchmark in BENCHMARKS):
            valid = "\n".join(f"  {benchmark.name}" for benchmark in BENCHMARKS)
            raise ValueError(f"no case has {word!r} in its name; these are the cases:\n{valid}")
    return [one for one in BENCHMARKS if not only or any(word in one.name for word in only)]


def check(name: str, got: Sequence[Tensor], exact: Sequence[Tensor], errors: Sequence[Tensor | float]) -> float:
    """Compare results with float64 ones; return the largest error in units of what is allowed.

    Args:
        name: of the benchmark, for the error message.
        got: result and gradients.
        exact: by the definition.
        errors: allowed before the store (`denim.benchmarks.case.expected`).

    Raises:
        WrongResultError: an error is larger, or a shape is another.
    """
    worst = 0.0
    for position, (value, right, error) in enumerate(zip(got, exact, errors, strict=True)):
        what = f"gradient {position}" if position else "result"
        if value.shape != right.shape:
            raise WrongResultError(
                f"{name}: the {what} has shape {tuple(value.shape)}, the definition's {tuple(right.shape)}"
            )
        share = share_of_error(value.detach(), right, error)
        if not share <= 1:  # written so that NaN fails
            raise WrongResultError(f"{name}: the {what} is off by {share:.3g} times what is allowed; no time is given")
        worst = max(worst, share)
    return worst


@contextlib.contextmanager
def chains_may_run(device: torch.device) -> Iterator[None]:
    """Leaves the global generators as they were, and lets one chain be compiled for every benchmark.

    Chains draw from those generators, and torch compiles a function for eight kinds of input by default.
    """
    import torch._dynamo.config

    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch._dynamo.config.patch(recompile_limit=4 * len(BENCHMARKS)),
    ):
        yield


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def prepare(benchmark: Benchmark, device: torch.device, batch: int | None = None) -> tuple[Providers, float]:
    """A benchmark's providers, and the error of the fused one in units of what is allowed.

    Args:
        benchmark: of `BENCHMARKS`.
        device: a CPU or CUDA device.
        batch: as for `run`.

    Raises:
        WrongResultError: the fused operation disagrees with its definition.
    """
    images = (batch or BATCH[device.type]) * (1 if benchmark.side == SIDE else SMALL_IMAGES)
    case = benchmark.case.resized(max(1, images // benchmark.case.outer), benchmark.side)
    inputs = case.inputs(device)
    leaves = case.leaves if benchmark.what == BOTH else ()
    with torch.no_grad():
        result = case.fused(**inputs)
    # Every input is read once and the result is written once.
    minimum = sum(value.nbytes for value in inputs.values()) + result.nbytes
    upstream = None
    if leaves:
        upstream = case.upstream(inputs, result)
        read = case.backward_arguments(inputs, upstream)
        minimum += sum(value.nbytes for value in read if isinstance(value, Tensor))
        minimum += sum(inputs[name].nbytes for name in leaves)
    exact, errors = expected(case, inputs, upstream)
    chain = functools.partial(case.chain, **case.constants(device))
    given = {name: value for name, value in inputs.items() if name != "seeds"}
    source = torch.zeros(max(1, minimum // 2), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    first = next(iter(inputs.values()))
    providers = Providers(
        fused=passes(case.fused, inputs, leaves, upstream),
        chain=passes(chain, given, leaves, upstream),
        # Static shapes and no guard that could let a graph break pass for a compiled chain.
        compiled=passes(torch.compile(chain, fullgraph=True, dynamic=False), given, leaves, upstream),
        copy=lambda: target.copy_(source),
        batch=case.batch,
        shape=f"{_shape(first)} to {_shape(result)}",
        minimum=minimum,
        naive=None if leaves else case.naive(**inputs),
    )
    return providers, check(benchmark.name, providers.fused(), exact, errors)


def compare(
    benchmark: Benchmark,
    device: torch.device,
    batch: int | None = None,
    *,
    seconds: float = 1.0,
    compile: bool = True,
    cold: bool = False,
) -> Record:
    """Check and time one benchmark, within `chains_may_run`. Arguments and errors are those of `run`."""
    providers, error = prepare(benchmark, device, batch)
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    times: dict[str, Times] = measure({**functions, "copy": providers.copy}, device, seconds=seconds, cold=cold)
    best = {name: min(taken.seconds) for name, taken in times.items()}
    return Record(
        case=benchmark.name,
        operation=benchmark.operation,
        device=str(device),
        batch=providers.batch,
        shape=providers.shape,
        error=error,
        minimum_bytes=providers.minimum,
        best_seconds=best,
        median_seconds={name: statistics.median(taken.seconds) for name, taken in times.items()},
        gigabytes_per_second=providers.minimum / best["fused"] / 1e9,
        copy_share=best["copy"] / best["fused"],
        ratios={name: best[name] / best["fused"] for name in functions if name != "fused"},
        peak_bytes={name: peak_memory(function, device) for name, function in functions.items()},
        methods={name: taken.method for name, taken in times.items()},
        cold=cold,
        absent=absent,
    )


def run(
    device: torch.device | str = "cpu",
    only: Sequence[str] = (),
    batch: int | None = None,
    *,
    seconds: float = 1.0,
    compile: bool = True,
    cold: bool = False,
    report: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Check and time the fused operations.

    Args:
        device: a CPU or CUDA device.
        only: words; the benchmarks with one of them in their names are run.
        batch: images of 224 x 224, of 32 x 32 sixteen times as many; by default 16 on a CPU and 256 on a GPU. A case
            of several levels or draws has fewer images, so that its result is as large.
        seconds: of timing per benchmark, five rounds at least. Compilation comes on top.
        compile: compare with the chain under `torch.compile` too.
        cold: overwrite the L2 cache of a GPU before every call.
        report: called with each record as it is made.

    Returns:
        One record per benchmark.

    Raises:
        ValueError: an unknown name, a batch below 1, a CUDA device where there is none, or `cold` on a CPU.
        WrongResultError: a fused operation disagrees with its definition.
    """
    where = torch.device(device)
    if where.type not in BATCH:
        raise ValueError(f"device must be cpu or cuda, got {device}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for and torch sees no GPU; use cpu, or see `denim doctor`")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if cold and where.type != "cuda":
        raise ValueError(f"cold overwrites the L2 cache of a GPU and the device is {device}; leave it out")
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    benchmarks = select(only)
    records: list[Record] = []
    with chains_may_run(where):
        for benchmark in benchmarks:
            records.append(compare(benchmark, where, batch, seconds=seconds, compile=compile, cold=cold))
            if report is not None:
                report(records[-1])
    return records
