"""Pretraining objectives: noisy image modeling (NIM), masked (MAE) and denoising masked autoencoding (DMAE)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from denim.kernels import noise_patchify, normalized_patches, patch_loss
from denim.nim.autoencoder import Autoencoder, Mask
from denim.nim.sigma import Sigma

__all__ = ["OBJECTIVES", "Objective"]

# Published noise levels: Gamma(25, 3) for NIM (You et al. 2023), 0.25 in [0, 1] units for DMAE (Wu et al. 2023).
OBJECTIVES: dict[str, str | None] = {"nim": "gamma:25,3", "mae": None, "dmae": "63.75"}


@dataclass(frozen=True)
class Objective:
    """How the input is degraded, and over which patches the loss is averaged.

    | name | noise | mask | loss over      |
    |------|-------|------|----------------|
    | nim  | yes   | no   | all patches    |
    | mae  | no    | yes  | hidden patches |
    | dmae | yes   | yes  | all patches    |

    Attributes:
        name: nim, mae or dmae.
        sigma: distribution of noise levels; None for mae.
        mask_ratio: share of hidden patches; without effect for nim.
    """

    name: str
    sigma: Sigma | None
    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(f"unknown objective {self.name!r}; choose one of {', '.join(OBJECTIVES)}")
        if (self.sigma is None) != (self.name == "mae"):
            raise ValueError(f"objective {self.name} {'takes no' if self.name == 'mae' else 'needs a'} sigma")
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")

    @classmethod
    def published(cls, name: str, sigma: str | None = None, mask_ratio: float = 0.75) -> Objective:
        """An objective; without `sigma`, with its published noise levels."""
        text = sigma if sigma is not None else OBJECTIVES.get(name)
        return cls(name, None if text is None else Sigma.parse(text), mask_ratio)

    def loss(self, autoencoder: Autoencoder, images: Tensor, sigma: Tensor | None, seeds: Tensor) -> Tensor:
        """Reconstruction loss of one batch, a scalar.

        Args:
            autoencoder: the model in training.
            images: uint8 (B, H, W, C), or float pixels (B, C, H, W) in [0, 1].
            sigma: float (B,), one level per image in 0-255 pixel levels; None for mae.
            seeds: int64 (B,); they key the noise and the mask.
        """
        config = autoencoder.config
        prediction, hidden = self.predict(autoencoder, images, sigma, seeds)
        pixel = {"patch_size": config.patch_size, "mean": config.mean, "std": config.std}
        return patch_loss(prediction, images, norm_pix=config.target == "norm", mask=hidden, **pixel)

    def predict(
        self, autoencoder: Autoencoder, images: Tensor, sigma: Tensor | None, seeds: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What an autoencoder predicts for degraded images, and which patches count.

        Args: see `loss`.

        Returns:
            The predicted patches (B, L, D); and bool (B, L), True for the patches over which the loss is averaged, None
            where all are.
        """
        config = autoencoder.config
        pixel = {"patch_size": config.patch_size, "mean": config.mean, "std": config.std}
        # In the dtype in which the model multiplies them; the target and the loss are float32.
        if sigma is None:
            patches = normalized_patches(images, dtype=autoencoder.patch_dtype, **pixel)
        else:
            patches = noise_patchify(images, sigma, seeds, dtype=autoencoder.patch_dtype, **pixel)
        mask = None if self.name == "nim" else Mask.random(seeds, config.num_patches, self.mask_ratio)
        hidden = mask.hidden if mask is not None and self.name == "mae" else None
        return autoencoder(patches, mask), hidden
