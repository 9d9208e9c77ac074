# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""A naive Triton kernel for noise and patches, which the fused kernel is compared with.

Each thread makes a few elements of the output. It finds their pixels by division and remainder, and calls `tl.randn`
once for each element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch", "naive_noise_patchify_kernel"]

BLOCK = 1024


@triton.jit
def naive_noise_patchify_kernel(
    images,
    sigma,
    mean,
    std,
    out,
    seed,
    total,
    height,
    width,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of the patches. BYTES says uint8 (B, H, W, C), else float (B, C, H, W)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    channel = index % CHANNELS
    x = index // CHANNELS % PATCH
    y = index // (CHANNELS * PATCH) % PATCH
    patch = index // (CHANNELS * PATCH * PATCH)
    columns = width // PATCH
    rows = height // PATCH
    x += patch % columns * PATCH
    y += patch // columns % rows * PATCH
    sample = patch // (columns * rows)
    if BYTES:
        pixel = tl.load(images + ((sample * height + y) * width + x) * CHANNELS + channel, mask=inside)
        pixel = pixel.to(tl.float32) / 255
    else:
        pixel = tl.load(images + ((sample * CHANNELS + channel) * height + y) * width + x, mask=inside).to(tl.float32)
    level = tl.load(sigma + sample, mask=inside) / 255
    noisy = pixel + level * tl.randn(seed, index)
    noisy = (noisy - tl.load(mean + channel)) / tl.load(std + channel)
    tl.store(out + index, noisy.to(out.dtype.element_ty), mask=inside)


def launch(
    images: Tensor,
    sigma: Tensor,
    seed: int,
    patch_size: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    *,
    num_warps: int = 4,
) -> Tensor:
    """Noisy patches (B, L, D) in normalised space.

    Args:
        images: uint8 (B, H, W, C), or float pixels (B, C, H, W) in [0, 1], contiguous.
        sigma: float32 (B,), standard deviation in 0-255 pixel levels.
        seed: of the whole launch.
        patch_size: side P of a square patch.
        mean: float32 (C,) in [0, 1] units.
        std: float32 (C,) in [0, 1] units.
        dtype: of the patches.
        num_warps: of a program.

    Raises:
        ValueError: more elements than 32-bit indices reach.
    """
    total = images.numel()
    if total >= 2**31 - BLOCK:
        raise ValueError(f"this kernel indexes with 32 bits and takes fewer than {2**31 - BLOCK} elements, got {total}")
    batch = images.shape[0]
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
    size = patch_size * patch_size * len(mean)
    out = torch.empty((batch, height * width * len(mean) // size, size), dtype=dtype, device=images.device)
    naive_noise_patchify_kernel[(triton.cdiv(total, BLOCK),)](
        images,
        sigma,
        mean,
        std,
        out,
        seed,
        total,
        height,
        width,
        PATCH=patch_size,
        CHANNELS=len(mean),
        BYTES=images.dtype == torch.uint8,
        BLOCK=BLOCK,
        num_warps=num_warps,
    )
    return out
