"""What an instruction form is, and the list of all that are known.

Source: "PTX ISA", "Instruction Set".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["F32", "FORMS", "INTEGER", "PREDICATE", "TYPES", "U16", "U32", "U64", "Array", "Form", "form", "same"]

Array = NDArray[Any]

U16, U32, U64 = np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.uint64)
F32, PREDICATE = np.dtype(np.float32), np.dtype(np.bool_)
# bfloat16, and pairs of 16 bits, are kept as bits.
TYPES: dict[str, np.dtype[Any]] = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "bf16": U16,
    "pred": PREDICATE,
}


@dataclass(frozen=True)
class Form:
    """One instruction form."""

    sources: tuple[np.dtype[Any], ...]
    """How the source operands are read."""
    results: tuple[np.dtype[Any], ...]
    """Of the destination; two where there are two predicates."""
    function: Callable[..., Any]
    """Arrays of those types to an array, or as many as there are results."""
    granted: str = ""
    """Name of an approximate function in `arithmetic.GRANTED`, whose result may be off by as much."""
    flushes: bool = False
    """Of an approximate function: subnormal results are zero."""
    divides: bool = False
    """The second source must not be zero."""


FORMS: list[tuple[re.Pattern[str], Callable[..., Form]]] = []
# In patterns: the type of an integer operation.
INTEGER = r"([sub](?:16|32|64))"


def form(pattern: str) -> Callable[[Callable[..., Form]], Callable[..., Form]]:
    """Registers a function that makes forms of opcodes: it gets the groups of the pattern, which matches all of one."""

    def register(build: Callable[..., Form]) -> Callable[..., Form]:
        FORMS.append((re.compile(pattern), build))
        return build

    return register


def same(type_name: str, count: int, function: Callable[..., Any], **more: Any) -> Form:
    """A form whose sources and result have one type."""
    dtype = TYPES[type_name]
    return Form((dtype,) * count, (dtype,), function, **more)
