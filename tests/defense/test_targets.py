from __future__ import annotations

import contextlib
import random
import sys
import types

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from denim.defense import Attack, De3, ModuleTarget, probe_randomness
from denim.defense.fingerprint import Fingerprints
from denim.defense.targets import as_target, import_object, input_size, normalisation_hint, open_target
from denim.kernels import Domain

PIXELS = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(5)


class Net(nn.Module):
    """A linear classifier with noise from a generator of the process, or without."""

    def __init__(self, noise: str = "none") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Linear(192, 4)
        self.noise = noise

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.model(pixels.flatten(1))
        if self.noise == "torch":
            return logits + torch.randn(logits.shape)
        if self.noise == "numpy":
            return logits + float(np.random.randn())  # noqa: NPY002
        if self.noise == "python":
            return logits + random.random()
        return logits


@contextlib.contextmanager
def untouched():
    """The global generators are afterwards as they were."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    yield
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert before[2] == random.getstate()


@pytest.mark.parametrize("noise", ["none", "torch", "numpy", "python"])
def test_a_module_that_draws_is_found_and_its_draws_are_functions_of_the_seeds(noise):
    target = ModuleTarget(Net(noise)).eval()
    with pytest.raises(RuntimeError, match=r"call probe\(pixels\)"):
        _ = target.is_random
    with untouched():
        assert target.probe(PIXELS) is target.is_random is (noise != "none")
        seeds = target.seeds(0, Domain.SCORE, IDS, 3)
        logits = target.draw_logits(PIXELS, seeds)
        again = target.draw_logits(PIXELS, seeds)
    assert logits.shape == (3, 5, 4)
    assert torch.equal(logits, again)
    assert target.is_random is not torch.equal(logits[0], logits[1])
    other = target.draw_logits(PIXELS, target.seeds(1, Domain.SCORE, IDS, 3))
    assert target.is_random is not torch.equal(logits, other)


def test_dropout_that_is_off_in_evaluation_is_no_draw():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4))
    target = ModuleTarget(module.train())
    assert not target.probe(PIXELS)
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda target: De3(None, target, 0.0)], ids=["module", "De3"])
def test_what_holds_a_target_that_is_not_known_yet_is_probed_and_attacked(wrap):
    """The target inside says nothing of itself; whether its draws differ is found from outside."""
    model = wrap(ModuleTarget(Net(), preprocessing=((0.5,) * 3, (0.25,) * 3)))
    target = as_target(model)
    assert not probe_randomness(model, PIXELS).is_random
    if isinstance(target, ModuleTarget):
        assert not target.probe(PIXELS)
    assert not target.is_random
    assert Attack.parse("fgsm:4/255").run(target, PIXELS, IDS % 4, IDS, 0).pixels.ne(PIXELS).any()
    drawing = wrap(ModuleTarget(Net("torch")))
    assert probe_randomness(drawing, PIXELS).is_random
    drawing = wrap(ModuleTarget(Net("torch"), is_random=True))
    assert probe_randomness(drawing, PIXELS).declared


def test_preprocessing_is_that_of_the_model():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    target = ModuleTarget(Net(), preprocessing=(mean, std), is_random=False)
    normalised = (PIXELS - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(target(PIXELS), Net()(normalised))
    for bad in ((mean, (1.0,)), (mean, (0.5, 0.0, 0.5))):
        with pytest.raises(ValueError, match="a positive std for each channel"):
            ModuleTarget(Net(), preprocessing=bad)


def test_an_attack_finds_the_gradient_of_a_module():
    target = ModuleTarget(Net(), is_random=False)
    labels = target(PIXELS).argmax(dim=1)
    attacked = Attack.parse("fgsm:8/255").run(target, PIXELS, labels, IDS, 0).pixels
    loss = [nn.functional.cross_entropy(target(pixels), labels).item() for pixels in (PIXELS, attacked)]
    assert loss[1] > loss[0]


def test_outputs_with_logits_and_outputs_that_are_none():
    class Output(nn.Module):
        def __init__(self, make) -> None:
            super().__init__()
            self.make = make

        def forward(self, pixels: Tensor):
            return self.make(pixels.flatten(1)[:, :4])

    assert ModuleTarget(Output(lambda x: types.SimpleNamespace(logits=x)))(PIXELS).shape == (5, 4)
    for make in (lambda x: (x,), lambda x: x[0], lambda x: x[:, :, None], lambda x: x[:3]):
        with pytest.raises(ValueError, match=r"Output must return logits \(B, K\) for pixels \(5, 3, 8, 8\), got"):
            ModuleTarget(Output(make))(PIXELS)


def test_what_is_a_target():
    de3 = De3(None, Net(), 35)
    assert as_target(de3) is de3
    foreign = types.SimpleNamespace(seeds=de3.seeds, draw_logits=de3.draw_logits, is_random=True)
    assert as_target(foreign) is foreign
    assert isinstance(as_target(Net()), ModuleTarget)
    with pytest.raises(TypeError, match="got str"):
        as_target("resnet18")


def test_a_timm_model_that_gets_pixels_as_they_are_is_named():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    for bare in (ModuleTarget(model), De3(None, model, 35)):
        assert "VisionTransformer is a model of timm, which expects images normalised" in normalisation_hint(bare)
    normalised = ModuleTarget(model, preprocessing=((0.5,) * 3, (0.5,) * 3))
    for fine in (normalised, De3(None, normalised, 35), De3(None, Net(), 35), ModuleTarget(Net())):
        assert normalisation_hint(fine) is None
    assert input_size(ModuleTarget(model)) == (3, 224)
    assert input_size(ModuleTarget(Net())) == (None, None)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the current folder with factories."""
    (tmp_path / "zoo_of_test.py").write_text(
        "from torch import nn\n"
        "class Small(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(192, 4))\n"
        "class Inner(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.model = nn.Linear(192, 4)\n"
        "    def forward(self, pixels):\n"
        "        return self.model(pixels.flatten(1))\n"
        "def wide(width): return width\n"
        "def broken(): return None + 1\n"
        "def words(): return 'words'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("zoo_of_test", None)


def test_models_by_name_and_their_weights(module):
    target = open_target("zoo_of_test:Small")
    assert not target.training
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert target(PIXELS).shape == (5, 4)
    inner = import_object("zoo_of_test:Inner")()
    for file in ("inner.safetensors", "inner.pt"):
        save = save_file if file.endswith("safetensors") else torch.save
        save(inner.state_dict(), module / file)
        assert torch.equal(open_target("zoo_of_test:Inner", module / file)(PIXELS), inner(PIXELS))
    with pytest.raises(ValueError, match=r"inner\.pt has no weights of zoo_of_test:Small: 2 are missing"):
        open_target("zoo_of_test:Small", module / "inner.pt")


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("zoo_of_test", ValueError, "expected package.module:name, got 'zoo_of_test'"),
        ("no_such_module:f", ValueError, "no_such_module is neither installed nor in"),
        ("zoo_of_test:Smal", ValueError, "zoo_of_test has no Smal; it has Inner, Small"),
        ("zoo_of_test:wide", ValueError, "called without arguments: .*missing 1 required"),
        ("zoo_of_test:broken", TypeError, "unsupported operand"),
        ("zoo_of_test:words", TypeError, "a defense must be a module from pixels"),
        ("timm:resnet19", ValueError, "timm has no model 'resnet19'; it has .*resnet"),
    ],
)
@pytest.mark.usefixtures("module")
def test_names_of_no_model_are_refused(text, kind, words):
    with pytest.raises(kind, match=words):
        open_target(text)


