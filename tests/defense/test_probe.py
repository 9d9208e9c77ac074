from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from denim.defense import De3, probe_randomness
from denim.kernels import Domain

PIXELS = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 5))


class Noisy(nn.Module):
    """Adds what a function returns to its input."""

    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, images: Tensor) -> Tensor:
        return images + self.draw()


class Stubborn(nn.Dropout):
    """Dropout that evaluation mode does not turn off."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, training=True)


class Counter(nn.Module):
    """Answers otherwise in every second call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return images * (1 + self.calls % 2)


RANDOM = {
    "torch": lambda: nn.Sequential(Noisy(lambda: torch.rand(())), linear()),
    "numpy": lambda: nn.Sequential(Noisy(np.random.rand), linear()),
    "python": lambda: nn.Sequential(Noisy(random.random), linear()),
    "dropout": lambda: nn.Sequential(Stubborn(0.5), linear()),
    "counter": lambda: nn.Sequential(Counter(), linear()),
    "defense": lambda: De3(None, linear(), 70),
    "nested": lambda: De3(None, De3(None, linear(), 70), None),
    "inside": lambda: nn.Sequential(De3(None, nn.Flatten(), 70), linear()),
}
FIXED = {
    "linear": linear,
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.BatchNorm1d(16)),
    "off": lambda: De3(None, linear(), None),
    "frozen": lambda: De3(None, linear(), 70).frozen(),
    "nan": lambda: nn.Sequential(Noisy(lambda: float("nan")), linear()),
}


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("name", RANDOM)
def test_randomness_is_found_wherever_it_comes_from(name):
    found = probe_randomness(RANDOM[name](), PIXELS)
    assert found.is_random
    assert found.differing == 3
    assert found.largest > 0
    assert "3 of 3 images had other logits in one of 4 calls" in str(found)


@pytest.mark.parametrize("name", FIXED)
def test_a_function_of_the_image_is_none(name):
    model = FIXED[name]()
    found = probe_randomness(model, PIXELS)
    assert not found.is_random
    assert (found.differing, found.largest, found.declared) == (0, 0, ())


def states() -> tuple:
    arrays = np.random.get_state()[1]  # noqa: NPY002  # the global generator, which a model may draw from
    return torch.get_rng_state().tolist(), arrays.tolist(), random.getstate()


@pytest.mark.parametrize("name", [*RANDOM, *FIXED])
def test_probing_changes_nothing(name):
    model = (RANDOM | FIXED)[name]()
    modes = [part.training for part in model.modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    before = states()
    probe_randomness(model, PIXELS)
    assert states() == before
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(*pair) for pair in zip(buffers, model.buffers(), strict=True))


def test_modules_that_declare_randomness_are_named():
    quiet = De3(None, linear(), 70)
    quiet.classifier = nn.Sequential(Noisy(lambda: 0.0), nn.Flatten())
    assert probe_randomness(nn.Sequential(nn.Identity(), quiet), PIXELS).declared == ("1",)
    assert "declared random: the model itself" in str(probe_randomness(quiet, PIXELS))


def test_a_model_of_inference_mode_is_probed_too():
    with torch.inference_mode():
        model = nn.Sequential(Counter(), linear())
        assert probe_randomness(model, PIXELS).is_random
    assert model[0].calls == 0


@pytest.mark.parametrize(("calls", "images"), [(1, 3), (4, 0)])
def test_too_few_calls_or_images_are_refused(calls, images):
    with pytest.raises(ValueError, match="at least 2 calls and an image"):
        probe_randomness(linear(), PIXELS[:images], calls=calls)


# Defenses that hold a random module


def test_a_defense_is_random_if_a_module_inside_says_so():
    inner = De3(None, linear(), 70)
    for outer in (
        De3(None, inner, None),
        De3(None, inner, 0),
        De3(None, nn.Sequential(nn.Sigmoid(), inner), 70).frozen(),
    ):
        assert outer.is_random
        assert not torch.equal(outer(PIXELS), outer(PIXELS))
    assert not De3(None, inner.frozen(), None).is_random


@pytest.mark.parametrize("aggregate", ["logits", "vote"])
@pytest.mark.parametrize("draws", [1, 3])
def test_every_draw_of_a_defense_that_is_off_is_a_call_of_the_random_classifier(draws, aggregate):
    outer = De3(None, De3(None, linear(), 70), None, draws=draws, aggregate=aggregate)
    seeds = outer.seeds(0, Domain.SCORE, torch.arange(3), 20)
    logits = outer.draw_logits(PIXELS, seeds)
    assert logits.shape == (20, 3, 5)
    assert len(logits.unique(dim=0)) == 20
    assert outer.draw_logits(PIXELS, seeds, surrogate=True).shape == (20, 3, 5)


@pytest.mark.parametrize("aggregate", ["logits", "vote"])
def test_logits_that_are_no_numbers_stay_none(aggregate):
    defense = De3(None, nn.Sequential(Noisy(lambda: float("nan")), linear()), 70, draws=3, aggregate=aggregate)
    assert defense(PIXELS).isnan().all()
