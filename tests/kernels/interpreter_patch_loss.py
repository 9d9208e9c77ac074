"""Run the Triton source in Triton's interpreter: `python interpreter_patch_loss.py INPUTS OUTPUTS`.

A process of its own, since Triton decides between interpreter and compiler when it is imported. INPUTS and OUTPUTS are
torch files; what they hold is in `test_patch_loss_triton.py`.
"""

import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch

from denim.kernels import dispatch
from denim.kernels import patch_loss_triton as kernel

GPU = dispatch.GPU("plain", 32)
# A mask that selects nothing gives 0 / 0, and NaN inputs give NaN: no errors. Overflow stays an error.
warnings.filterwarnings("ignore", "invalid value|divide by zero", RuntimeWarning)


def launched(case: dict) -> list[torch.Tensor]:
    """Loss and gradient."""
    grad, block = case["grad"], {"gpu": GPU} | case.get("block", {})
    return [
        kernel.launch(*case["inputs"], **block),
        kernel.launch_backward(grad, *case["inputs"], **block),
    ]


def dispatched(case: dict) -> tuple[list[torch.Tensor], int]:
    """What the operators' CUDA kernels answer, and how often they launched Triton."""
    launches = []
    originals = kernel.launch, kernel.launch_backward

    def counting(launch):
        def counted(*args, **kwargs):
            launches.append(None)
            return launch(*args, **kwargs)

        return counted

    kernel.launch, kernel.launch_backward = map(counting, originals)
    dispatch.gpu_of = lambda device: GPU
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        loss = torch.library.get_kernel("denim::patch_loss", "CUDA").call_boxed(keys, *case["inputs"])
        backward = torch.library.get_kernel("denim::patch_loss_backward", "CUDA")
        return [loss, backward.call_boxed(keys, case["grad"], *case["inputs"])], len(launches)
    finally:
        kernel.launch, kernel.launch_backward = originals


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=True)
    # Memory that a kernel does not write is NaN.
    empty = torch.empty
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))
    results = {name: launched(case) for name, case in given["cases"].items()}
    again = {name: launched(given["cases"][name]) for name in given["again"]}
    torch.empty = empty
    answers = {name: dispatched(case) for name, case in given["dispatch"].items()}
    torch.save({"results": results, "again": again, "dispatch": answers}, outputs)


main(*sys.argv[1:])
