"""Build the Triton kernels for GPUs that are not here: `python build_patch_loss.py OUTPUT`, a JSON of machine code.

The launchers themselves are run, so the kernels are specialised as they would be on the GPU; only the launch is left
out.
"""

import json
import sys
from pathlib import Path

import torch
from triton.backends import backends

from denim.kernels import patch_loss_triton as kernel
from denim.kernels.machine_code import TARGETS, build, machine_code

# Name: targets, pixels, patch size, channels, dtype of the prediction, mask.
CASES = {
    "training": (TARGETS, "uint8", 16, 3, torch.bfloat16, False),
    "masked": (("sm_90",), "uint8", 16, 3, torch.bfloat16, True),
    "float32 prediction": (("sm_90",), "uint8", 16, 3, torch.float32, False),
    "planes": (("sm_90",), "planes", 16, 3, torch.bfloat16, False),
    "patch 4": (("sm_90",), "uint8", 4, 3, torch.bfloat16, False),
    "patch 14": (("sm_90",), "uint8", 14, 3, torch.bfloat16, False),
    "patch 32": (("sm_90",), "uint8", 32, 3, torch.bfloat16, False),
    "five channels": (("sm_90",), "uint8", 16, 5, torch.bfloat16, False),
}


def main(output: str, *names: str) -> None:
    report = {}
    for name, (targets, pixels, patch_size, channels, dtype, masked) in CASES.items():
        if names and name not in names:
            continue
        side = 4 * patch_size
        images = torch.zeros(2, side, side, channels, dtype=torch.uint8)
        if pixels == "planes":
            images = images.permute(0, 3, 1, 2).float().contiguous()
        prediction = torch.zeros(2, 16, patch_size**2 * channels, dtype=dtype)
        mask = torch.ones(2, 16, dtype=torch.bool) if masked else None
        given = (prediction, images, mask, patch_size, [0.5] * channels, [0.5] * channels, True)
        for target in targets:
            gpu = TARGETS[target]
            if (
                gpu.backend not in {"cuda": "nvidia", "hip": "amd"}
                or {"cuda": "nvidia", "hip": "amd"}[gpu.backend] not in backends
            ):
                continue

            def launch(given=given, gpu=gpu):
                kernel.launch_forward(*given, warp_size=gpu.warp_size)
                kernel.launch_backward(torch.ones(()), *given, warp_size=gpu.warp_size)

            functions = [kernel.partials_kernel, kernel.loss_kernel, kernel.prediction_grad_kernel]
            cut = kernel.tile(patch_size, channels)
            for part, built in zip(("loss", "sum", "gradient"), build(gpu, functions, launch), strict=True):
                code = machine_code(built, gpu)
                threads = built.metadata.num_warps * gpu.warp_size
                patches = max(1, 128 // cut["RUNS"])
                # Of a thread, padding included.
                code["elements"] = patches * cut["RUNS"] * cut["SEGMENTS"] * cut["COLS"] // threads
                code["threads"] = threads
                # Instructions of the whole program for each element of a patch that exists.
                code["per_element"] = code["opcodes"].total() * threads / (patches * patch_size**2 * channels)
                report[f"{name}, {part}, {target}"] = code
    Path(output).write_text(json.dumps(report))


main(*sys.argv[1:])
