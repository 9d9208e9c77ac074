"""The Triton normals with errors put into lg2, sin and cos: `python interpreter_noise.py INPUTS OUTPUTS`.

A process of its own, since Triton decides between interpreter and compiler when it is imported. INPUTS and OUTPUTS are
torch files; what they hold is in `test_noise_triton.py`.
"""

import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
import triton.language as tl

from denim.kernels import noise_triton

# Errors that are added to the results of lg2, and of sin and cos. They are set before each launch: the interpreter
# reads globals as Python does.
LG2_ERROR = 0.0
SINE_ERROR = 0.0


# PTX bounds the absolute error of lg2 for arguments in (0.5, 2), and the error relative to the result elsewhere.
@triton.jit
def erring_log2(x, INSTRUCTIONS: tl.constexpr):
    exact = tl.log2(x)
    return exact + LG2_ERROR * tl.maximum(1.0, tl.abs(exact))


@triton.jit
def erring_cos(word, INSTRUCTIONS: tl.constexpr):
    return tl.cos(word * (math.pi * 2.0**-31)) + SINE_ERROR


@triton.jit
def erring_sin(word, INSTRUCTIONS: tl.constexpr):
    return tl.sin(word * (math.pi * 2.0**-31)) + SINE_ERROR


@triton.jit
def without_series(first, second, INSTRUCTIONS: tl.constexpr):
    h = noise_triton._signed(first) * 2.0**-32 + 2.0**-33
    squared = -2.0 * math.log(2.0) * noise_triton._log2(tl.where(h > 0, h, 1 + h), INSTRUCTIONS)
    radius = tl.sqrt(squared)
    angle = noise_triton._signed(second)
    return radius * noise_triton._cos(angle, INSTRUCTIONS), radius * noise_triton._sin(angle, INSTRUCTIONS)


@triton.jit
def with_plain_u(first, second, INSTRUCTIONS: tl.constexpr):
    """The naive arithmetic: u itself in float32, which has no number between 1 - 2^-24 and 1."""
    u = first.to(tl.float32) * 2.0**-32 + 2.0**-33
    radius = tl.sqrt(-2.0 * math.log(2.0) * noise_triton._log2(u, INSTRUCTIONS))
    angle = noise_triton._signed(second)
    return radius * noise_triton._cos(angle, INSTRUCTIONS), radius * noise_triton._sin(angle, INSTRUCTIONS)


@triton.jit
def kernel(words, out, N: tl.constexpr, NORMALS: tl.constexpr):
    i = tl.arange(0, N)
    first, second = tl.load(words + i).to(tl.uint32), tl.load(words + N + i).to(tl.uint32)
    cosine, sine = NORMALS(first, second, "plain")
    tl.store(out + i, cosine)
    tl.store(out + N + i, sine)


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=True)
    words = given["words"]
    noise_triton._log2, noise_triton._cos, noise_triton._sin = erring_log2, erring_cos, erring_sin
    functions = {"pinned": noise_triton.normals, "without series": without_series, "plain u": with_plain_u}
    answers = {}
    for name, normals in functions.items():
        answers[name] = []
        for errors in given["errors"]:
            globals().update(zip(("LG2_ERROR", "SINE_ERROR"), errors, strict=True))
            out = torch.full(words.shape, float("nan"), dtype=torch.float32)
            # The naive arithmetic takes roots of negative numbers, which warns; the contract's must not warn.
            with np.errstate(invalid="raise" if name == "pinned" else "ignore"):
                kernel[(1,)](words, out, N=words.shape[1], NORMALS=normals)
            answers[name].append(out)
    torch.save({name: torch.stack(outs) for name, outs in answers.items()}, outputs)


main(*sys.argv[1:])
