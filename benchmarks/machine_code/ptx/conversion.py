# mypy: disable-error-code="no-any-return"
"""Conversions between types."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from denim.benchmarks.machine_code.ptx import arithmetic as ar
from denim.benchmarks.machine_code.ptx.floating import narrowed
from denim.benchmarks.machine_code.ptx.forms import F32, TYPES, U16, U32, Array, Form, form, same
from denim.benchmarks.machine_code.ptx.traps import UnknownInstruction


@form(r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))")
def _(to: str, of: str) -> Form:
    return Form((TYPES[of],), (TYPES[to],), lambda a: a.astype(TYPES[to]))


@form(r"cvta(?:\.to)?\.(?:global|shared|local)\.u64")
def _() -> Form:
    # Every memory has addresses of its own here, and every access says which memory it means.
    return same("u64", 1, lambda a: a)


@form(r"cvt\.rn\.(f16|f32|f64)\.([su](?:8|16|32|64))")
def _(to: str, of: str) -> Form:
    if to == "f16":  # numpy rounds 64-bit integers twice on their way to float16
        return Form((TYPES[of],), (TYPES[to],), lambda a: a.astype(np.longdouble).astype(np.float16))
    return Form((TYPES[of],), (TYPES[to],), lambda a: a.astype(TYPES[to]))


@form(r"cvt\.(rni|rzi|rmi|rpi)(\.ftz)?\.([suf](?:8|16|32|64))\.(f32|f64)")
def _(rounding: str, ftz: str | None, to: str, of: str) -> Form:
    integral = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]

    def convert(a: Array) -> Array:
        a = ar.flush(a) if ftz else a
        return integral(a).astype(TYPES[to]) if to[0] == "f" else ar.to_integer(a, TYPES[to], integral)

    if to[0] == "f" and to != of:
        raise UnknownInstruction(f"cvt.{rounding}.{to}.{of}")
    return Form((TYPES[of],), (TYPES[to],), convert)


@form(r"cvt\.f64\.f32|cvt\.(f32|f64)\.(f16)|cvt\.rn\.(f32|f16)\.(f64)|cvt\.rn\.(f16)\.(f32)")
def _(*kinds: str | None) -> Form:
    to, of = [kind for kind in kinds if kind] or ("f64", "f32")
    return Form((TYPES[of],), (TYPES[to],), lambda a: a.astype(TYPES[to]))


@form(r"cvt\.f32\.bf16")
def _() -> Form:
    return Form((U16,), (F32,), ar.from_bfloat16)


@form(r"cvt\.(rn|rz)\.bf16\.f32")
def _(rounding: str) -> Form:
    return Form((F32,), (U16,), ar.bfloat16_bits if rounding == "rn" else ar.truncated_bfloat16_bits)


@form(r"cvt\.(rn|rz)\.bf16x2\.f32|cvt\.rn\.(f16)x2\.f32")
def _(rounding: str | None, half: str | None) -> Form:
    if half:
        narrow: Callable[[Array], Array] = functools.partial(narrowed, kind="f16")
    else:
        narrow = ar.bfloat16_bits if rounding == "rn" else ar.truncated_bfloat16_bits

    def pack(high: Array, low: Array) -> Array:
        """The first source is the high half."""
        return (narrow(high).astype(U32) << np.uint32(16)) | narrow(low).astype(U32)

    return Form((F32, F32), (U32,), pack)
