"""Every instruction form against its definition: integers as Python's, floating point as rounded fractions."""

from __future__ import annotations

import math
import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from denim.benchmarks.machine_code.ptx import arithmetic
from denim.benchmarks.machine_code.ptx.forms import FORMS
from denim.benchmarks.machine_code.ptx.instructions import decode
from denim.benchmarks.machine_code.ptx.traps import UnknownInstruction

COUNT = 400

# --- what a number is -------------------------------------------------------------------------------------------------

# Digits, exponent of the last place of the smallest numbers, and of the first number that is too large.
FORMATS = {"f64": (53, -1074, 1024), "f32": (24, -149, 128), "f16": (11, -24, 16), "bf16": (8, -133, 128)}
CODES = {"f64": "<d", "f32": "<f", "f16": "<e"}
WIDTHS = {"f64": 64, "f32": 32, "f16": 16, "bf16": 16}


def rounded(exact: Fraction, kind: str, towards_zero: bool = False) -> float:
    """IEEE 754: the nearest number of the format, the even one of two; or the next one towards zero."""
    if exact == 0:
        return 0.0
    digits, least, most = FORMATS[kind]
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    if abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** max(exponent - digits + 1, least)
    steps = math.trunc(exact / step) if towards_zero else round(exact / step)
    result = steps * step
    if abs(result) >= Fraction(2) ** most:
        return math.inf if exact > 0 else -math.inf
    return float(result)


