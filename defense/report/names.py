"""What the tables, the pictures and the page call defenses, attacks and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from denim.defense.cells import WORST, Cell
from denim.defense.evaluation import Evaluation
from denim.defense.rows import CLEAN
from denim.defense.scores import Interval

__all__ = [
    "attacks_of",
    "by_place",
    "checks_passed",
    "counted",
    "defenses_of",
    "draws_text",
    "images_text",
    "is_derived",
    "leak_text",
    "percent",
    "short_names",
    "sigma_text",
]


def checks_passed(evaluation: Evaluation) -> str:
    """How many of the health checks passed, in words."""
    checks = [check for part in evaluation.health for check in part.checks]
    images = counted({part.num_images for part in evaluation.health}, "image")
    return f"{sum(check.passed for check in checks)} of {len(checks)} health checks passed, on {images}"


def by_place(evaluation: Evaluation) -> dict[tuple[str, str], Cell]:
    """The cells, by defense and attack."""
    return {(cell.defense, cell.attack): cell for cell in evaluation.cells}


def defenses_of(evaluation: Evaluation) -> dict[str, Cell]:
    """The first cell of every defense, by name, in order."""
    found: dict[str, Cell] = {}
    for cell in evaluation.cells:
        found.setdefault(cell.defense, cell)
    return found


def attacks_of(evaluation: Evaluation) -> list[str]:
    """Every attack once, in the order of the cells."""
    return list(dict.fromkeys(cell.attack for cell in evaluation.cells))


def is_derived(attack: str) -> bool:
    """Whether a column is not one attack: without any, or the worst of several."""
    return attack == CLEAN or attack.startswith(f"{WORST} ")


def short_names(attacks: Sequence[str]) -> dict[str, str]:
    """Names for column heads: `pgd 4/255`, with only the options in which attacks of that name and radius differ."""
    parts = {attack: attack.split(",") for attack in attacks}
    names = {}
    for attack, (head, *options) in parts.items():
        others = [other for other in parts.values() if other[0] == head]
        telling = [option for option in options if not all(option in other for other in others)]
        names[attack] = " ".join([head.replace(":", " "), *telling])
    return names


def counted(numbers: set[int], word: str) -> str:
    """Numbers and what is counted, such as "4 images" or "1 or 20 draws"."""
    text = " or ".join(str(number) for number in sorted(numbers))
    return f"{text} {word}{'' if numbers == {1} else 's'}"


def draws_text(evaluation: Evaluation) -> str:
    """How many fresh draws a score has, in words."""
    return counted({cell.scores.score_draws for cell in evaluation.cells}, "fresh draw")


def images_text(evaluation: Evaluation) -> str:
    """How many images a score has, in words."""
    return counted({cell.scores.num_images for cell in evaluation.cells}, "image")


def sigma_text(cell: Cell) -> str:
    """The noise level of a defense; "off", or a dash for what has none."""
    if cell.sigma is None:
        return "off" if cell.case == "undefended" else "–"  # noqa: RUF001
    return f"{cell.sigma:g} frozen" if cell.frozen else f"{cell.sigma:g}"


def leak_text(case: str) -> str:
    """What is added to a case whose decoder takes statistics from the attacked image; empty for others."""
    return " (statistics leak)" if case.endswith("input statistics") else ""


def percent(means: Sequence[Interval]) -> tuple[np.ndarray[Any, Any], ...]:
    """Values, lower and upper ends, in percent."""
    return tuple(100 * np.array([[mean.value, mean.low, mean.high] for mean in means]).T)
