# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, unreachable, misc"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernels of `decode_patches`, forward and backward.

A thread has one run: neighbouring pixels of one row of one patch, with all their channels. A run is contiguous in patch
vectors, in NHWC memory and in each plane of NCHW memory. (Where a kernel neither reads nor writes an image, a run may
span several rows of the patch.) It is loaded in wide pieces and split into one tensor of shape (threads,) per element.
The channel and position of each of these tensors are known at compile time, so the change between (pixel, channel)
order and planes only renames registers. Shared memory is used for the sums over a patch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels.dispatch import GPU
from denim.kernels.memory_triton import load_planes, load_run, on_device, store_planes, store_run, strided_samples
from denim.kernels.patches import VARIANCE_EPS

__all__ = [
    "decode_backward_kernel",
    "decode_kernel",
    "launch",
    "launch_backward",
    "serves",
    "serves_backward",
    "tile",
]

# Of prediction and source. Images may be uint8 too.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
THREADS = 128
# Threads of the largest program that every GPU can start.
MAX_THREADS = 1024
# Elements of a run; each takes one or two registers.
MAX_RUN = 64

_FLOOR: tl.constexpr = tl.constexpr(VARIANCE_EPS)


@triton.jit
def _over_patch(value, PATCHES: tl.constexpr, RUNS: tl.constexpr):
    """Sum over the threads of each patch, returned to all of these threads."""
    total = tl.sum(tl.reshape(value, (PATCHES, RUNS)), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, (PATCHES, RUNS)), (PATCHES * RUNS,))


