# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernels of `gelu_linear`: the GELU and its gradient, elementwise. The matrix products are torch's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels.dispatch import GPU
from denim.kernels.linear import input_gradient, weight_gradients
from denim.kernels.memory_triton import on_device

__all__ = ["gelu_backward_kernel", "gelu_kernel", "launch", "launch_backward", "serves", "serves_backward"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
THREADS = 128
# Elements of a program: eight of a thread, one 16-byte access of a 2-byte dtype, two of float32.
BLOCK = 8 * THREADS

_ROOT_HALF: tl.constexpr = tl.constexpr(math.sqrt(0.5))
_DENSITY_AT_0: tl.constexpr = tl.constexpr(1 / math.sqrt(2 * math.pi))


@triton.jit
def _places(elements, BLOCK: tl.constexpr):
    # The part that can exceed 32 bits is a 64-bit scalar; each element adds a 32-bit offset to it.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    return first, offset, offset < tl.minimum(elements - first, BLOCK).to(tl.int32)


# `elements` is specialised: accesses are wide where it is a multiple of 16.
@triton.jit
def gelu_kernel(x, out, elements, BLOCK: tl.constexpr):
    """One program: BLOCK elements. Tensors are contiguous."""
    first, offset, inside = _places(elements, BLOCK)
    value = tl.load(x + first + offset, mask=inside, other=0).to(tl.float32)
    result = value * (0.5 + 0.5 * tl.erf(value * _ROOT_HALF))
    tl.store(out + first + offset, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward_kernel(grad, x, to_x, elements, BLOCK: tl.constexpr):
    """One program: BLOCK elements; `grad` is the gradient of the GELU's result. Tensors are contiguous."""
    first, offset, inside = _places(elements, BLOCK)
    upstream = tl.load(grad + first + offset, mask=inside, other=0).to(tl.float32)
    value = tl.load(x + first + offset, mask=inside, other=0).to(tl.float32)
    distribution = 0.5 + 0.5 * tl.erf(value * _ROOT_HALF)
    density = _DENSITY_AT_0 * tl.exp(-0.5 * value * value)
    result = upstream * (distribution + value * density)
    tl.store(to_x + first + offset, result.to(to_x.dtype.element_ty), mask=inside)


def serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `launch` takes these arguments of `gelu_linear`. The reference serves float64."""
    return x.dtype in DTYPES and weight.dtype in DTYPES


def _gelu(x: Tensor, dtype: torch.dtype, gpu: GPU) -> Tensor:
    activated = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        with on_device(x.device):
            gelu_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, activated, x.numel(), BLOCK=BLOCK, num_warps=THREADS // gpu.warp_size
            )
    return activated


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, *, gpu: GPU) -> Tensor:
    """Run the forward kernel and the product on arguments that `gelu_linear` has checked.

    Args:
        x: (..., in_features), one of `DTYPES`, any strides.
        weight: (out_features, in_features), one of `DTYPES`.
        bias: (out_features,) in the dtype of weight, or None.
        gpu: what the kernel is built for.

    Returns:
        (..., out_features) in the dtype of weight, contiguous.
    """
    return F.linear(_gelu(x.contiguous(), weight.dtype, gpu), weight, bias)


def serves_backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> bool:
    """Whether `launch_backward` takes these arguments of the operator."""
    return all(tensor.dtype in DTYPES for tensor in (grad, x, weight))


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool], *, gpu: GPU
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the GELU again, multiply, and run the backward kernel. Arguments as for `launch`.

    Args:
        grad: gradient of the result, in the dtype of weight.
        x: as for `launch`.
        weight: likewise.
        wanted: whether x, weight and bias need a gradient.
        gpu: what the kernels are built for.

    Returns:
        Gradients of these three, contiguous; an empty tensor for each that is not wanted.
    """
    x = x.contiguous()
    activated = _gelu(x, weight.dtype, gpu) if wanted[1] else x
    to_weight, to_bias = weight_gradients(grad, activated, wanted[1], wanted[2])
    del activated  # before the next tensor of its size
    if not wanted[0]:
        return x.new_empty(0), to_weight, to_bias
    to_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with on_device(x.device):
            gelu_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                input_gradient(grad, weight), x, to_x, x.numel(), BLOCK=BLOCK, num_warps=THREADS // gpu.warp_size
            )
    return to_x, to_weight, to_bias
