"""Build the kernels of `attack_step`, `attack_start` and `decode_patches` for GPUs that are not here.

`python build_attack_decode.py OUTPUT attack` or `decode` writes a JSON of machine code. The launchers themselves are
run, so the kernels are specialised as they would be on the GPU; only the launch is left out.
"""

import json
import sys
from pathlib import Path

import torch
from triton.backends import backends

from denim.kernels import attack_step_triton, decode_patches_triton
from denim.kernels.machine_code import TARGETS, build, machine_code

EVERY = tuple(TARGETS)
# Name: targets, dtype of pixels and origin, of the gradient, elements of a sample.
ATTACK = {
    "attack": (EVERY, torch.float32, torch.float32, 3 * 224 * 224),
    "attack, bfloat16": (("sm_90",), torch.bfloat16, torch.bfloat16, 3 * 224 * 224),
    "attack, odd size": (("sm_90",), torch.float32, torch.float32, 3 * 7 * 7),
}
F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
# Name: targets, patch size, channels, dtype of the prediction, statistics, dtype of the source, leads; dtype of the
# normalised patches, or none for pixels; whether the source's gradient is wanted.
DECODE = {
    "training": (EVERY, 16, 3, BF16, "input", U8, 3, None, True),
    "raw": (("sm_90",), 16, 3, BF16, "raw", None, 1, None, True),
    "noisy": (("sm_90",), 16, 3, BF16, "noisy", BF16, 1, None, True),
    "noisy, fixed source": (("sm_90",), 16, 3, BF16, "noisy", BF16, 1, None, False),
    "patch 32": (("sm_90",), 32, 3, BF16, "input", F32, 1, None, True),
    "patches": (("sm_90",), 16, 3, BF16, "input", F32, 1, BF16, True),
    "patches, raw, patch 4": (("sm_90",), 4, 3, BF16, "raw", None, 1, BF16, True),
}


def attack_launches(dtype, gradient_dtype, elements):
    pixels, gradient = torch.zeros(2, elements, dtype=dtype), torch.zeros(2, elements, dtype=gradient_dtype)
    size = torch.ones(2)
    kernel = attack_step_triton
    yield (
        "",
        kernel.attack_step_kernel,
        kernel.RUN,
        lambda **kwargs: kernel.launch(pixels, pixels, gradient, size, size, **kwargs),
    )
    yield (
        " start",
        kernel.attack_start_kernel,
        kernel.RUN,
        lambda **kwargs: kernel.launch_start(pixels, torch.zeros(2, dtype=torch.int64), size, **kwargs),
    )


def decode_launches(patch_size, channels, dtype, statistics, source_dtype, leads, output, need_source):
    side = 4 * patch_size
    prediction = torch.zeros(leads, 2, 16, patch_size**2 * channels, dtype=dtype)
    source = sigma = None
    if statistics == "input":
        shape = (2, side, side, channels) if source_dtype == torch.uint8 else (2, channels, side, side)
        source = torch.zeros(shape, dtype=source_dtype)
    if statistics == "noisy":
        source, sigma = torch.zeros(prediction.shape, dtype=source_dtype), torch.ones(2)
    values = [0.5] * channels
    normal = values if output else []
    kernel = decode_patches_triton
    images = statistics == "input" or output is None
    elements = kernel.cut(patch_size, channels, dtype, images=images)["RUN"] * channels
    given = (prediction, source, sigma)
    options = (patch_size, values, values, statistics)
    yield (
        " forward",
        kernel.decode_kernel,
        elements,
        lambda **kwargs: kernel.launch(*given, side, side, *options, normal, normal, output or F32, **kwargs),
    )
    grad = torch.zeros(prediction.shape if output else (leads, 2, channels, side, side), dtype=output or F32)
    yield (
        " backward",
        kernel.decode_backward_kernel,
        elements,
        lambda **kwargs: kernel.launch_backward(grad, *given, *options, normal, need_source, **kwargs),
    )


def main(output: str, what: str) -> None:
    cases, launches = {"attack": (ATTACK, attack_launches), "decode": (DECODE, decode_launches)}[what]
    report = {}
    for name, (targets, *case) in cases.items():
        for suffix, function, elements, launch in launches(*case):
            for target in targets:
                gpu = TARGETS[target]
                if gpu.backend == "hip" and "amd" not in backends:
                    continue
                (built,) = build(gpu, [function], lambda launch=launch, gpu=gpu: launch(warp_size=gpu.warp_size))
                # Elements of a thread, and of one lead.
                report[f"{name}{suffix}, {target}"] = machine_code(built, gpu) | {"elements": elements}
    Path(output).write_text(json.dumps(report))


main(*sys.argv[1:])
