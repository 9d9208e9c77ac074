"""`decode_patches`: prediction -> un-normalise by the chosen statistics -> clamp -> pixels or classifier patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from denim.kernels.dispatch import register
from denim.kernels.patches import (
    VARIANCE_EPS,
    channel_vector,
    check_images,
    clean_patches,
    compute_dtype,
    patch_moments,
    patchify,
    sample_chunks,
    unpatchify,
)

__all__ = ["STATISTICS", "decode_patches"]

STATISTICS = (None, "input", "noisy")
OUTPUT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Statistics(NamedTuple):
    """Mean and standard deviation of every patch (..., L, 1), and what their gradient needs."""

    centred: Tensor  # patches minus their mean
    mean: Tensor
    deviation: Tensor
    slope: Tensor | float  # d(used variance) / d(variance)


def _patch_statistics(patches: Tensor, sigma: Tensor | None, std: Sequence[float], dtype: torch.dtype) -> _Statistics:
    centred, centre, variance = patch_moments(patches.to(dtype))
    slope: Tensor | float = 1.0
    if sigma is not None:
        # The noise added this much variance to a patch in normalised space.
        inverse = channel_vector(std, centred).reciprocal().square().mean()
        added = (sigma.to(dtype) / 255).square()[..., None, None] * inverse
        # The difference is often negative. A smooth floor keeps it positive and its gradient non-zero. The width of the
        # floor is the sampling error of the difference: the standard deviation of a sample variance of D normals.
        excess = variance - added
        floor = added.square() * (2.0 / (centred.shape[-1] - 1)) + VARIANCE_EPS**2
        root = torch.sqrt(excess.square() + 4 * floor)
        variance, slope = (excess + root) / 2, (1 + excess / root) / 2
    return _Statistics(centred, centre, torch.sqrt(variance + VARIANCE_EPS), slope)


def _source_statistics(
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
        patches = clean_patches(source, patch_size=patch_size, mean=mean, std=std)
        return _patch_statistics(patches, None, std, dtype)
    assert sigma is not None
    return _patch_statistics(source, sigma, std, dtype)


def _unclamped(
    prediction: Tensor, stats: _Statistics | None, repeat: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    patches = prediction if stats is None else torch.addcmul(stats.mean, prediction, stats.deviation)
    scale = channel_vector(std, patches, repeat)
    return torch.addcmul(channel_vector(mean, patches, repeat), patches, scale)


def _working_dtype(prediction: Tensor, source: Tensor | None) -> torch.dtype:
    dtype = compute_dtype(prediction)
    return dtype if source is None else torch.promote_types(dtype, compute_dtype(source))


def _parts(
    prediction: Tensor, source: Tensor | None, sigma: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
    """(slice of samples, prediction, source, sigma) for a few samples at a time.

    The dimensions before the batch (levels and draws) are flattened into one, which comes first.
    """
    outer, batch = prediction.shape[:-3].numel(), prediction.shape[-3]
    predictions = prediction.reshape(outer, *prediction.shape[-3:])
    # Without sigma the source holds images: one image serves all levels and draws of its sample.
    sources = source if source is None or sigma is None else source.reshape(predictions.shape)
    sigmas = sigma if sigma is None else sigma.expand(prediction.shape[:-2]).reshape(outer, batch)
    for chunk in sample_chunks(batch, predictions[:, :1].numel(), prediction.device):
        part = sources if sources is None else sources[chunk] if sigmas is None else sources[:, chunk]
        yield chunk, predictions[:, chunk], part, sigmas if sigmas is None else sigmas[:, chunk]


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
    normal_mean: Sequence[float],
    normal_std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Reference in torch; also the CPU kernel. Pixels where `normal_mean` and `normal_std` are empty, else patches."""
    working, repeat = _working_dtype(prediction, source), patch_size * patch_size
    outer_shape = prediction.shape[:-3]
    shape = prediction.shape[-3:] if normal_std else (prediction.shape[-3], len(mean), height, width)
    decoded = prediction.new_empty((outer_shape.numel(), *shape), dtype=dtype)
    for chunk, part, given, level in _parts(prediction, source, sigma):
        stats = _source_statistics(given, level, patch_size, mean, std, statistics, working)
        pixels = _unclamped(part.to(working), stats, repeat, mean, std).clamp_(0, 1)
        if normal_std:
            centre, scale = (channel_vector(values, pixels, repeat) for values in (normal_mean, normal_std))
            decoded[:, chunk] = pixels.sub_(centre).div_(scale)
        else:
            decoded[:, chunk] = unpatchify(pixels, (height, width), patch_size).movedim(-1, -3)
    return decoded.reshape(*outer_shape, *shape)


