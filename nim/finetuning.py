"""Fine-tuning of a classifier on clean, noisy or denoised images: `finetune(FinetuneConfig(...))`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor

from denim.kernels import Domain, derive_seeds
from denim.nim.adversarial import evaluating
from denim.nim.augmentation import Augmentation, Draws
from denim.nim.autoencoder import Autoencoder
from denim.nim.checkpoint import CheckpointError
from denim.nim.classifier import Classifier, ClassifierConfig, check_logits
from denim.nim.cuda_graph import check_capturable
from denim.nim.data import Batch, EvalView, Source, Subset, TorchLoader, open_loader
from denim.nim.engine import Task, keyed_torch, train, training_loader
from denim.nim.parallel import alone
from denim.nim.plan import with_fitting_micro_batch
from denim.nim.precision import precise, resolve_precision
from denim.nim.ranks import Ranks, joined
from denim.nim.reconstruction import add_noise, case_of, check_degradation, reconstruct
from denim.nim.run import card_of_run, fitted, training_source, write_result
from denim.nim.runs import draw_curve
from denim.nim.saving import latest_checkpoint
from denim.nim.settings import FinetuneConfig, pick_device
from denim.nim.sigma import Sigma
from denim.nim.text import open_console, printable
from denim.nim.validation import HeldOut, at_levels, divided

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FinetuneTask", "accuracy", "defended_accuracy", "finetune", "standardise_features"]

# Of a linear probe: images whose features are standardised, and what is added to their variance, as in MAE.
PROBE_IMAGES, PROBE_EPS = 4096, 1e-6


class FinetuneTask(Task):
    """Classification of images that are augmented, then degraded: clamp(denoise(mixup(x) + noise)), as published.

    Source: You et al. 2023, section 4. Everything random is keyed by the seed, the epoch and the samples.

    Args:
        model: the classifier.
        autoencoder: the denoiser, frozen, on the device of the classifier.
        config: the settings.
        augmentation: erasing, mixing and the soft targets.
        card: see `Task`.
        held_out: labelled images that are not trained on, for `measure`; None where there are none.
    """

    model: Classifier

    def __init__(
        self,
        model: Classifier,
        autoencoder: Autoencoder,
        config: FinetuneConfig,
        augmentation: Augmentation,
        card: Mapping[str, Any] | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        super().__init__(model, card)
        self.held_out = held_out
        self.autoencoder = autoencoder
        self.config = config
        self.augmentation = augmentation
        self.levels = Sigma.parse(config.sigma)
        self.adversarial = config.adversarial_training

    def prepare(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """The arguments of `forward`, all but the images made on the host."""
        seeds = derive_seeds(self.config.seed, Domain.FINETUNING, batch.ids, epoch)
        draws = self.augmentation.draw(batch.ids, epoch)
        inputs = {"images": batch.images, "labels": batch.labels}
        inputs |= {"augment_seeds": draws.seeds, "boxes": draws.boxes, "weights": draws.weights}
        if self.config.trained_on != "clean":
            inputs |= {"sigma": self.levels.sample(seeds), "seeds": seeds}
        return inputs

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        augment_seeds: Tensor,
        boxes: Tensor,
        weights: Tensor,
        sigma: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy with soft targets, a scalar.

        Args:
            images: uint8 (B, H, W, C).
            labels: int64 (B,).
            augment_seeds: int64 (B,), see `Draws`, as for boxes and weights.
            boxes: int32 (B, n, 4).
            weights: float32 (B, 3).
            sigma: (B,), in 0-255 pixel levels; None where the classifier sees clean images.
            seeds: int64 (B,), of noise and mask; None likewise.
        """
        draws = Draws(augment_seeds, boxes, weights)
        with torch.no_grad():
            pixels = self.augmentation.images(images.permute(0, 3, 1, 2).float() / 255, draws)
            if sigma is not None and seeds is not None:
                pixels = self.degraded(pixels, sigma, seeds)
        targets = self.augmentation.targets(labels, draws)
        if self.adversarial is not None:
            # Erased pixels may lie outside of the range in which images are attacked.
            return self.adversarial.loss(self.model, pixels.clamp(0, 1), targets, augment_seeds)
        return F.cross_entropy(self.model(pixels, augment_seeds), targets)

    def measure(self) -> dict[str, float]:
        """See `defended_accuracy`."""
        if self.held_out is None:
            return {}
        return defended_accuracy(self, self.model, self.held_out, self.config.eval_sigmas)

    def degraded(self, pixels: Tensor, sigma: Tensor, seeds: Tensor) -> Tensor:
        """The images that the classifier gets in a defense: with noise and, but for trained_on noisy, denoised.

        Args:
            pixels: float (B, C, H, W) in [0, 1].
            sigma: (B,), in 0-255 pixel levels; without effect with degrade mask.
            seeds: int64 (B,).
        """
        config = self.config
        if config.trained_on == "noisy":
            return add_noise(pixels, sigma, seeds)
        return reconstruct(
            self.autoencoder,
            pixels,
            None if config.degrade == "mask" else sigma,
            seeds,
            degrade=config.degrade,
            mask_ratio=config.mask_ratio,
            statistics=config.statistics,
        )


