from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from denim.defense import CertificationSettings, De3
from denim.defense.certificates import LevelCertificates, check_certifiable
from denim.kernels import normalized_patches
from denim.nim import Autoencoder, AutoencoderConfig, Classifier, ClassifierConfig, reconstruction

SETTINGS = CertificationSettings((40.0, 90.0), draws=300, selection_draws=20, seed=5, max_batch=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": ()}, "sigmas must be"), ({"sigmas": (0.0, 70.0)}, "nothing is smoothed"),
        ({"sigmas": (70.0, 70.0)}, "must differ"), ({"draws": 0}, "draws must be"), ({"draws": 5}, "certify nothing"),
        ({"selection_draws": 0}, "selection_draws"), ({"alpha": 0.0}, "alpha"), ({"alpha": 0.5}, "alpha"),
        ({"radii": (-0.1,)}, "radii"), ({"radii": (float("nan"),)}, "radii"), ({"tolerance": -1.0}, "tolerance"),
        ({"max_batch": 0}, "max_batch"), ({"precision": "fp8"}, "precision"), ({"seed": 2**63}, "seed"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **options)


def autoencoder(target: str) -> Autoencoder:
    return Autoencoder(AutoencoderConfig((8, 8), 4, 16, 1, 2, 16, 1, 2, mean=(0.5,), std=(0.25,), target=target))


def logits_of_one_noisy_image(defense: De3, monkeypatch) -> list[Tensor]:
    """Logits of two clean images whose noise is such that their noisy images are the same one."""
    noisy = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(9))

    def patchify(images, sigma, seeds, **layout):
        return normalized_patches(noisy, **layout).expand(*seeds.shape[:-1], 1, -1, -1)

    monkeypatch.setattr(reconstruction, "noise_patchify", patchify)
    pixels = torch.full((1, 1, 8, 8), 0.5), torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    return [defense.draw_logits(image, torch.tensor([[3]]), sigma=torch.tensor([70.0])) for image in pixels]


@pytest.mark.parametrize(
    ("target", "options"),
    [(None, {}), ("raw", {}), ("raw", {"degrade": "both"}), ("norm", {}), ("norm", {"statistics": "noisy"}),
     ("norm", {"degrade": "both"}), ("norm", {"degrade": "both", "statistics": "noisy"})],
)  # fmt: skip
@torch.no_grad()
def test_a_defense_is_accepted_if_it_sees_the_noisy_image_alone(target, options, monkeypatch):
    torch.manual_seed(0)
    denoiser = target and autoencoder(target)
    case = De3(denoiser, nn.Identity(), None, **options).case
    config = ClassifierConfig(3, (8, 8), 4, 16, 1, 2, mean=(0.5,), std=(0.25,), trained_on=case)
    defense = De3(denoiser, Classifier(config), 70, **options).eval()
    try:
        check_certifiable(defense)
        accepted = True
    except ValueError:
        accepted = False
    first, second = logits_of_one_noisy_image(defense, monkeypatch)
    assert torch.equal(first, second) == accepted


def certificates() -> LevelCertificates:
    return LevelCertificates(
        sigma=51.0,
        ids=np.arange(4),
        labels=np.array([0, 1, 2, 0]),
        predictions=np.array([0, 1, 1, 0]),
        successes=np.array([990, 900, 950, 510]),
        bounds=np.array([0.98, 0.87, 0.9, 0.47]),
        radii=np.array([0.4, 0.2, 0.3, 0.0]),  # right, right, wrong, abstained
        draws=np.array([1000, 1000, 1000, 1000]),
        largest_radius=0.5,
    )


def test_shares_and_averages():
    level = certificates()
    shares = [level.certified(radius).value for radius in (0.0, 0.1, 0.2, 0.200001, 0.4, 0.41)]
    assert shares == [0.5, 0.5, 0.5, 0.25, 0.25, 0.0]
    assert level.abstained.value == 0.25
    assert level.average_radius.value == pytest.approx((0.4 + 0.2) / 4)
    assert 0 <= level.average_radius.low < 0.15 < level.average_radius.high <= 0.5
    assert level.certified(0.0).low < 0.5 < level.certified(0.0).high
