"""Lean linear layers: their backward pass computes cheap inputs again instead of keeping them.

Training keeps the input of every linear layer for the gradient of its weight. In a block two of these inputs are layer
norms and one is a GELU. They cost little beside the products: `norm_linear` and `gelu_linear` compute them again.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from denim.kernels import gelu_linear, norm_linear

__all__ = ["apply_gelu_linear", "apply_norm_linear", "is_plain"]

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a call of the module is its class's `forward` and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    changed = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return type(module) is kind and not changed and not any(hooks)


def _keeps_input(linear: nn.Linear) -> bool:
    """Whether the layer is being trained. Autograd keeps its input for the gradient of its weight alone.

    An attack on a model in evaluation mode wants the gradient of the image alone. Autograd then leaves out those of the
    weights, which a custom backward pass cannot do: it is not told which gradients are wanted.
    """
    return linear.training and torch.is_grad_enabled() and linear.weight.requires_grad


def apply_norm_linear(norm: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """linear(norm(x)); by `norm_linear` in training, where autograd would keep norm(x), if both modules are torch's."""
    if is_plain(norm, nn.LayerNorm) and is_plain(linear, nn.Linear) and _keeps_input(linear):
        affine = norm.weight is not None and norm.bias is not None
        if affine and norm.normalized_shape == x.shape[-1:]:
            return norm_linear(x, norm.weight, norm.bias, linear.weight, linear.bias, eps=norm.eps)
    out: Tensor = linear(norm(x))
    return out


def apply_gelu_linear(act: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    """linear(act(x)); by `gelu_linear` in training, where autograd would keep act(x), if both modules are torch's."""
    exact = is_plain(act, nn.GELU) and act.approximate == "none"
    if exact and is_plain(linear, nn.Linear) and _keeps_input(linear):
        return gelu_linear(x, linear.weight, linear.bias)
    out: Tensor = linear(act(x))
    return out
