"""Builds Triton kernels for GPUs that the machine need not have.

Triton's driver is replaced for the whole process, so builds run in processes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

__all__ = ["CONSUMER", "NVIDIA_TOOLS", "TARGETS", "Built", "NoDevice", "build", "unavailable"]

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Consumer GPUs. One case of every pass is built for them (`denim.benchmarks.machine_code.cases.Build.built_for`).
CONSUMER = ("sm_86", "sm_89", "sm_120")


class NoDevice:
    """The part of a Triton driver that a build needs."""

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
    """Call `launch`, and build those of `kernels` that it would launch, in its order. Nothing is launched."""
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
