"""Patches, the layout of every operation: (B, L, D) in patch vector order (row, column, channel).

Both layouts of images are read here and nowhere else: uint8 (B, H, W, C) as decoders deliver it, and float pixels
(B, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["check_images", "check_pixels", "normalized_patches", "patchify", "unpatchify"]

# Elements that a CPU works on at a time: few enough for their intermediate results to stay in a core's cache, enough
# for PyTorch's cost per operation not to count.
CHUNK = 2**17
# Added to the variance of a patch inside the root, as in the published code of MAE and NIM.
VARIANCE_EPS = 1e-6


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
    # Patch rows are moved whole. Planes become NHWC first, on the way: two copies in long runs are faster than one
    # that fetches every channel from afar.
    tiles = images.reshape(batch, rows, patch_size, columns, patch_size * channels).transpose(2, 3)
    return tiles.reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, img_size: tuple[int, int], patch_size: int) -> Tensor:
    """Patches (..., L, D) to images (..., H, W, C): the inverse of `patchify`."""
    batch_shape = patches.shape[:-2]
    rows, columns = img_size[0] // patch_size, img_size[1] // patch_size
    channels = patches.shape[-1] // (patch_size * patch_size)
    tiles = patches.reshape(*batch_shape, rows, columns, patch_size, patch_size * channels).transpose(-3, -2)
    return tiles.reshape(*batch_shape, *img_size, channels)


def sample_chunks(batch: int, elements: int, device: torch.device, least: int = 1) -> Iterator[slice]:
    """Slices of a batch, of some `CHUNK` elements each but of `least` samples; on a GPU the batch in one.

    On a CPU a chain of operations is faster, and keeps no intermediate result of the size of the batch, when it goes
    through the batch a few samples at a time.
    """
    step = max(least, CHUNK // max(1, elements)) if device.type == "cpu" else max(1, batch)
    for start in range(0, batch, step):
        yield slice(start, start + step)


def patch_moments(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (..., L, D) less their own mean; that mean and the unbiased variance, (..., L, 1).

    Two passes, as in the definition: `torch.var_mean` takes one, 30 times slower on a CPU.
    """
    centre = patches.mean(dim=-1, keepdim=True)
    centred = patches - centre
    squares = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square()
    return centred, centre, squares / (patches.shape[-1] - 1)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 inputs, so that gradients can be checked in it; float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def channel_vector(values: Sequence[float], like: Tensor, repeat: int = 1) -> Tensor:
    """Per-channel constants as a tensor beside `like`, repeated to run along a patch vector."""
    dtype = compute_dtype(like)
    if like.device.type == "cpu":
        vector = torch.tensor(list(values), dtype=dtype, device=like.device)
    else:
        # Filled on the device: a copy from the host would wait for it, and cannot be captured into a CUDA graph.
        vector = torch.cat([torch.full((1,), value, dtype=dtype, device=like.device) for value in values])
    return vector.repeat(repeat) if repeat > 1 else vector


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
    full, nhwc = (255, images) if images.dtype == torch.uint8 else (1, images.permute(0, 2, 3, 1))
    patches = patchify(nhwc, patch_size).to(compute_dtype(images))
    shift = channel_vector([-centre / value for centre, value in zip(mean, std, strict=True)], images, patch_size**2)
    scale = channel_vector([1 / (full * value) for value in std], images, patch_size**2)
    return torch.addcmul(shift, patches, scale)
