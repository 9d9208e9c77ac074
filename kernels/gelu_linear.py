"""`gelu_linear`: GELU and the linear layer behind it. It keeps the input of the GELU alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from denim.kernels.dispatch import register
from denim.kernels.linear import check_linear, input_gradient, weight_gradients

__all__ = ["gelu_linear"]


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Reference in torch; also the CPU kernel."""
    return F.linear(F.gelu(x).to(weight.dtype), weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype)


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; an empty tensor for each that is not wanted.

    These are autograd's own kernels in its order, so the gradients have its bits.
    """
    x = x.contiguous()
    activated = F.gelu(x).to(weight.dtype) if wanted[1] else None
    to_weight, to_bias = weight_gradients(grad, x if activated is None else activated, wanted[1], wanted[2])
    if not wanted[0]:
        return x.new_empty(0), to_weight, to_bias
    # In the memory of what has been used: to allocate as much again costs time.
    to_activated = input_gradient(grad, weight, out=activated).to(x.dtype)
    return torch.ops.aten.gelu_backward.grad_input(to_activated, x, grad_input=to_activated), to_weight, to_bias


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    to_x, to_weight, to_bias = (
        like.new_empty(like.shape if need else 0) for like, need in zip((x, weight, weight[:, 0]), wanted, strict=True)
    )
    return to_x, to_weight, to_bias


_gelu_linear_backward = register(
    "gelu_linear_backward", _backward_reference, _backward_fake, triton="gelu_linear_triton", part="_backward"
)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # torch's own signature
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]  # torch's own signature
    wanted = ctx.needs_input_grad[:3]
    gradients = _gelu_linear_backward(grad, *ctx.saved_tensors, wanted)
    return tuple(value if need else None for value, need in zip(gradients, wanted, strict=True))


_gelu_linear = register(
    "gelu_linear",
    _reference,
    _fake,
    triton="gelu_linear_triton",
    backward=_backward,
    setup_context=_setup_context,
)


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of a GELU. Training keeps x for the backward pass, which computes the GELU again.

    Equivalent PyTorch:

        F.linear(F.gelu(x), weight, bias)       # gelu(x) = x (1 + erf(x / sqrt(2))) / 2, without approximation

    PyTorch keeps gelu(x) beside x. On the CPU result and gradients have the bits of the equivalent
    (for contiguous x).

    Args:
        x: (..., in_features), floating.
        weight: (out_features, in_features).
        bias: (out_features,), or None.

    Returns:
        (..., out_features), in the dtype of x. Under autocast the GELU is computed in the dtype of x, and the product,
        which gives the result its dtype, in autocast's. Differentiable in all tensors; the backward pass computes the
        gradients of all that require one, also where autograd is asked for some of them. No double backward.

    Raises:
        TypeError: a wrong dtype.
        ValueError: a wrong shape or device.

    Source: Hendrycks and Gimpel 2016 (GELU), section 2.
    """
    weight, bias = check_linear(x, weight, bias)
    out: Tensor = _gelu_linear(x, weight, bias)
    return out
