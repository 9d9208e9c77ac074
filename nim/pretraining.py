"""Pretraining of a denoiser: `pretrain(PretrainConfig(...))`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from timm.optim import param_groups_weight_decay
from torch import Tensor

from denim.kernels import Domain, derive_seeds
from denim.nim.autoencoder import PRESETS, Autoencoder, preset
from denim.nim.data import Batch, open_loader
from denim.nim.engine import TrainConfig, keyed_torch, pick_device, train, training_source
from denim.nim.objectives import Objective

__all__ = ["PretrainConfig", "pretrain"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Settings of pretraining; the defaults are the published recipe (You et al. 2023, appendix; He et al. 2022).

    Attributes:
        preset: micro, tiny, small, base, large or huge.
        objective: nim, mae or dmae.
        target: "norm" (each patch normalised by its own mean and variance) or "raw".
        sigma: noise levels: `70`, `gamma:25,3`, `uniform:0,30`; by default the published ones of the objective.
        mask_ratio: share of hidden patches, for mae and dmae.
        img_size: side in pixels; by default the preset's.
        patch_size: side of a patch; by default the preset's.
        channels: 1 or 3; by default those of the data.
    """

    preset: str = "base"
    objective: str = "nim"
    target: str = "norm"
    sigma: str | None = None
    mask_ratio: float = 0.75
    img_size: int | None = None
    patch_size: int | None = None
    channels: int | None = None
    epochs: int = 800
    warmup_epochs: float = 40
    batch_size: int = 4096
    base_lr: float = 1.5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    crop_scale: tuple[float, float] | None = (0.2, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in ("norm", "raw"):
            raise ValueError(f"target must be norm or raw, got {self.target!r}")
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; choose one of {', '.join(PRESETS)}")
        Objective.published(self.objective, self.sigma, self.mask_ratio)


def pretrain(config: PretrainConfig, console: Console | None = None) -> Autoencoder:
    """Pretrain an autoencoder; its run folder is `config.out`, the finished model `config.out/model`.

    Returns:
        The model, in evaluation mode, on the device of training.

    Raises:
        ValueError: settings or data that do not fit; raised before any work.
        FloatingPointError: the loss is not finite.
    """
    console = console or Console(stderr=True)
    device = pick_device(config.device)
    objective = Objective.published(config.objective, config.sigma, config.mask_ratio)
    source = training_source(config, config.channels, labelled=False)
    architecture = preset(
        config.preset,
        img_size=config.img_size,
        patch_size=config.patch_size,
        channels=source.channels,
        target=config.target,
        objective=config.objective,
    )
    view = config.view(architecture.img_size[0])
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
        model = Autoencoder(architecture)
    model.to(device)

    def loss(batch: Batch, epoch: int) -> Tensor:
        # Keyed by the epoch and the sample alone: the same noise on any number of ranks.
        seeds = derive_seeds(config.seed, Domain.TRAINING, batch.ids, epoch)
        sigma = None if objective.sigma is None else objective.sigma.sample(seeds).to(device, non_blocking=True)
        images, seeds = batch.images.to(device, non_blocking=True), seeds.to(device, non_blocking=True)
        return objective.loss(model, images, sigma, seeds)

    groups = param_groups_weight_decay(model, config.weight_decay)
    title = f"pretraining {config.preset} ({config.objective})"
    train(config, model, groups, loader, loss, title=title, console=console, source=source)
    return model
