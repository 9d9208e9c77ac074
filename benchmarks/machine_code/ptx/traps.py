"""What stops the machine: accesses and orders of execution that a GPU would not report, or would report only later."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = [
    "BarrierNotReached",
    "DivisionByZero",
    "Misaligned",
    "OutOfBounds",
    "PartialWarp",
    "Race",
    "StoredTwice",
    "Trap",
    "Undefined",
    "UnknownInstruction",
]


class Trap(RuntimeError):  # noqa: N818 (the word for it is trap)
    """Execution stopped. The message names the kernel, its source line, the instruction, and the first thread.

    Args:
        message: what happened.
        lanes: positions, among the lanes that executed the instruction, of those at fault.
    """

    def __init__(self, message: str, lanes: Sequence[int] | np.ndarray = ()) -> None:
        super().__init__(message)
        self.lanes = lanes


class OutOfBounds(Trap):
    """An address outside of every tensor of the launch, or outside of the program's shared memory."""


class Misaligned(Trap):
    """An address that is not a multiple of the bytes that the access moves."""


class StoredTwice(Trap):
    """Two threads store to one byte of global memory: the order, and so the result, is not defined."""


class Race(Trap):
    """Two threads access one byte, one of them writes it, and no barrier stands between them."""


class PartialWarp(Trap):
    """An instruction for all lanes of a warp (a shuffle, a barrier of the warp) that some of them do not execute."""


class BarrierNotReached(Trap):
    """Some threads of a program wait at a barrier, and others have returned."""


class Undefined(Trap):
    """A thread acts on a value (stores it, branches, takes it as an address) that it has not written, or has computed
    from one that it has not written."""


class DivisionByZero(Trap):
    """An integer division by zero, whose result PTX does not define."""


class UnknownInstruction(Trap):
    """An instruction form, an operand or a directive that this machine does not implement."""