@triton.jit
def _place(program, patches, length, columns, PATCH: tl.constexpr, RUN: tl.constexpr, PATCHES: tl.constexpr, RUNS):
    """Of each thread's run: patch, image, patch of the image, run of the patch and of a plane, and whether it exists.

    A run of several rows (see `tile`) has no place in a plane; callers do not use the value that is returned.
    """
    ACROSS: tl.constexpr = max(1, PATCH // RUN)
    thread = tl.arange(0, PATCHES * RUNS)
    patch = program.to(tl.uint32) * PATCHES + (thread // RUNS).to(tl.uint32)
    run = thread % RUNS
    inside = (patch < patches.to(tl.uint32)) & (run < PATCH * PATCH // RUN)
    image = patch // length.to(tl.uint32)
    index = patch - image * length.to(tl.uint32)
    y = index // columns.to(tl.uint32)
    x = index - y * columns.to(tl.uint32)
    line = (y * PATCH).to(tl.int64) + run // ACROSS
    in_plane = line * (columns * ACROSS) + (x * ACROSS).to(tl.int64) + run % ACROSS
    return patch.to(tl.int64), image.to(tl.int64), index, run, in_plane, inside


@triton.jit
def _row(index, place, patches, length, first, stride, STRIDED: tl.constexpr):
    """Where the prediction's patch for a level and draw is: in patches from its base (see `strided_samples`)."""
    patch, image, in_image, _, _, _ = place
    if STRIDED:
        # 32 bits hold it (see `_arguments`), and cost a third of the instructions of 64.
        sample = index.to(tl.uint32) * (patches // length).to(tl.uint32) + image.to(tl.uint32)
        row = (sample * stride.to(tl.uint32) + first.to(tl.uint32) + in_image).to(tl.int64)
    else:
        row = index * patches + patch
    return row


@triton.jit
def _statistics(
    source,
    sigma,
    inverse_std,
    shift,
    added_scale,
    place,
    plane,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATISTICS: tl.constexpr,
    RUN: tl.constexpr,
    PATCHES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """As `_patch_statistics` of the reference: each thread's centred run, and its patch's mean, deviation and slope."""
    patch, image, _, run, in_plane, inside = place
    WIDTH: tl.constexpr = RUN * CHANNELS
    SIZE: tl.constexpr = PATCH * PATCH * CHANNELS
    if STATISTICS == "noisy":
        values = load_run(source, patch * (SIZE // WIDTH) + run, inside, WIDTH)
    elif source.dtype.element_ty == tl.uint8:
        values = load_run(source, image * (plane // RUN) + in_plane, inside, WIDTH)
    else:
        values = load_planes(source, image * (plane // RUN * CHANNELS) + in_plane, plane, inside, RUN, CHANNELS)
    if STATISTICS == "input":
        normal = ()
        UNIT: tl.constexpr = 1.0 / 255 if source.dtype.element_ty == tl.uint8 else 1.0
        for e in tl.static_range(WIDTH):
            moved = values[e] * (inverse_std[e % CHANNELS] * UNIT) + shift[e % CHANNELS]
            normal = normal + (moved,)
        values = normal
    # Threads without a run have loaded zeros, which normalisation has changed: `where` keeps them out of the sums.
    total = values[0]
    for e in tl.static_range(1, WIDTH):
        total += values[e]
    mean = _over_patch(tl.where(inside, total, 0.0), PATCHES, RUNS) * (1.0 / SIZE)
    centred = ()
    for e in tl.static_range(WIDTH):
        centred = centred + (values[e] - mean,)
    total = centred[0] * centred[0]
    for e in tl.static_range(1, WIDTH):
        total += centred[e] * centred[e]
    variance = _over_patch(tl.where(inside, total, 0.0), PATCHES, RUNS) * (1.0 / (SIZE - 1))
    slope = tl.full(variance.shape, 1.0, tl.float32)
    if STATISTICS == "noisy":
        level = tl.load(sigma + image, mask=inside, other=0).to(tl.float32) * (1.0 / 255)
        added = level * level * added_scale
        excess = variance - added
        root = tl.sqrt(excess * excess + 4 * (added * added * (2.0 / (SIZE - 1)) + _FLOOR * _FLOOR))
        slope = (1 + excess / root) * 0.5
        variance = (excess + root) * 0.5
    return centred, mean, tl.sqrt(variance + _FLOOR), slope


@triton.jit
def _unclamped(value, std, centre, mean, deviation, STATISTICS: tl.constexpr):
    # Forward and backward share this function, so that both find the same pixels saturated.
    patch = value if STATISTICS == "raw" else value * deviation + mean
    return patch * std + centre


# All image and batch sizes use the same compiled kernel. `outer` == 1 (training) is compiled separately.
@triton.jit(
    do_not_specialize=["first", "stride", "patches", "length", "columns"], do_not_specialize_on_alignment=["outer"]
)
def decode_kernel(
    prediction,
    source,
    sigma,
    out,
    centre,
    std,
    inverse_std,
    shift,
    added_scale,
    normal_scale,
    normal_shift,
    first,
    stride,
    patches,
    outer,
    length,
    columns,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATISTICS: tl.constexpr,
    STRIDED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RUN: tl.constexpr,
    PATCHES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """One program: PATCHES patches, a run per thread. Programs that read the same source patch have consecutive ids.

    `first` and `stride` say where samples lie in `prediction` (`strided_samples`); STRIDED says whether to use them.
    All other tensors are contiguous.
    `patches` counts patches of the source; each of them belongs to `outer` patches of the prediction, one for each
    level and draw (the dimensions before the batch, flattened). An image has `length` patches, `columns` of them in a
    row. Per channel, `centre` is the mean and `shift` is -mean / std; `normal_scale` and `normal_shift` are 1 / std and
    -mean / std of the classifier. With NORMALIZE the result is patches.
    """
    WIDTH: tl.constexpr = RUN * CHANNELS
    IN_PATCH: tl.constexpr = PATCH * PATCH // RUN
    program = tl.program_id(0)
    index = (program % outer).to(tl.int64)
    place = _place(program // outer, patches, length, columns, PATCH, RUN, PATCHES, RUNS)
    patch, image, _, run, in_plane, inside = place
    plane = length.to(tl.int64) * (PATCH * PATCH)
    row = _row(index, place, patches, length, first, stride, STRIDED)
    values = load_run(prediction, row * IN_PATCH + run, inside, WIDTH)
    mean = 0.0
    deviation = 1.0
    if STATISTICS != "raw":
        _, mean, deviation, _ = _statistics(
            source,
            sigma,
            inverse_std,
            shift,
            added_scale,
            place,
            plane,
            PATCH,
            CHANNELS,
            STATISTICS,
            RUN,
            PATCHES,
            RUNS,
        )
    pixels = ()
    for e in tl.static_range(WIDTH):
        pixel = _unclamped(values[e], std[e % CHANNELS], centre[e % CHANNELS], mean, deviation, STATISTICS)
        pixel = tl.maximum(pixel, 0.0, propagate_nan=tl.PropagateNan.ALL)
        pixel = tl.minimum(pixel, 1.0, propagate_nan=tl.PropagateNan.ALL)
        if NORMALIZE:
            pixel = pixel * normal_scale[e % CHANNELS] + normal_shift[e % CHANNELS]
        pixels = pixels + (pixel,)
    if NORMALIZE:
        store_run(out, (index * patches + patch) * IN_PATCH + run, inside, pixels, WIDTH)
    else:
        target = (index * (patches // length) + image) * (IN_PATCH * CHANNELS) * length + in_plane
        store_planes(out, target, plane, inside, pixels, RUN, CHANNELS)


@triton.jit(
    do_not_specialize=["first", "stride", "patches", "length", "columns"], do_not_specialize_on_alignment=["outer"]
)
def decode_backward_kernel(
    grad,
    prediction,
    source,
    sigma,
    to_prediction,
    to_source,
    centre,
    std,
    inverse_std,
    shift,
    added_scale,
    gain,
    first,
    stride,
    patches,
    outer,
    length,
    columns,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    STATISTICS: tl.constexpr,
    STRIDED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NEED_SOURCE: tl.constexpr,
    RUN: tl.constexpr,
    PATCHES: tl.constexpr,
    RUNS: tl.constexpr,
):
    """One program: PATCHES patches of the source and, one after another, all patches of the prediction that use them.

    So one program adds up a source patch's gradient over `outer`, always in the same order.
    Arguments as in `decode_kernel`; `gain` is the derivative of an unsaturated output by the patch, per channel.
    """
    WIDTH: tl.constexpr = RUN * CHANNELS
    IN_PATCH: tl.constexpr = PATCH * PATCH // RUN
    SIZE: tl.constexpr = PATCH * PATCH * CHANNELS
    place = _place(tl.program_id(0), patches, length, columns, PATCH, RUN, PATCHES, RUNS)
    patch, image, _, run, in_plane, inside = place
    plane = length.to(tl.int64) * (PATCH * PATCH)
    mean = 0.0
    deviation = 1.0
    if STATISTICS != "raw":
        centred, mean, deviation, slope = _statistics(
            source,
            sigma,
            inverse_std,
            shift,
            added_scale,
            place,
            plane,
            PATCH,
            CHANNELS,
            STATISTICS,
            RUN,
            PATCHES,
            RUNS,
        )
    to_mean = tl.zeros(run.shape, tl.float32)
    to_deviation = tl.zeros(run.shape, tl.float32)
    for step in range(outer):
        index = tl.cast(step, tl.int64)
        position = (index * patches + patch) * IN_PATCH + run
        row = _row(index, place, patches, length, first, stride, STRIDED)
        values = load_run(prediction, row * IN_PATCH + run, inside, WIDTH)
        if NORMALIZE:
            upstream = load_run(grad, position, inside, WIDTH)
        else:
            above = (index * (patches // length) + image) * (IN_PATCH * CHANNELS) * length + in_plane
            upstream = load_planes(grad, above, plane, inside, RUN, CHANNELS)
        result = ()
        for e in tl.static_range(WIDTH):
            pixel = _unclamped(values[e], std[e % CHANNELS], centre[e % CHANNELS], mean, deviation, STATISTICS)
            # `where` instead of a product: the gradient of a saturated pixel is 0 even if it arrives as infinity.
            passed = tl.where((pixel >= 0) & (pixel <= 1), upstream[e], 0.0) * gain[e % CHANNELS]
            if NEED_SOURCE:
                to_mean += passed
                to_deviation += passed * values[e]
            result = result + (passed * deviation,)
        store_run(to_prediction, position, inside, result, WIDTH)
    if NEED_SOURCE:
        to_mean = _over_patch(to_mean, PATCHES, RUNS) * (1.0 / SIZE)
        to_variance = _over_patch(to_deviation, PATCHES, RUNS) * slope / (2 * deviation) * (2.0 / (SIZE - 1))
        result = ()
        for e in tl.static_range(WIDTH):
            value = to_mean + to_variance * centred[e]
            if STATISTICS == "input":
                value = value * inverse_std[e % CHANNELS]
            result = result + (value,)
        if STATISTICS == "noisy":
            store_run(to_source, patch * IN_PATCH + run, inside, result, WIDTH)
        else:
            target = image * (IN_PATCH * CHANNELS) * length + in_plane
            store_planes(to_source, target, plane, inside, result, RUN, CHANNELS)


def tile(patch_size: int, channels: int, dtype: torch.dtype, *, images: bool = True) -> dict[str, int]:
    """The tile of a program, as the kernels' RUN (pixels of a thread), PATCHES (of a program) and RUNS (of a patch).

    A run has as many pixels as 16 bytes of `dtype` hold, so that the accesses to each plane are wide; fewer where this
    number does not divide a patch row. Where no `images` are read or written, it need only divide the whole patch.
    `serves` checks that the elements of a run fit a thread, and the runs of a patch a program.
    """
    run = math.gcd(patch_size if images else patch_size**2, 16 // dtype.itemsize)
    while run > 1 and run * channels > MAX_RUN:
        run //= 2
    runs = triton.next_power_of_2(patch_size * patch_size // run)
    return {"RUN": run, "PATCHES": max(1, THREADS // runs), "RUNS": runs}


def _serves(prediction: Tensor, source: Tensor | None, patch_size: int, channels: int, dtype: torch.dtype) -> bool:
    """Both passes; `dtype` is that of the forward pass's result. The reference serves what the kernels do not."""
    # Without images, runs are longer and fewer, but stay within the same bounds.
    sizes = tile(patch_size, channels, prediction.dtype)
    return (
        prediction.dtype in DTYPES
        and dtype in DTYPES
        and (source is None or source.dtype in (*DTYPES, torch.uint8))
        and sizes["RUN"] * channels <= MAX_RUN
        and sizes["RUNS"] <= MAX_THREADS
        # Patches and programs are counted in 32 bits. Offsets are 64 bits wide.
        and prediction.shape[:-1].numel() < 2**31
    )


def _arguments(
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[object, ...], tuple[int, int, int, int, int]]:
    """Prediction, source and sigma as the kernels read them; constants; first, stride, patches, outer and length."""
    patches, length = prediction.shape[:-1].numel(), prediction.shape[-2]
    outer = 1
    if statistics == "input" and source is not None:
        outer = prediction.shape[:-3].numel()
        patches //= outer
    if sigma is not None:
        sigma = sigma.expand(prediction.shape[:-2]).contiguous()
    constants = (
        tuple(mean),
        tuple(std),
        tuple(1 / value for value in std),
        tuple(-centre / value for centre, value in zip(mean, std, strict=True)),
        sum(value**-2 for value in std) / len(std),
    )
    source = None if source is None else source.contiguous()
    base, first, stride = strided_samples(prediction)
    if first + prediction.shape[:-2].numel() * stride >= 2**32:  # rows that 32 bits do not hold
        base, first, stride = strided_samples(prediction.contiguous())
    return base, source, sigma, constants, (first, stride, patches, outer, length)


def serves(
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    height: int,
    width: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
    normal_mean: Sequence[float],
    normal_std: Sequence[float],
    dtype: torch.dtype,
) -> bool:
    """Whether `launch` takes these arguments of `decode_patches`."""
    return _serves(prediction, source, patch_size, len(mean), dtype)


def launch(
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    height: int,
    width: int,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
    normal_mean: Sequence[float] = (),
    normal_std: Sequence[float] = (),
    dtype: torch.dtype = torch.float32,
    *,
    gpu: GPU,
) -> Tensor:
    """Run the forward kernel on arguments that `decode_patches` has checked and `serves` accepts.

    Args:
        prediction: (..., L, D), one of `DTYPES`, any strides; copied unless `strided_samples` can describe it.
        source: for "input" uint8 (B, H, W, C) or pixels (B, C, H, W); for "noisy" patches (..., L, D).
        sigma: for "noisy", broadcastable to (...), 0-255 pixel levels.
        height: of an image.
        width: of an image.
        patch_size: side P of a square patch.
        mean: per channel.
        std: per channel.
        statistics: "raw", "input" or "noisy".
        normal_mean: per channel, of the classifier whose patches are wanted; empty for pixels.
        normal_std: likewise.
        dtype: of the result, one of `DTYPES`.
        gpu: what the kernel is built for.

    Returns:
        Pixels (..., C, H, W) or patches (..., L, D), contiguous.
    """
    channels, normalize = len(mean), len(normal_std) > 0
    shape = prediction.shape if normalize else (*prediction.shape[:-2], channels, height, width)
    out = torch.empty(shape, dtype=dtype, device=prediction.device)
    if out.numel() == 0:
        return out
    sizes = tile(patch_size, channels, prediction.dtype, images=statistics == "input" or not normalize)
    prediction, source, sigma, constants, (first, stride, patches, outer, length) = _arguments(
        prediction, source, sigma, mean, std, statistics
    )
    with on_device(prediction.device):
        decode_kernel[(triton.cdiv(patches, sizes["PATCHES"]) * outer,)](
            prediction,
            source,
            sigma,
            out,
            *constants,
            tuple(1 / value for value in normal_std),
            tuple(-centre / value for centre, value in zip(normal_mean, normal_std, strict=True)),
            first,
            stride,
            patches,
            outer,
            length,
            width // patch_size,
            PATCH=patch_size,
            CHANNELS=channels,
            STATISTICS=statistics,
            STRIDED=(first, stride) != (0, length),
            NORMALIZE=normalize,
            **sizes,
            num_warps=sizes["PATCHES"] * sizes["RUNS"] // gpu.warp_size,
        )
    return out


def serves_backward(
    grad: Tensor,
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
    normal_std: Sequence[float],
    need_source: bool,
) -> bool:
    """Whether `launch_backward` takes these arguments of the operator."""
    return _serves(prediction, source, patch_size, len(mean), grad.dtype)


def launch_backward(
    grad: Tensor,
    prediction: Tensor,
    source: Tensor | None,
    sigma: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    statistics: str,
    normal_std: Sequence[float] = (),
    need_source: bool = True,
    *,
    gpu: GPU,
) -> tuple[Tensor, Tensor]:
    """Run the backward kernel. Arguments as for `launch`, and the gradient of what it returned, one of `DTYPES`.

    Returns:
        Gradients of prediction and source in their shapes and dtypes, contiguous. That of the source is empty unless
        `need_source` is true and the source is floating point.
    """
    channels, normalize = len(mean), len(normal_std) > 0
    to_prediction = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device)
    if source is not None and source.is_floating_point() and need_source:
        to_source = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    else:
        to_source, need_source = prediction.new_empty(0), False
    if prediction.numel() == 0:
        return to_prediction, to_source.zero_()  # no prediction uses the images
    if statistics == "input" and source is not None:
        width = source.shape[2 if source.dtype == torch.uint8 else 3]
    else:  # with `normalize` there is no image, and the kernel does not use the width
        width = grad.shape[-1]
    images = statistics == "input" or not normalize
    sizes = tile(patch_size, channels, prediction.dtype, images=images)
    prediction, source, sigma, constants, (first, stride, patches, outer, length) = _arguments(
        prediction, source, sigma, mean, std, statistics
    )
    with on_device(prediction.device):
        decode_backward_kernel[(triton.cdiv(patches, sizes["PATCHES"]),)](
            grad.contiguous(),
            prediction,
            source,
            sigma,
            to_prediction,
            to_source,
            *constants,
            tuple(a / b for a, b in zip(std, normal_std, strict=True)) if normalize else tuple(std),
            first,
            stride,
            patches,
            outer,
            length,
            width // patch_size,
            PATCH=patch_size,
            CHANNELS=channels,
            STATISTICS=statistics,
            STRIDED=(first, stride) != (0, length),
            NORMALIZE=normalize,
            NEED_SOURCE=need_source,
            **sizes,
            num_warps=sizes["PATCHES"] * sizes["RUNS"] // gpu.warp_size,
        )
    return to_prediction, to_source
