# mypy: disable-error-code="no-any-return"
"""Integers, bits, comparisons of integers, and selection."""

from __future__ import annotations

import functools

import numpy as np

from denim.benchmarks.machine_code.ptx.forms import INTEGER, PREDICATE, TYPES, U32, U64, Array, Form, form, same


@form(r"(add|sub|mul\.lo|min|max)\." + INTEGER)
def _(name: str, kind: str) -> Form:
    functions = {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum}
    return same(kind, 2, functions[name])


@form(r"add\.[su]16x2")
def _() -> Form:
    def add(a: Array, b: Array) -> Array:
        """In each half modulo 2^16."""
        high = np.uint32(0xFFFF0000)
        return (((a & high) + (b & high)) & high) | ((a + b) & ~high)

    return same("u32", 2, add)


@form(r"mad\.lo\." + INTEGER)
def _(kind: str) -> Form:
    return same(kind, 3, lambda a, b, c: a * b + c)


@form(r"(neg|abs)\.(s16|s32|s64)")
def _(name: str, kind: str) -> Form:
    return same(kind, 1, np.negative if name == "neg" else np.abs)


@form(r"(mul|mad)\.wide\.(s16|u16|s32|u32)")
def _(name: str, kind: str) -> Form:
    dtype, wide = TYPES[kind], TYPES[f"{kind[0]}{2 * int(kind[1:])}"]
    if name == "mul":
        return Form((dtype, dtype), (wide,), lambda a, b: a.astype(wide) * b.astype(wide))
    return Form((dtype, dtype, wide), (wide,), lambda a, b, c: a.astype(wide) * b.astype(wide) + c)


@form(r"(mul|mad)\.hi\.(s16|u16|s32|u32)")
def _(name: str, kind: str) -> Form:
    dtype, bits = TYPES[kind], int(kind[1:])
    wide = TYPES[f"{kind[0]}{2 * bits}"]

    def high(a: Array, b: Array) -> Array:
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(dtype)

    return same(kind, 2, high) if name == "mul" else same(kind, 3, lambda a, b, c: high(a, b) + c)


@form(r"mul\.hi\.(s64|u64)")
def _(kind: str) -> Form:
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)

    def high(a: Array, b: Array) -> Array:
        """Of four products of halves; a negative factor is 2^64 too large as an unsigned one."""
        x, y = a.view(U64), b.view(U64)
        crossed = (x >> half) * (y & low) + (((x & low) * (y & low)) >> half)
        middle = (x & low) * (y >> half) + (crossed & low)
        product = (x >> half) * (y >> half) + (crossed >> half) + (middle >> half)
        if kind == "s64":
            product = product - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
        return product.view(TYPES[kind])

    return same(kind, 2, high)


@form(r"(div|rem)\.([su](?:16|32|64))")
def _(name: str, kind: str) -> Form:
    def divide(a: Array, b: Array) -> Array:
        """Rounded towards zero; the remainder has the sign of the dividend. Lanes that divide by zero get anything."""
        b = np.where(b == 0, b.dtype.type(1), b)
        remainder = np.fmod(a, b)
        return remainder if name == "rem" else (a - remainder) // b

    return same(kind, 2, divide, divides=True)


@form(r"(and|or|xor)\.(b16|b32|b64|pred)")
def _(name: str, kind: str) -> Form:
    return same(kind, 2, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name])


@form(r"not\.(b16|b32|b64|pred)")
def _(kind: str) -> Form:
    return same(kind, 1, np.bitwise_not)


