"""The timer of every benchmark: calls in turns, each timed by itself, and the memory that a call takes.

On a CPU a call is timed by the wall clock. On a GPU it is timed between two events on the device, behind a delay: the
device spins until the host has enqueued the whole call, so that the time holds what the device works and not what
Python takes to launch it. A forward and backward pass of one fused operation works for some tens of microseconds and
takes Python some hundreds. The best of many times is the one to compare: other work on the machine only ever adds time.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple
from unittest import mock

import torch

__all__ = [
    "DEVICE",
    "HOST",
    "PROCESSOR",
    "WALL",
    "Times",
    "WrongResultError",
    "best_seconds",
    "check_clock",
    "environment",
    "measure",
    "peak_memory",
    "step_seconds",
    "turns",
]

# How a call was timed, in words.
WALL = "wall clock"
PROCESSOR = "processor time of one thread, which other work on the machine does not lengthen as it does the wall clock"
DEVICE = "between events, behind a delay: the device's work alone"
HOST = "between events: the call waits for the device, so the host's part is in it"
# Calls of a turn on a GPU (see `turns`).
STEPS = 5
# Seconds that the device spins before a call: at first, and at most. A call that is not enqueued by then waits for the
# device itself.
DELAY, LONGEST = 0.5e-3, 0.2
# Bytes that are overwritten at least before a call with a cold cache: ROCm reports the L2 of one die of several alone.
FLUSH = 2**28
# `torch.cuda._sleep` spins for cycles; GPUs clock at most about this high (Hz).
CLOCK = 3e9


class WrongResultError(RuntimeError):
    """What is to be timed computes something else than what it is compared with, so no time is given for it."""


class Times(NamedTuple):
    """Times of one function."""

    seconds: list[float]
    """Of every call."""
    method: str
    """`WALL`, `PROCESSOR`, `DEVICE` or `HOST`."""


class _Device:
    """Times calls on one GPU."""

    def __init__(self, device: torch.device, cold: bool) -> None:
        self.stream = torch.cuda.current_stream(device)
        # Twice the cache, so that nothing of it survives, whatever the policy of replacement.
        size = max(FLUSH, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.flush = torch.empty(size, dtype=torch.uint8, device=device) if cold else None

    def seconds(self, function: Callable[[], object], delay: float) -> tuple[float, float]:
        """Seconds of a call on the device, and the delay behind which the host had enqueued it.

        A delay that was too short is doubled, and the call repeated. A delay above `LONGEST` says that no delay is long
        enough.
        """
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.flush is not None:
                self.flush.zero_()
            torch.cuda._sleep(int((delay if delay <= LONGEST else DELAY) * CLOCK))
            start.record(self.stream)
            function()
            end.record(self.stream)
            enqueued = not start.query()
            end.synchronize()
            if enqueued or delay > LONGEST:
                return start.elapsed_time(end) / 1000, delay
            delay *= 2


def check_clock(clock: str, device: torch.device) -> None:
    """Check that times on a device can be taken by a clock, "wall" or "processor".

    Raises:
        ValueError: another word, or processor time of a GPU or of several threads, which it adds up.
    """
    if clock not in ("wall", "processor"):
        raise ValueError(f"clock must be wall or processor, got {clock!r}")
    if clock == "processor" and (device.type == "cuda" or torch.get_num_threads() > 1):
        what = "a GPU" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        raise ValueError(f"processor time is that of one thread, not of {what}: set OMP_NUM_THREADS=1, or take wall")


def measure(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 0.0,
    least: int = 5,
    cold: bool = False,
    clock: str = "wall",
) -> dict[str, Times]:
    """Seconds of every call, in rounds in which each function has its turn.

    Args:
        functions: by name; each has run before.
        device: that they run on, a CPU or a GPU.
        seconds: after which no round begins.
        least: rounds at least.
        cold: on a GPU, the L2 cache is overwritten before every call. Otherwise a call finds what the one before left.
        clock: on a CPU, "wall" or "processor": the time for which this process has had a processor.

    Raises:
        ValueError: `cold` on a CPU, whose caches this does not control; or see `check_clock`.
    """
    check_clock(clock, device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds

    def more() -> bool:
        return time.perf_counter() < end or len(next(iter(times.values()))) < least

    if device.type != "cuda":
        if cold:
            raise ValueError("cold overwrites the L2 cache of a GPU; on a CPU leave it out")
        now = time.perf_counter if clock == "wall" else time.process_time
        while more():
            for name, function in functions.items():
                start = now()
                function()
                times[name].append(now() - start)
        return {name: Times(values, WALL if clock == "wall" else PROCESSOR) for name, values in times.items()}
    with torch.cuda.device(device):
        timer, delays = _Device(device, cold), dict.fromkeys(functions, DELAY)
        while more():
            for name, function in functions.items():
                took, delays[name] = timer.seconds(function, delays[name])
                times[name].append(took)
    return {name: Times(values, HOST if delays[name] > LONGEST else DEVICE) for name, values in times.items()}


def best_seconds(function: Callable[[], object], device: torch.device, *, least: int = 10) -> float:
    """The shortest of `least` calls, after a first one that is not counted."""
    function()
    return min(measure({"": function}, device, least=least)[""].seconds)


def step_seconds(function: Callable[[], object], device: torch.device, steps: int) -> list[float]:
    """Seconds of calls one behind another, as in training: the host prepares a step while the device works on another.

    So a time holds whichever of the two is slower. A first call is not counted.
    """
    function()
    if device.type != "cuda":
        return measure({"": function}, device, least=steps)[""].seconds
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        torch.cuda.synchronize(device)
        events[0].record(torch.cuda.current_stream(device))
        for event in events[1:]:
            function()
            event.record(torch.cuda.current_stream(device))
        torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(events)]


def turns(
    functions: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, clock: str
) -> tuple[dict[str, list[float]], str]:
    """Seconds of a call in every turn, and how they were taken: on a GPU as `step_seconds` takes them.

    Args:
        functions: by name; each has run before. They take turns.
        device: that they run on.
        rounds: turns of each.
        clock: see `measure`.
    """
    if device.type != "cuda":
        measured = measure(functions, device, least=rounds, clock=clock)
        return {name: taken.seconds for name, taken in measured.items()}, next(iter(measured.values())).method
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, run in functions.items():
            times[name].append(statistics.mean(step_seconds(run, device, STEPS)))
    return times, f"between events, {STEPS} calls one behind another: the slower of host and device"


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
