"""Runs that lie in folders: what they are, how far they are, what differs between them, and a picture of their loss."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from denim.nim.files import DamagedFileError, atomic_write, read_json, read_json_lines
from denim.nim.owner import is_owned
from denim.nim.progress import measured_texts

__all__ = ["CURVE_FILE", "RunSummary", "differences", "draw_curve", "find_runs", "losses", "tabulated"]

CURVE_FILE = "loss.png"


@dataclass(frozen=True)
class RunSummary:
    """A run, as its folder tells it.

    Attributes:
        folder: of the run.
        settings: of run.json, by name; none where it is damaged.
        state: "running" (a process writes to it), "finished" (it has a model), "stopped", or "damaged: " and why.
        metrics: its last line of metrics with a loss; empty before the first.
        measured: what the model is worth on images that were not trained on, by name (see `measured_texts`): of
            result.json or, before its end, of the last measurement.
    """

    folder: Path
    settings: dict[str, Any]
    state: str
    metrics: dict[str, Any]
    measured: dict[str, float]

    @property
    def command(self) -> str:
        """pretrain or finetune; empty for a damaged run."""
        return "finetune" if "denoiser" in self.settings else "pretrain" if "objective" in self.settings else ""

    @property
    def what(self) -> str:
        """What is learnt: preset and objective, or the images that a classifier is trained on."""
        names = {"finetune": ("trained_on",), "pretrain": ("preset", "objective")}.get(self.command, ())
        probe = "linear probe, " if self.settings.get("linear_probe") else ""
        return probe + " ".join(str(self.settings.get(name, "")) for name in names)

    @property
    def progress(self) -> str:
        """Updates done and in total, such as "120/720"; empty before the first line of metrics."""
        if not self.metrics.get("epoch"):
            return ""
        update = self.metrics["update"]
        return f"{update}/{round(self.settings['epochs'] * update / self.metrics['epoch'])}"

    def results(self) -> dict[str, str]:
        """Progress and the last numbers, as texts by name."""
        loss, rate, spent = (self.metrics.get(name) for name in ("loss", "images_per_second", "device_seconds"))
        return {
            "updates": self.progress,
            "loss": "" if loss is None else f"{loss:.4f}",
            "images/s": "" if rate is None else f"{rate:,.0f}",
            **({} if spent is None else {"device-hours": f"{spent / 3600:.3g}"}),
            **measured_texts(self.measured),
            "state": self.state,
        }


def find_runs(folder: Path) -> list[RunSummary]:
    """The runs in a folder and in the folders below it, by path; a folder that is a run is the only one.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: expected a run, or a folder with runs")
    return [_summary(run) for run in _run_folders(folder)]


def tabulated(runs: Sequence[RunSummary]) -> list[dict[str, str]]:
    """The results of each run, all with the same names in the same order; those that a run has not are empty."""
    results = [run.results() for run in runs]
    names = list(dict.fromkeys(name for result in results for name in result))

    def place(name: str) -> tuple[bool, float, int]:
        kind, _, level = name.partition(" ")
        return name == "state", float(level) if kind == "sigma" else -1.0, names.index(name)

    return [{name: result.get(name, "") for name in sorted(names, key=place)} for result in results]


def differences(runs: Sequence[RunSummary]) -> dict[str, list[str]]:
    """The settings in which runs differ, one text for each run by name; a setting that a run has not is empty."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in ("out", "resume"))
    found = {name: [str(run.settings.get(name, "")) for run in runs] for name in names}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def losses(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that have a loss, as written: update, epoch, loss, lr and more.

    Raises:
        DamagedFileError: the metrics are damaged.
    """
    lines = read_json_lines(run / "metrics.jsonl", {"update": int})
    return [line for line in lines if "loss" in line]


def draw_curve(run: Path) -> Path | None:
    """Write a picture of the loss and the learning rate over the epochs into a run's folder.

    Returns:
        The picture, or None where there are no metrics yet.

    Raises:
        DamagedFileError: the metrics are damaged.
        WriteError: the picture cannot be written.
    """
    lines = losses(run)
    if not lines:
        return None
    # Imported here: it takes a second, and most of the package has no use for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    epochs = [line["epoch"] for line in lines]
    for axes, name, label in ((upper, "loss", "training loss"), (lower, "lr", "learning rate")):
        axes.plot(epochs, [line[name] for line in lines], linewidth=1.2, marker="." if len(lines) < 20 else None)
        axes.set_ylabel(label)
        axes.grid(linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    lower.set_xlabel("epoch")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    with atomic_write(run / CURVE_FILE) as staged:
        figure.savefig(staged, format="png", dpi=120)
    return run / CURVE_FILE


def _run_folders(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        folders.sort()
        if "run.json" in files:
            folders.clear()
            yield Path(path)


def _summary(run: Path) -> RunSummary:
    try:
        settings = read_json(run / "run.json", {"epochs": int})
        every = read_json_lines(run / "metrics.jsonl", {"update": int})
        result = run / "result.json"
        measured = read_json(result) if result.exists() else next(filter(measured_texts, reversed(every)), {})
    except (DamagedFileError, OSError) as error:
        return RunSummary(run, {}, f"damaged: {error}", {}, {})
    lines = [line for line in every if "loss" in line]
    is_finished = (run / "model" / "model.safetensors").exists()
    state = "running" if is_owned(run) else "finished" if is_finished else "stopped"
    return RunSummary(run, settings, state, lines[-1] if lines else {}, measured)
