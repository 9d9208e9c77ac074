"""Adversarial training: the attack, the two losses, and that the classifier is as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from denim.nim import Classifier, ClassifierConfig, FinetuneConfig
from denim.nim.adversarial import AdversarialTraining, evaluating


class Linear(nn.Module):
    """Logits that are linear in the pixels, so that the worst image in a ball is known; takes seeds as a classifier."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 2).double()
        self.modes = []

    def forward(self, pixels, seeds=None):
        self.modes.append(self.training)
        return self.layer(pixels.flatten(1))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(5, 3, 2, 2, generator=generator, dtype=torch.float64) * 0.6 + 0.2
    labels = torch.tensor([0, 1, 1, 0, 1])
    return pixels, F.one_hot(labels, 2).double(), torch.arange(5)


def worst(model, pixels, labels, epsilon):
    """The image in the ball that raises the cross entropy of a linear model the most."""
    slope = (model.layer.weight[1 - labels] - model.layer.weight[labels]).sign().view_as(pixels)
    return (pixels + epsilon * slope).clamp(0, 1)


def test_the_attack_reaches_the_worst_image_of_a_linear_model(batch):
    pixels, targets, seeds = batch
    model = Linear().train()
    training = AdversarialTraining("pgd", epsilon=8, step_size=4, steps=8)
    attacked = training.attacked(model, pixels, seeds, lambda logits: F.cross_entropy(logits, targets, reduction="sum"))
    torch.testing.assert_close(attacked, worst(model, pixels, targets.argmax(1), 8 / 255), rtol=0, atol=1e-12)
    assert model.training
    assert set(model.modes) == {False}


def test_pgd_is_the_cross_entropy_of_attacked_images(batch):
    pixels, targets, seeds = batch
    model = Linear().train()
    loss = AdversarialTraining("pgd", epsilon=8, step_size=4, steps=8).loss(model, pixels, targets, seeds)
    attacked = worst(model, pixels, targets.argmax(1), 8 / 255)
    expected = F.cross_entropy(model(attacked), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-12)


def test_trades_adds_the_divergence_between_clean_and_attacked(batch):
    pixels, targets, seeds = batch
    model = Linear().train()
    training = AdversarialTraining("trades", epsilon=8, step_size=2, steps=5, beta=3.0)
    loss = training.loss(model, pixels, targets, seeds)
    clean = model(pixels).softmax(1)

    def divergence(logits):
        return (clean.detach() * (clean.detach().log() - logits.log_softmax(1))).sum()

    attacked = training.attacked(model, pixels, seeds, divergence)
    start = training.attacked(model, pixels, seeds, lambda logits: 0 * logits.sum())
    assert divergence(model(attacked)) > 1.5 * divergence(model(start))
    kl = (clean * (clean.log() - model(attacked).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss, F.cross_entropy(model(pixels), targets) + 3.0 * kl, rtol=1e-10, atol=0)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.autograd.grad(F.cross_entropy(model(pixels), targets) + 3.0 * kl, list(model.parameters()))
    for gradient, reference in zip(gradients, expected, strict=True):  # through the clean side as well
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_attacked_images_lie_in_the_ball_and_the_loss_does_not_depend_on_the_batch(method):
    config = ClassifierConfig(3, (8, 8), 4, 16, 2, 2, mean=(0.5,), std=(0.25,), drop_path=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(config).train()
        nn.init.normal_(model.head.weight)
    pixels, seeds = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)
    targets = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    training = AdversarialTraining(method, epsilon=16, step_size=4, steps=3)
    attacked = training.attacked(model, pixels, seeds, lambda logits: F.cross_entropy(logits, targets, reduction="sum"))
    assert ((attacked - pixels).abs() <= 16 / 255 + 1e-6).all()
    assert ((attacked >= 0) & (attacked <= 1)).all()
    whole = training.loss(model, pixels, targets, seeds)
    first, rest = (
        training.loss(model, *(each[rows] for each in (pixels, targets, seeds))) for rows in (slice(0, 1), slice(1, 4))
    )
    torch.testing.assert_close(whole, (first + 3 * rest) / 4, rtol=1e-5, atol=1e-6)


def test_modes_are_restored_as_they_were():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[0].eval()
    with evaluating(model):
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model] == [False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adversarial": "fgsm"}, "adversarial must be pgd or trades"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"epsilon": float("nan")}, "epsilon must be above 0"),
        ({"attack_steps": 0}, "attack_steps must be at least 1"),
        ({"attack_step_size": -1.0}, "attack_step_size must be above 0"),
        ({"adversarial": "trades", "trades_beta": -1.0}, "trades_beta must not be negative"),
        ({"trained_on": "denoised"}, "take trained_on=clean"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(out=tmp_path, denoiser=tmp_path, **{"adversarial": "pgd", "trained_on": "clean", **changes})