def finetune(config: FinetuneConfig, console: Console | None = None) -> Classifier:
    """Fine-tune a classifier; its run folder is `config.out`, the finished model `config.out/model`.

    What is learnt is a `FinetuneTask`. Under torchrun each process takes its share of every batch. At the end rank 0
    writes the accuracy on images that were not trained on to `config.out/result.json`, if there are any (see
    `TrainConfig.val_split`): "source" (their name), "images" (how many) and "accuracy" (the share that is right,
    without noise and without a defense); and with `eval_sigmas`, of "eval_images" of them, "accuracy_sigma_35" and so
    on (see `defended_accuracy`).

    Returns:
        The model, in evaluation mode, on the device of training.

    Raises:
        ValueError: settings or data that do not fit; CheckpointError: no such denoiser. Raised before any work.
        FloatingPointError: the loss, a gradient or a weight is not finite.
        RankError: another process of the training has failed.
    """
    device = pick_device(config.device)
    resolve_precision(config.precision, device)  # raises where the device lacks it
    check_capturable(config, device)
    autoencoder = Autoencoder.from_pretrained(str(config.denoiser)).requires_grad_(False)
    check_degradation(autoencoder, config.degrade, config.statistics)
    body = autoencoder.config
    config = config.for_denoiser(body)
    with joined(device, config.stall_timeout, alone=config.fsdp) as ranks:
        console = console or open_console(stderr=True, quiet=not ranks.is_first)
        with ranks.in_turn():
            whole = training_source(config, body.channels, labelled=True)
            source, validation = divided(config, whole, labelled=True)
        config = fitted(config, source, console, is_first=ranks.is_first)
        if validation is None:
            console.print(
                f"{printable(whole.name)} has no images beside those that are trained on, so that no accuracy will be "
                "stated: --val-split 0.1 holds out a tenth of them",
                markup=False,
                soft_wrap=True,
            )
        trained_on = config.trained_on
        if trained_on == "denoised":
            trained_on = case_of(autoencoder, config.degrade, config.statistics)
        architecture = ClassifierConfig.for_encoder(
            body,
            len(source.classes),
            drop_path=config.drop_path,
            classes=tuple(source.classes),
            trained_on=trained_on,
        )
        if config.adversarial is None:  # which keeps the activations of several passes
            config = with_fitting_micro_batch(
                config,
                architecture,
                device,
                ranks,
                console,
                besides=sum(tensor.nbytes for tensor in autoencoder.state_dict().values()),
                multiple_of=config.batch_unit,
            )
        augmentation = Augmentation(
            config.seed,
            body.img_size,
            body.mean,
            body.std,
            len(source.classes),
            erasing=config.erasing,
            mixup=config.mixup,
            cutmix=config.cutmix,
            mixup_group=config.mixup_group,
            smoothing=config.smoothing,
        )
        augmentation.check_count(config.passes(ranks.world)[0])
        loader = training_loader(config, source, body.img_size[0], device, ranks, config.auto_augment)
        with keyed_torch(config.seed, torch.device("cpu")):
            model = Classifier(architecture)
        try:
            model.load_encoder(autoencoder.state_dict())
        except ValueError as error:
            raise CheckpointError(f"{config.denoiser} cannot start this classifier: {error}") from error
        model.to(device)
        if config.linear_probe:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("head."))
        is_noisy = config.trained_on != "clean" and config.degrade != "mask"
        card = card_of_run(config, source, config.sigma if is_noisy else "none")
        held_out = None
        if validation is not None and config.eval_sigmas:
            held_out = HeldOut(validation, body.img_size[0], config, ranks, device)
            len(held_out.batches)  # what cannot be read is known before any work
        task = FinetuneTask(model, autoencoder.to(device), config, augmentation, card, held_out)
        if config.linear_probe and not (config.resume and latest_checkpoint(config.out)):
            standardise_features(task, source, ranks)
        groups = param_groups_layer_decay(
            model, config.weight_decay, model.no_weight_decay(), layer_decay=config.layer_decay
        )
        what = "linear probe" if config.linear_probe else "fine-tuning"
        title = f"{what} on {config.trained_on} images"
        train(config, task, groups, loader, title=title, console=console, ranks=ranks, source=whole)
        # As it was saved: the trained one may be sharded, and its blocks compiled.
        model = Classifier.from_pretrained(config.out / "model").to(device)
        measured: dict[str, float] = {}
        if held_out is not None:
            with alone(model), precise("fp32", device):
                measured = defended_accuracy(task, model, held_out, config.eval_sigmas)
    if ranks.is_first:
        draw_curve(config.out)
    if validation is not None and ranks.is_first:
        right, count = _count_right(model, validation, 256, config.loader, config.workers, config.max_bad)
        stated: dict[str, str | float] = {"source": validation.name, "images": count, "accuracy": right / count}
        write_result(config.out, {**measured, **stated})
    return model


