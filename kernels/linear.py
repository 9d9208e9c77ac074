"""What `norm_linear` and `gelu_linear` share: the dtype of a linear layer, its checks, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_linear", "computing_dtype", "input_gradient", "weight_gradients"]


def _autocasts(device: torch.device) -> bool:
    # The device "meta" has no autocast, and raises when it is asked.
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def computing_dtype(weight: Tensor) -> torch.dtype:
    """dtype in which a matrix product with a weight is computed: that of the weight, or autocast's where it is on."""
    # Autocast leaves float64 alone.
    if weight.dtype == torch.float64 or not _autocasts(weight.device):
        return weight.dtype
    return torch.get_autocast_dtype(weight.device.type)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Check the input and the parameters of a linear layer; return the parameters as autocast gives them to it.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,), or None.

    Returns:
        weight and bias in `computing_dtype`; the gradients of the arguments flow through the cast.

    Raises:
        TypeError: a dtype is not floating, or outside of autocast they differ.
        ValueError: a wrong shape or device.
    """
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} and weight is on {weight.device}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (out_features, in_features), got {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have shape (..., {weight.shape[1]}) for this weight, got {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    dtype = computing_dtype(weight)
    given = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    if len(given) > 1 and not _autocasts(weight.device):
        dtypes = ", ".join(sorted(map(str, given)))
        raise TypeError(f"x, weight and bias must have one dtype outside of autocast, got {dtypes}")
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def weight_gradients(grad: Tensor, given: Tensor, weight: bool, bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (out, in) and the bias (out,) of a linear layer, as autograd computes them.

    Args:
        grad: (..., out), the gradient of the layer's result.
        given: (..., in), the layer's input.
        weight: whether the first is wanted; an empty tensor takes its place otherwise.
        bias: likewise for the second.
    """
    upstream = _rows(grad)
    to_weight = upstream.t() @ _rows(given) if weight else grad.new_empty(0)
    to_bias = upstream.sum(dim=0) if bias else grad.new_empty(0)
    return to_weight, to_bias


def input_gradient(grad: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient (..., in) of the input of a linear layer, in the dtype of the weight, as autograd computes it.

    Args:
        grad: (..., out), the gradient of the layer's result.
        weight: (out, in).
        out: memory for the result, contiguous and in its dtype; by default it is new.
    """
    if out is None:
        out = weight.new_empty((*grad.shape[:-1], weight.shape[1]))
    torch.mm(_rows(grad), weight, out=out.view(-1, weight.shape[1]))
    return out
