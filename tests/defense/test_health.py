"""Health checks: planted failures are found, and an honest model passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denim.defense import Attack, De3
from denim.defense.health import check_health
from denim.kernels import attack_start, attack_step
from denim.nim.data import EvalView, TorchLoader, open_source

IMAGES, EPSILON = 40, 0.15
pytestmark = pytest.mark.slow


def digits(split: str) -> tuple[Tensor, Tensor, Tensor]:
    loader = TorchLoader(open_source("digits", split), EvalView(16), 2000, shuffle=False, last="keep")
    (batch,) = loader.epoch(0)
    return batch.images.permute(0, 3, 1, 2).float() / 255, batch.labels, batch.ids


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor, Tensor]:
    pixels, labels, ids = (tensor[:IMAGES] for tensor in digits("test"))
    return pixels, labels, ids


@pytest.fixture(scope="module")
def honest() -> nn.Module:
    """A network after adversarial training."""
    pixels, labels, _ = digits("train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(20):
            for chosen in torch.randperm(len(pixels)).split(128):
                clean, true = pixels[chosen], labels[chosen]
                attacked = attack_start(clean, chosen, epsilon=0.1)
                for _ in range(4):
                    leaf = attacked.requires_grad_()
                    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), true), leaf)
                    attacked = attack_step(leaf, clean, gradient, step_size=0.04, epsilon=0.1)
                optimizer.zero_grad()
                F.cross_entropy(model(attacked), true).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


class Planted(nn.Module):
    """A model whose answers are those of another one, and whose gradients are not."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        self.register_buffer("direction", torch.randn(256, 10, generator=torch.Generator().manual_seed(3)))

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.model(pixels)
        if self.kind == "masked":  # finite, not zero, and of no use
            useless = pixels.flatten(1) @ self.direction
            return logits.detach() + 1e-3 * (useless - useless.detach())
        if self.kind == "shattered":
            return logits.detach() + 1e-4 * (3e4 * (pixels.flatten(1) @ self.direction)).sin() + 1e-9 * logits
        if self.kind == "saturated":
            return (50 * logits).softmax(dim=-1).clamp(0, 1) + 0 * logits
        if self.kind == "NaN":
            return torch.where(logits[:, :1] > 0, torch.nan, logits)
        return logits * {"scaled": 1e4, "as it is": 1.0}[self.kind]


def failed(target, images, text: str = f"apgd:{EPSILON},steps=20,eot=4", **options) -> set[str]:
    checks = check_health(target, *images, Attack.parse(text), **options)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name for check in checks if not check.passed}


@pytest.mark.parametrize("sigma", [None, 20.0])
def test_an_honest_model_passes(honest, images, sigma):
    assert failed(De3(None, honest, sigma), images) == set()


def test_logits_times_ten_thousand_are_no_failure_any_more(honest, images):
    assert failed(De3(None, Planted(honest, "scaled"), None), images) == set()


@pytest.mark.parametrize("kind", ["masked", "shattered"])
@pytest.mark.parametrize("sigma", [None, 20.0])
def test_gradients_of_no_use_are_found(honest, images, kind, sigma):
    assert "Black box" in failed(De3(None, Planted(honest, kind), sigma), images)


def test_saturation_is_found(honest, images):
    assert failed(De3(None, Planted(honest, "saturated"), None), images) & {"Gradients of zero", "Black box"}


def test_logits_that_are_not_finite_end_the_checks(honest, images):
    assert failed(De3(None, Planted(honest, "NaN"), None), images) == {"Logits"}


def test_a_quantised_model_is_refused_by_the_attack_itself(honest, images):
    class Quantised(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return honest((pixels.detach() * 8).round() / 8)

    with pytest.raises(ValueError, match="do not depend on the pixels"):
        failed(De3(None, Quantised(), None), images)


def test_a_weak_attack_is_found(honest, images):
    assert "More steps" in failed(De3(None, honest, None), images, "pgd:0.15,steps=1,loss=ce,full")


def test_a_defense_that_is_off_is_found(honest, images):
    class Deaf(De3):
        def draw_logits(self, pixels, seeds, *, surrogate=False):
            return self.classifier(pixels).expand(len(seeds), -1, -1)

    assert "Defense off" in failed(Deaf(None, honest, 20.0), images)


def test_labels_that_do_not_fit_are_found(honest, images):
    pixels, _, ids = images
    wrong = (honest(pixels).argmax(dim=1) + 1) % 10
    assert failed(De3(None, honest, None), (pixels, wrong, ids)) == {"Clean accuracy"}


def test_bad_input(honest, images):
    pixels, labels, ids = images
    with pytest.raises(ValueError, match="need images"):
        check_health(De3(None, honest, None), pixels[:0], labels[:0], ids[:0], Attack("pgd", 0.1))
    with pytest.raises(ValueError, match="about white box attacks"):
        check_health(De3(None, honest, None), pixels, labels, ids, Attack("pgd", 0.1, gray=True))
