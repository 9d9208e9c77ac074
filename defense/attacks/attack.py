"""L-infinity attacks on randomized defenses: FGSM and PGD with expectation over transformation (EOT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from denim.defense.de3 import De3
from denim.kernels import Domain, attack_start, attack_step, derive_seeds
from denim.nim.adversarial import evaluating

__all__ = ["Attack", "Attacked", "radius_text"]

_FORM = "fgsm:EPSILON[,eot=N][,gray] or pgd:EPSILON[,steps=N][,eot=N][,restarts=N][,gray], EPSILON such as 4/255"
LOSSES = ("mean loss", "mean probability")


class Attacked(NamedTuple):
    """Result of an attack on one batch.

    Attributes:
        pixels: (B, C, H, W), the candidates.
        zero_gradients: bool (B,), True for images whose gradient was zero at some step.
        bad_gradients: bool (B,), True for images whose gradient was not finite at some step.
    """

    pixels: Tensor
    zero_gradients: Tensor
    bad_gradients: Tensor


@dataclass(frozen=True)
class Attack:
    """An L-infinity attack, white box unless `gray`.

    White box: the exact gradient through noise, denoiser, clamp and classifier, averaged over `eot` draws (Athalye et
    al. 2018). The attack runs with the gradient of the mean loss, with that of the loss of the mean probability, and
    from every restart. Of these candidates it takes, for each image, the one that misleads most *selection* draws.
    Gray box: the attacker knows the classifier, but not that it is defended.

    Attributes:
        name: fgsm (Goodfellow et al. 2015: one step of size epsilon) or pgd (Madry et al. 2018).
        epsilon: radius in [0, 1] units.
        steps: of PGD. The step size is epsilon / 4, halved after half and again after three quarters of the steps.
        eot: draws for each gradient, and for the selection.
        restarts: random starts of PGD, uniform in the ball.
        gray: attack the classifier without its defense.
    """

    name: str
    epsilon: float
    steps: int = 20
    eot: int = 20
    restarts: int = 1
    gray: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("fgsm", "pgd"):
            raise ValueError(f"unknown attack {self.name!r}; choose fgsm or pgd")
        if not (math.isfinite(self.epsilon) and 0 < self.epsilon <= 1):
            raise ValueError(f"epsilon must be in (0, 1], such as 4/255, got {self.epsilon}")
        for name in ("steps", "eot", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> Attack:
        """Read the text form, `pgd:4/255,steps=20,eot=20,restarts=1,gray`.

        Raises:
            ValueError: not of that form.
        """
        name, _, rest = text.partition(":")
        epsilon, *options = rest.split(",")
        settings: dict[str, int | bool] = {}
        try:
            radius = float(Fraction(epsilon))
            for option in options:
                key, _, value = option.partition("=")
                if name == "fgsm" and key in ("steps", "restarts"):
                    raise ValueError(key)
                if key == "gray" and not value:
                    settings[key] = True
                elif key in ("steps", "eot", "restarts"):
                    settings[key] = int(value)
                else:
                    raise ValueError(key)
        except (ValueError, ArithmeticError):
            raise ValueError(f"attack {text!r} is not of the form {_FORM}") from None
        return cls(name, radius, **settings)  # type: ignore[arg-type]

    def __str__(self) -> str:
        text = f"{self.name}:{radius_text(self.epsilon)}"
        if self.name == "pgd":
            text += f",steps={self.steps}"
        text += f",eot={self.eot}"
        if self.restarts > 1:
            text += f",restarts={self.restarts}"
        return text + (",gray" if self.gray else "")

    def run(self, defense: De3, pixels: Tensor, labels: Tensor, ids: Tensor, seed: int) -> Attacked:
        """Attack one batch.

        The target is put into evaluation mode, and back at the end. Gradients are computed also where the caller has
        turned them off (`torch.no_grad`, `torch.inference_mode`).

        Args:
            defense: the target; a gray box attack uses its classifier alone.
            pixels: (B, C, H, W) in [0, 1].
            labels: int64 (B,).
            ids: int64 (B,), sample ids: they key the starts and the draws, so the attack on a sample does not depend on
                the batch that it is in.
            seed: of the evaluation.

        Returns:
            Candidates within epsilon of the pixels, and where gradients were zero or not finite.

        Raises:
            ValueError: the logits do not depend on the pixels by operations of autograd.
        """
        target = De3(None, defense.classifier, None).to(pixels.device) if self.gray else defense
        with torch.inference_mode(False), evaluating(target):
            # Autograd saves no tensors that were made in inference mode.
            pixels, labels, ids = (x.clone() if x.is_inference() else x for x in (pixels, labels, ids))
            return self._run(target, pixels, labels, ids, seed)

    def _run(self, target: De3, pixels: Tensor, labels: Tensor, ids: Tensor, seed: int) -> Attacked:
        eot = self.eot if target.is_random else 1
        # With one draw the two ways to average are the same (the defense itself averages over its own draws).
        losses = LOSSES if eot > 1 else LOSSES[:1]
        best, best_rank = pixels, torch.full((len(pixels),), -math.inf, device=pixels.device)
        zero = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        bad = torch.zeros_like(zero)
        restarts = self.restarts if self.name == "pgd" else 1
        steps = self.steps if self.name == "pgd" else 1
        for restart in range(restarts):
            for kind in losses:
                iterate = pixels
                if self.name == "pgd":
                    starts = derive_seeds(seed, Domain.ATTACK, ids, restart)
                    iterate = attack_start(pixels, starts, epsilon=self.epsilon)
                for step in range(steps):
                    seeds = target.seeds(seed, Domain.ATTACK, ids, eot, (restart << 32) + step + 1)
                    gradient = _gradient(target, iterate, labels, seeds, kind)
                    largest = gradient.flatten(1).abs().amax(dim=1)
                    bad |= ~largest.isfinite()
                    zero |= largest == 0
                    size = self.epsilon if self.name == "fgsm" else self._step_size(step)
                    iterate = attack_step(iterate, pixels, gradient.nan_to_num(), step_size=size, epsilon=self.epsilon)
                rank = _selection_rank(target, iterate, labels, target.seeds(seed, Domain.SELECTION, ids, eot))
                better = rank > best_rank
                best = torch.where(better.view(-1, 1, 1, 1), iterate, best)
                best_rank = torch.where(better, rank, best_rank)
        return Attacked(best, zero, bad)

    def _step_size(self, step: int) -> float:
        done = step / self.steps
        return self.epsilon / 4 * (1.0 if done < 0.5 else 0.5 if done < 0.75 else 0.25)


def radius_text(epsilon: float) -> str:
    """The radius as users write it, as in 4/255 where that is exact; `Attack.parse` reads the same number from it."""
    levels = round(epsilon * 255)
    return f"{levels}/255" if levels / 255 == epsilon else repr(epsilon)


def _gradient(target: De3, pixels: Tensor, labels: Tensor, seeds: Tensor, kind: str) -> Tensor:
    """Gradient of the loss that the attack raises, averaged over draws, with respect to pixels."""
    with torch.enable_grad():
        leaf = pixels.detach().requires_grad_()
        logits = target.draw_logits(leaf, seeds, surrogate=True)
        log_probability = logits.log_softmax(dim=-1)
        if kind == "mean loss":
            loss = -log_probability.mean(dim=0)
        else:
            loss = math.log(len(logits)) - log_probability.logsumexp(dim=0)
        total = loss.gather(1, labels[:, None]).sum()
        with torch.autocast(pixels.device.type, enabled=False):  # backward has the dtypes of forward
            gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        raise ValueError(
            "the logits do not depend on the pixels by operations of autograd, so this attack would leave the images "
            "as they are, and the defense would look robust: the classifier or the denoiser detaches, rounds, leaves "
            "torch or runs under torch.no_grad. Give it a derivative, or put a surrogate with one in its place"
        )
    return gradient


@torch.no_grad()
def _selection_rank(target: De3, pixels: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
    """(B,), larger for candidates that mislead more draws; of equal ones, for those of larger mean loss."""
    logits = target.draw_logits(pixels, seeds)
    misled = (logits.argmax(dim=-1) != labels).float().mean(dim=0)
    expanded = labels.expand(len(logits), -1)
    loss = F.cross_entropy(logits.flatten(0, 1), expanded.flatten(), reduction="none").view_as(expanded).mean(dim=0)
    # 1 - 1 / (1 + loss) lies in [0, 1], also for an infinite loss: it orders equal counts, and never exceeds a draw.
    return misled * len(logits) + torch.nan_to_num(1 - 1 / (1 + loss), nan=0.0)
