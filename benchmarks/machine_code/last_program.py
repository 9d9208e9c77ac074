"""Launches on tensors too large for memory: their last program alone, on addresses without memory behind them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["LastProgram", "reserved"]

_NO_RESERVE = 0x4000  # MAP_NORESERVE on Linux, which the module `mmap` names from Python 3.13 on


def reserved(shape: Sequence[int], *, dtype: torch.dtype, device: object = "cpu") -> Tensor:
    """`torch.empty` that reserves addresses only; the system provides memory page by page at the first use."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags), dtype=dtype).view(*shape)


class LastProgram:
    """A kernel in Triton's interpreter that runs only the last program of its grid.

    (`run_on_cpu` takes the programs to run as an argument.)
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            from triton.runtime.interpreter import interpreter_builder

            place, size = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
            interpreter_builder.set_grid_dim = lambda *_: size(*grid, 1, 1)
            interpreter_builder.set_grid_idx = lambda *_: place(grid[0] - 1, 0, 0)
            try:
                self.function[(1,)](*args, **kwargs)
            finally:
                interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim = place, size

        return run
