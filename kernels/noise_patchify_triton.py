# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, unreachable"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernels of `noise_patchify`, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels.dispatch import GPU
from denim.kernels.memory_triton import chunks, load_run, on_device, per_channel, store_planes
from denim.kernels.noise_triton import normals, philox
from denim.kernels.tuning import run_tuned

__all__ = [
    "CONFIGURATIONS",
    "launch",
    "launch_backward",
    "noise_patchify_backward_kernel",
    "noise_patchify_kernel",
    "run_length",
    "serves",
    "serves_backward",
    "tile",
]

# Of images, patches and their gradients. Images may be uint8 too.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The constants of every channel are kernel arguments, among which each element selects.
MAX_CHANNELS = 64
# Elements of a run in the backward pass; each takes one or two registers.
MAX_RUN = 64
# Elements of an image: offsets within it are 32 bits wide, and those of the last program go beyond its end.
MAX_ELEMENTS = 2**30
# Programs of a launch (CUDA's limit).
MAX_PROGRAMS = 2**31 - 1
# Threads of a program. The work of a thread, and so the result, is the same for each of them.
CONFIGURATIONS = (128, 64, 256)


@triton.jit
def _target(patch_row, columns, PATCH: tl.constexpr, WIDTH: tl.constexpr):
    """Offset in an image's patches of each patch row. Patch rows are numbered in raster order of the image."""
    row = patch_row.to(tl.uint32)
    y = row // columns
    x = row - y * columns
    return ((y // PATCH * columns + x) * (WIDTH * PATCH) + y % PATCH * WIDTH).to(tl.int32)


@triton.jit
def _target_line(line, columns, PATCH: tl.constexpr):
    """The inverse of `_target`: number of the patch row that is line `line` of the image's patches."""
    index = line.to(tl.uint32)
    patch = index // PATCH
    y = patch // columns
    x = patch - y * columns
    return ((y * PATCH + index % PATCH) * columns + x).to(tl.int32)


# One level with one draw (training) is compiled separately, without loops. All other numbers of levels and draws, batch
# sizes and image sizes use the same compiled kernel, except that images of a multiple of 16 elements have their own.
@triton.jit(do_not_specialize=["batch", "patch_columns"], do_not_specialize_on_alignment=["levels", "draws"])
def noise_patchify_kernel(
    images,
    sigma,
    seeds,
    out,
    noise_scale,
    shift,
    batch,
    count,
    patch_columns,
    levels,
    draws,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLANAR: tl.constexpr,
    SWEEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    INSTRUCTIONS: tl.constexpr,
):
    """One program: ROWS runs of one sample, all draws and levels. The image is read once, each draw is made once.

    A run is what one thread handles: SEGMENTS segments of COLS consecutive positions. `count` is the number of
    elements of an image, below 2^30; SWEEP says whether there is more than one level or draw; `noise_scale` is
    1 / (255 std) and `shift` is -mean / std. Without noise `sigma` and `seeds` are None, and `noise_scale` is what
    pixels are multiplied by.
    """
    # Consecutive positions lie in patch rows of WIDTH elements, which are contiguous in NHWC memory and in patches.
    WIDTH: tl.constexpr = PATCH * CHANNELS
    RUN: tl.constexpr = COLS * SEGMENTS
    # Values are moved in chunks of 16 bytes. Neighbouring positions are not neighbours in planes, so there a chunk is
    # one value. A store must not straddle patch rows.
    LOAD: tl.constexpr = 1 if PLANAR else min(COLS, 128 // images.dtype.element_ty.primitive_bitwidth)
    WIDEST: tl.constexpr = min(COLS, 128 // out.dtype.element_ty.primitive_bitwidth)
    STORE: tl.constexpr = WIDEST if ALIGNED else min(WIDEST, WIDTH & -WIDTH)
    # Offsets that can exceed 32 bits are 64-bit scalars; each element adds a 32-bit offset to them.
    count = tl.cast(count, tl.int32)
    size = count.to(tl.int64)
    samples = batch.to(tl.int64)
    wide_columns = patch_columns.to(tl.uint32)
    program = tl.program_id(0).to(tl.uint32)
    PERIODS: tl.constexpr = WIDTH // RUN if ALIGNED else 1
    rows = count // WIDTH if ALIGNED else tl.cdiv(count, RUN)
    tiles = tl.cdiv(rows, ROWS).to(tl.uint32)
    sample = (program // PERIODS // tiles).to(tl.int64)
    row = (program // PERIODS % tiles * ROWS).to(tl.int32) + tl.arange(0, ROWS)
    if ALIGNED:
        # A run lies in one patch row.
        first = (program % PERIODS).to(tl.int32) * RUN
        position = row * WIDTH + first
        target = _target(row, wide_columns, PATCH, WIDTH) + first
    else:
        position = row * RUN
    column = tl.arange(0, COLS)
    image = images + sample * size
    # Without a sweep, seed and level are loaded here, once, instead of once per segment.
    if sigma is not None:
        only_seed = tl.load(seeds + sample)
        only_amount = tl.load(sigma + sample).to(tl.float32)

    # The loop over segments is outermost, so only one segment's pixels take registers during the loops inside.
    for segment in tl.static_range(SEGMENTS):
        start = position + segment * COLS
        if RUN % CHANNELS == 0:
            # The channel of every register is known at compile time.
            channel = (segment * COLS + column)[None, :] % CHANNELS
        else:
            channel = (start[:, None] + column[None, :]) % CHANNELS
        if PLANAR:
            source = channel * (count // CHANNELS)
            if RUN % CHANNELS == 0:
                source += (position // CHANNELS)[:, None] + (segment * COLS + column)[None, :] // CHANNELS
            else:
                source += (start[:, None] + column[None, :]) // CHANNELS
        else:
            source = start[:, None] + column[None, :]
        if ALIGNED:
            inside = tl.broadcast_to(row[:, None] < rows, (ROWS, COLS))
        else:
            inside = start[:, None] + column[None, :] < count
        pixel = tl.load(image + chunks(source, LOAD), mask=chunks(inside, LOAD))
        pixel = tl.reshape(tl.permute(pixel, (1, 0, 2)), (ROWS, COLS)).to(tl.float32)
        scale = per_channel(noise_scale, channel, CHANNELS)
        pixel_scale = scale if images.dtype.element_ty == tl.uint8 or sigma is None else scale * 255
        clean = pixel * pixel_scale + per_channel(shift, channel, CHANNELS)
        if ALIGNED:
            places = chunks(target[:, None] + (segment * COLS + column)[None, :], STORE)
        else:
            piece = start[None, :] + (tl.arange(0, COLS // STORE) * STORE)[:, None]
            places = _target(piece // WIDTH, wide_columns, PATCH, WIDTH) + piece % WIDTH
            places = places[:, :, None] + tl.arange(0, STORE)[None, None, :]
        kept = chunks(inside, STORE)
        if sigma is None:
            tl.store(out + sample * size + places, chunks(clean.to(out.dtype.element_ty), STORE), mask=kept)
        else:
            group = (start // 4).to(tl.uint32)[None, :] + tl.arange(0, COLS // 4).to(tl.uint32)[:, None]
            zero = tl.zeros_like(group)
            for draw in range(draws):
                seed = tl.load(seeds + draw * samples + sample) if SWEEP else only_seed
                w0, w1, w2, w3 = philox(group, zero, zero, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
                n0, n1 = normals(w0, w1, INSTRUCTIONS)
                n2, n3 = normals(w2, w3, INSTRUCTIONS)
                noise = tl.reshape(tl.permute(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (1, 0, 2, 3)), (ROWS, COLS))
                destination = out + (draw * samples + sample) * size
                for level in range(levels):
                    amount = tl.load(sigma + level * samples + sample).to(tl.float32) if SWEEP else only_amount
                    noisy = (clean + noise * (scale * amount)).to(out.dtype.element_ty)
                    tl.store(destination + places, chunks(noisy, STORE), mask=kept)
                    destination += draws * samples * size


# `outer` == 1 (one level with one draw) is compiled separately, without a loop.
@triton.jit(do_not_specialize=["batch", "length", "columns"], do_not_specialize_on_alignment=["outer"])
def noise_patchify_backward_kernel(
    grad,
    pixels,
    inverse_std,
    batch,
    outer,
    length,
    columns,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK runs of one sample, each RUN pixels of one row of one patch.

    A sample has `length` patches, `columns` of them in a row, and `outer` gradients, one for each level and draw, which
    the thread of a run adds up.
    """
    WIDTH: tl.constexpr = RUN * CHANNELS
    ACROSS: tl.constexpr = PATCH // RUN
    plane = length.to(tl.int32) * (PATCH * PATCH)
    size = plane.to(tl.int64) * CHANNELS
    samples = batch.to(tl.int64)
    program = tl.program_id(0).to(tl.uint32)
    tiles = tl.cdiv(plane // RUN, BLOCK).to(tl.uint32)
    sample = (program // tiles).to(tl.int64)
    run = (program % tiles * BLOCK).to(tl.int32) + tl.arange(0, BLOCK)
    inside = run < plane // RUN
    total = ()
    for _ in tl.static_range(WIDTH):
        total = total + (tl.zeros((BLOCK,), tl.float32),)
    source = grad + sample * size
    for _ in range(outer):
        values = load_run(source, run, inside, WIDTH)
        summed = ()
        for e in tl.static_range(WIDTH):
            summed = summed + (total[e] + values[e],)
        total = summed
        source += samples * size
    scaled = ()
    for e in tl.static_range(WIDTH):
        scaled = scaled + (total[e] * inverse_std[e % CHANNELS],)
    # The runs of a patch row follow one another in the image.
    line = run // ACROSS
    target = _target_line(line, columns.to(tl.uint32), PATCH) * ACROSS + run % ACROSS
    store_planes(pixels + sample * size, target, plane, inside, scaled, RUN, CHANNELS)


def tile(patch_size: int, channels: int) -> dict[str, int | bool]:
    """How an image is divided into runs of consecutive positions: the kernel's ALIGNED, SEGMENTS and COLS.

    A run is SEGMENTS segments of COLS positions. COLS is a multiple of four, a group of the generator. A run is a whole
    number of periods of the channels; where such a run is too long to unroll, SEGMENTS is 1 and every element computes
    its channel. ALIGNED runs divide a patch row. They exist where P * C is a multiple of four; elsewhere groups
    straddle patch rows, and every store computes its own offset.
    """
    width = patch_size * channels
    columns = math.gcd(16, width)
    segments = channels // math.gcd(channels, columns)
    if width % 4 == 0 and segments <= 4:
        return {"ALIGNED": True, "SEGMENTS": segments, "COLS": columns}
    columns = 16 if width >= 16 else 4
    segments = channels // math.gcd(channels, columns)
    return {"ALIGNED": False, "SEGMENTS": segments if segments <= 4 else 1, "COLS": columns}


def _programs(batch: int, elements: int, patch_size: int, channels: int, threads: int) -> int:
    """Programs for images of `elements` elements."""
    sizes, width = tile(patch_size, channels), patch_size * channels
    run = sizes["SEGMENTS"] * sizes["COLS"]
    rows, periods = (elements // width, width // run) if sizes["ALIGNED"] else (-(-elements // run), 1)
    return batch * -(-rows // threads) * periods


def serves(
    images: Tensor,
    sigma: Tensor | None,
    seeds: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> bool:
    """Whether `launch` takes these arguments of `noise_patchify`. The reference serves all others."""
    batch, elements, channels = images.shape[0], images.shape[1:].numel(), len(mean)
    return (
        images.dtype in (*DTYPES, torch.uint8)
        and dtype in DTYPES
        and channels <= MAX_CHANNELS
        and elements < MAX_ELEMENTS
        and _programs(batch, elements, patch_size, channels, min(CONFIGURATIONS)) <= MAX_PROGRAMS
    )


def launch(
    images: Tensor,
    sigma: Tensor | None,
    seeds: Tensor | None,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    *,
    gpu: GPU,
    configurations: Sequence[int] = CONFIGURATIONS,
) -> Tensor:
    """Run the forward kernel on arguments that `noise_patchify` has checked and `serves` accepts.

    Args:
        images: uint8 (B, H, W, C), or pixels (B, C, H, W) of one of `DTYPES`, any strides.
        sigma: (B,) or (S, B), floating; None for clean patches.
        seeds: int64 (B,) or (R, B); without effect if `sigma` is None.
        patch_size: side P of a square patch.
        mean: per channel.
        std: per channel.
        dtype: of the patches, one of `DTYPES`.
        gpu: what the kernel is built for.
        configurations: threads of a program, powers of two, to choose from. The result does not depend on them.

    Returns:
        Patches, sigma.shape[:-1] + seeds.shape[:-1] + (B, L, D), contiguous.
    """
    channels = len(mean)
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
    batch, columns = images.shape[0], width // patch_size
    nhwc = images if images.dtype == torch.uint8 else images.permute(0, 2, 3, 1)
    # Pixels in channels_last memory are read like bytes; only true planes need their own addresses.
    planar = images.dtype != torch.uint8 and not nhwc.is_contiguous()
    images = (images if planar else nhwc).contiguous()
    shape = (batch, height // patch_size * columns, patch_size * patch_size * channels)
    full = 255
    if sigma is not None and seeds is not None:
        sigma, seeds = sigma.contiguous(), seeds.contiguous()
        shape = (*sigma.shape[:-1], *seeds.shape[:-1], *shape)
    elif images.dtype != torch.uint8:
        # The factors of the reference. With noise, pixels are multiplied by 255 times the factor of the noise.
        full = 1
    out = torch.empty(shape, dtype=dtype, device=images.device)
    if out.numel() == 0:
        return out
    elements = height * width * channels
    levels, draws = (1 if given is None else given.numel() // batch for given in (sigma, seeds))

    def run(threads: int) -> None:
        noise_patchify_kernel[(_programs(batch, elements, patch_size, channels, threads),)](
            images,
            sigma,
            seeds,
            out,
            tuple(1 / (full * value) for value in std),
            tuple(-centre / value for centre, value in zip(mean, std, strict=True)),
            batch,
            elements,
            columns,
            levels,
            draws,
            PATCH=patch_size,
            CHANNELS=channels,
            PLANAR=planar,
            SWEEP=levels * draws > 1,
            ROWS=threads,
            INSTRUCTIONS=gpu.instructions,
            **tile(patch_size, channels),
            num_warps=max(1, threads // gpu.warp_size),
        )

    key = ("noise_patchify", patch_size, channels, planar, images.dtype, dtype, sigma is None, levels > 1, draws > 1)
    with on_device(images.device):
        run_tuned(key, out.numel(), configurations, run, images.device)
    return out


def run_length(patch_size: int, channels: int, grad: torch.dtype, dtype: torch.dtype) -> int:
    """Pixels of a thread in the backward pass.

    As many as 16 bytes of the narrower dtype hold, so that the accesses to each plane are wide; fewer where this number
    does not divide a patch row, or where the elements of all channels would be more than `MAX_RUN`.
    """
    run = math.gcd(patch_size, 16 // min(grad.itemsize, dtype.itemsize))
    while run > 1 and run * channels > MAX_RUN:
        run //= 2
    return run


def serves_backward(
    grad: Tensor, height: int, width: int, patch_size: int, std: Sequence[float], dtype: torch.dtype
) -> bool:
    """Whether `launch_backward` takes these arguments of the operator. The reference serves all others."""
    elements, channels = height * width * len(std), len(std)
    if grad.dtype not in DTYPES or dtype not in DTYPES or channels > MAX_RUN or elements >= MAX_ELEMENTS:
        return False
    runs = elements // channels // run_length(patch_size, channels, grad.dtype, dtype)
    return grad.shape[-3] * -(-runs // min(CONFIGURATIONS)) <= MAX_PROGRAMS


def launch_backward(
    grad: Tensor,
    height: int,
    width: int,
    patch_size: int,
    std: Sequence[float],
    dtype: torch.dtype,
    *,
    gpu: GPU,
    configurations: Sequence[int] = CONFIGURATIONS,
) -> Tensor:
    """Run the backward kernel on arguments that `serves_backward` accepts.

    Args:
        grad: (..., B, L, D), one of `DTYPES`, any strides.
        height: of an image.
        width: of an image.
        patch_size: side P of a square patch.
        std: per channel.
        dtype: of the pixels, one of `DTYPES`.
        gpu: what the kernel is built for.
        configurations: as in `launch`.

    Returns:
        Gradient (B, C, H, W) of the pixels, contiguous: the float32 sum over (...) in its order, then scaled.
    """
    channels, batch, length = len(std), grad.shape[-3], grad.shape[-2]
    pixels = torch.empty((batch, channels, height, width), dtype=dtype, device=grad.device)
    if pixels.numel() == 0:
        return pixels
    pixels_of_run, outer = run_length(patch_size, channels, grad.dtype, dtype), grad.shape[:-3].numel()
    grad = grad.contiguous()

    def run(threads: int) -> None:
        noise_patchify_backward_kernel[(batch * triton.cdiv(height * width // pixels_of_run, threads),)](
            grad,
            pixels,
            tuple(1 / value for value in std),
            batch,
            outer,
            length,
            width // patch_size,
            PATCH=patch_size,
            CHANNELS=channels,
            RUN=pixels_of_run,
            BLOCK=threads,
            num_warps=max(1, threads // gpu.warp_size),
        )

    key = ("noise_patchify_backward", patch_size, channels, grad.dtype, dtype, outer > 1)
    with on_device(grad.device):
        run_tuned(key, max(1, outer) * pixels.numel(), configurations, run, grad.device)
    return pixels
