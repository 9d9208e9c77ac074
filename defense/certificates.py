"""What can be certified, with which settings, and what comes out: certificates of images at noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from denim.defense.de3 import De3
from denim.defense.probe import declares_random
from denim.defense.scores import Interval, interval_bounds
from denim.defense.sequential import Estimation
from denim.kernels.seeds import check_seed
from denim.nim.precision import check_precision
from denim.nim.sigma import MAX_SIGMA, is_level, warn_of_unit_sigma

__all__ = ["Certification", "CertificationSettings", "LevelCertificates", "check_certifiable"]

Array = npt.NDArray[Any]
# Draws of the selection are numbered from here on, those of the estimation from 0 on.
SELECTION = 2**31


@dataclass(frozen=True)
class CertificationSettings:
    """Settings of a certification.

    Attributes:
        sigmas: noise levels in 0-255 pixel levels, in place of the defense's own.
        draws: N, at most, for the estimate of the top class's probability.
        selection_draws: n0, which choose the top class.
        alpha: chance that a certificate is false.
        radii: L2 radii in [0, 1] units (those of the literature). An estimation stops when each is certified, or within
            reach no more (see `Estimation`).
        tolerance: an estimation stops when its radius, in [0, 1] units, would grow by at most this. Without radii and
            tolerance, every estimate has all N draws.
        seed: of the certification.
        max_batch: images that go through the networks in one pass; bounds memory.
        precision: of the networks: fp32, tf32, bf16 or auto (see `resolve_precision`).
        compile: compile each transformer block of Denim's models with torch.compile; None does so on CUDA. Certificates
            do not say whether they were: logits agree to rounding.
    """

    sigmas: tuple[float, ...]
    draws: int = 10_000
    selection_draws: int = 100
    alpha: float = 0.001
    radii: tuple[float, ...] = ()
    tolerance: float | None = None
    seed: int = 0
    max_batch: int = 256
    precision: str = "fp32"
    compile: bool | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_seed(self.seed)
        if not self.sigmas or not all(is_level(sigma) and sigma > 0 for sigma in self.sigmas):
            raise ValueError(
                f"sigmas must be noise levels above 0 and at most {MAX_SIGMA:g}, in 0-255 pixel levels, got "
                f"{self.sigmas}: without noise nothing is smoothed, and nothing can be certified"
            )
        if len(set(self.sigmas)) < len(self.sigmas):
            raise ValueError(f"sigmas must differ, got {self.sigmas}")
        for sigma in self.sigmas:
            warn_of_unit_sigma(sigma)
        for name in ("draws", "selection_draws"):
            if not 1 <= getattr(self, name) < SELECTION:
                raise ValueError(f"{name} must be from 1 to 2^31 - 1, got {getattr(self, name)}")
        if self.max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {self.max_batch}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must be between 0 and 0.5, the chance of a false certificate, got {self.alpha}")
        if not all(0 <= radius < np.inf for radius in self.radii):
            raise ValueError(f"radii must be finite L2 distances in [0, 1] units, 0 or more, got {self.radii}")
        if self.tolerance is not None and not 0 <= self.tolerance < np.inf:
            raise ValueError(f"tolerance must be a finite radius in [0, 1] units, 0 or more, got {self.tolerance}")
        if not self.largest_radius(self.sigmas[0]):
            raise ValueError(f"{self.draws} draws can certify nothing at alpha {self.alpha:g}: take 100 or more")
        # One form for one meaning: certificates are kept under a digest of it.
        object.__setattr__(self, "sigmas", tuple(map(float, self.sigmas)))
        object.__setattr__(self, "radii", tuple(sorted(set(map(float, self.radii)))))

    @property
    def only_radii(self) -> bool:
        """Whether estimations stop where the radii are decided: an image's own radius may then be larger than found."""
        return bool(self.radii) and self.tolerance is None

    @property
    def finds_abstentions(self) -> bool:
        """Whether an image without a certificate is known to have none, and was not given up at a larger radius."""
        return not self.only_radii or self.radii[0] == 0

    def estimation(self, sigma: float) -> Estimation:
        """The estimation at a noise level in 0-255 pixel levels, whose radii are in units of that level."""
        scale = 255 / sigma
        tolerance = None if self.tolerance is None else self.tolerance * scale
        return Estimation(self.draws, self.alpha, tuple(radius * scale for radius in self.radii), tolerance)

    def largest_radius(self, sigma: float) -> float:
        """The largest radius, in [0, 1] units, that these draws can certify at a noise level in 0-255 pixel levels."""
        return self.estimation(sigma).largest_radius * sigma / 255


