"""The baselines: what each fused operation computes, as a chain of ordinary PyTorch operations.

Each computes what the operation named in its docstring computes, and is differentiable by autograd. In float64 it is
the definition that tests and `gpu-check` compare with. Benchmarks and the ahead-of-time report compare speed with it,
eager and through `torch.compile`. Denim's models never call it. Unlike the operations it checks no arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "decoded_pixels",
    "linear_of_gelu",
    "linear_of_norm",
    "linf_start",
    "linf_step",
    "noisy_patches",
    "patch_target",
    "patchify_planes",
    "reconstruction_loss",
    "unpatchify_planes",
]


def _planes(images: Tensor) -> Tensor:
    """Pixels (B, C, H, W) in [0, 1] from uint8 (B, H, W, C) or float (B, C, H, W)."""
    return images.permute(0, 3, 1, 2) / 255 if images.dtype == torch.uint8 else images


def patchify_planes(planes: Tensor, patch_size: int) -> Tensor:
    """(..., C, H, W) to (..., L, P * P * C), patch vectors in (row, column, channel) order."""
    tiles = planes.unflatten(-2, (-1, patch_size)).unflatten(-1, (-1, patch_size))  # (..., C, h, P, w, P)
    patches: Tensor = tiles.movedim(-5, -1).transpose(-4, -3).flatten(-3).flatten(-3, -2)
    return patches


def unpatchify_planes(patches: Tensor, img_size: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of `patchify_planes`."""
    tiles = patches.unflatten(-1, (patch_size, patch_size, -1))
    tiles = tiles.unflatten(-4, (img_size[0] // patch_size, img_size[1] // patch_size))  # (..., h, w, P, P, C)
    planes: Tensor = tiles.transpose(-4, -3).movedim(-1, -5).flatten(-2).flatten(-3, -2)
    return planes


def noisy_patches(
    images: Tensor,
    sigma: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    patch_size: int,
    noise: Tensor | None = None,
    draws: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`noise_patchify`: normalised noisy patches, sigma.shape[:-1] + draws + (B, L, D).

    Args:
        images: uint8 (B, H, W, C), or float pixels (B, C, H, W) in [0, 1].
        sigma: (B,) or (S, B), standard deviation in 0-255 pixel levels.
        mean: (C,) in [0, 1] units.
        std: (C,) in [0, 1] units.
        patch_size: side P of a square patch.
        noise: standard normals, draws + (B, C, H, W); by default `torch.randn`, from the global generator.
        draws: () or (R,).
        dtype: of the patches.
    """
    pixels = _planes(images)
    if noise is None:
        # In the memory layout of the pixels, where there is one draw: mixed layouts would be slower.
        noise = torch.randn_like(pixels) if not draws else torch.randn((*draws, *pixels.shape), device=pixels.device)
    levels = sigma.reshape(*sigma.shape[:-1], *(1,) * len(draws), sigma.shape[-1], 1, 1, 1) / 255
    noisy = (pixels + levels * noise - mean[:, None, None]) / std[:, None, None]
    return patchify_planes(noisy, patch_size).to(dtype)


def patch_target(images: Tensor, mean: Tensor, std: Tensor, *, patch_size: int, norm_pix: bool) -> Tensor:
    """Clean patches (B, L, D), normalised per patch with `norm_pix`. Arguments as for `reconstruction_loss`."""
    target = patchify_planes((_planes(images) - mean[:, None, None]) / std[:, None, None], patch_size)
    if not norm_pix:
        return target
    centre, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    return (target - centre) / (variance + 1e-6) ** 0.5


def reconstruction_loss(
    prediction: Tensor,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    patch_size: int,
    norm_pix: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """`patch_loss`: mean squared error against clean patches (He et al. 2022, section 3).

    Args:
        prediction: (B, L, D).
        images: uint8 (B, H, W, C), or float pixels (B, C, H, W) in [0, 1].
        mean: (C,) in [0, 1] units.
        std: (C,) in [0, 1] units.
        patch_size: side P of a square patch.
        norm_pix: normalise each target patch by its own mean and unbiased variance.
        mask: bool (B, L); True patches count.
    """
    target = patch_target(images, mean, std, patch_size=patch_size, norm_pix=norm_pix)
    loss = ((prediction - target) ** 2).mean(dim=-1)
    return loss.mean() if mask is None else (loss * mask).sum() / mask.sum()


def unclamped_pixels(
    prediction: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    img_size: tuple[int, int],
    patch_size: int,
    statistics: str | None = None,
    source: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Tensor:
    """`decoded_pixels` before its clamp."""
    patches = prediction
    if statistics is not None:
        assert source is not None
        if statistics == "input":
            source = patchify_planes((_planes(source) - mean[:, None, None]) / std[:, None, None], patch_size)
        centre, variance = source.mean(dim=-1, keepdim=True), source.var(dim=-1, keepdim=True)
        if sigma is not None:
            added = ((sigma / 255) ** 2 * (1 / std**2).mean())[..., None, None]
            excess = variance - added
            floor = added**2 * (2 / (source.shape[-1] - 1)) + 1e-12
            variance = (excess + (excess**2 + 4 * floor) ** 0.5) / 2
        patches = prediction * (variance + 1e-6) ** 0.5 + centre
    return unpatchify_planes(patches, img_size, patch_size) * std[:, None, None] + mean[:, None, None]


def decoded_pixels(
    prediction: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    img_size: tuple[int, int],
    patch_size: int,
    statistics: str | None = None,
    source: Tensor | None = None,
    sigma: Tensor | None = None,
    normalize: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`decode_patches`: pixels (..., C, H, W) in [0, 1] from a prediction, or a classifier's patches (..., L, D).

    Args:
        prediction: (..., L, D).
        mean: (C,) in [0, 1] units.
        std: (C,) in [0, 1] units.
        img_size: (H, W).
        patch_size: side P of a square patch.
        statistics: None, "input" or "noisy".
        source: for "input" the images, uint8 (B, H, W, C) or float (B, C, H, W); for "noisy" the noisy patches.
        sigma: for "noisy" the noise level in 0-255 pixel levels, prediction.shape[:-2].
        normalize: mean and std (C,) of the classifier, for patches.
    """
    pixels = unclamped_pixels(
        prediction,
        mean,
        std,
        img_size=img_size,
        patch_size=patch_size,
        statistics=statistics,
        source=source,
        sigma=sigma,
    ).clamp(0, 1)
    if normalize is None:
        return pixels
    centre, scale = normalize
    return patchify_planes((pixels - centre[:, None, None]) / scale[:, None, None], patch_size)


def linf_step(pixels: Tensor, origin: Tensor, gradient: Tensor, *, step_size: Tensor, epsilon: Tensor) -> Tensor:
    """`attack_step`: a step of projected gradient descent (Madry et al. 2018, equation 2).

    Args:
        pixels: (B, ...) in [0, 1].
        origin: same shape, the clean image.
        gradient: same shape.
        step_size: (B,) in [0, 1] units.
        epsilon: (B,) in [0, 1] units.
    """
    step, radius = (size.reshape(-1, *(1,) * (pixels.dim() - 1)) for size in (step_size, epsilon))
    moved = pixels + step * gradient.sign()
    moved = origin + torch.clamp(moved - origin, -radius, radius)
    return moved.clamp(0, 1).to(pixels.dtype)


def linf_start(pixels: Tensor, *, epsilon: Tensor, uniform: Tensor | None = None) -> Tensor:
    """`attack_start`: a random start in the ball, uniform per pixel (Madry et al. 2018, section 2).

    Args:
        pixels: (B, ...) in [0, 1].
        epsilon: () or (B,) in [0, 1] units.
        uniform: numbers in (0, 1), same shape; by default `torch.rand`, from the global generator.
    """
    if uniform is None:
        uniform = torch.rand_like(pixels)
    radius = epsilon.reshape(-1, *(1,) * (pixels.dim() - 1))
    return (pixels + radius * (2 * uniform - 1)).clamp(0, 1).to(pixels.dtype)


def linear_of_norm(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float
) -> Tensor:
    """`norm_linear`: a linear layer of a layer norm.

    Args:
        x: (..., in_features).
        norm_weight: (in_features,).
        norm_bias: (in_features,).
        weight: (out_features, in_features); x is cast to its dtype behind the norm, as by autocast.
        bias: (out_features,).
        eps: added to the variance.
    """
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps).to(weight.dtype), weight, bias)


def linear_of_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gelu_linear`: a linear layer of a GELU.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features); x is cast to its dtype behind the GELU, as by autocast.
        bias: (out_features,).
    """
    return F.linear(F.gelu(x).to(weight.dtype), weight, bias)
