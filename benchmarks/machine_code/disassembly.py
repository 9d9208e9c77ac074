"""Parses the machine code of a built kernel, NVIDIA's SASS or AMD's GCN, and counts its instructions."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget

from denim.benchmarks.machine_code.builds import NVIDIA_TOOLS

__all__ = ["CLASSES", "access_bytes", "machine_code", "opcode_class"]

LOCAL = ("LDL", "STL", "scratch_")
TRANSCENDENTAL = ("v_log_f32", "v_sin_f32", "v_cos_f32")

# Instructions by the unit that executes them. "multiply" is integer multiplication, which has a rate of its own.
# "other" are moves, shuffles, reads of constants, computations for a whole warp (uniform, scalar), waits and branches.
CLASSES = ("integer", "multiply", "float", "special", "conversion", "memory", "other")
_NVIDIA_CLASSES = (
    ("special", r"MUFU"),
    ("conversion", r"[IF]2|FRND"),
    ("memory", r"(LD|ST|ATOM|RED)(G|S|L|SM)?(\.|$)"),
    ("multiply", r"IMAD|IMUL"),
    ("float", r"[FHD](ADD|MUL|FMA|SET|SEL|MNMX|CHK|SWZ)"),
    (
        "integer",
        r"I(ADD|ABS|DP|MNMX|SCADD|SET)|LOP|SH[FLR](\.|$)|LEA|V(IADD|IMNMX|ABSDIFF)|PRMT|SEL|BF[EI]|BMSK|POPC|FLO|BREV|SGXT",
    ),
)
_AMD_CLASSES = (
    ("special", r"v_(log|exp|sin|cos|rcp|rsq|sqrt)_"),
    ("conversion", r"v_cvt_"),
    ("memory", r"(global|buffer|flat|scratch|ds)_"),
    ("multiply", r"v_(mul_(lo|hi)|mad_(u64|i64)|mul_[ui]32_[ui]24|mad_[ui]32_[ui]24|mul_hi_[ui]32_[ui]24)"),
    ("other", r"v_(mov|readfirstlane|readlane|writelane|accvgpr|nop|swap)|s_"),
    ("float", r"v_\w*_(f16|f32|f64|bf16)"),
    ("integer", r"v_"),
)
_AMD_WIDTHS = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8}


def _by_depth(lines: Iterable[tuple[str, str, str | None]]) -> tuple[list[Counter[str]], Counter[str]]:
    """Opcodes by the number of loops around them, and opcodes of slow paths, from (label, opcode, branch target)s.

    A slow path is code that a branch skips and that keeps an array in local memory: the reduction of large arguments in
    libdevice's sine and cosine, which no angle of a normal generator needs.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for label, opcode, target in lines:
        if label:
            labels[label] = len(opcodes)
            continue
        if target:
            branches.append((len(opcodes), target))
        opcodes.append(opcode)
    loops: dict[int, int] = {}
    skips: list[range] = []
    for place, target in branches:
        end = labels.get(target)
        # A jump to itself is padding behind the end of the code.
        if end is not None and end < place:
            loops[end] = place
        elif end is not None and end > place:
            skips.append(range(place + 1, end))
    slow: set[int] = set()
    for place, opcode in enumerate(opcodes):
        around = [skipped for skipped in skips if place in skipped]
        if opcode.startswith(LOCAL) and around:
            shortest: range = min(around, key=len)
            slow.update(shortest)
    depths = [Counter[str]()]
    aside = Counter[str]()
    for place, opcode in enumerate(opcodes):
        # NOP pads the end of the code and is never executed.
        if opcode == "NOP":
            continue
        depth = sum(start <= place <= end for start, end in loops.items())
        depths += [Counter() for _ in range(depth + 1 - len(depths))]
        (aside if place in slow else depths[depth])[opcode] += 1
    return depths, aside


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found.group(1))


def nvidia_machine_code(built: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])

        def tool(*command: str | Path) -> str:
            return subprocess.run([*command, binary], capture_output=True, text=True, check=True).stdout

        text = tool(NVIDIA_TOOLS / "nvdisasm", "-c", "-ndf")
        usage = tool(NVIDIA_TOOLS / "cuobjdump", "-res-usage")
    lines = re.findall(
        r"^(?:(\.L\w+):|\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(?:.*`\((\.L\w+)\))?)", text, re.M
    )
    depths, slow = _by_depth(lines)
    opcodes = sum(depths, slow)
    return {
        "opcodes": opcodes,
        "depths": depths,
        "slow": slow,
        "registers": _number(r"REG:(\d+)", usage),
        "spills": _number(r"STACK:(\d+)", usage),
        "local": sum(n for opcode, n in opcodes.items() if opcode.startswith(LOCAL)),
        "barriers": sum(n for opcode, n in opcodes.items() if opcode.startswith("BAR")),
        "shared": built.metadata.shared,
    }


def amd_machine_code(built: Any) -> dict[str, Any]:
    text = built.asm["amdgcn"]
    lines = re.findall(
        r"^(?:(\.LBB\w+):|\s*((?:[sv]|buffer|global|flat|ds|scratch)_\w+)(?:[^;\n]*?(\.LBB\w+))?)", text, re.M
    )
    depths, slow = _by_depth(lines)
    opcodes = sum(depths, slow)
    order = [opcode for _, opcode, _ in lines if opcode]
    return {
        "opcodes": opcodes,
        "depths": depths,
        "slow": slow,
        "followers": [after for before, after in itertools.pairwise(order) if before in TRANSCENDENTAL],
        "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
        "spills": _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        "local": sum(n for opcode, n in opcodes.items() if opcode.startswith(LOCAL)),
        "barriers": opcodes["s_barrier"],
        "shared": built.metadata.shared,
    }


def machine_code(built: Any, target: GPUTarget) -> dict[str, Any]:
    """Count the instructions of a built kernel.

    Returns:
        `opcodes` with their counts; of these `depths`, by the number of loops around them, and apart from these `slow`
        paths, which skipped code with arrays in local memory is taken for; `registers` per thread;
        `spills`, bytes of stack per thread; `local`, instructions that use memory of the thread's own; `barriers`;
        `shared` memory in bytes. On AMD also `followers`, the instructions behind each transcendental one.
    """
    return nvidia_machine_code(built) if target.backend == "cuda" else amd_machine_code(built)


def opcode_class(opcode: str) -> str:
    """The one of `CLASSES` that a machine instruction belongs to."""
    for name, pattern in _AMD_CLASSES if opcode[0].islower() else _NVIDIA_CLASSES:
        if re.match(pattern, opcode):
            return name
    return "other"


def access_bytes(opcode: str) -> tuple[str, int] | None:
    """("load" or "store", bytes per thread) of an access to global memory; None for every other instruction."""
    if found := re.match(r"(LD|ST)G\.", opcode):
        size = re.search(r"\.(?:[US](8|16)|(64|128|256))(?:\.|$)", opcode)
        bits = int(size.group(1) or size.group(2)) if size else 32
        return {"LD": "load", "ST": "store"}[found.group(1)], bits // 8
    if found := re.match(r"(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?|b\d+)", opcode):
        return found.group(1), _AMD_WIDTHS[found.group(2)]
    return None
