"""What an attack is: its text form, and the search for the candidate of each image."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denim.defense.attacks.balls import Ball
from denim.defense.attacks.losses import LOSSES
from denim.defense.attacks.rules import Apgd, Fgsm, Momentum, Pgd, Rule
from denim.defense.attacks.search import Found, Items, Passed, Search
from denim.defense.attacks.square import Square
from denim.defense.de3 import De3
from denim.defense.targets import Target
from denim.kernels import Domain
from denim.nim.adversarial import evaluating

__all__ = ["ATTACKS", "Attack", "AttackMethod", "Attacked", "parse_attack", "radius_text", "register_attack"]

# Leaving early costs nothing where the target does not draw. Where it does, an image leaves if all draws of a pass and
# then all confirmation draws miss; with fewer steps or draws this asks for more than it saves.
LEAST_STEPS, LEAST_DRAWS = 50, 4
LEAST_CONFIRMATIONS = 32  # with fewer, images leave that some draws still get right, and the accuracy is too high
# Asked at every step, nearly all answers are that the image stays, and the attack takes a fifth longer.
ASKED_EVERY = 5  # steps


def _are_enough(steps: int, draws: int) -> bool:
    return steps >= LEAST_STEPS and draws >= LEAST_DRAWS


class Attacked(NamedTuple):
    """Result of an attack on a number of images.

    Attributes:
        pixels: (B, C, H, W), the candidates.
        zero_gradients: bool (B,), True for images whose gradient was zero at some step of every search that has one.
        bad_gradients: bool (B,), True for images whose gradient was not finite at some step.
        gradients: int64 (B,), gradients of one draw that were computed for each image.
    """

    pixels: Tensor
    zero_gradients: Tensor
    bad_gradients: Tensor
    gradients: Tensor


class AttackMethod(Protocol):
    """What an evaluation needs of an attack; `Attack` is one.

    It may have `epsilon`, its radius in [0, 1] units: attacks of one radius (and one `norm`) are compared image by
    image, and the report has the radius. It may have `eot`, the draws of a gradient, by which the images of a pass are
    counted.
    """

    def run(self, target: Any, pixels: Tensor, labels: Tensor, ids: Tensor, seed: int) -> Any:
        """Attack a batch.

        Args:
            target: what is attacked, see `denim.defense.targets.Target`.
            pixels: (B, C, H, W) in [0, 1].
            labels: int64 (B,).
            ids: int64 (B,), sample ids, to key whatever is random.
            seed: of the evaluation.

        Returns:
            The attacked pixels, or an object with them as `pixels` and, where it knows them, `zero_gradients` and
            `bad_gradients`, bool (B,), and `gradients`, int64 (B,), backward passes that were spent.
        """
        ...


class Stage(NamedTuple):
    """One search of an attack, made on the images that the searches before it have left.

    Attributes:
        rule: how it moves.
        loss: what it raises.
        targets: 0, or how many of the most likely other classes are aimed at, one after the other.
    """

    rule: Rule
    loss: str
    targets: int = 0


class Kind(NamedTuple):
    """An attack by its name.

    Attributes:
        steps: by default; 0 where the number is fixed.
        losses: by default; none where they are fixed.
        stages: the searches, by the settings.
    """

    steps: int
    losses: tuple[str, ...]
    stages: Callable[[Attack, Ball], Iterator[Stage]]


def _by_losses(rule: Callable[[Ball, int], Rule]) -> Callable[[Attack, Ball], Iterator[Stage]]:
    def stages(attack: Attack, ball: Ball) -> Iterator[Stage]:
        for loss in attack.losses:
            yield Stage(rule(ball, attack.steps), loss)

    return stages


def _targeted(attack: Attack, ball: Ball) -> Iterator[Stage]:
    yield Stage(Apgd(ball, attack.steps), "dlr-targeted", targets=9)


def _standard(attack: Attack, ball: Ball) -> Iterator[Stage]:
    yield Stage(Apgd(ball, attack.steps), "ce")
    yield from _targeted(attack, ball)
    if ball.norm == "linf":
        yield Stage(Square(ball, 50 * attack.steps), "margin")


ATTACKS: dict[str, Kind] = {
    "fgsm": Kind(0, ("ce",), _by_losses(lambda ball, steps: Fgsm(ball))),
    "pgd": Kind(20, ("ce", "dlr"), _by_losses(Pgd)),
    "mpgd": Kind(20, ("ce", "dlr"), _by_losses(Momentum)),
    "apgd": Kind(100, ("ce", "dlr"), _by_losses(Apgd)),
    "apgd-t": Kind(100, (), _targeted),
    "square": Kind(5000, ("margin",), _by_losses(Square)),
    "aa": Kind(100, (), _standard),
    "aa-rand": Kind(100, ("ce", "dlr"), _by_losses(Apgd)),
}
"""Attacks by name. `aa` is AutoAttack (Croce and Hein 2020) without FAB: AutoPGD on cross entropy and, for the nine
most likely other classes, on the targeted ratio, then Square with 50 queries for each step. `aa-rand` is AutoAttack for
targets that draw."""

_FORM = (
    "NAME:EPSILON[,norm=l2][,steps=N][,eot=N][,restarts=N][,loss=LOSS+LOSS][,gray][,full], with a NAME of "
    f"{', '.join(ATTACKS)}, EPSILON such as 4/255, and a LOSS of {', '.join(LOSSES)}"
)


@dataclass(frozen=True)
class Attack:
    """An attack of bounded change, white box unless `gray`.

    White box: the exact gradient through noise, denoiser, clamp and classifier, averaged over `eot` draws (Athalye et
    al. 2018). An attack is a number of searches: one for each loss, target class and restart. For a target that draws,
    cross entropy is raised twice, as the mean loss and as the loss of the mean probability. Of the clean image and,
    from each search, the iterate of the largest loss and the last one, the candidate is the one that misleads most
    *selection* draws. Gray box: the attacker knows the classifier, but not that it is defended.

    An image that is misled leaves the search, and later searches pass it over. Where the target does not draw, the
    verdict is the same as without. Where it does, this needs all selection draws, or all draws of every fifth pass, and
    then at least 32 confirmation draws, to be misled, at least 50 steps and 4 draws. The iterate by which an image
    leaves is its candidate. `full` turns it off; so does `gray`, where the verdict is that of another model.

    Attributes:
        name: a key of `ATTACKS`.
        epsilon: radius in [0, 1] units.
        steps: of each search; None takes those of the name. With square, queries.
        eot: draws for each gradient, and for the selection.
        restarts: random starts of each search.
        gray: attack the classifier without its defense.
        norm: "linf" or "l2".
        losses: keys of `LOSSES`; none takes those of the name.
        full: search for every image to the last step of every search.
    """

    name: str
    epsilon: float
    steps: int = None  # type: ignore[assignment]  # a number after __post_init__
    eot: int = 20
    restarts: int = 1
    gray: bool = False
    norm: str = "linf"
    losses: tuple[str, ...] = ()
    full: bool = False

    def __post_init__(self) -> None:
        kind = ATTACKS.get(self.name)
        if kind is None:
            raise ValueError(f"unknown attack {self.name!r}; choose one of {', '.join(ATTACKS)}")
        Ball.check(self.epsilon, self.norm)
        if self.name == "square" and self.norm != "linf":
            raise ValueError(f"square attacks in the L-infinity norm alone, got norm {self.norm!r}")
        if self.steps is None or not kind.steps:
            object.__setattr__(self, "steps", kind.steps or 1)
        if not kind.losses and self.losses:
            raise ValueError(f"the losses of {self.name} are fixed, got {', '.join(self.losses)}")
        object.__setattr__(self, "losses", tuple(self.losses) or kind.losses)
        for loss in self.losses:
            if loss not in LOSSES or loss == "dlr-targeted":
                choices = ", ".join(name for name in LOSSES if name != "dlr-targeted")
                raise ValueError(f"unknown loss {loss!r}; choose of {choices}; targeted ratios are what apgd-t raises")
        if self.name == "fgsm":
            object.__setattr__(self, "restarts", 1)  # it starts from the image
        for name in ("steps", "eot", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> Attack:
        """Read the text form, such as `apgd:4/255,steps=100,eot=20,restarts=1,loss=ce+dlr,norm=l2,gray,full`.

        Raises:
            ValueError: not of that form.
        """
        name, _, rest = text.partition(":")
        epsilon, *options = rest.split(",")
        settings: dict[str, object] = {}
        try:
            radius = float(Fraction(epsilon))
            for option in options:
                key, _, value = option.partition("=")
                if name == "fgsm" and key in ("steps", "restarts"):
                    raise ValueError(key)
                if key in ("gray", "full") and not value:
                    settings[key] = True
                elif key in ("steps", "eot", "restarts"):
                    settings[key] = int(value)
                elif key == "loss" and value:
                    settings["losses"] = tuple(value.split("+"))
                elif key == "norm" and value:
                    settings[key] = value
                else:
                    raise ValueError(key)
        except (ValueError, ArithmeticError):
            raise ValueError(f"attack {text!r} is not of the form {_FORM}") from None
        return cls(name, radius, **settings)  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = f"{self.name}:{radius_text(self.epsilon)}"
        if self.norm != "linf":
            text += f",norm={self.norm}"
        if ATTACKS[self.name].steps:
            text += f",steps={self.steps}"
        text += f",eot={self.eot}"
        if self.restarts > 1:
            text += f",restarts={self.restarts}"
        if self.losses != ATTACKS[self.name].losses:
            text += f",loss={'+'.join(self.losses)}"
        return text + (",gray" if self.gray else "") + (",full" if self.full else "")

    def most_gradients(self, is_random: bool, num_classes: int) -> int:
        """Gradients of one draw that an image costs which leaves no search early; see `Attacked.gradients`.

        Args:
            is_random: whether what is attacked draws.
            num_classes: of what is attacked.
        """
        eot = self.eot if is_random else 1
        return sum(
            stage.rule.steps * eot * self.restarts * (min(stage.targets, num_classes - 1) or 1)
            for stage in self.stages(eot)
            if stage.rule.needs_gradient
        )

    def stages(self, eot: int) -> Iterator[Stage]:
        """The searches that it makes, in their order.

        Args:
            eot: draws of a gradient, 1 where nothing draws.
        """
        for stage in ATTACKS[self.name].stages(self, Ball(self.epsilon, self.norm)):
            yield stage
            if stage.loss == "ce" and eot > 1 and "mean-probability" not in self.losses:
                yield stage._replace(loss="mean-probability")

    @property
    def leaves_early(self) -> bool:
        """Whether images leave searches early also where the target draws, which raises the accuracy a little."""
        return not (self.full or self.gray) and _are_enough(self.steps, self.eot)

    def run(
        self,
        target: Target,
        pixels: Tensor,
        labels: Tensor,
        ids: Tensor,
        seed: int,
        *,
        targets: Tensor | None = None,
        sigma: Tensor | None = None,
        max_batch: int = 256,
        tell: Callable[[int, int], None] | None = None,
    ) -> Attacked:
        """Attack images.

        The target is put into evaluation mode, and back at the end. Gradients are computed also where the caller has
        turned them off (`torch.no_grad`, `torch.inference_mode`).

        Args:
            target: what is attacked; a gray box attack uses the classifier of a De3 alone.
            pixels: (B, C, H, W) in [0, 1].
            labels: int64 (B,).
            ids: int64 (B,), sample ids: they key the starts and the draws, so the attack on a sample does not depend on
                what it is attacked together with.
            seed: of the evaluation.
            targets: int64 (B,), classes that the attacker wants predicted; None for any that is not the label.
            sigma: float (B,), noise levels in 0-255 pixel levels, for a De3 to take in place of its own: images at many
                levels are attacked in one batch. Its own still says whether it draws. Without effect with `gray`.
            max_batch: images in a pass, draws counted; at least one image with all draws is in a pass.
            tell: called after each pass that has a gradient, with the gradients of one draw that were computed since
                the last call and the number of images that have left the attack because they are misled, all in all.

        Returns:
            Candidates within epsilon of the pixels, and what the search has met.

        Raises:
            ValueError: the logits do not depend on the pixels by operations of autograd, labels are no classes, or a
                gray box attack or levels for something that is no De3.
        """
        module = target
        if sigma is not None and not isinstance(target, De3):
            raise ValueError(f"noise levels are those of a De3, and this is {type(target).__name__}")
        if self.gray:
            sigma = None
            if not isinstance(target, De3):
                raise ValueError(
                    f"a gray box attack is on the classifier of a De3, and this is {type(target).__name__}"
                )
            module = De3(None, target.classifier, None).to(pixels.device)
        mode = evaluating(module) if isinstance(module, nn.Module) else contextlib.nullcontext()
        with torch.inference_mode(False), mode:
            # Autograd saves no tensors that were made in inference mode.
            aims = labels if targets is None else targets
            pixels, labels, ids, aims = (x.clone() if x.is_inference() else x for x in (pixels, labels, ids, aims))
            items = Items(pixels, labels, aims, ids, None if sigma is None else sigma.clone())
            return _Run(self, module, items, seed, targets is not None, max_batch, tell).all_searches()


class _Run:
    """An attack on a number of images, search by search.

    Args:
        towards: the aim are predictions of the items' targets.
    """

    def __init__(
        self,
        attack: Attack,
        target: Target,
        items: Items,
        seed: int,
        towards: bool,
        max_batch: int,
        tell: Callable[[int, int], None] | None,
    ) -> None:
        self.tell = tell
        self.attack, self.target, self.items, self.seed, self.towards = attack, target, items, seed, towards
        self.eot = attack.eot if target.is_random else 1
        self.slots = max(1, max_batch // (self.eot * int(getattr(target, "draws", 1))))

    def all_searches(self) -> Attacked:
        """Every search in turn."""
        items = self.items
        count, device = len(items.ids), items.origin.device
        best, gradients = items.origin.clone(), torch.zeros(count, dtype=torch.int64, device=device)
        bad, searched = (torch.zeros(count, dtype=torch.bool, device=device) for _ in range(2))
        zero = ~bad
        if not count:
            return Attacked(best, bad, bad.clone(), gradients)
        rank, mean = self._rank(items, items.origin, first=True)
        settled = torch.zeros_like(searched)  # left a search, so their candidates have been asked
        for stage in self.attack.stages(self.eot):
            leaves, each = self._may_leave(stage), self.eot if stage.rule.needs_gradient else 0
            # Most likely first; the label itself, or beyond the classes, is no aim.
            order = mean.scatter(1, items.labels[:, None], -math.inf).argsort(dim=1, descending=True)
            aims = min(stage.targets, mean.shape[1] - 1)
            for aim, restart in ((a, r) for a in range(aims or 1) for r in range(self.attack.restarts)):
                done = torch.zeros_like(searched)
                if leaves:
                    settled |= self._confirmed(best, items, (rank >= self.eot) & ~settled)
                    done = settled
                place = (~done).nonzero().flatten()
                if not len(place):
                    continue
                chosen = items.at(place)
                if aims and not self.towards:
                    chosen = chosen._replace(targets=order[place, aim])
                search = Search(stage.rule, stage.loss, self.eot, self.slots, self.towards)
                # Other aims start elsewhere.
                number = restart + aim * self.attack.restarts
                passed = self._teller(each, int(settled.sum()))
                found = search.run(self.target, chosen, self.seed, number, self._decided if leaves else None, passed)
                left, stayed = place[found.left], place[~found.left]
                best[left], rank[left], settled[left] = found.last[found.left], math.inf, True
                for pixels in self._candidates(stage, found) if len(stayed) else ():
                    pixels = pixels[~found.left]
                    better_rank, _ = self._rank(items.at(stayed), pixels)
                    better = better_rank > rank[stayed]
                    best[stayed] = torch.where(better.view(-1, 1, 1, 1), pixels, best[stayed])
                    rank[stayed] = torch.where(better, better_rank, rank[stayed])
                bad[place] |= found.bad
                if stage.rule.needs_gradient:
                    searched[place] = True
                    zero[place] &= found.zero
                    gradients[place] += found.passes * self.eot
        return Attacked(best, zero & searched, bad, gradients)

    def _teller(self, each: int, misled: int) -> Passed | None:
        """What a search calls after its passes, so that `tell` is called.

        Args:
            each: gradients of an image in a pass.
            misled: images that left before the search.
        """
        if self.tell is None or not each:
            return None
        tell, gone = self.tell, misled

        def passed(images: int, left: Tensor) -> None:
            nonlocal gone
            gone += int(left.sum())
            tell(images * each, gone)

        return passed

    def _may_leave(self, stage: Stage) -> bool:
        if self.attack.full or self.attack.gray:
            return False
        return not self.target.is_random or _are_enough(stage.rule.steps, self.eot)

    @staticmethod
    def _candidates(stage: Stage, found: Found) -> tuple[Tensor, ...]:
        # The only iterate of one step that a pass has seen is its start.
        return (found.last,) if stage.rule.steps == 1 else (found.last, found.best)

    def _misled(self, logits: Tensor, items: Items) -> Tensor:
        """bool (R, B) of logits (R, B, K)."""
        predicted = logits.argmax(dim=-1)
        return predicted == items.targets if self.towards else predicted != items.labels

    def _decided(self, pixels: Tensor, logits: Tensor, items: Items, steps: Tensor) -> Tensor:
        """Whether all draws of a pass are misled, and all confirmation draws, bool (B,)."""
        misled = self._misled(logits, items).all(dim=0)
        if self.target.is_random:
            misled = misled & (steps % ASKED_EVERY == ASKED_EVERY - 1)
        return self._confirmed(pixels, items, misled)

    @torch.no_grad()
    def _confirmed(self, pixels: Tensor, items: Items, misled: Tensor) -> Tensor:
        """Of images that seem misled, bool (B,), those all of whose confirmation draws are misled too."""
        if not self.target.is_random:
            return misled
        # Step 0 has the confirmation draws by which an evaluation compares attacks.
        for step in range(1, 1 + math.ceil(LEAST_CONFIRMATIONS / self.eot)):
            rows = misled.nonzero().flatten()
            if not len(rows):
                break
            for row in rows.split(self.slots):
                asked = items.at(row)
                seeds = self.target.seeds(self.seed, Domain.CONFIRMATION, asked.ids, self.eot, step)
                answers = self._misled(asked.logits(self.target, pixels[row], seeds), asked).all(dim=0)
                misled = misled.index_put((row,), answers)
        return misled

    @torch.no_grad()
    def _rank(self, items: Items, pixels: Tensor, first: bool = False) -> tuple[Tensor, Tensor]:
        """(B,), larger for candidates that mislead more draws; of equal ones, for those of larger mean loss.

        Also the mean logits (B, K).

        Args:
            first: check the labels.
        """
        ranks, means = [], []
        for part in torch.arange(len(pixels), device=pixels.device).split(self.slots):
            here = items.at(part)
            seeds = self.target.seeds(self.seed, Domain.SELECTION, here.ids, self.eot)
            logits = here.logits(self.target, pixels[part], seeds)
            if first:
                for name, classes in (("labels", here.labels), ("targets", here.targets)):
                    _check_classes(name, classes, here.ids, logits.shape[-1])
            misled = self._misled(logits, here).double().mean(dim=0)
            aim = here.targets if self.towards else here.labels
            expanded = aim.expand(len(logits), -1)
            flat = F.cross_entropy(logits.flatten(0, 1).float(), expanded.flatten(), reduction="none")
            loss = flat.view_as(expanded).double().mean(dim=0)
            loss = -loss if self.towards else loss
            # In (0, 1), also for infinite losses: it orders equal counts, and never exceeds a draw. float64, since a
            # large loss rounds to 1 in float32.
            between = torch.nan_to_num(0.5 + torch.atan(loss) / math.pi, nan=0.0).clamp(0, 1 - 1e-9)
            ranks.append(misled * len(logits) + between)
            means.append(logits.mean(dim=0))
        return torch.cat(ranks), torch.cat(means)


def _check_classes(name: str, classes: Tensor, ids: Tensor, count: int) -> None:
    wrong = (classes < 0) | (classes >= count)
    if bool(wrong.any()):
        pairs = zip(classes[wrong][:5].tolist(), ids[wrong.to(ids.device)][:5].tolist(), strict=True)
        found = ", ".join(f"{label} (sample id {i})" for label, i in pairs)
        raise ValueError(f"the target has {count} classes, and {name} must be from 0 to {count - 1}, got {found}")


def radius_text(epsilon: float) -> str:
    """The radius as users write it, as in 4/255 where that is exact; `Attack.parse` reads the same number from it."""
    levels = round(epsilon * 255)
    return f"{levels}/255" if levels / 255 == epsilon else repr(epsilon)


_PARSERS: dict[str, Callable[[str], AttackMethod]] = dict.fromkeys(ATTACKS, Attack.parse)


def register_attack(name: str, parse: Callable[[str], AttackMethod]) -> None:
    """Make an attack known by a name, for text forms that begin with it.

    Args:
        name: what stands before the colon.
        parse: gives the attack of a text form, and raises ValueError for another text. `str` of the attack must give a
            text form back.

    Raises:
        ValueError: the name is taken, or holds a colon or a comma.
    """
    if name in _PARSERS or not name or set(name) & set(":,"):
        raise ValueError(f"an attack needs a name of its own without colon and comma, got {name!r}")
    _PARSERS[name] = parse


def parse_attack(text: str) -> AttackMethod:
    """An attack from its text form, by the parser of its name.

    Raises:
        ValueError: unknown name, or not of the form of that name.
    """
    name, colon, _ = text.partition(":")
    if name not in _PARSERS and colon and name:
        raise ValueError(f"unknown attack {name!r}; choose one of {', '.join(_PARSERS)}")
    return _PARSERS.get(name, Attack.parse)(text)
