# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernels of `norm_linear`: the layer norm and its gradients. The matrix products are torch's.

A row is a token. A program has whole rows, one after another: the sums over a row stay within it, and within a warp up
to 256 columns. The norm is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels.dispatch import GPU
from denim.kernels.linear import input_gradient, weight_gradients
from denim.kernels.memory_triton import on_device

__all__ = [
    "launch",
    "launch_backward",
    "norm_backward_kernel",
    "norm_kernel",
    "serves",
    "serves_backward",
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_COLS = 8192
# Elements of a thread, up to the largest program.
PER_THREAD = 8
MAX_THREADS = 512
# Rows of a program of the forward pass, which reads the norm's weight and bias once for all of them.
ROWS = 8
# Rows of a program of the backward pass, which adds up their gradients of the norm's weight and bias.
BACKWARD_ROWS = 32


@triton.jit
def _normalised(x, eps, inside, COLS: tl.constexpr):
    """A row minus its mean, over its standard deviation, and one over that deviation."""
    mean = tl.sum(x, axis=0) * (1.0 / COLS)
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) * (1.0 / COLS)
    inverse_std = tl.rsqrt(variance + eps)
    return centred * inverse_std, inverse_std


@triton.jit(do_not_specialize=["rows", "eps"])
def norm_kernel(x, weight, bias, out, rows, eps, COLS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """One program: ROWS rows of COLS elements, one after another. All tensors are contiguous."""
    col = tl.arange(0, BLOCK)
    gain = tl.load(weight + col, mask=col < COLS, other=0).to(tl.float32)
    shift = tl.load(bias + col, mask=col < COLS, other=0).to(tl.float32)
    # The part of an offset that can exceed 32 bits is a 64-bit scalar; a row adds a 32-bit offset to it.
    first = tl.program_id(0).to(tl.int64) * ROWS
    left = tl.minimum(rows - first, ROWS).to(tl.int32)
    x += first * COLS
    out += first * COLS
    for row in range(ROWS):
        inside = (col < COLS) & (row < left)
        values = tl.load(x + (row * COLS + col), mask=inside, other=0).to(tl.float32)
        normal, _ = _normalised(values, eps, col < COLS, COLS)
        tl.store(out + (row * COLS + col), (normal * gain + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "eps"])
def norm_backward_kernel(
    grad, x, weight, to_x, partials, rows, eps, COLS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """One program: ROWS rows, one after another; `grad` is the gradient of the normalised rows.

    `partials` (programs, 2, COLS) gets the program's gradients of weight and bias.
    """
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    gain = tl.load(weight + col, mask=col < COLS, other=0).to(tl.float32)
    to_weight = tl.zeros((BLOCK,), tl.float32)
    to_bias = tl.zeros((BLOCK,), tl.float32)
    first = program * ROWS
    left = tl.minimum(rows - first, ROWS).to(tl.int32)
    grad += first * COLS
    x += first * COLS
    to_x += first * COLS
    for row in range(ROWS):
        inside = (col < COLS) & (row < left)
        upstream = tl.load(grad + (row * COLS + col), mask=inside, other=0).to(tl.float32)
        values = tl.load(x + (row * COLS + col), mask=inside, other=0).to(tl.float32)
        normal, inverse_std = _normalised(values, eps, col < COLS, COLS)
        scaled = upstream * gain
        along = tl.sum(scaled * normal, axis=0) * (1.0 / COLS)
        mean = tl.sum(scaled, axis=0) * (1.0 / COLS)
        result = (scaled - mean - normal * along) * inverse_std
        tl.store(to_x + (row * COLS + col), result.to(to_x.dtype.element_ty), mask=inside)
        to_weight += upstream * normal
        to_bias += upstream
    base = partials + program * (2 * COLS) + col
    tl.store(base, to_weight, mask=col < COLS)
    tl.store(base + COLS, to_bias, mask=col < COLS)


def _sizes(cols: int, gpu: GPU) -> dict[str, int]:
    """The width and the warps of a program."""
    block = triton.next_power_of_2(cols)
    return {"COLS": cols, "BLOCK": block, "num_warps": max(1, min(MAX_THREADS, block // PER_THREAD) // gpu.warp_size)}


def _serves(*tensors: Tensor, cols: int) -> bool:
    return all(tensor.dtype in DTYPES for tensor in tensors) and cols <= MAX_COLS


def serves(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> bool:
    """Whether `launch` takes these arguments of `norm_linear`. The reference serves float64 and very wide rows."""
    return _serves(x, norm_weight, norm_bias, weight, cols=x.shape[-1])


def _normalise(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, dtype: torch.dtype, gpu: GPU) -> Tensor:
    normal = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = x.shape[:-1].numel()
    if rows:
        with on_device(x.device):
            norm_kernel[(triton.cdiv(rows, ROWS),)](
                x, norm_weight, norm_bias, normal, rows, eps, ROWS=ROWS, **_sizes(x.shape[-1], gpu)
            )
    return normal


def launch(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    gpu: GPU,
) -> Tensor:
    """Run the forward kernel and the product on arguments that `norm_linear` has checked.

    Args:
        x: (..., in_features), one of `DTYPES`, any strides.
        norm_weight: (in_features,), one of `DTYPES`.
        norm_bias: likewise.
        weight: (out_features, in_features), one of `DTYPES`.
        bias: (out_features,) in the dtype of weight, or None.
        eps: added to the variance.
        gpu: what the kernel is built for.

    Returns:
        (..., out_features) in the dtype of weight, contiguous.
    """
    x, norm_weight, norm_bias = x.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    return F.linear(_normalise(x, norm_weight, norm_bias, eps, weight.dtype, gpu), weight, bias)


def serves_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float,
    wanted: Sequence[bool],
) -> bool:
    """Whether `launch_backward` takes these arguments of the operator."""
    return _serves(grad, x, norm_weight, norm_bias, weight, cols=x.shape[-1])


def launch_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float,
    wanted: Sequence[bool],
    *,
    gpu: GPU,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalise again, multiply, and run the backward kernel. Arguments as for `launch`.

    Args:
        grad: gradient of the result, in the dtype of weight.
        x: as for `launch`.
        norm_weight: likewise.
        norm_bias: likewise.
        weight: likewise.
        eps: likewise.
        wanted: whether x, norm_weight, norm_bias, weight and bias need a gradient.
        gpu: what the kernels are built for.

    Returns:
        Gradients of these five, contiguous; an empty tensor for each that is not wanted.
    """
    x, norm_weight, norm_bias = x.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    normal = _normalise(x, norm_weight, norm_bias, eps, weight.dtype, gpu) if wanted[3] else x
    to_weight, to_bias = weight_gradients(grad, normal, wanted[3], wanted[4])
    del normal  # before the next tensor of its size
    nothing = (x.new_empty(0) for _ in range(3))
    if not any(wanted[:3]):
        to_x, to_norm_weight, to_norm_bias = nothing
        return to_x, to_norm_weight, to_norm_bias, to_weight, to_bias
    rows = x.shape[:-1].numel()
    programs = triton.cdiv(rows, BACKWARD_ROWS)
    to_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    partials = torch.empty((programs, 2, x.shape[-1]), dtype=torch.float32, device=x.device)
    if programs:
        with on_device(x.device):
            norm_backward_kernel[(programs,)](
                input_gradient(grad, weight),
                x,
                norm_weight,
                to_x,
                partials,
                rows,
                eps,
                ROWS=BACKWARD_ROWS,
                **_sizes(x.shape[-1], gpu),
            )
    return (
        to_x if wanted[0] else next(nothing),
        partials[:, 0].sum(dim=0).to(norm_weight.dtype) if wanted[1] else next(nothing),
        partials[:, 1].sum(dim=0).to(norm_bias.dtype) if wanted[2] else next(nothing),
        to_weight,
        to_bias,
    )
