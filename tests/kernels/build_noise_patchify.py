"""Build the Triton kernels for GPUs that are not here: `python build_noise_patchify.py OUTPUT`, a JSON of machine code.

A process of its own, since it tells Triton of a GPU that the machine does not have. The launchers themselves are run,
so the kernels are specialised as they would be on the GPU; only the launch is left out.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends import backends

from denim.kernels import noise_patchify_triton as kernel
from denim.kernels.machine_code import TARGETS, build, machine_code, occupancy

BF16, FP32 = torch.bfloat16, torch.float32
# Name: targets, pixels, patch size, channels, output, levels, draws.
FORWARD = {
    "training": (("sm_80", "sm_90", "gfx942"), "uint8", 16, 3, BF16, 1, 1),
    "sweep": (("sm_90",), "uint8", 16, 3, BF16, 3, 2),
    "draws": (("sm_90",), "uint8", 16, 3, BF16, 1, 3),
    "float32 patches": (("sm_90",), "uint8", 16, 3, FP32, 1, 1),
    "planes": (("sm_90",), "planes", 16, 3, BF16, 1, 1),
    "channels_last": (("sm_90",), "channels_last", 16, 3, BF16, 1, 1),
    "patch 4": (("sm_90",), "uint8", 4, 3, BF16, 1, 1),
    "patch 14": (("sm_90",), "uint8", 14, 3, BF16, 1, 1),
    "patch 2": (("sm_90",), "uint8", 2, 3, BF16, 1, 1),
}
# Name: targets, patch size, channels, gradient, pixels, leads.
BACKWARD = {
    "one": (("sm_90", "gfx942"), 16, 3, BF16, FP32, 1),
    "many": (("sm_90",), 16, 3, BF16, FP32, 3),
    "float32": (("sm_90",), 16, 3, FP32, FP32, 1),
    "patch 4": (("sm_90",), 4, 3, BF16, FP32, 1),
    "patch 14": (("sm_90",), 14, 3, BF16, FP32, 1),
}


class Operators(TorchDispatchMode):
    """What torch is asked to do: on a GPU, each would be a kernel or a copy of its own."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def forward_launch(pixels, patch_size, channels, dtype, levels, draws):
    side = 4 * patch_size
    images = torch.zeros(2, side, side, channels, dtype=torch.uint8)
    if pixels != "uint8":
        images = images.permute(0, 3, 1, 2).float()
        images = images.contiguous(
            memory_format=torch.channels_last if pixels == "channels_last" else torch.contiguous_format
        )
    values = [0.5] * channels
    sigma, seeds = torch.ones(levels, 2), torch.zeros(draws, 2, dtype=torch.int64)
    cut = kernel.tile(patch_size, channels)

    def launch(gpu, **options):
        instructions = "ptx" if gpu.backend == "cuda" else "gcn"
        kernel.launch(images, sigma, seeds, patch_size, values, values, dtype, instructions=instructions, **options)

    return kernel.noise_patchify_kernel, cut["SEGMENTS"] * cut["COLS"], launch


def backward_launch(patch_size, channels, grad_dtype, dtype, leads):
    side = 4 * patch_size
    grad = torch.zeros(leads, 2, 16, patch_size**2 * channels, dtype=grad_dtype)
    elements = kernel.run_length(patch_size, channels, grad_dtype, dtype) * channels

    def launch(gpu, **options):
        kernel.launch_backward(
            grad, side, side, patch_size, [0.5] * channels, dtype, warp_size=gpu.warp_size, **options
        )

    return kernel.noise_patchify_backward_kernel, elements, launch


def main(output: str) -> None:
    report = {}

    def add(name, target, function, elements, launch, **options):
        gpu = TARGETS[target]
        if gpu.backend == "hip" and "amd" not in backends:
            return
        operators = Operators()

        def recorded():
            with operators:
                launch(gpu, **options)

        (built,) = build(gpu, [function], recorded)
        code = machine_code(built, gpu)
        report[f"{name}, {target}"] = code | {
            # Of a thread, and of one level or lead.
            "elements": elements,
            "occupancy": occupancy(gpu, code["registers"], built.metadata.num_warps, code["shared"]),
            "threads": built.metadata.num_warps * gpu.warp_size,
            "operators": sorted(operators.seen),
        }

    for cases, make, prefix in ((FORWARD, forward_launch, ""), (BACKWARD, backward_launch, "backward, ")):
        for name, (targets, *case) in cases.items():
            for target in targets:
                add(prefix + name, target, *make(*case))
    for threads in kernel.CONFIGURATIONS[1:]:
        add(f"training, {threads}", "sm_90", *forward_launch(*FORWARD["training"][1:]), configurations=(threads,))
        add(f"backward, {threads}", "sm_90", *backward_launch(*BACKWARD["one"][1:]), configurations=(threads,))
    Path(output).write_text(json.dumps(report))


main(sys.argv[1])
