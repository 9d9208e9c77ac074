"""Seeds of noise: every seed in Denim is derived by the hash of this file."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from denim.kernels.dispatch import register
from denim.kernels.noise import FEW, WORD, Array, Stream, check_seeds, philox, split

__all__ = ["Domain", "check_seed", "derive_seeds", "draw_seeds"]


class Domain(IntEnum):
    """Stage of an experiment that a seed is derived for. Seeds of different domains give different draws."""

    TRAINING = 0
    DEFENSE = 1
    ATTACK = 2
    SELECTION = 3
    CONFIRMATION = 4
    SCORE = 5
    CERTIFY = 6
    FROZEN = 7
    COPY = 8
    AUGMENT = 9
    FINETUNING = 10
    SUBSET = 11
    HELD_OUT = 12
    VALIDATION = 13


def _reference(
    samples: Tensor,
    domain: int,
    run_seed: int,
    step: int,
    draw: int,
    run_seeds: Tensor | None,
    steps: Tensor | None,
    draws: Tensor | None,
) -> Tensor:
    """Reference in torch or NumPy, with the same bits; also the CPU kernel.

    A tensor takes the place of the number before it.
    """
    # torch.full runs on the device. A copy from the host would synchronise, and CUDA graphs cannot capture it.
    parts = [samples] + [
        torch.full((), number, dtype=torch.int64, device=samples.device) if values is None else values
        for number, values in ((run_seed, run_seeds), (step, steps), (draw, draws))
    ]
    shape = torch.broadcast_shapes(*(part.shape for part in parts))
    if samples.device.type == "cpu" and shape.numel() <= FEW:
        # Of one dimension at least: NumPy warns where a single number overflows.
        import numpy as np

        seeds = torch.from_numpy(_hash(*(np.atleast_1d(part.numpy()) for part in parts), domain=domain))
    else:
        seeds = _hash(*parts, domain=domain)
    return seeds.reshape(shape).contiguous()


def _hash(samples: Array, run_seeds: Array, steps: Array, draws: Array, *, domain: int) -> Array:
    """Seeds int64, of tensors or arrays that broadcast."""
    low, high = split(samples)
    stream = (low & 0) + int(Stream.SEED)
    k0, k1, _, _ = philox((low, high, stream, (low & 0) + domain), split(run_seeds))
    step_low, step_high = split(steps)
    first, second, _, _ = philox((step_low, step_high, stream, draws & WORD), (k0, k1))
    return first | (second << 32)


def _fake(
    samples: Tensor,
    domain: int,
    run_seed: int,
    step: int,
    draw: int,
    run_seeds: Tensor | None,
    steps: Tensor | None,
    draws: Tensor | None,
) -> Tensor:
    shapes = [values.shape for values in (samples, run_seeds, steps, draws) if values is not None]
    return samples.new_empty(torch.broadcast_shapes(*shapes))


_derive_seeds = register("derive_seeds", _reference, _fake, triton="seeds_triton")


def check_seed(seed: int, name: str = "seed") -> None:
    """Check that a number fits into int64.

    Raises:
        ValueError: it does not.
    """
    if not -(2**63) <= seed <= 2**63 - 1:
        raise ValueError(f"{name} must be an int64, from -2^63 to 2^63 - 1, got {seed}")


def derive_seeds(
    run_seed: int | Tensor, domain: Domain, samples: Tensor, step: int | Tensor = 0, draw: int | Tensor = 0
) -> Tensor:
    """Seeds for samples, computed on their device: one kernel on a GPU.

    Two chained Philox calls: k = philox(counter=(sample low, sample high, SEED, domain), key=run seed), then the seed
    is words 0 and 1 of philox(counter=(step low, step high, SEED, draw), key=(k0, k1)).

    Args:
        run_seed: the seed of the run, int or int64 tensor that broadcasts with samples.
        domain: stage of the experiment.
        samples: int64 sample ids, any shape.
        step: epoch or step, int or int64 tensor that broadcasts with samples.
        draw: number of the draw, below 2^32, int or int64 tensor that broadcasts with samples.

    Returns:
        int64 tensor of the broadcast shape, contiguous.

    Raises:
        TypeError: a tensor is not int64.
        ValueError: tensors are on different devices (scalars on the CPU are copied), or a number is no int64.
    """
    check_seeds(samples, "samples")
    numbers: list[int] = []
    tensors: list[Tensor | None] = []
    for name, value in (("run_seed", run_seed), ("step", step), ("draw", draw)):
        if not isinstance(value, Tensor):
            check_seed(value, name)
            numbers.append(value)
            tensors.append(None)
            continue
        check_seeds(value, name)
        if value.device != samples.device and value.dim():
            raise ValueError(f"{name} is on {value.device} and samples are on {samples.device}")
        numbers.append(0)
        tensors.append(value.to(samples.device))
    seeds: Tensor = _derive_seeds(samples, int(domain), *numbers, *tensors)
    return seeds


def draw_seeds(run_seed: int | Tensor, domain: Domain, samples: Tensor, draws: int, step: int | Tensor = 0) -> Tensor:
    """Seeds of several draws: `derive_seeds` with draw = 0 .. draws-1 in a new first dimension.

    Args:
        run_seed: the seed of the run, int or int64 tensor.
        domain: stage of the experiment.
        samples: int64 sample ids (B,).
        draws: number of draws.
        step: epoch or step, int or int64 tensor.

    Returns:
        int64 tensor (draws, B).

    Raises:
        TypeError: a tensor is not int64.
    """
    draw = torch.arange(draws, dtype=torch.int64, device=samples.device)[:, None]
    return derive_seeds(run_seed, domain, samples[None, :], step, draw)
