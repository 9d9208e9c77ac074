"""Build the Triton kernel for GPUs that are not here: `python build_noise_patchify.py OUTPUT`, a JSON of machine code.

A process of its own, since it tells Triton of a GPU that the machine does not have. The launcher itself is run, so the
kernel is specialised as it would be on the GPU; only the launch is left out.
"""

import json
import sys
from pathlib import Path

import torch
from machine_code import TARGETS, build, machine_code
from triton.backends import backends

from denim.kernels import noise_patchify_triton as kernel

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


def build_case(target, instructions, pixels, patch_size, channels, dtype, levels, draws):
    side = 4 * patch_size
    images = torch.zeros(2, side, side, channels, dtype=torch.uint8)
    if pixels != "uint8":
        images = images.permute(0, 3, 1, 2).float()
        images = images.contiguous(
            memory_format=torch.channels_last if pixels == "channels_last" else torch.contiguous_format
        )
    statistics = [0.5] * channels
    sigma, seeds = torch.ones(levels, 2), torch.zeros(draws, 2, dtype=torch.int64)

    def launch():
        kernel.launch(images, sigma, seeds, patch_size, statistics, statistics, dtype, instructions=instructions)

    return build(target, [kernel.noise_patchify_kernel], launch)[0]


def main(output: str) -> None:
    report = {}
    for name, (targets, pixels, patch_size, channels, dtype, levels, draws) in CASES.items():
        for target in targets:
            gpu = TARGETS[target]
            if gpu.backend == "hip" and "amd" not in backends:
                continue
            instructions = "ptx" if gpu.backend == "cuda" else "gcn"
            built = build_case(gpu, instructions, pixels, patch_size, channels, dtype, levels, draws)
            code = machine_code(built, gpu)
            cut = kernel.tile(patch_size, channels)
            # The default 128 runs per program, over the threads of the program.
            threads = built.metadata.num_warps * gpu.warp_size
            code["elements"] = 128 * cut["SEGMENTS"] * cut["COLS"] // threads
            report[f"{name}, {target}"] = code
    Path(output).write_text(json.dumps(report))


main(sys.argv[1])
