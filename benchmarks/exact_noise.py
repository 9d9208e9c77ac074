"""The noise contract in float64, which every implementation is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from denim.kernels import noise_words

__all__ = ["CONTRACT", "LARGEST", "exact_noise", "exact_normals"]

CONTRACT = 1e-5  # absolute error that the contract allows a standard normal
LARGEST = math.sqrt(66 * math.log(2))  # the radius at u = 2^-33


def exact_normals(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Box and Muller 1958 in float64: r cos(a), r sin(a), with r = sqrt(-2 ln u), a = 2 pi * second / 2^32.

    Args:
        first: int64 tensor of uint32 values; u = (first + 1/2) / 2^32, which float64 holds exactly.
        second: int64 tensor of uint32 values, same shape.
    """
    radius = torch.sqrt(-2 * torch.log((first.to(torch.float64) + 0.5) * 2.0**-32))
    angle = second.to(torch.float64) * (2 * math.pi * 2.0**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def exact_noise(seeds: Tensor, count: int) -> Tensor:
    """`normal_noise(seeds, (count,))` in float64, from the words: seeds.shape + (count,)."""
    words = noise_words(seeds, 4 * -(-count // 4)).unflatten(-1, (-1, 4))
    first, second, third, fourth = words.unbind(-1)
    normals = torch.stack((*exact_normals(first, second), *exact_normals(third, fourth)), dim=-1)
    return normals.flatten(-2)[..., :count]
