"""Pretraining of a denoiser: `pretrain(PretrainConfig(...))`."""

from __future__ import annotations

import torch
from rich.console import Console
from timm.optim import param_groups_weight_decay
from torch import Tensor

from denim.kernels import Domain, derive_seeds
from denim.nim.autoencoder import Autoencoder, preset
from denim.nim.data import Batch, to_device
from denim.nim.engine import keyed_torch, train, training_loader
from denim.nim.objectives import Objective
from denim.nim.precision import resolve_precision
from denim.nim.run import training_source
from denim.nim.settings import PretrainConfig, pick_device
from denim.nim.text import open_console

__all__ = ["pretrain"]


def pretrain(config: PretrainConfig, console: Console | None = None) -> Autoencoder:
    """Pretrain an autoencoder; its run folder is `config.out`, the finished model `config.out/model`.

    Returns:
        The model, in evaluation mode, on the device of training.

    Raises:
        ValueError: settings or data that do not fit; raised before any work.
        FloatingPointError: the loss, a gradient or a weight is not finite.
    """
    console = console or open_console(stderr=True)
    device = pick_device(config.device)
    resolve_precision(config.precision, device)  # raises where the device lacks it
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
    loader = training_loader(config, source, architecture.img_size[0], device)
    with keyed_torch(config.seed, torch.device("cpu")):
        model = Autoencoder(architecture)
    model.to(device)

    def loss(batch: Batch, epoch: int) -> Tensor:
        # Keyed by the epoch and the sample alone: the same noise on any number of ranks.
        seeds = derive_seeds(config.seed, Domain.TRAINING, batch.ids, epoch)
        sigma = None if objective.sigma is None else to_device(objective.sigma.sample(seeds), device)
        return objective.loss(model, to_device(batch.images, device), sigma, to_device(seeds, device))

    groups = param_groups_weight_decay(model, config.weight_decay)
    title = f"pretraining {config.preset} ({config.objective})"
    train(config, model, groups, loader, loss, title=title, console=console, source=source)
    return model
