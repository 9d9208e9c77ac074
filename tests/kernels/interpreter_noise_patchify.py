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

from denim.kernels import noise_patchify_triton as kernel
from denim.kernels import noise_triton


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


def dispatched(arguments: dict) -> tuple[torch.Tensor, int]:
    """What the operator's CUDA kernel answers, and how often it launched Triton."""
    launches = []
    launch = kernel.launch

    def counted(*args, **kwargs):
        launches.append(None)
        return launch(*args, **kwargs)

    kernel.launch, noise_triton.instruction_set = counted, lambda device: "plain"
    operator = torch.library.get_kernel("denim::noise_patchify", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        return operator.call_boxed(keys, *arguments.values()), len(launches)
    finally:
        kernel.launch = launch


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=True)
    counters, keys, words = given["counters"], given["keys"], given["normal_words"]
    philox = torch.empty_like(counters)
    philox_kernel[(1,)](counters, keys, philox, N=counters.shape[1])
    normals = torch.empty(words.shape, dtype=torch.float32)
    normals_kernel[(1,)](words, normals, N=words.shape[1])

    # Memory that the kernel forgets to write shows up as NaN.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))
    patches = {name: kernel.launch(**case, instructions="plain") for name, case in given["cases"].items()}
    torch.empty = empty

    answers = {name: dispatched(case) for name, case in given["dispatch"].items()}
    torch.save({"philox": philox, "normals": normals, "patches": patches, "dispatch": answers}, outputs)


main(*sys.argv[1:])
