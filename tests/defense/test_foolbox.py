"""An independent attack library on De3: its PGD is as strong as Denim's."""

from __future__ import annotations

import foolbox
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denim.defense import Attack, De3, score
from denim.kernels import Domain, draw_seeds, normal_noise
from denim.nim.data import EvalView, TorchLoader, open_source

IMAGES, STEPS, DRAWS = 400, 20, 20
# At this radius some images are lost and some are not, so a weaker attack would show.
EPSILON = 0.08


def digits(split: str) -> tuple[Tensor, Tensor, Tensor]:
    loader = TorchLoader(open_source("digits", split), EvalView(16), 2000, shuffle=False, last="keep")
    (batch,) = loader.epoch(0)
    return batch.images.permute(0, 3, 1, 2).float() / 255, batch.labels, batch.ids


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    """A small classifier of noisy digits, trained on the whole training set at once."""
    pixels, labels, ids = digits("train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(150):
        seeds = draw_seeds(0, Domain.TRAINING, ids, 1, step)[0]
        noise = normal_noise(seeds, (16, 16, 1)).permute(0, 3, 1, 2)
        loss = F.cross_entropy(model(pixels + 35 / 255 * noise), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [None, 35.0])
def test_foolbox_and_our_pgd_agree_on_accuracy(classifier, sigma):
    pixels, labels, ids = (tensor[:IMAGES] for tensor in digits("test"))
    defense = De3(None, classifier, sigma)
    seeds = defense.seeds(1, Domain.SCORE, ids, DRAWS)

    def accuracy(attacked: Tensor):
        assert (attacked - pixels).abs().max() <= EPSILON + 1e-6
        with torch.no_grad():
            return score(defense.draw_logits(attacked, seeds).argmax(dim=-1).T, labels).mean

    model = foolbox.PyTorchModel(defense.eval(), bounds=(0, 1))
    # foolbox does not know of draws, so each of its gradients has one draw; Denim's attack gets one as well. foolbox's
    # steps are a constant tenth of the radius, Denim's start at a quarter and decay.
    attack = foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=0.1, random_start=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of foolbox's start: the global generator is the client's
        _, (foreign,), _ = attack(model, pixels, labels, epsilons=[EPSILON])
    own = Attack("pgd", EPSILON, steps=STEPS, eot=1).run(defense, pixels, labels, ids, 0).pixels
    clean, theirs, ours = accuracy(pixels), accuracy(foreign), accuracy(own)
    assert clean.value > 0.9
    assert 0.2 < ours.value < 0.8
    assert ours.low <= theirs.value <= ours.high, f"foolbox {theirs}, denim {ours}"
    assert theirs.low <= ours.value <= theirs.high, f"foolbox {theirs}, denim {ours}"


def test_foolbox_sees_a_random_classifier_and_a_frozen_one_repeats(classifier):
    pixels, labels, _ = (tensor[:50] for tensor in digits("test"))
    results = {}
    for name, defense in (("random", De3(None, classifier, 35)), ("frozen", De3(None, classifier, 35).frozen(1))):
        model = foolbox.PyTorchModel(defense.eval(), bounds=(0, 1))
        attack = foolbox.attacks.LinfPGD(steps=3, random_start=False)
        results[name] = [attack(model, pixels, labels, epsilons=0.04)[0] for _ in range(2)]
    assert torch.equal(*results["frozen"])
    assert not torch.equal(*results["random"])
