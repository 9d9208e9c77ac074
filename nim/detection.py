"""Whether the target of a foreign autoencoder was normalised per patch, told from what it predicts of photos."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from denim.kernels import Domain, derive_seeds, normalized_patches
from denim.nim.autoencoder import Autoencoder
from denim.nim.objectives import Objective

__all__ = ["detect_target"]

# The coefficient of the target must be this large, and so many times that of the other target.
LEAST, RATIO = 0.2, 2.0


@torch.no_grad()
def detect_target(model: Autoencoder) -> tuple[str | None, str]:
    """Which target the predictions of a trained autoencoder follow: pixels, or patches normalised by themselves.

    It rebuilds six views of the two photos that scikit-learn ships, degraded as in its pretraining. The values that it
    predicts, of the patches that its loss counts, are regressed on those of both targets, all standardised: with the
    correlations c of the targets and n and r of the predictions with the normalised and the raw one, the coefficients
    are (n - r c) / (1 - c^2) and (r - n c) / (1 - c^2). A normalised target has mean 0 and variance 1 in each patch,
    and most of the variance of pixels lies between patches, so c is small enough to tell the targets apart.

    Args:
        model: on any device; `config.target` has no effect, `config.objective` has.

    Returns:
        The target, "norm" or "raw", or None where the coefficients are small or much the same; and these in words.
    """
    config = model.config
    if config.channels not in (1, 3):
        return None, f"photos have 1 or 3 channels, not {config.channels}"
    device = model.cls_token.device
    images = _photos(config.img_size, config.channels).to(device)
    seeds = derive_seeds(0, Domain.TRAINING, torch.arange(len(images)))
    objective = Objective.published(config.objective)
    sigma = None if objective.sigma is None else objective.sigma.sample(seeds).to(device)
    prediction, counted = objective.predict(model, images, sigma, seeds.to(device))
    raw = normalized_patches(images, patch_size=config.patch_size, mean=config.mean, std=config.std)
    variance, mean = torch.var_mean(raw, dim=-1, keepdim=True)
    targets = {"raw": raw, "norm": (raw - mean) / (variance + 1e-6).sqrt()}
    if counted is not None:
        prediction, targets = prediction[counted], {name: target[counted] for name, target in targets.items()}
    values = torch.stack([each.float().flatten() for each in (prediction, targets["norm"], targets["raw"])])
    correlations = torch.corrcoef(values).double()
    norm, pixels = torch.linalg.solve(correlations[1:, 1:], correlations[1:, 0]).tolist()
    words = f"predictions of photos follow normalised patches with weight {norm:.2f} and pixels with {pixels:.2f}"
    best, other, found = (norm, pixels, "norm") if norm > pixels else (pixels, norm, "raw")
    # False where they are NaN.
    return (found if best >= LEAST and best >= RATIO * abs(other) else None), words


def _photos(img_size: tuple[int, int], channels: int) -> Tensor:
    """The left, middle and right square of each of scikit-learn's photos, resized: uint8 (6, H, W, C)."""
    from sklearn.datasets import load_sample_images  # imported late, as for the digits

    views = []
    for photo in load_sample_images().images:
        image = Image.fromarray(photo).convert("L" if channels == 1 else "RGB")
        side = min(image.size)
        for left in (0, (image.width - side) // 2, image.width - side):
            size = (img_size[1], img_size[0])
            view = image.resize(size, Image.Resampling.BICUBIC, (left, 0, left + side, side))
            views.append(torch.from_numpy(np.array(view)).view(*img_size, channels))
    return torch.stack(views)
