"""Run the kernels of `attack_step` and `decode_patches` in Triton's interpreter.

`python interpreter_attack_decode.py INPUTS OUTPUTS`: a process of its own, since Triton decides between interpreter and
compiler when it is imported. INPUTS is a torch file of {name: (function, arguments)}, OUTPUTS one of {name: (result,
number of launches)}.
"""

import math
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"

import torch

from denim.kernels import attack_step_triton, decode_patches_triton

GUARD = 256
LAUNCHES = {
    "attack_step": (attack_step_triton, "launch"),
    "decode_patches": (decode_patches_triton, "launch"),
    "decode_patches_backward": (decode_patches_triton, "launch_backward"),
}
allocations = []


def poisoned(shape, *, dtype=torch.float32, device="cpu"):
    """`torch.empty` in the midst of NaN: what a kernel forgets to write shows, and what it writes beside it too."""
    size = math.prod(shape)
    memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    allocations.append(memory)
    return memory[GUARD : GUARD + size].view(shape)


def launched(function: str, arguments: tuple):
    module, name = LAUNCHES[function]
    empty = torch.empty
    torch.empty = poisoned
    try:
        result = getattr(module, name)(*arguments, warp_size=32)
    finally:
        torch.empty = empty
    for memory in allocations:
        assert memory[:GUARD].isnan().all(), f"{function} wrote before its output"
        assert memory[-GUARD:].isnan().all(), f"{function} wrote behind its output"
    allocations.clear()
    return result


def dispatched(function: str, arguments: tuple):
    """What the operator's CUDA kernel answers, and how often it launched Triton."""
    module, name = LAUNCHES[function]
    launch, count = getattr(module, name), []

    def counted(*args, **kwargs):
        count.append(None)
        return launch(*args, **kwargs)

    setattr(module, name, counted)
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(warp_size=32)
    operator = torch.library.get_kernel(f"denim::{function}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        return operator.call_boxed(keys, *arguments), len(count)
    finally:
        setattr(module, name, launch)


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=True)
    got = {name: launched(*case) for name, case in given["launch"].items()}
    answers = {name: dispatched(*case) for name, case in given["dispatch"].items()}
    torch.save({"launch": got, "dispatch": answers}, outputs)


main(*sys.argv[1:])
