"""The training loop of pretraining and fine-tuning, in one process or in as many as torchrun starts.

All randomness is keyed by the seed of the run, the epoch and the sample. So the result does not depend on the number of
processes or on how a batch is cut into passes, but for the rounding of sums; and a run that is killed at any moment and
resumed reaches the same weights, bit for bit on the same machine, as one that is not killed.
"""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from denim.nim.checkpoint import Pretrained
from denim.nim.cuda_graph import WARM_UP, WARM_UP_DDP, UpdateGraph
from denim.nim.data import Batch, Loader, PlannedLoader, Source, TrainView, open_loader
from denim.nim.owner import owned_by_first
from denim.nim.parallel import alone, distribute, whole, without_sync
from denim.nim.precision import autocast, resolve_precision, tf32_products
from denim.nim.prefetch import Inputs, prefetched
from denim.nim.progress import ProgressReport
from denim.nim.ranks import Ranks
from denim.nim.run import Metrics, Waits, peak_memory, prepare_folder
from denim.nim.saving import CheckpointWriter, Progress, latest_checkpoint, load_optimizer, load_progress, newest_whole
from denim.nim.settings import TrainConfig
from denim.nim.stopping import StopRequest, stop_requests
from denim.nim.text import printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Task", "TrainState", "begin", "keyed_torch", "train", "training_loader", "training_parts", "training_step"]

READS_ARE_FREE = ("cpu",)  # devices that nobody waits for


