"""The HTML page of an evaluation, which needs no other file and no network: what goes into its template, page.html."""

from __future__ import annotations

import base64
import csv
import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import torch.nn.functional as F
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from denim.defense.cells import WORST, Cell
from denim.defense.evaluation import Evaluation
from denim.defense.gallery import Examples
from denim.defense.report.names import (
    attacks_of,
    by_place,
    checks_passed,
    counted,
    defenses_of,
    draws_text,
    images_text,
    is_derived,
    leak_text,
    short_names,
    sigma_text,
)
from denim.defense.report.pictures import series
from denim.defense.report.tables import csv_row, latex, markdown
from denim.defense.rows import CLEAN
from denim.nim.progress import clock_text
from denim.nim.text import printable

__all__ = ["html_page"]

GALLERY_VALUES = 12_000_000  # numbers in the gallery's pictures; about 16 MB of base64 where none compresses
SMALL, LARGE = 80, 128  # CSS pixels: smaller images are enlarged to about the first, larger ones shrunk to the second


@functools.cache
def _template() -> jinja2.Template:
    def shown(value: Any) -> Any:
        """Names of classes may hold bytes that are not UTF-8, which no page can."""
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("denim.defense.report", "."),
        autoescape=True,
        finalize=shown,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("page.html")


def html_page(
    evaluation: Evaluation,
    title: str,
    command: str,
    data: str,
    curve: Figure,
    pictures: Mapping[str, bytes],
) -> str:
    """The page.

    Args:
        evaluation: what `evaluate` returned.
        title: heading.
        command: that made the evaluation; empty if unknown.
        data: where the images come from; empty if unknown.
        curve: the picture of the trade-off, drawn.
        pictures: PNGs by name: tradeoff, that picture, and where they exist strength and resubmission.
    """
    own = [cell for cell in evaluation.cells if not cell.attack.startswith(f"{WORST} ")]
    timed = bool(own) and all(cell.seconds is not None for cell in own)
    spent, saved = (sum(getattr(cell, key) or 0 for cell in own) for key in ("gradients", "gradients_saved"))
    strips = _Strips()
    content = {
        "title": title,
        "command": command,
        "data": data,
        "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "seconds": clock_text(sum(cell.seconds or 0 for cell in own)) if timed else "",
        "spent": f"{spent:,}" if spent else "",
        "saved": f"{saved:,}",
        "counts": {
            "defenses": counted({len(defenses_of(evaluation))}, "defense"),
            "images": images_text(evaluation),
            "draws": draws_text(evaluation),
        },
        "settings": evaluation.settings,
        "versions": ", ".join(f"{package} {version}" for package, version in evaluation.versions.items()),
        "attacks": short_names(attacks_of(evaluation)),
        "attacked": [attack for attack in attacks_of(evaluation) if not is_derived(attack)],
        "clean": CLEAN,
        "warnings": [_with_references(warning) for warning in evaluation.warnings],
        "health": evaluation.health,
        "health_summary": checks_passed(evaluation) if evaluation.health else "",
        "tables": list(_tables(evaluation)),
        "files": _files(evaluation),
        "tradeoff": _data_uri("image/png", pictures["tradeoff"]),
        "points": _points(evaluation, curve),
        "strength": _data_uri("image/png", pictures["strength"]) if "strength" in pictures else None,
        "tries": _tries(evaluation, pictures["resubmission"]) if "resubmission" in pictures else None,
        "gallery": _gallery(evaluation, strips),
        "strips": strips.pictures,
    }
    return _template().render(content)


def _with_references(warning: str) -> list[tuple[str, bool]]:
    """Parts of a warning, and whether each is a reference to the documentation.

    A link into the documentation would not work from a folder of results, so the page has an explanation of its own.
    """
    parts = re.split(r"(docs/[\w./-]+\.md(?:, [\w ]+)?)", warning)
    return [(part, place % 2 == 1) for place, part in enumerate(parts) if part]


