"""What is computed: the settings of an evaluation, and its rows, each one defense under one attack."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

from denim.defense.attacks import Attack, AttackMethod, parse_attack
from denim.defense.de3 import De3
from denim.defense.fingerprint import Fingerprints
from denim.defense.targets import OBJECT, import_object
from denim.kernels.seeds import check_seed
from denim.nim.precision import check_precision

__all__ = ["CLEAN", "EvaluationSettings", "Row", "key_of", "most_gradients", "open_attack", "rows_of"]

CLEAN = "none"
# Beside the code of a model and its weights, what records depend on.
PACKAGES = ("torch", "timm", "denim-vision")


def open_attack(text: str) -> tuple[str, AttackMethod]:
    """An attack by its text form, and that form with all that it leaves out.

    Args:
        text: see `parse_attack`; or `package.module:Class`, which is called without arguments and gives an
            `AttackMethod`.

    Raises:
        ValueError: no such form, or no such class.
        TypeError: what it gives has no such method.
    """
    if OBJECT.fullmatch(text) is None:
        attack = parse_attack(text)
        return str(attack), attack
    found = import_object(text)
    made = found() if isinstance(found, type) or inspect.isfunction(found) else found
    if not callable(getattr(made, "run", None)):
        raise TypeError(f"{text} must have a method run(target, pixels, labels, ids, seed), and has none")
    return text, made


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        attacks: text forms of attacks, see `open_attack`; a row without an attack is always added.
        score_draws: R, fresh draws per image for the score, and again for the confirmation; "auto" chooses as few as
            the width of the intervals allows, on the first images (docs/method.md, "Number of draws").
        seed: of the evaluation.
        max_batch: images that go through the networks in one pass; bounds memory. At least one image, with all draws of
            a gradient of the attack, is in a pass. It is halved where memory does not suffice.
        examples: images that are kept for the gallery.
        precision: of the networks, in attacks and scores: fp32, tf32, bf16 or auto (see `resolve_precision`). What it
            means on the device of the first defense is recorded.
        compile: compile each transformer block of Denim's models with torch.compile; None does so on CUDA. Records do
            not tell it: results agree to rounding.
        health_images: images on which every defense is checked (see `denim.defense.health`); 0 leaves the checks out.
        keep_attacked: keep all attacked images in the folder, see `denim.defense.load_attacked`.
    """

    attacks: tuple[str, ...]
    score_draws: int | Literal["auto"] = 20
    seed: int = 0
    max_batch: int = 256
    examples: int = 6
    precision: str = "fp32"
    compile: bool | None = None
    health_images: int = 16
    keep_attacked: bool = False

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_seed(self.seed)
        for name in ("examples", "health_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if isinstance(self.score_draws, str) and self.score_draws != "auto":
            raise ValueError(f'score_draws must be a number or "auto", got {self.score_draws!r}')
        for name in ("score_draws", "max_batch"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        names = [open_attack(attack)[0] for attack in self.attacks]
        if len(set(names)) < len(names):
            raise ValueError(f"attacks must differ, got {', '.join(names)}")


class Row(NamedTuple):
    """One defense under one attack, and the keys of its records.

    Attributes:
        name: of the defense.
        target: the defense.
        target_key: its fingerprint.
        text: of the attack.
        attack: None for clean images.
        radius: of the attack, with its norm; None without one.
        key: of the records.
        confirms: whether its confirmation draws are read: another attack has the same radius.
    """

    name: str
    target: Any
    target_key: bytes
    text: str
    attack: Any
    radius: tuple[str, float] | None
    key: bytes
    confirms: bool


def rows_of(targets: Mapping[str, Any], settings: EvaluationSettings, fingerprints: Fingerprints) -> list[Row]:
    """Every defense without an attack, then under every attack.

    Raises:
        ValueError: an attack on the classifier behind a De3, and a defense that is none.
    """
    attacks: list[tuple[str, Any]] = [(CLEAN, None), *map(open_attack, settings.attacks)]
    radii = [_radius(attack) for _, attack in attacks]
    shared = (settings.seed, settings.score_draws, settings.precision)
    rows = []
    for name, target in targets.items():
        target_key = fingerprints.of(target)
        for (text, attack), radius in zip(attacks, radii, strict=True):
            if getattr(attack, "gray", False) and not isinstance(target, De3):
                raise ValueError(
                    f"{text} attacks the classifier behind a De3, and {name} is none: leave `gray` out, or evaluate "
                    "the two apart"
                )
            key = key_of(target_key, fingerprints.of(attack), text, *shared)
            confirms = radius is not None and radii.count(radius) > 1
            rows.append(Row(name, target, target_key, text, attack, radius, key, confirms))
    return rows


def most_gradients(row: Row, num_classes: int) -> int | None:
    """Gradients of one draw that an image costs at most; None where the attack does not say.

    Args:
        row: of the image.
        num_classes: of the defense.
    """
    if row.attack is None:
        return 0
    if not isinstance(row.attack, Attack):
        return None
    attacked = De3(None, row.target.classifier, None) if row.attack.gray else row.target
    return row.attack.most_gradients(attacked.is_random, num_classes)


def key_of(target: bytes, attack: bytes, *parts: object) -> bytes:
    """Digest of all that something is computed from.

    Args:
        target, attack: fingerprints.
        parts: whatever else, by `repr`; the versions of `PACKAGES` are added.
    """
    digest = hashlib.blake2b(target + attack, digest_size=16)
    digest.update(repr((*parts, *map(version, PACKAGES))).encode("utf-8", "surrogatepass"))
    return digest.digest()


def _radius(attack: Any) -> tuple[str, float] | None:
    epsilon = getattr(attack, "epsilon", None)
    return None if epsilon is None else (str(getattr(attack, "norm", "linf")), float(epsilon))
