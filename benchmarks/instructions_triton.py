# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Measures the generator's approximate instructions over all words on a GPU, against float64 functions of the GPU."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels import noise_triton
from denim.kernels.memory_triton import on_device

__all__ = ["MEASURES", "Worst", "instruction_errors", "normals_errors", "philox_words"]

# lg2 as PTX bounds it: absolute for arguments in (1/2, 2), relative to the result elsewhere, and only where the series
# does not replace it. Cosine and sine once for the instruction at the argument it is given, once for the angle meant.
MEASURES = ("lg2", "cos", "sin", "cosine of the angle", "sine of the angle", "radius")


class Worst(NamedTuple):
    """The largest error that was found, and the word that it was found at."""

    error: float
    word: int


@triton.jit
def _worse(best, exact, approximate, word):
    # Bits of non-negative floats sort as the floats do, and NaN above all: one maximum keeps the error and its word.
    error = tl.abs(exact - approximate.to(tl.float64)).to(tl.float32)
    return tl.maximum(best, (error.to(tl.int32, bitcast=True).to(tl.int64) << 32) | word.to(tl.int64))


@triton.jit
def _radius(word):
    return tl.sqrt(-2 * tl.log((word.to(tl.float64) + 0.5) * 2.0**-32))


@triton.jit
def instruction_errors_kernel(out, start, steps, BLOCK: tl.constexpr, INSTRUCTIONS: tl.constexpr):
    """One program: `steps` blocks of consecutive words. Measures are rows of out, programs its columns."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    position = start + tl.program_id(0).to(tl.int64) * steps * BLOCK + lane
    none = tl.zeros((BLOCK,), tl.int64)
    lg2, cos, sin, cosine, sine, radius = none, none, none, none, none, none
    for _ in range(steps):
        word = position.to(tl.uint32)
        signed = noise_triton._signed(word)
        h = signed * 2.0**-32 + 2.0**-33
        u = tl.where(h > 0, h, 1 + h)
        series = (h > -(2.0**-6)) & ~(h > 0)
        exact = tl.log(u.to(tl.float64)) * (1 / math.log(2.0))
        scale = tl.where(series, 0.0, 1 / tl.maximum(1.0, tl.abs(exact)))
        # The result of the instruction may be NaN where it is not used.
        answer = tl.where(series, 0.0, noise_triton._log2(u, INSTRUCTIONS)).to(tl.float64)
        lg2 = _worse(lg2, exact * scale, answer * scale, word)
        if INSTRUCTIONS == "gcn":
            argument = (signed * 2.0**-32).to(tl.float64) * (2 * math.pi)
        else:
            argument = (signed * (math.pi * 2.0**-31)).to(tl.float64)
        angle = word.to(tl.int32, bitcast=True).to(tl.float64) * (math.pi * 2.0**-31)
        c = noise_triton._cos(signed, INSTRUCTIONS)
        s = noise_triton._sin(signed, INSTRUCTIONS)
        cos = _worse(cos, tl.cos(argument), c, word)
        sin = _worse(sin, tl.sin(argument), s, word)
        cosine = _worse(cosine, tl.cos(angle), c, word)
        sine = _worse(sine, tl.sin(angle), s, word)
        # At angle 0 the first normal is the radius.
        r, _ = noise_triton.normals(word, tl.zeros_like(word), INSTRUCTIONS)
        radius = _worse(radius, _radius(word), r, word)
        position += BLOCK
    place = out + tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(place, tl.max(lg2, 0))
    tl.store(place + programs, tl.max(cos, 0))
    tl.store(place + 2 * programs, tl.max(sin, 0))
    tl.store(place + 3 * programs, tl.max(cosine, 0))
    tl.store(place + 4 * programs, tl.max(sine, 0))
    tl.store(place + 5 * programs, tl.max(radius, 0))


@triton.jit
def normals_errors_kernel(out, start, steps, second, BLOCK: tl.constexpr, INSTRUCTIONS: tl.constexpr):
    """As above, the whole generator at one angle: the larger error of both normals."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    position = start + tl.program_id(0).to(tl.int64) * steps * BLOCK + lane
    worst = tl.zeros((BLOCK,), tl.int64)
    for _ in range(steps):
        word = position.to(tl.uint32)
        other = (tl.zeros((BLOCK,), tl.int64) + second).to(tl.uint32)
        c, s = noise_triton.normals(word, other, INSTRUCTIONS)
        radius = _radius(word)
        angle = other.to(tl.int32, bitcast=True).to(tl.float64) * (math.pi * 2.0**-31)
        worst = _worse(worst, radius * tl.cos(angle), c, word)
        worst = _worse(worst, radius * tl.sin(angle), s, word)
        position += BLOCK
    tl.store(out + tl.program_id(0), tl.max(worst, 0))


@triton.jit
def philox_words_kernel(seeds, out, groups, BLOCK: tl.constexpr):
    group = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + tl.program_id(0))
    zero = tl.zeros((BLOCK,), tl.uint32)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = noise_triton.philox(group.to(tl.uint32), (group >> 32).to(tl.uint32), zero, zero, low, high)
    place = out + (tl.program_id(0).to(tl.int64) * groups + group) * 4
    tl.store(place, w0.to(tl.int64), mask=group < groups)
    tl.store(place + 1, w1.to(tl.int64), mask=group < groups)
    tl.store(place + 2, w2.to(tl.int64), mask=group < groups)
    tl.store(place + 3, w3.to(tl.int64), mask=group < groups)


def _grid(count: int, block: int) -> tuple[int, int]:
    """Programs, and blocks per program, that make up `count` words."""
    programs = min(4096, count // block)
    if count % (programs * block):
        raise ValueError(f"the number of words must be a power of two of at least {block}, got {count}")
    return programs, count // (programs * block)


def _worst(keys: Tensor) -> Worst:
    key = keys.amax()
    error = (key >> 32).to(torch.int32).view(torch.float32)
    return Worst(float(error), int(key) & 0xFFFFFFFF)


def instruction_errors(
    device: torch.device, instructions: str, start: int = 0, count: int = 1 << 32, block: int = 256
) -> dict[str, Worst]:
    """Largest error of every measure over `count` (a power of two) words from `start` on."""
    programs, steps = _grid(count, block)
    out = torch.full((len(MEASURES), programs), -1, dtype=torch.int64, device=device)
    with on_device(device):
        instruction_errors_kernel[(programs,)](out, start, steps, BLOCK=block, INSTRUCTIONS=instructions)
    return {name: _worst(row) for name, row in zip(MEASURES, out, strict=True)}


def normals_errors(
    device: torch.device, instructions: str, second: int, start: int = 0, count: int = 1 << 32, block: int = 256
) -> Worst:
    """Largest error of both normals over `count` first words from `start` on, at the second word `second`."""
    programs, steps = _grid(count, block)
    out = torch.full((programs,), -1, dtype=torch.int64, device=device)
    with on_device(device):
        normals_errors_kernel[(programs,)](out, start, steps, second, BLOCK=block, INSTRUCTIONS=instructions)
    return _worst(out)


def philox_words(seeds: Tensor, groups: int, block: int = 256) -> Tensor:
    """Words of the kernels' generator for seeds (N,): int64 holding uint32 values, (N, 4 * groups)."""
    out = torch.full((seeds.numel(), 4 * groups), -1, dtype=torch.int64, device=seeds.device)
    with on_device(seeds.device):
        philox_words_kernel[(seeds.numel(), triton.cdiv(groups, block))](seeds.contiguous(), out, groups, BLOCK=block)
    return out
