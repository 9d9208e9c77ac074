"""Fine-tuning of a classifier on clean, noisy or denoised images: `finetune(FinetuneConfig(...))`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from timm.optim import param_groups_layer_decay
from torch import Tensor

from denim.kernels import Domain, derive_seeds
from denim.nim.augmentation import Augmentation
from denim.nim.autoencoder import Autoencoder
from denim.nim.checkpoint import CheckpointError
from denim.nim.classifier import Classifier, ClassifierConfig, check_logits
from denim.nim.data import Batch, EvalView, Source, open_loader, to_device
from denim.nim.engine import keyed_torch, train, training_loader
from denim.nim.precision import resolve_precision
from denim.nim.reconstruction import add_noise, case_of, check_degradation, reconstruct
from denim.nim.run import training_source
from denim.nim.settings import FinetuneConfig, pick_device
from denim.nim.sigma import Sigma
from denim.nim.text import open_console

__all__ = ["accuracy", "finetune"]


def finetune(config: FinetuneConfig, console: Console | None = None) -> Classifier:
    """Fine-tune a classifier; its run folder is `config.out`, the finished model `config.out/model`.

    Train input = clamp(denoise(mixup(x) + noise)), as published (You et al. 2023, section 4).

    Returns:
        The model, in evaluation mode, on the device of training.

    Raises:
        ValueError: settings or data that do not fit; CheckpointError: no such denoiser. Raised before any work.
        FloatingPointError: the loss, a gradient or a weight is not finite.
    """
    console = console or open_console(stderr=True)
    device = pick_device(config.device)
    resolve_precision(config.precision, device)  # raises where the device lacks it
    autoencoder = Autoencoder.from_pretrained(config.denoiser).requires_grad_(False)
    check_degradation(autoencoder, config.degrade, config.statistics)
    body = autoencoder.config
    config = config.for_denoiser(body)
    source = training_source(config, body.channels, labelled=True)
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
    loader = training_loader(config, source, body.img_size[0], device, config.auto_augment)
    with keyed_torch(config.seed, torch.device("cpu")):
        model = Classifier(architecture)
    try:
        model.load_encoder(autoencoder.state_dict())
    except ValueError as error:
        raise CheckpointError(f"{config.denoiser} cannot start this classifier: {error}") from error
    autoencoder.to(device)
    model.to(device)

    levels = Sigma.parse(config.sigma)
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

    def degrade(pixels: Tensor, seeds: Tensor) -> Tensor:
        if config.trained_on == "clean":
            return pixels
        sigma, seeds = to_device(levels.sample(seeds), device), to_device(seeds, device)
        if config.trained_on == "noisy":
            return add_noise(pixels, sigma, seeds)
        return reconstruct(
            autoencoder,
            pixels,
            None if config.degrade == "mask" else sigma,
            seeds,
            degrade=config.degrade,
            mask_ratio=config.mask_ratio,
            statistics=config.statistics,
        )

    def loss(batch: Batch, epoch: int) -> Tensor:
        seeds = derive_seeds(config.seed, Domain.FINETUNING, batch.ids, epoch)
        draws = augmentation.draw(batch.ids, epoch).to(device)
        pixels = to_device(batch.images, device).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            pixels = degrade(augmentation.images(pixels, draws), seeds)
        targets = augmentation.targets(to_device(batch.labels, device), draws)
        return F.cross_entropy(model(pixels, draws.seeds), targets)

    groups = param_groups_layer_decay(
        model, config.weight_decay, model.no_weight_decay(), layer_decay=config.layer_decay
    )
    title = f"fine-tuning on {config.trained_on} images"
    train(config, model, groups, loader, loss, title=title, console=console, source=source)
    return model


@torch.no_grad()
def accuracy(
    model: Classifier,
    source: Source,
    batch_size: int = 256,
    *,
    backend: str = "auto",
    workers: int = 0,
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
    return correct / total
