"""A run is a folder: run.json (settings), metrics.jsonl, tensorboard/, checkpoints/UPDATE/ and, at the end, model/.

A finished model has result.json beside it: what it was measured to be worth on images that were not trained on.

The checkpoints are those of `denim.nim.saving`.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import shlex
import sys
import time
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from denim.nim.checkpoint import first_words, with_todays_names
from denim.nim.data import ManifestError, ManifestSource, Source, open_source
from denim.nim.files import append_text, atomic_write, read_json, read_json_lines
from denim.nim.settings import LEAST_UPDATES, LinearProbeConfig, TrainConfig
from denim.nim.text import printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "MEASURED",
    "Metrics",
    "Waits",
    "card_of_run",
    "command_line",
    "fitted",
    "peak_memory",
    "prepare_folder",
    "settings_of_run",
    "training_source",
    "write_result",
]

Config = TypeVar("Config", bound=TrainConfig)
_T = TypeVar("_T")

SETTINGS_FILE = "run.json"
RESULT_FILE = "result.json"
MANIFEST_FILE = "manifest.safetensors"
MEASURED = (
    "images_per_second",
    "data_wait",
    "peak_memory",
    "device_seconds",
)  # metrics that differ between two equal runs
# Rates of AdamW for 256 images, a factor of ten and more around the published ones: 1.5e-4 of pretraining (He et al.
# 2022, You et al. 2023), 5e-4 to 1e-3 of fine-tuning; small models on digits learn with up to 6e-3.
USUAL_BASE_LR = (1e-5, 1e-2)
# Settings that may differ between a run and its resumption, since they do not change its weights.
FREE_SETTINGS = (
    "out", "resume", "workers", "loader", "max_bad", "log_every",
    "micro_batch", "accumulate", "lean", "compile", "cuda_graph", "grad_checkpointing", "fsdp", "stall_timeout",
    "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "keep_every",
    "eval_sigmas", "eval_every", "eval_images",
)  # fmt: skip


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


def fitted(config: Config, source: Source, console: Console, *, is_first: bool) -> Config:
    """The settings with numbers that fit the images (`TrainConfig.for_data`), which are said in one line.

    Args:
        config: the settings.
        source: the images that are trained on.
        console: for the line.
        is_first: whether this process warns of a learning rate that is far from what is usual.
    """
    is_chosen, config = config.batch_size is None, config.for_data(len(source))
    name, images, batch, published = printable(source.name), len(source), config.batch_size, config.PUBLISHED_BATCH
    reason = f" (of the published {published} an epoch would have fewer than {LEAST_UPDATES})"
    console.print(
        f"{name}: {images:,} images in batches of {batch}{reason if is_chosen and batch < published else ''}, "
        f"{config.warmup_epochs:g} of {config.epochs} epochs of warm-up, learning rate {config.lr:.3g}",
        markup=False,
        soft_wrap=True,
    )
    least, most = USUAL_BASE_LR
    if is_first and not least <= config.base_lr <= most:
        warnings.warn(
            f"base_lr {config.base_lr:g} gives batches of {batch} a learning rate of {config.lr:.3g}, far from what is "
            f"usual: a base_lr, which is for 256 images, between {least:g} and {most:g}",
            stacklevel=2,
        )
    return config


def prepare_folder(config: TrainConfig, source: Source | None) -> None:
    """Make the run folder, or check that the run in it may be resumed.

    Args:
        config: the settings, written to run.json.
        source: the training images; a manifest is kept in the folder, for `training_source`. None where there is none.

    Raises:
        ValueError: the folder holds a run and the settings do not resume it, or differ from the run's own in what
            changes its weights; or its run.json is damaged.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    file = config.out / SETTINGS_FILE
    if not file.exists():
        if isinstance(source, ManifestSource):
            source.manifest.keep(config.out / MANIFEST_FILE)
        with atomic_write(file) as staged:
            staged.write_text(json.dumps(settings, indent=2) + "\n")
        return
    if not config.resume:
        raise ValueError(f"{config.out} holds a run already; resume it, or choose another folder")
    earlier = with_todays_names(read_json(file), settings)
    # A setting that a later version has added has its default in earlier runs.
    fields = dataclasses.fields(config)
    defaults = {each.name: each.default for each in fields if each.default is not dataclasses.MISSING}
    names = (earlier.keys() | settings.keys()) - set(FREE_SETTINGS)
    changed = [
        f"{name} was {earlier.get(name)!r}, is {settings.get(name)!r}"
        for name in sorted(names)
        if earlier.get(name, defaults.get(name)) != settings.get(name)
    ]
    if changed:
        raise ValueError(f"{config.out} cannot be resumed with other settings: {'; '.join(changed)}")


