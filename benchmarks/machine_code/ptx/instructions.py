"""The instruction set: what each instruction form computes from its source operands.

`decode` turns an opcode into a `Form`. A form is known if one of the patterns in `integer`, `floating` and `conversion`
matches all of it, so an unknown modifier is an unknown instruction, never an ignored one. Loads, stores, shuffles and
moves are in `steps`, control flow is in `machine`.
"""

from __future__ import annotations

import functools

# Imported for the forms that they register.
from denim.benchmarks.machine_code.ptx import conversion, floating, integer  # noqa: F401
from denim.benchmarks.machine_code.ptx.forms import FORMS, Form
from denim.benchmarks.machine_code.ptx.traps import UnknownInstruction

__all__ = ["decode"]


@functools.cache
def decode(opcode: str) -> Form:
    """The form that an opcode names.

    Raises:
        UnknownInstruction: none that is implemented here.
    """
    for pattern, build in FORMS:
        if match := pattern.fullmatch(opcode):
            return build(*match.groups())
    raise UnknownInstruction(f"instruction {opcode} is not implemented")
