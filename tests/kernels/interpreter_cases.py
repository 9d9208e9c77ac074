"""Run launches of cases in Triton's interpreter: `python interpreter_cases.py INPUTS OUTPUTS`.

A process of its own, since Triton decides between interpreter and compiler when it is imported. INPUTS is a torch file
of {key: (case of `denim.benchmarks.cases`, pass, arguments of the launcher, further options)}, OUTPUTS one of
{key: result}.
"""

import math
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"

import torch

from denim.benchmarks.machine_code.cases import launch
from denim.kernels.dispatch import GPU

GUARD = 256
PLAIN = GPU("plain", 32)
# A mask that selects nothing gives 0 / 0, and NaN inputs give NaN: no errors. Overflow stays an error.
warnings.filterwarnings("ignore", "invalid value|divide by zero", RuntimeWarning)


def main(inputs: str, outputs: str) -> None:
    empty, allocations = torch.empty, []

    def poisoned(shape, *, dtype=torch.float32, device="cpu"):
        """`torch.empty` filled with NaN, with NaN before and behind: missing writes and writes outside are found."""
        shape = (shape,) if isinstance(shape, int) else shape
        size = math.prod(shape)
        memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        allocations.append(memory)
        return memory[GUARD : GUARD + size].view(shape)

    got = {}
    for key, (case, part, arguments, options) in torch.load(inputs, weights_only=False).items():
        torch.empty = poisoned
        try:
            got[key] = launch(case, part, arguments, PLAIN, **options)
        finally:
            torch.empty = empty
        for memory in allocations:
            assert memory[:GUARD].isnan().all(), f"{key}: wrote before its output"
            assert memory[-GUARD:].isnan().all(), f"{key}: wrote behind its output"
        allocations.clear()
    torch.save(got, outputs)


main(*sys.argv[1:])