def settings_of_run(run: Path, kind: type[Config]) -> Config:
    """The settings with which a run began, to go on with it.

    Args:
        run: folder of the run.
        kind: class of the settings.

    Raises:
        ValueError: the folder holds no run, or one of another kind or of a later version.
        DamagedFileError: its run.json is damaged.
    """
    file = run / SETTINGS_FILE
    if not file.exists():
        raise ValueError(f"{run} holds no run: there is no {SETTINGS_FILE} in it")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    entries = with_todays_names(read_json(file), fields)
    unknown = sorted(entries.keys() - fields.keys() - {"accumulate"})
    missing = [name for name, field in fields.items() if name not in entries and field.default is dataclasses.MISSING]
    if unknown or missing:
        words = [f"{name} is unknown" for name in unknown] + [f"{name} is missing" for name in missing]
        raise ValueError(f"{file} does not have the settings of a {kind.__name__}: {first_words(words)}")
    if (parts := entries.pop("accumulate", 1)) != 1:  # earlier versions counted the parts of a batch
        entries["micro_batch"] = entries["batch_size"] // parts
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()
    }
    if issubclass(LinearProbeConfig, kind) and values.get("linear_probe"):
        return cast(Config, LinearProbeConfig(**{**values, "out": run, "resume": True}))
    return kind(**{**values, "out": run, "resume": True})


def command_line(config: TrainConfig) -> str:
    """The command that trains with these settings, in a folder RUN; what does not change the weights is left out."""
    words = ["denim", *config.COMMAND.split(), "--out", "RUN"]
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), field.name.replace("_", "-")
        if field.name in FREE_SETTINGS or value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def card_of_run(config: TrainConfig, source: Source, sigma: str) -> dict[str, Any]:
    """What the card of a run's model says of the training: arguments of `Pretrained.generate_model_card`.

    Args:
        config: the settings, with numbers for the batch and the epochs.
        source: the images that are trained on.
        sigma: noise levels of the training, in 0-255 pixel levels.
    """
    training = {
        "data": f"Trained on {printable(source.name)}, {len(source):,} images",
        "course": f"{config.epochs} epochs in batches of {config.batch_size}, learning rate {config.lr:.3g}",
        "command": printable(command_line(config)),
    }
    return {"sigma": sigma, "training": training}


class Metrics:
    """metrics.jsonl and TensorBoard events of a run.

    Args:
        run: folder of the run.
        update: updates done. Records of later updates, which a killed run has left, are dropped: they are written anew.

    Attributes:
        device_seconds: the most that a record has, dropped ones included: what the run has taken so far.
    """

    def __init__(self, run: Path, update: int) -> None:
        self.file = run / "metrics.jsonl"
        records = read_json_lines(self.file, {"update": int})
        spent = (record.get("device_seconds", 0.0) for record in records)
        self.device_seconds = max((value for value in spent if isinstance(value, float)), default=0.0)
        kept = [record for record in records if record["update"] <= update]
        with atomic_write(self.file) as staged:
            staged.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        from torch.utils.tensorboard import SummaryWriter  # a machine that only times steps may not have it

        self.events = SummaryWriter(run / "tensorboard", purge_step=update + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, which holds "update"; its numbers become TensorBoard scalars."""
        append_text(self.file, json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "update" and isinstance(value, (int, float)):
                self.events.add_scalar(name, value, int(record["update"]))

    def show(self, update: int, picture: Tensor) -> None:
        """Add a picture (C, H, W) in [0, 1], C = 1 or 3, to TensorBoard."""
        self.events.add_image("reconstructions", picture, update)

    def close(self) -> None:
        """Flush and close the TensorBoard file."""
        self.events.close()


class Waits(Generic[_T]):
    """An iterator that measures how long its user waits for the next item.

    Args:
        items: what is iterated, and closed by `close`.
    """

    def __init__(self, items: Generator[_T, None, None]) -> None:
        self._items = items
        self._waited, self._since = 0.0, time.perf_counter()

    def __iter__(self) -> Waits[_T]:
        return self

    def __next__(self) -> _T:
        began = time.perf_counter()
        try:
            return next(self._items)
        finally:
            self._waited += time.perf_counter() - began

    def share(self) -> float:
        """The share of the time since the last call, or since the start, that was spent waiting, from 0 to 1."""
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return share

    def close(self) -> None:
        """Close what is iterated."""
        self._items.close()


def write_result(run: Path, result: Mapping[str, str | float]) -> None:
    """Write result.json: the images that a finished model was measured on, and the numbers by name."""
    with atomic_write(run / RESULT_FILE) as staged:
        staged.write_text(json.dumps(result, indent=2) + "\n")


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: torch's on a CUDA device, else its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
