"""Degrade images and rebuild them, as the defense does at test time and fine-tuning with its training images."""

from __future__ import annotations

import torch
from torch import Tensor

from denim.kernels import decode_patches, noise_patchify, normalized_patches
from denim.kernels.patches import unpatchify
from denim.nim.autoencoder import Autoencoder, Mask
from denim.nim.classifier import Classifier

__all__ = ["DEGRADATIONS", "add_noise", "check_degradation", "reconstruct"]

DEGRADATIONS = ("noise", "mask", "both")


def add_noise(images: Tensor, sigma: Tensor, seeds: Tensor) -> Tensor:
    """Noisy pixels, not clipped.

    Args:
        images: uint8 (B, H, W, C), or float pixels (B, C, H, W) in [0, 1].
        sigma: float (B,) or (S, B), 0-255 pixel levels.
        seeds: int64 (B,) or (R, B).

    Returns:
        Float pixels of shape sigma.shape[:-1] + seeds.shape[:-1] + (B, C, H, W). Raises what `noise_patchify` raises.
    """
    if images.dim() != 4:
        raise ValueError(f"images must be uint8 (B, H, W, C) or float (B, C, H, W), got {tuple(images.shape)}")
    img_size = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:4]
    channels = images.shape[3] if images.dtype == torch.uint8 else images.shape[1]
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    # With patches of one pixel, the patch layout is the pixel layout.
    noisy = noise_patchify(
        images, sigma, seeds, patch_size=1, mean=(0.0,) * channels, std=(1.0,) * channels, dtype=dtype
    )
    return unpatchify(noisy, (img_size[0], img_size[1]), 1).movedim(-1, -3)


def check_degradation(autoencoder: Autoencoder | None, degrade: str, statistics: str) -> None:
    """Check `degrade` and `statistics`, and that they fit the autoencoder where one is given.

    Raises:
        ValueError: an unknown option (the valid ones are listed), or noisy statistics where there is no noise.
    """
    if degrade not in DEGRADATIONS:
        raise ValueError(f"degrade must be one of {', '.join(DEGRADATIONS)}, got {degrade!r}")
    if statistics not in ("input", "noisy"):
        raise ValueError(f'statistics must be "input" or "noisy", got {statistics!r}')
    if degrade == "mask" and statistics == "noisy" and autoencoder is not None and autoencoder.config.target == "norm":
        raise ValueError('statistics="noisy" needs noise; with degrade="mask" there is none: take statistics="input"')


def case_of(autoencoder: Autoencoder | None, degrade: str, statistics: str) -> str:
    """What images a classifier behind an autoencoder gets, in words (see `De3.case`).

    Args:
        autoencoder: the denoiser; None for noise alone.
        degrade, statistics: see `reconstruct`.

    Returns:
        "noisy" without an autoencoder; else the degradation and where the decoder's statistics come from, such as
        "noise, raw target", "noise, input statistics" or "both, noisy statistics".
    """
    if autoencoder is None:
        return "noisy"
    return f"{degrade}, {f'{statistics} statistics' if autoencoder.config.target == 'norm' else 'raw target'}"


def same_patches(autoencoder: Autoencoder, classifier: Classifier) -> bool:
    """Whether image size, patch size and channels of the two models are equal, so that they can exchange patches."""
    sizes = [(c.img_size, c.patch_size, len(c.mean)) for c in (autoencoder.config, classifier.config)]
    return sizes[0] == sizes[1]


