"""Run the naive kernel in Triton's interpreter: `python interpreter_baselines.py INPUTS OUTPUTS`, torch files."""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from denim.benchmarks import baselines_triton


def main(inputs: str, outputs: str) -> None:
    cases = torch.load(inputs, weights_only=True)
    empty = torch.empty
    # Memory that the kernel forgets to write shows up as NaN.
    torch.empty = lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))
    torch.save({name: baselines_triton.launch(**case) for name, case in cases.items()}, outputs)


main(*sys.argv[1:])
