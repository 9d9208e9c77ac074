"""The training loop that pretraining and fine-tuning share, and the run folder that it writes.

A run is a folder: run.json (settings), metrics.jsonl, tensorboard/, checkpoints/UPDATE/ and, at the end, model/.
All randomness is keyed by (seed, update or sample id), so a run that was killed at any moment and resumed reaches the
same weights, bit for bit on the same machine, as one that was never killed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from denim.kernels import Domain, derive_seeds
from denim.nim.checkpoint import Pretrained
from denim.nim.data import Batch, Loader, PlannedLoader, Source, TrainView, open_loader
from denim.nim.run import Metrics, latest_checkpoint, load_checkpoint, prepare_folder, save_checkpoint
from denim.nim.settings import TrainConfig

__all__ = ["keyed_torch", "train", "training_loader"]


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
    prepare_folder(config, source)
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
        state = load_checkpoint(newest, model, optimizer)
        loader.load_state(state["loader"])
    update, logged = state["update"], state["logged"]
    losses = torch.tensor(state["losses"], device=device)
    metrics = Metrics(config.out, update)
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
                        save_checkpoint(
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
