"""The timer of every benchmark: calls in turns, each timed by itself, and the memory that a call takes.

On a CPU a call is timed by the wall clock, with warm caches. On a GPU it is timed between two events on the device,
with nothing of the call before left in the L2 cache. The best of many times is the one to compare: other work on the
machine only ever adds time.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest import mock

import torch

__all__ = ["best_seconds", "environment", "measure", "peak_memory"]

# Bytes; larger than any L2, so that a GPU finds nothing of the last call there.
FLUSH = 2**28


def measure(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float = 0.0, least: int = 5
) -> dict[str, list[float]]:
    """Seconds of every call, in rounds in which each function has its turn.

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


def best_seconds(function: Callable[[], object], device: torch.device, *, least: int = 10) -> float:
    """The shortest of `least` calls, after a first one that is not counted."""
    function()
    return min(measure({"": function}, device, least=least)[""])


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