@torch.no_grad()
def standardise_features(task: FinetuneTask, source: Source, ranks: Ranks) -> None:
    """Give the norm before the head weights with which each feature has mean 0 and variance 1 over training images.

    For this MAE's linear probe has a BatchNorm without weights of its own before the linear layer (He et al. 2022,
    appendix A.1). Behind a frozen encoder the statistics do not change, so here they are those of up to 4,096 training
    images, computed once, in place of each batch's: training does not depend on how a batch is cut, and the model stays
    a plain ViT.

    Args:
        task: with the classifier, in any mode, whose head is new.
        source: the training images. Which are taken depends on the seed; they are degraded as in the training.
        ranks: the processes of the training; rank 0 computes for all.

    Raises:
        BadSamplesError: too many of the images cannot be read.
    """
    model, config = task.model, task.config
    statistics = None
    with ranks.together(), evaluating(model):
        if ranks.is_first:
            chosen = Subset(source, min(PROBE_IMAGES, len(source)), config.seed)
            size, (micro_batch, _) = model.config.img_size[0], config.passes(ranks.world)
            batch_size = min(micro_batch, len(chosen))
            loader = TorchLoader(chosen, EvalView(size), batch_size, shuffle=False, last="keep", max_bad=config.max_bad)
            features = [_features(task, batch.counted()) for batch in loader.epoch(0)]
            statistics = torch.var_mean(torch.cat(features), dim=0, correction=0)
    variance, mean = ranks.share(statistics)
    norm: Any = model.fc_norm
    deviation = (variance + PROBE_EPS).sqrt()
    norm.weight.copy_(norm.weight.double().cpu() / deviation)
    norm.bias.copy_((norm.bias.double().cpu() - mean) / deviation)


def _features(task: FinetuneTask, batch: Batch) -> Tensor:
    """What the head gets of images, which are degraded as in the training: float64 (B, embed_dim), on the host."""
    device = next(task.model.parameters()).device
    seeds = derive_seeds(task.config.seed, Domain.FINETUNING, batch.ids, 0)
    pixels = batch.images.to(device).permute(0, 3, 1, 2).float() / 255
    if task.config.trained_on != "clean":
        pixels = task.degraded(pixels, task.levels.sample(seeds).to(device), seeds.to(device))
    model: Any = task.model
    features: Tensor = model.forward_head(model.forward_features(pixels), pre_logits=True)
    return features.double().cpu()


def defended_accuracy(
    task: FinetuneTask, model: Classifier, held_out: HeldOut, sigmas: Sequence[float]
) -> dict[str, float]:
    """Shares of clean images that a classifier gets right: as they are, and degraded and denoised as a `De3` does it.

    Args:
        task: says how: with its denoiser or, trained on noisy images, with noise alone.
        model: in evaluation mode, on the device of the images.
        held_out: labelled images that are not trained on.
        sigmas: noise levels in 0-255 pixel levels.

    Returns:
        "accuracy", "accuracy_sigma_35" and so on, and "eval_images".

    Raises:
        FloatingPointError: logits are not finite.
    """

    def values(images: Tensor, labels: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        pixels = images.permute(0, 3, 1, 2).float() / 255

        def right(pixels: Tensor) -> Tensor:
            logits = model(pixels)
            found: Tensor = (logits.argmax(dim=-1) == labels).double()
            return torch.where(logits.isfinite().all(dim=-1), found, math.nan)

        def at(level: Tensor) -> Tensor:
            return right(task.degraded(pixels, level, seeds))

        return {"accuracy": right(pixels), **at_levels("accuracy", sigmas, at, len(images), images.device)}

    return held_out.measure(values)


def accuracy(
    model: Classifier,
    source: Source,
    batch_size: int = 256,
    *,
    backend: str = "auto",
    workers: int | None = None,
    max_bad: float = 0.01,
) -> float:
    """Share of a source's images that a classifier gets right, without noise and without a defense.

    Every image that can be read counts once.

    Args:
        model: a classifier, in evaluation mode.
        source: labelled images.
        batch_size: images per pass.
        backend: see `open_loader`.
        workers: see `open_loader`.
        max_bad: see `open_loader`.

    Raises:
        FloatingPointError: logits are not finite.
    """
    right, count = _count_right(model, source, batch_size, backend, workers, max_bad)
    return right / count


@torch.no_grad()
def _count_right(
    model: Classifier, source: Source, batch_size: int, backend: str, workers: int | None, max_bad: float
) -> tuple[int, int]:
    """How many images a classifier gets right, of how many that can be read; see `accuracy`."""
    device = next(model.parameters()).device
    view = EvalView(model.config.img_size[0])
    loader = open_loader(
        source,
        view,
        batch_size,
        shuffle=False,
        last="keep",
        workers=workers,
        backend=backend,
        device=device,
        max_bad=max_bad,
    )
    correct = total = 0
    for batch in loader.epoch(0):
        counted = batch.to(device).counted()
        pixels = counted.images.permute(0, 3, 1, 2).float() / 255
        logits = model(pixels)
        check_logits(logits, counted.ids)
        correct += int((logits.argmax(dim=-1) == counted.labels).sum())
        total += len(counted.ids)
    return correct, total
