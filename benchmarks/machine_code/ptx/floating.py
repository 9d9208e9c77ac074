# mypy: disable-error-code="no-any-return"
"""Floating point: float32 and pairs of it, approximate functions, float64, and 16-bit types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from denim.benchmarks.machine_code.ptx import arithmetic as ar
from denim.benchmarks.machine_code.ptx.forms import F32, PREDICATE, TYPES, U16, U32, U64, Array, Form, form, same


def _flushed(ftz: str | None, function: Callable[..., Array]) -> Callable[..., Array]:
    if not ftz:
        return function
    return lambda *given: ar.flush(function(*(ar.flush(x) for x in given)))


_FLOAT: dict[str, tuple[int, Callable[..., Array]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "fma": (3, ar.fma),
}


@form(r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.f32|(fma)\.rn(\.ftz)?\.f32")
def _(name: str | None, ftz: str | None, fma: str | None, fma_ftz: str | None) -> Form:
    count, function = _FLOAT[name or fma or ""]
    return same("f32", count, _flushed(ftz or fma_ftz, function))


@form(r"(add|sub|mul)(?:\.rn)?\.f32x2|(fma)\.rn\.f32x2")
def _(name: str | None, fma: str | None) -> Form:
    count, function = _FLOAT[name or fma or ""]

    def pairs(*given: Array) -> Array:
        shape = max(len(x) for x in given)
        result = function(*(np.broadcast_to(x, (shape,)).copy().view(F32) for x in given))
        return result.view(U64)

    return Form((U64,) * count, (U64,), pairs)


@form(r"(neg|abs)(\.ftz)?\.f32")
def _(name: str, ftz: str | None) -> Form:
    return same("f32", 1, _flushed(ftz, np.negative if name == "neg" else np.abs))


@form(r"copysign\.(f32|f64)")
def _(kind: str) -> Form:
    """The first source has the sign, the second one the rest."""
    return same(kind, 2, lambda a, b: np.copysign(b, a))


@form(r"(min|max)(\.ftz)?(\.NaN)?\.f32")
def _(name: str, ftz: str | None, nan: str | None) -> Form:
    function = ar.minimum if name == "min" else ar.maximum
    return same("f32", 2, _flushed(ftz, lambda a, b: function(a, b, nan is not None)))


@form(r"(div|sqrt|rcp)\.rn(\.ftz)?\.f32")
def _(name: str, ftz: str | None) -> Form:
    # Rounded to float64 first: harmless, since float64 has more than twice the digits and two (Figueroa 1995).
    if name == "div":
        return same("f32", 2, _flushed(ftz, lambda a, b: (a.astype(np.float64) / b).astype(F32)))
    return same("f32", 1, _flushed(ftz, lambda a: ar.APPROXIMATE[name](a.astype(np.float64)).astype(F32)))


@form(r"div\.(?:full|approx)(\.ftz)?\.f32")
def _(ftz: str | None) -> Form:
    def divide(a: Array, b: Array) -> Array:
        a, b = (ar.flush(a), ar.flush(b)) if ftz else (a, b)
        return a.astype(np.float64) / b

    return Form((F32, F32), (F32,), divide, granted="div", flushes=ftz is not None)


@form(r"(sqrt|rsqrt|rcp|ex2|lg2|sin|cos|tanh)\.approx(\.ftz)?\.f32")
def _(name: str, ftz: str | None) -> Form:
    def exact(a: Array) -> Array:
        return ar.APPROXIMATE[name]((ar.flush(a) if ftz else a).astype(np.float64))

    return Form((F32,), (F32,), exact, granted=name, flushes=ftz is not None)


@form(r"(add|sub|mul|div\.rn)(?:\.rn)?\.f64|(sqrt\.rn|neg|abs|min|max)\.f64")
def _(two: str | None, other: str | None) -> Form:
    name = two or other or ""
    functions: dict[str, tuple[int, Callable[..., Array]]] = {
        "add": (2, np.add),
        "sub": (2, np.subtract),
        "mul": (2, np.multiply),
        "div.rn": (2, np.divide),
        "sqrt.rn": (1, np.sqrt),
        "neg": (1, np.negative),
        "abs": (1, np.abs),
        "min": (2, np.fmin),
        "max": (2, np.fmax),
    }
    return same("f64", *functions[name])


def _halves(packed: Array, kind: str) -> tuple[Array, Array]:
    """Low and high half of a pair, as float32."""
    low, high = packed.astype(U16), (packed >> np.uint32(16)).astype(U16)
    return _widened(low, kind), _widened(high, kind)


def _widened(bits: Array, kind: str) -> Array:
    return ar.from_bfloat16(bits) if kind.startswith("bf16") else bits.view(np.float16).astype(F32)


def narrowed(x: Array, kind: str) -> Array:
    """float32 to the bits of bf16 or f16."""
    return ar.bfloat16_bits(x) if kind.startswith("bf16") else x.astype(np.float16).view(U16)


@form(r"(add|sub|fma)\.rn\.f32\.(bf16|f16)|(add|sub)\.f32\.(bf16|f16)")
def _(name: str | None, kind: str | None, other: str | None, other_kind: str | None) -> Form:
    """Mixed precision: the narrow operands come first, the last one is float32."""
    count, function = _FLOAT[name or other or ""]
    narrow = kind or other_kind or ""

    def mixed(*given: Array) -> Array:
        return function(*(_widened(x, narrow) for x in given[:-1]), given[-1])

    return Form((U16,) * (count - 1) + (F32,), (F32,), mixed)


@form(r"(neg|abs)\.(bf16|f16)(x2)?")
def _(name: str, kind: str, pair: str | None) -> Form:
    signs = np.uint32(0x80008000) if pair else np.uint16(0x8000)
    dtype = U32 if pair else U16
    return Form((dtype,), (dtype,), (lambda a: a ^ signs) if name == "neg" else (lambda a: a & ~signs))


@form(r"(min|max)(\.NaN)?\.(bf16|f16)(x2)?")
def _(name: str, nan: str | None, kind: str, pair: str | None) -> Form:
    function = ar.minimum if name == "min" else ar.maximum
    return _of_16_bits(2, lambda a, b: function(a, b, nan is not None), kind, pair)


@form(r"(add|sub|mul)(?:\.rn)?\.(bf16|f16)(x2)?")
def _(name: str, kind: str, pair: str | None) -> Form:
    # Rounded to float32 first: harmless, as above (24 digits are more than twice 11, and two).
    return _of_16_bits(2, _FLOAT[name][1], kind, pair)


def _of_16_bits(count: int, function: Callable[..., Array], kind: str, pair: str | None) -> Form:
    def single(*given: Array) -> Array:
        return narrowed(function(*(_widened(x, kind) for x in given)), kind)

    def both(*given: Array) -> Array:
        low, high = (function(*parts) for parts in zip(*(_halves(x, kind) for x in given), strict=True))
        return narrowed(low, kind).astype(U32) | (narrowed(high, kind).astype(U32) << np.uint32(16))

    dtype = U32 if pair else U16
    return Form((dtype,) * count, (dtype,), both if pair else single)


_HOW = r"((?:eq|ne|lt|le|gt|ge)u?|num|nan)"


@form(rf"setp\.{_HOW}(\.ftz)?\.(f32|f64|f16|bf16)")
def _(how: str, ftz: str | None, kind: str) -> Form:
    def answer(a: Array, b: Array) -> Array:
        if kind == "bf16":
            a, b = ar.from_bfloat16(a), ar.from_bfloat16(b)
        return ar.compare(how, ar.flush(a), ar.flush(b)) if ftz else ar.compare(how, a, b)

    return Form((TYPES[kind],) * 2, (PREDICATE,), answer)


@form(rf"setp\.{_HOW}\.(f16x2|bf16x2)")
def _(how: str, kind: str) -> Form:
    def answer(a: Array, b: Array) -> tuple[Array, Array]:
        low, high = (ar.compare(how, x, y) for x, y in zip(_halves(a, kind), _halves(b, kind), strict=True))
        return low, high

    return Form((U32, U32), (PREDICATE, PREDICATE), answer)
