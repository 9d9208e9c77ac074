"""`norm_linear`: layer norm and the linear layer behind it. It keeps the input of the norm alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from denim.kernels.dispatch import register
from denim.kernels.linear import check_linear, input_gradient, weight_gradients

__all__ = ["norm_linear"]


def _reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Reference in torch; also the CPU kernel."""
    normal = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    return F.linear(normal.to(weight.dtype), weight, bias)


def _fake(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype)


def _backward_reference(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, norm_weight, norm_bias, weight and bias; an empty tensor for each that is not wanted.

    These are autograd's own kernels in its order, so the gradients have its bits.
    """
    shape = norm_weight.shape
    normal, mean, inverse_std = torch.native_layer_norm(x, shape, norm_weight, norm_bias, eps)
    given = normal.to(weight.dtype)
    to_weight, to_bias = weight_gradients(grad, given, wanted[3], wanted[4])
    needed = list(wanted[:3])
    to_norm: list[Tensor | None] = [None] * 3
    if any(needed):
        # In the memory of what has been used: to allocate as much again costs time. Of the same dtype, `given` is
        # `normal`, and nothing is copied.
        to_normal = normal.copy_(input_gradient(grad, weight, out=given))
        del given
        to_norm = list(
            torch.ops.aten.native_layer_norm_backward(
                to_normal, x, shape, mean, inverse_std, norm_weight, norm_bias, needed
            )
        )
    to_x, to_norm_weight, to_norm_bias = (x.new_empty(0) if value is None else value for value in to_norm)
    return to_x, to_norm_weight, to_norm_bias, to_weight, to_bias


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    likes = (x, norm_weight, norm_bias, weight, weight[:, 0])
    to_x, to_norm_weight, to_norm_bias, to_weight, to_bias = (
        like.new_empty(like.shape if need else 0) for like, need in zip(likes, wanted, strict=True)
    )
    return to_x, to_norm_weight, to_norm_bias, to_weight, to_bias


_norm_linear_backward = register(
    "norm_linear_backward", _backward_reference, _backward_fake, triton="norm_linear_triton", part="_backward"
)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    x, norm_weight, norm_bias, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, norm_weight, norm_bias, weight)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]  # torch's own signature
    wanted = ctx.needs_input_grad[:5]
    gradients = _norm_linear_backward(grad, *ctx.saved_tensors, ctx.eps, wanted)
    return *(value if need else None for value, need in zip(gradients, wanted, strict=True)), None


_norm_linear = register(
    "norm_linear",
    _reference,
    _fake,
    triton="norm_linear_triton",
    backward=_backward,
    setup_context=_setup_context,
)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """A linear layer of a layer norm. Training keeps x for the backward pass, which normalises it again.

    Equivalent PyTorch:

        F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)

    PyTorch keeps the normalised x beside x. On the CPU result and gradients have the bits of the equivalent
    (for contiguous x).

    Args:
        x: (..., in_features), floating.
        norm_weight: (in_features,), floating.
        norm_bias: (in_features,), floating.
        weight: (out_features, in_features).
        bias: (out_features,), or None.
        eps: added to the variance inside the root; nn.LayerNorm's default is 1e-5, and ViTs have 1e-6.

    Returns:
        (..., out_features), in the dtype of x. Under autocast the norm is computed in the dtype of x, and the product,
        which gives the result its dtype, in autocast's. Differentiable in all tensors; the backward pass computes the
        gradients of all that require one, also where autograd is asked for some of them. No double backward.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device.

    Source: Ba et al. 2016 (layer normalization), equations 3 and 4.
    """
    weight, bias = check_linear(x, weight, bias)
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(f"{name} must have shape ({x.shape[-1]},), got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x is on {x.device}")
    out: Tensor = _norm_linear(x, norm_weight, norm_bias, weight, bias, eps)
    return out
