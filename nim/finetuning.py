"""Fine-tuning of a classifier on clean, noisy or denoised images: `finetune(FinetuneConfig(...))`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from torch import Tensor

from denim.kernels import Domain, derive_seeds
from denim.nim.autoencoder import Autoencoder
from denim.nim.checkpoint import CheckpointError
from denim.nim.classifier import Classifier, ClassifierConfig
from denim.nim.data import Batch, EvalView, Source, keyed_globals, open_loader
from denim.nim.engine import TrainConfig, keyed_torch, pick_device, train, training_source
from denim.nim.reconstruction import add_noise, check_degradation, reconstruct
from denim.nim.sigma import Sigma

__all__ = ["FinetuneConfig", "finetune", "training_images"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Settings of fine-tuning; the defaults are the published recipe for ViT-B (You et al. 2023; He et al. 2022).

    Attributes:
        denoiser: folder of the pretrained autoencoder: its encoder starts the classifier, and it rebuilds the
            training images where `trained_on` is "denoised". It stays frozen.
        trained_on: the images: "denoised", "noisy" (not denoised) or "clean".
        sigma: noise levels of the training images: `70`, `gamma:25,3`, `uniform:0,30`.
        degrade: "noise", "mask" or "both": how images are degraded before the denoiser.
        mask_ratio: share of hidden patches, for "mask" and "both".
        statistics: "input" or "noisy": see `reconstruct`; without effect for a raw target.
        layer_decay: learning rate of a layer relative to the one above it.
        drop_path: rate of stochastic depth.
        auto_augment: RandAugment: timm's policy (loader torch), DALI's own such as "dali-rand-m9-n2" (loader dali;
            `TrainView` says what differs), or None.
        erasing: probability of random erasing.
        mixup, cutmix: their alpha; 0 for none.
        smoothing: label smoothing.
    """

    denoiser: Path
    trained_on: str = "denoised"
    sigma: str = "uniform:0,30"
    degrade: str = "noise"
    mask_ratio: float = 0.75
    statistics: str = "input"
    epochs: int = 100
    warmup_epochs: float = 5
    batch_size: int = 1024
    base_lr: float = 1e-3
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    layer_decay: float = 0.75
    drop_path: float = 0.1
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_on not in ("denoised", "noisy", "clean"):
            raise ValueError(f"trained_on must be denoised, noisy or clean, got {self.trained_on!r}")
        check_degradation(None, self.degrade, self.statistics)
        Sigma.parse(self.sigma)
        for name in ("drop_path", "erasing", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if (self.mixup or self.cutmix) and self.part_size % 2:
            raise ValueError(f"mixup and cutmix pair images: {self.part_size} images per pass is an odd number")

    def training_case(self, autoencoder: Autoencoder) -> str:
        """What the classifier records about its training images (see `training_images`)."""
        if self.trained_on != "denoised":
            return self.trained_on
        return training_images(autoencoder, self.degrade, self.statistics)


def training_images(autoencoder: Autoencoder | None, degrade: str, statistics: str) -> str:
    """The case of denoised images as a word, such as "noise, raw target" or "noise, input statistics"."""
    if autoencoder is None:
        return "noisy"
    return f"{degrade}, {f'{statistics} statistics' if autoencoder.config.target == 'norm' else 'raw target'}"


def finetune(config: FinetuneConfig, console: Console | None = None) -> Classifier:
    """Fine-tune a classifier; its run folder is `config.out`, the finished model `config.out/model`.

    Train input = clamp(denoise(mixup(x) + noise)), as published (You et al. 2023, section 4).

    Returns:
        The model, in evaluation mode, on the device of training.

    Raises:
        ValueError: settings or data that do not fit; CheckpointError: no such denoiser. Raised before any work.
        FloatingPointError: the loss is not finite.
    """
    console = console or Console(stderr=True)
    device = pick_device(config.device)
    autoencoder = Autoencoder.from_pretrained(config.denoiser).requires_grad_(False).to(device)
    check_degradation(autoencoder, config.degrade, config.statistics)
    body = autoencoder.config
    source = training_source(config, body.channels, labelled=True)
    architecture = ClassifierConfig.for_encoder(
        body,
        len(source.classes),
        drop_path=config.drop_path,
        classes=tuple(source.classes),
        trained_on=config.training_case(autoencoder),
    )
    view = config.view(body.img_size[0], config.auto_augment)
    loader = open_loader(
        source,
        view,
        config.part_size,
        seed=config.seed,
        workers=config.workers,
        backend=config.loader,
        device=device,
        max_bad=config.max_bad,
    )
    with keyed_torch(config.seed, torch.device("cpu")):
        model = Classifier(architecture)
    try:
        model.load_encoder(autoencoder.state_dict())
    except ValueError as error:
        raise CheckpointError(f"{config.denoiser} cannot start this classifier: {error}") from error
    model.to(device)

    levels = Sigma.parse(config.sigma)
    erase = RandomErasing(config.erasing, mode="pixel", device=device)
    mixup = None
    if config.mixup or config.cutmix:
        mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=len(source.classes))
    soft_loss = SoftTargetCrossEntropy()

    def degrade(pixels: Tensor, seeds: Tensor) -> Tensor:
        if config.trained_on == "clean":
            return pixels
        sigma = levels.sample(seeds).to(device)
        if config.trained_on == "noisy":
            return add_noise(pixels, sigma, seeds.to(device))
        return reconstruct(
            autoencoder,
            pixels,
            None if config.degrade == "mask" else sigma,
            seeds.to(device),
            degrade=config.degrade,
            mask_ratio=config.mask_ratio,
            statistics=config.statistics,
        )

    def loss(batch: Batch, epoch: int) -> Tensor:
        seeds = derive_seeds(config.seed, Domain.FINETUNING, batch.ids, epoch)
        labels = batch.labels.to(device, non_blocking=True)
        pixels = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        target: Tensor | None = None
        # timm's erasing and mixup draw from the process's generators; its erasing writes N(0, 1) in normalised space.
        with torch.no_grad(), keyed_globals(int(seeds[0])):
            if config.erasing:
                pixels = erase((pixels - model.mean) / model.std) * model.std + model.mean
            if mixup is not None:
                pixels, target = mixup(pixels, labels)
            pixels = degrade(pixels, seeds)
        logits = model(pixels)
        if target is None:
            return F.cross_entropy(logits, labels, label_smoothing=config.smoothing)
        value: Tensor = soft_loss(logits, target)
        return value

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
    """Share of a source's images that a classifier gets right, undegraded and undefended.

    Each image that can be read counts once.

    Args:
        model: a classifier, in evaluation mode.
        source: labelled images.
        batch_size: images per pass.
        backend, workers, max_bad: see `open_loader`.
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
        correct += int((model(pixels).argmax(dim=-1) == counted.labels).sum())
        total += len(counted.ids)
    return correct / total
