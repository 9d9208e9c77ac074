"""Run the Triton kernels of `derive_seeds` and `noise_words`: `python triton_seeds.py INPUTS OUTPUTS HOW`.

HOW is "interpreted" (the source, in Triton's interpreter) or "compiled" (for sm_90, and executed on the CPU). A process
of its own, since Triton decides between the two when it is imported. INPUTS is a torch file of {"derive_seeds":
[arguments, ...], "noise_words": [arguments, ...]} of the operators; OUTPUTS has results in the places of the arguments.
"""

import contextlib
import os
import sys

if sys.argv[3] == "interpreted":
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from denim.benchmarks.machine_code.ptx.launch import run_on_cpu
from denim.kernels import derive_seeds, dispatch, seeds_triton

launches = []


def counted(launch):
    def run(*args, **kwargs):
        launches.append(launch)
        return launch(*args, **kwargs)

    return run


def main(inputs: str, outputs: str, how: str) -> None:
    given = torch.load(inputs, weights_only=True)
    seeds_triton.launch, seeds_triton.launch_words = counted(seeds_triton.launch), counted(seeds_triton.launch_words)
    assert derive_seeds(0, 0, torch.arange(2)).shape == (2,)
    assert not launches
    gpu, machine = dispatch.GPU("plain", 32), contextlib.nullcontext()
    if how == "compiled":
        gpu, machine = dispatch.GPU("ptx", 32), run_on_cpu(90)
    with dispatch.triton_on_cpu(gpu), machine:
        got = {
            name: [getattr(torch.ops.denim, name)(*arguments) for arguments in calls] for name, calls in given.items()
        }
    assert len(launches) == sum(map(len, got.values()))
    torch.save(got, outputs)


main(*sys.argv[1:])
