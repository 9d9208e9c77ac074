# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc, unreachable"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernels of `patch_loss`: the loss in two ordered stages, and its gradient.

The pixels of a patch stay in registers from their load to the squared error. Mean and variance are two passes over
registers, and the target is never written. There are no atomic operations, and each shape has one launch configuration,
so the result has the same bits in every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels.dispatch import GPU
from denim.kernels.memory_triton import chunks, on_device, per_channel, strided_samples
from denim.kernels.patches import VARIANCE_EPS

__all__ = [
    "launch",
    "launch_backward",
    "loss_kernel",
    "partials_kernel",
    "prediction_grad_kernel",
    "serves",
    "serves_backward",
    "tile",
]

# Of predictions and of pixels; images may be uint8 too.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

EPS = tl.constexpr(VARIANCE_EPS)
# Elements of a patch in the registers of one thread. Longer runs cost more occupancy than they save work.
MAX_RUN = 64
# Elements of a padded patch that fit the registers of a program: 16 warps of 32 threads with 48 elements each.
MAX_PATCH = 16 * 32 * 48
PARTIALS = 1024


@triton.jit
def _patch_sum(values, PATCHES: tl.constexpr):
    """Sum over each patch: (rows, columns) to (PATCHES,)."""
    # Columns are summed first, within a thread. Reshaping to (PATCHES, rows * columns) would move all values through
    # shared memory.
    return tl.sum(tl.reshape(tl.sum(values, axis=1), (PATCHES, values.shape[0] // PATCHES)), axis=1)


@triton.jit
def _to_rows(values, RUNS: tl.constexpr):
    """One value per patch to one per row: (patches,) to (patches * RUNS, 1)."""
    PATCHES: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, None], (PATCHES, RUNS)), (PATCHES * RUNS, 1))


@triton.jit
def _load(base, offsets, inside, SIZE: tl.constexpr):
    # Offsets are reshaped, not pointers: the AMD backend does not compile reshaped pointers.
    values = tl.load(base + chunks(offsets, SIZE), mask=chunks(inside, SIZE))
    return tl.reshape(tl.permute(values, (1, 0, 2)), inside.shape)


@triton.jit
def _place(tile_index, length, COUNT: tl.constexpr, PATCHES: tl.constexpr, RUNS: tl.constexpr, COLS: tl.constexpr):
    """For each row its patch in the sample and its run in the patch; for each element whether both exist."""
    row = tl.arange(0, PATCHES * RUNS).to(tl.uint32)
    patch = tile_index * PATCHES + row // RUNS
    run = row % RUNS
    inside = (patch < length) & (run < COUNT)
    return patch, run, tl.broadcast_to(inside[:, None], (PATCHES * RUNS, COLS))


