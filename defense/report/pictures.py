"""Pictures of an evaluation: accuracy against the noise level, and against the number of tries."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from denim.defense.attacks import Attack, radius_text
from denim.defense.cells import WORST, Cell
from denim.defense.evaluation import Evaluation
from denim.defense.report.names import attacks_of, by_place, defenses_of, draws_text, images_text, percent, short_names
from denim.defense.rows import CLEAN
from denim.defense.scores import Interval
from denim.nim.files import atomic_write
from denim.nim.text import printable

__all__ = [
    "DASHES",
    "DPI",
    "MARKERS",
    "PALETTE",
    "Curve",
    "Strength",
    "curves",
    "resubmissions",
    "series",
    "strength",
    "strengths",
    "tradeoff",
    "written_picture",
]

# Okabe and Ito (2008), "Color Universal Design", without yellow, which is hard to see on white.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


MARKERS = "os^DvPX<>*"


DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")


DPI = 160

# Beyond these numbers a picture changes, or it could not be read: bands hide the lines, and names need more room.
MOST_BANDS, MOST_COLUMNS, MOST_BESIDE = 16, 12, 12


@dataclass(frozen=True)
class Curve:
    """Mean accuracy by noise level, of the random defenses of one case under one attack.

    Attributes:
        case: see `De3.case`; with the names of the defenses where some of that case share a level.
        attack: text form, as in `Cell`.
        sigmas: ascending noise levels in 0-255 pixel levels.
        means: accuracy in [0, 1], one for each level.
    """

    case: str
    attack: str
    sigmas: tuple[float, ...]
    means: tuple[Interval, ...]


def curves(evaluation: Evaluation) -> tuple[Curve, ...]:
    """Curves of the trade-off, of at least two levels each: by case in order of appearance, then by attack."""
    cells = by_place(evaluation)
    return tuple(
        Curve(case, attack, tuple(names), tuple(cells[name, attack].scores.mean for name in names.values()))
        for case, names in series(evaluation).items()
        for attack in attacks_of(evaluation)
    )


def series(evaluation: Evaluation) -> dict[str, dict[float, str]]:
    """By case, the random defenses by ascending level, where there are at least two."""
    found: dict[tuple[str, int], dict[float, str]] = {}
    for name, cell in defenses_of(evaluation).items():
        if cell.sigma is not None and not cell.frozen:
            place = 0
            while cell.sigma in found.get((cell.case, place), {}):
                place += 1
            found.setdefault((cell.case, place), {})[cell.sigma] = name
    return {
        f"{case} ({', '.join(names.values())})" if (case, 1) in found else case: dict(sorted(names.items()))
        for (case, _), names in found.items()
        if len(names) > 1
    }


def tradeoff(evaluation: Evaluation) -> Figure:
    """The trade-off as a picture: accuracy in percent against sigma, one line per case and attack with its 95 % band.

    Defenses that are on no curve (off, frozen, or the only level of their case) stand in a panel beside it, by name;
    more than 12 of them in one below it, a line for each. More than 16 curves have no bands.
    """
    attacks, cells = attacks_of(evaluation), by_place(evaluation)
    drawn, cases = curves(evaluation), list(series(evaluation))
    on_curves = {name for names in series(evaluation).values() for name in names.values()}
    references = [name for name in defenses_of(evaluation) if name not in on_curves]
    looks = _looks(attacks)
    below = len(references) > MOST_COLUMNS
    wide = 7.0 if below else 4.6
    widths = [wide] * bool(drawn) + [max(1.3 if drawn else 3.6, 0.4 + 0.9 * len(references))] * bool(references)
    heights = [4.0] * bool(drawn) + [0.6 + 0.34 * len(references)] * bool(references)
    size = (wide + 2.6, sum(heights)) if below else (sum(widths) + 1.9, 4.0)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    if below:
        grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    else:
        grid = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)
    panels = list(grid.flat)
    for axes in panels:
        axes.set_ylim(-3, 103)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    if drawn or not below:
        panels[0].set_ylabel("accuracy (%)")
    if drawn:
        axes = panels[0]
        for curve in drawn:
            look = {**looks[curve.attack], "linestyle": DASHES[cases.index(curve.case) % len(DASHES)]}
            value, low, high = percent(curve.means)
            if len(drawn) <= MOST_BANDS:
                axes.fill_between(curve.sigmas, low, high, color=look["color"], alpha=0.15, linewidth=0)
            axes.plot(curve.sigmas, value, linewidth=1.6, **look)
        levels = sorted({sigma for curve in drawn for sigma in curve.sigmas})
        if np.diff(levels).min() >= np.ptp(levels) / 14:
            axes.set_xticks(levels, [f"{level:g}" for level in levels])
        axes.set_xlabel(r"noise level $\sigma$ (0-255 pixel levels)")
    if references:
        axes = panels[-1]
        for i, attack in enumerate(attacks):
            means = [cells[name, attack].scores.mean for name in references]
            value, low, high = percent(means)
            # Rounding can put the end of an interval at 0 or 1 on the wrong side of its value.
            bars = np.stack([value - low, high - value]).clip(min=0)
            # Beside each other: at one place, the attacks on a defense would hide one another.
            places = np.arange(len(references)) + 0.7 * ((i + 0.5) / len(attacks) - 0.5)
            if below:
                axes.errorbar(value, places, xerr=bars, linestyle="none", **looks[attack])
            else:
                axes.errorbar(places, value, yerr=bars, capsize=2, linestyle="none", **looks[attack])
        if below:
            labels = [_tick(name, cells[name, attacks[0]], 40) for name in references]
            axes.set_yticks(range(len(references)), labels, fontsize=7)
            axes.set_ylim(len(references) - 0.5, -0.5)
            axes.set_xlim(-3, 103)
            axes.set_xlabel("accuracy (%)")
        else:
            labels = [_tick(name, cells[name, attacks[0]]) for name in references]
            axes.set_xticks(range(len(references)), labels, fontsize=8)
            axes.set_xlim(-0.5, len(references) - 0.5)
        if drawn:
            axes.set_title("references", loc="left", fontsize=9)
    panels[0].set_title(
        f"mean of {draws_text(evaluation)}, {images_text(evaluation)}, 95% intervals", loc="left", fontsize=9
    )
    names = short_names(attacks)
    handles = [Line2D([], [], label=names[attack], **looks[attack]) for attack in attacks]
    if len(cases) > 1:
        handles += [
            Line2D([], [], color="0.4", linestyle=DASHES[i % len(DASHES)], label=textwrap.fill(case, 28))
            for i, case in enumerate(cases)
        ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def resubmissions(evaluation: Evaluation) -> Figure:
    """Accuracy in percent against the tries of an attacker who may resubmit: a panel for each random defense.

    Each line is an attack, with its 95 % band, beside clean images. A defense of the same case and level whose noise is
    frozen, for which tries make no difference, is a broken line across the panel.
    """
    attacks, cells = attacks_of(evaluation), by_place(evaluation)
    defenses = defenses_of(evaluation)
    random = [name for name in defenses if cells[name, attacks[0]].resubmission]
    looks = _looks(attacks)
    columns = min(4, len(random))
    rows = -(-len(random) // columns)
    figure = Figure(figsize=(2.6 * columns + 2.4, 2.5 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(random) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, random, strict=False):
        own = defenses[name]
        twins = [
            other
            for other, cell in defenses.items()
            if cell.frozen and (cell.case, cell.sigma) == (own.case, own.sigma)
        ]
        for attack in attacks:
            look = looks[attack] | {"marker": ""}
            curve = cells[name, attack].resubmission
            value, low, high = percent(curve)
            tries = np.arange(1, len(curve) + 1)
            axes.fill_between(tries, low, high, color=look["color"], alpha=0.15, linewidth=0)
            axes.plot(tries, value, linewidth=1.6, **look)
            for twin in twins:
                accuracy = 100 * cells[twin, attack].scores.mean.value
                axes.axhline(accuracy, linewidth=1, linestyle="--", color=look["color"], alpha=0.8)
        axes.set_title(_tick(name, own), fontsize=8)
        axes.set_ylim(-3, 103)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("tries", fontsize=10)
    figure.supylabel("accuracy (%)", fontsize=10)
    names = short_names(attacks)
    handles = [Line2D([], [], label=names[attack], color=looks[attack]["color"]) for attack in attacks]
    if any(cell.frozen for cell in defenses.values()):
        handles.append(Line2D([], [], color="0.4", linestyle="--", label="frozen noise"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


@dataclass(frozen=True)
class Strength:
    """Attacks that differ in the value of one option alone, of at least two values.

    Attributes:
        option: "epsilon" (0 is clean images), "steps" or "eot".
        attacks: text forms by ascending value.
    """

    option: str
    attacks: dict[float, str]


def strengths(evaluation: Evaluation) -> tuple[Strength, ...]:
    """The attacks of an evaluation by which it can be seen what radius, steps or draws make of the accuracy."""
    parsed: dict[str, Attack] = {}
    for text in attacks_of(evaluation):
        with contextlib.suppress(ValueError):  # no attack, the worst of several, or one of another library
            parsed[text] = Attack.parse(text)
    found = []
    for option in ("epsilon", "steps", "eot"):
        groups: dict[Attack, dict[float, str]] = {}
        for text, attack in parsed.items():
            alike: dict[str, Any] = {option: 1}
            groups.setdefault(replace(attack, **alike), {})[getattr(attack, option)] = text
        for attacks in groups.values():
            if len(attacks) > 1:
                clean = {0.0: CLEAN} if option == "epsilon" and CLEAN in attacks_of(evaluation) else {}
                found.append(Strength(option, clean | dict(sorted(attacks.items()))))
    return tuple(found)


def strength(evaluation: Evaluation) -> Figure:
    """Accuracy in percent against radius, steps and draws of attacks that differ in these: a line for each defense."""
    drawn, cells, defenses = strengths(evaluation), by_place(evaluation), defenses_of(evaluation)
    looks = _looks(list(defenses))
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    # Many names go below, in two columns.
    below = len(defenses) > MOST_BESIDE
    names_height = 0.2 * -(-len(defenses) // 2) if below else 0
    size = (max(9.0, 3.4 * columns) if below else 3.4 * columns + 2.2, 3.0 * rows + 0.4 + names_height)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        axes.set_visible(False)
    labels = {"epsilon": "radius (pixel values in [0, 1])", "steps": "steps", "eot": "draws for a gradient (EOT)"}
    for axes, group in zip(grid.flat, drawn, strict=False):
        values = list(group.attacks)
        for name in defenses:
            value, low, high = percent([cells[name, text].scores.mean for text in group.attacks.values()])
            if len(defenses) <= MOST_BANDS:
                axes.fill_between(values, low, high, color=looks[name]["color"], alpha=0.15, linewidth=0)
            axes.plot(values, value, linewidth=1.6, **looks[name])
        attack = Attack.parse(list(group.attacks.values())[-1])
        fixed = {"epsilon": radius_text(attack.epsilon), "steps": f"steps={attack.steps}", "eot": f"eot={attack.eot}"}
        fixed.pop(group.option)
        axes.set_title(" ".join([attack.name, *fixed.values()]), fontsize=9)
        axes.set_xlabel(labels[group.option])
        if group.option != "epsilon":
            axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_ylim(-3, 103)
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy (%)")
    width = 48 if below else 13
    handles = [Line2D([], [], label=_tick(name, cell, width), **looks[name]) for name, cell in defenses.items()]
    place = {"loc": "outside lower center", "ncols": 2} if below else {"loc": "outside right upper"}
    figure.legend(handles=handles, frameon=False, fontsize=8, **place)
    return figure


def _looks(attacks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every attack or defense; the worst of several is a ring, often on top of one."""
    colours: Sequence[Any] = PALETTE
    if len(attacks) > len(PALETTE):
        colours = list(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(attacks))))
    looks: dict[str, dict[str, Any]] = {}
    for i, attack in enumerate(attacks):
        looks[attack] = {"color": colours[i], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        if attack.startswith(f"{WORST} "):
            looks[attack] |= {"marker": "o", "markersize": 9, "markerfacecolor": "none"}
    return looks


def _tick(name: str, cell: Cell, width: int = 13) -> str:
    """A name in lines of a width, at most four, and its level."""
    lines = textwrap.wrap(printable(name), width, max_lines=max(1, 52 // width)) or [""]
    if cell.sigma is not None:
        level = f"(\u03c3 {cell.sigma:g}{', frozen' if cell.frozen else ''})"
        lines = [*lines[:-1], f"{lines[-1]} {level}"] if width > 13 else [*lines, level]
    # matplotlib reads a pair of dollar signs as mathematics.
    return "\n".join(lines).replace("$", r"\$")


def written_picture(figure: Figure, file: Path) -> bytes:
    """Write a figure in the format of the name\'s ending; returns the content."""
    picture = io.BytesIO()
    form = file.suffix[1:]
    # Without dates and random names the same numbers give the same bytes.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    with matplotlib.rc_context({"svg.hashsalt": "denim"}):
        figure.savefig(picture, format=form, dpi=DPI, metadata=metadata)
    with atomic_write(file) as staged:
        staged.write_bytes(picture.getvalue())
    return picture.getvalue()
