"""A run is a folder: run.json (settings), metrics.jsonl, tensorboard/, checkpoints/UPDATE/ and, at the end, model/."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from denim.nim.checkpoint import (
    WEIGHTS_FILE,
    CheckpointError,
    Pretrained,
    check_archive,
    first_words,
    read_safetensors,
    with_todays_names,
)
from denim.nim.data import ManifestError, ManifestSource, Source, open_source
from denim.nim.files import append_text, atomic_folder, atomic_write, read_json, read_json_lines
from denim.nim.settings import TrainConfig

__all__ = ["Metrics", "latest_checkpoint", "load_checkpoint", "prepare_folder", "save_checkpoint", "training_source"]

TRAINING_FILE = "training.pt"
SUMS_FILE = "SHA256SUMS"  # in the format of sha256sum
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
    try:
        return open_source(
            config.data,
            "train",
            channels,
            labelled=labelled,
            max_bad=config.max_bad,
            kept=kept if config.resume and kept.exists() else None,
        )
    except ManifestError as error:
        raise ManifestError(f"{error}; if the images are those that the run began with, remove {kept}") from error


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

    Nothing is changed unless all of it is as it was written.

    Returns:
        What else the checkpoint holds: "update" (updates done), "logged" (the update of the last line of metrics),
        "losses" and "norms" (sums since then, see `TrainState`) and "loader" (its state).

    Raises:
        CheckpointError: the checkpoint is damaged, or of another architecture. The message names the newest one that is
            whole.

    Warns:
        UserWarning: an earlier version has written it, without the sums by which damage is found.
    """
    try:
        if problem := _damage(folder):
            raise CheckpointError(f"{folder} is damaged: {problem}")
        if not (folder / SUMS_FILE).exists():
            warnings.warn(f"{folder} has no {SUMS_FILE}: damage in it would not be noticed", stacklevel=2)
        state = _read_training(folder, model, optimizer)
        model.load_weights(read_safetensors(folder / WEIGHTS_FILE), folder, "is of another architecture")
    except CheckpointError as error:
        others = sorted((other for other in folder.parent.glob("[0-9]*") if other < folder), reverse=True)
        good = next((other for other in others if not _damage(other)), None)
        advice = f"{good} is whole: remove {folder}, and the run goes on from there" if good else "no other is whole"
        raise CheckpointError(f"{error}; {advice}") from error
    # The settings of the optimizer are those of the run, and its scheduler sets the learning rate before every step.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
    return {name: state[name] for name in ("update", "logged", "losses", "norms", "loader")}


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files in a folder, by name."""
    sums = {}
    for path in sorted(folder.iterdir()):
        if path.name != SUMS_FILE:
            with path.open("rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _damage(folder: Path) -> str:
    """What is not as it was written in a checkpoint, "" for nothing or where that cannot be told."""
    file = folder / SUMS_FILE
    try:
        if not file.exists():
            return ""
        found = _sums(folder)
        lines = [line.partition("  ") for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    written = {name: digest for digest, _, name in lines}
    changed = [name for name in sorted(written.keys() | found.keys()) if written.get(name) != found.get(name)]
    return f"{first_words(changed)} not as in {SUMS_FILE}" if changed else ""


def _read_training(folder: Path, model: Pretrained, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The content of training.pt, if this optimizer could have written it."""
    file = folder / TRAINING_FILE
    try:
        check_archive(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises errors of many types for a damaged file, and none names the file
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, expected a dictionary")
    state.setdefault("norms", 0.0)  # checkpoints of the first version have none
    kinds = {"update": int, "logged": int, "losses": float, "norms": float, "loader": dict, "optimizer": dict}
    problems = [
        f"{name} is {str(state.get(name))[:20]!r}" for name, kind in kinds.items() if type(state.get(name)) is not kind
    ]
    if not problems:
        if f"{state['update']:08d}" != folder.name or not 0 <= state["logged"] <= state["update"]:
            problems = [f"update is {state['update']} and logged {state['logged']}"]
        if not (math.isfinite(state["losses"]) and math.isfinite(state["norms"])):
            problems.append(f"losses is {state['losses']} and norms {state['norms']}")
        problems += _take_optimizer_state(state["optimizer"], model, optimizer)
    if problems:
        raise CheckpointError(f"{file} does not fit this run: {first_words(problems, '; ')}")
    return state


def _take_optimizer_state(saved: dict[str, Any], model: Pretrained, optimizer: torch.optim.Optimizer) -> list[str]:
    """Copy tensors of AdamW's state into memory of the layout of their parameters; what does not fit, in words.

    The fused step reads as many numbers as a parameter has, whatever the size of its state.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state, problems = saved.get("state"), []
    if not isinstance(state, dict):
        return ["the optimizer has no state"]
    for number, entries in state.items():
        if type(number) is not int or not 0 <= number < len(parameters):
            problems.append(f"there is no parameter {str(number)[:20]!r}")
            continue
        parameter = parameters[number]
        name = names.get(id(parameter), f"parameter {number}")
        expected = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        if not isinstance(entries, dict) or entries.keys() != expected.keys():
            problems.append(f"the state of {name} is not {', '.join(expected)}")
            continue
        for entry, like in expected.items():
            value = entries[entry]
            if type(value) is not Tensor or (value.shape, value.dtype, value.layout) != (
                like.shape,
                like.dtype,
                like.layout,
            ):
                is_tensor = isinstance(value, Tensor)
                found = f"{tuple(value.shape)} {value.dtype}" if is_tensor else type(value).__name__
                problems.append(f"{entry} of {name} is {found}, expected {tuple(like.shape)} {like.dtype}")
            elif not value.isfinite().all():
                problems.append(f"{entry} of {name} is not finite")
            else:
                entries[entry] = torch.empty_like(like, device="cpu", requires_grad=False).copy_(value)
    return problems


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
        # Read back from the files: what was written wrongly is found when the run is resumed.
        sums = _sums(staged)
        (staged / SUMS_FILE).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
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
        kept = [record for record in read_json_lines(self.file, {"update": int}) if record["update"] <= update]
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
