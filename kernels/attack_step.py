"""Random start and step of an L-infinity attack for a whole batch, with a radius and a step size per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from denim.kernels.dispatch import register
from denim.kernels.noise import Stream, check_seeds, uniform_noise
from denim.kernels.patches import compute_dtype, sample_chunks

__all__ = ["attack_start", "attack_step"]


def _column(size: Tensor, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """() or (B,) as (B, 1, ...), which broadcasts with pixels (B, ...)."""
    return size.to(dtype).expand(len(pixels)).reshape(-1, *(1,) * (pixels.dim() - 1))


def _reference(pixels: Tensor, origin: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor) -> Tensor:
    """Reference in torch; also the CPU kernel."""
    dtype = torch.promote_types(compute_dtype(pixels), compute_dtype(origin))
    step, radius = _column(step_size, pixels, dtype), _column(epsilon, pixels, dtype)
    moved = pixels.new_empty(pixels.shape)
    for chunk in sample_chunks(len(pixels), pixels.shape[1:].numel(), pixels.device):
        slope, centre, size = gradient[chunk], origin[chunk], radius[chunk]
        # torch.sign(NaN) is 0, which would hide a broken gradient. clamp(0, 0) is NaN for NaN and 0 for all others.
        direction = slope.sign().add_(slope.clamp(0, 0)).to(dtype)
        stepped = torch.addcmul(pixels[chunk].to(dtype), step[chunk], direction)
        moved[chunk] = torch.clamp(stepped, centre - size, centre + size).clamp_(0, 1)
    return moved


def _fake(pixels: Tensor, origin: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor) -> Tensor:
    return pixels.new_empty(pixels.shape)


_attack_step = register("attack_step", _reference, _fake, triton="attack_step_triton")


def _start_reference(pixels: Tensor, seeds: Tensor, epsilon: Tensor) -> Tensor:
    """Reference in torch; also the CPU kernel."""
    dtype = compute_dtype(pixels)
    noise = uniform_noise(seeds, pixels.shape[1:], Stream.START).to(dtype)
    moved = pixels.to(dtype) + _column(epsilon, pixels, dtype) * (2 * noise - 1)
    return moved.clamp(0, 1).to(pixels.dtype).contiguous()


def _start_fake(pixels: Tensor, seeds: Tensor, epsilon: Tensor) -> Tensor:
    return pixels.new_empty(pixels.shape)


_attack_start = register("attack_start", _start_reference, _start_fake, triton="attack_step_triton", part="_start")


def _check(pixels: Tensor, others: dict[str, Tensor], sizes: dict[str, float | Tensor]) -> list[Tensor]:
    """Check the arguments of both operations; return the sizes as tensors () or (B,) on the device of the pixels."""
    if pixels.dim() == 0:
        raise ValueError("pixels must have shape (B, ...), got ()")
    tensors = {}
    for name, value in sizes.items():
        if isinstance(value, Tensor):
            size = value.to(pixels.device) if value.dim() == 0 else value
        else:
            # torch.full runs on the device. A copy from the host would synchronise, and CUDA graphs cannot capture it.
            size = torch.full((), value, dtype=compute_dtype(pixels), device=pixels.device)
        if tuple(size.shape) not in ((), (pixels.shape[0],)):
            raise ValueError(f"{name} must be a scalar or ({pixels.shape[0]},), got {tuple(size.shape)}")
        tensors[name] = size.detach()
    for name, tensor in (("pixels", pixels), *others.items(), *tensors.items()):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != pixels.device:
            raise ValueError(f"{name} is on {tensor.device} and pixels are on {pixels.device}")
        if name in others and tensor.shape != pixels.shape:
            raise ValueError(f"{name} must have the shape of pixels {tuple(pixels.shape)}, got {tuple(tensor.shape)}")
    return list(tensors.values())


def attack_step(
    pixels: Tensor, origin: Tensor, gradient: Tensor, *, step_size: float | Tensor, epsilon: float | Tensor
) -> Tensor:
    """Step along the sign of the gradient, project onto the L-infinity ball around the origin, clamp to [0, 1].

    Equivalent PyTorch:

        moved = pixels + step_size * gradient.sign()
        moved = origin + (moved - origin).clamp(-epsilon, epsilon)
        moved = moved.clamp(0, 1)

    Args:
        pixels: (B, ...) float in [0, 1], the present iterate.
        origin: same shape, the clean image.
        gradient: same shape, of the loss that the attack maximises. Where it is NaN, the result is NaN.
        step_size: float or (B,), in [0, 1] units; a negative step size minimises the loss.
        epsilon: float or (B,), radius in [0, 1] units.

    Returns:
        The next iterate, in the shape and dtype of `pixels`. Not differentiable.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices differ, or epsilon or step_size is neither a scalar nor (B,).

    Source: Madry et al. 2018, equation 2 (projected gradient descent).
    """
    others = {"origin": origin, "gradient": gradient}
    step, radius = _check(pixels, others, {"step_size": step_size, "epsilon": epsilon})
    moved: Tensor = _attack_step(pixels.detach(), origin.detach(), gradient.detach(), step, radius)
    return moved


def attack_start(pixels: Tensor, seeds: Tensor, *, epsilon: float | Tensor) -> Tensor:
    """A point drawn uniformly from the L-infinity ball around each image, clamped to [0, 1].

    Equivalent PyTorch:

        noise = uniform_noise(seeds, pixels.shape[1:], Stream.START)
        moved = (pixels + epsilon * (2 * noise - 1)).clamp(0, 1)

    The result is a pure function of seed, position and pixel, with the same bits on every device. It is computed in
    float32 (float64 for float64 pixels) and rounded once to the dtype of the pixels.

    Args:
        pixels: (B, ...) float in [0, 1], the clean image.
        seeds: int64 (B,), one per sample. Positions count through a sample in row-major order of its shape; its strides
            do not matter.
        epsilon: float or (B,), radius in [0, 1] units.

    Returns:
        The first iterate, in the shape and dtype of `pixels`. Not differentiable.

    Raises:
        TypeError: pixels or epsilon are not floating point, or seeds are not int64.
        ValueError: shapes or devices differ, or epsilon is neither a scalar nor (B,).

    Source: Madry et al. 2018, section 2.1 (random restarts of projected gradient descent).
    """
    (radius,) = _check(pixels, {}, {"epsilon": epsilon})
    check_seeds(seeds)
    if tuple(seeds.shape) != (pixels.shape[0],):
        raise ValueError(f"seeds must have shape ({pixels.shape[0]},), got {tuple(seeds.shape)}")
    if seeds.device != pixels.device:
        raise ValueError(f"seeds are on {seeds.device} and pixels are on {pixels.device}")
    start: Tensor = _attack_start(pixels.detach(), seeds, radius)
    return start
