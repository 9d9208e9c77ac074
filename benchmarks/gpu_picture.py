"""The picture of the report of `benchmarks.gpu_check`: speeds as bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .gpu_rows import Row

__all__ = ["draw", "panels"]

COPY = ": speed of a copy"
# Titles of the panels by the unit of their rows.
SPEEDS = {
    "images/s": "Pretraining step, images/s",
    "noisy images/s": "De³ sweep, noisy images/s",
    "draws/s": "Attack step, draws/s",
}


class _Part(Protocol):
    function: str
    rows: list[Row]


def panels(parts: Sequence[_Part]) -> list[tuple[str, list[tuple[str, float]]]]:
    """Titles and bars, (label, value): speeds of models by unit, and each kernel's share of the speed of a copy."""
    models = [row for part in parts if part.function.startswith("denim.benchmarks.gpu_models:") for row in part.rows]
    found = []
    for unit, title in SPEEDS.items():
        bars = [(row.what.partition(", ")[2], row.value) for row in models if row.unit == unit]
        found.append((title, bars))
    shares = [(row.what.removesuffix(COPY), row.value) for row in models if row.what.endswith(COPY)]
    found.append(("Kernels, % of the speed of a measured copy of as many bytes (memory roofline)", shares))
    return [(title, bars) for title, bars in found if bars]


def draw(parts: Sequence[_Part], path: Path) -> bool:
    """Write the picture (PNG), if there is something to show and matplotlib is installed; return whether."""
    shown = panels(parts)
    if not shown:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    heights = [len(bars) + 1.5 for _, bars in shown]
    figure = Figure(figsize=(10, 0.28 * sum(heights) + 0.5), layout="constrained")
    axes: Any = figure.subplots(len(shown), 1, height_ratios=heights, squeeze=False)
    for axis, (title, bars) in zip(axes[:, 0], shown, strict=True):
        labels, values = zip(*bars, strict=True)
        colours = ["tab:blue" if "Denim" in label or title.startswith("Kernels") else "tab:grey" for label in labels]
        drawn = axis.barh(range(len(bars)), values, color=colours)
        axis.bar_label(drawn, fmt="%.4g", padding=3, fontsize=8)
        axis.set_yticks(range(len(bars)), labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, max(values) * 1.12 if "%" not in title else max(100.0, *values) * 1.12)
        axis.set_title(title, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    staged = path.with_name(f".{path.name}")
    figure.savefig(staged, dpi=110, format="png")
    staged.replace(path)
    return True
