"""Run launches of cases in Triton's interpreter: `python interpreter_cases.py INPUTS OUTPUTS`.

A process of its own, since Triton decides between interpreter and compiler when it is imported. INPUTS is a torch file
of {"launch": {key: (case of `denim.benchmarks.cases`, pass, arguments of the launcher, further options)}, "dispatch":
{key: (name of the operator, arguments)}}; OUTPUTS one of {"launch": {key: result}, "dispatch": {key: (result, number of
launches)}}.
"""

import math
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch

from denim.benchmarks.machine_code.cases import launch
from denim.kernels import dispatch

GUARD = 256
PLAIN = dispatch.GPU("plain", 32)
# A mask that selects nothing gives 0 / 0, and NaN inputs give NaN: no errors. Overflow stays an error.
warnings.filterwarnings("ignore", "invalid value|divide by zero", RuntimeWarning)


def launched(jobs: dict) -> dict:
    """What the launchers return; fails where a kernel writes beside its output."""
    empty, allocations, got = torch.empty, [], {}

    def poisoned(shape, *, dtype=torch.float32, device="cpu"):
        """`torch.empty` filled with NaN, with NaN before and behind: missing writes and writes outside are found."""
        shape = (shape,) if isinstance(shape, int) else shape
        size = math.prod(shape)
        memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        allocations.append(memory)
        return memory[GUARD : GUARD + size].view(shape)

    for key, (case, part, arguments, options) in jobs.items():
        torch.empty = poisoned
        try:
            got[key] = launch(case, part, arguments, PLAIN, **options)
        finally:
            torch.empty = empty
        for memory in allocations:
            assert memory[:GUARD].isnan().all(), f"{key}: wrote before its output"
            assert memory[-GUARD:].isnan().all(), f"{key}: wrote behind its output"
        allocations.clear()
    return got


def dispatched(operator: str, arguments: tuple) -> tuple:
    """What the operator's CUDA kernel answers, and how often it launched Triton."""
    count, launcher = [], dispatch.launcher

    def counting(name):
        serves, launch = launcher(name)

        def counted(*args, **kwargs):
            count.append(name)
            return launch(*args, **kwargs)

        return serves, counted

    dispatch.launcher, dispatch.gpu_of = counting, lambda device: PLAIN
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        return torch.library.get_kernel(f"denim::{operator}", "CUDA").call_boxed(keys, *arguments), len(count)
    finally:
        dispatch.launcher = launcher


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=False)
    answers = {key: dispatched(*job) for key, job in given.get("dispatch", {}).items()}
    torch.save({"launch": launched(given.get("launch", {})), "dispatch": answers}, outputs)


main(*sys.argv[1:])
