"""The mistakes of `mutants`: in which kernel, where, and on which case it is looked for."""

from __future__ import annotations

from typing import NamedTuple

from denim.benchmarks.case import BACKWARD, FORWARD

__all__ = ["HUGE", "HUGE_SHAPE", "MUTANTS", "PTX", "STEP", "Mutant"]

PTX = "PTX"
# An attack on samples of three elements each, whose last one lies beyond 2^31.
HUGE = "attack_step beyond 2^31 elements"
HUGE_SHAPE = (2**30 + 2, 3)

NOISE = "noise_patchify, uint8, patch 16, bf16"
PLANES = "noise_patchify, fp32 planes, patch 16, bf16"
SWEEP = "noise_patchify, uint8, patch 16, bf16, 4 levels of 2 draws"
LOSS = "patch_loss, uint8, patch 16, bf16"
DECODE = "decode_patches, input, fp32 planes, patch 16, bf16"
STEP = "attack_step, fp32"
START = "attack_start, fp32"
CLAMP = "    moved = tl.minimum(moved, 1.0, propagate_nan=tl.PropagateNan.ALL)\n    tl.store(out + start + offset"


class Mutant(NamedTuple):
    """One mistake."""

    name: str
    case: str
    """Operation and name of a case of `denim.benchmarks.cases`, or `HUGE`."""
    file: str
    """In kernels/, without ".py"; or `PTX`: the text that Triton's compiler hands to ptxas."""
    edits: tuple[tuple[str, str], ...] = ()
    """(what stands there once, what stands there instead); of PTX a pattern of `re`, whose first match is replaced."""
    part: str = FORWARD
    target: str = "sm_90"


