# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Memory accesses of the Triton kernels: wide loads and stores whose elements stay in the thread that moves them."""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "chunks",
    "load_planes",
    "load_run",
    "on_device",
    "per_channel",
    "store_planes",
    "store_run",
    "strided_samples",
]


@triton.jit
def per_channel(values, channel, CHANNELS: tl.constexpr):
    """`values[channel]` for every element, by selection: Triton indexes tuples by constants only."""
    chosen = values[0]
    for c in tl.static_range(1, CHANNELS):
        chosen = tl.where(channel == c, values[c], chosen)
    return chosen


@triton.jit
def chunks(block, SIZE: tl.constexpr):
    """(rows, columns) to (chunks, rows, SIZE).

    Triton assigns elements to threads along the last dimensions first: the SIZE elements of a chunk to one thread, the
    rows to different threads, and then the other chunks of a row to the thread that has its first. The words of the
    generator are arranged in the same way. A thread thus keeps its positions from the load to the store: the channel of
    every register is a constant, and shared memory is not used.
    """
    return tl.permute(tl.reshape(block, (block.shape[0], block.shape[1] // SIZE, SIZE)), (1, 0, 2))


@triton.constexpr_function
def _piece(count, widest):
    """The largest power of two that divides `count`, at most `widest`."""
    return min(count & -count, widest)


@triton.constexpr_function
def _log2(size):
    return size.bit_length() - 1


@triton.jit
def load_run(pointer, position, inside, COUNT: tl.constexpr):
    """COUNT contiguous elements per thread from `pointer + position * COUNT` on: a tuple of float32 (threads,)."""
    # The run is loaded in pieces of equal size, of at most 16 bytes.
    WIDEST: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    SIZE: tl.constexpr = _piece(COUNT, WIDEST)
    elements = ()
    for piece in tl.static_range(COUNT // SIZE):
        place = position[:, None] * COUNT + (piece * SIZE + tl.arange(0, SIZE)[None, :])
        values = tl.load(pointer + place, mask=tl.broadcast_to(inside[:, None], place.shape), other=0)
        # Columns are split into even and odd ones until each part is one column. Column i ends up in part i.
        parts = (values,)
        for level in tl.static_range(_log2(SIZE)):
            even = ()
            odd = ()
            for i in tl.static_range(1 << level):
                first, second = tl.split(tl.reshape(parts[i], (place.shape[0], SIZE >> (level + 1), 2)))
                even = even + (first,)
                odd = odd + (second,)
            parts = even + odd
        for i in tl.static_range(SIZE):
            elements = elements + (tl.reshape(parts[i], (place.shape[0],)).to(tl.float32),)
    return elements


@triton.jit
def store_run(pointer, position, inside, elements, COUNT: tl.constexpr):
    """The inverse of `load_run`."""
    WIDEST: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    SIZE: tl.constexpr = _piece(COUNT, WIDEST)
    LEVELS: tl.constexpr = _log2(SIZE)
    for piece in tl.static_range(COUNT // SIZE):
        place = position[:, None] * COUNT + (piece * SIZE + tl.arange(0, SIZE)[None, :])
        parts = ()
        for i in tl.static_range(SIZE):
            value = elements[piece * SIZE + i].to(pointer.dtype.element_ty)
            parts = parts + (tl.reshape(value, (place.shape[0], 1)),)
        for level in tl.static_range(LEVELS):
            joined = ()
            for i in tl.static_range(SIZE >> (level + 1)):
                both = tl.join(parts[i], parts[i + (SIZE >> (level + 1))])
                joined = joined + (tl.reshape(both, (place.shape[0], 2 << level)),)
            parts = joined
        tl.store(pointer + place, parts[0], mask=tl.broadcast_to(inside[:, None], place.shape))


@triton.jit
def load_planes(pointer, position, plane, inside, RUN: tl.constexpr, CHANNELS: tl.constexpr):
    """RUN pixels per thread from planes of `plane` pixels, as `load_run`: a tuple in (pixel, channel) order."""
    planar = ()
    for c in tl.static_range(CHANNELS):
        planar = planar + load_run(pointer + c * plane, position, inside, RUN)
    elements = ()
    for e in tl.static_range(RUN * CHANNELS):
        elements = elements + (planar[e % CHANNELS * RUN + e // CHANNELS],)
    return elements


@triton.jit
def store_planes(pointer, position, plane, inside, elements, RUN: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of `load_planes`."""
    for c in tl.static_range(CHANNELS):
        planar = ()
        for pixel in tl.static_range(RUN):
            planar = planar + (elements[pixel * CHANNELS + c],)
        store_run(pointer + c * plane, position, inside, planar, RUN)


def strided_samples(patches: Tensor) -> tuple[Tensor, int, int]:
    """Addresses of patches without a copy: patch l of sample n begins at `base[(n * stride + first + l) * D]`.

    A decoder's output without its class token is a view whose samples lie further apart and whose first patch need not
    begin at a multiple of 16 bytes, which Triton would answer with narrow accesses. An earlier patch of the same memory
    that does is then taken as the base: the kernels' wide accesses follow from its alignment and from D.

    Args:
        patches: (..., L, D), any strides. They are copied unless the patches of a sample are contiguous, and samples
            are equally far apart, by whole patches.

    Returns:
        base: tensor that begins at `base[0]` and ends with the last patch.
        first: patches from the base to the first sample.
        stride: patches from one sample to the next.
    """
    size = patches.shape[-1]
    samples = patches.flatten(0, -3) if patches.dim() > 3 else patches
    if samples.stride()[1:] != (size, 1) or samples.stride(0) % size:
        samples = samples.contiguous()
    bytes_off = samples.storage_offset() * samples.itemsize
    # After this many patches, addresses repeat modulo 16 bytes.
    period = 16 // math.gcd(16, size * samples.itemsize)
    for first in range(period):
        if (bytes_off - first * size * samples.itemsize) % 16 == 0 and first * size <= samples.storage_offset():
            stride = samples.stride(0) // size
            if first and len(samples):
                rows = first + (len(samples) - 1) * stride + samples.shape[1]
                samples = samples.as_strided((rows, size), (size, 1), samples.storage_offset() - first * size)
            return samples, first, stride
    return samples, 0, samples.stride(0) // size


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` the current device while a kernel is launched: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
