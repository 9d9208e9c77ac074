"""The ahead-of-time report: every kernel built for GPUs that are not here, counted, and held against its budget.

All numbers are static. They come from machine code and from data sheets; nothing was run. A roofline time is a lower
bound that no kernel can beat, not a time that it takes.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton

from denim.benchmarks.machine_code.builds import (
    CLASSES,
    TARGETS,
    Built,
    access_bytes,
    build,
    machine_code,
    occupancy,
    opcode_class,
    unavailable,
)
from denim.benchmarks.machine_code.cases import CASES, Case, Work

__all__ = [
    "BUDGETS",
    "GPUS",
    "RATES",
    "analyse",
    "broken_promises",
    "budget",
    "budgets_text",
    "compare",
    "read_budgets",
    "report",
    "roofline",
    "select",
]

BUDGETS = Path(__file__).parent / "budgets.json"
# Arithmetic and conversions of float64.
DOUBLE = re.compile(r"^D(ADD|MUL|FMA|SETP|MNMX)|F64|_f64")
# Fewer than this share of instructions more is noise of the compiler's; more is a change of the kernel's.
TOLERANCE = 0.03


class GPU(NamedTuple):
    """A product, for its limits. Clocks are the boost clocks that the data sheets' float32 peaks imply."""

    name: str
    multiprocessors: int
    clock: float
    """Hz."""
    bandwidth: float
    """Bytes per second."""


# NVIDIA's data sheets: A100 80GB SXM (19.5 TFLOPS, 2039 GB/s; 108 SMs of 64 float32 lanes), H100 SXM (67 TFLOPS,
# 3.35 TB/s; 132 of 128), HGX B200 (600 TFLOPS and 64 TB/s for eight; 148 of 128).
GPUS = {
    "sm_80": GPU("A100", 108, 1.41e9, 2.039e12),
    "sm_90": GPU("H100", 132, 1.98e9, 3.35e12),
    "sm_100": GPU("B200", 148, 1.98e9, 8.0e12),
}
# Warp instructions per clock and multiprocessor: four schedulers issue one each; 64 results per clock of 32-bit integer
# multiplication and likewise of addition, comparison and logic, 16 of special functions ("Throughput of Native
# Arithmetic Instructions" in the CUDA C++ programming guide, compute capability 8.0, 9.0 and 10.0; a warp is 32).
RATES = {"issue": 4.0, "multiply": 2.0, "integer": 2.0, "special": 0.5}


def _bytes_of(opcodes: Mapping[str, int], kind: str) -> int:
    """Bytes that a thread loads or stores once through a piece of code."""
    accesses = ((access_bytes(opcode), n) for opcode, n in opcodes.items())
    return sum(access[1] * n for access, n in accesses if access and access[0] == kind)