class Task(nn.Module):
    """What is learnt. Its call, with the tensors that `prepare` makes, is the mean loss of a part of a batch, a scalar.

    Args:
        model: what is trained. What else the task holds must not be parameters that learn.
        card: what the model's card says of the training; arguments of `Pretrained.generate_model_card`.
    """

    def __init__(self, model: Pretrained, card: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.card = card

    def prepare(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """The arguments of `forward` by name, from a part of a batch and its epoch; may run in a thread of its own."""
        raise NotImplementedError

    def picture(self) -> Tensor | None:
        """A picture (C, H, W) in [0, 1] of what the model makes of a few images, at a checkpoint, on all ranks."""
        return None

    def measure(self) -> dict[str, float]:
        """Numbers by name that the model is worth on images that are not trained on, the same on all ranks.

        It is called by all ranks, inside `alone` and in the precision of the training.
        """
        return {}


@contextmanager
def keyed_torch(key: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and of `device` with a key, and restore their states at the end.

    For what can draw from these generators alone, such as initialisation.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(key)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        yield


def training_loader(
    config: TrainConfig,
    source: Source,
    size: int,
    device: torch.device,
    ranks: Ranks,
    auto_augment: str | None = None,
) -> PlannedLoader:
    """The loader of a run: this rank's shuffled parts of random views, by the settings.

    Args:
        config: the settings.
        source: the training images.
        size: side of a view in pixels.
        device: of training; DALI leaves its batches there.
        ranks: the processes of the training.
        auto_augment: see `TrainView`.

    Raises:
        ValueError: no backend can serve, or not the one that the settings name; see `open_loader`. The batch cannot be
            cut as the settings say.
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
    micro_batch, _ = config.passes(ranks.world)
    return open_loader(
        source,
        view,
        micro_batch,
        seed=config.seed,
        workers=config.workers,
        backend=config.loader,
        rank=ranks.rank,
        world=ranks.world,
        device=device,
        max_bad=config.max_bad,
    )


@dataclass
class TrainState:
    """What a training step reads and changes.

    Attributes:
        config: the settings.
        ranks: the processes of the training.
        model: on its device, in training mode.
        module: the task, distributed; its call is the loss of a part.
        optimizer: of the model's parameters.
        scheduler: gives the learning rates of an update by its number.
        passes: forward passes of one update on this rank.
        updates_per_epoch: as many as the loader's parts fill; the rest of an epoch is left out.
        update: updates done.
        losses: float32 (), on the model's device: the sum of this rank's losses of the updates since `logged`.
        norms: float32 (), on the model's device: the sum of the norms of all ranks' gradients.
        logged: the update of the last line of metrics, which is the mean of the losses up to it.
        loader: state of this rank's loader after the last part that was used.
        average: moving averages of the parameters that learn, by name; None without `config.ema`.
        device_seconds: seconds times devices that earlier parts of the run have taken.
        graph: replays the updates; None without `config.cuda_graph`.
    """

    config: TrainConfig
    ranks: Ranks
    model: Pretrained
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Schedule
    passes: int
    updates_per_epoch: int
    update: int
    losses: Tensor
    norms: Tensor
    logged: int
    loader: dict[str, Any]
    average: dict[str, Tensor] | None
    device_seconds: float
    graph: UpdateGraph | None = None

    @property
    def total(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * self.updates_per_epoch


class Schedule(CosineLRScheduler):
    """timm's warm-up and cosine at every update. On CUDA the rates are one tensor there, which the fused step reads.

    Args:
        optimizer: whose groups get the rates, times their `lr_scale` where they have one.
        config: the settings.
        updates_per_epoch: updates of an epoch.
        device: of the parameters.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int, device: torch.device
    ) -> None:
        self.rates: Tensor | None = None
        warmup = round(config.warmup_epochs * updates_per_epoch)
        super().__init__(
            optimizer,
            t_initial=max(1, config.epochs * updates_per_epoch - warmup),
            lr_min=config.min_lr,
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        if device.type == "cuda" or config.cuda_graph:
            self.rates = torch.zeros(len(optimizer.param_groups), device=device)
            for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate

    def update_groups(self, values: Any) -> None:
        """Give the optimizer its rates: numbers, or in one copy from pinned memory the tensor that the groups share."""
        if self.rates is None:
            super().update_groups(values)
            return
        scales = [group.get("lr_scale", 1.0) for group in self.optimizer.param_groups]
        rates = [value * scale for value, scale in zip(values, scales, strict=True)]
        given = torch.tensor(rates, dtype=torch.float32)
        self.rates.copy_(given.pin_memory() if self.rates.is_cuda else given, non_blocking=True)

    def largest(self, update: int) -> float:
        """The largest rate of the update with a number."""
        scales: list[float] = [group.get("lr_scale", 1.0) for group in self.optimizer.param_groups]
        values: list[float] = self._get_values(update, on_epoch=False) or []
        return max(value * scale for value, scale in zip(values, scales, strict=True))


def training_step(state: TrainState, parts: Iterator[Inputs]) -> None:
    """One update, in place: gradients of all parts of a batch on all ranks, averaged, and a step of the optimizer.

    If the norm of the gradients is not finite, the step changes nothing, and `state.norms` is not finite from then on.
    On a CUDA device the step reads nothing back and waits for nothing.

    Args:
        state: what is changed.
        parts: yields `state.passes` parts.
    """
    state.scheduler.step_update(state.update)
    taken = _tensors(state, parts)
    if state.graph is None:
        _update(state, taken)
    else:
        state.graph.run(functools.partial(_update, state), list(taken))
    state.update += 1


def _tensors(state: TrainState, parts: Iterator[Inputs]) -> Iterator[dict[str, Tensor]]:
    for _ in range(state.passes):
        inputs = next(parts)
        state.loader = inputs.loader
        yield inputs.tensors


def _update(state: TrainState, parts: Iterable[dict[str, Tensor]]) -> None:
    """What the device does in an update: a function of tensors alone, since a CUDA graph repeats it."""
    config, device = state.config, state.losses.device
    state.optimizer.zero_grad(set_to_none=True)
    for part, tensors in enumerate(parts, start=1):
        with without_sync(state.module, state.model, last=part == state.passes):
            with autocast(config.precision, device):
                value = state.module(**tensors)
            if state.passes > 1:
                value = value / state.passes
            value.backward()
        state.losses += value.detach()
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    norm = whole(torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None]))
    state.norms += norm
    if config.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_grad, norm)
    # The fused step leaves everything as it is where this is 1 (what torch's GradScaler tells it). It is read on the
    # device: the host would have to wait for it. The difference is 0, or NaN where the norm is not finite; `isfinite`
    # alone is four launches.
    state.optimizer.found_inf = (norm - norm).ne(0).float()  # type: ignore[attr-defined]
    state.optimizer.step()
    if config.ema is not None and state.average is not None:
        named = dict(state.model.named_parameters())
        latest = [named[name] for name in state.average]
        get_ema_multi_avg_fn(config.ema)(list(state.average.values()), latest, state.update)


