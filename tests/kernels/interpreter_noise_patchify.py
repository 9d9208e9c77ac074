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
from last_program import LastProgram, reserved

from denim.kernels import dispatch, noise_triton
from denim.kernels import noise_patchify_triton as kernel


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


GPU = dispatch.GPU("plain", 32)
LAUNCHES = {
    "noise_patchify": lambda **case: kernel.launch(**case, gpu=GPU),
    "noise_patchify_backward": lambda **case: kernel.launch_backward(**case, gpu=GPU),
}


def launched(function: str, case: dict) -> torch.Tensor:
    """The result, which is NaN where the kernel wrote nothing."""
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))
    try:
        return LAUNCHES[function](**case)
    finally:
        torch.empty = empty


def dispatched(function: str, case: dict) -> tuple[torch.Tensor, int]:
    """What the operator's CUDA kernel answers, and how often it launched Triton."""
    name = {"noise_patchify": "launch", "noise_patchify_backward": "launch_backward"}[function]
    launches, launch = [], getattr(kernel, name)

    def counted(*args, **kwargs):
        launches.append(None)
        return launch(*args, **kwargs)

    setattr(kernel, name, counted)
    dispatch.gpu_of = lambda device: GPU
    operator = torch.library.get_kernel(f"denim::{function}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        return operator.call_boxed(keys, *case.values()), len(launches)
    finally:
        setattr(kernel, name, launch)


def last_of_many(function: str, batch: int, case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The last sample of a huge batch, of which only the last program runs; and the result for this sample alone.

    Args:
        function: which operator.
        batch: samples of the huge batch.
        case: arguments for one sample.
    """
    many, empty = dict(case), torch.empty
    for name in ("images", "sigma", "seeds", "grad"):
        if name in case:
            dim = {"sigma": -1, "seeds": -1, "images": 0, "grad": -3}[name]
            shape = list(case[name].shape)
            shape[dim] = batch
            many[name] = reserved(shape, dtype=case[name].dtype)
            many[name].narrow(dim, batch - 1, 1).copy_(case[name])

    def last_sample(out):
        return out[..., -1:, :, :] if function == "noise_patchify" else out[-1:]

    def marked(*args, **kwargs):
        out = reserved(*args, **kwargs)
        last_sample(out).fill_(float("nan"))
        return out

    forward, backward = kernel.noise_patchify_kernel, kernel.noise_patchify_backward_kernel
    kernel.noise_patchify_kernel = LastProgram(forward)
    kernel.noise_patchify_backward_kernel = LastProgram(backward)
    torch.empty = marked
    try:
        return tuple(last_sample(LAUNCHES[function](**arguments)).clone() for arguments in (many, case))
    finally:
        torch.empty = empty
        kernel.noise_patchify_kernel, kernel.noise_patchify_backward_kernel = forward, backward


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=True)
    counters, keys, words = given["counters"], given["keys"], given["normal_words"]
    philox = torch.empty_like(counters)
    philox_kernel[(1,)](counters, keys, philox, N=counters.shape[1])
    normals = torch.empty(words.shape, dtype=torch.float32)
    normals_kernel[(1,)](words, normals, N=words.shape[1])
    got = {
        "philox": philox,
        "normals": normals,
        "patches": {name: launched("noise_patchify", case) for name, case in given["cases"].items()},
        "pixels": {name: launched("noise_patchify_backward", case) for name, case in given["backward"].items()},
        "dispatch": {name: dispatched(*case) for name, case in given["dispatch"].items()},
        "huge": {name: last_of_many(*case) for name, case in given["huge"].items()},
    }
    torch.save(got, outputs)


main(*sys.argv[1:])
