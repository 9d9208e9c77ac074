"""Patches, the layout that every operation shares: (B, L, D) in patch vector order (row, column, channel).

Both layouts of images are read here and nowhere else: uint8 (B, H, W, C) as decoders deliver it, and float pixels
(B, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_images", "check_pixels", "normalized_patches", "patchify", "unpatchify"]


def check_images(images: Tensor, *, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> tuple[int, int]:
    """Check shape, dtype and statistics of a batch of images, never its values; return (height, width).

    Values are not looked at: that would synchronise the device, read the image twice and break compiled graphs.
    `check_pixels` does it at the eager boundaries.

    Raises:
        TypeError: dtype is neither uint8 nor floating.
        ValueError: wrong rank or number of channels, sides not divisible by the patch size, bad mean or std.
    """
    if len(mean) != len(std) or not mean:
        raise ValueError(f"mean and std need one value per channel each, got {len(mean)} and {len(std)}")
    if any(not value > 0 for value in std):
        raise ValueError(f"std must be positive, got {tuple(std)}")
    if images.dtype == torch.uint8:
        layout, channel = "(B, H, W, C)", 3
    elif images.is_floating_point():
        layout, channel = "(B, C, H, W)", 1
    else:
        raise TypeError(f"images must be uint8 (B, H, W, C) or float (B, C, H, W) pixels, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"{images.dtype} images must have shape {layout}, got {tuple(images.shape)}")
    channels = images.shape[channel]
    if channels != len(mean):
        raise ValueError(
            f"{images.dtype} images have shape {layout} and mean and std have {len(mean)} channels, "
            f"got images {tuple(images.shape)} with {channels}"
        )
    height, width = (images.shape[1], images.shape[2]) if channel == 3 else (images.shape[2], images.shape[3])
    if patch_size < 1 or height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"image sides must be multiples of the patch size {patch_size}, got {height} x {width}")
    return int(height), int(width)


def check_pixels(pixels: Tensor) -> None:
    """Check the values of float pixels: finite and in [0, 1] within 1e-4. Synchronises; for eager boundaries only.

    Raises:
        TypeError: pixels are not floating point.
        ValueError: a value is NaN, infinite or outside [0, 1].
    """
    if not pixels.is_floating_point():
        raise TypeError(f"pixels must be float in [0, 1], got {pixels.dtype}; divide uint8 images by 255")
    if pixels.numel() == 0:
        return
    low, high = (value.item() for value in torch.aminmax(pixels.detach()))
    if not (low >= -1e-4 and high <= 1 + 1e-4):  # written so that NaN fails
        raise ValueError(
            f"pixels must lie in [0, 1], got values from {low:.4g} to {high:.4g}; "
            "normalisation lives inside the model, so hand in images that are not normalised"
        )


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, H, W, C) to patches (B, L, D), D = patch_size^2 * C in (row, column, channel) order."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    tiles = images.reshape(batch, rows, patch_size, columns, patch_size, channels).permute(0, 1, 3, 2, 4, 5)
    return tiles.reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, image_size: tuple[int, int], patch_size: int) -> Tensor:
    """Patches (..., L, D) to images (..., H, W, C): the inverse of `patchify`."""
    lead = patches.shape[:-2]
    rows, columns = image_size[0] // patch_size, image_size[1] // patch_size
    channels = patches.shape[-1] // (patch_size * patch_size)
    tiles = patches.reshape(*lead, rows, columns, patch_size, patch_size, channels).transpose(-4, -3)
    return tiles.reshape(*lead, *image_size, channels)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 inputs, so that gradients can be checked in it; float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def channel_vector(values: Sequence[float], like: Tensor, repeat: int = 1) -> Tensor:
    """Per-channel constants as a tensor beside `like`, repeated to run along a patch vector."""
    return torch.tensor(list(values) * repeat, dtype=compute_dtype(like), device=like.device)


def normalized_patches(images: Tensor, *, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Clean patches in normalised space: (x - mean) / std, patchified.

    Args:
        images: uint8 (B, H, W, C), or float pixels (B, C, H, W) in [0, 1].
        patch_size: side P of a square patch.
        mean: per-channel mean in [0, 1] units.
        std: per-channel standard deviation in [0, 1] units.

    Returns:
        (B, L, D) in float32, float64 for float64 images.

    Raises:
        TypeError, ValueError: see `check_images`.
    """
    check_images(images, patch_size=patch_size, mean=mean, std=std)
    dtype = compute_dtype(images)
    nhwc = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype).permute(0, 2, 3, 1)
    return patchify((nhwc - channel_vector(mean, images)) / channel_vector(std, images), patch_size)
