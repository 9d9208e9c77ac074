"""`patch_loss`: the reconstruction loss of masked and noisy image modeling. It never stores the target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from denim.kernels.dispatch import register
from denim.kernels.patches import (
    VARIANCE_EPS,
    check_images,
    clean_patches,
    compute_dtype,
    patch_moments,
    sample_chunks,
)

__all__ = ["patch_loss", "patch_target"]


def patch_target(
    images: Tensor, *, patch_size: int, mean: Sequence[float], std: Sequence[float], norm_pix: bool
) -> Tensor:
    """Target of the decoder: clean patches (B, L, D) in normalised space.

    With `norm_pix` each patch is normalised by its own mean and unbiased variance, (t - mean) / sqrt(var + 1e-6)
    (He et al. 2022, section 4.1). float32, float64 for float64 images. Raises what `check_images` raises.
    """
    target = clean_patches(images, patch_size=patch_size, mean=mean, std=std)
    if norm_pix:
        centred, _, variance = patch_moments(target)
        target = centred * torch.rsqrt(variance + VARIANCE_EPS)
    return target


def _errors(
    prediction: Tensor, images: Tensor, patch_size: int, mean: Sequence[float], std: Sequence[float], norm_pix: bool
) -> Iterator[tuple[slice, Tensor]]:
    """(slice of samples, prediction - target) for a few samples at a time, so the whole target never exists."""
    for chunk in sample_chunks(len(prediction), prediction.shape[1:].numel(), prediction.device):
        # The target has no name, which would keep it alive while the next one is computed.
        yield (
            chunk,
            prediction[chunk]
            - patch_target(images[chunk], patch_size=patch_size, mean=mean, std=std, norm_pix=norm_pix),
        )


def _reference(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> Tensor:
    """Reference in torch; also the CPU kernel."""
    dtype = torch.promote_types(compute_dtype(images), compute_dtype(prediction))
    per_patch = prediction.new_empty(prediction.shape[:2], dtype=dtype)
    for chunk, error in _errors(prediction, images, patch_size, mean, std, norm_pix):
        per_patch[chunk] = torch.linalg.vector_norm(error, dim=-1).square() / error.shape[-1]
    if mask is None:
        return per_patch.mean()
    return (per_patch * mask).sum() / mask.sum()


def _fake(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> Tensor:
    return prediction.new_empty((), dtype=torch.promote_types(compute_dtype(images), compute_dtype(prediction)))


def _backward_reference(
    grad: Tensor,
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> Tensor:
    """Reference in torch; also the CPU kernel. It recomputes the target, so forward saves only its inputs."""
    scale = grad * 2.0 / prediction.shape[-1]
    scale = scale / prediction.shape[:2].numel() if mask is None else (scale / mask.sum() * mask)[..., None]
    to_prediction = prediction.new_empty(prediction.shape)
    for chunk, error in _errors(prediction, images, patch_size, mean, std, norm_pix):
        to_prediction[chunk] = error.mul_(scale if mask is None else scale[chunk])
    return to_prediction


def _backward_fake(
    grad: Tensor,
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> Tensor:
    return prediction.new_empty(prediction.shape)


_patch_loss_backward = register(
    "patch_loss_backward", _backward_reference, _backward_fake, triton="patch_loss_triton", part="_backward"
)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    prediction, images, mask, *ctx.rest = inputs
    ctx.save_for_backward(prediction, images, mask)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]  # torch's own signature
    prediction, images, mask = ctx.saved_tensors
    return _patch_loss_backward(grad, prediction, images, mask, *ctx.rest), None, None, None, None, None, None


_patch_loss = register(
    "patch_loss", _reference, _fake, triton="patch_loss_triton", backward=_backward, setup_context=_setup_context
)


def patch_loss(
    prediction: Tensor,
    images: Tensor,
    *,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared error between predicted and clean patches.

    Equivalent PyTorch:

        target = patchify((images - mean) / std)
        if norm_pix:
            target = (target - target.mean(-1)) / (target.var(-1) + 1e-6) ** 0.5     # unbiased variance
        loss = ((prediction - target) ** 2).mean(-1)                                 # per patch
        loss = loss.mean()  or  (loss * mask).sum() / mask.sum()

    Args:
        prediction: (B, L, D) in any floating dtype; squared errors are taken in float32 (float64 for float64).
        images: the clean images, uint8 (B, H, W, C) or float pixels (B, C, H, W) in [0, 1].
        patch_size: side P of a square patch.
        mean: per-channel mean in [0, 1] units.
        std: per-channel standard deviation in [0, 1] units.
        norm_pix: normalise each target patch by its own mean and unbiased variance.
        mask: optional bool (B, L); True patches count. A mask that selects nothing gives NaN.

    Returns:
        Scalar, float32 (float64 for float64 inputs). Differentiable in `prediction` only. No double backward.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device, or images that require a gradient.

    Source: He et al. 2022 (MAE), section 3; You et al. 2023 (NIM), section 3.
    """
    height, width = check_images(images, patch_size=patch_size, mean=mean, std=std)
    length, size = (height // patch_size) * (width // patch_size), patch_size * patch_size * len(mean)
    expected = (images.shape[0], length, size)
    if not prediction.is_floating_point():
        raise TypeError(f"prediction must be floating point, got {prediction.dtype}")
    if tuple(prediction.shape) != expected:
        raise ValueError(f"prediction must have shape {expected} for these images, got {tuple(prediction.shape)}")
    if norm_pix and size < 2:
        raise ValueError("norm_pix needs at least two values per patch; use norm_pix=False or a larger patch")
    if images.requires_grad:
        raise ValueError("patch_loss is not differentiable in the images; detach them")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (B, L), got {mask.dtype}")
    if mask is not None and tuple(mask.shape) != expected[:2]:
        raise ValueError(f"mask must have shape {expected[:2]}, got {tuple(mask.shape)}")
    for name, tensor in (("images are", images), ("mask is", mask)):
        if tensor is not None and tensor.device != prediction.device:
            raise ValueError(f"{name} on {tensor.device} and prediction is on {prediction.device}")
    loss: Tensor = _patch_loss(prediction, images, mask, patch_size, list(mean), list(std), norm_pix)
    return loss
