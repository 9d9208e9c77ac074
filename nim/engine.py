"""The training loop of pretraining and fine-tuning.

All randomness is keyed by the seed of the run and by the update, or by the epoch and the sample id. So a run that is
killed at any moment and resumed reaches the same weights, bit for bit on the same machine, as one that is not killed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from denim.kernels import Domain, derive_seeds
from denim.nim.checkpoint import Pretrained
from denim.nim.data import Batch, Loader, PlannedLoader, Source, TrainView, open_loader
from denim.nim.owner import owned
from denim.nim.precision import autocast, resolve_precision, tf32_products
from denim.nim.run import Metrics, latest_checkpoint, load_checkpoint, prepare_folder, save_checkpoint
from denim.nim.settings import TrainConfig
from denim.nim.stopping import StopRequest, stop_requests
from denim.nim.text import printable

__all__ = ["TrainState", "keyed_torch", "train", "training_loader", "training_step"]

READS_ARE_FREE = ("cpu",)  # devices that nobody waits for


@contextmanager
def keyed_torch(key: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and of `device` with a key, and restore their states at the end.

    For what can draw from these generators alone: initialisation, and layers such as drop path.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _seed_torch(key, device)
        yield


def _seed_torch(key: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(key)


def training_loader(
    config: TrainConfig, source: Source, size: int, device: torch.device, auto_augment: str | None = None
) -> PlannedLoader:
    """The loader of a run: shuffled parts of `config.part_size` random views, by the settings.

    Args:
        config: the settings.
        source: the training images.
        size: side of a view in pixels.
        device: of training; DALI leaves its batches there.
        auto_augment: see `TrainView`.

    Raises:
        ValueError: no backend can serve, or not the one that the settings name; see `open_loader`.
    """
    view = TrainView(
        size,
        crop_scale=config.crop_scale,
        flip=config.flip,
        degrees=config.degrees,
        translate=config.translate,
        zoom=config.zoom,
        auto_augment=auto_augment,
    )
    return open_loader(
        source,
        view,
        config.part_size,
        seed=config.seed,
        workers=config.workers,
        backend=config.loader,
        device=device,
        max_bad=config.max_bad,
    )


@dataclass
class TrainState:
    """What a training step reads and changes. A checkpoint holds the model, the optimizer and the last four.

    Attributes:
        config: the settings.
        model: on its device, in training mode.
        loss: scalar loss of a part, from the part (on the CPU) and the epoch.
        optimizer: of the model's parameters.
        scheduler: sets the optimizer's learning rates from the number of the update.
        updates_per_epoch: as many as the loader's parts fill; the rest of an epoch is left out.
        update: updates done.
        losses: float32 (), on the model's device: the sum of the losses of the updates since `logged`.
        norms: float32 (), on the model's device: the sum of the norms of their gradients.
        logged: the update of the last line of metrics, which is the mean of the losses up to it.
    """

    config: TrainConfig
    model: Pretrained
    loss: Callable[[Batch, int], Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: CosineLRScheduler
    updates_per_epoch: int
    update: int
    losses: Tensor
    norms: Tensor
    logged: int

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * self.updates_per_epoch


def training_step(state: TrainState, parts: Iterator[Batch]) -> None:
    """One update, in place: gradients of `config.accumulate` parts, averaged, and a step of the optimizer.

    If the norm of the gradients is not finite, the step changes nothing, and `state.norms` is not finite from then on.

    Torch's generators, for layers that draw from nothing else, are seeded by the run's seed, the update and the part,
    and stay so: `train` restores them. On a CUDA device the step reads nothing back and waits for nothing.

    Args:
        state: what is changed.
        parts: yields the parts, each of `config.part_size` images.
    """
    config, device = state.config, state.losses.device
    epoch = state.update // state.updates_per_epoch
    state.scheduler.step_update(state.update)
    state.optimizer.zero_grad(set_to_none=True)
    for part in range(config.accumulate):
        key = int(derive_seeds(config.seed, Domain.AUGMENT, torch.tensor(state.update * config.accumulate + part)))
        _seed_torch(key, device)
        # Parts are drawn after the generators are seeded: a loader may draw from them as well.
        with autocast(config.precision, device):
            value = state.loss(next(parts), epoch)
        if config.accumulate > 1:
            value = value / config.accumulate
        value.backward()
        state.losses += value.detach()
    parameters = (parameter for group in state.optimizer.param_groups for parameter in group["params"])
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    state.norms += norm
    # The fused step leaves everything as it is where this is 1 (what torch's GradScaler tells it). It is read on the
    # device: the host would have to wait for it. The difference is 0, or NaN where the norm is not finite; `isfinite`
    # alone is four launches.
    state.optimizer.found_inf = (norm - norm).ne(0).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    state.update += 1


def _begin(
    config: TrainConfig,
    model: Pretrained,
    groups: list[dict[str, Any]],
    loader: Loader,
    loss: Callable[[Batch, int], Tensor],
    updates_per_epoch: int,
) -> TrainState:
    """The state of a new run, or of the newest checkpoint in its folder; the loader's is set alike."""
    warmup = round(config.warmup_epochs * updates_per_epoch)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=max(1, config.epochs * updates_per_epoch - warmup),
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    progress: dict[str, Any] = {"update": 0, "losses": 0.0, "norms": 0.0, "logged": 0}
    newest = latest_checkpoint(config.out)
    if newest is not None:
        progress = load_checkpoint(newest, model, optimizer)
        loader.load_state(progress["loader"])
    losses, norms = torch.tensor([progress["losses"], progress["norms"]], device=next(model.parameters()).device)
    update, logged = progress["update"], progress["logged"]
    return TrainState(config, model, loss, optimizer, scheduler, updates_per_epoch, update, losses, norms, logged)


