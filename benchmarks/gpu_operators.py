"""The parts of `benchmarks.gpu_check` that compare operators with their definitions.

Each part is a function of the kind of device and the name of the sizes that yields checks. On the CPU the operators run
their references, so every part also runs without a GPU, as the tests do at "tiny" sizes. Only the words and
instructions of the Triton kernels need a GPU (or the interpreter).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from denim import kernels
from denim.benchmarks.case import BF16, FP16, FP32, expected, passes, share_of_error
from denim.benchmarks.cases import OPERATIONS
from denim.benchmarks.exact_noise import CONTRACT, LARGEST, exact_noise
from denim.benchmarks.gpu_rows import SIZES, Row
from denim.kernels import Domain, Stream, derive_seeds, noise_words, normal_noise

__all__ = ["attention", "generator", "instructions", "operation", "relative_rms"]


def relative_rms(got: Tensor, exact: Tensor) -> float:
    """Root of the mean squared error over that of the exact values."""
    return float((got.double() - exact).square().mean().sqrt() / exact.double().square().mean().sqrt())


def generator(device: str, sizes: str) -> Iterator[Row]:
    """Words are those of the torch reference on the CPU, bit for bit; normals are within the contract."""
    ends = torch.tensor([0, 1, -1, -(2**63), 2**63 - 1, 0x0123456789ABCDEF])
    ids = torch.arange(-8, 8)
    seeds = torch.cat([ends, derive_seeds(2**40, Domain.TRAINING, ids, 3, 5)])
    derived = derive_seeds(2**40, Domain.TRAINING, ids.to(device), 3, 5).cpu()
    yield Row("derived seeds that differ from the CPU's", int((derived != seeds[len(ends) :]).sum()), limit=0)
    count = 4 * 523 + 3
    for stream in Stream:
        differing = noise_words(seeds.to(device), count, stream).cpu() != noise_words(seeds, count, stream)
        yield Row(f"words of {stream.name} that differ from the CPU's", int(differing.sum()), limit=0)
    if device == "cuda":
        from denim.benchmarks.instructions_triton import philox_words

        differing = philox_words(seeds.cuda(), 523).cpu() != noise_words(seeds, 4 * 523)
        yield Row("words of the kernels that differ from the torch reference's", int(differing.sum()), limit=0)
    # In pieces, so that memory does not grow with the number of draws.
    draws, worst = SIZES[sizes].draws, 0.0
    positions = min(draws, 1 << 20)
    for first in range(0, draws // positions, 4):
        some = derive_seeds(1, Domain.TRAINING, torch.arange(first, first + 4, device=device))
        error = (normal_noise(some, (positions,)).double() - exact_noise(some, positions)).abs().max()
        worst = max(worst, float(error)) if error == error else float("nan")
    yield Row(f"largest error of {max(draws, 4 * positions)} normals of `normal_noise`", worst, limit=CONTRACT)


def instructions(device: str, sizes: str) -> Iterator[Row]:
    """The error of lg2, sin and cos over all words, and of the normals that they make."""
    if device != "cuda":
        return
    from denim.benchmarks.instructions_triton import instruction_errors, normals_errors
    from denim.kernels.dispatch import gpu_of

    where, count = torch.device(device), SIZES[sizes].words
    kind = gpu_of(where).instructions
    worst = instruction_errors(where, kind, count=count)
    # The contract assumes these limits: PTX ISA, sections on lg2, sin and cos.
    limits = {"lg2": 2.0**-22, "cos": 2.0**-20.5, "sin": 2.0**-20.5}
    for name, (error, word) in worst.items():
        yield Row(f"{name}, {kind}: largest error over {count} words", error, "", limits.get(name), f"at {word:#010x}")
    for name in ("cosine of the angle", "sine of the angle"):
        error, word = normals_errors(where, kind, worst[name].word, count=count)
        what = f"normals: largest error over {count} first words, at the worst {name}"
        yield Row(what, error, "", CONTRACT, f"at {word:#010x}")
    trigonometric = max(worst[name].error for name in ("cosine of the angle", "sine of the angle"))
    # |r' c' - r c| <= |r' - r| |c| + r' |c' - c|, and half a unit for rounding the product.
    bound = worst["radius"].error + (LARGEST + worst["radius"].error) * trigonometric + 2.0**-22
    yield Row("normals: bound over all pairs of words that follows", bound, "", CONTRACT)


def operation(device: str, sizes: str, name: str) -> Iterator[Row]:
    """Every case of an operation against its definition in float64, forward and backward.

    Args:
        device: "cpu" or "cuda".
        sizes: a key of `SIZES`.
        name: of the operation, a key of `OPERATIONS`.
    """
    for case in OPERATIONS[name]:
        if getattr(case, "patch", SIZES[sizes].patch_sizes[0]) not in SIZES[sizes].patch_sizes:
            continue
        inputs = case.inputs(device)
        with torch.no_grad():
            result = case.fused(**inputs)
        upstream = case.upstream(inputs, result) if case.leaves else None
        got = passes(case.fused, inputs, case.leaves, upstream)()
        what = ("result", *(f"gradient of the {leaf}" for leaf in case.leaves))
        for part, value, exact, error in zip(what, got, *expected(case, inputs, upstream), strict=True):
            share = share_of_error(value.detach(), exact, error)
            yield Row(f"{case.name}: {part}", share, "of the allowed error", 1.0)
        if case.bitwise:
            there = case.fused(**{key: value.cpu() for key, value in inputs.items()})
            here = got[0].detach().cpu()
            differing = (here != there) & ~(here.isnan() & there.isnan())
            yield Row(f"{case.name}: elements that differ from the CPU's", int(differing.sum()), limit=0)


def attention(device: str, sizes: str) -> Iterator[Row]:
    """Every backend, on views of packed qkv, forward and backward against float64."""

    def run(packed: Tensor, upstream: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
        out = kernels.attention(query, key, value, backend=backend)
        return out.detach(), torch.autograd.grad(out, packed, upstream)[0]

    generator = torch.Generator(device).manual_seed(0)
    for (batch, heads, length, dim), dtype in itertools.product(SIZES[sizes].attention, (FP32, FP16, BF16)):
        shape = (batch, length, 3, heads, dim)
        packed = torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()
        upstream = torch.randn((batch, heads, length, dim), generator=generator, device=device).to(dtype)
        exact = run(packed.detach().to(torch.float64).requires_grad_(), upstream.to(torch.float64), "math")
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
        for backend, reasons in kernels.attention_backends(query, key, value).items():
            name = f"({batch}, {heads}, {length}, {dim}), {str(dtype)[6:]}: {backend}"
            if reasons:
                yield Row(f"{name}: does not serve", 0, "", 0, "; ".join(reasons))
                continue
            # Probabilities and outputs are rounded once each, scores (a few units) before the exponential too; the
            # gradient adds one more product of each. RMS error over RMS value, as errors average out over a row. In
            # float32 the kernels make a product of three TF32 ones and sum up to a thousand: eight times as much.
            output, gradient = run(packed, upstream, backend)
            unit = torch.finfo(dtype).eps * (8 if dtype == FP32 else 1)
            yield Row(f"{name}: output", relative_rms(output, exact[0]), "relative RMS error", 4 * unit)
            yield Row(f"{name}: gradient", relative_rms(gradient, exact[1]), "relative RMS error", 8 * unit)
