"""Build the Triton kernel for GPUs that are not here: `python build_noise_patchify.py OUTPUT`, a JSON of machine code.

A process of its own, since it tells Triton of a GPU that the machine does not have. The launcher itself is run, so the
kernel is specialised as it would be on the GPU; only the launch is left out.
"""

import collections
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from denim.kernels import noise_patchify_triton as kernel

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TRANSCENDENTAL = ("v_log_f32", "v_sin_f32", "v_cos_f32")
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "ptx"),
    "sm_90": (GPUTarget("cuda", 90, 32), "ptx"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "gcn"),
}
# Name: targets, pixels, patch size, channels, output, levels, draws.
CASES = {
    "training": (("sm_80", "sm_90", "gfx942"), "uint8", 16, 3, torch.bfloat16, 1, 1),
    "sweep": (("sm_90",), "uint8", 16, 3, torch.bfloat16, 3, 2),
    "float32 patches": (("sm_90",), "uint8", 16, 3, torch.float32, 1, 1),
    "planes": (("sm_90",), "planes", 16, 3, torch.bfloat16, 1, 1),
    "channels_last": (("sm_90",), "channels_last", 16, 3, torch.bfloat16, 1, 1),
    "patch 4": (("sm_90",), "uint8", 4, 3, torch.bfloat16, 1, 1),
    "patch 14": (("sm_90",), "uint8", 14, 3, torch.bfloat16, 1, 1),
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


def build(target, instructions, pixels, patch_size, channels, dtype, levels, draws):
    driver.set_active(NoDevice(target))
    function, built = kernel.noise_patchify_kernel, []
    function.device_caches.clear()
    run = type(function).run.__get__(function)
    function.run = lambda *args, grid, warmup, **kwargs: built.append(run(*args, grid=grid, warmup=True, **kwargs))
    side = 4 * patch_size
    images = torch.zeros(2, side, side, channels, dtype=torch.uint8)
    if pixels != "uint8":
        images = images.permute(0, 3, 1, 2).float()
        images = images.contiguous(
            memory_format=torch.channels_last if pixels == "channels_last" else torch.contiguous_format
        )
    statistics = [0.5] * channels
    sigma, seeds = torch.ones(levels, 2), torch.zeros(draws, 2, dtype=torch.int64)
    kernel.launch(images, sigma, seeds, patch_size, statistics, statistics, dtype, instructions=instructions)
    return built[0]


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


def main(output: str) -> None:
    report = {}
    for name, (targets, pixels, patch_size, channels, dtype, levels, draws) in CASES.items():
        for target in targets:
            gpu, instructions = TARGETS[target]
            if gpu.backend == "hip" and "amd" not in backends:
                continue
            built = build(gpu, instructions, pixels, patch_size, channels, dtype, levels, draws)
            code = nvidia_machine_code(built) if gpu.backend == "cuda" else amd_machine_code(built)
            cut = kernel.tile(patch_size, channels)
            # The default 128 runs per program, over the threads of the program.
            threads = built.metadata.num_warps * gpu.warp_size
            code["elements"] = 128 * cut["SEGMENTS"] * cut["COLS"] // threads
            report[f"{name}, {target}"] = code
    Path(output).write_text(json.dumps(report))


main(sys.argv[1])
