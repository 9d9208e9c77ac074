# mypy: disable-error-code="no-any-return"
"""The floating-point arithmetic of PTX in numpy: float32 bit for bit, but for the bits of NaNs.

Source: IEEE 754-2019 and the "PTX ISA", "Floating Point Instructions". numpy itself rounds to nearest even and keeps
subnormal numbers, as the forms without `.ftz` do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "APPROXIMATE",
    "GRANTED",
    "bfloat16_bits",
    "compare",
    "flush",
    "fma",
    "from_bfloat16",
    "maximum",
    "minimum",
    "to_integer",
    "truncated_bfloat16_bits",
]

Array = NDArray[Any]
F32, F64 = np.float32, np.float64

# The functions of `.approx` instructions, and the largest errors that the PTX ISA grants them: relative to the result,
# but absolute for sine and cosine (within pi) and for lg2 between 0.5 and 2 (relative outside, so: of the larger of
# the result and 1).
APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
GRANTED = {
    "sqrt": 2.0**-23,
    "rsqrt": 2.0**-22.9,
    "rcp": 2.0**-23,
    "ex2": 2.0**-22,
    "lg2": 2.0**-22,
    "sin": 2.0**-20.5,
    "cos": 2.0**-20.5,
    "tanh": 2.0**-11,
    "div": 2.0**-22,
}


def flush(x: Array) -> Array:
    """`.ftz`: subnormal float32 to zero of the same sign."""
    return np.where(np.abs(x) < F32(2.0**-126), np.copysign(F32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once.

    The product is exact in float64. Rounding the sum to float64 and then to float32 goes wrong only where the first
    result lies half way between two float32 numbers, or is subnormal: there the sum is rounded to odd instead, after
    which a second rounding does no harm (Boldo and Melquiond 2008, "Emulation of FMA and Correctly Rounded Sums").
    """
    wide_product, wide_c = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = np.atleast_1d(wide_product + wide_c)
    raw = total.view(np.int64)
    doubtful = ((raw & 0x1FFFFFFF) == 0x10000000) | (np.abs(total) < 2.0**-126)
    if not doubtful.any():
        return total.astype(F32)
    part = total - wide_product
    error = (wide_product - (total - part)) + (wide_c - part)  # exact: Knuth's two-sum
    odd = doubtful & np.isfinite(total) & (error != 0) & ((raw & 1) == 0)
    towards_infinity = (error > 0) == (total > 0)
    return np.where(odd, raw + np.where(towards_infinity, 1, -1), raw).view(F64).astype(F32)


def bfloat16_bits(x: Array) -> Array:
    """float32 to the bits of bfloat16, rounded to nearest even; NaN becomes 0x7fff."""
    raw = x.view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def truncated_bfloat16_bits(x: Array) -> Array:
    """float32 to the bits of bfloat16, rounded towards zero; NaN becomes 0x7fff."""
    return np.where(np.isnan(x), np.uint32(0x7FFF), x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    """The bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(F32)


def minimum(a: Array, b: Array, propagate_nan: bool) -> Array:
    """`min`: -0 is below +0; a NaN is passed over for a number, or wins if `propagate_nan`."""
    smaller = np.where((a == 0) & (b == 0), np.where(np.signbit(a), a, b), np.fmin(a, b))
    return np.where(np.isnan(a) | np.isnan(b), F32(np.nan), smaller) if propagate_nan else smaller


def maximum(a: Array, b: Array, propagate_nan: bool) -> Array:
    """`max`, likewise."""
    return -minimum(-a, -b, propagate_nan)


_ORDERED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def compare(how: str, a: Array, b: Array) -> Array:
    """`setp` of floating-point numbers: eq ne lt le gt ge are false for NaN; equ ... geu are true; num and nan ask."""
    unordered = np.isnan(a) | np.isnan(b)
    if how == "nan":
        return unordered
    if how == "num":
        return ~unordered
    if how in _ORDERED:
        return _ORDERED[how](a, b) & ~unordered
    return _ORDERED[how[:-1]](a, b) | unordered


def to_integer(x: Array, dtype: np.dtype[np.generic], integral: Callable[[Array], Array]) -> Array:
    """Floating point to integer: `integral` rounds, values beyond the type's range saturate, NaN becomes zero.

    (PTX gives other values for NaN to 64-bit integers; compilers guard against NaN instead of using them.)
    """
    info = np.iinfo(dtype)  # type: ignore[type-var]
    # The largest 64-bit integers are not float64 numbers: what reaches beyond the last one that is, saturates.
    rounded = np.nan_to_num(integral(x.astype(F64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = (rounded > float(info.min)) & (rounded < float(info.max))
    saturated = np.where(rounded > 0, *np.array([info.max, info.min], dtype))
    return np.where(inside, np.where(inside, rounded, 0).astype(dtype), saturated)
