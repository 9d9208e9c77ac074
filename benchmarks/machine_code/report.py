"""The ahead-of-time report: every kernel, built for GPUs that the machine need not have, and counted.

All numbers are static. They come from machine code and from data sheets; nothing is run. A roofline time is a lower
bound of the time that a kernel takes.
"""

from __future__ import annotations

import concurrent.futures
import difflib
import math
import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from denim.benchmarks.machine_code.builds import TARGETS, Built, build, unavailable
from denim.benchmarks.machine_code.cases import BUILDS, Build, Work
from denim.benchmarks.machine_code.disassembly import CLASSES, access_bytes, machine_code, opcode_class
from denim.benchmarks.machine_code.roofline import GPUS, occupancy, roofline

__all__ = ["analyse", "build_and_count", "report", "select"]


def _bytes_of(opcodes: Mapping[str, int], kind: str) -> int:
    """Bytes that a thread loads or stores once through a piece of code."""
    accesses = ((access_bytes(opcode), n) for opcode, n in opcodes.items())
    return sum(access[1] * n for access, n in accesses if access and access[0] == kind)


def analyse(built: Built, target: str, work: Work) -> dict[str, Any]:
    """Count what one kernel costs per output element and per image. Nothing is run.

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
        and `minimum` bytes per image; `dtypes` of the outputs; `opcodes`, `depths` and `followers` as in
        `machine_code`; `roofline`, microseconds per image and what binds (NVIDIA).
    """
    gpu = TARGETS[target]
    code = machine_code(built, gpu)
    warps, trips = built.metadata.num_warps, work.trips
    threads = built.programs * warps * gpu.warp_size
    depths: list[Counter[str]] = code["depths"]
    # A loop whose trips are not known counts once, with the code around it.
    depths = [*depths[: len(trips)], sum(depths[len(trips) :], Counter())]
    weights = [float(math.prod(trips[:depth])) for depth in range(len(depths))]
    if len(depths) > 1:
        kind, size = "store", work.written
        if not _bytes_of(depths[-1], kind):
            kind, size = "load", work.moved - work.written
        if size:
            weights[-1] /= max(1, round(_bytes_of(depths[-1], kind) * threads * weights[-1] / size))
    # Each trip of a loop that stores makes a share of the elements; each trip of a loop that sums serves all of them.
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
        "dtypes": list(work.stores),
        "opcodes": dict(code["opcodes"]),
        "depths": [dict(opcodes) for opcodes in depths],
        "followers": code.get("followers", []),
    }
    if target in GPUS:
        warp_instructions = {name: by_class[name] * threads / 32 / work.images for name in CLASSES}
        warp_instructions["issue"] = by_class.total() * threads / 32 / work.images
        entry["roofline"] = roofline(GPUS[target], entry["moved"], warp_instructions)
    return entry


def select(names: Sequence[str], targets: Sequence[str]) -> tuple[list[Build], list[str]]:
    """The builds and the targets to report on.

    A name of `names` selects the build of that name, or else all builds whose names begin with it. Without names all
    builds are selected, and without targets all that this Triton can build for. Of a build and a target the report has
    an entry if `Build.built_for` says so.

    Raises:
        ValueError: a name or a target is unknown, Triton cannot build for a target, or no build selected is for them.
    """
    builds: dict[str, Build] = {}
    for name in names:
        found = [one for one in BUILDS if one.name == name] or [one for one in BUILDS if one.name.startswith(name)]
        if not found:
            every = [one.name for one in BUILDS]
            close = difflib.get_close_matches(name, every, 3)
            meant = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
            valid = "".join(f"\n  {one}" for one in every)
            raise ValueError(
                f"no kernel is called {name!r}{meant}; expected one of these, or how some of them begin:{valid}"
            )
        builds |= {one.name: one for one in found}
    chosen = list(targets) or [target for target in TARGETS if unavailable(target) is None]
    for target in chosen:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}; expected some of {', '.join(TARGETS)}")
        if reason := unavailable(target):
            raise ValueError(f"cannot build for {target}: {reason}")
    selected = list(builds.values()) if names else list(BUILDS)
    served = [one for one in selected if any(one.built_for(target) for target in chosen)]
    if not served:
        valid = "".join(f"\n  {one.name}" for one in BUILDS if one.built_for(chosen[0]))
        raise ValueError(f"{selected[0].name} is not built for {', '.join(chosen)}; these are:{valid}")
    return served, chosen


def build_and_count(name: str, target: str) -> dict[str, Any]:
    """Build the kernel of `BUILDS` with this name for one of `TARGETS`, and `analyse` it.

    For a process of its own: Triton's driver and the kernel's function are replaced.
    """
    (one,) = (one for one in BUILDS if one.name == name)
    tensors: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    built = build(TARGETS[target], one.kernels, lambda: tensors.append(one.launch(TARGETS[target])))
    (chosen,) = (kernel for kernel in built if kernel.metadata.name == one.kernel.fn.__name__)
    work = one.work(*tensors[0], [kernel.programs for kernel in built])
    return {"kernel": chosen.metadata.name} | analyse(chosen, target, work)


def report(
    names: Sequence[str] = (), targets: Sequence[str] = (), workers: int | None = None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Build and count kernels in worker processes.

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
    builds, chosen = select(names, targets)
    jobs = [(one.name, target) for target in chosen for one in builds if one.built_for(target)]
    # Spawned, since a forked process would share Triton's driver and torch's threads with this one.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), context) as pool:
        results = dict(zip(jobs, pool.map(build_and_count, *zip(*jobs, strict=True)), strict=True))
    return {
        one.name: {target: results[one.name, target] for target in chosen if one.built_for(target)} for one in builds
    }
