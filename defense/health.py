"""Checks that tell a failed attack from a robust defense, on a few images.

An attack that fails and a defense that holds give the same number. Each check attacks in a way that a sound white box
attack must not lose to, or looks at what an attack stands on. See docs/method.md, "Health checks".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from denim.defense.attacks import Attack
from denim.defense.de3 import De3
from denim.defense.targets import Target
from denim.kernels import Domain

__all__ = ["Check", "check_health"]

# A difference of shares counts if it is larger than this and than twice its standard error: below, it is a matter of
# which few images were taken.
LEAST = 0.04
QUERIES = 300


@dataclass(frozen=True)
class Check:
    """What a check has found.

    Attributes:
        name: of the paragraph in docs/method.md, "Health checks".
        passed: whether nothing is wrong.
        value: the number that it has looked at.
        text: what that number is, what was expected, and what to do.
    """

    name: str
    passed: bool
    value: float
    text: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'WARN'}  {self.name}: {self.text}"


def check_health(
    target: Target,
    pixels: Tensor,
    labels: Tensor,
    ids: Tensor,
    attack: Attack,
    *,
    seed: int = 0,
    draws: int = 10,
    max_batch: int = 256,
) -> list[Check]:
    """Check what a white box attack on a target is worth.

    Attacks are made on the images that the clean target gets right in most draws; accuracies are over those.

    Args:
        target: what is attacked.
        pixels: (B, C, H, W) in [0, 1]; 50 to 100 images are enough.
        labels: int64 (B,).
        ids: int64 (B,), sample ids.
        attack: the attack that a claim of robustness rests on, white box; its radius, norm, steps and draws are taken.
        seed: of everything random.
        draws: fresh draws by which accuracies are compared.
        max_batch: images in a pass, draws counted.

    Returns:
        The checks that apply to the target, those without attacks first.

    Raises:
        ValueError: no images, a gray box attack, or an attack that cannot be made, as where the target has no gradient.
    """
    if not len(ids):
        raise ValueError("health checks need images, and got none")
    if attack.gray:
        raise ValueError(f"health checks are about white box attacks, and {attack} is a gray box")
    run = _Checks(target, pixels, labels, ids, attack, seed, draws, max_batch)
    return list(run.all_checks())


class _Checks:
    def __init__(
        self,
        target: Target,
        pixels: Tensor,
        labels: Tensor,
        ids: Tensor,
        attack: Attack,
        seed: int,
        draws: int,
        max_batch: int,
    ) -> None:
        self.target, self.attack, self.seed, self.max_batch = target, attack, seed, max_batch
        self.draws = draws if target.is_random else 1
        self.pixels, self.labels, self.ids = pixels, labels, ids

    def all_checks(self) -> Iterator[Check]:
        """The checks, one after the other."""
        logits = self._logits(self.pixels)
        bad = int((~logits.isfinite().all(dim=-1)).sum())
        yield Check("Logits", not bad, bad, f"{bad} of {logits[..., 0].numel()} answers are not finite")
        if bad:
            return
        yield from self._off(logits)
        right = (logits.argmax(dim=-1) == self.labels).double().mean(dim=0) > 0.5
        if not bool(right.any()):
            yield Check(
                "Clean accuracy", False, 0.0, "the clean images are all wrong: labels or normalisation do not fit"
            )
            return
        self.pixels, self.labels, self.ids = self.pixels[right], self.labels[right], self.ids[right]
        white = self.attack.run(self.target, self.pixels, self.labels, self.ids, self.seed, max_batch=self.max_batch)
        zero, odd = (float(flags.double().mean()) for flags in (white.zero_gradients, white.bad_gradients))
        yield Check("Gradients of zero", zero <= 0.05, zero, f"{zero:.0%} of the images, at most 5 % expected")
        yield Check("Gradients that are not finite", odd == 0, odd, f"{odd:.0%} of the images, none expected")
        base = self._shares(white.pixels)
        wide = replace(self.attack, epsilon=1.0 if self.attack.norm == "linf" else math.sqrt(self.pixels[0].numel()))
        broken = float(
            self._under(replace(wide, name="apgd", steps=max(20, min(self.attack.steps, 50)), losses=())).mean()
        )
        yield Check(
            "Unbounded eps",
            broken <= 0.05,
            broken,
            f"accuracy {broken:.1%} where the attacker may choose any image, at most 5 % expected: else the attack "
            "fails, and so does that of a smaller radius",
        )
        steps = min(4 * self.attack.steps, self.attack.steps + 200) if self.attack.name != "fgsm" else 1
        if steps > self.attack.steps:
            yield self._stronger(
                "More steps", base, replace(self.attack, steps=steps), f"{steps} steps in place of {self.attack.steps}",
                "the attack has not converged: give it more steps",
            )  # fmt: skip
        if self.target.is_random:
            eot = 4 * self.attack.eot
            yield self._stronger(
                "Larger EOT", base, replace(self.attack, eot=eot), f"{eot} draws in place of {self.attack.eot}",
                "the gradient is too noisy: give the attack more draws",
            )  # fmt: skip
        masked = "gradients are masked, and the accuracy under white box attacks says little"
        if self.attack.norm == "linf":
            square = Attack("square", self.attack.epsilon, QUERIES, eot=self.attack.eot)
            yield self._stronger("Black box", base, square, f"Square with {QUERIES} queries", masked)
        if isinstance(self.target, De3) and self.target.sigma is not None:
            yield self._stronger(
                "Transfer", base, replace(self.attack, gray=True), "the attack on the classifier alone", masked
            )

    def _off(self, logits: Tensor) -> Iterator[Check]:
        """Whether a De3 with a level answers as its classifier does."""
        if not isinstance(self.target, De3) or self.target.sigma is None:
            return
        plain = De3(None, self.target.classifier, None)
        change = float((logits - self._logits(self.pixels, plain)).abs().max())
        yield Check(
            "Defense off",
            change > 0,
            change,
            f"logits differ by up to {change:g} from those without the defense; a difference of 0 says that it is off",
        )

    def _seeds(self, target: Target) -> Tensor:
        return target.seeds(self.seed, Domain.CONFIRMATION, self.ids, self.draws, 2)

    @torch.no_grad()
    def _logits(self, pixels: Tensor, target: Target | None = None) -> Tensor:
        """(R, B, K) on fresh draws, the same for all attacks."""
        target = target or self.target
        size = max(1, self.max_batch // (self.draws * int(getattr(target, "draws", 1))))
        seeds = self._seeds(target)
        parts = torch.arange(len(pixels), device=pixels.device).split(size)
        return torch.cat([target.draw_logits(pixels[part], seeds[:, part]) for part in parts], dim=1)

    def _shares(self, pixels: Tensor) -> Tensor:
        """Share of draws that are right, float64 (B,)."""
        return (self._logits(pixels).argmax(dim=-1) == self.labels).double().mean(dim=0)

    def _under(self, attack: Attack) -> Tensor:
        attacked = attack.run(self.target, self.pixels, self.labels, self.ids, self.seed + 1, max_batch=self.max_batch)
        return self._shares(attacked.pixels)

    def _stronger(self, name: str, base: Tensor, attack: Attack, words: str, meaning: str) -> Check:
        """A check that an attack is not stronger than the one in question, by images both were made on."""
        other = self._under(attack)
        gain = (base - other).cpu().numpy()
        error = float(np.std(gain, ddof=1) / math.sqrt(len(gain))) if len(gain) > 1 else 0.0
        value = float(gain.mean())
        passed = value <= max(LEAST, 2 * error)
        text = f"accuracy {float(base.mean()):.1%} under {self.attack}, {float(other.mean()):.1%} under {words}"
        return Check(name, passed, value, text if passed else f"{text}: {meaning}")
