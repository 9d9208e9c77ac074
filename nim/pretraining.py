"""Pretraining of a denoiser: `pretrain(PretrainConfig(...))`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor

from denim.kernels import Domain, derive_seeds
from denim.kernels.patches import unpatchify
from denim.nim.autoencoder import Autoencoder, Mask, preset
from denim.nim.cuda_graph import check_capturable
from denim.nim.data import BadSamplesError, Batch, EvalView, Source, Subset, TorchLoader
from denim.nim.engine import Task, keyed_torch, train, training_loader
from denim.nim.objectives import Objective
from denim.nim.parallel import alone
from denim.nim.plan import with_fitting_micro_batch
from denim.nim.precision import autocast, precise, resolve_precision
from denim.nim.ranks import joined
from denim.nim.reconstruction import add_noise, reconstruct
from denim.nim.run import card_of_run, fitted, training_source, write_result
from denim.nim.runs import draw_curve
from denim.nim.saving import latest_checkpoint
from denim.nim.settings import PretrainConfig, pick_device
from denim.nim.text import open_console, printable
from denim.nim.validation import HeldOut, at_levels, divided, psnr
from denim.nim.warm_start import warm_start

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["PretrainTask", "pretrain"]

EXAMPLES = 4  # images of a picture
DEGRADATION = {"nim": "noise", "mae": "mask", "dmae": "both"}  # of an objective
FINAL_SIGMAS = (70.0,)  # at which a finished model is measured where the settings name no others


class PretrainTask(Task):
    """Reconstruction of degraded images. Noise, masks and levels are keyed by the seed, the epoch and the sample.

    Args:
        model: the autoencoder. What the objective does not use is frozen: DDP waits for the gradients of all else.
        objective: how images are degraded.
        seed: of the run.
        precision: of pictures.
        examples: images of the model's size, for pictures; None for none.
        card: see `Task`.
        held_out: images that are not trained on, for `measure`; None where there are none.
        sigmas: noise levels at which it is measured.
    """

    model: Autoencoder

    def __init__(
        self,
        model: Autoencoder,
        objective: Objective,
        seed: int,
        precision: str = "fp32",
        examples: Batch | None = None,
        card: Mapping[str, Any] | None = None,
        held_out: HeldOut | None = None,
        sigmas: Sequence[float] = (),
    ) -> None:
        super().__init__(model, card)
        self.objective = objective
        self.seed = seed
        self.precision = precision
        self.examples = examples
        self.held_out = held_out
        self.sigmas = sigmas
        model.mask_token.requires_grad_(objective.name != "nim")

    def prepare(self, batch: Batch, epoch: int) -> dict[str, Tensor]:
        """images, seeds and, but for MAE, sigma."""
        seeds = derive_seeds(self.seed, Domain.TRAINING, batch.ids, epoch)
        inputs = {"images": batch.images, "seeds": seeds}
        if self.objective.sigma is not None:
            inputs["sigma"] = self.objective.sigma.sample(seeds)
        return inputs

    def forward(self, images: Tensor, seeds: Tensor, sigma: Tensor | None = None) -> Tensor:
        """The objective's loss; see `Objective.loss`."""
        return self.objective.loss(self.model, images, sigma, seeds)

    def picture(self) -> Tensor | None:
        """The examples, one below the other: degraded as in the first epoch, rebuilt, and clean.

        Hidden patches are grey. A model whose target is normalised gets each patch's mean and variance from the clean
        image.
        """
        if self.examples is None:
            return None
        config, device = self.model.config, next(self.model.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in self.prepare(self.examples, 0).items()}
        images, sigma, seeds = inputs["images"], inputs.get("sigma"), inputs["seeds"]
        clean = images.permute(0, 3, 1, 2) / 255
        degraded = clean if sigma is None else add_noise(images, sigma, seeds).clamp(0, 1)
        degrade = DEGRADATION[self.objective.name]
        if degrade != "noise":
            hidden = Mask.random(seeds, config.num_patches, self.objective.mask_ratio).hidden[..., None]
            every = hidden.expand(*hidden.shape[:-1], config.patch_size**2 * config.channels)
            pixels = unpatchify(every, config.img_size, config.patch_size).movedim(-1, -3)
            degraded = torch.where(pixels, 0.5, degraded)
        with alone(self.model), autocast(self.precision, device):
            rebuilt = reconstruct(
                self.model, images, sigma, seeds, degrade=degrade, mask_ratio=self.objective.mask_ratio
            )
        rows = torch.cat([degraded, rebuilt.float(), clean], dim=-1)
        return torch.cat(list(rows), dim=-2).cpu()

    def measure(self) -> dict[str, float]:
        """See `denoised_psnr`."""
        return {} if self.held_out is None else denoised_psnr(self.model, self.held_out, self.sigmas, self.objective)


