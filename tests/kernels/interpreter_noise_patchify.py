"""Run the Triton source in Triton's interpreter: `python interpreter_noise_patchify.py INPUTS OUTPUTS`.

A process of its own, since Triton decides between interpreter and compiler when it is imported. INPUTS and OUTPUTS are
torch files; what they hold is in `test_noise_patchify_triton.py`.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

from denim.benchmarks.case import FORWARD
from denim.benchmarks.cases import NoisePatchify
from denim.benchmarks.machine_code.cases import launch
from denim.benchmarks.machine_code.last_program import LastProgram, reserved
from denim.kernels import noise_patchify_triton as kernel
from denim.kernels import noise_triton
from denim.kernels.dispatch import GPU


@triton.jit
def philox_kernel(counters, keys, words, N: tl.constexpr):
    i = tl.arange(0, N)
    w0, w1, w2, w3 = noise_triton.philox(
        tl.load(counters + i).to(tl.uint32),
        tl.load(counters + N + i).to(tl.uint32),
        tl.load(counters + 2 * N + i).to(tl.uint32),
        tl.load(counters + 3 * N + i).to(tl.uint32),
        tl.load(keys + i).to(tl.uint32),
        tl.load(keys + N + i).to(tl.uint32),
    )
    tl.store(words + i, w0.to(tl.int64))
    tl.store(words + N + i, w1.to(tl.int64))
    tl.store(words + 2 * N + i, w2.to(tl.int64))
    tl.store(words + 3 * N + i, w3.to(tl.int64))


@triton.jit
def normals_kernel(words, out, N: tl.constexpr):
    i = tl.arange(0, N)
    first, second = tl.load(words + i).to(tl.uint32), tl.load(words + N + i).to(tl.uint32)
    cosine, sine = noise_triton.normals(first, second, "plain")
    tl.store(out + i, cosine)
    tl.store(out + N + i, sine)


def last_of_many(part: str, batch: int, case: NoisePatchify, alone: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """The last sample of a huge batch, of which only the last program runs; and the result for this sample alone.

    Args:
        part: forward or backward.
        batch: samples of the huge batch.
        case: of one sample.
        alone: arguments for the one sample.
    """
    # The batch is the first dimension of images, the last of levels and seeds, and the third last of gradients.
    dims = (0, -1, -1) if part == FORWARD else (-3,)
    many = list(alone)
    for place, dim in enumerate(dims):
        shape = list(alone[place].shape)
        shape[dim] = batch
        many[place] = reserved(shape, dtype=alone[place].dtype)
        many[place].narrow(dim, batch - 1, 1).copy_(alone[place])

    def last_sample(out):
        return out[..., -1:, :, :] if part == FORWARD else out[-1:]

    def marked(*args, **kwargs):
        out = reserved(*args, **kwargs)
        last_sample(out).fill_(float("nan"))
        return out

    empty, forward, backward = torch.empty, kernel.noise_patchify_kernel, kernel.noise_patchify_backward_kernel
    kernel.noise_patchify_kernel = LastProgram(forward)
    kernel.noise_patchify_backward_kernel = LastProgram(backward)
    torch.empty = marked
    try:
        return tuple(last_sample(launch(case, part, given, GPU("plain", 32))).clone() for given in (many, alone))
    finally:
        torch.empty = empty
        kernel.noise_patchify_kernel, kernel.noise_patchify_backward_kernel = forward, backward


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=False)
    counters, keys, words = given["counters"], given["keys"], given["normal_words"]
    philox = torch.empty_like(counters)
    philox_kernel[(1,)](counters, keys, philox, N=counters.shape[1])
    normals = torch.empty(words.shape, dtype=torch.float32)
    normals_kernel[(1,)](words, normals, N=words.shape[1])
    got = {
        "philox": philox,
        "normals": normals,
        "huge": {name: last_of_many(*case) for name, case in given["huge"].items()},
    }
    torch.save(got, outputs)


main(*sys.argv[1:])
