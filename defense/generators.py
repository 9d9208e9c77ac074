"""The global generators of torch, NumPy and Python, from which foreign code draws: set for a while, and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["keyed_generators"]


@contextlib.contextmanager
def keyed_generators(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Inside, the global generators of torch, NumPy and Python start from a seed; after, they are as before.

    Args:
        seed: int64; None leaves them as they are until they are drawn from.
        device: whose generator of torch is meant beside that of the CPU; None means those of all CUDA devices.
    """
    if device is None:
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        devices = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # what a model may draw from
    try:
        with torch.random.fork_rng(devices):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
                for one in devices:
                    with torch.cuda.device(one):
                        torch.cuda.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
