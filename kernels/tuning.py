"""Which configuration a Triton kernel runs in: the first of a short list, or the one measured to be fastest.

Only kernels whose result cannot depend on the configuration have a list: `noise_patchify` and its backward,
and `attack_step`. The sums of `patch_loss` and the statistics of `decode_patches` group their terms by the
configuration, so those kernels run in the same one everywhere, and two runs of a job agree bit for bit.

`DENIM_AUTOTUNE=1`, the default, measures at the first call of each kernel, device and size; `DENIM_AUTOTUNE=0` takes
the first configuration, which is the one that the ahead-of-time report favours, and never measures.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

__all__ = ["autotune", "run_tuned"]

C = TypeVar("C")

_CHOSEN: dict[Hashable, int] = {}


@functools.cache
def autotune() -> bool:
    """Whether configurations are measured. Looked up once per process, at the first launch.

    Raises:
        ValueError: DENIM_AUTOTUNE is neither 0 nor 1.
    """
    chosen = os.environ.get("DENIM_AUTOTUNE", "1")
    if chosen not in ("0", "1"):
        raise ValueError(f"DENIM_AUTOTUNE is {chosen!r}; expected 1 (measure) or 0 (take the first configuration)")
    return chosen == "1"


def _milliseconds(run: Callable[[], None]) -> float:
    """Median time on the current device. Every repetition finds its cache cold, as in a training step."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=5, rep=20, return_mode="median"))


def run_tuned(
    key: tuple[Hashable, ...],
    elements: int,
    configurations: Sequence[C],
    launch: Callable[[C], None],
    device: torch.device,
    *,
    milliseconds: Callable[[Callable[[], None]], float] = _milliseconds,
) -> None:
    """Launch a kernel once, in the chosen configuration; the first time, choose it.

    Measuring launches every configuration many times and waits for the device, so a call whose stream is being
    captured into a CUDA graph does not measure: warm up before the capture, as graphs need anyway. CPU tensors
    (Triton's interpreter, builds ahead of time) take the first configuration.

    Args:
        key: kernel and all that its speed depends on but the size. Calls that share it share a choice.
        elements: size of the work. Calls of the same power of two share a choice, so that a last, smaller batch does
            not measure anew.
        configurations: the first is the default. The result must not depend on which one runs, nor on how often.
        launch: takes a configuration and launches the kernel on the current device.
        device: of the tensors.
        milliseconds: times a function.

    Raises:
        ValueError: DENIM_AUTOTUNE is neither 0 nor 1.
    """
    best = 0
    if autotune() and device.type == "cuda" and len(configurations) > 1:
        place = (*key, device, elements.bit_length())
        if place not in _CHOSEN and not torch.cuda.is_current_stream_capturing():
            times = [milliseconds(functools.partial(launch, configuration)) for configuration in configurations]
            _CHOSEN[place] = times.index(min(times))
        best = _CHOSEN.get(place, 0)
    launch(configurations[best])
