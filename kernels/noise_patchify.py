"""`noise_patchify`: pixels -> normalise + sigma * noise -> patches, for many levels and draws at once.

`normalized_patches` is the same without noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from denim.kernels.dispatch import register
from denim.kernels.noise import check_seeds, normal_noise
from denim.kernels.patches import (
    channel_vector,
    check_images,
    clean_patches,
    compute_dtype,
    patchify,
    sample_chunks,
    unpatchify,
)

__all__ = ["noise_patchify", "normalized_patches"]

OUTPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _reference(
    images: Tensor,
    sigma: Tensor | None,
    seeds: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Reference in torch; also the CPU kernel."""
    if sigma is None or seeds is None:
        return clean_patches(images, patch_size=patch_size, mean=mean, std=std).to(dtype)
    height, width = check_images(images, patch_size=patch_size, mean=mean, std=std)
    batch, image_size = len(images), (height, width, len(mean))
    levels = sigma.reshape(sigma.shape[:-1].numel(), 1, batch, 1, 1).to(compute_dtype(images)) / 255
    draws = seeds.reshape(seeds.shape[:-1].numel(), batch)
    # The noise is defined in pixel space; division by std takes it to normalised space.
    scale = channel_vector([1 / value for value in std], images, patch_size * patch_size)
    shape = (height * width // patch_size**2, len(scale))
    out = images.new_empty((len(levels), len(draws), batch, *shape), dtype=dtype)
    # At least two samples at a time: the generator computes two rows even if one is asked for.
    for chunk in sample_chunks(batch, math.prod(image_size) * len(draws), images.device, least=2):
        clean = clean_patches(images[chunk], patch_size=patch_size, mean=mean, std=std)
        noise = patchify(normal_noise(draws[:, chunk].flatten(), image_size), patch_size)
        noise = (noise * scale).view(len(draws), *clean.shape)
        out[:, :, chunk] = torch.addcmul(clean, levels[:, :, chunk], noise)
    return out.reshape(*sigma.shape[:-1], *seeds.shape[:-1], batch, *shape)


def _fake(
    images: Tensor,
    sigma: Tensor | None,
    seeds: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:4]
    length = (height // patch_size) * (width // patch_size)
    outer = () if sigma is None or seeds is None else (*sigma.shape[:-1], *seeds.shape[:-1])
    shape = (*outer, images.shape[0], length, patch_size * patch_size * len(mean))
    return images.new_empty(shape, dtype=dtype)


def _backward_reference(
    grad: Tensor, height: int, width: int, patch_size: int, std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Gradient of float pixels (B, C, H, W). The noise does not depend on the pixels, so backward draws none."""
    outer = grad.reshape(grad.shape[:-3].numel(), *grad.shape[-3:])
    working = torch.promote_types(compute_dtype(grad), dtype)
    pixels = grad.new_empty((outer.shape[1], len(std), height, width), dtype=dtype)
    for chunk in sample_chunks(len(pixels), outer[:, :1].numel(), grad.device):
        total = outer[:, chunk].sum(dim=0, dtype=working)
        scaled = total / channel_vector(std, total, patch_size * patch_size)
        pixels[chunk] = unpatchify(scaled, (height, width), patch_size).permute(0, 3, 1, 2)
    return pixels


def _backward_fake(
    grad: Tensor, height: int, width: int, patch_size: int, std: Sequence[float], dtype: torch.dtype
) -> Tensor:
    return grad.new_empty((grad.shape[-3], len(std), height, width), dtype=dtype)


_noise_patchify_backward = register(
    "noise_patchify_backward", _backward_reference, _backward_fake, triton="noise_patchify_triton", part="_backward"
)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    images, _, _, ctx.patch_size, _, ctx.std, _ = inputs
    ctx.image_shape, ctx.image_dtype = images.shape, images.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]  # torch's own signature
    if not ctx.needs_input_grad[0]:
        return None, None, None, None, None, None, None
    pixels = _noise_patchify_backward(
        grad, ctx.image_shape[2], ctx.image_shape[3], ctx.patch_size, ctx.std, ctx.image_dtype
    )
    return pixels, None, None, None, None, None, None


def _tangent(inputs: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> Tensor | None:
    """The derivative in the direction of tangents of the images; the noise does not depend on them."""
    _, sigma, seeds, patch_size, mean, std, dtype = inputs
    if tangents[1] is not None:
        raise ValueError("noise_patchify is not differentiable in sigma; detach it")
    if tangents[0] is None:
        return None
    moved = clean_patches(tangents[0], patch_size=patch_size, mean=[0.0] * len(mean), std=std).to(dtype)
    outer = () if seeds is None else (*sigma.shape[:-1], *seeds.shape[:-1])
    return moved.expand(*outer, *moved.shape).contiguous()


_noise_patchify = register(
    "noise_patchify",
    _reference,
    _fake,
    triton="noise_patchify_triton",
    backward=_backward,
    setup_context=_setup_context,
    tangent=_tangent,
)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in OUTPUT_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, OUTPUT_DTYPES))}, got {dtype}")


def noise_patchify(
    images: Tensor,
    sigma: Tensor,
    seeds: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noisy patches in normalised space, for every noise level and every draw, in one pass over the image.

    Equivalent PyTorch:

        noise = normal_noise(seeds, (H, W, C)).permute(..., C, H, W)
        noisy = ((images - mean) / std) + sigma / 255 * noise / std      # not clipped
        patches = noisy as (B, L, P * P * C) in (row, column, channel) order

    Levels and draws form an outer product, in the first dimensions of the result. All levels use the same draws (common
    random numbers), which makes differences between levels precise. For independent levels, call once per level with
    other seeds.

    Args:
        images: uint8 (B, H, W, C), or float pixels (B, C, H, W) in [0, 1].
        sigma: float (B,) or (S, B), noise standard deviation in 0-255 pixel levels.
        seeds: int64 (B,) or (R, B), one per sample and draw (`derive_seeds`).
        patch_size: side P of a square patch.
        mean: per-channel mean in [0, 1] units; its length is the number of channels C.
        std: per-channel standard deviation in [0, 1] units.
        dtype: of the patches: float32, bfloat16, float16 or float64.

    Returns:
        Patches of shape sigma.shape[:-1] + seeds.shape[:-1] + (B, L, D): (S, R, B, L, D) for a sweep. Differentiable
        in float pixels; the sum over levels and draws in backward has a fixed order. No double backward.

    Raises:
        TypeError: a wrong dtype, or a number in place of a tensor.
        ValueError: a wrong shape or device, or a sigma that requires a gradient.

    Source: You et al. 2023 (arXiv 2302.01056), section 3: the input of noisy image modeling.
    """
    check_images(images, patch_size=patch_size, mean=mean, std=std)
    check_seeds(seeds)
    batch = images.shape[0]
    if not isinstance(sigma, Tensor):
        raise TypeError(f"sigma must be a tensor with one level per image, got {sigma!r}: torch.full(({batch},), ...)")
    for name, tensor, outer in (("sigma", sigma, "S"), ("seeds", seeds, "R")):
        if tensor.dim() not in (1, 2) or tensor.shape[-1] != batch:
            raise ValueError(
                f"{name} must have shape ({batch},) or ({outer}, {batch}) for {batch} images, got {tuple(tensor.shape)}"
            )
        if tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device} and images are on {images.device}")
    if not sigma.is_floating_point():
        raise TypeError(f"sigma must be floating point (0-255 pixel levels), got {sigma.dtype}")
    if sigma.requires_grad:
        raise ValueError("noise_patchify is not differentiable in sigma; detach it")
    _check_dtype(dtype)
    patches: Tensor = _noise_patchify(images, sigma, seeds, patch_size, list(mean), list(std), dtype)
    return patches


def normalized_patches(
    images: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Clean patches in normalised space: (x - mean) / std, patchified. The kernel of `noise_patchify`, without noise.

    Args:
        images: uint8 (B, H, W, C), or float pixels (B, C, H, W) in [0, 1].
        patch_size: side P of a square patch.
        mean: per-channel mean in [0, 1] units.
        std: per-channel standard deviation in [0, 1] units.
        dtype: of the patches: float32, bfloat16, float16 or float64. By default float32, float64 for float64 images.

    Returns:
        (B, L, D). Differentiable in float pixels. No double backward.

    Raises:
        TypeError: a wrong dtype.
        ValueError: see `check_images`.
    """
    check_images(images, patch_size=patch_size, mean=mean, std=std)
    dtype = compute_dtype(images) if dtype is None else dtype
    _check_dtype(dtype)
    patches: Tensor = _noise_patchify(images, None, None, patch_size, list(mean), list(std), dtype)
    return patches
