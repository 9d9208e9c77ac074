"""What only execution counts, of every compared kernel and of what a user would run without it, on an H100's code."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from denim.benchmarks.case import BACKWARD, FORWARD, SIDE, Case
from denim.benchmarks.cases import OPERATIONS
from denim.benchmarks.machine_code import inductor
from denim.benchmarks.machine_code.ptx.check import run_case
from denim.benchmarks.machine_code.ptx.counts import SECTOR, Counts
from denim.benchmarks.machine_code.ptx.launch import run_on_cpu
from denim.benchmarks.machine_code.roofline import GPUS, with_execution

__all__ = ["bounds", "executed", "summary"]

CAPABILITY = 90
# Where no case is compared with torch.compile, the first one that is built.
CASES_EXECUTED = (
    *inductor.COMPARED,
    *[rows[0] for rows in OPERATIONS.values() if not any(case.compared for case in rows)],
)


def summary(counts: Sequence[Counts], elements: int) -> dict[str, Any]:
    """Of launches that run one after another.

    Args:
        counts: one for each launch.
        elements: that the instructions are divided by.

    Returns:
        `kernels`; `instructions` of threads per element, idle lanes of executing warps included; `lanes`, the share of
        those that are not idle; `loads` and `stores`, sectors of the requests over the fewest that hold their bytes
        (None without requests); `conflicts`, passes through shared memory beyond the fewest, per request; `memory`,
        bytes behind ideal caches, where every kernel finds the caches empty; `launches`, of each what `with_execution`
        takes.
    """
    warps = sum(one.warp_instructions for one in counts)
    shared = sum(one.shared_requests for one in counts)

    def ratio(kind: str) -> float | None:
        traffic = [getattr(one, kind) for one in counts]
        least = sum(part.least for part in traffic)
        return sum(part.sectors for part in traffic) / least if least else None

    return {
        "kernels": len(counts),
        "instructions": 32 * warps / elements,
        "lanes": sum(one.thread_instructions for one in counts) / (32 * warps),
        "loads": ratio("loads"),
        "stores": ratio("stores"),
        "conflicts": sum(one.bank_conflicts for one in counts) / shared if shared else 0.0,
        "memory": sum(one.memory_bytes for one in counts),
        "launches": [
            {
                "warp_instructions": one.warp_instructions,
                "memory": one.memory_bytes,
                "sectors": one.loads.sectors + one.stores.sectors,
                "bytes": SECTOR * (one.loads.least + one.stores.least),
                "passes": one.shared_passes,
            }
            for one in counts
        ],
    }


def bounds(table: Mapping[str, Any], ran: Mapping[str, Any]) -> dict[str, Any]:
    """The table of `inductor.baselines` with the bounds that follow from execution, where its kernels were executed.

    Args:
        table: from `inductor.baselines`.
        ran: from `executed`.

    Returns:
        The same table with other numbers in `bound`, and `counted`: "execution", or "code" where a trap stopped the
        kernels, or where one image takes other kernels than a batch.
    """
    gpu = GPUS[f"sm_{CAPABILITY}"]

    def bound(name: str, part: str, kind: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
        if "rooflines" not in numbers:
            return dict(numbers)
        found = ran.get(name, {}).get(part, {}).get(kind)
        if not isinstance(found, Mapping) or len(found["launches"]) != len(numbers["rooflines"]):
            return {**numbers, "counted": "code"}
        pairs = zip(numbers["rooflines"], found["launches"], strict=True)
        limits = [with_execution(gpu, static, counts) for static, counts in pairs]
        total = sum(one[one["binds"]] for one in limits)
        return {**numbers, "rooflines": limits, "bound": total, "counted": "execution"}

    return {
        name: {
            part: {kind: bound(name, part, kind, numbers) for kind, numbers in kinds.items()}
            for part, kinds in passes.items()
        }
        for name, passes in table.items()
    }


def _execute(name: str) -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    (case,) = (case.resized(1, SIDE) for case in CASES_EXECUTED if f"{case.operation}, {case.name}" == name)
    elements = 3 * SIDE * SIDE
    passes: dict[str, dict[str, Any]] = {
        part: {"fused": summary(counts, elements)} for part, counts in _fused(case).items()
    }
    if naive := _naive(case):
        passes[FORWARD]["naive"] = summary(naive, elements)
    for part, answer in _compiled(case).items():
        passes[part]["compiled"] = answer if isinstance(answer, str) else summary(answer, elements)
    return passes


def _fused(case: Case) -> dict[str, list[Counts]]:
    found = {}
    for part in (FORWARD, BACKWARD):
        if part in case.built:
            outcome = run_case(case, (part,), CAPABILITY, count=True)
            if not outcome.holds:
                raise RuntimeError(f"{case.operation}, {case.name}, {part}: {outcome.failure or outcome.agreements}")
            found[part] = [counts for _, counts in outcome.counts]
    return found


def _naive(case: Case) -> list[Counts]:
    call = case.naive(**case.inputs("cpu"))
    if call is None or case.outer > 1:  # for several levels or draws the naive kernel runs once for each
        return []
    with run_on_cpu(CAPABILITY, count=True) as launches:
        call()
    return [launch.counts for launch in launches if launch.counts is not None]


def _compiled(case: Case) -> dict[str, list[Counts] | str]:
    """The kernels of torch.compile by pass, or the trap that stopped them."""
    if not case.compared or inductor.unavailable() is not None:
        return {}
    return {
        part: answer if isinstance(answer, str) else [launch.counts for launch in answer if launch.counts is not None]
        for part, answer in inductor.executed(case).items()
    }


def executed(workers: int | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """One image of 224 x 224 through the kernels of the compared cases, executed on the CPU from an H100's PTX.

    Args:
        workers: processes; by default as many as there are processors.

    Returns:
        {operation and name of the case: {"forward" or "backward": {"fused", "naive", "compiled"}}}, each a `summary`;
        "compiled" is a text where a trap stopped torch.compile's kernels, such as an unknown instruction.

    Raises:
        RuntimeError: a fused kernel's result is not as defined.
    """
    names = [f"{case.operation}, {case.name}" for case in CASES_EXECUTED]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), context) as pool:
        return dict(zip(names, pool.map(_execute, names), strict=True))
