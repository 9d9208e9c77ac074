"""The target of an autoencoder is told from its predictions."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from denim.nim import Autoencoder, AutoencoderConfig
from denim.nim.detection import detect_target


class Imagined(Autoencoder):
    """Predicts a target from the patches that it sees, as well as that goes without learning: blurred by a half."""

    kind = "raw"

    def forward(self, patches: Tensor, mask=None) -> Tensor:
        seen = patches.mean(-1, keepdim=True) + 0.5 * (patches - patches.mean(-1, keepdim=True))
        if self.kind == "raw":
            return seen
        if self.kind == "norm":
            return 0.5 * (patches - patches.mean(-1, keepdim=True)) / patches.std(-1, keepdim=True)
        return seen * 0 if self.kind == "nothing" else torch.full_like(patches, torch.nan)


def imagined(kind: str, **changes) -> Imagined:
    with torch.random.fork_rng(devices=[]):
        sizes = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
        decoder = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 1}
        model = Imagined(AutoencoderConfig(**{**sizes, **decoder, **changes}))
    model.kind = kind
    return model


@pytest.mark.parametrize("objective", ["nim", "mae", "dmae"])
@pytest.mark.parametrize("statistics", [{}, {"mean": (0.5,), "std": (0.25,)}], ids=["colour", "grey"])
@pytest.mark.parametrize("given", ["norm", "raw"])
def test_the_target_that_explains_the_predictions_is_found(objective, statistics, given, global_rng_untouched):
    for kind in ("norm", "raw"):
        model = imagined(kind, objective=objective, target=given, **statistics)
        found, why = detect_target(model)
        assert found == kind, why
        assert model.config.target == given
        assert re.match(r"predictions .* patches with weight -?\d\.\d\d and pixels with -?\d\.\d\d$", why)


@pytest.mark.parametrize("kind", ["nothing", "nan"])
def test_predictions_that_tell_nothing_are_no_target(kind):
    found, why = detect_target(imagined(kind))
    assert found is None, why


def test_photos_have_one_or_three_channels():
    found, why = detect_target(imagined("raw", mean=(0.5,) * 4, std=(0.5,) * 4))
    assert (found, why) == (None, "photos have 1 or 3 channels, not 4")