def begin(
    config: TrainConfig,
    task: Task,
    groups: list[dict[str, Any]],
    loader: Loader,
    ranks: Ranks,
    updates_per_epoch: int,
    checkpoint: Path | None = None,
) -> TrainState:
    """The state of a new run, or of a checkpoint; the loader's is set alike.

    Args:
        config: the settings.
        task: its model is on its device.
        groups: AdamW's parameter groups, with `lr_scale` where layers learn at different rates.
        loader: this rank's.
        ranks: the processes of the training.
        updates_per_epoch: updates of an epoch.
        checkpoint: folder of the checkpoint; None for a new run.

    Raises:
        CheckpointError: the checkpoint is not of this run.
    """
    model = task.model
    device = next(model.parameters()).device
    names = {parameter: name for name, parameter in model.named_parameters()}
    named = [{**group, "params": [names[parameter] for parameter in group["params"]]} for group in groups]
    progress = Progress() if checkpoint is None else load_progress(checkpoint, model)
    for state in progress.loaders:
        loader.load_state(state)
    precision = resolve_precision(config.precision, device)
    graph = UpdateGraph(device, WARM_UP_DDP if ranks.world > 1 else WARM_UP) if config.cuda_graph else None
    with graph.beside() if graph is not None else nullcontext():
        module = distribute(task, config, ranks, device, precision)
    # FSDP has replaced the parameters; their names are the same.
    parameters = dict(model.named_parameters())
    groups = [{**group, "params": [parameters[name] for name in group["params"]]} for group in named]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True, capturable=config.cuda_graph)
    average = None
    if config.ema is not None:
        average = {
            name: parameter.detach().clone() for name, parameter in parameters.items() if parameter.requires_grad
        }
    if checkpoint is not None:
        load_optimizer(checkpoint, model, optimizer, average or {}, ranks)
    schedule = Schedule(optimizer, config, updates_per_epoch, device)
    losses, norms = torch.tensor([progress.losses, progress.norms], device=device)
    _, passes = config.passes(ranks.world)
    return TrainState(
        config=config,
        ranks=ranks,
        model=model,
        module=module,
        optimizer=optimizer,
        scheduler=schedule,
        passes=passes,
        updates_per_epoch=updates_per_epoch,
        update=progress.update,
        losses=losses,
        norms=norms,
        logged=progress.logged,
        loader=loader.state(),
        average=average,
        device_seconds=progress.device_seconds,
        graph=graph,
    )


def training_parts(state: TrainState, task: Task, loader: Loader) -> Generator[Inputs, None, None]:
    """The inputs of all updates that are left, part by part, for `training_step`. Close it at the end.

    Args:
        state: of the training.
        task: makes tensors of a batch.
        loader: this rank's.
    """
    return prefetched(
        loader,
        task.prepare,
        state.losses.device,
        first=state.update * state.passes,
        per_epoch=state.updates_per_epoch * state.passes,
        stop=state.total * state.passes,
    )


def _check_finite(state: TrainState) -> None:
    """Raise FloatingPointError where a loss or a norm of the gradients since the last line of metrics is not finite."""
    updates = max(1, state.update - state.logged)
    loss, norm = state.losses.item() / updates, state.norms.item() / updates
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"the loss is {loss:g} and the norm of the gradients is {norm:g} near update {state.update}"
        )


def _average_losses(state: TrainState) -> float:
    """Make `state.losses` the mean over all ranks, and return it."""
    if state.ranks.world > 1:
        dist.all_reduce(state.losses)
        state.losses /= state.ranks.world
    return state.losses.item()


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
    task: Task,
    groups: list[dict[str, Any]],
    loader: Loader,
    *,
    title: str,
    console: Console,
    ranks: Ranks | None = None,
    source: Source | None = None,
) -> None:
    """Train a model in place and write its run folder. Rank 0 writes and prints.

    Args:
        config: the settings; `config.out` must not hold a run unless `config.resume`.
        task: what is learnt; its model is on its device, with the same weights on all ranks.
        groups: AdamW's parameter groups, with `lr_scale` where layers learn at different rates.
        loader: yields this rank's parts of the batches.
        title: of the progress bar.
        console: for progress and messages.
        ranks: the processes of the training; by default this one alone.
        source: the loader's; its manifest is kept in the run folder, for `training_source`.

    Raises:
        ValueError: the folder holds a run, or a run with other settings.
        OwnedError: another process writes to the folder.
        WriteError: the disk is full, or the folder cannot be written to.
        Stopped: SIGTERM or Ctrl-C; raised after a checkpoint of the update that was running.
        FloatingPointError: the loss, a gradient or a weight is not finite. Such weights are not saved.
        CheckpointError: no checkpoint can be read.
        BadSamplesError: more images than `config.max_bad` allows cannot be read.
        RankError: another rank has failed, or does not answer.
    """
    ranks = ranks or Ranks()
    _, passes = config.passes(ranks.world)
    updates_per_epoch = loader.steps_per_epoch // passes
    if updates_per_epoch == 0:
        raise ValueError(
            f"an epoch has {loader.steps_per_epoch} parts of {config.batch_size // passes} images, fewer than the "
            f"{passes} of an update: take a smaller batch_size"
        )
    kept = f"{config.out} has a checkpoint of the last whole update: the same command with --resume goes on there"
    with owned_by_first(config.out, ranks), stop_requests(kept) as stop:
        checkpoint = None
        with ranks.together():
            if ranks.is_first:
                prepare_folder(config, source)
                checkpoint = newest_whole(config.out)
        checkpoint = ranks.share(checkpoint)
        with ranks.together():
            state = begin(config, task, groups, loader, ranks, updates_per_epoch, checkpoint)
        _train(state, task, loader, title, console, stop)


