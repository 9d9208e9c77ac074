"""Distributions of the noise level: constant, gamma and uniform, with a text form."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from denim.kernels import Stream, noise_words

__all__ = ["MAX_SIGMA", "Sigma", "is_level", "warn_of_unit_sigma"]

# 40 times the range of the pixels: what lies above is a mistake, and low precision would overflow.
MAX_SIGMA = 1e4

_FORMS = "a number (70), gamma:CONCENTRATION,SCALE (gamma:25,3) or uniform:LOW,HIGH (uniform:0,30)"


def is_level(level: float) -> bool:
    """Whether a number can be meant as a noise level in 0-255 pixel levels: from 0 to `MAX_SIGMA`."""
    return 0 <= level <= MAX_SIGMA


def warn_of_unit_sigma(level: float) -> None:
    """Warn of a noise level between 0 and 1: it may have been meant in [0, 1] units.

    Args:
        level: in 0-255 pixel levels.
    """
    if 0 < level < 1:
        warnings.warn(
            f"sigma is in 0-255 pixel levels, and {level:g} is less than one level; for {level:g} of images in [0, 1] "
            f"give {255 * level:g}",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Sigma:
    """A distribution of noise levels, one level per image, in 0-255 pixel levels.

    Text forms: `70`, `gamma:25,3` (concentration, scale: mean 75, standard deviation 15), `uniform:0,30`.
    """

    kind: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str | float) -> Sigma:
        """Read a text form.

        Raises:
            ValueError: not a text form, negative, not finite or above `MAX_SIGMA`, or an empty range.

        Warns:
            UserWarning: the level, the mean of the gamma distribution or the upper end lies between 0 and 1.
        """
        kind, _, rest = str(text).partition(":") if ":" in str(text) else ("constant", ":", str(text))
        try:
            values = tuple(float(value) for value in rest.split(","))
        except ValueError:
            raise ValueError(f"sigma {text!r} is not {_FORMS}") from None
        expected = {"constant": 1, "gamma": 2, "uniform": 2}.get(kind)
        if expected != len(values):
            raise ValueError(f"sigma {text!r} is not {_FORMS}")
        if not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(f"sigma {text!r}: values must be finite and not negative (0-255 pixel levels)")
        if kind == "gamma" and 0 in values:
            raise ValueError(f"sigma {text!r}: concentration and scale must be positive")
        if kind == "uniform" and values[0] > values[1]:
            raise ValueError(f"sigma {text!r}: the lower end is above the upper end")
        largest = math.prod(values) if kind == "gamma" else values[-1]
        if not is_level(largest):
            what = "the mean, concentration times scale, must be" if kind == "gamma" else "levels must be"
            raise ValueError(f"sigma {text!r}: {what} at most {MAX_SIGMA:g} (0-255 pixel levels)")
        warn_of_unit_sigma(largest)
        return cls(kind, values)

    def __str__(self) -> str:
        numbers = ",".join(repr(value).removesuffix(".0") for value in self.values)
        return numbers if self.kind == "constant" else f"{self.kind}:{numbers}"

    def sample(self, seeds: Tensor) -> Tensor:
        """One level per seed, by inversion of the distribution function: a pure function of the seed.

        Args:
            seeds: int64 (B,), on the CPU: the inverse gamma distribution is scipy's. Move the result to the device.

        Returns:
            float32 (B,), in 0-255 pixel levels.
        """
        if self.kind == "constant":
            return torch.full(seeds.shape, self.values[0], dtype=torch.float32)
        words = noise_words(seeds, 1, Stream.SIGMA).squeeze(-1).numpy()
        uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
        if self.kind == "uniform":
            low, high = self.values
            levels = low + (high - low) * uniform
        else:
            from scipy import special  # as slow to import as the models, and only this distribution needs it

            concentration, scale = self.values
            levels = special.gammaincinv(concentration, uniform) * scale
        return torch.from_numpy(np.asarray(levels, dtype=np.float32))
