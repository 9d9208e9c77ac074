"""Triton kernels built for GPUs that are not here, and what their machine code consists of.

Only for processes of their own: Triton is told of a GPU that the machine does not have.
"""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

__all__ = ["CLASSES", "TARGETS", "access_bytes", "build", "machine_code", "occupancy", "opcode_class", "unavailable"]

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
LOCAL = ("LDL", "STL", "scratch_")
TRANSCENDENTAL = ("v_log_f32", "v_sin_f32", "v_cos_f32")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Of instructions, by what executes them. "multiply" is integer multiplication, a rate of its own; "other" moves,
# shuffles, reads constants, computes for a whole warp at once (uniform, scalar), waits and branches.
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


class NoDevice:
    """As much of a driver as building needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Built:
    """A kernel as it would be launched: Triton's intermediate results, its options, and the number of programs."""

    asm: dict[str, Any]
    metadata: Any
    programs: int


def unavailable(target: str) -> str | None:
    """Why this Triton cannot build and inspect kernels for one of `TARGETS`; None if it can."""
    name = {"cuda": "nvidia", "hip": "amd"}[TARGETS[target].backend]
    if name not in backends:
        return (
            f"this build of Triton ({triton.__version__}) has no {name} backend; it has {', '.join(sorted(backends))}"
        )
    missing = [tool for tool in ("nvdisasm", "cuobjdump") if name == "nvidia" and not (NVIDIA_TOOLS / tool).exists()]
    if missing:
        return f"{' and '.join(missing)} missing from {NVIDIA_TOOLS}, where Triton's Linux wheels have them"
    return None


def build(target: GPUTarget, kernels: Sequence[Any], launch: Callable[[], object]) -> list[Built]:
    """Call the launcher `launch`, and build what it would launch of `kernels`, in its order, without launching."""
    driver.set_active(NoDevice(target))
    built: list[Built] = []
    for function in kernels:
        function.device_caches.clear()
        run = type(function).run.__get__(function)

        def only_build(*args: Any, grid: Any, warmup: bool, run: Callable[..., Any] = run, **kwargs: Any) -> None:
            kernel = run(*args, grid=grid, warmup=True, **kwargs)
            built.append(Built(kernel.asm, kernel.metadata, math.prod(grid)))

        function.run = only_build
    launch()
    return built


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
        # A jump to itself fills up the code behind its end.
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
    """What a built kernel consists of.

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


def _blocks(registers_limit: int, per_block: int) -> int:
    return registers_limit // per_block if per_block else 1 << 30


def occupancy(target: GPUTarget, registers: int, warps: int, shared: int) -> float:
    """Share of the warps that a multiprocessor can hold which fit at once, from the kernel's resources alone.

    NVIDIA: 64 warps, 32 blocks, 65536 registers handed out to warps in units of 256, and 164 KB of shared memory (228
    KB from compute capability 9.0 on) of which every block takes another 1 KB ("Compute Capabilities" in the CUDA
    programming guide; units as in the occupancy calculator of Nsight Compute). CDNA 3: four SIMDs of 8 waves, 512
    registers for a lane of each in units of 8, 64 KB of LDS ("AMD Instinct MI300 Instruction Set Architecture",
    sections on VGPRs and LDS; workgroup size and wave limits as in LLVM's AMDGPU usage).

    Args:
        target: of the build.
        registers: per thread (AMD: VGPRs, accumulation registers included).
        warps: of a program.
        shared: bytes of a program.

    Returns:
        A number in (0, 1].
    """
    if target.backend == "hip":
        waves = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4
        programs = min(waves // warps, _blocks(64 << 10, shared))
        return programs * warps / 32
    warp_registers = -(-registers * 32 // 256) * 256
    # Each of the four parts of a multiprocessor hands out its own registers.
    held = 65536 // 4 // warp_registers * 4
    capacity = (164 if target.arch < 90 else 228) << 10
    programs = min(64 // warps, 32, held // warps, _blocks(capacity, -(-(shared + 1024) // 128) * 128))
    return programs * warps / 64