@form(r"lop3\.b32")
def _() -> Form:
    def table(a: Array, b: Array, c: Array, lut: Array) -> Array:
        """Bit (4a + 2b + c) of the table, for the three bits at each position."""
        result: Array = np.zeros(1, U32)
        for row in range(8):
            chosen = np.where((lut >> np.uint32(row)) & np.uint32(1), np.uint32(0xFFFFFFFF), np.uint32(0))
            terms = (x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            result = result | functools.reduce(np.bitwise_and, terms, chosen)
        return result

    return same("b32", 4, table)


@form(r"(shl|shr)\." + INTEGER)
def _(name: str, kind: str) -> Form:
    dtype, bits = TYPES[kind], int(kind[1:])

    def shift(a: Array, by: Array) -> Array:
        """Shifts by more than the width are shifts by the width."""
        if by.size == 1 and by[0] < bits:
            return a << dtype.type(by[0]) if name == "shl" else a >> dtype.type(by[0])
        # numpy does not define a shift by the whole width: two steps.
        most = np.minimum(by, np.uint32(bits)).astype(dtype)
        first, second = most >> dtype.type(1), most - (most >> dtype.type(1))
        return (a << first) << second if name == "shl" else (a >> first) >> second

    return Form((dtype, U32), (dtype,), shift)


@form(r"shf\.(l|r)\.(wrap|clamp)\.b32")
def _(direction: str, mode: str) -> Form:
    def funnel(a: Array, b: Array, by: Array) -> Array:
        """32 bits of the 64 whose high half is b: the high half after a shift left, the low half after one right."""
        both = (b.astype(U64) << np.uint64(32)) | a.astype(U64)
        amount = (by & np.uint32(31) if mode == "wrap" else np.minimum(by, np.uint32(32))).astype(U64)
        # (Two shifts, since one by 64 is not defined.)
        return (both << amount >> np.uint64(32) if direction == "l" else both >> amount).astype(U32)

    return same("b32", 3, funnel)


@form(r"bfe\.(s32|u32|s64|u64)")
def _(kind: str) -> Form:
    dtype, bits = TYPES[kind], int(kind[1:])

    def extract(a: Array, position: Array, length: Array) -> Array:
        """The field from `position` on; above it, and beyond the register's end, zero or the field's sign."""
        start, count = (position & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
        # Up to the register's end, and back down: the shift back fills in zeros or the sign.
        top = np.clip(bits - start - count, 0, bits - 1)
        down = np.clip(bits - count, 0, bits - 1)
        field = (a << top.astype(dtype)) >> down.astype(dtype)
        beyond = start + count > bits
        if beyond.any():
            field = np.where(beyond, a >> np.minimum(start, bits - 1).astype(dtype), field)
            field = np.where(beyond & (start >= bits) & (kind[0] == "u"), dtype.type(0), field)
        return np.where(count == 0, dtype.type(0), field)

    return Form((dtype, U32, U32), (dtype,), extract)


@form(r"bfi\.b32")
def _() -> Form:
    def insert(a: Array, into: Array, position: Array, length: Array) -> Array:
        start, count = (np.minimum(x & np.uint32(255), np.uint32(32)).astype(U64) for x in (position, length))
        ones = (((np.uint64(1) << count) - np.uint64(1)) << start).astype(U32)
        return (into & ~ones) | ((a.astype(U64) << start).astype(U32) & ones)

    return same("b32", 4, insert)


@form(r"prmt\.b32")
def _() -> Form:
    def permute(a: Array, b: Array, selector: Array) -> Array:
        """Byte k of the result is byte (nibble k, without its top bit) of {b, a}; the top bit asks for its sign."""
        both = (b.astype(U64) << np.uint64(32)) | a.astype(U64)
        result: Array = np.zeros(1, U32)
        for k in range(4):
            nibble = (selector >> np.uint32(4 * k)) & np.uint32(15)
            byte = ((both >> ((nibble & np.uint32(7)).astype(U64) * np.uint64(8))) & np.uint64(255)).astype(U32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * k))
        return result

    return same("b32", 3, permute)


@form(r"(popc|clz)\.b32")
def _(name: str) -> Form:
    def count(a: Array) -> Array:
        if name == "popc":
            return np.bitwise_count(a).astype(U32)
        for by in (1, 2, 4, 8, 16):  # every bit below the highest set one
            a = a | (a >> np.uint32(by))
        return np.bitwise_count(~a).astype(U32)

    return Form((U32,), (U32,), count)


@form(r"setp\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\." + INTEGER)
def _(how: str, kind: str) -> Form:
    how = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)
    functions = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    return Form((TYPES[kind],) * 2, (PREDICATE,), functions[how])


@form(r"selp\.([subf](?:16|32|64))")
def _(kind: str) -> Form:
    # By bits: a NaN that is selected stays what it is.
    dtype = TYPES[f"b{kind[1:]}"]
    return Form((dtype, dtype, PREDICATE), (dtype,), lambda a, b, p: np.where(p, a, b))
