"""`attack_step`: one step of an L-infinity attack for a whole batch, with a radius and a step size per sample."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from denim.kernels.patches import compute_dtype

__all__ = ["attack_step"]


def _reference(pixels: Tensor, origin: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor) -> Tensor:
    """Torch reference, and the CPU kernel."""
    dtype = torch.promote_types(compute_dtype(pixels), compute_dtype(origin))
    per_sample = (-1, *(1,) * (pixels.dim() - 1))
    step, radius = step_size.to(dtype).reshape(per_sample), epsilon.to(dtype).reshape(per_sample)
    # torch.sign turns NaN into 0, which would hide a broken gradient.
    direction = torch.where(gradient.isnan(), gradient, gradient.sign()).to(dtype)
    moved = pixels.to(dtype) + step * direction
    low, high = (origin - radius).clamp(min=0), (origin + radius).clamp(max=1)
    return torch.minimum(torch.maximum(moved, low), high).to(pixels.dtype).contiguous()


_attack_step = torch.library.custom_op("denim::attack_step", _reference, mutates_args=())


@_attack_step.register_kernel("cuda")
def _(pixels: Tensor, origin: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor) -> Tensor:
    """Triton kernel. The reference serves float64, and platforms that have no Triton."""
    if importlib.util.find_spec("triton") is not None:
        # Imported at the first use: a CPU run needs no Triton, and importing Triton looks for a driver.
        from denim.kernels import attack_step_triton as kernel
        from denim.kernels.memory_triton import warp_size

        if all(tensor.dtype in kernel.DTYPES for tensor in (pixels, origin, gradient)):
            size = warp_size(pixels.device)
            return kernel.launch(pixels, origin, gradient, step_size, epsilon, warp_size=size)
    return _reference(pixels, origin, gradient, step_size, epsilon)


@_attack_step.register_fake
def _(pixels: Tensor, origin: Tensor, gradient: Tensor, step_size: Tensor, epsilon: Tensor) -> Tensor:
    return pixels.new_empty(pixels.shape)


def attack_step(
    pixels: Tensor, origin: Tensor, gradient: Tensor, *, step_size: float | Tensor, epsilon: float | Tensor
) -> Tensor:
    """Step along the sign of the gradient, project onto the L-infinity ball around the origin, clamp to [0, 1].

    Equivalent PyTorch::

        moved = pixels + step_size * gradient.sign()
        moved = origin + (moved - origin).clamp(-epsilon, epsilon)
        moved = moved.clamp(0, 1)

    Args:
        pixels: (B, ...) float in [0, 1], the present iterate.
        origin: same shape, the clean image.
        gradient: same shape, of the loss to be raised; NaN stays NaN, and is never turned into a step.
        step_size: float or (B,), in [0, 1] units; negative steps lower the loss.
        epsilon: float or (B,), radius in [0, 1] units.

    Returns:
        The next iterate, in the shape and dtype of `pixels`. Not differentiable.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices differ, or epsilon or step_size is neither a scalar nor (B,).

    Source: Madry et al. 2018, equation 2 (projected gradient descent).
    """
    if pixels.dim() == 0:
        raise ValueError("pixels must have shape (B, ...), got ()")
    sizes: dict[str, Tensor] = {}
    for name, value in (("step_size", step_size), ("epsilon", epsilon)):
        size = value if isinstance(value, Tensor) else torch.tensor(value, dtype=compute_dtype(pixels))
        size = size.to(pixels.device) if size.dim() == 0 else size
        if tuple(size.shape) not in ((), (pixels.shape[0],)):
            raise ValueError(f"{name} must be a scalar or ({pixels.shape[0]},), got {tuple(size.shape)}")
        sizes[name] = size
    for name, tensor in (("pixels", pixels), ("origin", origin), ("gradient", gradient), *sizes.items()):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != pixels.device:
            raise ValueError(f"{name} is on {tensor.device} and pixels are on {pixels.device}")
        if name not in sizes and tensor.shape != pixels.shape:
            raise ValueError(f"{name} must have the shape of pixels {tuple(pixels.shape)}, got {tuple(tensor.shape)}")
    moved: Tensor = _attack_step(
        pixels.detach(), origin.detach(), gradient.detach(), sizes["step_size"].detach(), sizes["epsilon"].detach()
    )
    return moved
