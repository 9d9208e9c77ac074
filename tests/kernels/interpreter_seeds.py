"""Run `derive_seeds` and `noise_words` by Triton in its interpreter: `python interpreter_seeds.py INPUTS OUTPUTS`.

A process of its own, since Triton decides between interpreter and compiler when it is imported. INPUTS is a torch file
of {"derive_seeds": [arguments, ...], "noise_words": [arguments, ...]} of the operators; OUTPUTS has their results in
the places of the arguments.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from denim.kernels import derive_seeds, dispatch, seeds_triton

launches = []


def counted(launch):
    def run(*args, **kwargs):
        launches.append(launch)
        return launch(*args, **kwargs)

    return run


def main(inputs: str, outputs: str) -> None:
    given = torch.load(inputs, weights_only=True)
    seeds_triton.launch, seeds_triton.launch_words = counted(seeds_triton.launch), counted(seeds_triton.launch_words)
    assert derive_seeds(0, 0, torch.arange(2)).shape == (2,)
    assert not launches
    with dispatch.triton_on_cpu(dispatch.GPU("plain", 32)):
        got = {
            name: [getattr(torch.ops.denim, name)(*arguments) for arguments in calls] for name, calls in given.items()
        }
    assert len(launches) == sum(map(len, got.values()))
    torch.save(got, outputs)


main(*sys.argv[1:])
