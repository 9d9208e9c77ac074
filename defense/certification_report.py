"""Report of a certification: a table for the terminal, CSV files, JSON, and the curve as a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from denim.defense.certificates import Certification, LevelCertificates
from denim.defense.report.pictures import DASHES, DPI, MARKERS, PALETTE
from denim.nim.files import atomic_write
from denim.nim.text import printable

__all__ = ["certified_curve", "print_certification", "write_certification"]

COLUMNS, ROWS = 7, 40  # radii of the table and of results.csv, about


def _radii(certification: Certification, count: int) -> tuple[float, ...]:
    """The radii of the settings; without any about so many round ones that can be certified, from 0 on."""
    if certification.settings.radii:
        return certification.settings.radii
    largest = max(level.largest_radius for level in certification.levels)
    ticks = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(0, largest)
    return tuple(round(float(tick), 10) for tick in ticks if 0 <= tick <= largest)


def certified_curve(certification: Certification) -> Figure:
    """Certified accuracy in percent against the L2 radius, one line per noise level with its 95 % band.

    Where estimations stopped at given radii, these are points: nothing is known between them.
    """
    settings, levels = certification.settings, certification.levels
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, level in enumerate(levels):
        look: dict[str, Any] = {
            "color": PALETTE[1:][i % (len(PALETTE) - 1)],
            "label": rf"$\sigma$ {level.sigma:g} (s = {level.sigma / 255:.3g})",
        }
        # The curve steps down at certified radii, for the last time where no radius can be certified.
        steps = np.unique(
            [0.0, *level.radii.tolist(), level.largest_radius, np.nextafter(level.largest_radius, np.inf)]
        )
        radii = np.array(settings.radii) if settings.only_radii else steps
        intervals = [level.certified(float(radius)) for radius in radii]
        value, low, high = 100 * np.array([(each.value, each.low, each.high) for each in intervals]).T
        if settings.only_radii:
            bars = np.stack([value - low, high - value]).clip(min=0)
            # Beside each other: at one place, the levels would hide one another.
            places = radii + 0.015 * max(settings.radii) * (i - (len(levels) - 1) / 2)
            axes.errorbar(
                places, value, yerr=bars, capsize=3, linestyle="none", marker=MARKERS[i % len(MARKERS)], **look
            )
        else:
            # certified(r) counts radii of r and more, so between two steps it has the value of the right one.
            shown = slice(0, -1)
            axes.fill_between(radii[shown], low[shown], high[shown], step="pre", color=look["color"], alpha=0.15, lw=0)
            axes.step(radii, value, where="pre", linestyle=DASHES[i % len(DASHES)], linewidth=1.6, **look)
    axes.set_ylim(-3, 103)
    axes.set_xlim(left=-0.01 * axes.get_xlim()[1])
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("certified accuracy (%)")
    axes.set_xlabel("L2 radius ([0, 1] units)")
    above = axes.secondary_xaxis("top", functions=(_to_levels, _from_levels))
    above.set_xlabel("L2 radius (0-255 pixel levels)")
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(_what(certification), loc="left", fontsize=9)
    return figure


def _to_levels(radius: Any) -> Any:
    return 255 * radius


def _from_levels(radius: Any) -> Any:
    return radius / 255


def _what(certification: Certification) -> str:
    settings = certification.settings
    return (
        f"{len(certification.levels[0].ids)} images, at most N = {settings.draws:,} draws, alpha = {settings.alpha:g}, "
        "95% intervals over images"
    )


def write_certification(certification: Certification, out: Path) -> Path:
    """Write `out`/results.json, results.csv, certificates.csv and certified.png; each is replaced in one step.

    results.csv has a line for each level and radius: certified accuracy with its 95 % interval, as shares in [0, 1].
    certificates.csv has one for each level and image. Radii are L2, in [0, 1] units and in 0-255 pixel levels.

    Args:
        certification: what `certify` returned.
        out: folder, made where absent.

    Returns:
        The path of certified.png.

    Raises:
        WriteError: the system refuses.
    """
    curve = [
        {
            "sigma": level.sigma,
            "radius": radius,
            "radius_levels": round(255 * radius, 6),
            "certified": interval.value,
            "low": interval.low,
            "high": interval.high,
        }
        for level in certification.levels
        for radius in _radii(certification, ROWS)
        for interval in [level.certified(radius)]
    ]
    images = [
        {
            "sigma": level.sigma,
            "id": int(level.ids[row]),
            "label": int(level.labels[row]),
            "prediction": int(level.predictions[row]) if level.radii[row] else "",
            "correct": int(level.radii[row] > 0 and level.predictions[row] == level.labels[row]),
            "radius": f"{level.radii[row]:.6g}",
            "radius_levels": f"{255 * level.radii[row]:.6g}",
            "bound": f"{level.bounds[row]:.8g}",
            "successes": int(level.successes[row]),
            "draws": int(level.draws[row]),
        }
        for level in certification.levels
        for row in range(len(level.ids))
    ]
    _write_csv(out / "results.csv", curve)
    _write_csv(out / "certificates.csv", images)
    content = {
        "settings": asdict(certification.settings),
        "case": certification.case,
        "classes": certification.classes,
        "warnings": certification.warnings,
        "versions": certification.versions,
        "levels": [_summary(certification, level) for level in certification.levels],
        "curve": curve,
    }
    with atomic_write(out / "results.json") as staged:
        staged.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    picture = io.BytesIO()
    certified_curve(certification).savefig(picture, format="png", dpi=DPI)
    with atomic_write(out / "certified.png") as staged:
        staged.write_bytes(picture.getvalue())
    return out / "certified.png"


def _summary(certification: Certification, level: LevelCertificates) -> dict[str, Any]:
    """What results.json and the table say of a level; nothing of what was not estimated to the end."""
    settings = certification.settings
    return {
        "sigma": level.sigma,
        "s": level.sigma / 255,
        "images": len(level.ids),
        "average_certified_radius": None if settings.only_radii else asdict(level.average_radius),
        "abstained": asdict(level.abstained) if settings.finds_abstentions else None,
        "largest_radius": level.largest_radius,
        "draws_per_image": float(level.draws.mean()) + settings.selection_draws,
    }


def _write_csv(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with atomic_write(file) as staged, staged.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_certification(certification: Certification, console: Console) -> None:
    """Print certified accuracies with 95 % intervals, levels by radii, then what the numbers are, then the warnings."""
    radii = _radii(certification, COLUMNS)
    table = Table(box=box.SIMPLE_HEAD, title="certified accuracy in %", title_justify="left")
    levels = certification.levels
    table.add_column("L2 radius")
    for level in levels:
        table.add_column(f"sigma {level.sigma:g}\n(s = {level.sigma / 255:.3g})", justify="right")
    for radius in radii:
        name = f"{radius:g} ({255 * radius:.4g} levels)"
        table.add_row(name, *(str(level.certified(radius)) for level in levels))
    table.add_section()
    if certification.settings.finds_abstentions:
        table.add_row("abstained", *(str(level.abstained) for level in levels))
    if not certification.settings.only_radii:
        averages = [level.average_radius for level in levels]
        table.add_row("average radius", *(f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in averages))
    table.add_row("largest possible", *(f"{level.largest_radius:.3f}" for level in levels))
    spent = [_summary(certification, level)["draws_per_image"] for level in levels]
    table.add_row("draws per image", *(f"{each:,.0f}" for each in spent))
    console.print(table)
    lines = [
        f"{_what(certification)}; {printable(certification.case)}.",
        f"Radii in [0, 1] units; a certificate is false with a chance of at most {certification.settings.alpha:g}.",
    ]
    if certification.settings.only_radii:
        lines.append(
            "Estimations stopped when these radii were decided: other radii, and their average, are not known."
        )
    console.print(Text("\n".join(lines), style="dim"))
    for warning in certification.warnings:
        console.print(Text(f"warning: {printable(warning)}", style="bold yellow"))
