"""Attacks of other libraries as attacks of an evaluation: foolbox, torchattacks, ART and AutoAttack.

A library sees the target as an ordinary module. What it returns is scored on Denim's draws, as any other attack: what
the library believes to have found does not matter.

What is seen in these libraries: pyautoattack's version `rand` seeds torch's generator anew for every call, and returns
an image as it was if one draw of the clean image misses. Its other versions treat a target that draws as one that does
not. foolbox, torchattacks and ART take one draw for each gradient, unless an option of the attack says otherwise.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from denim.defense.attacks.attack import Attacked, radius_text, register_attack
from denim.defense.attacks.balls import NORMS, Ball
from denim.defense.generators import keyed_generators
from denim.defense.targets import Target
from denim.kernels import Domain, derive_seeds
from denim.nim.adversarial import evaluating

__all__ = ["LIBRARIES", "ForeignAttack", "Library"]

# Rounding of float32 in a library's own projection.
SLACK = 1e-5


class _Drawn(nn.Module):
    """A target as an ordinary module, whose calls draw one after the other by a seed.

    Args:
        target: from pixels in [0, 1] to logits.
        seed: of all calls.
        device: of the pixels.
    """

    def __init__(self, target: Target, seed: int, device: torch.device) -> None:
        super().__init__()
        # Not a submodule: a library that restores modes or moves weights leaves the target alone.
        self._target = (target,)
        self._seed, self._calls, self._device = seed, 0, device
        self.gradients = 0
        # Libraries read the device off a parameter.
        self.anchor = nn.Parameter(torch.zeros((), device=device), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) for pixels (B, C, H, W) in [0, 1]."""
        self._calls += 1
        self.gradients += len(pixels) * int(pixels.requires_grad)
        ids = torch.arange(len(pixels), device=pixels.device)
        seeds = self._target[0].seeds(self._seed, Domain.ATTACK, ids, 1, self._calls)
        return self._target[0].draw_logits(pixels, seeds, surrogate=True)[0]


def _import(library: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"attacks of {library} need the package {LIBRARIES[library].package}, which cannot be imported ({error}): "
            f"pip install {LIBRARIES[library].package}"
        ) from error


def _named(library: str, module: str, name: str) -> Any:
    found = getattr(_import(library, module), name, None)
    if not callable(found):
        raise ValueError(f"{module} has no attack {name!r}")  # noqa: TRY004  # of the text, not of a type
    return found


Run = Callable[["ForeignAttack", _Drawn, Tensor, Tensor], Tensor]


def _foolbox(attack: ForeignAttack, model: _Drawn, pixels: Tensor, labels: Tensor) -> Tensor:
    kind = _named("foolbox", "foolbox.attacks", attack.kind)
    wrapped = _import("foolbox", "foolbox").PyTorchModel(model.eval(), bounds=(0, 1), device=pixels.device)
    _, (attacked,), _ = kind(**dict(attack.options))(wrapped, pixels, labels, epsilons=[attack.epsilon])
    return torch.as_tensor(attacked)


def _torchattacks(attack: ForeignAttack, model: _Drawn, pixels: Tensor, labels: Tensor) -> Tensor:
    kind = _named("torchattacks", "torchattacks", attack.kind)
    attacked: Tensor = kind(model, eps=attack.epsilon, **dict(attack.options))(pixels, labels)
    return attacked