def _tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Tables of defenses by attacks: that of the means, then all others."""
    first = next(iter(defenses_of(evaluation)))
    kinds: list[tuple[str, Callable[[Cell], str]]] = [
        ("Mean accuracy in percent", lambda cell: str(cell.scores.mean)),
        ("Majority vote of the draws", lambda cell: str(cell.scores.vote)),
        ("Images that every draw gets right (worst of R)", lambda cell: str(cell.scores.worst)),
        (f"Difference of the mean to {first}, paired over images", _difference),
    ]
    if any(cell.gradients or cell.seconds is not None for cell in evaluation.cells):
        kinds.append(("What it cost: gradients of one draw, those saved by leaving early, and seconds", _costs))
    attacks, cells = attacks_of(evaluation), by_place(evaluation)
    names = short_names(attacks)

    def row(name: str, cell: Cell, of: Callable[[Cell], str]) -> dict[str, Any]:
        values = []
        for attack in attacks:
            scores = cells[name, attack].scores
            hover = f"{name}, {names[attack]}: mean {scores.mean}, vote {scores.vote}, worst of R {scores.worst}"
            values.append({"text": _divided(of(cells[name, attack])), "hover": hover})
        leaks = bool(leak_text(cell.case))
        return {"name": name, "sigma": sigma_text(cell), "case": cell.case, "leaks": leaks, "cells": values}

    return [
        {"caption": caption, "rows": [row(name, cell, of) for name, cell in defenses_of(evaluation).items()]}
        for caption, of in kinds
    ]


def _divided(text: str) -> tuple[str, str]:
    """A value, and what follows it after a space, such as its interval."""
    value, _, rest = text.partition(" ")
    return value, rest


def _difference(cell: Cell) -> str:
    if cell.difference is None:
        return "–"  # noqa: RUF001
    value, low, high = (100 * x for x in (cell.difference.value, cell.difference.low, cell.difference.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _costs(cell: Cell) -> str:
    spent = "–" if cell.gradients is None else f"{cell.gradients:,}"  # noqa: RUF001
    parts = [] if not cell.gradients_saved else [f"{cell.gradients_saved:,} saved"]
    if cell.seconds is not None:
        parts.append(f"{cell.seconds:.1f} s")
    return f"{spent} {', '.join(parts)}"


def _files(evaluation: Evaluation) -> dict[str, dict[str, str]]:
    """The tables as files within the page, with rounded numbers, by the name of the format."""
    handle = io.StringIO()
    rows = [
        {key: f"{value:.4f}" if isinstance(value, float) else value for key, value in csv_row(cell).items()}
        for cell in evaluation.cells
    ]
    writer = csv.DictWriter(handle, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    texts = {
        "CSV": ("csv", handle.getvalue()),
        "Markdown": ("md", markdown(evaluation)),
        "LaTeX": ("tex", latex(evaluation)),
    }
    return {
        name: {
            "ending": ending,
            "uri": _data_uri("text/plain;charset=utf-8", text.encode("utf-8", "backslashreplace")),
        }
        for name, (ending, text) in texts.items()
    }


def _points(evaluation: Evaluation, figure: Figure) -> list[dict[str, str]]:
    """Marks over the picture of the trade-off that show their number when they are pointed at; the figure is drawn."""
    cells, attacks = by_place(evaluation), attacks_of(evaluation)
    by_case = series(evaluation)
    places: list[tuple[Any, tuple[float, float], str, str]] = []
    panels = list(figure.axes)
    for names in by_case.values():
        places += [
            (panels[0], (sigma, 100 * cells[name, attack].scores.mean.value), name, attack)
            for sigma, name in names.items()
            for attack in attacks
        ]
    on_curves = {name for names in by_case.values() for name in names.values()}
    references = [name for name in defenses_of(evaluation) if name not in on_curves]
    for attack, bars in zip(attacks, panels[-1].containers, strict=bool(references)):
        points: Any = bars[0]
        places += [(panels[-1], xy, name, attack) for xy, name in zip(points.get_xydata(), references, strict=True)]
    short = short_names(attacks)
    width, height = figure.bbox.width, figure.bbox.height
    marks = []
    for axes, place, name, attack in places:
        mean = cells[name, attack].scores.mean
        across, up = axes.transData.transform(place)
        left, top = f"{100 * across / width:.2f}", f"{100 - 100 * up / height:.2f}"
        marks.append({"left": left, "top": top, "text": f"{name}, {short[attack]}: {mean}"})
    return marks


def _tries(evaluation: Evaluation, picture: bytes) -> dict[str, Any]:
    """Accuracy against the number of tries: the picture, and some of the numbers."""
    numbers = _numbers_of_tries(max(len(cell.resubmission) for cell in evaluation.cells))
    attacks, cells = attacks_of(evaluation), by_place(evaluation)
    names = short_names(attacks)
    rows = [
        {"name": name, "attack": names[attack], "accuracies": [_divided(str(curve[n - 1])) for n in numbers]}
        for name in defenses_of(evaluation)
        for attack in attacks
        if (curve := cells[name, attack].resubmission)
    ]
    return {"picture": _data_uri("image/png", picture), "numbers": numbers, "rows": rows}


def _numbers_of_tries(draws: int) -> list[int]:
    """Numbers of tries for a table: 1, 2, 5, 10, 20, 50, ..., and the last."""
    found = [digit * 10**power for power in range(len(str(draws))) for digit in (1, 2, 5)]
    return [n for n in found if n < draws] + [draws]


def _data_uri(kind: str, content: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}")


class _Strips:
    """Rows of images as PNGs in the style sheet, where places that show the same row share it.

    Attributes:
        pictures: as URIs, by their CSS class.
    """

    def __init__(self) -> None:
        self.pictures: dict[str, Markup] = {}
        self._names: dict[bytes, str] = {}

    def add(self, images: Tensor) -> str:
        """CSS class of a strip of (N, C, H, W) images side by side, clipped to [0, 1], with white gaps between."""
        images = images.clamp(0, 1)
        if images.shape[1] not in (1, 3):
            images = images.mean(dim=1, keepdim=True)
        images = F.pad(images, (0, _gap(images)), value=1.0)
        pixels = (images * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
        name = self._names.setdefault(file.getvalue(), f"strip-{len(self._names)}")
        self.pictures[name] = _data_uri("image/png", file.getvalue())
        return name


def _gap(images: Tensor) -> int:
    return max(1, images.shape[-1] // 16)


def _gallery(evaluation: Evaluation, strips: _Strips) -> dict[str, Any] | None:
    """The gallery, by defense and attack; None without examples."""
    kept = {place: examples for place, examples in evaluation.examples.items() if len(examples.labels)}
    if not kept:
        return None
    first = next(iter(kept.values()))
    available = len(first.labels)
    # attacked, difference, noisy, denoised; the clean row is shared.
    needed = 4 * len(kept) * first.clean[0].numel()
    count = max(1, min(available, GALLERY_VALUES // needed))
    cells, names = by_place(evaluation), short_names(attacks_of(evaluation))
    defenses = {name: cell for name, cell in defenses_of(evaluation).items() if any(name == n for n, _ in kept)}
    opened, telling = _telling(kept, defenses, cells, count)
    parts = []
    for name, cell in defenses.items():
        attacks = [attack for attack in names if (name, attack) in kept]
        strongest = min(attacks, key=lambda attack: (attack == CLEAN, cells[name, attack].scores.mean.value))
        strongest = telling if name == opened else strongest
        shown = [
            {
                "name": names[attack],
                "mean": str(cells[name, attack].scores.mean),
                "open": attack == strongest,
                "pictures": _pictures(kept[name, attack], count, evaluation.classes, strips)
                | {"where": f"{name}, {attack}"},
            }
            for attack in attacks
        ]
        sigma = f"sigma {sigma_text(cell)}" if cell.sigma is not None else "off"
        parts.append({"name": name, "sigma": sigma, "case": cell.case, "open": name == opened, "attacks": shown})
    return {"shown": counted({count}, "image"), "kept": available, "parts": parts}


def _telling(
    kept: dict[tuple[str, str], Examples], defenses: dict[str, Cell], cells: dict[tuple[str, str], Cell], count: int
) -> tuple[str, str]:
    """The place at which the gallery opens: attacked and defended, with images that are right and some that are not."""

    def rank(place: tuple[str, str]) -> tuple[bool, bool, bool, int, float]:
        name, attack = place
        right = (kept[place].predictions == kept[place].labels)[:count]
        says = bool(right.any()) and not bool(right.all())
        is_defended = bool(defenses[name].sigma) and not defenses[name].frozen
        accuracy = cells[place].scores.mean.value
        return attack == CLEAN, not is_defended, not says, list(defenses).index(name), accuracy

    return min(kept, key=rank)


def _pictures(examples: Examples, count: int, classes: Sequence[str], strips: _Strips) -> dict[str, Any]:
    """One table: columns are images, rows the stages that they go through."""
    labels = [int(label) for label in examples.labels[:count]]
    attacked = not bool((examples.attacked == examples.clean).all())
    stages = [("clean", examples.clean[:count]), ("attacked", examples.attacked[:count])]
    if attacked:
        change = (examples.attacked - examples.clean)[:count]
        gain = min(10.0, 0.5 / max(float(change.abs().max()), 1e-6))
        stages.append((f"difference \u00d7 {gain:.3g}", 0.5 + gain * change))
    stages += [("noisy", examples.noisy[:count]), ("denoised", examples.denoised[:count])]
    rows_high, columns_wide = examples.clean.shape[-2:]
    side = max(rows_high, columns_wide)
    factor = max(1, SMALL // side) if side <= LARGE else LARGE / side

    def predictions(head: str, values: Tensor) -> dict[str, Any]:
        pairs = zip(values[:count].tolist(), labels, strict=True)
        return {"head": head, "strip": "", "predictions": [(_class_name(classes, v), v == label) for v, label in pairs]}

    rows: list[dict[str, Any]] = []
    shown: set[str] = set()
    for stage, images in stages:
        strip = strips.add(images)
        if strip in shown:
            continue
        shown.add(strip)
        rows.append({"head": stage, "strip": strip, "predictions": []})
        if stage == "clean" and attacked:
            rows.append(predictions("clean taken for", examples.clean_predictions))
    rows.append(predictions("attacked taken for" if attacked else "taken for", examples.predictions))
    width = factor * (columns_wide + _gap(examples.clean))
    return {
        "labels": [_class_name(classes, label) for label in labels],
        "width": f"{width:g}",
        "whole": f"{width * len(labels):g}",
        "height": f"{factor * rows_high:g}",
        "sharp": factor > 1,
        "rows": rows,
    }


def _class_name(classes: Sequence[str], index: int) -> str:
    return classes[index] if index < len(classes) else f"class {index}"
