"""Limits of a GPU that no kernel can beat: occupancy from a kernel's resources, and time from its counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget

__all__ = ["GPU", "GPUS", "RATES", "occupancy", "roofline", "with_execution"]


class GPU(NamedTuple):
    """Limits of one product. The clock is the boost clock that the float32 peak of its data sheet implies."""

    name: str
    multiprocessors: int
    clock: float
    """Hz."""
    bandwidth: float
    """Bytes per second."""
    integer: float = 2.0
    """Warp instructions of 32-bit integer arithmetic per clock and multiprocessor."""


# NVIDIA's data sheets: A100 80GB SXM (19.5 TFLOPS, 2039 GB/s; 108 SMs of 64 float32 lanes), H100 SXM (67 TFLOPS,
# 3.35 TB/s; 132 of 128), HGX B200 (600 TFLOPS and 64 TB/s for eight; 148 of 128). GeForce RTX 3090 (35.6 TFLOPS, 936
# GB/s; 82 of 128), RTX 4090 (82.6 TFLOPS, 1008 GB/s; 128 of 128), RTX 5090 (104.8 TFLOPS, 1792 GB/s; 170 of 128, which
# also add integers).
GPUS = {
    "sm_80": GPU("A100", 108, 1.41e9, 2.039e12),
    "sm_86": GPU("RTX 3090", 82, 1.695e9, 0.936e12),
    "sm_89": GPU("RTX 4090", 128, 2.52e9, 1.008e12),
    "sm_90": GPU("H100", 132, 1.98e9, 3.35e12),
    "sm_100": GPU("B200", 148, 1.98e9, 8.0e12),
    "sm_120": GPU("RTX 5090", 170, 2.407e9, 1.792e12, integer=4.0),
}
# Warp instructions per clock and multiprocessor: four schedulers issue one each; 64 results per clock of 32-bit integer
# multiplication, 16 of special functions ("Throughput of Native Arithmetic Instructions" in the CUDA C++ programming
# guide; a warp is 32). Of addition, comparison and logic 64 (`GPU.integer`), but 128 additions from compute capability
# 12.0 on; that all of the class are as fast as additions keeps the bound a bound.
RATES = {"issue": 4.0, "multiply": 2.0, "special": 0.5}
# Of L1 per clock and multiprocessor: it looks up four lines of four sectors each (NVIDIA's developer forum,
# "Understanding L1/TEX Cache Sectors/Req"). Its data lies in the 32 banks of shared memory, which give four bytes each.
SECTORS, BYTES = 16.0, 128.0


class Multiprocessor(NamedTuple):
    """What a multiprocessor can hold at once."""

    warps: int
    blocks: int
    shared: int
    """KB."""


# "Technical Specifications per Compute Capability" in the CUDA programming guide, and `cuda/__device/arch_traits.h` of
# NVIDIA's CCCL. (The Blackwell tuning guide gives other numbers for 12.0; an RTX 5090 reports these.)
MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164),
    86: Multiprocessor(48, 16, 100),
    89: Multiprocessor(48, 24, 100),
    90: Multiprocessor(64, 32, 228),
    100: Multiprocessor(64, 32, 228),
    120: Multiprocessor(48, 24, 100),
}


def roofline(gpu: GPU, moved: float, warp_instructions: Mapping[str, float]) -> dict[str, Any]:
    """Microseconds per image that each limit alone would take, and which `binds`: the largest."""
    limits = {"memory": moved / gpu.bandwidth * 1e6}
    for name, rate in (*RATES.items(), ("integer", gpu.integer)):
        limits[name] = warp_instructions[name] / (rate * gpu.multiprocessors * gpu.clock) * 1e6
    return _bound(limits)


def with_execution(gpu: GPU, static: Mapping[str, Any], counts: Mapping[str, float]) -> dict[str, Any]:
    """The limits of a kernel with what execution has counted.

    `memory` are the bytes behind ideal caches. `issue` takes the fewer of the instructions of the machine code and of
    those that the PTX executed: the former hold code that no thread reaches, and of the latter ptxas merges some. `L1`
    is new: the sectors that requests touch, the bytes that they need, and the passes through shared memory.

    Args:
        gpu: of `GPUS`.
        static: from `roofline`.
        counts: of one image: `warp_instructions`, `memory` bytes, `sectors`, `bytes` of requests, `passes`.

    Returns:
        As `roofline`.
    """
    limits = {name: value for name, value in static.items() if name != "binds"}
    per_clock = gpu.multiprocessors * gpu.clock / 1e6
    limits["memory"] = counts["memory"] / gpu.bandwidth * 1e6
    limits["issue"] = min(limits["issue"], counts["warp_instructions"] / RATES["issue"] / per_clock)
    limits["L1"] = max(counts["sectors"] / SECTORS, counts["bytes"] / BYTES + counts["passes"]) / per_clock
    return _bound(limits)


def _bound(limits: Mapping[str, float]) -> dict[str, Any]:
    return {**limits, "binds": max(limits, key=lambda name: limits[name])}


def _blocks(registers_limit: int, per_block: int) -> int:
    return registers_limit // per_block if per_block else 1 << 30


def occupancy(target: GPUTarget, registers: int, warps: int, shared: int) -> float:
    """Warps of a kernel that fit into a multiprocessor at once, as a share of those that it can hold.

    NVIDIA: warps, blocks and shared memory as in `MULTIPROCESSORS`, of which every block takes another 1 KB, and 65536
    registers handed out to warps in units of 256 (as in the occupancy calculator of Nsight Compute). CDNA 3: four SIMDs
    of 8 waves, 512 registers for a lane of each in units of 8, 64 KB of LDS ("AMD Instinct MI300 Instruction Set
    Architecture", sections on VGPRs and LDS; workgroup size and wave limits as in LLVM's AMDGPU usage).

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
    # Each of the four parts of a multiprocessor has registers of its own.
    held = 65536 // 4 // warp_registers * 4
    most = MULTIPROCESSORS[target.arch]
    by_shared = _blocks(most.shared << 10, -(-(shared + 1024) // 128) * 128)
    programs = min(most.warps // warps, most.blocks, held // warps, by_shared)
    return programs * warps / most.warps
