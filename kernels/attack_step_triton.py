# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernels of `attack_step` (sign, step, projection and clamp in one pass) and of `attack_start`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels.dispatch import GPU
from denim.kernels.memory_triton import chunks, on_device
from denim.kernels.noise import Stream
from denim.kernels.noise_triton import philox
from denim.kernels.tuning import run_tuned

__all__ = [
    "CONFIGURATIONS",
    "attack_start_kernel",
    "attack_step_kernel",
    "launch",
    "launch_start",
    "serves",
    "serves_start",
]

# Of pixels, origin and gradient. Step size and epsilon may be float64 too.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Elements of a thread: one 16-byte access of a 2-byte dtype, two of float32; in `attack_start` also two groups of four
# words of the generator.
RUN = 8
THREADS = 128
# Of `attack_step`: (threads of a program, elements of a thread).
CONFIGURATIONS = ((THREADS, RUN), (2 * THREADS, RUN), (4 * THREADS, RUN))


# Other batch sizes and strides use the same compiled kernel. `elements` is specialised: accesses are wide where it is a
# multiple of 16.
@triton.jit(do_not_specialize=["tiles", "step_stride", "epsilon_stride"])
def attack_step_kernel(
    pixels,
    origin,
    gradient,
    step_size,
    epsilon,
    out,
    elements,
    tiles,
    step_stride,
    epsilon_stride,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK consecutive elements of one sample, which has `elements` of them in `tiles` programs."""
    # Offsets that can exceed 32 bits are 64-bit scalars; each element adds a 32-bit offset to them.
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    first = (program % tiles).to(tl.int64) * BLOCK
    start = sample * elements + first
    offset = tl.arange(0, BLOCK)
    inside = offset < tl.minimum(elements - first, BLOCK).to(tl.int32)
    step = tl.load(step_size + sample * step_stride).to(tl.float32)
    radius = tl.load(epsilon + sample * epsilon_stride).to(tl.float32)
    x = tl.load(pixels + start + offset, mask=inside).to(tl.float32)
    centre = tl.load(origin + start + offset, mask=inside).to(tl.float32)
    slope = tl.load(gradient + start + offset, mask=inside).to(tl.float32)
    # Zero and NaN stay what they are: a NaN must not look like a step of zero.
    sign = tl.where(slope > 0, 1.0, tl.where(slope < 0, -1.0, slope))
    moved = tl.maximum(x + step * sign, centre - radius, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.minimum(moved, centre + radius, propagate_nan=tl.PropagateNan.ALL)
    # The clamp to [0, 1] comes last: an origin slightly outside of [0, 1] must not pull pixels outside.
    moved = tl.maximum(moved, 0.0, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.minimum(moved, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + start + offset, moved.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _symmetric(word):
    """2 u - 1 for the uniform u of `uniform_noise`, which rounds (word + 1/2) / 2^32 to float32 once, and below 1.

    This needs no float64: both halves of the word are exact in float32, so a fused multiply-add rounds their sum once.
    The second multiply-add scales by a power of two, which is exact, so it rounds like the subtraction 2 u - 1.
    """
    high = (word >> 16).to(tl.int32).to(tl.float32)
    low = (word & 0xFFFF).to(tl.int32).to(tl.float32) + 0.5
    scaled = tl.minimum(tl.fma(high, 65536.0, low), 2.0**32 - 2.0**8)
    return tl.fma(scaled, 2.0**-31, -1.0)


@triton.jit(do_not_specialize=["tiles", "seed_stride", "epsilon_stride"])
def attack_start_kernel(
    pixels,
    seeds,
    epsilon,
    out,
    elements,
    tiles,
    seed_stride,
    epsilon_stride,
    STREAM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program: ROWS * COLS consecutive elements of one sample, which has `elements` in `tiles` programs.

    A row is what one thread handles: COLS elements in chunks of 16 bytes. The chunks of neighbouring threads follow one
    another, so that a warp stores whole sectors of memory.
    """
    CHUNK: tl.constexpr = min(COLS, 128 // pixels.dtype.element_ty.primitive_bitwidth)
    GROUPS: tl.constexpr = CHUNK // 4
    program = tl.program_id(0)
    sample = (program // tiles).to(tl.int64)
    first = (program % tiles).to(tl.int64) * (ROWS * COLS)
    start = sample * elements + first
    place = tl.reshape(tl.arange(0, ROWS * COLS), (COLS // CHUNK, ROWS, CHUNK))
    inside = place < tl.minimum(elements - first, ROWS * COLS).to(tl.int32)
    radius = tl.load(epsilon + sample * epsilon_stride).to(tl.float32)
    seed = tl.load(seeds + sample * seed_stride)
    values = tl.load(pixels + start + place, mask=inside)
    x = tl.reshape(tl.permute(values, (1, 0, 2)), (ROWS, COLS)).to(tl.float32)
    # Indices of groups of four positions. `first` is a multiple of the tile, so the sum of low words does not overflow.
    group = tl.arange(0, COLS // 4)[:, None]
    local = (group // GROUPS * ROWS + tl.arange(0, ROWS)[None, :]) * GROUPS + group % GROUPS
    low = (first // 4).to(tl.uint32) + local.to(tl.uint32)
    high = tl.full(local.shape, 0, tl.uint32) + (first // 4 >> 32).to(tl.uint32)
    zero = tl.full(local.shape, 0, tl.uint32)
    w0, w1, w2, w3 = philox(low, high, zero + STREAM, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    words = tl.reshape(tl.permute(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (1, 0, 2, 3)), (ROWS, COLS))
    moved = x + radius * _symmetric(words)
    moved = tl.maximum(moved, 0.0, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.minimum(moved, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + start + place, chunks(moved.to(out.dtype.element_ty), CHUNK), mask=inside)


def serves(pixels: Tensor, origin: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor) -> bool:
    """Whether `launch` takes these arguments of `attack_step`. The reference serves float64."""
    return all(tensor.dtype in DTYPES for tensor in (pixels, origin, gradient))


def launch(
    pixels: Tensor,
    origin: Tensor,
    gradient: Tensor,
    step_size: Tensor,
    epsilon: Tensor,
    *,
    gpu: GPU,
    configurations: Sequence[tuple[int, int]] = CONFIGURATIONS,
) -> Tensor:
    """Run the kernel on arguments that `attack_step` has checked.

    Args:
        pixels: (B, ...), one of `DTYPES`, any strides.
        origin: same shape, one of `DTYPES`.
        gradient: same shape, one of `DTYPES`.
        step_size: () or (B,), floating.
        epsilon: () or (B,), floating.
        gpu: what the kernel is built for.
        configurations: (threads of a program, elements of a thread), powers of two, to choose from. The result depends
            on neither.

    Returns:
        The next iterate, in the shape and dtype of `pixels`, contiguous. Equal to the reference exactly.
    """
    out = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)
    if out.numel() == 0:
        return out
    batch = pixels.shape[0]
    elements = out.numel() // batch
    pixels, origin, gradient = pixels.contiguous(), origin.contiguous(), gradient.contiguous()
    step_size, epsilon = step_size.expand(batch), epsilon.expand(batch)

    def run(configuration: tuple[int, int]) -> None:
        threads, run_length = configuration
        tiles = triton.cdiv(elements, threads * run_length)
        attack_step_kernel[(batch * tiles,)](
            pixels,
            origin,
            gradient,
            step_size,
            epsilon,
            out,
            elements,
            tiles,
            step_size.stride(0),
            epsilon.stride(0),
            BLOCK=threads * run_length,
            num_warps=threads // gpu.warp_size,
        )

    key = ("attack_step", pixels.dtype, origin.dtype, gradient.dtype)
    with on_device(pixels.device):
        run_tuned(key, out.numel(), configurations, run, pixels.device)
    return out


def serves_start(pixels: Tensor, seeds: Tensor, epsilon: Tensor) -> bool:
    """Whether `launch_start` takes these arguments of `attack_start`. The reference serves float64."""
    return pixels.dtype in DTYPES


def launch_start(pixels: Tensor, seeds: Tensor, epsilon: Tensor, *, gpu: GPU) -> Tensor:
    """Run the kernel on arguments that `attack_start` has checked.

    Args:
        pixels: (B, ...), one of `DTYPES`, any strides.
        seeds: int64 (B,).
        epsilon: () or (B,), floating.
        gpu: what the kernel is built for. The result does not depend on it.

    Returns:
        The first iterate, in the shape and dtype of `pixels`, contiguous. Equal to the reference exactly.
    """
    out = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)
    if out.numel() == 0:
        return out
    batch = pixels.shape[0]
    elements = out.numel() // batch
    tiles = triton.cdiv(elements, THREADS * RUN)
    epsilon = epsilon.expand(batch)
    with on_device(pixels.device):
        attack_start_kernel[(batch * tiles,)](
            pixels.contiguous(),
            seeds,
            epsilon,
            out,
            elements,
            tiles,
            seeds.stride(0),
            epsilon.stride(0),
            STREAM=int(Stream.START),
            ROWS=THREADS,
            COLS=RUN,
            num_warps=THREADS // gpu.warp_size,
            # The reference rounds the product and the sum; a fused multiply-add would round only once.
            enable_fp_fusion=False,
        )
    return out
