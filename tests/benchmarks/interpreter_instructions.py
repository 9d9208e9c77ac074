"""Run the kernels that measure the instructions in Triton's interpreter: `python interpreter_instructions.py OUTPUT`.

A process of its own, since Triton decides between interpreter and compiler when it is imported. OUTPUT is a torch file;
what it holds is in `test_gpu_check.py`.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

from denim.benchmarks import instructions_triton
from denim.kernels import noise_triton

LG2, COS, SIN = noise_triton._log2, noise_triton._cos, noise_triton._sin
CPU, COUNT = torch.device("cpu"), 1 << 12


# Each errs for one word alone.
@triton.jit
def lg2_erring_at_word_100(x, INSTRUCTIONS: tl.constexpr):
    return LG2(x, INSTRUCTIONS) + tl.where(x == 100 * 2.0**-32 + 2.0**-33, 1.0, 0.0)


@triton.jit
def cos_erring_at_word_200(word, INSTRUCTIONS: tl.constexpr):
    return COS(word, INSTRUCTIONS) - tl.where(word == 200, 2.0**-6, 0.0)


@triton.jit
def sin_erring_at_word_300(word, INSTRUCTIONS: tl.constexpr):
    return tl.where(word == 300, float("nan"), SIN(word, INSTRUCTIONS))


def main(output: str) -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, 5])
    answers = {"words": instructions_triton.philox_words(seeds, 300)}
    starts = {"u = 0": 0, "u = 1/2": (1 << 31) - (1 << 11), "series": (1 << 32) - (1 << 26) - (1 << 11)}
    for name, start in (starts | {"u = 1": (1 << 32) - (1 << 12)}).items():
        answers[name] = instructions_triton.instruction_errors(CPU, "plain", start, COUNT, block=COUNT)
        answers[f"{name}, normals"] = instructions_triton.normals_errors(CPU, "plain", 12345, start, COUNT, block=1024)
    noise_triton._log2, noise_triton._cos, noise_triton._sin = (
        lg2_erring_at_word_100,
        cos_erring_at_word_200,
        sin_erring_at_word_300,
    )
    answers["erring"] = instructions_triton.instruction_errors(CPU, "plain", 0, COUNT, block=512)
    answers["erring, normals"] = instructions_triton.normals_errors(CPU, "plain", 200, COUNT, COUNT, block=COUNT)
    answers["erring, one angle"] = instructions_triton.normals_errors(CPU, "plain", 300, COUNT, COUNT, block=COUNT)
    torch.save({name: _plain(answer) for name, answer in answers.items()}, output)


def _plain(answer):
    """Named tuples as plain ones, which torch loads without executing anything."""
    if isinstance(answer, dict):
        return {name: tuple(worst) for name, worst in answer.items()}
    return answer if torch.is_tensor(answer) else tuple(answer)


main(*sys.argv[1:])