def reconstruct(
    autoencoder: Autoencoder,
    images: Tensor,
    sigma: Tensor | None,
    seeds: Tensor,
    *,
    degrade: str = "noise",
    mask_ratio: float = 0.75,
    statistics: str = "input",
    classifier: Classifier | None = None,
) -> Tensor:
    """Degrade images, rebuild them with an autoencoder, clamp to [0, 1].

    Args:
        autoencoder: the denoiser.
        images: uint8 (B, H, W, C), or float pixels (B, C, H, W) in [0, 1], of the autoencoder's size.
        sigma: float (B,) or (S, B), 0-255 pixel levels; None for degrade="mask".
        seeds: int64 (B,) or (R, B); they key the noise and the mask.
        degrade: "noise" (NIM), "mask" (MAE: visible patches are kept, hidden ones predicted) or "both" (DMAE: all
            patches are predicted from the noisy visible ones).
        mask_ratio: share of hidden patches, for "mask" and "both".
        statistics: where a decoder of the normalised target gets each patch's mean and variance: "input" (as
            published, from the un-degraded image) or "noisy"; without effect for a raw target.
        classifier: of the autoencoder's image and patch size: return patches for its `forward_patches` instead of
            pixels, so that pixels are never assembled between the two networks.

    Returns:
        Pixels of shape sigma.shape[:-1] + seeds.shape[:-1] + (B, C, H, W), or patches (..., B, L, D) normalised for
        the classifier, in its `patch_dtype`. Differentiable in float images.

    Raises:
        ValueError: sizes or options that do not fit together.

    Source: You et al. 2023 (arXiv 2302.01056), section 4.
    """
    config = autoencoder.config
    img_size = tuple(images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:4])
    if img_size != config.img_size:
        raise ValueError(f"the denoiser takes images of {config.img_size}, got {img_size}")
    check_degradation(autoencoder, degrade, statistics)
    if classifier is not None and not same_patches(autoencoder, classifier):
        own = classifier.config
        raise ValueError(
            f"the denoiser has patches of {config.patch_size} in images of {config.img_size} with {config.channels} "
            f"channels, the classifier of {own.patch_size} in {own.img_size} with {len(own.mean)}; hand it pixels"
        )
    if (sigma is None) != (degrade == "mask"):
        raise ValueError(f"degrade={degrade!r} {'takes no' if degrade == 'mask' else 'needs a'} sigma")

    pixel = {"patch_size": config.patch_size, "mean": config.mean, "std": config.std}
    # In the dtype in which the denoiser multiplies patches; float64 images keep their own.
    dtype = torch.float64 if images.dtype == torch.float64 else autoencoder.patch_dtype
    if sigma is None:
        if seeds.dim() not in (1, 2) or seeds.shape[-1] != images.shape[0]:
            raise ValueError(
                f"seeds must have shape ({images.shape[0]},) or (R, {images.shape[0]}) for {images.shape[0]} images, "
                f"got {tuple(seeds.shape)}"
            )
        clean = normalized_patches(images, dtype=dtype, **pixel)
        patches = clean.expand(*seeds.shape[:-1], *clean.shape)
    else:
        patches = noise_patchify(images, sigma, seeds, dtype=dtype, **pixel)
    lead = patches.shape[:-2]

    mask = None
    if degrade != "noise":
        mask = Mask.random(seeds.expand(lead).reshape(-1), config.num_patches, mask_ratio)
    prediction = autoencoder(patches.reshape(-1, *patches.shape[-2:]), mask).reshape(patches.shape)

    source, levels = None, None
    if config.target == "norm" and statistics == "input":
        source = images
    elif config.target == "norm":
        assert sigma is not None
        source, levels = patches, sigma if seeds.dim() == 1 else sigma.unsqueeze(-2)
    normalize = None if classifier is None else (classifier.config.mean, classifier.config.std)
    decoded = decode_patches(
        prediction,
        img_size=config.img_size,
        statistics=statistics if config.target == "norm" else None,
        source=source,
        sigma=levels,
        normalize=normalize,
        dtype=None if classifier is None else classifier.patch_dtype,
        **pixel,
    )
    if degrade == "mask":
        assert mask is not None
        hidden = mask.hidden.view(*lead, config.num_patches, 1)
        if normalize is not None:
            geometry = {"patch_size": config.patch_size, "mean": normalize[0], "std": normalize[1]}
            kept = normalized_patches(images, dtype=decoded.dtype, **geometry)
        else:
            hidden = unpatchify(hidden.expand(*patches.shape), config.img_size, config.patch_size).movedim(-1, -3)
            kept = images.permute(0, 3, 1, 2) / 255 if images.dtype == torch.uint8 else images
        decoded = torch.where(hidden, decoded, kept.to(decoded.dtype))
    return decoded
