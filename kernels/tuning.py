"""Chooses the launch configuration of a Triton kernel: the first of a short list, or the one measured to be fastest.

Only kernels whose result does not depend on the configuration have a list: `noise_patchify`, its backward pass and
`attack_step`. In `patch_loss` and `decode_patches` the configuration decides in which order terms are added, so these
kernels have one configuration, and two runs of a job agree bit for bit.

`DENIM_AUTOTUNE=1` (default) measures at the first call of each kernel, device and size. `DENIM_AUTOTUNE=0` never
measures and takes the first configuration, which is also the one that the budgets of the machine code are about.
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
    """Whether configurations are measured. The environment is read once per process, at the first launch.

    Raises:
        ValueError: DENIM_AUTOTUNE is neither 0 nor 1.
    """
    chosen = os.environ.get("DENIM_AUTOTUNE", "1")
    if chosen not in ("0", "1"):
        raise ValueError(f"DENIM_AUTOTUNE is {chosen!r}; expected 1 (measure) or 0 (take the first configuration)")
    return chosen == "1"


def _milliseconds(run: Callable[[], None]) -> float:
    """Median time on the current device. The L2 cache is cleared before each repetition, as it would be in training."""
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
    """Launch a kernel once, in its chosen configuration; choose the configuration at the first call.

    Choosing launches every configuration many times and waits for the device. A call whose stream is being captured
    into a CUDA graph therefore does not choose, and runs the first configuration unless a warm-up call has chosen
    before. CPU and meta tensors (Triton's interpreter, ahead-of-time builds) take the first configuration.

    Args:
        key: the kernel and everything that its speed depends on, except the size. Calls with equal keys use one choice.
        elements: size of the work. Calls between the same two powers of two use one choice, so most smaller last
            batches do not measure again.
        configurations: the first is the default. The result must not depend on which one runs, or on how often.
        launch: takes a configuration and launches the kernel on the current device.
        device: of the tensors.
        milliseconds: measures the time of a function.

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
