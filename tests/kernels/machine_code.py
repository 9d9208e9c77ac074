"""Triton kernels built for GPUs that are not here, and what their machine code consists of.

For the `build_*.py` scripts, which are processes of their own: they tell Triton of a GPU that the machine does not
have.
"""

import collections
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TRANSCENDENTAL = ("v_log_f32", "v_sin_f32", "v_cos_f32")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


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


def build(target: GPUTarget, kernels: list, launch) -> list:
    """Call the launcher `launch`, and build what it would launch of `kernels`, in its order, without launching."""
    driver.set_active(NoDevice(target))
    built = []
    for function in kernels:
        function.device_caches.clear()
        run = type(function).run.__get__(function)

        def only_build(*args, grid, warmup, run=run, **kwargs):
            built.append(run(*args, grid=grid, warmup=True, **kwargs))

        function.run = only_build
    launch()
    return built


def nvidia_machine_code(built) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(built.asm["cubin"])

        def tool(*command) -> str:
            return subprocess.run([*command, binary], capture_output=True, text=True, check=True).stdout

        text = tool(NVIDIA_TOOLS / "nvdisasm", "-c")
        usage = tool(NVIDIA_TOOLS / "cuobjdump", "-res-usage")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", text, re.M)
    return {
        # NOP pads the end of the code and is never executed.
        "opcodes": collections.Counter(opcode for opcode in opcodes if opcode != "NOP"),
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "shared": built.metadata.shared,
    }


def amd_machine_code(built) -> dict:
    text = built.asm["amdgcn"]
    lines = [
        line.split()[0]
        for line in text.splitlines()
        if re.match(r"\s*[sv]_\w+|\s*(buffer|global|ds|scratch)_\w+", line)
    ]
    return {
        "opcodes": collections.Counter(lines),
        "followers": [after for before, after in itertools.pairwise(lines) if before in TRANSCENDENTAL],
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1)),
        "scratch": int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text).group(1)),
        "shared": built.metadata.shared,
    }


def machine_code(built, target: GPUTarget) -> dict:
    """Opcodes with their counts, registers, shared memory; scratch memory on AMD (NVIDIA's shows as LDL and STL)."""
    return nvidia_machine_code(built) if target.backend == "cuda" else amd_machine_code(built)