MUTANTS = (
    Mutant(
        "sine and cosine exchanged, on NVIDIA alone",
        NOISE,
        "noise_triton",
        (('_ptx("cos.approx', '_ptx("COS.approx'), ('_ptx("sin.approx', '_ptx("cos.approx'), ('"COS.', '"sin.')),
    ),
    Mutant(
        "half the angle of sine and cosine, on NVIDIA alone",
        NOISE,
        "noise_triton",
        tuple(
            (
                f'_ptx("{name}.approx.ftz.f32 $0, $1;", word * (math.pi * 2.0**-31))',
                f'_ptx("{name}.approx.ftz.f32 $0, $1;", word * (math.pi * 2.0**-32))',
            )
            for name in ("sin", "cos")
        ),
    ),
    Mutant(
        "the sine with the wrong sign, on NVIDIA alone",
        NOISE,
        "noise_triton",
        (('_ptx("sin.approx.ftz.f32 $0, $1;", word', '_ptx("sin.approx.ftz.f32 $0, $1;", -word'),),
    ),
    Mutant(
        "the logarithm to base e for that to base 2, on NVIDIA alone",
        NOISE,
        "noise_triton",
        (('_ptx("lg2.approx.ftz.f32 $0, $1;", x)', '_ptx("lg2.approx.ftz.f32 $0, $1;", x) * 0.6931472'),),
    ),
    Mutant(
        "Triton's accurate cosine, on NVIDIA alone",
        NOISE,
        "noise_triton",
        (('_ptx("cos.approx.ftz.f32 $0, $1;", word * (math.pi * 2.0**-31))', "tl.cos(word * (math.pi * 2.0**-31))"),),
    ),
    Mutant(
        "no wait state behind the sine, on AMD alone",
        NOISE,
        "noise_triton",
        (('_gcn("v_sin_f32 $0, $1\\ns_nop 0"', '_gcn("v_sin_f32 $0, $1"'),),
        target="gfx942",
    ),
    Mutant("nine rounds of Philox", NOISE, "noise_triton", (("tl.static_range(10)", "tl.static_range(9)"),)),
    Mutant(
        "the group of four in the wrong word of the counter",
        NOISE,
        "noise_patchify_triton",
        (("philox(group, zero, zero, zero,", "philox(zero, group, zero, zero,"),),
    ),
    Mutant(
        "every bfloat16 truncated",
        NOISE,
        "noise_patchify_triton",
        (
            (
                "(clean + noise * (scale * amount)).to(out.dtype.element_ty)",
                '(clean + noise * (scale * amount)).to(out.dtype.element_ty, fp_downcast_rounding="rtz")',
            ),
        ),
    ),
    Mutant("one pair of bfloat16 truncated by the compiler", NOISE, PTX, ((r"cvt\.rn\.bf16x2", "cvt.rz.bf16x2"),)),
    Mutant(
        "the level in float64",
        NOISE,
        "noise_patchify_triton",
        (
            (
                "only_amount = tl.load(sigma + sample).to(tl.float32)",
                "only_amount = tl.load(sigma + sample).to(tl.float64)",
            ),
        ),
    ),
    Mutant(
        "no mask where the last program stores",
        NOISE,
        "noise_patchify_triton",
        (("chunks(noisy, STORE), mask=kept)", "chunks(noisy, STORE))"),),
    ),
    Mutant("a store that lost its mask in the compiler", NOISE, PTX, ((r"@%p\d+ (st\.global)", r"\1"),)),
    Mutant(
        "patches one column further right",
        NOISE,
        "noise_patchify_triton",
        (("(y // PATCH * columns + x) * (WIDTH", "(y // PATCH * columns + x + 1) * (WIDTH"),),
    ),
    Mutant(
        "planes that lie one element closer",
        PLANES,
        "noise_patchify_triton",
        (("channel * (count // CHANNELS)\n", "channel * (count // CHANNELS - 1)\n"),),
    ),
    Mutant(
        "programs of one warp for the work of four",
        NOISE,
        "noise_patchify_triton",
        (
            (
                "            **tile(patch_size, channels),\n            num_warps=max(1, threads // gpu.warp_size),",
                "            **tile(patch_size, channels),\n            num_warps=1,",
            ),
        ),
    ),
    Mutant(
        "levels and samples exchanged where sigma is read",
        SWEEP,
        "noise_patchify_triton",
        (("sigma + level * samples + sample", "sigma + sample * levels + level"),),
    ),
    Mutant(
        "the next level stored where the next draw belongs",
        SWEEP,
        "noise_patchify_triton",
        (("destination += draws * samples * size", "destination += samples * size"),),
    ),
    Mutant(
        "the gradient of every channel divided by the std of the first",
        PLANES,
        "noise_patchify_triton",
        (("(total[e] * inverse_std[e % CHANNELS],)", "(total[e] * inverse_std[0],)"),),
        part=BACKWARD,
    ),
    Mutant(
        "a mean over one element too few",
        LOSS,
        "patch_loss_triton",
        (("_patch_sum(squares, PATCHES) * (1.0 / SIZE)\n", "_patch_sum(squares, PATCHES) * (1.0 / (SIZE - 1))\n"),),
    ),
    Mutant(
        "a sum by atomic additions",
        LOSS,
        "patch_loss_triton",
        (("tl.store(partials + program, tl.sum", "tl.atomic_add(partials + program, tl.sum"),),
    ),
    Mutant(
        "a shuffle from the wrong lane", LOSS, PTX, ((r"(shfl\.sync\.bfly\.b32[^;]*), 16, 31, -1;", r"\1, 8, 31, -1;"),)
    ),
    Mutant("no barrier before shared memory is read", LOSS, PTX, ((r"bar\.sync\s+0;", ""),)),
    Mutant(
        "the variance of n for that of n - 1",
        DECODE,
        "decode_patches_triton",
        (("PATCHES, RUNS) * (1.0 / (SIZE - 1))\n    slope", "PATCHES, RUNS) * (1.0 / SIZE)\n    slope"),),
    ),
    Mutant(
        "a gradient for saturated pixels",
        DECODE,
        "decode_patches_triton",
        (("tl.where((pixel >= 0) & (pixel <= 1), upstream[e], 0.0)", "upstream[e]"),),
        part=BACKWARD,
    ),
    Mutant(
        "threads without pixels in a patch's mean",
        "decode_patches, input, fp32 planes, patch 14, bf16",
        "decode_patches_triton",
        (
            (
                "_over_patch(tl.where(inside, total, 0.0), PATCHES, RUNS) * (1.0 / SIZE)",
                "_over_patch(total, PATCHES, RUNS) * (1.0 / SIZE)",
            ),
        ),
    ),
    Mutant(
        "no clamp to one",
        STEP,
        "attack_step_triton",
        ((CLAMP, CLAMP.partition("\n")[2]),),
    ),
    Mutant(
        "a step up where the gradient is negative",
        STEP,
        "attack_step_triton",
        (("tl.where(slope < 0, -1.0, slope)", "tl.where(slope < 0, 1.0, slope)"),),
    ),
    Mutant(
        "a number for NaN",
        STEP,
        "attack_step_triton",
        ((CLAMP, CLAMP.replace(", propagate_nan=tl.PropagateNan.ALL", "")),),
    ),
    Mutant(
        "accesses of one element at a time",
        STEP,
        "attack_step_triton",
        (
            (
                'do_not_specialize=["tiles", "step_stride", "epsilon_stride"]',
                'do_not_specialize=["tiles", "step_stride", "epsilon_stride", "elements"]',
            ),
        ),
    ),
    Mutant(
        "offsets of samples in 32 bits",
        HUGE,
        "attack_step_triton",
        (
            (
                "sample = (program // tiles).to(tl.int64)\n    first = (program % tiles).to(tl.int64) * BLOCK",
                "sample = program // tiles\n    first = (program % tiles).to(tl.int64) * BLOCK",
            ),
        ),
    ),
    Mutant(
        "the start from the stream of the seeds",
        START,
        "attack_step_triton",
        (("STREAM=int(Stream.START)", "STREAM=int(Stream.SEED)"),),
    ),
    Mutant(
        "product and sum of the start rounded once",
        START,
        "attack_step_triton",
        (("            enable_fp_fusion=False,\n", ""),),
    ),
)