def number(bits: int, kind: str) -> float:
    if kind == "bf16":
        return number(bits << 16, "f32")
    return struct.unpack(CODES[kind], bits.to_bytes(WIDTHS[kind] // 8, "little"))[0]


def bits_of(value: float, kind: str) -> int:
    if kind == "bf16":
        return bits_of(value, "f32") >> 16
    return int.from_bytes(struct.pack(CODES[kind], value), "little")


def signed(bits: int, width: int) -> int:
    return bits - (1 << width) if bits >> (width - 1) & 1 else bits


def typed(bits: int, kind: str) -> int:
    return signed(bits, int(kind[1:])) if kind[0] == "s" else bits


# --- what an instruction answers --------------------------------------------------------------------------------------


def answer(opcode: str, *operands: np.ndarray) -> list[np.ndarray]:
    """What the machine's form answers, as unsigned integers, for operands given so."""
    form = decode(opcode)
    assert len(operands) == len(form.sources)
    values = [
        operand.astype(f"u{t.itemsize}").view(t) if t.kind != "b" else operand.astype(bool)
        for operand, t in zip(operands, form.sources, strict=True)
    ]
    with np.errstate(all="ignore"):
        result = form.function(*values)
    results = result if len(form.results) > 1 else (result,)
    found = []
    for value, dtype in zip(results, form.results, strict=True):
        if form.granted:
            with np.errstate(all="ignore"):
                value = value.astype(dtype)
        assert value.dtype == dtype, f"{opcode} promises {dtype} and gives {value.dtype}"
        found.append(value.astype(np.uint8) if dtype.kind == "b" else value.view(f"u{dtype.itemsize}"))
    return found


def draw(width: int, seed: int) -> np.ndarray:
    """Bits: the edges of integers and of floating point first, then any."""
    ones = (1 << width) - 1
    edges = [0, 1, 2, 3, ones, ones - 1, 1 << (width - 1), (1 << (width - 1)) - 1, (1 << (width - 1)) + 1, width, 7]
    rng = np.random.default_rng(seed)
    random = rng.integers(0, ones, COUNT, dtype=np.uint64, endpoint=True)
    random[: COUNT // 4] >>= rng.integers(0, width, COUNT // 4, dtype=np.uint64)  # small ones too
    values = np.concatenate([np.array(edges, np.uint64), random])
    return np.random.default_rng(seed + 1000).permutation(values)


def draw_floats(kind: str, seed: int) -> np.ndarray:
    """Bits of numbers: signed zeros, subnormals, ones, the largest, infinity, NaN, then any, many of like size."""
    width = WIDTHS[kind]
    digits = FORMATS[kind][0]
    infinity = ((1 << (width - digits)) - 1) << (digits - 1)
    one = bits_of(1.0, kind)
    sign = 1 << (width - 1)
    edges = [
        0,
        1,
        (1 << (digits - 1)) - 1,
        1 << (digits - 1),
        one,
        one + 1,
        one - 1,
        infinity - 1,
        infinity,
        infinity + 1,
    ]
    edges += [edge | sign for edge in edges]
    rng = np.random.default_rng(seed)
    random = rng.integers(0, (1 << width) - 1, COUNT, dtype=np.uint64, endpoint=True)
    like = (rng.integers(-3, 4, COUNT).astype(np.int64) << (digits - 1)) + one
    random[::2] = (random[::2] & np.uint64(sign | ((1 << (digits - 1)) - 1))) | like[::2].astype(np.uint64)
    values = np.concatenate([np.array(edges, np.uint64), random])
    return np.random.default_rng(seed + 1000).permutation(values)


def check_integers(opcode, kinds, to, define):
    """`define` takes and returns Python integers; results are taken modulo the width."""
    operands = [draw(int(kind[1:]), seed) for seed, kind in enumerate(kinds)]
    (got,) = answer(opcode, *operands)
    width = int(to[1:])
    for k, given in enumerate(zip(*(operand.tolist() for operand in operands), strict=True)):
        expected = define(*(typed(bits, kind) for bits, kind in zip(given, kinds, strict=True))) % (1 << width)
        assert int(got[k]) == expected, (opcode, given, int(got[k]), expected)


def same_number(got: float, expected: float) -> bool:
    if math.isnan(expected):
        return math.isnan(got)
    return got == expected and math.copysign(1, got) == math.copysign(1, expected)


def flushed(value: float) -> float:
    return math.copysign(0.0, value) if abs(value) < 2.0**-126 else value


def check_floats(opcode, kinds, to, exact, special, ftz=False, towards_zero=False):
    """`exact` computes with fractions, `special` with Python's floats where an operand or the result is none."""
    operands = [draw_floats(kind, seed) for seed, kind in enumerate(kinds)]
    (got,) = answer(opcode, *operands)
    for k, given in enumerate(zip(*(operand.tolist() for operand in operands), strict=True)):
        values = [number(bits, kind) for bits, kind in zip(given, kinds, strict=True)]
        values = [flushed(value) for value in values] if ftz else values
        expected = special(*values)
        if all(map(math.isfinite, values)):
            fraction = exact(*map(Fraction, values))
            if fraction is not None and fraction != 0:
                expected = rounded(fraction, to, towards_zero)
                # A result too small for the format keeps its sign.
                expected = math.copysign(expected, 1 if fraction > 0 else -1)
        expected = flushed(expected) if ftz else expected
        result = number(int(got[k]), to)
        assert same_number(result, expected), (opcode, values, result, expected)


# --- integers and bits ------------------------------------------------------------------------------------------------


def truncated_division(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def byte_permutation(a, b, selector):
    both, result = b << 32 | a, 0
    for k in range(4):
        nibble = selector >> (4 * k) & 15
        byte = both >> (8 * (nibble & 7)) & 255
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << (8 * k)
    return result


def field(a, position, length, width, sign):
    """The pseudocode of `bfe` in the PTX ISA, bit by bit."""
    position, length, a = position & 255, length & 255, a % (1 << width)
    fill = 0 if not sign or length == 0 else a >> min(position + length - 1, width - 1) & 1
    result = 0
    for k in range(width):
        result |= (a >> (position + k) & 1 if k < length and position + k < width else fill) << k
    return result


def inserted(a, into, position, length):
    """The pseudocode of `bfi`."""
    position, length = position & 255, length & 255
    for k in range(length):
        if position + k < 32:
            into = into & ~(1 << (position + k)) | (a >> k & 1 if k < 32 else 0) << (position + k)
    return into


def lookup(a, b, c, table):
    return sum((table >> (4 * (a >> k & 1) + 2 * (b >> k & 1) + (c >> k & 1)) & 1) << k for k in range(32))


def funnel(a, b, by, left, clamp):
    by = min(by, 32) if clamp else by & 31
    both = b << 32 | a
    return both << by >> 32 if left else both >> by


INTEGERS = {}
for _width in (16, 32, 64):
    for _kind in (f"s{_width}", f"u{_width}"):
        _two = [_kind, _kind]
        INTEGERS |= {
            f"add.{_kind}": (_two, _kind, lambda a, b: a + b),
            f"sub.{_kind}": (_two, _kind, lambda a, b: a - b),
            f"mul.lo.{_kind}": (_two, _kind, lambda a, b: a * b),
            f"mad.lo.{_kind}": ([*_two, _kind], _kind, lambda a, b, c: a * b + c),
            f"min.{_kind}": (_two, _kind, min),
            f"max.{_kind}": (_two, _kind, max),
            f"mul.hi.{_kind}": (_two, _kind, lambda a, b, w=_width: a * b >> w),
            f"shr.{_kind}": ([_kind, "u32"], _kind, lambda a, n, w=_width: a >> min(n, w)),
        }
        if _width < 64:
            _wide = f"{_kind[0]}{2 * _width}"
            INTEGERS |= {
                f"mul.wide.{_kind}": (_two, _wide, lambda a, b: a * b),
                f"mad.wide.{_kind}": ([*_two, _wide], _wide, lambda a, b, c: a * b + c),
                f"mad.hi.{_kind}": ([*_two, _kind], _kind, lambda a, b, c, w=_width: (a * b >> w) + c),
            }
        if _width > 16:
            _sign = _kind[0] == "s"
            INTEGERS[f"bfe.{_kind}"] = (
                [_kind, "u32", "u32"],
                _kind,
                lambda a, p, n, w=_width, s=_sign: field(a, p % 80, n % 80, w, s),
            )
    _bits = f"b{_width}"
    INTEGERS |= {
        f"neg.s{_width}": ([f"s{_width}"], f"s{_width}", lambda a: -a),
        f"abs.s{_width}": ([f"s{_width}"], f"s{_width}", abs),
        f"and.{_bits}": ([_bits] * 2, _bits, lambda a, b: a & b),
        f"or.{_bits}": ([_bits] * 2, _bits, lambda a, b: a | b),
        f"xor.{_bits}": ([_bits] * 2, _bits, lambda a, b: a ^ b),
        f"not.{_bits}": ([_bits], _bits, lambda a: ~a),
        f"shl.{_bits}": ([_bits, "u32"], _bits, lambda a, n, w=_width: a << min(n, w)),
        f"shr.{_bits}": ([_bits, "u32"], _bits, lambda a, n, w=_width: a >> min(n, w)),
    }
INTEGERS |= {
    "lop3.b32": (["b32"] * 4, "b32", lookup),
    "bfi.b32": (["b32", "b32", "u32", "u32"], "b32", lambda a, b, p, n: inserted(a, b, p % 50, n % 50)),
    "prmt.b32": (["b32"] * 3, "b32", byte_permutation),
    "popc.b32": (["b32"], "b32", int.bit_count),
    "clz.b32": (["b32"], "b32", lambda a: 32 - a.bit_length()),
    "cvta.to.global.u64": (["u64"], "u64", lambda a: a),
    **{
        f"shf.{side}.{mode}.b32": (
            ["b32"] * 3,
            "b32",
            lambda a, b, n, s=side, m=mode: funnel(a, b, n, s == "l", m == "clamp"),
        )
        for side in "lr"
        for mode in ("wrap", "clamp")
    },
    **{
        f"cvt.{to}.{of}": ([of], to, lambda a: a)
        for to in ("u8", "s16", "u16", "s32", "u32", "s64", "u64")
        for of in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
    },
}
# Positions and lengths around the register's width, and shifts likewise: most random ones would be far beyond.
SMALL = {"bfe": (1, 2, 80), "bfi": (2, 3, 50), "shl": (1, 1, 80), "shr": (1, 1, 80), "shf": (2, 2, 70)}


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers(opcode, monkeypatch):
    kinds, to, define = INTEGERS[opcode]
    name = opcode.split(".")[0]
    if name in SMALL:
        first, last, limit = SMALL[name]
        monkeypatch.setitem(
            globals(),
            "draw",
            lambda width, seed, draw=draw: (
                draw(width, seed) % np.uint64(limit) if first <= seed <= last else draw(width, seed)
            ),
        )
    check_integers(opcode, kinds, to, define)


DIVISIONS = [f"{name}.{kind}" for name in ("div", "rem") for kind in ("s16", "u16", "s32", "u32", "s64", "u64")]


@pytest.mark.parametrize("opcode", DIVISIONS)
def test_division_is_towards_zero(opcode):
    name, kind = opcode.split(".")
    width = int(kind[1:])
    a, b = draw(width, 0), draw(width, 1)
    b = np.where(b == 0, np.uint64(3), b)
    if kind[0] == "s":  # the one quotient that does not fit, which PTX leaves open
        b = np.where((a == np.uint64(1 << (width - 1))) & (b == np.uint64((1 << width) - 1)), np.uint64(5), b)
    (got,) = answer(opcode, a, b)
    for x, y, result in zip(*(v.tolist() for v in (a, b, got)), strict=True):
        x, y = typed(x, kind), typed(y, kind)
        quotient = truncated_division(x, y)
        assert typed(result, kind) == (quotient if name == "div" else x - y * quotient)
    assert decode(opcode).divides


PREDICATES = ["and.pred", "or.pred", "xor.pred", "not.pred"]


@pytest.mark.parametrize("opcode", PREDICATES)
def test_predicates(opcode):
    name = opcode.split(".")[0]
    a, b = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    define = {"and": a & b, "or": a | b, "xor": a ^ b, "not": 1 - a}[name]
    (got,) = answer(opcode, a, *(() if name == "not" else (b,)))
    assert got.tolist() == define.tolist()


COMPARISONS = [
    f"setp.{how}.{kind}{width}"
    for how in ("eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs")
    for kind in "sub"
    for width in (16, 32, 64)
]


@pytest.mark.parametrize("opcode", COMPARISONS)
def test_integer_comparison(opcode):
    _, how, kind = opcode.split(".")
    width = int(kind[1:])
    a, b = draw(width, 0), draw(width, 1)
    b[::3] = a[::3]
    define = {
        "eq": int.__eq__,
        "ne": int.__ne__,
        "lt": int.__lt__,
        "le": int.__le__,
        "gt": int.__gt__,
        "ge": int.__ge__,
        "lo": int.__lt__,
        "ls": int.__le__,
        "hi": int.__gt__,
        "hs": int.__ge__,
    }[how]
    (got,) = answer(opcode, a, b)
    expected = [define(typed(x, kind), typed(y, kind)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert got.astype(bool).tolist() == expected


SELECTIONS = [f"selp.{kind}" for kind in ("b16", "s32", "u32", "f32", "b64", "f64")]


@pytest.mark.parametrize("opcode", SELECTIONS)
def test_selection_keeps_all_bits(opcode):
    width = int(opcode[-2:])
    a, b = draw(width, 0), draw(width, 1)
    p = np.arange(len(a)) % 2
    (got,) = answer(opcode, a, b, p)
    assert got.tolist() == np.where(p, a, b).astype(f"u{width // 8}").tolist()


# --- floating point ---------------------------------------------------------------------------------------------------


def product(a, b):
    return math.nan if 0 in (a, b) and math.inf in map(abs, (a, b)) else a * b


def quotient(a, b):
    if b != 0:
        return a / b
    return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)


ARITHMETIC = {
    "add": (2, lambda a, b: a + b, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b, product),
    "fma": (3, lambda a, b, c: a * b + c, lambda a, b, c: product(a, b) + c),
    "div": (2, lambda a, b: a / b if b else None, quotient),
    "neg": (1, lambda a: -a, lambda a: -a),
    "abs": (1, abs, abs),
}


ROUNDED = [
    *(f"{name}{ftz}.f32" for ftz in ("", ".ftz") for name in ("add", "sub", "mul", "fma.rn", "div.rn", "neg", "abs")),
    *(f"{name}.rn.f32" for name in ("add", "sub", "mul")),
    *(f"{name}.f64" for name in ("add", "sub", "mul", "add.rn", "div.rn", "neg", "abs")),
    *(f"{name}.{kind}" for kind in ("bf16", "f16") for name in ("add", "sub.rn", "mul", "neg", "abs")),
]


@pytest.mark.parametrize("opcode", ROUNDED)
def test_arithmetic_is_rounded_once(opcode):
    name, kind = opcode.split(".")[0], opcode.split(".")[-1]
    count, exact, special = ARITHMETIC[name]
    check_floats(opcode, [kind] * count, kind, exact, special, ftz=".ftz" in opcode)


def test_fma_is_rounded_once_where_two_roundings_go_wrong():
    """Sums so near to the middle of two float32 numbers that they are the middle in float64; subnormal ones too."""
    rng = np.random.default_rng(0)
    odd = 2 * rng.integers(1 << 11, 1 << 12, (2, 2000)) + 1
    odd = odd[:, (odd.prod(0) >= 1 << 24) & (odd.prod(0) < 1 << 25)].astype(np.float32)  # products of 25 digits
    near = np.where(np.arange(odd.shape[1]) % 2 == 0, 2.0**-40, -(2.0**-40))
    below = np.float32(1 + 2.0**-23) * np.float32(2.0**-75), np.float32(1 - 2.0**-23) * np.float32(2.0**-75)
    subnormal = rng.integers(1 << 10, 1 << 22, 500) * 2.0**-149
    a, b = (np.concatenate([x, np.full(500, y)]).astype(np.float32) for x, y in zip(odd, below, strict=True))
    c = np.concatenate([near, subnormal]).astype(np.float32)
    (got,) = answer("fma.rn.f32", *(x.view(np.uint32) for x in (a, b, c)))
    twice = np.zeros(len(a), bool)
    for k, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        expected = rounded(exact, "f32")
        assert number(int(got[k]), "f32") == expected
        twice[k] = rounded(Fraction(float(exact)), "f32") != expected
    # An fma by way of float64 would fail here.
    assert twice[:-500].sum() > 100
    assert twice[-500:].sum() > 100


ROOTS = ["sqrt.rn.f32", "sqrt.rn.f64"]


@pytest.mark.parametrize("opcode", ROOTS)
def test_square_root_is_the_nearest(opcode):
    kind = opcode[-3:]
    bits = draw_floats(kind, 0)
    (got,) = answer(opcode, bits)
    digits = FORMATS[kind][0]
    for given, result in zip(bits.tolist(), got.tolist(), strict=True):
        x, y = number(given, kind), number(result, kind)
        if math.isnan(x) or (x < 0):
            assert math.isnan(y)
        elif x in (0.0, math.inf):
            assert same_number(y, x)
        else:
            half = Fraction(math.ldexp(1.0, math.frexp(y)[1] - digits)) / 2
            assert (Fraction(y) - half) ** 2 <= Fraction(x) <= (Fraction(y) + half) ** 2


RECIPROCALS = ["rcp.rn.f32", "rcp.rn.ftz.f32"]


@pytest.mark.parametrize("opcode", RECIPROCALS)
def test_reciprocal(opcode):
    exact, special = (lambda a: 1 / a if a else None), (lambda a: quotient(1.0, a))
    check_floats(opcode, ["f32"], "f32", exact, special, ftz="ftz" in opcode)


SIGNS = ["copysign.f32", "copysign.f64"]


@pytest.mark.parametrize("opcode", SIGNS)
def test_the_first_number_gives_its_sign_to_the_second(opcode):
    kind = opcode[-3:]
    a, b = draw_floats(kind, 0), draw_floats(kind, 1)
    (got,) = answer(opcode, a, b)
    sign = 1 << (WIDTHS[kind] - 1)
    assert got.tolist() == [(x & sign) | (y & (sign - 1)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]


EXTREMES = [f"{name}{nan}.{kind}" for name in ("min", "max") for nan in ("", ".NaN") for kind in ("f32", "bf16", "f16")]


@pytest.mark.parametrize("opcode", EXTREMES)
def test_minimum_and_maximum(opcode):
    name, kind, nan = opcode[:3], opcode.split(".")[-1], ".NaN" in opcode
    a, b = draw_floats(kind, 0), draw_floats(kind, 1)
    (got,) = answer(opcode, a, b)
    for x, y, result in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        x, y, result = (number(bits, kind) for bits in (x, y, result))
        if math.isnan(x) or math.isnan(y):
            other = y if math.isnan(x) else x
            expected = math.nan if nan else other
        else:  # -0 lies below +0
            function = min if name == "min" else max
            expected = function(x, y, key=lambda value: (value, math.copysign(1, value)))
        assert same_number(result, expected), (x, y)


@pytest.mark.parametrize("name", ["min", "max"])
def test_minimum_and_maximum_flush(name):
    subnormal, zero = np.array([1 | 1 << 31, 5]), np.array([3, 0])
    (got,) = answer(f"{name}.ftz.f32", subnormal, zero)
    assert (got & 0x7FFFFFFF).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["min", "max"])
def test_minimum_and_maximum_of_float64(name):
    a, b = (np.array(v).view(np.uint64) for v in ([1.0, math.nan, -math.inf], [2.0, 3.0, 0.0]))
    (got,) = answer(f"{name}.f64", a, b)
    assert got.view(np.float64).tolist() == {"min": [1.0, 3.0, -math.inf], "max": [2.0, 3.0, 0.0]}[name]


ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
FLOAT_COMPARISONS = [
    f"setp.{how}.{kind}"
    for how in (*ORDERED, *(f"{how}u" for how in ORDERED), "num", "nan")
    for kind in ("f32", "f64", "f16", "bf16")
]


@pytest.mark.parametrize("opcode", FLOAT_COMPARISONS)
def test_float_comparison(opcode):
    _, how, kind = opcode.split(".")
    a, b = draw_floats(kind, 0), draw_floats(kind, 1)
    b[::3] = a[::3]
    (got,) = answer(opcode, a, b)
    for x, y, result in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        x, y = number(x, kind), number(y, kind)
        unordered = math.isnan(x) or math.isnan(y)
        if how in ("num", "nan"):
            expected = unordered == (how == "nan")
        elif unordered:
            expected = how.endswith("u")
        else:
            expected = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[how[:2]]
        assert bool(result) == expected, (how, x, y)


def test_comparison_flushes():
    (plain,), (flush,) = (answer(f"setp.eq{ftz}.f32", np.array([1]), np.array([2])) for ftz in ("", ".ftz"))
    assert (plain.tolist(), flush.tolist()) == ([0], [1])


# --- pairs ------------------------------------------------------------------------------------------------------------


def packed(low: np.ndarray, high: np.ndarray, width: int) -> np.ndarray:
    return low | high << np.uint64(width)


PAIRS_OF_FLOAT32 = [f"{name}.f32x2" for name in ("add", "sub", "mul", "fma.rn", "add.rn", "sub.rn", "mul.rn")]


@pytest.mark.parametrize("opcode", PAIRS_OF_FLOAT32)
def test_pairs_of_float32_are_two_float32(opcode):
    count = 3 if opcode.startswith("fma") else 2
    lows, highs = ([draw_floats("f32", seed + start) for seed in range(count)] for start in (0, 10))
    (got,) = answer(opcode, *(packed(x, y, 32) for x, y in zip(lows, highs, strict=True)))
    for shift, given in ((0, lows), (32, highs)):
        (expected,) = answer(opcode.removesuffix("x2"), *given)
        half = (got >> np.uint64(shift)).astype(np.uint32)
        np.testing.assert_array_equal(half.view(np.float32), expected.view(np.float32))


def test_pairs_of_which_one_operand_is_the_same_everywhere():
    form = decode("fma.rn.f32x2")
    a = packed(draw_floats("f32", 0), draw_floats("f32", 1), 32)
    one = np.array([bits_of(1.0, "f32") | bits_of(2.0, "f32") << 32], np.uint64)
    everywhere = np.broadcast_to(one, a.shape)
    with np.errstate(all="ignore"):
        assert (form.function(a, one, one) == form.function(a, everywhere, everywhere)).all()


PAIRS_OF_16_BITS = [
    f"{name}.{kind}x2"
    for name in ("add", "sub", "mul.rn", "min", "max", "min.NaN", "max.NaN", "neg", "abs")
    for kind in ("bf16", "f16")
]


@pytest.mark.parametrize("opcode", PAIRS_OF_16_BITS)
def test_pairs_of_16_bits_are_two_of_16_bits(opcode):
    kind, count = opcode.split(".")[-1].removesuffix("x2"), 1 if opcode[:3] in ("neg", "abs") else 2
    lows, highs = ([draw_floats(kind, seed + start) for seed in range(count)] for start in (0, 10))
    (got,) = answer(opcode, *(packed(x, y, 16) for x, y in zip(lows, highs, strict=True)))
    for shift, given in ((0, lows), (16, highs)):
        (expected,) = answer(opcode.removesuffix("x2"), *given)
        assert ((got >> np.uint32(shift)) & np.uint32(0xFFFF)).tolist() == expected.tolist()


PAIR_COMPARISONS = ["setp.lt.bf16x2", "setp.geu.f16x2"]


@pytest.mark.parametrize("opcode", PAIR_COMPARISONS)
def test_comparison_of_pairs_gives_two_predicates(opcode):
    kind = opcode.split(".")[-1].removesuffix("x2")
    lows, highs = ([draw_floats(kind, seed + start) for seed in range(2)] for start in (0, 10))
    got = answer(opcode, *(packed(x, y, 16) for x, y in zip(lows, highs, strict=True)))
    for predicate, given in zip(got, (lows, highs), strict=True):
        assert predicate.tolist() == answer(opcode.removesuffix("x2"), *given)[0].tolist()


MIXED = [f"{name}.f32.{kind}" for name in ("add", "sub", "add.rn", "fma.rn") for kind in ("bf16", "f16")]


@pytest.mark.parametrize("opcode", MIXED)
def test_mixed_precision_is_rounded_to_float32_once(opcode):
    kind = opcode.split(".")[-1]
    count, exact, special = ARITHMETIC[opcode[:3]]
    check_floats(opcode, [kind] * (count - 1) + ["f32"], "f32", exact, special)


# --- conversion -------------------------------------------------------------------------------------------------------


PAIR_ROUNDINGS = ["cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"]


@pytest.mark.parametrize("opcode", PAIR_ROUNDINGS)
def test_rounding_of_pairs_to_nearest_even(opcode):
    kind = opcode.split(".")[2].removesuffix("x2")
    high, low = draw_floats("f32", 0), draw_floats("f32", 1)
    # The middle of two numbers, and its neighbours.
    cut = 16 if kind == "bf16" else 13
    high[:90] = (high[:90] >> np.uint64(cut) << np.uint64(cut)) + np.uint64(1 << (cut - 1))
    high[30:60] += np.uint64(1)
    high[60:90] -= np.uint64(1)
    (got,) = answer(opcode, high, low)
    for shift, given in ((16, high), (0, low)):  # the first source is the high half
        for bits, result in zip(given.tolist(), (got >> np.uint32(shift)).tolist(), strict=True):
            value, result = number(bits, "f32"), number(result & 0xFFFF, kind)
            expected = value if not math.isfinite(value) or value == 0 else rounded(Fraction(value), kind)
            assert same_number(result, math.copysign(expected, value) if not math.isnan(value) else expected)


def test_rounding_to_bfloat16_is_torchs():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint64)
    floats = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    (got,) = answer("cvt.rn.bf16.f32", bits)
    known = ~floats.isnan()
    assert torch.equal(torch.from_numpy(got.view(np.int16))[known], floats.bfloat16().view(torch.int16)[known])
    assert (got[~known.numpy()] == 0x7FFF).all()
    (pair,) = answer("cvt.rn.bf16x2.f32", bits, bits)
    assert (pair == got.astype(np.uint32) * np.uint32(0x10001)).all()


TRUNCATIONS = ["cvt.rz.bf16.f32", "cvt.rz.bf16x2.f32"]


@pytest.mark.parametrize("opcode", TRUNCATIONS)
def test_truncation_is_not_rounding(opcode):
    bits = draw_floats("f32", 0)
    (got,) = answer(opcode, *[bits] * (2 if "x2" in opcode else 1))
    (nearest,) = answer(opcode.replace("rz", "rn"), *[bits] * (2 if "x2" in opcode else 1))
    assert (got != nearest).sum() > COUNT / 4
    for given, result in zip(bits.tolist(), got.tolist(), strict=True):
        value, result = number(given, "f32"), number(result & 0xFFFF, "bf16")
        expected = value if not math.isfinite(value) else math.copysign(rounded(Fraction(value), "bf16", True), value)
        assert same_number(result, expected)


BETWEEN_FLOATS = [
    *("cvt.rn.f16.f32", "cvt.rn.bf16.f32", "cvt.rn.f32.f64", "cvt.rn.f16.f64"),
    *("cvt.f64.f32", "cvt.f32.f16", "cvt.f64.f16", "cvt.f32.bf16"),
]


@pytest.mark.parametrize("opcode", BETWEEN_FLOATS)
def test_conversion_between_floats(opcode):
    to, of = opcode.split(".")[-2:]
    check_floats(opcode, [of], to, lambda a: a, lambda a: a)


INTEGER_KINDS = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
OF_INTEGERS = [f"cvt.rn.{to}.{of}" for to in ("f16", "f32", "f64") for of in INTEGER_KINDS]


@pytest.mark.parametrize("opcode", OF_INTEGERS)
def test_conversion_of_integers(opcode):
    to, of = opcode.split(".")[-2:]
    bits = draw(int(of[1:]), 0)
    # The middle of two float32 numbers, and one beyond it, which two roundings would get wrong.
    bits[:2] = np.array([(1 << 40) + (1 << 16), (1 << 40) + (1 << 16) + 1], np.uint64) % np.uint64(2 ** int(of[1:]) - 1)
    (got,) = answer(opcode, bits)
    for given, result in zip(bits.tolist(), got.tolist(), strict=True):
        value = typed(given % (1 << int(of[1:])), of)
        assert number(result, to) == rounded(Fraction(value), to)


TO_INTEGERS = [
    f"cvt.{rounding}.{to}.{of}"
    for rounding in ("rni", "rzi", "rmi", "rpi")
    for to in INTEGER_KINDS
    for of in ("f32", "f64")
]


@pytest.mark.parametrize("opcode", TO_INTEGERS)
def test_conversion_to_integers_saturates(opcode):
    _, rounding, to, of = opcode.split(".")
    bits = np.concatenate([draw_floats(of, 0), [bits_of(v, of) for v in (0.5, 1.5, 2.5, -0.5, -2.5, 127.5, 2.0**63)]])
    (got,) = answer(opcode, bits)
    width = int(to[1:])
    least, most = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if to[0] == "s" else (0, (1 << width) - 1)
    integral = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[rounding]
    for given, result in zip(bits.tolist(), got.tolist(), strict=True):
        value = number(int(given), of)
        if math.isnan(value):
            expected = 0
        elif math.isinf(value):
            expected = most if value > 0 else least
        else:
            expected = min(max(integral(Fraction(value)), least), most)
        assert typed(result, to) == expected, value


@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_rounding_to_integral_floats(rounding):
    bits = np.array([bits_of(v, "f32") for v in (0.5, 1.5, -0.5, -1.5, 2.25, -2.25, 1e9, math.inf)])
    (got,) = answer(f"cvt.{rounding}.f32.f32", bits)
    expected = {
        "rni": [0.0, 2.0, 0.0, -2.0, 2.0, -2.0, 1e9, math.inf],
        "rzi": [0.0, 1.0, 0.0, -1.0, 2.0, -2.0, 1e9, math.inf],
        "rmi": [0.0, 1.0, -1.0, -2.0, 2.0, -3.0, 1e9, math.inf],
        "rpi": [1.0, 2.0, 0.0, -1.0, 3.0, -2.0, 1e9, math.inf],
    }[rounding]
    assert got.view(np.float32).tolist() == expected


# --- approximate functions --------------------------------------------------------------------------------------------


def checked(function):
    def run(x):
        try:
            return function(x)
        except (ValueError, ZeroDivisionError, OverflowError):
            return None

    return run


FUNCTIONS = {
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1 / math.sqrt(x),
    "rcp": lambda x: 1 / x,
    "ex2": lambda x: 2.0**x,
    "lg2": math.log2,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
}


APPROXIMATE = [f"{name}.approx{ftz}.f32" for name in FUNCTIONS for ftz in ("", ".ftz")]


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximate_functions_are_the_nearest_float32_by_default(opcode):
    name, ftz = opcode.split(".")[0], "ftz" in opcode
    bits = draw_floats("f32", 0)
    (got,) = answer(opcode, bits)
    form = decode(opcode)
    assert (form.granted, form.flushes) == (name, ftz)
    compared = 0
    for given, result in zip(bits.tolist(), got.tolist(), strict=True):
        x, y = number(given, "f32"), number(result, "f32")
        x = flushed(x) if ftz else x
        exact = checked(FUNCTIONS[name])(x)
        if exact is not None and math.isfinite(x) and 2.0**-126 < abs(exact) < 2.0**127:
            # Half a unit in the last place, and a little for Python's own functions.
            assert abs(y - exact) <= 0.5001 * 2.0 ** (math.frexp(exact)[1] - 24)
            compared += 1
    assert compared > 100


APPROXIMATE_DIVISIONS = ["div.full.f32", "div.approx.ftz.f32", "div.full.ftz.f32"]


@pytest.mark.parametrize("opcode", APPROXIMATE_DIVISIONS)
def test_approximate_division_is_the_quotient_by_default(opcode):
    a, b = draw_floats("f32", 0), draw_floats("f32", 1)
    (got,), (expected,) = answer(opcode, a, b), answer(f"div.rn{'.ftz' if 'ftz' in opcode else ''}.f32", a, b)
    got, expected = got.view(np.float32), expected.view(np.float32)
    if "ftz" in opcode:
        got = arithmetic.flush(got)
    np.testing.assert_array_equal(got, expected)


# --- completeness -----------------------------------------------------------------------------------------------------


PAIRS_OF_INTEGERS = ["add.s16x2", "add.u16x2"]


@pytest.mark.parametrize("opcode", PAIRS_OF_INTEGERS)
def test_pairs_of_integers_do_not_touch_each_other(opcode):
    a, b = draw(32, 0), draw(32, 1)
    (got,) = answer(opcode, a, b)
    for x, y, both in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        assert both == ((x + y) & 0xFFFF) | ((((x >> 16) + (y >> 16)) & 0xFFFF) << 16)


def test_every_form_is_tested():
    lists = (INTEGERS, DIVISIONS, PREDICATES, COMPARISONS, SELECTIONS, ROUNDED, ROOTS, RECIPROCALS, SIGNS)
    lists += (
        EXTREMES,
        FLOAT_COMPARISONS,
        PAIRS_OF_FLOAT32,
        PAIRS_OF_16_BITS,
        PAIR_COMPARISONS,
        MIXED,
        PAIR_ROUNDINGS,
        TRUNCATIONS,
    )
    lists += (PAIRS_OF_INTEGERS, BETWEEN_FLOATS, OF_INTEGERS, TO_INTEGERS, APPROXIMATE, APPROXIMATE_DIVISIONS)
    tested = [opcode for opcodes in lists for opcode in opcodes]
    missing = [pattern.pattern for pattern, _ in FORMS if not any(pattern.fullmatch(opcode) for opcode in tested)]
    assert not missing


UNKNOWN = [
    *("fma.rz.f32", "add.sat.f32", "mul.rm.f32", "lg2.f32", "setp.lt.and.s32", "vote.sync.ballot.b32"),
    *("cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.relu.bf16x2.f32", "cvt.rna.tf32.f32", "atom.global.add.u32"),
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16",
]


@pytest.mark.parametrize("opcode", UNKNOWN)
def test_unknown_forms_are_named(opcode):
    with pytest.raises(UnknownInstruction, match=re.escape(opcode)):
        decode(opcode)
