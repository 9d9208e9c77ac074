# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernel of `attack_step`: sign, step, projection and clamp, in one pass over pixels, origin and gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels.memory_triton import on_device

__all__ = ["DTYPES", "attack_step_kernel", "launch"]

# Of pixels, origin and gradient; sizes may be float64 too.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
THREADS = 128
# Per thread: one 16-byte access of a 2-byte type, two of float32.
RUN = 8


# A batch or a stride of another size compiles nothing anew; divisibility of `elements` decides the width of accesses.
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
    # Everything that can be large is a scalar; per element there is a 32-bit offset alone.
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
    # What is neither above nor below zero is its own sign: zero, and NaN, which must not look like a step of zero.
    sign = tl.where(slope > 0, 1.0, tl.where(slope < 0, -1.0, slope))
    low = tl.maximum(centre - radius, 0.0, propagate_nan=tl.PropagateNan.ALL)
    high = tl.minimum(centre + radius, 1.0, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.maximum(x + step * sign, low, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.minimum(moved, high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + start + offset, moved.to(out.dtype.element_ty), mask=inside)


def launch(
    pixels: Tensor, origin: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor, *, warp_size: int
) -> Tensor:
    """Run the kernel on arguments that `attack_step` has checked.

    Args:
        pixels: (B, ...), one of `DTYPES`, any strides.
        origin: same shape, one of `DTYPES`.
        gradient: same shape, one of `DTYPES`.
        step_size: () or (B,), floating.
        epsilon: () or (B,), floating.
        warp_size: lanes of a warp of the GPU. The result does not depend on it.

    Returns:
        The next iterate, in the shape and dtype of `pixels`, contiguous. Equal to the reference exactly.
    """
    out = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)
    if out.numel() == 0:
        return out
    batch = pixels.shape[0]
    elements, block = out.numel() // batch, THREADS * RUN
    tiles = triton.cdiv(elements, block)
    step_size, epsilon = step_size.expand(batch), epsilon.expand(batch)
    with on_device(pixels.device):
        attack_step_kernel[(batch * tiles,)](
            pixels.contiguous(),
            origin.contiguous(),
            gradient.contiguous(),
            step_size,
            epsilon,
            out,
            elements,
            tiles,
            step_size.stride(0),
            epsilon.stride(0),
            BLOCK=block,
            num_warps=THREADS // warp_size,
        )
    return out
