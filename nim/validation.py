"""Images that are not trained on, and how a model is measured on them while it learns and at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from denim.kernels import Domain, derive_seeds
from denim.nim.data import Batch, EvalView, Source, Subset, TorchLoader, hold_out, open_source
from denim.nim.data.sources import splits
from denim.nim.ranks import Ranks
from denim.nim.settings import TrainConfig

__all__ = ["HeldOut", "at_levels", "divided", "psnr"]

TEST_SPLITS = ("test", "testing", "val", "validation", "valid")  # that a model is measured on, the first that there is
LEAST_ERROR = 1e-10  # mean squared error of 100 dB, for images that are equal


def divided(config: TrainConfig, whole: Source, *, labelled: bool) -> tuple[Source, Source | None]:
    """The images to train on, and those that are not trained on, if there are any; see `TrainConfig.val_split`.

    Args:
        config: the settings.
        whole: all training images.
        labelled: whether both must have the same classes.

    Raises:
        ValueError: there is no such split, it is trained on, or its classes are not those of the training; or there are
            no such images, and `eval_sigmas` needs them.
    """
    if (share := config.held_out) is not None:
        return hold_out(whole, share, config.seed)
    folder = Path(config.data).expanduser()
    found = splits(folder) if folder.is_dir() else ["test", "train"]  # those of digits and CIFAR
    split = config.val_split or next((name for name in TEST_SPLITS if name in found), None)
    if split is None:
        if config.eval_sigmas:
            raise ValueError(
                f"eval_sigmas needs images that are not trained on, and {config.data} has no split of them: "
                "--val-split 0.1 holds out a tenth of the training images"
            )
        return whole, None
    if split == "train" or not found:
        reason = "its images are trained on" if found else f"{config.data} has no folders or shards of splits"
        raise ValueError(
            f"val_split {split!r} cannot be used: {reason}. Expected the name of another split, or a share such as 0.1 "
            "that is held out of the training images"
        )
    classes = whole.classes if labelled else None
    return whole, open_source(
        config.data, split, whole.channels, labelled=labelled, classes=classes, max_bad=config.max_bad
    )


class HeldOut:
    """A few images that are not trained on, each on one of the ranks, in the memory of the host.

    Which images is decided by the seed of the run and their ids, and everything random about one is keyed by them:
    every measurement has the same noise, whatever the number of ranks, and draws nothing that a training uses.

    Args:
        source: all images that are not trained on.
        size: side of the images in pixels.
        config: the settings: eval_images, seed, max_bad and the size of a pass.
        ranks: the processes of the training.
        device: that measures.
    """

    def __init__(self, source: Source, size: int, config: TrainConfig, ranks: Ranks, device: torch.device) -> None:
        self.source = source
        self.seed = config.seed
        self.ranks = ranks
        self.device = device
        chosen = Subset(source, min(config.eval_images, len(source)), config.seed)
        micro_batch, _ = config.passes(ranks.world)
        batch_size = min(micro_batch, math.ceil(len(chosen) / ranks.world))
        self._loader = TorchLoader(
            chosen,
            EvalView(size),
            batch_size,
            shuffle=False,
            last="pad",
            rank=ranks.rank,
            world=ranks.world,
            max_bad=config.max_bad,
        )

    @cached_property
    def batches(self) -> list[Batch]:
        """The images of this rank, which are read once; all ranks have as many batches of the same size.

        Raises:
            BadSamplesError: too many of them cannot be read.
        """
        with self.ranks.together():
            return list(self._loader.epoch(0))

    def measure(self, values: Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]]) -> dict[str, float]:
        """Means of numbers per image over the images of all ranks, which all must call this.

        Args:
            values: from images (uint8 (B, H, W, C)), labels (int64 (B,)) and seeds (int64 (B,)) on the device to
                numbers (B,) by name.

        Returns:
            The means by name, and "eval_images": of how many images. Images that cannot be read are not counted.

        Raises:
            FloatingPointError: a mean is not finite.
        """
        sums: dict[str, float] = {}
        for batch in self.batches:
            real = torch.ones_like(batch.labels, dtype=torch.bool) if batch.real is None else batch.real
            seeds = derive_seeds(self.seed, Domain.VALIDATION, batch.ids).to(self.device)
            moved = replace(batch, real=None).to(self.device)
            for name, numbers in values(moved.images, moved.labels, seeds).items():
                sums[name] = sums.get(name, 0.0) + float(numbers.double().cpu()[real].sum())
            sums["eval_images"] = sums.get("eval_images", 0) + int(real.sum())
        parts = self.ranks.gather(sums)
        count = sum(part["eval_images"] for part in parts)
        means = {name: math.fsum(part[name] for part in parts) / count for name in sums if name != "eval_images"}
        if broken := [name for name, mean in means.items() if not math.isfinite(mean)]:
            raise FloatingPointError(f"{', '.join(broken)} of images that are not trained on is not finite")
        return {**means, "eval_images": count}


def at_levels(
    name: str, sigmas: Sequence[float], value: Callable[[Tensor], Tensor], count: int, device: torch.device
) -> dict[str, Tensor]:
    """A number per image at each noise level, by name, such as "psnr_sigma_35".

    Args:
        name: of the number.
        sigmas: noise levels in 0-255 pixel levels.
        value: from levels (B,) to numbers (B,).
        count: B.
        device: of the levels.
    """
    levels = {sigma: torch.full((count,), sigma, dtype=torch.float32, device=device) for sigma in sigmas}
    return {f"{name}_sigma_{sigma:g}": value(level) for sigma, level in levels.items()}


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, -10 log10(mean squared error), at most 100; float32 (B,).

    Args:
        images: float (B, C, H, W), pixels in [0, 1].
        reference: likewise.
    """
    error = (images.float() - reference.float()).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=LEAST_ERROR).log10()