def analyse(built: Built, target: str, work: Work) -> dict[str, Any]:
    """What one kernel costs, per output element and per image. Static: nothing is run.

    A loop counts as often as it runs (`work.trips`). Where the compiler has unrolled the innermost one, its stores tell
    how many trips its code holds (without stores, its loads).

    Args:
        built: from `build`.
        target: name in `TARGETS`.
        work: of the launch.

    Returns:
        JSON-ready: `registers`, `warps` (of a program), `elements` of the output per image, `programs`, `shared` bytes,
        `barriers`, `spills`, `local`, `occupancy`; `instructions` per output element, and `classes` of them; `slow`,
        those of slow paths, which the former leave out; `by_loop`, instructions of one trip by the number of loops
        around them, per element of that trip; `loads` and `stores`, {bytes per thread: accesses in the code}; `moved`
        and `minimum` bytes per image; `opcodes`, `depths` and `followers` as in `machine_code`; `roofline`,
        microseconds per image and what binds (NVIDIA).
    """
    gpu = TARGETS[target]
    code = machine_code(built, gpu)
    warps, trips = built.metadata.num_warps, work.trips
    threads = built.programs * warps * gpu.warp_size
    depths: list[Counter[str]] = code["depths"]
    # A loop of which the case does not know is part of what surrounds it.
    depths = [*depths[: len(trips)], sum(depths[len(trips) :], Counter())]
    weights = [float(math.prod(trips[:depth])) for depth in range(len(depths))]
    if len(depths) > 1:
        kind, size = "store", work.written
        if not _bytes_of(depths[-1], kind):
            kind, size = "load", work.moved - work.written
        if size:
            weights[-1] /= max(1, round(_bytes_of(depths[-1], kind) * threads * weights[-1] / size))
    # A loop that stores makes its own share of the elements in every trip; one that sums goes over all of them.
    passes = math.prod(trips) if _bytes_of(depths[-1], "store") else 1
    by_class: Counter[str] = Counter(dict.fromkeys(CLASSES, 0))
    for opcodes, weight in zip(depths, weights, strict=True):
        for opcode, n in opcodes.items():
            by_class[opcode_class(opcode)] += n * weight  # type: ignore[assignment]
    share = threads / work.elements
    accesses: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for opcode, n in code["opcodes"].items():
        if access := access_bytes(opcode):
            accesses[access[0]][access[1]] += n
    entry = {
        "registers": code["registers"],
        "warps": warps,
        "elements": work.elements / work.images,
        "programs": built.programs,
        "shared": code["shared"],
        "barriers": code["barriers"],
        "spills": code["spills"],
        "local": code["local"],
        "occupancy": occupancy(gpu, code["registers"], warps, code["shared"]),
        "instructions": by_class.total() * share,
        "slow": code["slow"].total() * share,
        "classes": {name: by_class[name] * share for name in CLASSES},
        "by_loop": [
            opcodes.total() * weight / math.prod(trips[:depth]) * share * passes
            for depth, (opcodes, weight) in enumerate(zip(depths, weights, strict=True))
        ],
        "loads": {str(width): n for width, n in sorted(accesses["load"].items())},
        "stores": {str(width): n for width, n in sorted(accesses["store"].items())},
        "moved": work.moved / work.images,
        "minimum": work.minimum / work.images,
        "opcodes": dict(code["opcodes"]),
        "depths": [dict(opcodes) for opcodes in depths],
        "followers": code.get("followers", []),
    }
    if target in GPUS:
        warp_instructions = {name: by_class[name] * threads / 32 / work.images for name in CLASSES}
        warp_instructions["issue"] = by_class.total() * threads / 32 / work.images
        entry["roofline"] = roofline(GPUS[target], entry["moved"], warp_instructions)
    return entry


def roofline(gpu: GPU, moved: float, warp_instructions: Mapping[str, float]) -> dict[str, Any]:
    """Microseconds per image that each limit alone would take, and which `binds`: the largest."""
    limits = {"memory": moved / gpu.bandwidth * 1e6}
    for name, rate in RATES.items():
        limits[name] = warp_instructions[name] / (rate * gpu.multiprocessors * gpu.clock) * 1e6
    return {**limits, "binds": max(limits, key=lambda name: limits[name])}


def select(names: Sequence[str], targets: Sequence[str]) -> tuple[list[Case], list[str]]:
    """Cases that are called one of `names` or begin so, and targets; without any, all that this Triton can build for.

    Raises:
        ValueError: a name or a target is unknown, or Triton cannot build for a target.
    """
    cases: dict[str, Case] = {}
    for name in names:
        found = [case for case in CASES if case.name == name] or [case for case in CASES if case.name.startswith(name)]
        if not found:
            valid = "".join(f"\n  {case.name}" for case in CASES)
            raise ValueError(f"no kernel is called {name!r}; expected one of these, or how some of them begin:{valid}")
        cases |= {case.name: case for case in found}
    chosen = list(targets) or [target for target in TARGETS if unavailable(target) is None]
    for target in chosen:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}; expected some of {', '.join(TARGETS)}")
        if reason := unavailable(target):
            raise ValueError(f"cannot build for {target}: {reason}")
    return list(cases.values()) if names else list(CASES), chosen