def _art(attack: ForeignAttack, model: _Drawn, pixels: Tensor, labels: Tensor) -> Tensor:
    kind = _named("art", "art.attacks.evasion", attack.kind)
    with torch.no_grad():
        classes = model(pixels[:1]).shape[1]
    wrapped = _import("art", "art.estimators.classification").PyTorchClassifier(
        model.eval(),
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(pixels.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if pixels.is_cuda else "cpu",
    )
    found = kind(wrapped, eps=attack.epsilon, **dict(attack.options))
    return torch.from_numpy(found.generate(pixels.cpu().numpy(), y=labels.cpu().numpy()))


def _autoattack(attack: ForeignAttack, model: _Drawn, pixels: Tensor, labels: Tensor) -> Tensor:
    kind = _named("autoattack", "pyautoattack", "AutoAttack")
    names = attack.kind.split("+")
    which: dict[str, Any] = {"version": attack.kind}
    if attack.kind not in ("standard", "plus", "rand"):
        which = {"version": "custom", "attacks": names}
    runner = kind(
        model.eval(), norm={"linf": "Linf", "l2": "L2"}[attack.norm], eps=attack.epsilon, seed=0, device=pixels.device,
        **which,
    )  # fmt: skip
    for name, value in attack.options:
        for part in (runner.apgd, runner.apgd_targeted):
            if not hasattr(part, name):
                raise ValueError(f"AutoPGD of pyautoattack has no setting {name!r}")
            setattr(part, name, value)
    attacked = runner.run_standard_evaluation(pixels, labels, batch_size=max(1, len(pixels)))
    # Newer releases also return the labels and what was robust.
    first: Tensor = attacked[0] if isinstance(attacked, tuple) else attacked
    return first


@dataclass(frozen=True)
class Library:
    """How the attacks of a library are called.

    Attributes:
        package: its name for pip.
        run: from an attack, a module, pixels (B, C, H, W) and labels (B,) to attacked pixels.
    """

    package: str
    run: Run


LIBRARIES = {
    "foolbox": Library("foolbox", _foolbox),
    "torchattacks": Library("torchattacks", _torchattacks),
    "art": Library("adversarial-robustness-toolbox", _art),
    "autoattack": Library("pyautoattack", _autoattack),
}
"""Libraries by the name with which the text forms of their attacks begin."""

_FORM = (
    "LIBRARY:ATTACK:EPSILON[,norm=l2][,OPTION=VALUE...], such as foolbox:LinfPGD:4/255,steps=20 or "
    "autoattack:standard:4/255"
)


@dataclass(frozen=True)
class ForeignAttack:
    """An attack of another library.

    Attributes:
        library: a key of `LIBRARIES`.
        kind: its name there, such as LinfPGD; for autoattack a version (standard, plus, rand) or attacks joined by "+".
        epsilon: radius in [0, 1] units.
        norm: "linf" or "l2", in which what the library returns is checked.
        options: by name, for the library's attack; those of autoattack are settings of its AutoPGD, such as n_iter.
    """

    library: str
    kind: str
    epsilon: float
    norm: str = "linf"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES:
            raise ValueError(f"unknown library {self.library!r}; choose one of {', '.join(LIBRARIES)}")
        Ball.check(self.epsilon, self.norm)

    @classmethod
    def parse(cls, text: str) -> ForeignAttack:
        """Read the text form, such as `foolbox:LinfPGD:4/255,steps=20`.

        Values are Python literals; others are strings.

        Raises:
            ValueError: not of that form.
        """
        try:
            library, kind, rest = text.split(":", 2)
            epsilon, *pairs = rest.split(",")
            options = dict(pair.split("=", 1) for pair in pairs)
            norm = options.pop("norm", "linf")
            if not kind or norm not in NORMS:
                raise ValueError(norm)
            return cls(library, kind, float(Fraction(epsilon)), norm, tuple((k, _value(v)) for k, v in options.items()))
        except (ValueError, ArithmeticError):
            raise ValueError(f"attack {text!r} is not of the form {_FORM}") from None

    def __str__(self) -> str:
        text = f"{self.library}:{self.kind}:{radius_text(self.epsilon)}"
        if self.norm != "linf":
            text += f",norm={self.norm}"
        return text + "".join(f",{name}={value}" for name, value in self.options)

    def run(self, target: Target, pixels: Tensor, labels: Tensor, ids: Tensor, seed: int) -> Attacked:
        """Attack images with the library.

        What the library draws, and the draws of the target, are functions of the seed and of all ids: another batch is
        attacked otherwise. `gradients` are the mean over the images.

        Args:
            target: what is attacked.
            pixels: (B, C, H, W) in [0, 1].
            labels: int64 (B,).
            ids: int64 (B,), sample ids.
            seed: of the evaluation.

        Raises:
            ValueError: the library is not installed, has no such attack or option, or returns images outside of the
                ball.
        """
        if not len(ids):
            empty = torch.zeros(0, dtype=torch.bool, device=pixels.device)
            return Attacked(pixels.clone(), empty, empty.clone(), empty.long())
        key = int(derive_seeds(seed, Domain.ATTACK, ids).sum())
        model = _Drawn(target, key, pixels.device)
        with torch.inference_mode(False), torch.enable_grad(), keyed_generators(key, pixels.device):
            clean, truth = pixels.clone(), labels.clone()
            try:
                if isinstance(target, nn.Module):
                    with evaluating(target):
                        attacked = LIBRARIES[self.library].run(self, model, clean, truth)
                else:
                    attacked = LIBRARIES[self.library].run(self, model, clean, truth)
            except TypeError as error:
                raise ValueError(f"{self}: the library does not take these options: {error}") from error
        attacked = attacked.detach().to(pixels.device, pixels.dtype)
        change = (attacked - pixels).flatten(1)
        distance = change.abs().amax(dim=1) if self.norm == "linf" else change.norm(dim=1)
        outside = ~(distance <= self.epsilon + SLACK) | ~((attacked >= -SLACK) & (attacked <= 1 + SLACK)).flatten(
            1
        ).all(1)
        if bool(outside.any()):
            raise ValueError(
                f"{self} returned images outside of the ball or of [0, 1], {int(outside.sum())} of {len(outside)}: the "
                f"largest change is {float(distance.max()):g} in the norm {self.norm}; give the norm of the attack "
                "with norm=, or options that bound it"
            )
        none = torch.zeros_like(labels, dtype=torch.bool)
        spent = torch.full_like(labels, round(model.gradients / len(labels)))
        return Attacked(attacked.clamp(0, 1), none, none.clone(), spent)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


for _name in LIBRARIES:
    register_attack(_name, ForeignAttack.parse)
