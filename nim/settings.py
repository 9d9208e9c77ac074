"""Settings of pretraining and fine-tuning.

The command line reads its options off these classes. So that its help answers at once, this file imports torch and the
models where values are checked, and not at the top.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    import torch

    from denim.nim.adversarial import AdversarialTraining
    from denim.nim.autoencoder import AutoencoderConfig

__all__ = ["FinetuneConfig", "LinearProbeConfig", "PretrainConfig", "TrainConfig", "pick_device"]

LEAST_UPDATES = 10  # of an epoch, where the batch is chosen for the data


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings that pretraining and fine-tuning share.

    Attributes:
        COMMAND: of `denim` that takes these settings, with the option that chooses them where there is one.
        PUBLISHED_BATCH: images of an update in the published recipe.
        out: Folder of the run.
        data: Training images: digits, cifar10, cifar100 or a folder.
        epochs: Passes over the training images.
        warmup_epochs: Epochs of linear warm-up at the start; a cosine to min_lr follows, set at every update. Without
            it, the published share of the epochs.
        batch_size: Images per update, on all devices together; learning rates scale linearly with it. Without it, the
            published number, or for smaller data the largest power of two of which an epoch has at least 10.
        micro_batch: Images per forward pass on one device; the gradients of as many passes as an update needs are
            averaged. None: the share of a device in one pass, or on a GPU the largest divisor of it that fits. It
            changes memory and speed, not the result.
        base_lr: Learning rate for a batch of 256 images.
        min_lr: Learning rate at the end, for this batch size.
        weight_decay: Weight decay of AdamW; biases and other 1-d parameters have none.
        betas: Coefficients of the two running averages of AdamW.
        crop_scale: Smallest and largest area of the random crops, as shares of the image; None takes no crops.
        flip: Mirror each image left-right with probability 1/2.
        degrees: Largest angle of the random rotation, in degrees.
        translate: Largest random shift, as a share of the side.
        zoom: Largest random change of size, as a share of the size.
        loader: Loader of the images: dali, torch, or auto for the first of these that can serve.
        workers: Processes (torch) or threads (DALI) that decode images. Without it, as many as help: at most the
            processors that each local rank has, and none for small data.
        max_bad: Largest share of images that may be unreadable; others take their places, and above it the run stops.
        seed: Seed of the run.
        device: Device to train on: auto (a GPU where there is one) or a torch device such as cpu or cuda:0.
        precision: Precision of the networks: fp32, tf32 (float32 whose products have TF32 inputs), bf16 (the forward
            pass under autocast; weights, loss and optimizer stay float32), or auto: bf16 where a GPU has it, else fp32.
        lean: Compute layer norms and GELUs again in the backward pass instead of keeping them, which saves memory. On a
            CPU models narrower than 160 keep them: there it would cost time.
        compile: Compile each transformer block with torch.compile; None does so on CUDA.
        cuda_graph: Replay the work of an update on a GPU as one CUDA graph, in one process or under DDP. It has not run
            on a GPU yet.
        grad_checkpointing: Compute the activations of each block again in the backward pass instead of keeping them.
        fsdp: Shard weights, gradients and optimizer state over the devices (FSDP2) instead of copying them (DDP).
        clip_grad: Largest norm of the gradients, above which they are scaled down to it; None clips nothing.
        ema: Decay of an exponential moving average of the weights, such as 0.9999, which the finished model then has;
            None averages nothing.
        stall_timeout: Seconds that one process of a training waits for another before the run ends and names it.
        resume: Continue the run in `out`.
        checkpoint_every: Updates between checkpoints; None saves one after every epoch.
        checkpoint_minutes: Minutes between checkpoints, beside those of checkpoint_every; None saves no others.
        keep_checkpoints: How many of the newest checkpoints stay.
        keep_every: Updates between checkpoints that stay for good, in multiples of checkpoint_every.
        log_every: Updates between lines of metrics.
        val_split: Images that the model is measured on: the name of a split, such as val, or a share such as 0.1 of the
            training images, which is held out of the training, by sample id and seed; without it, the split test,
            val, validation or valid that the data has.
        eval_sigmas: Noise levels, in 0-255 pixel levels, at which the model is measured while it learns, on images that
            are not trained on: PSNR of denoised images, or accuracy behind the denoiser; without any, only at the end.
        eval_every: Epochs between these measurements.
        eval_images: Images that are measured, at most; which, depends on the seed.
    """

    COMMAND: ClassVar[str]
    PUBLISHED_BATCH: ClassVar[int]

    out: Path
    data: str = "digits"
    epochs: int
    warmup_epochs: float
    batch_size: int
    micro_batch: int | None = None
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
    workers: int | None = None
    max_bad: float = 0.01
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    lean: bool = True
    compile: bool | None = None
    cuda_graph: bool = False
    grad_checkpointing: bool = False
    fsdp: bool = False
    clip_grad: float | None = None
    ema: float | None = None
    stall_timeout: float = 600.0
    resume: bool = False
    checkpoint_every: int | None = None
    checkpoint_minutes: float | None = None
    keep_checkpoints: int = 2
    keep_every: int | None = None
    log_every: int = 10
    val_split: str | None = None
    eval_sigmas: tuple[float, ...] = ()
    eval_every: int = 1
    eval_images: int = 512

    def __post_init__(self) -> None:
        from denim.kernels.seeds import check_seed
        from denim.nim.files import check_path
        from denim.nim.precision import check_precision
        from denim.nim.sigma import MAX_SIGMA, is_level, warn_of_unit_sigma

        check_path(self.out)
        for name in ("epochs", "batch_size", "micro_batch", "log_every", "checkpoint_every", "keep_checkpoints",
                     "keep_every", "eval_every", "eval_images"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:  # None: left to the size of the denoiser or of the data
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("clip_grad", "checkpoint_minutes", "stall_timeout"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, got {value}")
        if self.cuda_graph and self.fsdp:
            raise ValueError("cuda_graph cannot capture fsdp, which gathers weights anew in every pass: choose one")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie between 0 and 1, got {self.ema}")
        if self.batch_size is not None and self.batch_size % (self.micro_batch or 1):
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of micro_batch {self.micro_batch}")
        warmup = self.warmup_epochs
        if warmup is not None and not 0 <= warmup <= (math.inf if self.epochs is None else self.epochs):
            raise ValueError(f"warmup_epochs must lie between 0 and epochs ({self.epochs}), got {warmup}")
        if not (math.isfinite(self.base_lr) and self.base_lr > 0):
            raise ValueError(f"base_lr must be positive, got {self.base_lr}")
        _refuse_negative(self, "min_lr", "weight_decay")
        if self.workers is not None:
            _refuse_negative(self, "workers")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not all(map(is_level, self.eval_sigmas)):
            raise ValueError(
                f"eval_sigmas takes noise levels of 0-255 pixel levels, 0 or more, at most {MAX_SIGMA:g}, got "
                f"{self.eval_sigmas}"
            )
        for level in self.eval_sigmas:
            warn_of_unit_sigma(level)
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise ValueError(f"val_split must be the name of a split or a share between 0 and 1, got {self.val_split}")
        check_seed(self.seed)
        check_precision(self.precision)

    @property
    def held_out(self) -> float | None:
        """The share of the training images that is held out of the training, where `val_split` is a number."""
        try:
            return None if self.val_split is None else float(self.val_split)
        except ValueError:
            return None

    @property
    def batch_unit(self) -> int:
        """What a batch that is chosen for the data is a multiple of."""
        return 1

    def for_data(self, images: int) -> Self:
        """The same settings, with numbers in place of None for the batch and the warm-up.

        The batch is the published one. Where an epoch has fewer than 10 of these, it is the largest power of two (times
        `batch_unit`) of which it has 10: AdamW needs many updates more than it needs large batches. The warm-up is
        5 % of the epochs, as published for pretraining (40 of 800).

        Args:
            images: training images.
        """
        fitting = max(1, images // (LEAST_UPDATES * self.batch_unit))
        largest = self.batch_unit * 2 ** (fitting.bit_length() - 1)
        batch = min(self.PUBLISHED_BATCH, largest) if self.batch_size is None else self.batch_size
        warmup = 0.05 * self.epochs if self.warmup_epochs is None else self.warmup_epochs
        return replace(self, batch_size=batch, warmup_epochs=warmup)

    @property
    def lr(self) -> float:
        """Learning rate for this batch: base_lr * batch_size / 256 (Goyal et al. 2017)."""
        return self.base_lr * self.batch_size / 256

    def passes(self, world: int) -> tuple[int, int]:
        """Images per forward pass on one device, and forward passes of one update on each.

        Args:
            world: number of devices.

        Raises:
            ValueError: the batch cannot be cut so.
        """
        share, rest = divmod(self.batch_size, world)
        if rest:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of the {world} devices that share it")
        micro_batch = min(self.micro_batch or share, share)
        if share % micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} on {world} devices is {share} images on each, no multiple of "
                f"micro_batch {micro_batch}"
            )
        return micro_batch, share // micro_batch


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Settings of pretraining; the defaults are the published recipe (You et al. 2023, appendix; He et al. 2022).

    Attributes:
        preset: Size of the model: micro, mini, tiny, small, base, large or huge.
        objective: What is learnt: nim (remove noise), mae (fill in hidden patches) or dmae (both).
        target: Target of the loss: norm (each patch normalised by its own mean and variance) or raw pixels.
        sigma: Noise levels in 0-255 pixel levels, such as 70, gamma:25,3 or uniform:0,30; without it, those that were
            published for the objective.
        mask_ratio: Share of hidden patches, for mae and dmae.
        img_size: Side of the images in pixels; without it, that of the preset.
        patch_size: Side of the patches in pixels; without it, that of the preset.
        channels: Channels that the images are converted to, 1 or 3; without it, those of the data.
        init: Weights to start from, in place of random ones: folder of a denoiser or of its run, name of one that
            ships with Denim, owner/name on the Hugging Face hub, or a file of MAE, timm or transformers. The encoder
            is taken, and the decoder where it fits; positions and patches of another size are resampled.
    """

    COMMAND = "pretrain"
    PUBLISHED_BATCH = 4096

    preset: str = "base"
    objective: str = "nim"
    target: str = "norm"
    sigma: str | None = None
    mask_ratio: float = 0.75
    img_size: int | None = None
    patch_size: int | None = None
    channels: int | None = None
    init: str | None = None
    epochs: int = 800
    warmup_epochs: float | None = None  # type: ignore[assignment]  # a number after `for_data`
    batch_size: int | None = None  # type: ignore[assignment]  # likewise
    base_lr: float = 1.5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    crop_scale: tuple[float, float] | None = (0.2, 1.0)

    def __post_init__(self) -> None:
        from denim.nim.autoencoder import PRESETS
        from denim.nim.objectives import Objective

        super().__post_init__()
        if self.target not in ("norm", "raw"):
            raise ValueError(f"target must be norm or raw, got {self.target!r}")
        if self.preset not in PRESETS:
            raise ValueError(f"unknown preset {self.preset!r}; choose one of {', '.join(PRESETS)}")
        if Objective.published(self.objective, self.sigma, self.mask_ratio).sigma is None and self.eval_sigmas:
            raise ValueError(f"{self.objective} adds no noise, so there are no eval_sigmas to be measured at")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Settings of fine-tuning; the defaults are the published recipe (You et al. 2023; He et al. 2022).

    Attributes:
        epochs: Passes over the training images; without it, the published number for the denoiser's size: 50 from the
            width of ViT-L (embed_dim 1024) on, else 100.
        denoiser: The pretrained denoiser, which stays frozen: folder of a model or a run, name of a model that ships
            with Denim, or owner/name on the Hugging Face hub. The classifier starts from its encoder, and it denoises
            the training images with trained_on denoised.
        trained_on: Training images: denoised, noisy (not denoised) or clean.
        sigma: Noise levels of the training images in 0-255 pixel levels, such as 70, gamma:25,3 or uniform:0,30.
        degrade: How images are degraded before the denoiser: noise, mask or both.
        mask_ratio: Share of hidden patches, for degrade mask and both.
        statistics: Image that gives the patch means and standard deviations of a reconstruction: input or noisy. A
            denoiser with target raw needs none.
        linear_probe: Train a linear classifier on features of the frozen encoder, with the settings of MAE's linear
            probe in place of those of fine-tuning.
        layer_decay: Learning rate of a layer relative to the layer above it.
        drop_path: Largest rate of stochastic depth, that of the last block; without it, the published rate for the
            denoiser's size: 0.2 from the width of ViT-H (embed_dim 1280) on, else 0.1.
        auto_augment: Policy of RandAugment: that of timm (loader torch), that of DALI such as dali-rand-m9-n2 (loader
            dali; for the differences see `TrainView`), or None.
        erasing: Probability of random erasing.
        mixup: Parameter alpha of mixup; 0 turns it off.
        cutmix: Parameter alpha of cutmix; 0 turns it off.
        mixup_group: Images that are mixed among each other, with one lambda: the published batch of one GPU. A
            forward pass holds whole groups.
        smoothing: Label smoothing.
        adversarial: Adversarial training on clean images: pgd (Madry et al. 2018) or trades (Zhang et al. 2019); None
            is none.
        epsilon: Radius of its attack in 0-255 pixel levels.
        attack_steps: Steps of its attack.
        attack_step_size: Size of a step in 0-255 pixel levels; None takes a quarter of epsilon.
        trades_beta: Weight of the divergence between clean and attacked images in TRADES.
    """

    COMMAND = "finetune"
    PUBLISHED_BATCH = 1024

    denoiser: str | Path
    linear_probe: bool = False
    trained_on: str = "denoised"
    sigma: str = "uniform:0,30"
    degrade: str = "noise"
    mask_ratio: float = 0.75
    statistics: str = "input"
    epochs: int | None = None  # type: ignore[assignment]  # a number after `for_denoiser`
    warmup_epochs: float | None = None  # type: ignore[assignment]  # likewise
    batch_size: int | None = None  # type: ignore[assignment]  # a number after `for_data`
    base_lr: float = 1e-3
    min_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    crop_scale: tuple[float, float] | None = (0.08, 1.0)
    layer_decay: float = 0.75
    drop_path: float | None = None
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_group: int = 16
    smoothing: float = 0.1
    adversarial: str | None = None
    epsilon: float = 8.0
    attack_steps: int = 10
    attack_step_size: float | None = None
    trades_beta: float = 6.0

    def __post_init__(self) -> None:
        from denim.nim.reconstruction import check_degradation
        from denim.nim.sigma import Sigma

        super().__post_init__()
        if self.trained_on not in ("denoised", "noisy", "clean"):
            raise ValueError(f"trained_on must be denoised, noisy or clean, got {self.trained_on!r}")
        check_degradation(None, self.degrade, self.statistics)
        Sigma.parse(self.sigma)
        for name in ("drop_path", "erasing", "smoothing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.linear_probe and (self.layer_decay != 1 or self.drop_path):
            raise ValueError(
                "a linear probe trains one layer behind a frozen encoder: layer_decay must be 1 and drop_path 0, got "
                f"{self.layer_decay} and {self.drop_path}; the settings of `LinearProbeConfig`, which `denim finetune "
                "--linear-probe` takes, fit"
            )
        if self.eval_sigmas and self.degrade == "mask":
            raise ValueError("degrade=mask adds no noise, so there are no eval_sigmas to be measured at")
        _refuse_negative(self, "mixup", "cutmix")
        if not (math.isfinite(self.layer_decay) and self.layer_decay > 0):
            raise ValueError(f"layer_decay must be positive, got {self.layer_decay}")
        if self.mixup_group < 2 or self.mixup_group % 2:
            raise ValueError(
                f"mixup_group must be an even number, for images are mixed in pairs, got {self.mixup_group}"
            )
        micro_batch = self.micro_batch or self.batch_size
        if (self.mixup or self.cutmix) and micro_batch is not None and micro_batch % self.mixup_group:
            raise ValueError(
                f"mixup and cutmix need whole groups of {self.mixup_group} images, and a micro-batch has "
                f"{micro_batch}: change batch_size or micro_batch, set mixup_group, or turn mixing off with mixup=0 "
                "and cutmix=0"
            )

        if self.adversarial is not None and self.cuda_graph:
            raise ValueError("cuda_graph does not capture adversarial training: leave cuda_graph out")
        if self.adversarial_training is not None and self.trained_on != "clean":
            raise ValueError(
                f"adversarial training attacks clean images, and trained_on is {self.trained_on}: take trained_on=clean"
            )

    @property
    def adversarial_training(self) -> AdversarialTraining | None:
        """The loss of adversarial training, or None.

        Raises:
            ValueError: one of its settings is outside its range.
        """
        if self.adversarial is None:
            return None
        from denim.nim.adversarial import AdversarialTraining

        step_size = self.epsilon / 4 if self.attack_step_size is None else self.attack_step_size
        return AdversarialTraining(self.adversarial, self.epsilon, step_size, self.attack_steps, self.trades_beta)

    @property
    def batch_unit(self) -> int:
        """The images that are mixed among each other."""
        return self.mixup_group if self.mixup or self.cutmix else 1

    def for_denoiser(self, denoiser: AutoencoderConfig) -> FinetuneConfig:
        """The same settings, with published values for the denoiser's size where epochs, warm-up or drop path is None.

        The published warm-up is 5 epochs (10 of 90 for a linear probe); of other epochs it is the same share.

        Args:
            denoiser: architecture of the denoiser.

        Raises:
            ValueError: more warm-up epochs than epochs.
        """
        width = denoiser.embed_dim
        published, rising, dropped = 50 if width >= 1024 else 100, 5, 0.2 if width >= 1280 else 0.1
        if self.linear_probe:
            published, rising, dropped = 90, 10, 0.0
        epochs = published if self.epochs is None else self.epochs
        warmup = rising * epochs / published if self.warmup_epochs is None else self.warmup_epochs
        drop_path = dropped if self.drop_path is None else self.drop_path
        return replace(self, epochs=epochs, warmup_epochs=warmup, drop_path=drop_path)


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(FinetuneConfig):
    """Settings of a linear probe; the defaults are those of MAE (He et al. 2022, appendix A.1), but for the optimizer.

    Images are clean, cropped and mirrored, and nothing else. MAE takes LARS with batches of 16384; here AdamW trains
    as everywhere, without weight decay.
    """

    COMMAND = "finetune --linear-probe"

    linear_probe: bool = True
    trained_on: str = "clean"
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    auto_augment: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0


def _refuse_negative(config: TrainConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must not be negative, got {value}")


def pick_device(name: str) -> torch.device:
    """The torch device for "auto" (CUDA where there is one) or a name; under torchrun, the GPU of the local rank.

    Raises:
        ValueError: not a device, or CUDA where there is none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available: torch sees no CUDA device; see `denim doctor`")
    return device