# Fingerprints


def same(one, other) -> bool:
    """Whether two objects have one fingerprint, each in a walk of its own."""
    return Fingerprints().of(one) == Fingerprints().of(other)


def test_a_fingerprint_is_that_of_weights_settings_and_code():
    assert same(Net(), Net())
    assert not same(Net(), Net("torch"))
    assert not same(De3(None, Net(), 35), De3(None, Net(), 36))
    assert same(De3(None, Net(), 35, seed=1), De3(None, Net(), 35, seed=2)), "draws are keyed by the evaluation"
    assert not same(De3(None, Net(), 35).frozen(1), De3(None, Net(), 35).frozen(2))
    moved = Net()
    with torch.no_grad():
        moved.model.weight[0, 0] += 1e-6
    assert not same(Net(), moved)
    hidden = Net()
    hidden.register_buffer("shift", torch.ones(1), persistent=False)
    assert not same(Net(), hidden)
    assert not same(nn.Sequential(Net(), nn.Dropout(0.1)), nn.Sequential(Net(), nn.Dropout(0.2)))
    assert not same(ModuleTarget(Net()), ModuleTarget(Net(), preprocessing=((0.5,), (0.5,))))


def test_what_a_module_counts_may_be_left_out_of_its_fingerprint():
    class Counting(Net):
        not_in_fingerprint = ("calls",)

    one, other = Counting(), Counting()
    one.calls = 7
    assert same(one, other)
    one.shift = 7
    assert not same(one, other)
    probed = ModuleTarget(Net())
    probed.probe(PIXELS)
    assert same(probed, ModuleTarget(Net()))
    assert not same(probed, ModuleTarget(Net(), is_random=False)), "what somebody says is not probed"


def test_a_fingerprint_sees_replaced_functions_and_what_they_close_over():
    def scaled(factor: float) -> Net:
        net = Net()
        net.forward = lambda pixels: factor * net.model(pixels.flatten(1))
        return net

    assert same(scaled(2.0), scaled(2.0))
    assert not same(scaled(2.0), scaled(3.0))
    assert not same(scaled(2.0), Net())


def test_a_fingerprint_of_classes_without_source():
    def made(code: str) -> nn.Module:
        names: dict[str, type] = {"nn": nn}
        exec(f"class Made(nn.Module):\n    def forward(self, pixels):\n        return {code}", names)
        return names["Made"]()

    assert same(made("pixels.sum()"), made("pixels.sum()"))
    assert not same(made("pixels.sum()"), made("pixels.sum() * 2"))


def test_a_call_does_not_change_the_fingerprint_of_a_de3():
    defense = De3(None, Net(), 35).eval()
    before = Fingerprints().of(defense)
    defense(PIXELS)
    assert Fingerprints().of(defense) == before
