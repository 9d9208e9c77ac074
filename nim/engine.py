"""The training loop that pretraining and fine-tuning share, and the run folder that it writes.

A run is a folder: run.json (settings), metrics.jsonl, tensorboard/, checkpoints/UPDATE/ and, at the end, model/.
All randomness is keyed by (seed, update or sample id), so a run that was killed at any moment and resumed reaches the
same weights, bit for bit on the same machine, as one that was never killed.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from denim.kernels import Domain, derive_seeds
from denim.nim.checkpoint import (
    WEIGHTS_FILE,
    CheckpointError,
    Pretrained,
    read_safetensors,
    with_todays_names,
)
from denim.nim.data import Batch, Loader, ManifestSource, Source, TrainView, open_source
from denim.nim.files import atomic_folder, atomic_write

__all__ = ["TrainConfig", "keyed_torch", "latest_checkpoint", "pick_device", "train", "training_source"]

TRAINING_FILE = "training.pt"
MANIFEST_FILE = "manifest.safetensors"
KEPT_CHECKPOINTS = 2
# What may differ between a run and its resumption without changing a weight.
FREE_SETTINGS = ("out", "resume", "workers", "loader", "max_bad", "checkpoint_every", "log_every")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings that pretraining and fine-tuning share.

    Attributes:
        out: folder of the run.
        data: "digits", "cifar10", "cifar100" or a folder of images.
        epochs: passes over the training images.
        warmup_epochs: of these, epochs of linear warm-up; then a cosine to min_lr, set at every update.
        batch_size: images per update; learning rates scale linearly with it.
        accumulate: parts into which a batch is cut, whose gradients are summed.
        base_lr: learning rate for a batch of 256.
        min_lr: learning rate at the end.
        weight_decay: of AdamW; none on biases and 1-d parameters.
        betas: of AdamW.
        crop_scale: area of random crops as a share of the image; None for no crops.
        flip: mirror half of the images.
        degrees: random rotation up to this many degrees.
        translate: random shift up to this share of the side.
        zoom: random change of size up to this share.
        loader: "dali", "torch", or "auto" for the first of these that can serve.
        workers: processes (torch) or threads (DALI) that decode images.
        max_bad: largest share of images that may turn out unreadable; others stand in for them, above it the run stops.
        seed: of the run.
        device: "auto", or a torch device.
        precision: "auto" (bf16 where the device has it), "bf16" or "fp32".
        resume: continue the run in `out`.
        checkpoint_every: updates between checkpoints; None for once per epoch.
        log_every: updates between lines of metrics.
    """

    out: Path
    data: str = "digits"
    epochs: int
    warmup_epochs: float
    batch_size: int
    accumulate: int = 1
    base_lr: float
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float]
    crop_scale: tuple[float, float] | None
    flip: bool = True
    degrees: float = 0.0
    translate: float = 0.0
    zoom: float = 0.0
    loader: str = "auto"
    workers: int = 0
    max_bad: float = 0.01
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    resume: bool = False
    checkpoint_every: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {self.checkpoint_every}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(f"warmup_epochs must lie between 0 and epochs ({self.epochs}), got {self.warmup_epochs}")
        if not (math.isfinite(self.base_lr) and self.base_lr > 0):
            raise ValueError(f"base_lr must be positive, got {self.base_lr}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"precision must be auto, bf16 or fp32, got {self.precision!r}")

    @property
    def lr(self) -> float:
        """Learning rate for this batch: base_lr * batch_size / 256 (Goyal et al. 2017)."""
        return self.base_lr * self.batch_size / 256

    @property
    def part_size(self) -> int:
        """Images per forward pass."""
        return self.batch_size // self.accumulate

    def view(self, size: int, auto_augment: str | None = None) -> TrainView:
        """The random view of training images, with a side of `size` pixels."""
        return TrainView(
            size,
            crop_scale=self.crop_scale,
            flip=self.flip,
            degrees=self.degrees,
            translate=self.translate,
            zoom=self.zoom,
            auto_augment=auto_augment,
        )


def pick_device(name: str) -> torch.device:
    """The torch device for "auto" (CUDA where there is one) or a name.

    Raises:
        ValueError: CUDA was asked for and there is none, or the name is no device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for and torch sees no CUDA device; see `denim doctor`")
    return device


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    enabled = precision == "bf16" or (precision == "auto" and has_bf16)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@contextmanager
def keyed_torch(key: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's generators of the CPU and `device` are a function of the key; after, they are as before.

    For initialisation and for layers that draw from nothing else (drop path).
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(key)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        yield


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint folder of a run, or None."""
    found = sorted(path for path in (out / "checkpoints").glob("[0-9]*") if path.is_dir())
    return found[-1] if found else None


def training_source(config: TrainConfig, channels: int | None, *, labelled: bool) -> Source:
    """The training images. A resumed run has those that it began with, whatever has been added or damaged since.

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


def _prepare_folder(config: TrainConfig, source: Source | None) -> None:
    """Make the run folder, or check that the one that is there may be resumed."""
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
    earlier = with_todays_names(json.loads(file.read_text()))
    names = (earlier.keys() | settings.keys()) - set(FREE_SETTINGS)
    changed = [
        f"{name} was {earlier.get(name)!r}, is {settings.get(name)!r}"
        for name in sorted(names)
        if earlier.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(f"{config.out} cannot be resumed with other settings: {'; '.join(changed)}")


def _load_training(folder: Path, model: Pretrained, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model.load_weights(read_safetensors(folder / WEIGHTS_FILE), f"{folder} is of another architecture")
    try:
        state = torch.load(folder / TRAINING_FILE, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        return {name: state[name] for name in ("update", "logged", "losses", "loader")}
    except Exception as error:  # torch raises half a dozen types for a damaged file; none says which file
        raise CheckpointError(f"{folder / TRAINING_FILE} cannot be read: {error}; remove {folder}") from error


def _save_training(out: Path, model: Pretrained, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    folder = out / "checkpoints" / f"{progress['update']:08d}"
    if folder.exists():
        return
    with atomic_folder(folder) as staged:
        model.save_pretrained(staged)
        torch.save({**progress, "optimizer": optimizer.state_dict()}, staged / TRAINING_FILE)
    for old in sorted(folder.parent.glob("[0-9]*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


class _Metrics:
    """metrics.jsonl and TensorBoard events, without the lines that a resumed run will write again."""

    def __init__(self, out: Path, update: int) -> None:
        self.file = out / "metrics.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["update"] <= update]
        with atomic_write(self.file) as staged:
            staged.write_text("".join(f"{line}\n" for line in kept))
        self.events = SummaryWriter(out / "tensorboard", purge_step=update + 1)

    def write(self, record: dict[str, Any]) -> None:
        with self.file.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "update" and isinstance(value, (int, float)):
                self.events.add_scalar(name, value, int(record["update"]))

    def close(self) -> None:
        self.events.close()


def train(
    config: TrainConfig,
    model: Pretrained,
    groups: list[dict[str, Any]],
    loader: Loader,
    loss: Callable[[Batch, int], Tensor],
    *,
    title: str,
    console: Console,
    source: Source | None = None,
) -> None:
    """Train a model in place and write its run folder.

    Args:
        config: the settings; `config.out` must not hold a run unless `config.resume`.
        model: on its device.
        groups: AdamW's parameter groups, with `lr_scale` where layers learn at different rates.
        loader: yields parts of `config.part_size` images.
        loss: scalar loss of a part, from the part (on the CPU) and the epoch.
        title: what the progress bar says.
        console: where progress goes.
        source: the loader's; its manifest is kept in the run folder, for `training_source`.

    Raises:
        ValueError: the folder holds a run, or a run with other settings.
        FloatingPointError: the loss is not finite.
        CheckpointError: the newest checkpoint cannot be read.
        BadSamplesError: more images than `config.max_bad` allows cannot be read.
    """
    updates_per_epoch = loader.steps_per_epoch // config.accumulate
    if updates_per_epoch == 0:
        raise ValueError(
            f"an epoch has {loader.steps_per_epoch} parts of {config.part_size} images, fewer than accumulate "
            f"({config.accumulate}): take a smaller batch_size"
        )
    _prepare_folder(config, source)
    device = next(model.parameters()).device
    total, warmup = config.epochs * updates_per_epoch, round(config.warmup_epochs * updates_per_epoch)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=max(1, total - warmup),
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    newest = latest_checkpoint(config.out)
    # The losses since the last line of metrics belong to the state: the next line is their mean.
    state: dict[str, Any] = {"update": 0, "logged": 0, "losses": 0.0}
    if newest is not None:
        state = _load_training(newest, model, optimizer)
        loader.load_state(state["loader"])
    update, logged = state["update"], state["logged"]
    losses = torch.tensor(state["losses"], device=device)
    metrics = _Metrics(config.out, update)
    bad: dict[str, str] = loader.state()["bad"]
    checkpoint_every = config.checkpoint_every or updates_per_epoch
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    task = progress.add_task(title, total=total, completed=update, state="")
    model.train()
    since, started = update, time.perf_counter()
    try:
        with progress:
            while update < total:
                epoch, first = divmod(update, updates_per_epoch)
                parts = loader.epoch(epoch, first * config.accumulate)
                for _ in range(first, updates_per_epoch):
                    scheduler.step_update(update)
                    optimizer.zero_grad(set_to_none=True)
                    for part in range(config.accumulate):
                        number = torch.tensor(update * config.accumulate + part)
                        key = int(derive_seeds(config.seed, Domain.AUGMENT, number))
                        with keyed_torch(key, device), _autocast(device, config.precision):
                            value = loss(next(parts), epoch)
                        (value / config.accumulate).backward()
                        losses += value.detach() / config.accumulate
                    optimizer.step()
                    update += 1
                    log = update % config.log_every == 0 or update == total
                    save = update % checkpoint_every == 0 or update == total
                    if not (log or save):
                        continue
                    mean_loss = losses.item() / (update - logged)
                    # Before saving as well: two broken checkpoints would push out the last good one.
                    if not math.isfinite(mean_loss):
                        raise FloatingPointError(
                            f"the loss is {mean_loss} near update {update}; lower base_lr, lengthen the warm-up, "
                            f"or resume from {latest_checkpoint(config.out)}"
                        )
                    known, bad = bad, loader.state()["bad"]
                    if new := {name: reason for name, reason in bad.items() if name not in known}:
                        metrics.write({"update": update, "bad": len(bad), "new_bad": new})
                    if log:
                        rate = (update - since) * config.batch_size / (time.perf_counter() - started)
                        rates = [group["lr"] for group in optimizer.param_groups]
                        metrics.write(
                            {
                                "update": update,
                                "epoch": update / updates_per_epoch,
                                "loss": mean_loss,
                                "lr": max(rates),
                                "images_per_second": rate,
                            }
                        )
                        shown = f"loss {mean_loss:.4f}  {rate:,.0f} images/s"
                        progress.update(task, completed=update, state=shown)
                        if not console.is_terminal and (
                            update == total or update % max(1, total // 5) < config.log_every
                        ):
                            console.print(f"{title}: {update}/{total}  {shown}")
                        since, started, logged = update, time.perf_counter(), update
                        losses.zero_()
                    if save:
                        _save_training(
                            config.out,
                            model,
                            optimizer,
                            {"update": update, "logged": logged, "losses": losses.item(), "loader": loader.state()},
                        )
    finally:
        metrics.close()
    if bad:
        listed = "".join(f"\n  {reason}" for reason in bad.values())
        console.print(
            f"{title}: others stood in for {len(bad)} images that could not be read:{listed}",
            markup=False,
            soft_wrap=True,
        )
    model.eval()
    model.save_pretrained(config.out / "model")
