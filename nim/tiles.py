"""Rebuild an image that is larger than those of the denoiser: tile by tile, with tiles that overlap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denim.nim.autoencoder import Autoencoder
from denim.nim.reconstruction import reconstruct

__all__ = ["denoise_tiles"]

BATCH = 64  # tiles in a pass


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles of a side begin: they overlap by half at least, and the last one ends where the image ends."""
    count = 1 + math.ceil((length - tile) / (tile // 2))
    return [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]


@torch.no_grad()
def denoise_tiles(autoencoder: Autoencoder, noisy: Tensor) -> Tensor:
    """Rebuild a noisy image of any size, at least that of the denoiser.

    Each pixel is the mean over the tiles that hold it, weighted by the square of a sine that is largest in the middle
    of a tile: there the denoiser sees what is around the pixel, and no seam is left.

    Args:
        autoencoder: denoiser of the raw target; it gets tiles of its own image size.
        noisy: float (C, H, W), pixels with noise, not clipped.

    Returns:
        (C, H, W) in [0, 1].

    Raises:
        ValueError: an image smaller than the denoiser's or of other channels, or a denoiser of the normalised target:
            the statistics of its patches come from an image without noise.
    """
    config = autoencoder.config
    height, width = config.img_size
    if config.target != "raw":
        raise ValueError(
            "tiles need a denoiser of the raw target: one of the normalised target takes its own size alone"
        )
    if noisy.dim() != 3 or noisy.shape[0] != config.channels or noisy.shape[1] < height or noisy.shape[2] < width:
        raise ValueError(
            f"the denoiser takes images of {config.channels} channels and at least {height} x {width} pixels, got "
            f"{tuple(noisy.shape)}"
        )
    places = [(y, x) for y in _starts(noisy.shape[1], height) for x in _starts(noisy.shape[2], width)]
    windows = [(math.pi * (torch.arange(n, device=noisy.device) + 0.5) / n).sin().square() for n in (height, width)]
    weight = windows[0][:, None] * windows[1]
    total, weights = torch.zeros_like(noisy), torch.zeros_like(noisy[0])
    for first in range(0, len(places), BATCH):
        some = places[first : first + BATCH]
        tiles = torch.stack([noisy[:, y : y + height, x : x + width] for y, x in some])
        # Noise of level 0: the tiles have theirs.
        none = torch.zeros(len(some), device=noisy.device)
        rebuilt = reconstruct(autoencoder, tiles, none, none.long())
        for (y, x), tile in zip(some, rebuilt, strict=True):
            total[:, y : y + height, x : x + width] += weight * tile
            weights[y : y + height, x : x + width] += weight
    return total / weights
