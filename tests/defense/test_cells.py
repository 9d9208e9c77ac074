from __future__ import annotations

import torch
from torch import Tensor, nn

from denim.defense import De3
from denim.defense.cells import _is_frozen_twin
from denim.defense.fingerprint import Fingerprints


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(64, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layer(pixels.flatten(1))


class Halved(Linear):
    """The same weights as `Linear`, and other logits."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels / 2)


def test_a_frozen_defense_is_compared_with_the_random_one_of_its_own_model():
    fingerprints = Fingerprints()
    random = De3(None, Linear(), 70)
    twin = De3(None, Linear(), 70).frozen(1)
    assert _is_frozen_twin(twin, random, fingerprints), "equal models count, not the same objects alone"
    for other in (De3(None, Halved(), 70), De3(None, Linear(), 69), De3(None, Linear(), 70, draws=2), twin, Linear()):
        assert not _is_frozen_twin(twin, other, fingerprints)
