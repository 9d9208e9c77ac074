"""Attacks of other libraries as attacks of Denim."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from denim.defense import De3
from denim.defense.attacks import Attack, AttackMethod, ForeignAttack, parse_attack
from denim.defense.attacks.foreign import LIBRARIES, Library

LABELS, IDS = torch.arange(6) % 4, torch.arange(10, 16)
TEXTS = {
    "foolbox": "foolbox:LinfPGD:0.1,steps=5,rel_stepsize=0.3",
    "torchattacks": "torchattacks:PGD:0.1,alpha=0.02,steps=5",
    "art": "art:ProjectedGradientDescentPyTorch:0.1,eps_step=0.02,max_iter=5,verbose=False",
    "autoattack": "autoattack:apgd-ce+apgd-dlr:0.1,n_iter=5,n_restarts=1",
}
PACKAGES = {"foolbox": "foolbox", "torchattacks": "torchattacks", "art": "art", "autoattack": "pyautoattack"}
EACH = pytest.mark.parametrize("library", sorted(LIBRARIES))


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 4))
        model[1].weight.data *= 6  # steep enough for five steps to mislead
    return model.eval().requires_grad_(False)


def images() -> torch.Tensor:
    return 0.2 + 0.6 * torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def attack_of(library: str) -> AttackMethod:
    pytest.importorskip(PACKAGES[library], reason=f"{library} is not installed; its attacks cannot be run")
    return parse_attack(TEXTS[library])


@EACH
@pytest.mark.parametrize("sigma", [None, 35.0])
def test_an_attack_stays_in_the_ball_misleads_and_is_a_function_of_the_seed(network, library, sigma):
    attack, target = attack_of(library), De3(None, network, sigma)
    labels = network(images()).argmax(dim=1)
    before = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (attack.run(target, images(), labels, IDS, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
    assert torch.equal(first.pixels, again.pixels)
    if sigma is not None:  # some of the attacks draw nothing themselves
        assert not torch.equal(first.pixels, other.pixels)
    assert (first.pixels - images()).abs().max() <= 0.1 + 1e-5
    with torch.no_grad():
        seeds = target.seeds(9, 5, IDS, 30)
        clean, attacked = (
            (target.draw_logits(pixels, seeds).argmax(dim=-1) == labels).double().mean()
            for pixels in (images(), first.pixels)
        )
    assert attacked < clean - 0.1
    assert (first.gradients > 0).all()
    assert target.classifier is network


@EACH
def test_modes_and_weights_are_left_as_they_were_and_no_image_is_no_work(network, library):
    attack, target = attack_of(library), De3(None, network, 35.0).train()
    modes = [part.training for part in target.modules()]
    state = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with torch.inference_mode():
        attack.run(target, images(), LABELS, IDS, 0)
    assert [part.training for part in target.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.state_dict().items())
    assert len(attack.run(target, images()[:0], LABELS[:0], IDS[:0], 0).pixels) == 0


@EACH
def test_the_text_form_gives_the_attack_back(library):
    attack = ForeignAttack.parse(TEXTS[library])
    assert ForeignAttack.parse(str(attack)) == attack
    assert str(attack) == TEXTS[library]
    with_norm = ForeignAttack.parse(TEXTS[library] + ",norm=l2")
    assert with_norm.norm == "l2"
    assert ForeignAttack.parse(str(with_norm)) == with_norm


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foolbox:LinfPGD", "is not of the form LIBRARY:ATTACK:EPSILON"),
        ("foolbox::4/255", "is not of the form"),
        ("foolbox:LinfPGD:four", "is not of the form"),
        ("foolbox:LinfPGD:4/255,steps", "is not of the form"),
        ("foolbox:LinfPGD:4/255,norm=l1", "is not of the form"),
        ("nobody:PGD:4/255", "unknown attack 'nobody'; choose one of fgsm, .*, autoattack"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_attack(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foolbox:LinfPDG:0.1", "foolbox.attacks has no attack 'LinfPDG'"),
        ("foolbox:LinfPGD:0.1,stepz=3", "the library does not take these options"),
        ("autoattack:apgd-ce:0.1,iterations=3", "AutoPGD of pyautoattack has no setting 'iterations'"),
    ],
)
def test_what_a_library_cannot_do_is_an_error(network, text, message):
    with pytest.raises(ValueError, match=message):
        parse_attack(text).run(De3(None, network, None), images(), network(images()).argmax(dim=1), IDS, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: pixels + 0.11 * (torch.arange(6) == 2).view(-1, 1, 1, 1),
        lambda pixels: torch.where(pixels > 0.7, torch.nan, pixels),
        lambda pixels: pixels * 0,
    ],
    ids=["too far", "not a number", "black"],
)
def test_images_outside_of_the_ball_are_refused(network, monkeypatch, change):
    monkeypatch.setitem(LIBRARIES, "foolbox", Library("foolbox", lambda attack, model, pixels, labels: change(pixels)))
    with pytest.raises(ValueError, match=r"returned images outside of the ball or of \[0, 1\], . of 6: .* norm="):
        parse_attack(TEXTS["foolbox"]).run(De3(None, network, None), images(), LABELS, IDS, 0)


def test_a_library_that_is_absent_is_named(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    monkeypatch.setitem(sys.modules, "foolbox.attacks", None)
    with pytest.raises(ValueError, match=r"attacks of foolbox need the package foolbox, .* pip install foolbox"):
        parse_attack(TEXTS["foolbox"]).run(De3(None, network, None), images(), LABELS, IDS, 0)


def test_denims_attack_on_more_draws_is_not_weaker_than_a_librarys(network):
    target = De3(None, network, 35.0)
    labels = network(images()).argmax(dim=1)
    seeds = target.seeds(9, 5, IDS, 50)

    def share(attack: AttackMethod) -> float:
        with torch.no_grad():
            hits = target.draw_logits(attack.run(target, images(), labels, IDS, 0).pixels, seeds).argmax(-1) == labels
        return float(hits.double().mean())

    assert share(Attack("apgd", 0.1, steps=10, eot=5)) <= share(attack_of("foolbox")) + 0.05
