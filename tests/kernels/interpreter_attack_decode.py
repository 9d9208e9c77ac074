"""Run the kernels of `attack_step`, `attack_start` and `decode_patches` in Triton's interpreter.

`python interpreter_attack_decode.py INPUTS OUTPUTS`: a process of its own, since Triton decides between interpreter and
compiler when it is imported. INPUTS is a torch file of {"launch": {name: (function, arguments, options)}, "dispatch":
{name: (function, arguments)}, "huge": {name: arguments of `end_of_huge`}}, options and the last entry may be left out;
OUTPUTS one of {"launch": {name: result}, "dispatch": {name: (result, number of launches)}, "huge": {name: result}}.
"""

import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from last_program import LastProgram, reserved

from denim.kernels import attack_step_triton, decode_patches_triton, dispatch

GPU = dispatch.GPU("plain", 32)
GUARD = 256
LAUNCHES = {
    "attack_step": (attack_step_triton, "launch"),
    "attack_start": (attack_step_triton, "launch_start"),
    "decode_patches": (decode_patches_triton, "launch"),
    "decode_patches_backward": (decode_patches_triton, "launch_backward"),
}
allocations = []


def poisoned(shape, *, dtype=torch.float32, device="cpu"):
    """`torch.empty` filled with NaN, with NaN before and behind: missing writes and writes outside can be found."""
    size = math.prod(shape)
    memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    allocations.append(memory)
    return memory[GUARD : GUARD + size].view(shape)


def launched(function: str, arguments: tuple, options: dict | None = None):
    module, name = LAUNCHES[function]
    empty = torch.empty
    torch.empty = poisoned
    try:
        result = getattr(module, name)(*arguments, gpu=GPU, **(options or {}))
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
    dispatch.gpu_of = lambda device: GPU
    operator = torch.library.get_kernel(f"denim::{function}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        return operator.call_boxed(keys, *arguments), len(count)
    finally:
        setattr(module, name, launch)


def end_of_huge(function: str, kernel: str, shape: tuple, ends: list, others: tuple) -> torch.Tensor:
    """The last elements of the result for tensors of a huge shape, of which only the last elements are given."""
    module, name = LAUNCHES[function]
    count = len(ends[0])

    def ending(shape, *, dtype, device="cpu", end=math.nan):
        memory = reserved(shape, dtype=dtype)
        memory.view(-1)[-count:] = end
        return memory

    tensors = [ending(shape, dtype=end.dtype, end=end) for end in ends]
    empty, whole = torch.empty, getattr(module, kernel)
    torch.empty = ending
    setattr(module, kernel, LastProgram(whole))
    try:
        return getattr(module, name)(*tensors, *others, gpu=GPU).view(-1)[-count:].clone()
    finally:
        torch.empty = empty
        setattr(module, kernel, whole)


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=True)
    got = {name: launched(*case) for name, case in given["launch"].items()}
    answers = {name: dispatched(*case) for name, case in given["dispatch"].items()}
    huge = {name: end_of_huge(*case) for name, case in given.get("huge", {}).items()}
    torch.save({"launch": got, "dispatch": answers, "huge": huge}, outputs)


main(*sys.argv[1:])