@dataclass(frozen=True)
class LevelCertificates:
    """Certificates of N images at one noise level, in the order of their ids.

    Attributes:
        sigma: noise level in 0-255 pixel levels.
        ids: int64 (N,), sample ids.
        labels: int64 (N,).
        predictions: int64 (N,), classes that the selection has chosen.
        successes: int64 (N,), draws of the estimation that gave them.
        bounds: float64 (N,), lower bounds of the predictions' probabilities.
        radii: float64 (N,), certified L2 radii in [0, 1] units; 0 is an abstention.
        draws: int64 (N,), of the estimations; those of the selection are not counted.
        largest_radius: that the draws can certify, in [0, 1] units.
    """

    sigma: float
    ids: Array
    labels: Array
    predictions: Array
    successes: Array
    bounds: Array
    radii: Array
    draws: Array
    largest_radius: float

    @property
    def abstained(self) -> Interval:
        """Share of images without a certificate of any radius, see `CertificationSettings.finds_abstentions`."""
        return _share(self.radii == 0)

    @property
    def average_radius(self) -> Interval:
        """Average certified radius (ACR, Zhai et al. 2020), in [0, 1] units: wrong and abstaining images count 0."""
        right = np.where(self.predictions == self.labels, self.radii, 0.0)
        return _mean(right, self.largest_radius)

    def certified(self, radius: float) -> Interval:
        """Share of images whose certified radius is at least this one, in [0, 1] units, for the right class."""
        return _share((self.predictions == self.labels) & (self.radii > 0) & (self.radii >= radius))


@dataclass(frozen=True)
class Certification:
    """What `certify` returns.

    Attributes:
        settings: with the precision that was used.
        levels: certificates, by noise level in the order of the settings.
        case: what the classifier sees, see `De3.case`.
        classes: names of the classes, may be empty.
        warnings: of this certification.
        versions: of packages.
    """

    settings: CertificationSettings
    levels: tuple[LevelCertificates, ...]
    case: str
    classes: tuple[str, ...]
    warnings: tuple[str, ...]
    versions: dict[str, str]


def _mean(values: Array, highest: float) -> Interval:
    low, high = interval_bounds(values.sum(), np.square(values).sum(), len(values), 0, highest)
    return Interval(float(values.mean()), float(low), float(high))


def _share(values: Array) -> Interval:
    return _mean(values.astype(np.float64), 1.0)


def check_certifiable(defense: Any) -> None:
    """Check that a defense is a function of the noisy image alone, whose noise is drawn afresh.

    Raises:
        TypeError: it is no `De3`.
        ValueError: it is one of another kind; the message says which, and what to do.
    """
    if not isinstance(defense, De3):
        raise TypeError(
            f"certify takes a De3, got {type(defense).__name__}: De3(None, model, sigma) smooths any module from "
            "pixels in [0, 1] to logits with noise"
        )
    if defense.is_frozen:
        raise ValueError(
            "a frozen defense cannot be certified: its noise is fixed, and a certificate is about fresh noise; give "
            "the defense that it was made of"
        )
    if defense.sigma is None:
        raise ValueError("this defense is off, so nothing is smoothed: give it a sigma")
    if defense.draws != 1:
        raise ValueError(
            f"a defense of {defense.draws} draws per call cannot be certified: a change of the image enters every "
            "draw, so the radius of Cohen et al. does not hold for their aggregate; take draws=1: certify takes the "
            "vote over all draws"
        )
    if defense.degrade == "mask":
        raise ValueError(
            'degrade="mask" adds no noise and passes visible patches on as they are: nothing is smoothed; take '
            'degrade="noise" or "both"'
        )
    if defense.denoiser is not None and defense.denoiser.config.target == "norm" and defense.statistics == "input":
        raise ValueError(
            'a denoiser of the normalised target with statistics="input" cannot be certified: mean and variance of '
            "every patch come from the image without noise, so the classifier sees more than the noisy image, and the "
            'certificate would be false; take statistics="noisy", or a denoiser of the raw target'
        )
    for name, part in defense.named_modules():
        if name and declares_random(part):  # what is not known is found out by `certify`, on images
            raise ValueError(
                f"{name} draws by itself ({type(part).__name__}), from generators that certify does not own: a "
                "certificate could not be repeated; take a classifier that is a function of its image"
            )
