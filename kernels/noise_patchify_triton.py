# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, unreachable"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernel of `noise_patchify`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from denim.kernels.memory_triton import chunks, on_device, per_channel
from denim.kernels.noise_triton import normals, philox

__all__ = ["MAX_CHANNELS", "launch", "noise_patchify_kernel", "tile"]

# Per-channel constants are kernel arguments, and every element selects among them.
MAX_CHANNELS = 64


# One level and one draw, as in training, are a kernel of their own (no loops); other sizes compile nothing anew.
@triton.jit(do_not_specialize=["batch", "rows", "patch_columns"], do_not_specialize_on_alignment=["levels", "draws"])
def noise_patchify_kernel(
    images,
    sigma,
    seeds,
    out,
    noise_scale,
    shift,
    batch,
    rows,
    patch_columns,
    levels,
    draws,
    PATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PLANAR: tl.constexpr,
    ALIGNED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    INSTRUCTIONS: tl.constexpr,
):
    """One program: ROWS runs of one sample, all draws and levels. The image is read once, each draw is made once.

    `rows` counts patch rows of a sample, H * W / PATCH; `noise_scale` is 1 / (255 std) and `shift` is -mean / std.
    """
    # Values move in chunks of 16 bytes. Planes have none, so there a chunk is one value.
    LOAD: tl.constexpr = 1 if PLANAR else min(COLS, 128 // images.dtype.element_ty.primitive_bitwidth)
    STORE: tl.constexpr = min(COLS, 128 // out.dtype.element_ty.primitive_bitwidth)
    # Consecutive positions lie in patch rows of WIDTH elements, which are contiguous in NHWC memory and in patches.
    WIDTH: tl.constexpr = PATCH * CHANNELS
    count = rows.to(tl.int64) * WIDTH
    samples = batch.to(tl.int64)
    wide_columns = patch_columns.to(tl.uint32)
    program = tl.program_id(0).to(tl.uint32)
    # Aligned: a thread owns SEGMENTS runs of one patch row, and every register has a channel known at compile time.
    # Else it owns one run, wherever patch rows begin and end in it.
    PERIODS: tl.constexpr = WIDTH // (COLS * SEGMENTS) if ALIGNED else 1
    tiles = tl.cdiv(rows if ALIGNED else tl.cdiv(count, COLS), ROWS).to(tl.uint32)
    sample = (program // PERIODS // tiles).to(tl.int64)
    run = program // PERIODS % tiles * ROWS + tl.arange(0, ROWS).to(tl.uint32)
    column = tl.arange(0, COLS)[None, :]
    if ALIGNED:
        first = (program % PERIODS).to(tl.int64) * (COLS * SEGMENTS)
        position = run.to(tl.int64) * WIDTH + first
        patch_row = run[:, None]
        inside = tl.broadcast_to(patch_row < rows.to(tl.uint32), (ROWS, COLS))
    else:
        position = run.to(tl.int64) * COLS
        first = (position % WIDTH)[:, None] + column
        patch_row = ((position // WIDTH)[:, None] + first // WIDTH).to(tl.uint32)
        first = first % WIDTH
        inside = position[:, None] + column < count
    y = patch_row // wide_columns
    x = patch_row - y * wide_columns
    target = (y // PATCH * wide_columns + x).to(tl.int64) * (WIDTH * PATCH) + y % PATCH * WIDTH + first
    group = (position // 4)[None, :] + tl.arange(0, COLS // 4)[:, None]
    image = images + sample * count

    pixels = ()
    for segment in tl.static_range(SEGMENTS):
        if PLANAR:
            offset = segment * COLS + column if ALIGNED else first
            plane = (offset % CHANNELS).to(tl.int64) * (rows.to(tl.int64) * PATCH)
            line = y.to(tl.int64) * (patch_columns.to(tl.int64) * PATCH) + x.to(tl.int64) * PATCH
            source = plane + line + offset // CHANNELS
            if ALIGNED:
                source += first // CHANNELS
        else:
            source = position[:, None] + (segment * COLS + column)
        values = tl.load(image + chunks(source, LOAD), mask=chunks(inside, LOAD))
        pixels = pixels + (tl.reshape(tl.permute(values, (1, 0, 2)), (ROWS, COLS)),)

    level_stride = draws * samples * count
    for draw in range(draws):
        seed = tl.load(seeds + draw * samples + sample)
        first_level = out + (draw * samples + sample) * count
        k0 = seed.to(tl.uint32)
        k1 = (seed >> 32).to(tl.uint32)
        for segment in tl.static_range(SEGMENTS):
            channel = (segment * COLS + column) % CHANNELS if ALIGNED else first % CHANNELS
            scale = per_channel(noise_scale, channel, CHANNELS)
            pixel_scale = scale if images.dtype.element_ty == tl.uint8 else scale * 255
            clean = pixels[segment].to(tl.float32) * pixel_scale + per_channel(shift, channel, CHANNELS)
            counter = group + segment * (COLS // 4)
            zero = tl.zeros_like(counter).to(tl.uint32)
            w0, w1, w2, w3 = philox(counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero, k0, k1)
            n0, n1 = normals(w0, w1, INSTRUCTIONS)
            n2, n3 = normals(w2, w3, INSTRUCTIONS)
            noise = tl.reshape(tl.permute(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (1, 0, 2, 3)), (ROWS, COLS))
            places = chunks(target + (segment * COLS + column) if ALIGNED else target, STORE)
            kept = chunks(inside, STORE)
            for level in range(levels):
                amount = tl.load(sigma + level * samples + sample).to(tl.float32)
                noisy = (clean + noise * (scale * amount)).to(out.dtype.element_ty)
                destination = first_level + level * level_stride
                tl.store(destination + places, chunks(noisy, STORE), mask=kept)


def tile(patch_size: int, channels: int) -> dict[str, int | bool]:
    """How patches are cut into runs of consecutive positions: the kernel's ALIGNED, SEGMENTS and COLS.

    A run is COLS positions, whole groups of four of the generator. Aligned runs divide a patch row, and SEGMENTS of
    them, one period of the channels, make up a thread's share. Where groups straddle patch rows (P * C not a multiple
    of four) or the period is too long to unroll, each element looks for its own place instead: several times slower.
    """
    width = patch_size * channels
    if width % 4 == 0:
        columns = math.gcd(16, width)
        segments = channels // math.gcd(channels, columns)
        if segments <= 4:
            return {"ALIGNED": True, "SEGMENTS": segments, "COLS": columns}
    return {"ALIGNED": False, "SEGMENTS": 1, "COLS": 16}


def launch(
    images: Tensor,
    sigma: Tensor,
    seeds: Tensor,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    *,
    instructions: str,
    block_rows: int = 128,
) -> Tensor:
    """Run the kernel on arguments that `noise_patchify` has checked.

    Args:
        images: uint8 (B, H, W, C), or float32, float16 or bfloat16 pixels (B, C, H, W), any strides.
        sigma: (B,) or (S, B), floating.
        seeds: int64 (B,) or (R, B).
        patch_size: side P of a square patch.
        mean: per channel, at most `MAX_CHANNELS`.
        std: per channel.
        dtype: of the patches: float32, float16 or bfloat16.
        instructions: "ptx", "gcn" or "plain".
        block_rows: runs of consecutive positions per program, a power of two. The result does not depend on it.

    Returns:
        Patches, sigma.shape[:-1] + seeds.shape[:-1] + (B, L, D), contiguous.
    """
    channels = len(mean)
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
    batch, columns = images.shape[0], width // patch_size
    nhwc = images if images.dtype == torch.uint8 else images.permute(0, 2, 3, 1)
    # Pixels in channels_last memory are read like bytes; only true planes need their own addresses.
    planar = images.dtype != torch.uint8 and not nhwc.is_contiguous()
    images, sigma, seeds = (images if planar else nhwc).contiguous(), sigma.contiguous(), seeds.contiguous()
    shape = (batch, height // patch_size * columns, patch_size * patch_size * channels)
    out = torch.empty((*sigma.shape[:-1], *seeds.shape[:-1], *shape), dtype=dtype, device=images.device)
    if out.numel() == 0:
        return out
    cut = tile(patch_size, channels)
    rows, run = height * columns, cut["SEGMENTS"] * cut["COLS"]
    width = patch_size * channels
    if cut["ALIGNED"]:
        programs = batch * triton.cdiv(rows, block_rows) * (width // run)
    else:
        programs = batch * triton.cdiv(triton.cdiv(rows * width, run), block_rows)
    with on_device(images.device):
        noise_patchify_kernel[(programs,)](
            images,
            sigma,
            seeds,
            out,
            tuple(1 / (255 * value) for value in std),
            tuple(-centre / value for centre, value in zip(mean, std, strict=True)),
            batch,
            rows,
            columns,
            sigma.numel() // batch,
            seeds.numel() // batch,
            PATCH=patch_size,
            CHANNELS=channels,
            PLANAR=planar,
            ROWS=block_rows,
            INSTRUCTIONS=instructions,
            **cut,
            num_warps=max(1, block_rows // (64 if instructions == "gcn" else 32)),
        )
    return out
