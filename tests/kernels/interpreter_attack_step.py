"""The end of huge tensors in Triton's interpreter: `python interpreter_attack_step.py INPUTS OUTPUTS`.

A process of its own, since Triton decides between interpreter and compiler when it is imported. INPUTS is a torch file
of {name: arguments of `end_of_huge`}, OUTPUTS one of {name: result}.
"""

import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from denim.benchmarks.case import FORWARD, Case
from denim.benchmarks.machine_code.cases import launch
from denim.benchmarks.machine_code.last_program import LastProgram, reserved
from denim.kernels import attack_step_triton
from denim.kernels.dispatch import GPU


def end_of_huge(case: Case, shape: tuple, ends: list, others: tuple) -> torch.Tensor:
    """The last elements of the result for tensors of a huge shape, of which only the last elements are given."""
    kernel, count = case.triton_kernels[FORWARD], len(ends[0])

    def ending(shape, *, dtype, device="cpu", end=math.nan):
        memory = reserved(shape, dtype=dtype)
        memory.view(-1)[-count:] = end
        return memory

    tensors = [ending(shape, dtype=end.dtype, end=end) for end in ends]
    empty, whole = torch.empty, getattr(attack_step_triton, kernel)
    torch.empty = ending
    setattr(attack_step_triton, kernel, LastProgram(whole))
    try:
        return launch(case, FORWARD, (*tensors, *others), GPU("plain", 32)).view(-1)[-count:].clone()
    finally:
        torch.empty = empty
        setattr(attack_step_triton, kernel, whole)


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=False)
    torch.save({name: end_of_huge(*case) for name, case in given.items()}, outputs)


main(*sys.argv[1:])