def _train(state: TrainState, task: Task, loader: Loader, title: str, console: Console, stop: StopRequest) -> None:
    config, ranks, device = state.config, state.ranks, state.losses.device
    precision = resolve_precision(config.precision, device)
    metrics = Metrics(config.out, state.update) if ranks.is_first else None
    # A killed run has left lines of metrics of a later time than its checkpoint's.
    spent = max(state.device_seconds, metrics.device_seconds if metrics else 0.0)
    report = ProgressReport(console, title, state.update, state.total, config.batch_size, ranks.world, spent)
    report.say(f"{title}: {precision} on {device}{f', {ranks.world} processes' if ranks.world > 1 else ''}")
    bad: dict[str, str] = state.loader["bad"]
    checkpoint_every = config.checkpoint_every or state.updates_per_epoch
    measure_every = config.eval_every * state.updates_per_epoch
    minutes = config.checkpoint_minutes or math.inf
    writer = CheckpointWriter(
        config.out,
        ranks,
        keep=config.keep_checkpoints,
        keep_every=config.keep_every,
        in_background=device.type == "cuda",
        card=task.card,
    )
    writer.remove_old()
    # Where reading a number waits for nothing, each update is checked; elsewhere those that are logged or saved.
    check_always = device.type in READS_ARE_FREE
    parts = Waits(training_parts(state, task, loader))
    state.model.train()
    saved = time.monotonic()
    try:
        with report, tf32_products(precision == "tf32"), _naming_last_finite(config.out):
            while state.update < state.total:
                with ranks.naming():
                    training_step(state, parts)
                last = state.update == state.total
                log = state.update % config.log_every == 0 or last
                stopping, due = ranks.agree(bool(stop), time.monotonic() - saved > 60 * minutes)
                if stopping and not stop:
                    stop.number = signal.SIGTERM  # another rank has received it
                save = state.update % checkpoint_every == 0 or last or stopping or due
                measure = bool(config.eval_sigmas) and (state.update % measure_every == 0 or last)
                if log or save or measure or check_always:
                    # Before saving as well: two broken checkpoints would push out the last good one.
                    _check_finite(state)
                if measure:
                    began = time.perf_counter()
                    with alone(state.model), autocast(config.precision, device):
                        measured = task.measure()
                    report.show_measured(measured, time.perf_counter() - began)
                    if metrics:
                        epoch = state.update / state.updates_per_epoch
                        metrics.write({"update": state.update, "epoch": epoch, **measured})
                if not (log or save):
                    report.tick(state.update)
                    continue
                known, bad = bad, state.loader["bad"]
                if metrics and (new := {name: reason for name, reason in bad.items() if name not in known}):
                    metrics.write({"update": state.update, "bad": len(bad), "new_bad": new})
                losses = _average_losses(state)
                if log:
                    updates = state.update - state.logged
                    loss, norm, rate = losses / updates, state.norms.item() / updates, report.rate(state.update)
                    report.show(loss, rate)
                    if metrics:
                        metrics.write(
                            {
                                "update": state.update,
                                "epoch": state.update / state.updates_per_epoch,
                                "loss": loss,
                                "grad_norm": norm,
                                "lr": state.scheduler.largest(state.update - 1),
                                "images_per_second": rate,
                                "data_wait": parts.share(),
                                "peak_memory": peak_memory(device),
                                "device_seconds": report.device_seconds(),
                            }
                        )
                    state.logged = state.update
                    state.losses.zero_()
                    state.norms.zero_()
                report.tick(state.update)
                if save:
                    progress = Progress(
                        update=state.update,
                        logged=state.logged,
                        losses=state.losses.item(),
                        norms=state.norms.item(),
                        loaders=tuple(ranks.gather(state.loader)),
                        device_seconds=report.device_seconds(),
                    )
                    writer.save(state.model, state.optimizer, state.average or {}, progress)
                    if (picture := task.picture()) is not None and metrics:
                        metrics.show(state.update, picture)
                    saved = time.monotonic()
                    if stopping:
                        writer.finish()
                        stop.heed()
            writer.finish()
    finally:
        parts.close()
        if metrics:
            metrics.close()
    if bad:
        listed = "".join(f"\n  {printable(reason)}" for reason in bad.values())
        report.say(f"{title}: {len(bad)} images could not be read and were replaced by others:{listed}")
    state.model.eval()
    weights = {name: whole(tensor) for name, tensor in {**state.model.state_dict(), **(state.average or {})}.items()}
    if ranks.is_first:
        state.model.save_pretrained(config.out / "model", weights, model_card_kwargs=task.card)
    ranks.barrier()
