"""Patches, the layout of every operation: (B, L, D) in patch vector order (row, column, channel).

Images come in two layouts: uint8 (B, H, W, C), as decoders deliver them, and float pixels (B, C, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["check_images", "check_pixels", "clean_patches", "patchify", "unpatchify"]

# Elements that a CPU processes at a time: few enough that intermediate results stay in a core's cache, and enough that
# the overhead of PyTorch's operations is small.
CHUNK = 2**17
# Added to the variance of a patch inside the root, as in the published code of MAE and NIM.
VARIANCE_EPS = 1e-6


def check_images(images: Tensor, *, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> tuple[int, int]:
    """Check shape, dtype and statistics of a batch of images; return (height, width).

    Values are not checked here: that would synchronise the device, read the image twice and break compiled graphs.
    `check_pixels` checks them where a caller runs eagerly.

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
    """Check that float pixels are finite and in [0, 1] within 1e-4. Waits for the device; not for compiled code.

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
    # Whole patch rows are copied. `reshape` first copies a permuted NCHW image to NHWC: two copies of long contiguous
    # pieces are faster than one copy of single elements.
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
    """Slices of a batch: of about `CHUNK` elements, and at least `least` samples, on a CPU; the whole batch elsewhere.

    On a CPU a chain of operations is faster on a few samples at a time, and its intermediate results are small.
    """
    step = max(least, CHUNK // max(1, elements)) if device.type == "cpu" else max(1, batch)
    for start in range(0, batch, step):
        yield slice(start, start + step)


def patch_moments(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (..., L, D) minus their mean, that mean, and the unbiased variance; the latter two (..., L, 1).

    The variance takes a second pass over the centred values. `torch.var_mean` needs one pass, but is 30 times slower on
    a CPU.
    """
    centre = patches.mean(dim=-1, keepdim=True)
    centred = patches - centre
    squares = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square()
    return centred, centre, squares / (patches.shape[-1] - 1)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of intermediate results: float64 for float64 inputs (gradient checks), float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def channel_vector(values: Sequence[float], like: Tensor, repeat: int = 1) -> Tensor:
    """Per-channel constants as a tensor on the device of `like`, `repeat` times one after another (a patch vector)."""
    dtype = compute_dtype(like)
    if like.device.type == "cpu":
        vector = torch.tensor(list(values), dtype=dtype, device=like.device)
    else:
        # torch.full runs on the device. A copy from the host would synchronise, and CUDA graphs cannot capture it.
        vector = torch.cat([torch.full((1,), value, dtype=dtype, device=like.device) for value in values])
    return vector.repeat(repeat) if repeat > 1 else vector


def clean_patches(images: Tensor, *, patch_size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The reference of `normalized_patches`, with its arguments: (B, L, D) in float32, float64 for float64 images."""
    full, nhwc = (255, images) if images.dtype == torch.uint8 else (1, images.permute(0, 2, 3, 1))
    patches = patchify(nhwc, patch_size).to(compute_dtype(images))
    shift = channel_vector([-centre / value for centre, value in zip(mean, std, strict=True)], images, patch_size**2)
    scale = channel_vector([1 / (full * value) for value in std], images, patch_size**2)
    return torch.addcmul(shift, patches, scale)