def denoised_psnr(
    model: Autoencoder, held_out: HeldOut, sigmas: Sequence[float], objective: Objective
) -> dict[str, float]:
    """Mean PSNR, in dB, of images that are degraded as in the pretraining, rebuilt and clamped, in [0, 1].

    A model whose target is normalised gets each patch's mean and variance from the clean image, as in the published
    defense, so its numbers cannot be compared with those of a raw target.

    Args:
        model: in evaluation mode, on the device of the images.
        held_out: images that are not trained on.
        sigmas: noise levels in 0-255 pixel levels.
        objective: says whether patches are hidden, too.

    Returns:
        "psnr_sigma_35" and so on, and "eval_images".

    Raises:
        FloatingPointError: a number is not finite.
    """
    how: dict[str, Any] = {"degrade": DEGRADATION[objective.name], "mask_ratio": objective.mask_ratio}

    def values(images: Tensor, labels: Tensor, seeds: Tensor) -> dict[str, Tensor]:
        clean = images.permute(0, 3, 1, 2).float() / 255

        def at(level: Tensor) -> Tensor:
            return psnr(reconstruct(model, images, level, seeds, **how), clean)

        return at_levels("psnr", sigmas, at, len(images), images.device)

    return held_out.measure(values)


def _examples(source: Source, size: int, seed: int) -> Batch | None:
    """A few images of a source, for pictures; None where they cannot be read, which is no reason to stop a run."""
    chosen = Subset(source, min(EXAMPLES, len(source)), seed)
    try:
        return next(TorchLoader(chosen, EvalView(size), len(chosen), shuffle=False, max_bad=1).epoch(0))
    except (OSError, BadSamplesError):
        return None


def pretrain(config: PretrainConfig, console: Console | None = None) -> Autoencoder:
    """Pretrain an autoencoder; its run folder is `config.out`, the finished model `config.out/model`.

    At the end rank 0 writes what the finished model is worth on images that were not trained on to
    `config.out/result.json`, if there are any (see `TrainConfig.val_split`) and the objective adds noise: "source"
    (their name), "eval_images" (how many) and "psnr_sigma_70" (see `denoised_psnr`), or that of `eval_sigmas`.

    Returns:
        The model, in evaluation mode, on the device of training.

    Raises:
        ValueError: settings or data that do not fit; CheckpointError: weights in `init` that do not. Raised before any
            work.
        FloatingPointError: the loss, a gradient or a weight is not finite.
    """
    device = pick_device(config.device)
    resolve_precision(config.precision, device)  # raises where the device lacks it
    check_capturable(config, device)
    objective = Objective.published(config.objective, config.sigma, config.mask_ratio)
    with joined(device, config.stall_timeout, alone=config.fsdp) as ranks:
        console = console or open_console(stderr=True, quiet=not ranks.is_first)
        with ranks.in_turn():
            whole = training_source(config, config.channels, labelled=False)
            source, validation = divided(config, whole, labelled=False)
        config = fitted(config, source, console, is_first=ranks.is_first)
        architecture = preset(
            config.preset,
            img_size=config.img_size,
            patch_size=config.patch_size,
            channels=source.channels,
            target=config.target,
            objective=config.objective,
        )
        config = with_fitting_micro_batch(config, architecture, device, ranks, console, mask_ratio=config.mask_ratio)
        loader = training_loader(config, source, architecture.img_size[0], device, ranks)
        with keyed_torch(config.seed, torch.device("cpu")):
            model = Autoencoder(architecture)
        # A run that goes on has its weights from its checkpoint.
        if config.init is not None and not (config.resume and latest_checkpoint(config.out)):
            with ranks.in_turn():  # one process downloads what is on the hub, the others find it
                taken = warm_start(model, config.init)
            console.print(printable(taken), soft_wrap=True, markup=False, highlight=False)
        model.to(device)
        # One rank reads them: all must call the model, or none.
        with ranks.together():
            examples = _examples(source, architecture.img_size[0], config.seed) if ranks.is_first else None
        card = card_of_run(config, source, "none" if objective.sigma is None else str(objective.sigma))
        held_out = None
        if validation is not None and objective.sigma is not None:
            held_out = HeldOut(validation, architecture.img_size[0], config, ranks, device)
            if config.eval_sigmas:
                len(held_out.batches)  # what cannot be read is known before any work
        task = PretrainTask(
            model, objective, config.seed, config.precision, ranks.share(examples), card, held_out, config.eval_sigmas
        )
        groups = param_groups_weight_decay(model, config.weight_decay)
        title = f"pretraining {config.preset} ({config.objective})"
        train(config, task, groups, loader, title=title, console=console, ranks=ranks, source=whole)
        # As it was saved: the trained one may be sharded, and its blocks compiled.
        model = Autoencoder.from_pretrained(config.out / "model").to(device)
        if held_out is not None and validation is not None:
            with alone(model), precise("fp32", device):
                measured = denoised_psnr(model, held_out, config.eval_sigmas or FINAL_SIGMAS, objective)
            if ranks.is_first:
                write_result(config.out, {"source": validation.name, **measured})
    if ranks.is_first:
        draw_curve(config.out)
    return model
