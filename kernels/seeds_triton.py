# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernels of `derive_seeds` and `noise_words`: exact integer arithmetic, one launch each.

As torch operations, each is a chain of some 170 or 340 launches, since torch has no operation for Philox.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels.dispatch import GPU
from denim.kernels.memory_triton import on_device
from denim.kernels.noise import Stream
from denim.kernels.noise_triton import philox

__all__ = ["launch", "launch_words", "seeds_kernel", "serves", "serves_words", "words_kernel"]

# Threads of a program, each with one seed or one group of words.
THREADS = 128


@triton.jit
def _load(values, row_stride, column_stride, row, column, inside):
    return tl.load(values + row * row_stride + column * column_stride, mask=inside, other=0)


# Numbers and sizes of another value use the same compiled kernel.
@triton.jit(
    do_not_specialize=[
        "domain",
        "run_seed",
        "step",
        "draw",
        "count",
        "columns",
        "sample_row",
        "sample_column",
        "run_row",
        "run_column",
        "step_row",
        "step_column",
        "draw_row",
        "draw_column",
    ]
)
def seeds_kernel(
    samples,
    run_seeds,
    steps,
    draws,
    out,
    domain,
    run_seed,
    step,
    draw,
    count,
    columns,
    sample_row,
    sample_column,
    run_row,
    run_column,
    step_row,
    step_column,
    draw_row,
    draw_column,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK of `count` seeds, which stand in rows of `columns`. Tensors have a stride for each of the two.

    Where `run_seeds`, `steps` or `draws` is None, the number of that name stands for all seeds.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    row = index // columns
    column = index - row * columns
    sample = _load(samples, sample_row, sample_column, row, column, inside)
    zero = tl.zeros_like(sample)
    key = zero + run_seed if run_seeds is None else _load(run_seeds, run_row, run_column, row, column, inside)
    at = zero + step if steps is None else _load(steps, step_row, step_column, row, column, inside)
    number = zero + draw if draws is None else _load(draws, draw_row, draw_column, row, column, inside)
    none = zero.to(tl.uint32)
    k0, k1, _, _ = philox(
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
        none + STREAM,
        (zero + domain).to(tl.uint32),
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    low, high, _, _ = philox(at.to(tl.uint32), (at >> 32).to(tl.uint32), none + STREAM, number.to(tl.uint32), k0, k1)
    seed = low.to(tl.int64) | (high.to(tl.int64) << 32)
    tl.store(out + index, seed, mask=inside)


@triton.jit(do_not_specialize=["count", "groups", "total"])
def words_kernel(seeds, out, count, groups, total, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK of `total` groups of four words. A seed has `groups` of these, and `count` words in `out`."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    sample = index // groups
    group = index - sample * groups
    seed = tl.load(seeds + sample, mask=inside, other=0)
    zero = tl.zeros_like(group).to(tl.uint32)
    words = philox(
        group.to(tl.uint32),
        (group >> 32).to(tl.uint32),
        zero + STREAM,
        zero,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    for i in tl.static_range(4):
        place = group * 4 + i
        tl.store(out + sample * count + place, words[i].to(tl.int64), mask=inside & (place < count))


def _rows(values: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int, int]:
    """A tensor that broadcasts to `shape`, with its strides along rows (all dimensions but the last) and columns."""
    if values is None:
        return None, 0, 0
    rows = values.expand(shape).reshape(-1, shape[-1]) if len(shape) else values.reshape(1, 1)
    return rows, rows.stride(0), rows.stride(1)


def serves(
    samples: Tensor,
    domain: int,
    run_seed: int,
    step: int,
    draw: int,
    run_seeds: Tensor | None,
    steps: Tensor | None,
    draws: Tensor | None,
) -> bool:
    """Whether `launch` takes these arguments of `derive_seeds`: it takes all."""
    return True


def launch(
    samples: Tensor,
    domain: int,
    run_seed: int,
    step: int,
    draw: int,
    run_seeds: Tensor | None,
    steps: Tensor | None,
    draws: Tensor | None,
    *,
    gpu: GPU,
) -> Tensor:
    """Run the kernel on arguments that `derive_seeds` has checked.

    Args:
        samples: int64, any shape and strides.
        domain: number of the domain.
        run_seed: the seed of the run, if `run_seeds` is None.
        step: epoch or step, if `steps` is None.
        draw: number of the draw, if `draws` is None.
        run_seeds: int64, broadcastable with samples; or None.
        steps: likewise.
        draws: likewise.
        gpu: what the kernel is built for.

    Returns:
        int64 seeds of the broadcast shape, contiguous. They are the reference's.
    """
    given = (samples, run_seeds, steps, draws)
    shape = torch.broadcast_shapes(*(values.shape for values in given if values is not None))
    out = torch.empty(shape, dtype=torch.int64, device=samples.device)
    if out.numel() == 0:
        return out
    tensors, row_strides, column_strides = zip(*(_rows(values, shape) for values in given), strict=True)
    strides = [stride for pair in zip(row_strides, column_strides, strict=True) for stride in pair]
    count = out.numel()
    with on_device(out.device):
        seeds_kernel[(triton.cdiv(count, THREADS),)](
            *tensors,
            out,
            domain,
            run_seed,
            step,
            draw,
            count,
            shape[-1] if len(shape) else 1,
            *strides,
            STREAM=int(Stream.SEED),
            BLOCK=THREADS,
            num_warps=THREADS // gpu.warp_size,
        )
    return out


def serves_words(seeds: Tensor, count: int, stream: int) -> bool:
    """Whether `launch_words` takes these arguments of `noise_words`: it takes all that one launch can have."""
    return seeds.numel() * -(-count // 4) < 2**31 * THREADS


def launch_words(seeds: Tensor, count: int, stream: int, *, gpu: GPU) -> Tensor:
    """Run the kernel on arguments that `noise_words` has checked.

    Args:
        seeds: int64, any shape and strides.
        count: words of a seed.
        stream: number of the stream.
        gpu: what the kernel is built for.

    Returns:
        int64 words, seeds.shape + (count,), contiguous. They are the reference's.
    """
    out = torch.empty((*seeds.shape, count), dtype=torch.int64, device=seeds.device)
    if out.numel() == 0:
        return out
    groups = triton.cdiv(count, 4)
    total = seeds.numel() * groups
    with on_device(seeds.device):
        words_kernel[(triton.cdiv(total, THREADS),)](
            seeds.contiguous(),
            out,
            count,
            groups,
            total,
            STREAM=stream,
            BLOCK=THREADS,
            num_warps=THREADS // gpu.warp_size,
        )
    return out