def _fake(
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    height: int,
    width: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
    normal_mean: Sequence[float],
    normal_std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    shape = prediction.shape if normal_std else (*prediction.shape[:-2], len(mean), height, width)
    return prediction.new_empty(shape, dtype=dtype)


def _has_gradient(source: Tensor | None, need_source: bool) -> TypeGuard[Tensor]:
    return need_source and source is not None and source.is_floating_point()


def _backward_reference(
    grad: Tensor,
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
    normal_std: Sequence[float],
    need_source: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of prediction and source; `grad` is that of the pixels, or of patches if `normal_std` is not empty.

    The mask of the clamp is recomputed, not stored. The source's gradient is an empty tensor where none is needed, and
    for uint8 images.
    """
    dtype, repeat = _working_dtype(prediction, source), patch_size * patch_size
    outer_shape, size = prediction.shape[:-3], prediction.shape[-1]
    upstreams = grad.reshape(outer_shape.numel(), *grad.shape[len(outer_shape) :])
    scale = channel_vector(std, prediction, repeat).to(dtype)
    if normal_std:
        scale = scale / channel_vector(normal_std, prediction, repeat)
    to_predictions = prediction.new_empty((outer_shape.numel(), *prediction.shape[-3:]))
    to_source = prediction.new_empty(0)
    wanted = False
    if statistics != "raw" and _has_gradient(source, need_source):
        wanted = True
        to_source = source.new_empty(source.shape if statistics == "input" else to_predictions.shape)
    for chunk, part, given, level in _parts(prediction, source, sigma):
        stats = _source_statistics(given, level, patch_size, mean, std, statistics, dtype)
        patches = part.to(dtype)
        pixels = _unclamped(patches, stats, repeat, mean, std)
        upstream = upstreams[:, chunk].to(dtype)
        if not normal_std:
            upstream = patchify(upstream.movedim(-3, -1).flatten(0, 1), patch_size).view(pixels.shape)
        # `where` instead of a product: the gradient of a saturated pixel is 0 even if it arrives as infinity.
        upstream = torch.where(pixels.clamp(0, 1) == pixels, upstream, 0).mul_(scale)
        to_predictions[:, chunk] = upstream if stats is None else upstream * stats.deviation
        if stats is None or not wanted:
            continue
        to_mean = upstream.sum(dim=-1, keepdim=True)
        to_deviation = upstream.mul_(patches).sum(dim=-1, keepdim=True)
        if statistics == "input":  # one image serves all levels and draws
            to_mean, to_deviation = to_mean.sum(dim=0), to_deviation.sum(dim=0)
        to_variance = to_deviation * stats.slope / (2 * stats.deviation)
        to_patches = torch.addcmul(to_mean / size, stats.centred, to_variance * (2 / (size - 1)))
        if statistics == "input":
            to_patches = to_patches / channel_vector(std, to_patches, repeat)
            img_size = (to_source.shape[2], to_source.shape[3])
            to_source[chunk] = unpatchify(to_patches, img_size, patch_size).movedim(-1, -3)
        else:
            to_source[:, chunk] = to_patches
    if wanted and statistics == "noisy":
        to_source = to_source.reshape(prediction.shape)
    return to_predictions.reshape(prediction.shape), to_source


def _backward_fake(
    grad: Tensor,
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
    normal_std: Sequence[float],
    need_source: bool,
) -> tuple[Tensor, Tensor]:
    to_prediction = prediction.new_empty(prediction.shape)
    if not _has_gradient(source, need_source):
        return to_prediction, prediction.new_empty(0)
    return to_prediction, source.new_empty(source.shape)


_decode_patches_backward = register(
    "decode_patches_backward", _backward_reference, _backward_fake, triton="decode_patches_triton", part="_backward"
)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    prediction, source, sigma, _, _, *ctx.rest, _, ctx.normal_std, _ = inputs
    ctx.save_for_backward(prediction, source, sigma)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]  # torch's own signature
    prediction, source, sigma = ctx.saved_tensors
    need_source = ctx.needs_input_grad[1]
    to_prediction, to_source = _decode_patches_backward(
        grad, prediction, source, sigma, *ctx.rest, ctx.normal_std, need_source
    )
    return to_prediction, to_source if need_source else None, *(None,) * 10


def _tangent(inputs: tuple[Any, ...], tangents: tuple[Tensor | None, ...]) -> Tensor:
    """The derivative in the direction of tangents of prediction and source: `_reference`, differentiated by hand."""
    prediction, source, sigma, height, width, patch_size, mean, std, statistics, _, normal_std, dtype = inputs
    working, repeat = _working_dtype(prediction, source), patch_size * patch_size
    stats = _source_statistics(source, sigma, patch_size, mean, std, statistics, working)
    patches = prediction.to(working)
    moved = torch.zeros_like(patches) if tangents[0] is None else tangents[0].to(working)
    if stats is not None:
        moved = moved * stats.deviation
        if tangents[1] is not None:
            given = tangents[1].to(working)
            if statistics == "input":
                given = clean_patches(given, patch_size=patch_size, mean=[0.0] * len(mean), std=std)
            to_variance = (stats.centred * given).sum(dim=-1, keepdim=True) * (2 / (given.shape[-1] - 1))
            to_deviation = to_variance * stats.slope / (2 * stats.deviation)
            moved = moved + given.mean(dim=-1, keepdim=True) + patches * to_deviation
    pixels = _unclamped(patches, stats, repeat, mean, std)
    moved = torch.where(pixels.clamp(0, 1) == pixels, moved * channel_vector(std, moved, repeat), 0)
    if normal_std:
        return (moved / channel_vector(normal_std, moved, repeat)).to(dtype)
    return unpatchify(moved, (height, width), patch_size).movedim(-1, -3).to(dtype).contiguous()


_decode_patches = register(
    "decode_patches",
    _reference,
    _fake,
    triton="decode_patches_triton",
    backward=_backward,
    setup_context=_setup_context,
    tangent=_tangent,
)


def decode_patches(
    prediction: Tensor,
    *,
    img_size: int | tuple[int, int],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str | None = None,
    source: Tensor | None = None,
    sigma: Tensor | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Pixels in [0, 1] from a decoder's prediction, or the same pixels as a classifier's normalised patches.

    Equivalent PyTorch, with t the patches that the statistics come from:

        patches = prediction                                                    # statistics=None: raw target
        patches = prediction * (t.var(-1) + 1e-6).sqrt() + t.mean(-1)           # "input": t = clean patches of source
        patches = prediction * (v + 1e-6).sqrt() + t.mean(-1)                   # "noisy": t = source, noisy patches
            d = t.var(-1) - n,  n = (sigma / 255) ** 2 * mean(1 / std ** 2)     # minus the variance of the noise
            v = (d + (d ** 2 + 4 * f ** 2).sqrt()) / 2                          # smooth floor
            f ** 2 = n ** 2 * 2 / (D - 1) + 1e-12                               # its width: the sampling error of n
        pixels = (patches * std + mean).clamp(0, 1)
        return unpatchify(pixels).to(dtype)                                     # normalize=None
        return ((pixels - classifier_mean) / classifier_std).to(dtype)          # normalize: still patches

    The published defense uses "input". Through it the classifier receives two noise-free numbers per patch of the
    un-noised and possibly attacked image. "noisy" is a diagnostic. A raw target needs no statistics, so nothing of the
    un-noised image reaches the classifier.

    Args:
        prediction: (..., B, L, D), floating; any dimensions may stand before the batch (levels, draws).
        img_size: side of a square image, or (H, W).
        patch_size: side P of a square patch.
        mean: per-channel mean in [0, 1] units.
        std: per-channel standard deviation in [0, 1] units.
        statistics: None, "input" or "noisy".
        source: for "input" the images, uint8 (B, H, W, C) or float (B, C, H, W), B as in the
            prediction; for "noisy" the noisy patches, in the shape of the prediction.
        sigma: for "noisy" the noise level in 0-255 pixel levels, broadcastable to prediction.shape[:-2].
        normalize: per-channel (mean, std) of a classifier in [0, 1] units. With it the result is patches, normalised by
            these, in (row, column, channel) order: the input of the classifier's patch embedding as a linear layer.
        dtype: of the result: float32, bfloat16, float16 or float64; by default float32, float64 where an input is.

    Returns:
        Pixels (..., C, H, W), or patches (..., L, D) with `normalize`. Differentiable in prediction and source. The
        gradient of the clamp is 1 on [0, 1], both ends included, and 0 outside (at the ends, that of torch.clamp is 1
        or 0, depending on torch's release). No double backward.

    Raises:
        TypeError: a wrong dtype.
        ValueError: wrong shapes or devices, an unknown choice of statistics, a source or sigma missing or unused.

    Source: He et al. 2022 (MAE), section 4.1, whose normalisation of the target is undone here; You et al. 2023 (NIM),
    whose defense undoes it with the statistics of the input.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if statistics not in STATISTICS:
        raise ValueError(f'statistics must be None, "input" or "noisy", got {statistics!r}')
    if len(mean) != len(std) or not mean or any(not value > 0 for value in std):
        raise ValueError(f"mean and std need one value per channel and std > 0, got {tuple(mean)} and {tuple(std)}")
    normal_mean, normal_std = ((), ()) if normalize is None else normalize
    if normalize is not None and (
        len(normal_mean) != len(mean) or len(normal_std) != len(mean) or any(not value > 0 for value in normal_std)
    ):
        raise ValueError(
            f"normalize needs a mean and a std > 0 for each of {len(mean)} channels, "
            f"got {tuple(normal_mean)} and {tuple(normal_std)}"
        )
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, OUTPUT_DTYPES))}, got {dtype}")
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
    decoded: Tensor = _decode_patches(
        prediction,
        source,
        sigma,
        height,
        width,
        patch_size,
        list(mean),
        list(std),
        statistics or "raw",
        list(normal_mean),
        list(normal_std),
        dtype or _working_dtype(prediction, source),
    )
    return decoded