def _means(state: TrainState) -> tuple[float, float]:
    """Means of the loss and of the norm of the gradients over the updates since the last line of metrics.

    Raises:
        FloatingPointError: one of them is not finite.
    """
    updates = state.update - state.logged
    loss, norm = state.losses.item() / updates, state.norms.item() / updates
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"the loss is {loss:g} and the norm of the gradients is {norm:g} near update {state.update}"
        )
    return loss, norm


@contextmanager
def _naming_last_finite(run: Path) -> Iterator[None]:
    """Add to errors of numbers that are not finite what there is and what to do."""
    try:
        yield
    except FloatingPointError as error:
        newest = latest_checkpoint(run)
        kept = f"the last finite weights are in {newest}" if newest else "there is no checkpoint yet"
        advice = "a resumed run would come here again, so lower base_lr or lengthen the warm-up in a new run"
        raise FloatingPointError(f"{error}; {kept}; {advice}") from error


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
        title: of the progress bar.
        console: for progress and messages.
        source: the loader's; its manifest is kept in the run folder, for `training_source`.

    Raises:
        ValueError: the folder holds a run, or a run with other settings.
        OwnedError: another process writes to the folder.
        WriteError: the disk is full, or the folder cannot be written to.
        Stopped: SIGTERM or Ctrl-C; raised after a checkpoint of the update that was running.
        FloatingPointError: the loss, a gradient or a weight is not finite. Such weights are not saved.
        CheckpointError: the newest checkpoint cannot be read.
        BadSamplesError: more images than `config.max_bad` allows cannot be read.
    """
    updates_per_epoch = loader.steps_per_epoch // config.accumulate
    if updates_per_epoch == 0:
        raise ValueError(
            f"an epoch has {loader.steps_per_epoch} parts of {config.part_size} images, fewer than accumulate "
            f"({config.accumulate}): take a smaller batch_size"
        )
    kept = f"{config.out} has a checkpoint of the last whole update: the same command with --resume goes on there"
    with owned(config.out), stop_requests(kept) as stop:
        _train(config, model, groups, loader, loss, updates_per_epoch, title, console, source, stop)


def _train(
    config: TrainConfig,
    model: Pretrained,
    groups: list[dict[str, Any]],
    loader: Loader,
    loss: Callable[[Batch, int], Tensor],
    updates_per_epoch: int,
    title: str,
    console: Console,
    source: Source | None,
    stop: StopRequest,
) -> None:
    prepare_folder(config, source)
    state = _begin(config, model, groups, loader, loss, updates_per_epoch)
    device = state.losses.device
    precision = resolve_precision(config.precision, device)
    console.print(f"{title}: {precision} on {device}", markup=False)
    metrics = Metrics(config.out, state.update)
    bad: dict[str, str] = loader.state()["bad"]
    checkpoint_every = config.checkpoint_every or updates_per_epoch
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    task = progress.add_task(title, total=state.total, completed=state.update, state="")
    # Where reading a number waits for nothing, each update is checked; elsewhere those that are logged or saved.
    check_always = state.losses.device.type in READS_ARE_FREE
    model.train()
    since, started = state.update, time.perf_counter()
    try:
        # Each part of an update seeds torch's generators. Their states are saved and restored once, around all updates.
        with (
            progress,
            keyed_torch(config.seed, device),
            tf32_products(precision == "tf32"),
            _naming_last_finite(config.out),
        ):
            while state.update < state.total:
                epoch, first = divmod(state.update, updates_per_epoch)
                parts = loader.epoch(epoch, first * config.accumulate)
                for _ in range(first, updates_per_epoch):
                    training_step(state, parts)
                    last = state.update == state.total
                    log = state.update % config.log_every == 0 or last
                    save = state.update % checkpoint_every == 0 or last or bool(stop)
                    if not (log or save or check_always):
                        continue
                    # Before saving as well: two broken checkpoints would push out the last good one.
                    mean_loss, mean_norm = _means(state)
                    if not (log or save):
                        continue
                    known, bad = bad, loader.state()["bad"]
                    if new := {name: reason for name, reason in bad.items() if name not in known}:
                        metrics.write({"update": state.update, "bad": len(bad), "new_bad": new})
                    if log:
                        rate = (state.update - since) * config.batch_size / (time.perf_counter() - started)
                        metrics.write(
                            {
                                "update": state.update,
                                "epoch": state.update / updates_per_epoch,
                                "loss": mean_loss,
                                "grad_norm": mean_norm,
                                "lr": max(group["lr"] for group in state.optimizer.param_groups),
                                "images_per_second": rate,
                            }
                        )
                        shown = f"loss {mean_loss:.4f}  {rate:,.0f} images/s"
                        progress.update(task, completed=state.update, state=shown)
                        fifth = state.update % max(1, state.total // 5) < config.log_every
                        if not console.is_terminal and (last or fifth):
                            console.print(f"{title}: {state.update}/{state.total}  {shown}")
                        since, started, state.logged = state.update, time.perf_counter(), state.update
                        state.losses.zero_()
                        state.norms.zero_()
                    if save:
                        done: dict[str, Any] = {"update": state.update, "logged": state.logged}
                        done |= {"losses": state.losses.item(), "norms": state.norms.item()}
                        save_checkpoint(config.out, model, state.optimizer, {**done, "loader": loader.state()})
                        stop.heed()
    finally:
        metrics.close()
    if bad:
        listed = "".join(f"\n  {printable(reason)}" for reason in bad.values())
        console.print(
            f"{title}: {len(bad)} images could not be read and were replaced by others:{listed}",
            markup=False,
            soft_wrap=True,
        )
    model.eval()
    model.save_pretrained(config.out / "model")