def _build_case(name: str, target: str) -> dict[str, Any]:
    (case,) = (case for case in CASES if case.name == name)
    work: list[Work] = []
    kernels = [case.kernel, *case.also]
    built = build(TARGETS[target], kernels, lambda: work.append(case.launch(TARGETS[target])))
    (chosen,) = (one for one in built if one.metadata.name == case.kernel.fn.__name__)
    return {"kernel": chosen.metadata.name} | analyse(chosen, target, work[0])


def report(
    names: Sequence[str] = (), targets: Sequence[str] = (), workers: int | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Build and count kernels, in processes of their own.

    Args:
        names: as for `select`.
        targets: of `TARGETS`; all, if there are none, of which this machine's Triton can build.
        workers: processes; by default as many as there are processors.

    Returns:
        {case: {target: `analyse`}}.

    Raises:
        ValueError: a name or a target is unknown, a target cannot be built, or Triton interprets.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ValueError("TRITON_INTERPRET is set: kernels would be interpreted, not built; unset it")
    cases, chosen = select(names, targets)
    jobs = [(case.name, target) for target in chosen for case in cases]
    # Not a fork: Triton's driver and torch's threads belong to this process.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), context) as pool:
        results = dict(zip(jobs, pool.map(_build_case, *zip(*jobs, strict=True)), strict=True))
    return {case.name: {target: results[case.name, target] for target in chosen} for case in cases}


def broken_promises(case: Case, target: str, entry: Mapping[str, Any]) -> list[str]:
    """What machine code must hold or must not, whatever the budgets say. Empty if all is well."""
    broken = []

    def count(*starts: str) -> int:
        return sum(n for opcode, n in entry["opcodes"].items() if opcode.startswith(starts))

    def promise(kept: bool, text: str) -> None:
        if not kept:
            broken.append(f"{case.name}, {target}: {text}")

    nvidia = target in GPUS
    promise(not entry["spills"] and not entry["local"], "registers are spilled to local memory")
    promise(
        count("ATOM", "RED", "global_atomic", "buffer_atomic", "flat_atomic") == 0,
        "atomic operations: the order of a sum, and so its rounding, would change from run to run",
    )
    double = {opcode for opcode in entry["opcodes"] if DOUBLE.search(opcode)}
    promise(not double, f"{', '.join(sorted(double))}: float64, which GPUs compute slowly, where float32 is meant")
    if case.draws == "normal":
        for opcode in ("MUFU.LG2", "MUFU.SIN", "MUFU.COS") if nvidia else ("v_log_f32", "v_sin_f32", "v_cos_f32"):
            promise(count(opcode) > 0, f"no {opcode}: normals are not made with the approximate instructions")
        # CDNA 3 demands a wait state, which the compiler does not add to inline assembly.
        late = {opcode for opcode in entry["followers"] if not opcode.startswith("s_nop")}
        promise(not late, f"{', '.join(sorted(late))} right behind a transcendental instruction, without a wait state")
    if case.draws:
        wide = "IMAD.WIDE.U32" if nvidia else "v_mad_u64_u32"
        # Two products in each of Philox's ten rounds, but those of a round may have a constant factor.
        promise(count(wide) >= 18, f"{count(wide)} {wide}: Philox does not multiply 32 by 32 bits in one instruction")
    if case.rounds and nvidia:
        promise(count("F2FP.BF16") > 0, "no F2FP.BF16: bfloat16 is not rounded to by the conversion instruction")
    return broken


def _width(accesses: Mapping[str, int]) -> int:
    """The width, in bytes, that at least half of the bytes move in, or wider ones; 0 without accesses."""
    total = sum(int(width) * n for width, n in accesses.items())
    wide = 0
    for width in sorted(map(int, accesses), reverse=True):
        wide += width * accesses[str(width)]
        if 2 * wide >= total:
            return width
    return 0


def budget(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the budget file keeps of one entry of the report."""
    return {
        "registers": entry["registers"],
        "occupancy": round(entry["occupancy"], 4),
        "spills": entry["spills"],
        "local": entry["local"],
        "loads": entry["loads"],
        "stores": entry["stores"],
        "instructions": round(entry["instructions"], 2),
    }


def _accesses(accesses: Mapping[str, int]) -> str:
    return " + ".join(f"{n} x {width} bytes" for width, n in accesses.items()) or "none"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What became worse than a budget allows, and what became better."""
    worse: list[str] = []
    better: list[str] = []

    def note(change: float, text: str) -> None:
        if change:
            (worse if change > 0 else better).append(text)

    note(
        before["occupancy"] - after["occupancy"],
        f"occupancy {before['occupancy']:.1%} -> {after['occupancy']:.1%} "
        f"({before['registers']} -> {after['registers']} registers)",
    )
    for name, what in (("spills", "spills"), ("local", "local-memory instructions")):
        if after[name] or before[name]:
            note(
                # Any at all is too many, whatever the budget says.
                1 if after[name] else -1,
                f"{what} {before[name]} -> {after[name]}",
            )
    for name in ("loads", "stores"):
        note(
            _width(before[name]) - _width(after[name]),
            f"{name} {_accesses(before[name])} -> {_accesses(after[name])}",
        )
    old, new = before["instructions"], after["instructions"]
    if abs(new / old - 1) > TOLERANCE:
        note(new - old, f"instructions per output element {old:.2f} -> {new:.2f} ({new / old - 1:+.1%})")
    return worse, better


def compare(
    budgets: Mapping[str, Any], built: Mapping[str, Mapping[str, Any]], complete: bool
) -> tuple[list[str], list[str]]:
    """Hold a report against the budgets.

    A kernel fails that has lost occupancy, that spills or uses local memory, most of whose bytes move in narrower
    accesses, or that has over 3 % more instructions.

    Args:
        budgets: {case: {target: `budget`}}.
        built: from `report`.
        complete: the report holds every case and target, so a budget without an entry is out of date.

    Returns:
        Failures and improvements, a line each with what was before and what is now.
    """
    failures, improvements = [], []
    update = "run `denim kernels --update-budgets`, look at the difference and commit it"
    for name, targets in built.items():
        for target, entry in targets.items():
            before = budgets.get(name, {}).get(target)
            if before is None:
                failures.append(f"{name}, {target}: has no budget; {update}")
                continue
            worse, better = _changes(before, budget(entry))
            failures += [f"{name}, {target}: {text}" for text in worse]
            improvements += [f"{name}, {target}: {text}" for text in better]
    if complete:
        gone = [
            f"{name}, {target}"
            for name, kept in budgets.items()
            for target in kept
            if target not in built.get(name, {})
        ]
        failures += [f"{place}: has a budget but is not built; {update}" for place in gone]
    return failures, improvements


def read_budgets(path: Path | None = None) -> tuple[str, dict[str, Any]]:
    """Triton's version when the budgets were made, and {case: {target: `budget`}}.

    Raises:
        ValueError: there is no such file.
    """
    path = path or BUDGETS
    if not path.exists():
        raise ValueError(f"no budgets at {path}; `denim kernels --update-budgets` makes them")
    kept = json.loads(path.read_text())
    return kept["triton"], kept["budgets"]


def budgets_text(built: Mapping[str, Mapping[str, Any]]) -> str:
    """The budget file that a report amounts to: one line per case and target, for readable differences."""
    cases = []
    for name, targets in built.items():
        lines = ",\n".join(f"   {json.dumps(target)}: {json.dumps(budget(entry))}" for target, entry in targets.items())
        cases.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    return f'{{\n "triton": {json.dumps(triton.__version__)},\n "budgets": {{\n' + ",\n".join(cases) + "\n }\n}\n"
