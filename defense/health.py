"""Checks that tell a failed attack from a robust defense, on a few images.

An attack that fails and a defense that holds give the same number. Each check attacks in a way that a sound white box
attack must not lose to, or looks at what an attack stands on. See docs/method.md, "Health checks".
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from denim.defense.attacks import Attack
from denim.defense.cells import Cell
from denim.defense.de3 import De3
from denim.defense.fingerprint import Fingerprints
from denim.defense.images import pixels_of
from denim.defense.records import Records
from denim.defense.rows import CLEAN, Row, key_of
from denim.defense.targets import Target
from denim.defense.work import Work, device_of, is_out_of_memory
from denim.kernels import Domain
from denim.nim.data import Batch
from denim.nim.progress import clock_text

__all__ = ["Check", "DefenseHealth", "check_health", "health_of"]

# A difference of shares counts if it is larger than this and than twice its standard error: below, it is a matter of
# which few images were taken.
LEAST = 0.04
QUERIES = 300
DRAWS = 10


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


@dataclass(frozen=True)
class DefenseHealth:
    """What the checks of one defense have found.

    Attributes:
        defense: its name.
        attack: text form of the attack that was checked; "none" where only the checks without attacks were made.
        num_images: how many images there were.
        checks: in the order in which they were made.
    """

    defense: str
    attack: str
    num_images: int
    checks: tuple[Check, ...]

    def warnings(self) -> Iterator[str]:
        """A line for each check that has not passed."""
        for check in self.checks:
            if not check.passed:
                yield f"{self.defense}: {check.name}: {check.text} (docs/method.md, health checks)"


def health_of(
    work: Work, records: Records, cells: Sequence[Cell], fingerprints: Fingerprints
) -> tuple[DefenseHealth, ...]:
    """Check the defenses of an evaluation on its first images, as many as its settings say.

    All defenses get the checks that need no attack. The others take many attacks, so they are made where the claim is:
    beside the white box attack with the most gradients, and of the levels of one De3 at that which is left with the
    highest accuracy under it. What is found is kept with the records, under a key of the same kind, and not computed
    again.

    Args:
        work: of this process, done.
        records: of the evaluation.
        cells: its scores.
        fingerprints: of its defenses and attacks.

    Raises:
        MemoryError: one image, with all draws of a gradient, does not fit into memory.
        Stopped: SIGTERM or Ctrl-C; what is finished is kept.
    """
    settings = work.settings
    shown = work.own.at(np.arange(min(settings.health_images, len(work.own))))
    batch: Batch | None = None
    found = []
    started = time.perf_counter()
    for row, attack in _claims(work, cells, fingerprints).values() if len(shown) else ():
        text = CLEAN if attack is None else str(attack)
        basis = (DRAWS, QUERIES, LEAST, settings.seed, settings.precision, shown.digests.tolist())
        key = key_of(row.target_key, fingerprints.of(attack), "health", text, *basis)
        kept = records.kept(key)
        if kept is None:
            batch = batch or work.batch_of(shown)
            if not len(batch.ids):  # none of them can be read
                break
            beside = "" if attack is None else f" beside {text}"
            work.say(f"health checks of {row.name}{beside} on {len(batch.ids)} images")
            kept = [asdict(check) for check in _checked(work, row, attack, batch)]
            records.keep(key, kept)
            work.stop.heed()
        found.append(DefenseHealth(row.name, text, len(shown), tuple(Check(**check) for check in kept)))
    if batch is not None:
        work.say(f"health checks done  in {clock_text(time.perf_counter() - started)}")
    return tuple(found)


def _claims(work: Work, cells: Sequence[Cell], fingerprints: Fingerprints) -> dict[str, tuple[Row, Attack | None]]:
    """By defense, a row of it and the attack that is checked, if any."""
    accuracy = {(cell.defense, cell.attack): cell.scores.mean.value for cell in cells}
    claims: dict[str, tuple[Row, Attack | None]] = {}
    most: dict[str, int] = {}
    for row in work.rows:
        claims.setdefault(row.name, (row, None))
        if isinstance(row.attack, Attack) and not row.attack.gray:
            gradients = row.attack.most_gradients(row.target.is_random, work.num_classes or 2)
            if gradients > most.get(row.name, 0):
                most[row.name] = gradients
                claims[row.name] = (row, row.attack)
    highest: dict[Hashable, str] = {}
    for name, (row, _) in claims.items():
        target: Any = row.target
        kin: Hashable = row.target_key
        if isinstance(target, De3) and target.sigma is not None:
            kin = (fingerprints.of(target.classifier), fingerprints.of(target.denoiser), target.degrade)
        best = highest.setdefault(kin, name)
        if accuracy[name, row.text] > accuracy[best, claims[best][0].text]:
            highest[kin] = name
    return {name: (row, attack if name in highest.values() else None) for name, (row, attack) in claims.items()}


def _checked(work: Work, row: Row, attack: Attack | None, batch: Batch) -> list[Check]:
    """The checks of one defense, with fewer images in a pass where memory does not suffice."""
    device = device_of(row.target)
    tensors = pixels_of(batch, device), batch.labels.to(device), batch.ids.to(device)
    limit = work.limits.get(row.name, work.settings.max_batch)
    while True:
        try:
            return check_health(row.target, *tensors, attack, seed=work.settings.seed, max_batch=limit)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if limit <= 1:
                raise MemoryError(
                    f"{row.name}: the health checks of one image do not fit into memory ({error}); take another "
                    "precision, or a device with more memory"
                ) from error
        limit //= 2
        work.say(f"out of memory for the health checks of {row.name}: from now on at most {limit} images in a pass")


def check_health(
    target: Target,
    pixels: Tensor,
    labels: Tensor,
    ids: Tensor,
    attack: Attack | None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
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
            None makes the checks that need none.
        seed: of everything random.
        draws: fresh draws by which accuracies are compared.
        max_batch: images in a pass, draws counted.

    Returns:
        The checks that apply to the target, those without attacks first. Where the attack leaves no accuracy there is
        none to doubt, and no other attack is made.

    Raises:
        ValueError: no images, a gray box attack, or an attack that cannot be made, as where the target has no gradient.
    """
    if not len(ids):
        raise ValueError("health checks need images, and got none")
    if attack is not None and attack.gray:
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
        attack: Attack | None,
        seed: int,
        draws: int,
        max_batch: int,
    ) -> None:
        self.target, self.seed, self.max_batch, self.given = target, seed, max_batch, attack
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
        if self.given is not None:
            self.pixels, self.labels, self.ids = self.pixels[right], self.labels[right], self.ids[right]
            yield from self._attacked(self.given)

    def _attacked(self, attack: Attack) -> Iterator[Check]:
        """Those that attack."""
        white = attack.run(self.target, self.pixels, self.labels, self.ids, self.seed, max_batch=self.max_batch)
        zero, odd = (float(flags.double().mean()) for flags in (white.zero_gradients, white.bad_gradients))
        yield Check("Gradients of zero", zero <= 0.05, zero, f"{zero:.0%} of the images, at most 5 % expected")
        yield Check("Gradients that are not finite", odd == 0, odd, f"{odd:.0%} of the images, none expected")
        base = self._shares(white.pixels)
        if float(base.mean()) <= LEAST:
            return
        wide = replace(attack, epsilon=1.0 if attack.norm == "linf" else math.sqrt(self.pixels[0].numel()))
        broken = float(
            self._under(
                replace(wide, name="apgd", steps=max(20, min(attack.steps, 50)), losses=()), self.seed + 1
            ).mean()
        )
        yield Check(
            "Unbounded eps",
            broken <= 0.05,
            broken,
            f"accuracy {broken:.1%} where the attacker may choose any image, at most 5 % expected: else the attack "
            "fails, and so does that of a smaller radius",
        )
        steps = min(4 * attack.steps, attack.steps + 200) if attack.name != "fgsm" else 1
        if steps > attack.steps:
            yield self._stronger(
                "More steps", base, replace(attack, steps=steps), f"{steps} steps in place of {attack.steps}",
                "the attack has not converged: give it more steps",
            )  # fmt: skip
        if self.target.is_random:
            eot = 4 * attack.eot
            yield self._stronger(
                "Larger EOT", base, replace(attack, eot=eot), f"{eot} draws in place of {attack.eot}",
                "the gradient is too noisy: give the attack more draws",
            )  # fmt: skip
        masked = "gradients are masked, and the accuracy under white box attacks says little"
        if self.target.is_random and attack.leaves_early:
            whole = replace(attack, full=True)
            yield self._stronger(
                "Leaving early", base, whole, "the same attack to its last step", "evaluate with `full`", self.seed
            )
        if attack.norm == "linf":
            square = Attack("square", attack.epsilon, QUERIES, eot=attack.eot)
            yield self._stronger("Black box", base, square, f"Square with {QUERIES} queries", masked)
        if isinstance(self.target, De3) and self.target.sigma is not None:
            yield self._stronger(
                "Transfer", base, replace(attack, gray=True), "the attack on the classifier alone", masked
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

    def _under(self, attack: Attack, seed: int) -> Tensor:
        attacked = attack.run(self.target, self.pixels, self.labels, self.ids, seed, max_batch=self.max_batch)
        return self._shares(attacked.pixels)

    def _stronger(
        self, name: str, base: Tensor, attack: Attack, words: str, meaning: str, seed: int | None = None
    ) -> Check:
        """A check that an attack is not stronger than the one in question, by images both were made on.

        It draws by itself, unless the seed is that of the one in question.
        """
        other = self._under(attack, self.seed + 1 if seed is None else seed)
        gain = (base - other).cpu().numpy()
        error = float(np.std(gain, ddof=1) / math.sqrt(len(gain))) if len(gain) > 1 else 0.0
        value = float(gain.mean())
        passed = value <= max(LEAST, 2 * error)
        text = f"accuracy {float(base.mean()):.1%} under {self.given}, {float(other.mean()):.1%} under {words}"
        return Check(name, passed, value, text if passed else f"{text}: {meaning}")
