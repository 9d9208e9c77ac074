"""Build the kernels of `seeds_triton` ahead of time: `python build_seeds.py OUTPUT`.

A process of its own, since builds need a driver without a device. OUTPUT is a JSON file: for each target what the
machine code of both kernels takes.
"""

import json
import sys
from pathlib import Path

import torch

from denim.benchmarks.machine_code.builds import TARGETS, build, unavailable
from denim.benchmarks.machine_code.disassembly import machine_code
from denim.kernels import seeds_triton
from denim.kernels.dispatch import GPU


def main(output: str) -> None:
    ids = torch.empty(64, dtype=torch.int64, device="meta")
    some = torch.empty(4, 1, dtype=torch.int64, device="meta")
    report = {}
    for name, target in TARGETS.items():
        if unavailable(name):
            continue
        gpu = GPU("ptx" if target.backend == "cuda" else "gcn", target.warp_size)
        kernels = [seeds_triton.seeds_kernel, seeds_triton.words_kernel]

        def launch(gpu=gpu) -> None:
            seeds_triton.launch(ids, 1, 2**40, 3, 0, None, None, some, gpu=gpu)
            seeds_triton.launch_words(ids, 196, 2, gpu=gpu)

        report[name] = [machine_code(built, target) for built in build(target, kernels, launch)]
    Path(output).write_text(json.dumps(report))


main(*sys.argv[1:])
