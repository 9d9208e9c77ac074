"""A run is a folder: run.json (settings), metrics.jsonl, tensorboard/, checkpoints/UPDATE/ and, at the end, model/."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from denim.nim.checkpoint import WEIGHTS_FILE, CheckpointError, Pretrained, read_safetensors, with_todays_names
from denim.nim.data import ManifestSource, Source, open_source
from denim.nim.files import append_text, atomic_folder, atomic_write, read_json, read_json_lines
from denim.nim.settings import TrainConfig

__all__ = ["Metrics", "latest_checkpoint", "load_checkpoint", "prepare_folder", "save_checkpoint", "training_source"]

TRAINING_FILE = "training.pt"
MANIFEST_FILE = "manifest.safetensors"
KEPT_CHECKPOINTS = 2
# Settings that may differ between a run and its resumption, since they do not change its weights.
FREE_SETTINGS = ("out", "resume", "workers", "loader", "max_bad", "checkpoint_every", "log_every")


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint folder of a run, or None."""
    found = sorted(path for path in (run / "checkpoints").glob("[0-9]*") if path.is_dir())
    return found[-1] if found else None


def training_source(config: TrainConfig, channels: int | None, *, labelled: bool) -> Source:
    """The training images of a run. A resumed run has those that it began with, even if the folder has changed since.

    Args:
        config: the settings.
        channels: 1, 3, or None for what the images have.
        labelled: whether classes are needed.

    Raises:
        ValueError, OSError: see `open_source`.
    """
    kept = config.out / MANIFEST_FILE
    return open_source(
        config.data,
        "train",
        channels,
        labelled=labelled,
        max_bad=config.max_bad,
        kept=kept if config.resume and kept.exists() else None,
    )


def prepare_folder(config: TrainConfig, source: Source | None) -> None:
    """Make the run folder, or check that the run in it may be resumed.

    Args:
        config: the settings, written to run.json.
        source: the training images; a manifest is kept in the folder, for `training_source`. None where there is none.

    Raises:
        ValueError: the folder holds a run and the settings do not resume it, or differ from the run's own in what
            changes its weights; or its run.json is damaged.
    """
    settings = json.loads(json.dumps(asdict(config), default=str))
    file = config.out / "run.json"
    if not file.exists():
        if isinstance(source, ManifestSource):
            source.manifest.keep(config.out / MANIFEST_FILE)
        with atomic_write(file) as staged:
            staged.write_text(json.dumps(settings, indent=2) + "\n")
        return
    if not config.resume:
        raise ValueError(f"{config.out} holds a run already; resume it, or choose another folder")
    earlier = with_todays_names(read_json(file), settings)
    names = (earlier.keys() | settings.keys()) - set(FREE_SETTINGS)
    changed = [
        f"{name} was {earlier.get(name)!r}, is {settings.get(name)!r}"
        for name in sorted(names)
        if earlier.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(f"{config.out} cannot be resumed with other settings: {'; '.join(changed)}")


def load_checkpoint(folder: Path, model: Pretrained, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the model and the optimizer from a checkpoint, in place.

    Returns:
        What else the checkpoint holds: "update" (updates done), "logged" (the update of the last line of metrics),
        "losses" and "norms" (sums since then, see `TrainState`) and "loader" (its state).

    Raises:
        CheckpointError: the checkpoint is damaged, or of another architecture.
    """
    model.load_weights(read_safetensors(folder / WEIGHTS_FILE), folder, "is of another architecture")
    try:
        state = torch.load(folder / TRAINING_FILE, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        state.setdefault("norms", 0.0)  # checkpoints of the first version have none
        return {name: state[name] for name in ("update", "logged", "losses", "norms", "loader")}
    except Exception as error:  # torch raises errors of many types for a damaged file, and none names the file
        raise CheckpointError(f"{folder / TRAINING_FILE} cannot be read: {error}; remove {folder}") from error


def save_checkpoint(run: Path, model: Pretrained, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Write a checkpoint, which appears whole or not at all, and remove all but the newest `KEPT_CHECKPOINTS`.

    Args:
        run: folder of the run; the checkpoint is `run/checkpoints/UPDATE`.
        model, optimizer: their weights and state.
        progress: what `load_checkpoint` returns.
    """
    folder = run / "checkpoints" / f"{progress['update']:08d}"
    if folder.exists():
        return
    with atomic_folder(folder) as staged:
        model.save_pretrained(staged)
        # An open file: torch says why it cannot write to one, but not why it cannot write to a path.
        with (staged / TRAINING_FILE).open("wb") as file:
            torch.save({**progress, "optimizer": optimizer.state_dict()}, file)
    for old in sorted(folder.parent.glob("[0-9]*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


class Metrics:
    """metrics.jsonl and TensorBoard events of a run.

    Args:
        run: folder of the run.
        update: updates done. Records of later updates, which a killed run has left, are dropped: they are written anew.
    """

    def __init__(self, run: Path, update: int) -> None:
        self.file = run / "metrics.jsonl"
        kept = [record for record in read_json_lines(self.file) if record["update"] <= update]
        with atomic_write(self.file) as staged:
            staged.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        self.events = SummaryWriter(run / "tensorboard", purge_step=update + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, which holds "update"; its numbers become TensorBoard scalars."""
        append_text(self.file, json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "update" and isinstance(value, (int, float)):
                self.events.add_scalar(name, value, int(record["update"]))

    def close(self) -> None:
        """Flush and close the TensorBoard file."""
        self.events.close()
