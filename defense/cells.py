"""Records to cells: the scores of every defense under every attack, and what is doubtful about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from denim.defense.attacks import radius_text
from denim.defense.de3 import De3
from denim.defense.fingerprint import Fingerprints
from denim.defense.images import Images
from denim.defense.records import RecordColumns, Records
from denim.defense.rows import CLEAN, EvaluationSettings, Row, most_gradients
from denim.defense.scores import Interval, Scores, paired_difference, resubmission_curve, score
from denim.defense.targets import ModuleTarget, normalisation_hint

__all__ = ["WORST", "Cell", "Found", "cells_of", "warnings_about"]

Array = npt.NDArray[Any]
WORST = "worst"


@dataclass(frozen=True)
class Cell:
    """One defense under one attack.

    Attributes:
        defense: name of the defense.
        sigma: its noise level, None for off and for what is no De3.
        frozen: whether its noise is fixed and known to the attacker.
        case: what its classifier sees, see `De3.case`; "undefended" for off, "model" for what is no De3.
        attack: text form, "none", or "worst EPSILON" (per image the attack of that radius that misleads most
            confirmation draws).
        epsilon: radius in [0, 1] units, None without an attack and for an attack that states none.
        scores: accuracy on the score draws.
        difference: of the mean to the first defense under the same attack, paired over images.
        resubmission: accuracy against an attacker who may try n times, for n = 1 .. R (see `resubmission_curve`); empty
            for a defense that is not random.
        gradients: gradients of one draw that were computed for its images; of the worst attack, those of all attacks it
            is chosen from. None where the attack does not say.
        gradients_saved: how many more there would have been, had no image left a search early.
        seconds: that its images took, attack and scores, divided among the rows that were computed together. None where
            records do not say.
    """

    defense: str
    sigma: float | None
    frozen: bool
    case: str
    attack: str
    epsilon: float | None
    scores: Scores
    difference: Interval | None
    resubmission: tuple[Interval, ...] = ()
    gradients: int | None = None
    gradients_saved: int | None = None
    seconds: float | None = field(default=None, compare=False)


class _Cost(NamedTuple):
    """Of some records: gradients, those that were saved, and seconds; see `Cell`."""

    gradients: int | None
    saved: int | None
    seconds: float | None

    @classmethod
    def of(cls, row: Row, found: Found, num_classes: int | None) -> _Cost:
        """That of a row."""
        gradients, seconds = found.gradients[row.name, row.text], found.seconds[row.name, row.text]
        spent = None if (gradients < 0).any() else int(gradients.sum())
        most = None if row.attack is None or num_classes is None else most_gradients(row, num_classes)
        saved = None if spent is None or most is None else most * len(gradients) - spent
        return cls(spent, saved, None if np.isnan(seconds).any() else float(seconds.sum()))

    @classmethod
    def total(cls, costs: Sequence[_Cost]) -> _Cost:
        """That of several rows; None where one of them is."""
        return cls(*(None if None in values else sum(values) for values in zip(*costs, strict=True)))


class Found(NamedTuple):
    """The records of the images that have one in every row, in the order of their ids.

    Attributes:
        images: N of them.
        predictions: by defense and attack, uint16 (N, R), or (N, 1) of a defense that is not random.
        missed: by defense and attack, int (N,), confirmation draws; -1 where none were made.
        flags, gradients, seconds: by defense and attack, (N,), see `RecordColumns`.
    """

    images: Images
    predictions: dict[tuple[str, str], Array]
    missed: dict[tuple[str, str], Array]
    flags: dict[tuple[str, str], Array]
    gradients: dict[tuple[str, str], Array]
    seconds: dict[tuple[str, str], Array]

    @classmethod
    def of(cls, rows: Sequence[Row], records: Records, images: Images) -> Found:
        """Read them."""
        images = images.at(np.argsort(images.ids))
        columns, places = {}, {}
        for row in rows:
            cell = columns[row.name, row.text] = records.cell(row.key)
            confirmed = row.confirms and records.is_random(row.target_key) is not False
            places[row.name, row.text] = cell.find(images.digests, confirmed=confirmed)
        # Rows must have the same images: one whose file is lost during the evaluation has records in some rows only.
        whole = np.all([place >= 0 for place in places.values()], axis=0)
        found = {key: cell.at(places[key][whole]) for key, cell in columns.items()}
        return cls(
            images.at(whole),
            *(
                {key: getattr(cell, name) for key, cell in found.items()}
                for name in ("predictions", "missed", "flags", "gradients", "seconds")
            ),
        )


def cells_of(
    rows: Sequence[Row], found: Found, settings: EvaluationSettings, num_classes: int | None
) -> tuple[Cell, ...]:
    """Scores of every defense under every attack, then under the worst attack of every radius.

    Args:
        rows: all.
        found: their records.
        settings: of the evaluation.
        num_classes: of the defenses; None where it is not known.

    Raises:
        ValueError: a prediction or a label is no class.
    """
    labels, draws = found.images.labels, int(settings.score_draws)
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    cells: list[Cell] = []
    reference: dict[str, Array] = {}
    for name, own in by_name.items():
        target = own[0].target
        predictions = {
            row.text: np.broadcast_to(found.predictions[name, row.text], (len(labels), draws)) for row in own
        }
        costs = {row.text: _Cost.of(row, found, num_classes) for row in own}
        columns = [
            (row.text, None if row.radius is None else row.radius[1], predictions[row.text], costs[row.text])
            for row in own
        ]
        for radius in dict.fromkeys(row.radius for row in own if row.confirms):
            assert radius is not None
            candidates = [row.text for row in own if row.radius == radius]
            missed = {text: _missed(found, name, text, labels, draws) for text in candidates}
            # argmax takes the first of equal ones: the attack that misleads most draws of all images.
            candidates.sort(key=lambda text: -missed[text].sum())
            worst = np.argmax([missed[text] for text in candidates], axis=0)
            chosen = np.empty((len(labels), draws), np.uint16)
            for place, text in enumerate(candidates):
                chosen[worst == place] = predictions[text][worst == place]
            norm = "" if radius[0] == "linf" else f"{radius[0]} "
            total = _Cost.total([costs[text] for text in candidates])
            columns.append((f"{WORST} {norm}{radius_text(radius[1])}", radius[1], chosen, total))
        sigma = getattr(target, "sigma", None)
        case = str(getattr(target, "case", ModuleTarget.case))
        for text, epsilon, classes, cost in columns:
            shares = (classes == labels[:, None]).mean(axis=1)
            first = reference.setdefault(text, shares)
            cells.append(
                Cell(
                    name,
                    sigma,
                    bool(getattr(target, "is_frozen", False)),
                    "undefended" if isinstance(target, De3) and sigma is None else case,
                    text,
                    epsilon,
                    score(classes, labels, num_classes),
                    None if first is shares or len(labels) < 2 else paired_difference(shares, first),
                    resubmission_curve(classes, labels, num_classes) if target.is_random else (),
                    *cost,
                )
            )
    return tuple(cells)


def _missed(found: Found, name: str, text: str, labels: Array, draws: int) -> Array:
    """Confirmation draws that miss, int (N,): of a defense that is not random, all or none, as its answer is."""
    missed, predictions = found.missed[name, text], found.predictions[name, text]
    return np.where(missed < 0, draws * (predictions[:, 0] != labels), missed)


def warnings_about(rows: Sequence[Row], found: Found, cells: Sequence[Cell], fingerprints: Fingerprints) -> list[str]:
    """Warnings of the checks that tell a failed attack from a robust defense (docs/method.md, "Health checks")."""
    targets = {row.name: row.target for row in rows}
    notes = []
    for name, target in targets.items():
        if hint := normalisation_hint(target):
            notes.append(f"{name}: {hint}")
    count = len(found.images)
    for (name, text), flags in found.flags.items():
        zero = int(np.count_nonzero(flags & RecordColumns.ZERO_GRADIENT))
        bad = int(np.count_nonzero(flags & RecordColumns.BAD_GRADIENT))
        if bad or zero > count / 20:
            notes.append(
                f"{name} under {text}: the gradient was zero at some step for {zero} and not finite for {bad} of "
                f"{count} images; the attack is weaker than it looks (docs/method.md, health checks)"
            )
    by_place = {(cell.defense, cell.attack): cell for cell in cells}
    attacks = dict.fromkeys(cell.attack for cell in cells if cell.attack != CLEAN)
    for name, frozen in targets.items():
        for twin, random in targets.items():
            if not _is_frozen_twin(frozen, random, fingerprints):
                continue
            pairs = {text: (by_place[name, text].scores.mean, by_place[twin, text].scores.mean) for text in attacks}
            below = {text: other.value - own.value for text, (own, other) in pairs.items() if own.high < other.low}
            if below:
                most = max(below, key=below.__getitem__)
                share = f"{len(below)} of {len(pairs)} attacks, most under " if len(below) > 1 else ""
                own, other = pairs[most]
                notes.append(
                    f"{name} is less accurate than {twin}, whose noise is random, under {share}{most} ({own} against "
                    f"{other}): randomness, not denoising, carries the difference (docs/method.md, health checks)"
                )
    return notes


def _is_frozen_twin(frozen: Any, random: Any, fingerprints: Fingerprints) -> bool:
    """Whether two defenses differ in nothing but that the noise of the first is fixed."""
    if not (isinstance(frozen, De3) and isinstance(random, De3) and frozen.is_frozen and not random.is_frozen):
        return False
    settings = ("case", "sigma", "mask_ratio", "draws", "aggregate")
    return all(getattr(frozen, key) == getattr(random, key) for key in settings) and all(
        fingerprints.of(getattr(frozen, key)) == fingerprints.of(getattr(random, key))
        for key in ("classifier", "denoiser")
    )
