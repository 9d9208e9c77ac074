# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, unreachable"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""Triton kernel of `noise_patchify`, and the noise contract on the GPU (its torch twin is `denim.kernels.noise`).

One source serves three instruction sets, chosen explicitly: "ptx" (NVIDIA), "gcn" (AMD) and "plain" (Triton's own
mathematics, which the interpreter can run). Only `_log2`, `_cos` and `_sin` know of them; `tl.sqrt` is one instruction
already. `tl.target_info` cannot choose: it says "not CUDA" when a kernel is built on a machine without a driver.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_CHANNELS", "instruction_set", "launch", "noise_patchify_kernel", "normals", "philox", "tile"]

# Per-channel constants are kernel arguments, and every element selects among them.
MAX_CHANNELS = 64


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 on uint32 counters and keys (Salmon et al. 2011): four uint32 words.

    The product is a 64-bit one because that is a single machine instruction; a high and a low product are two.
    """
    for _ in tl.static_range(10):
        even = c0.to(tl.uint64) * 0xD2511F53
        odd = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (odd >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (even >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = odd.to(tl.uint32)
        c3 = even.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _ptx(assembly: tl.constexpr, x):
    return tl.inline_asm_elementwise(assembly, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _gcn(assembly: tl.constexpr, x):
    return tl.inline_asm_elementwise(assembly, "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1)


# PTX: the flush-to-zero forms are one instruction, the others add range checks; no argument here is ever subnormal.
# GCN: CDNA 3 demands one wait state between a transcendental and the use of its result. The compiler adds it to its
# own instructions, but does not look into inline assembly.
@triton.jit
def _log2(x, INSTRUCTIONS: tl.constexpr):
    if INSTRUCTIONS == "ptx":
        result = _ptx("lg2.approx.ftz.f32 $0, $1;", x)
    elif INSTRUCTIONS == "gcn":
        result = _gcn("v_log_f32 $0, $1\ns_nop 0", x)
    else:
        result = tl.log2(x)
    return result


@triton.jit
def _cos(word, INSTRUCTIONS: tl.constexpr):
    """Cosine of word * pi * 2^-31 radians, which is word * 2^-32 revolutions."""
    if INSTRUCTIONS == "ptx":
        result = _ptx("cos.approx.ftz.f32 $0, $1;", word * (math.pi * 2.0**-31))
    elif INSTRUCTIONS == "gcn":
        result = _gcn("v_cos_f32 $0, $1\ns_nop 0", word * 2.0**-32)
    else:
        result = tl.cos(word * (math.pi * 2.0**-31))
    return result


@triton.jit
def _sin(word, INSTRUCTIONS: tl.constexpr):
    """Sine of word * pi * 2^-31 radians, which is word * 2^-32 revolutions."""
    if INSTRUCTIONS == "ptx":
        result = _ptx("sin.approx.ftz.f32 $0, $1;", word * (math.pi * 2.0**-31))
    elif INSTRUCTIONS == "gcn":
        result = _gcn("v_sin_f32 $0, $1\ns_nop 0", word * 2.0**-32)
    else:
        result = tl.sin(word * (math.pi * 2.0**-31))
    return result


@triton.jit
def _signed(word):
    return word.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def normals(first, second, INSTRUCTIONS: tl.constexpr):
    """Two standard normals from two uint32 words in the contract's pinned arithmetic (`normals_from_words`)."""
    h = _signed(first) * 2.0**-32 + 2.0**-33
    u = tl.where(h > 0, h, 1 + h)
    series = h * (h * (-2.0 / 3.0 * h + 1.0) - 2.0)
    # h is never zero; "not above zero" takes up the comparison made for u.
    squared = tl.where((h > -(2.0**-6)) & ~(h > 0), series, -2.0 * math.log(2.0) * _log2(u, INSTRUCTIONS))
    radius = tl.sqrt(squared)
    angle = _signed(second)
    return radius * _cos(angle, INSTRUCTIONS), radius * _sin(angle, INSTRUCTIONS)


@triton.jit
def _per_channel(values, channel, CHANNELS: tl.constexpr):
    chosen = values[0]
    for c in tl.static_range(1, CHANNELS):
        chosen = tl.where(channel == c, values[c], chosen)
    return chosen


@triton.jit
def _chunks(block, SIZE: tl.constexpr):
    """(rows, columns) to (chunks, rows, SIZE).

    Rows stand next to the chunk, so Triton's layout of a load or store gives every chunk of a row to one thread. The
    generator's groups stand before rows likewise. A thread so keeps its run of positions from the load to the store,
    channels are known per register, and nothing goes through shared memory.
    """
    return tl.permute(tl.reshape(block, (block.shape[0], block.shape[1] // SIZE, SIZE)), (1, 0, 2))


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
        values = tl.load(image + _chunks(source, LOAD), mask=_chunks(inside, LOAD))
        pixels = pixels + (tl.reshape(tl.permute(values, (1, 0, 2)), (ROWS, COLS)),)

    level_stride = draws * samples * count
    for draw in range(draws):
        seed = tl.load(seeds + draw * samples + sample)
        first_level = out + (draw * samples + sample) * count
        k0 = seed.to(tl.uint32)
        k1 = (seed >> 32).to(tl.uint32)
        for segment in tl.static_range(SEGMENTS):
            channel = (segment * COLS + column) % CHANNELS if ALIGNED else first % CHANNELS
            scale = _per_channel(noise_scale, channel, CHANNELS)
            pixel_scale = scale if images.dtype.element_ty == tl.uint8 else scale * 255
            clean = pixels[segment].to(tl.float32) * pixel_scale + _per_channel(shift, channel, CHANNELS)
            counter = group + segment * (COLS // 4)
            zero = tl.zeros_like(counter).to(tl.uint32)
            w0, w1, w2, w3 = philox(counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero, k0, k1)
            n0, n1 = normals(w0, w1, INSTRUCTIONS)
            n2, n3 = normals(w2, w3, INSTRUCTIONS)
            noise = tl.reshape(tl.permute(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (1, 0, 2, 3)), (ROWS, COLS))
            places = _chunks(target + (segment * COLS + column) if ALIGNED else target, STORE)
            kept = _chunks(inside, STORE)
            for level in range(levels):
                amount = tl.load(sigma + level * samples + sample).to(tl.float32)
                noisy = (clean + noise * (scale * amount)).to(out.dtype.element_ty)
                destination = first_level + level * level_stride
                tl.store(destination + places, _chunks(noisy, STORE), mask=kept)


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


def instruction_set(device: torch.device) -> str:
    """The kernel's INSTRUCTIONS for a GPU. "gcn" is written for AMD's CDNA, which is told by its 64 lanes."""
    if torch.version.hip is None:
        return "ptx"
    return "gcn" if torch.cuda.get_device_properties(device).warp_size == 64 else "plain"


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
    # Triton launches on the current device, which need not be that of the images.
    with torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext():
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
