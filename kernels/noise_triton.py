# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# (The bodies under triton.jit are Triton's language, which mypy takes for Python.)
"""The noise contract as Triton functions; `denim.kernels.noise` is the same in torch.

The functions take the instruction set as an argument: "ptx" (NVIDIA), "gcn" (AMD) or "plain" (Triton's own mathematics,
which the interpreter can run). Only `_log2`, `_cos` and `_sin` depend on it; `tl.sqrt` is one instruction everywhere.
`tl.target_info` cannot replace the argument: without a driver it answers "not CUDA" while building for a CUDA target.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = ["normals", "philox"]


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 on uint32 counters and keys (Salmon et al. 2011): four uint32 words.

    The 64-bit product is one machine instruction; separate products for the high and the low half would be two.
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


# PTX: the flush-to-zero forms are one instruction, while the others add range checks. No argument here is subnormal.
# GCN: CDNA 3 needs one wait state between a transcendental instruction and the use of its result. The compiler inserts
# it after its own instructions, but not into inline assembly.
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
    """Two standard normals from two uint32 words: the arithmetic of `denim.kernels.noise.normals_from_words`."""
    h = _signed(first) * 2.0**-32 + 2.0**-33
    u = tl.where(h > 0, h, 1 + h)
    series = h * (h * (-2.0 / 3.0 * h + 1.0) - 2.0)
    # h is never zero, so ~(h > 0) means h < 0. It reuses the comparison that u needs.
    squared = tl.where((h > -(2.0**-6)) & ~(h > 0), series, -2.0 * math.log(2.0) * _log2(u, INSTRUCTIONS))
    radius = tl.sqrt(squared)
    angle = _signed(second)
    return radius * _cos(angle, INSTRUCTIONS), radius * _sin(angle, INSTRUCTIONS)
