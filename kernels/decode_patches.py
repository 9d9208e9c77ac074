"""`decode_patches`: predicted patches -> un-normalise by the chosen statistics -> clamp to [0, 1] -> pixels."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from denim.kernels.patch_loss import VARIANCE_EPS
from denim.kernels.patches import (
    channel_vector,
    check_images,
    compute_dtype,
    normalized_patches,
    patchify,
    unpatchify,
)

__all__ = ["STATISTICS", "decode_patches"]

STATISTICS = (None, "input", "noisy")


class _Statistics(NamedTuple):
    """Per-patch mean and standard deviation (..., L, 1), and what their gradient needs."""

    centred: Tensor  # patches minus their mean
    mean: Tensor
    deviation: Tensor
    slope: Tensor | float  # d(used variance) / d(variance)


def _patch_statistics(patches: Tensor, sigma: Tensor | None, std: Sequence[float], dtype: torch.dtype) -> _Statistics:
    patches = patches.to(dtype)
    variance, centre = torch.var_mean(patches, dim=-1, keepdim=True)
    slope: Tensor | float = 1.0
    if sigma is not None:
        # The noise added this much variance to a patch in normalised space.
        inverse = channel_vector(std, patches).to(dtype).reciprocal().square().mean()
        added = (sigma.to(dtype) / 255).square()[..., None, None] * inverse
        # What is left after taking it away is often negative. The floor is smooth, so that no gradient is zeroed, and
        # as wide as the statistical error of the difference: the sd of a sample variance of D normals.
        excess = variance - added
        floor = added.square() * (2.0 / (patches.shape[-1] - 1)) + VARIANCE_EPS**2
        root = torch.sqrt(excess.square() + 4 * floor)
        variance, slope = (excess + root) / 2, (1 + excess / root) / 2
    return _Statistics(patches - centre, centre, torch.sqrt(variance + VARIANCE_EPS), slope)


def _source_statistics(
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
    dtype: torch.dtype,
) -> _Statistics | None:
    if source is None or statistics == "raw":
        return None
    if statistics == "input":
        patches = normalized_patches(source, patch_size=patch_size, mean=mean, std=std)
        return _patch_statistics(patches, None, std, dtype)
    assert sigma is not None
    return _patch_statistics(source, sigma.expand(prediction.shape[:-2]), std, dtype)


def _unclamped(
    prediction: Tensor, stats: _Statistics | None, repeat: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    patches = prediction if stats is None else torch.addcmul(stats.mean, prediction, stats.deviation)
    scale = channel_vector(std, patches, repeat)
    return torch.addcmul(channel_vector(mean, patches, repeat), patches, scale)


def _working_dtype(prediction: Tensor, source: Tensor | None) -> torch.dtype:
    dtype = compute_dtype(prediction)
    return dtype if source is None else torch.promote_types(dtype, compute_dtype(source))


def _reference(
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    height: int,
    width: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
) -> Tensor:
    """Torch reference, and the CPU kernel."""
    dtype = _working_dtype(prediction, source)
    stats = _source_statistics(prediction, source, sigma, patch_size, mean, std, statistics, dtype)
    pixels = _unclamped(prediction.to(dtype), stats, patch_size * patch_size, mean, std).clamp(0, 1)
    images = unpatchify(pixels, (height, width), patch_size).movedim(-1, -3)
    return images.contiguous()


_decode_patches = torch.library.custom_op("denim::decode_patches", _reference, mutates_args=())


@_decode_patches.register_kernel("cuda")
def _(
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    height: int,
    width: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
) -> Tensor:
    """Triton kernel. The reference serves float64, very large patches, and platforms that have no Triton."""
    if importlib.util.find_spec("triton") is not None:
        # Imported at the first use: a CPU run needs no Triton, and importing Triton looks for a driver.
        from denim.kernels import decode_patches_triton as kernel
        from denim.kernels.memory_triton import warp_size

        if kernel.serves(prediction, source, patch_size, len(mean)):
            size = warp_size(prediction.device)
            return kernel.launch(
                prediction, source, sigma, height, width, patch_size, mean, std, statistics, warp_size=size
            )
    return _reference(prediction, source, sigma, height, width, patch_size, mean, std, statistics)


@_decode_patches.register_fake
def _(
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    height: int,
    width: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
) -> Tensor:
    shape = (*prediction.shape[:-2], len(mean), height, width)
    return prediction.new_empty(shape, dtype=_working_dtype(prediction, source))


def _reference_backward(
    grad: Tensor,
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
) -> tuple[Tensor, Tensor]:
    """Gradients for prediction and source (empty without one). The clamp mask is recomputed, not stored."""
    dtype, repeat = _working_dtype(prediction, source), patch_size * patch_size
    stats = _source_statistics(prediction, source, sigma, patch_size, mean, std, statistics, dtype)
    patches = prediction.to(dtype)
    pixels = _unclamped(patches, stats, repeat, mean, std)
    upstream = grad.to(dtype).movedim(-3, -1)
    upstream = patchify(upstream.reshape(-1, *upstream.shape[-3:]), patch_size).view(pixels.shape)
    inside = (pixels >= 0) & (pixels <= 1)
    # Selected, not multiplied: a saturated pixel passes nothing of an infinite gradient either.
    upstream = torch.where(inside, upstream, 0) * channel_vector(std, upstream, repeat)
    if stats is None or source is None:
        return upstream.to(prediction.dtype).contiguous(), prediction.new_empty(0)
    size = patches.shape[-1]
    to_mean = upstream.sum(dim=-1, keepdim=True)
    to_deviation = (upstream * patches).sum(dim=-1, keepdim=True)
    if statistics == "input":  # one image serves every leading index of the prediction
        lead = (to_mean.shape[:-3].numel(), *to_mean.shape[-3:])
        to_mean, to_deviation = to_mean.reshape(lead).sum(dim=0), to_deviation.reshape(lead).sum(dim=0)
    to_variance = to_deviation * stats.slope / (2 * stats.deviation)
    to_source = to_mean / size + to_variance * 2 * stats.centred / (size - 1)
    if statistics == "input":
        to_source = to_source / channel_vector(std, to_source, repeat)
        image_size = source.shape[2:4] if source.is_floating_point() else source.shape[1:3]
        to_source = unpatchify(to_source, (image_size[0], image_size[1]), patch_size).permute(0, 3, 1, 2)
    grad_dtype = source.dtype if source.is_floating_point() else dtype
    return (upstream * stats.deviation).to(prediction.dtype).contiguous(), to_source.to(grad_dtype).contiguous()


_decode_patches_backward = torch.library.custom_op(
    "denim::decode_patches_backward", _reference_backward, mutates_args=()
)


@_decode_patches_backward.register_kernel("cuda")
def _(
    grad: Tensor,
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
) -> tuple[Tensor, Tensor]:
    """Triton kernel, for what the forward kernel serves."""
    if importlib.util.find_spec("triton") is not None:
        from denim.kernels import decode_patches_triton as kernel
        from denim.kernels.memory_triton import warp_size

        if kernel.serves(prediction, source, patch_size, len(mean)):
            size = warp_size(prediction.device)
            return kernel.launch_backward(
                grad, prediction, source, sigma, patch_size, mean, std, statistics, warp_size=size
            )
    return _reference_backward(grad, prediction, source, sigma, patch_size, mean, std, statistics)


@_decode_patches_backward.register_fake
def _(
    grad: Tensor,
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
) -> tuple[Tensor, Tensor]:
    to_prediction = prediction.new_empty(prediction.shape)
    if statistics == "raw" or source is None:
        return to_prediction, prediction.new_empty(0)
    if source.is_floating_point():
        return to_prediction, source.new_empty(source.shape)
    batch, height, width, channels = source.shape
    return to_prediction, source.new_empty((batch, channels, height, width), dtype=_working_dtype(prediction, source))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    prediction, source, sigma, _, _, *ctx.rest = inputs
    ctx.save_for_backward(prediction, source, sigma)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]  # torch's own signature
    prediction, source, sigma = ctx.saved_tensors
    to_prediction, to_source = _decode_patches_backward(grad, prediction, source, sigma, *ctx.rest)
    return to_prediction, to_source if ctx.needs_input_grad[1] else None, *(None,) * 7


_decode_patches.register_autograd(_backward, setup_context=_setup_context)


def decode_patches(
    prediction: Tensor,
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str | None = None,
    source: Tensor | None = None,
    sigma: Tensor | None = None,
) -> Tensor:
    """Pixels in [0, 1] from a decoder's prediction.

    Equivalent PyTorch, with t the patches that the statistics come from::

        patches = prediction                                                    # statistics=None: raw target
        patches = prediction * (t.var(-1) + 1e-6).sqrt() + t.mean(-1)           # "input": t = clean patches of source
        patches = prediction * (v + 1e-6).sqrt() + t.mean(-1)                   # "noisy": t = source, noisy patches
            d = t.var(-1) - n,  n = (sigma / 255) ** 2 * mean(1 / std ** 2)     # what the noise added, taken away
            v = (d + (d ** 2 + 4 * f ** 2).sqrt()) / 2                          # smooth floor
            f ** 2 = n ** 2 * 2 / (D - 1) + 1e-12                               # its width: the sampling error of n
        pixels = (unpatchify(patches) * std + mean).clamp(0, 1)

    "input" is what the published defense does; it hands two noise-free numbers per patch of the un-noised, possibly
    attacked image to the classifier. "noisy" is a diagnostic. A raw target needs no statistics and leaks nothing.

    Args:
        prediction: (..., L, D), floating; leading dimensions are free and end in the batch.
        image_size: side of a square image, or (H, W).
        patch_size: side P of a square patch.
        mean: per-channel mean in [0, 1] units.
        std: per-channel standard deviation in [0, 1] units.
        statistics: None, "input" or "noisy".
        source: for "input" the images, uint8 (B, H, W, C) or float (B, C, H, W), B being the last leading dimension of
            the prediction; for "noisy" the noisy patches, in the shape of the prediction.
        sigma: for "noisy" the noise level in 0-255 pixel levels, broadcastable to prediction.shape[:-2].

    Returns:
        Pixels (..., C, H, W), float32 (float64 where an input is). Differentiable in prediction and source; the
        gradient of the clamp is 1 on [0, 1], both ends included, and 0 outside (at the ends torch.clamp has 1 or 0,
        depending on its release). No double backward.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or devices, an unknown choice of statistics, a source or sigma missing or unused.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if statistics not in STATISTICS:
        raise ValueError(f'statistics must be None, "input" or "noisy", got {statistics!r}')
    if len(mean) != len(std) or not mean or any(not value > 0 for value in std):
        raise ValueError(f"mean and std need one value per channel and std > 0, got {tuple(mean)} and {tuple(std)}")
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"image sides must be multiples of the patch size {patch_size}, got {height} x {width}")
    if not prediction.is_floating_point():
        raise TypeError(f"prediction must be floating point, got {prediction.dtype}")
    length, size = (height // patch_size) * (width // patch_size), patch_size * patch_size * len(mean)
    if prediction.dim() < 3 or tuple(prediction.shape[-2:]) != (length, size):
        raise ValueError(f"prediction must have shape (..., B, {length}, {size}), got {tuple(prediction.shape)}")
    if (source is not None) != (statistics is not None):
        raise ValueError(f"statistics={statistics!r} {'takes no' if statistics is None else 'needs a'} source")
    if (sigma is not None) != (statistics == "noisy"):
        raise ValueError(f"statistics={statistics!r} {'needs a' if statistics == 'noisy' else 'takes no'} sigma")
    if statistics is not None and size < 2:
        raise ValueError("per-patch statistics need at least two values per patch")
    for name, tensor in (("source", source), ("sigma", sigma)):
        if tensor is not None and tensor.device != prediction.device:
            raise ValueError(f"{name} is on {tensor.device} and prediction is on {prediction.device}")
    if source is not None and statistics == "input":
        sides = check_images(source, patch_size=patch_size, mean=mean, std=std)
        if sides != (height, width) or source.shape[0] != prediction.shape[-3]:
            raise ValueError(
                f"source must hold {prediction.shape[-3]} images of {height} x {width}, got {tuple(source.shape)}"
            )
    if source is not None and sigma is not None:
        if not source.is_floating_point():
            raise TypeError(f"source must be the noisy patches, floating point, got {source.dtype}")
        if source.shape != prediction.shape:
            raise ValueError(
                f"source must be the noisy patches in the prediction's shape {tuple(prediction.shape)}, "
                f"got {tuple(source.shape)}"
            )
        if not sigma.is_floating_point():
            raise TypeError(f"sigma must be floating point (0-255 pixel levels), got {sigma.dtype}")
        if sigma.requires_grad:
            raise ValueError("decode_patches is not differentiable in sigma; detach it")
        try:
            sigma.expand(prediction.shape[:-2])
        except RuntimeError:
            raise ValueError(
                f"sigma must broadcast to {tuple(prediction.shape[:-2])}, got {tuple(sigma.shape)}"
            ) from None
    pixels: Tensor = _decode_patches(
        prediction, source, sigma, height, width, patch_size, list(mean), list(std), statistics or "raw"
    )
    return pixels
