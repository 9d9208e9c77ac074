"""Weights of a ViT for another image or patch size, as timm resamples them."""

from __future__ import annotations

from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

__all__ = ["resample"]


def resample(
    state: Mapping[str, Tensor], old_grid: tuple[int, int], grid: tuple[int, int], patch_size: int
) -> dict[str, Tensor]:
    """The same weights with positions and patch embedding of another size; what has that size already is unchanged.

    Positions are interpolated bicubically, the one of the class token is kept. The patch embedding is multiplied by the
    pseudo-inverse of a bicubic resize, so that it gives a resized patch the token of the patch (Beyer et al. 2023,
    arXiv 2212.08013, section 3.4). Both are timm's.

    Args:
        state: weights of an encoder, with MAE's decoder or without, by timm's and MAE's names: pos_embed and
            decoder_pos_embed (1, 1 + L, embed_dim), patch_embed.proj.weight (embed_dim, C, P, P).
        old_grid: rows and columns of the L patches.
        grid: rows and columns that are wanted.
        patch_size: side of the patches that are wanted, in pixels.

    Returns:
        All weights, by the same names.
    """
    resampled = dict(state)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state:
            resampled[name] = resample_abs_pos_embed(state[name], list(grid), list(old_grid))
    weight = state["patch_embed.proj.weight"]
    resampled["patch_embed.proj.weight"] = resample_patch_embed(weight, [patch_size, patch_size])
    return resampled