@triton.jit
def _errors(
    prediction,
    images,
    scale,
    shift,
    patch,
    run,
    inside,
    length,
    patch_columns,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    NORM_PIX: tl.constexpr,
    PLANAR: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLS: tl.constexpr,
    COUNT: tl.constexpr,
    RUNS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """Prediction minus target in float32: SEGMENTS blocks (rows, COLS), zero in runs that pad a patch.

    `prediction` and `images` point to the sample. Patches beyond the last hold arbitrary values, which do not enter any
    other patch.
    """
    # Values are moved in chunks of 16 bytes. Neighbouring elements of a patch are not neighbours in planes, so there a
    # chunk is one value.
    PIXELS: tl.constexpr = 1 if PLANAR else min(COLS, 128 // images.dtype.element_ty.primitive_bitwidth)
    VALUES: tl.constexpr = min(COLS, 128 // prediction.dtype.element_ty.primitive_bitwidth)
    WIDTH: tl.constexpr = PATCH * CHANNELS
    SIZE: tl.constexpr = WIDTH * PATCH
    RUN: tl.constexpr = SEGMENTS * COLS
    PERIODS: tl.constexpr = WIDTH // RUN
    column = tl.arange(0, COLS)[None, :]
    y = patch // patch_columns.to(tl.uint32)
    x = patch - y * patch_columns.to(tl.uint32)
    line = y * PATCH + run // PERIODS
    first = run % PERIODS * RUN
    if PLANAR:
        position = line.to(tl.int64) * (patch_columns.to(tl.int64) * PATCH) + x * PATCH + first // CHANNELS
    else:
        position = (line.to(tl.int64) * patch_columns + x) * WIDTH + first
    row = (patch.to(tl.int64) * SIZE + run * RUN)[:, None]

    targets = ()
    predictions = ()
    for segment in tl.static_range(SEGMENTS):
        offset = segment * COLS + column
        if PLANAR:
            plane = length.to(tl.int64) * (PATCH * PATCH)
            source = position[:, None] + (offset % CHANNELS * plane + offset // CHANNELS)
        else:
            source = position[:, None] + offset
        channel = offset % CHANNELS
        clean = _load(images, source, inside, PIXELS).to(tl.float32)
        clean = clean * per_channel(scale, channel, CHANNELS) + per_channel(shift, channel, CHANNELS)
        targets = targets + (clean if COUNT == RUNS else tl.where(inside, clean, 0.0),)
        predictions = predictions + (_load(prediction, row + offset, inside, VALUES),)

    factor = tl.full((PATCHES * RUNS, 1), 1.0, tl.float32)
    if NORM_PIX:
        total = targets[0]
        for segment in tl.static_range(1, SEGMENTS):
            total += targets[segment]
        centre = _to_rows(_patch_sum(total, PATCHES) * (1.0 / SIZE), RUNS)
        centred = ()
        squares = tl.zeros_like(total)
        for segment in tl.static_range(SEGMENTS):
            deviation = targets[segment] - centre
            deviation = deviation if COUNT == RUNS else tl.where(inside, deviation, 0.0)
            squares += deviation * deviation
            centred = centred + (deviation,)
        targets = centred
        factor = _to_rows(tl.rsqrt(_patch_sum(squares, PATCHES) * (1.0 / (SIZE - 1)) + EPS), RUNS)

    errors = ()
    for segment in tl.static_range(SEGMENTS):
        error = predictions[segment].to(tl.float32) - targets[segment] * factor
        errors = errors + (error if COUNT == RUNS else tl.where(inside, error, 0.0),)
    return errors


@triton.jit(do_not_specialize=["first", "stride", "length", "patch_columns"])
def partials_kernel(
    prediction,
    images,
    mask,
    partials,
    scale,
    shift,
    first,
    stride,
    length,
    patch_columns,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    NORM_PIX: tl.constexpr,
    PLANAR: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLS: tl.constexpr,
    COUNT: tl.constexpr,
    RUNS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """First stage. One program: the loss of PATCHES patches of one sample, summed.

    `first` and `stride` say where samples lie in `prediction` (`strided_samples`); `length` is patches of a sample.
    """
    SIZE: tl.constexpr = PATCH * PATCH * CHANNELS
    program = tl.program_id(0).to(tl.uint32)
    tiles = tl.cdiv(length, PATCHES).to(tl.uint32)
    sample = (program // tiles).to(tl.int64)
    tile_index = program % tiles
    patch, run, inside = _place(tile_index, length.to(tl.uint32), COUNT, PATCHES, RUNS, COLS)
    errors = _errors(
        prediction + (sample * stride + first) * SIZE,
        images + sample * length * SIZE,
        scale,
        shift,
        patch,
        run,
        inside,
        length,
        patch_columns,
        PATCH,
        CHANNELS,
        NORM_PIX,
        PLANAR,
        SEGMENTS,
        COLS,
        COUNT,
        RUNS,
        PATCHES,
    )
    squares = errors[0] * errors[0]
    for segment in tl.static_range(1, SEGMENTS):
        squares += errors[segment] * errors[segment]
    per_patch = _patch_sum(squares, PATCHES) * (1.0 / SIZE)
    index = tile_index * PATCHES + tl.arange(0, PATCHES).to(tl.uint32)
    exists = index < length.to(tl.uint32)
    if mask is not None:
        per_patch *= tl.load(mask + sample * length + index, mask=exists, other=0).to(tl.float32)
    tl.store(partials + program, tl.sum(tl.where(exists, per_patch, 0.0), axis=0))


@triton.jit(do_not_specialize=["programs", "patches"])
def loss_kernel(partials, selected, loss, programs, patches, BLOCK: tl.constexpr):
    """Second stage, one program: adds partial losses in a fixed order and divides by the number of patches."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partials + index, mask=index < programs, other=0.0)
    count = patches if selected is None else tl.load(selected)
    tl.store(loss, tl.sum(total, axis=0) / count.to(tl.float32))


@triton.jit(do_not_specialize=["first", "stride", "length", "patch_columns", "patches"])
def prediction_grad_kernel(
    grad,
    prediction,
    images,
    mask,
    selected,
    out,
    scale,
    shift,
    first,
    stride,
    length,
    patch_columns,
    patches,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    NORM_PIX: tl.constexpr,
    PLANAR: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLS: tl.constexpr,
    COUNT: tl.constexpr,
    RUNS: tl.constexpr,
    PATCHES: tl.constexpr,
):
    """One program: the gradient of PATCHES patches of one sample, 2 (prediction - target) grad / (D count)."""
    SIZE: tl.constexpr = PATCH * PATCH * CHANNELS
    program = tl.program_id(0).to(tl.uint32)
    tiles = tl.cdiv(length, PATCHES).to(tl.uint32)
    sample = (program // tiles).to(tl.int64)
    patch, run, inside = _place(program % tiles, length.to(tl.uint32), COUNT, PATCHES, RUNS, COLS)
    errors = _errors(
        prediction + (sample * stride + first) * SIZE,
        images + sample * length * SIZE,
        scale,
        shift,
        patch,
        run,
        inside,
        length,
        patch_columns,
        PATCH,
        CHANNELS,
        NORM_PIX,
        PLANAR,
        SEGMENTS,
        COLS,
        COUNT,
        RUNS,
        PATCHES,
    )
    count = patches if selected is None else tl.load(selected)
    upstream = tl.load(grad).to(tl.float32) * (2.0 / SIZE) / count.to(tl.float32)
    if mask is not None:
        exists = patch < length.to(tl.uint32)
        upstream *= tl.load(mask + sample * length + patch, mask=exists, other=0).to(tl.float32)[:, None]
    STORE: tl.constexpr = min(COLS, 128 // out.dtype.element_ty.primitive_bitwidth)
    base = out + sample * length * SIZE
    row = patch.to(tl.int64) * SIZE + run * (SEGMENTS * COLS)
    column = tl.arange(0, COLS)[None, :]
    for segment in tl.static_range(SEGMENTS):
        value = (errors[segment] * upstream).to(out.dtype.element_ty)
        places = row[:, None] + (segment * COLS + column)
        tl.store(base + chunks(places, STORE), chunks(value, STORE), mask=chunks(inside, STORE))


def tile(patch_size: int, channels: int) -> dict[str, int] | None:
    """How a patch is divided into runs: the kernels' SEGMENTS, COLS, COUNT and RUNS; None where no division fits.

    A run is what one thread handles: SEGMENTS * COLS consecutive elements of one patch row, a whole period of the
    channels, so that every register has a channel known at compile time. A patch is COUNT runs, padded to RUNS.
    """
    width = patch_size * channels
    for columns in (16, 8, 4, 2, 1):
        segments = channels // math.gcd(channels, columns)
        if width % columns == 0 and segments * columns <= MAX_RUN:
            count = patch_size * width // (segments * columns)
            runs = triton.next_power_of_2(count)
            if runs * segments * columns > MAX_PATCH:
                return None
            return {"SEGMENTS": segments, "COLS": columns, "COUNT": count, "RUNS": runs}
    return None


def _arguments(
    prediction: Tensor,
    images: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
    gpu: GPU,
    block_runs: int,
) -> tuple[Tensor, Tensor, int, dict[str, object]]:
    """Prediction and images as both passes read them, the number of programs, and the kernels' arguments by name."""
    sizes = tile(patch_size, len(mean))
    if sizes is None:
        raise ValueError(f"no tile for patch size {patch_size} and {len(mean)} channels; the reference serves it")
    nhwc = images if images.dtype == torch.uint8 else images.permute(0, 2, 3, 1)
    # Pixels in channels_last memory are read like bytes; only true planes need their own addresses.
    planar = images.dtype != torch.uint8 and not nhwc.is_contiguous()
    batch, length, _ = prediction.shape
    base, first, stride = strided_samples(prediction)
    patches = max(1, block_runs // sizes["RUNS"])
    # A patch of at most one warp's runs has one run per thread. A larger patch gets as few warps as its elements allow,
    # because sums across warps go through shared memory.
    shared = 1 if sizes["RUNS"] <= gpu.warp_size else max(1, 48 // (sizes["SEGMENTS"] * sizes["COLS"]))
    unit = 255 if images.dtype == torch.uint8 else 1
    return (
        base,
        (images if planar else nhwc).contiguous(),
        batch * triton.cdiv(length, patches),
        {
            "scale": tuple(1 / (unit * value) for value in std),
            "shift": tuple(-centre / value for centre, value in zip(mean, std, strict=True)),
            "first": first,
            "stride": stride,
            "length": length,
            "patch_columns": nhwc.shape[2] // patch_size,
            "PATCH": patch_size,
            "CHANNELS": len(mean),
            "NORM_PIX": norm_pix,
            "PLANAR": planar,
            "PATCHES": patches,
            "num_warps": max(1, patches * sizes["RUNS"] // (gpu.warp_size * 2 ** int(math.log2(shared)))),
            **sizes,
        },
    )


def serves(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> bool:
    """Whether `launch` takes these arguments of `patch_loss`. The reference serves all others."""
    dtypes_fit = prediction.dtype in DTYPES and images.dtype in (torch.uint8, *DTYPES)
    return dtypes_fit and tile(patch_size, len(mean)) is not None


def launch(
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
    *,
    gpu: GPU,
    block_runs: int = 128,
) -> Tensor:
    """Run the two stages on arguments that `patch_loss` has checked.

    Args:
        prediction: (B, L, D) in one of `DTYPES`, any strides; copied unless `strided_samples` can describe it.
        images: uint8 (B, H, W, C), or pixels (B, C, H, W) in one of `DTYPES`, any strides.
        mask: bool (B, L), or None.
        patch_size: side P of a square patch, for which there is a `tile`.
        mean: per channel.
        std: per channel.
        norm_pix: normalise each patch by its own statistics.
        gpu: what the kernels are built for.
        block_runs: runs (`tile`) per program, a power of two; programs hold whole patches, at least one. The result
            depends on it only by rounding.

    Returns:
        The loss, a float32 scalar on the device. The call does not wait for it.
    """
    base, images, programs, arguments = _arguments(prediction, images, patch_size, mean, std, norm_pix, gpu, block_runs)
    partials = torch.empty(programs, dtype=torch.float32, device=prediction.device)
    loss = torch.empty((), dtype=torch.float32, device=prediction.device)
    selected = None if mask is None else mask.sum()
    bits = None if mask is None else mask.contiguous().view(torch.uint8)
    with on_device(prediction.device):
        if programs:
            partials_kernel[(programs,)](base, images, bits, partials, **arguments)
        loss_kernel[(1,)](partials, selected, loss, programs, prediction.shape[:2].numel(), BLOCK=PARTIALS)
    return loss


def serves_backward(
    grad: Tensor,
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
) -> bool:
    """Whether `launch_backward` takes these arguments of the operator: as for `serves`."""
    return serves(prediction, images, mask, patch_size, mean, std, norm_pix)


def launch_backward(
    grad: Tensor,
    prediction: Tensor,
    images: Tensor,
    mask: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    norm_pix: bool,
    *,
    gpu: GPU,
    block_runs: int = 128,
) -> Tensor:
    """Run the gradient's kernel on arguments that `patch_loss` has checked.

    Args:
        grad: upstream gradient, a floating scalar on the device.
        prediction: and all others as for `launch`.

    Returns:
        Gradient of the prediction, (B, L, D), contiguous, in the prediction's dtype. It does not depend on
        `block_runs`.
    """
    base, images, programs, arguments = _arguments(prediction, images, patch_size, mean, std, norm_pix, gpu, block_runs)
    out = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    selected = None if mask is None else mask.sum()
    bits = None if mask is None else mask.contiguous().view(torch.uint8)
    if programs:
        with on_device(prediction.device):
            prediction_grad_kernel[(programs,)](
                grad, base, images, bits, selected, out, patches=prediction.shape[:2].numel(), **arguments
            )
    return out
