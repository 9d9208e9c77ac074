"""Transforms without a derivative before a classifier."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from denim.defense import Attack, Bpda, EvaluationSettings, Jpeg, ModuleTarget, evaluate
from denim.defense.fingerprint import Fingerprints

LABELS, IDS = torch.arange(12) % 4, torch.arange(12)


def images(channels: int = 3, height: int = 17, width: int = 13) -> torch.Tensor:
    return torch.rand(12, channels, height, width, generator=torch.Generator().manual_seed(0))


def rounded(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels * 8).round() / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [1, 75, 100])
def test_jpeg_is_that_of_a_file(tmp_path, quality, channels, dtype):
    pixels = images(channels).to(dtype)
    found = Jpeg(quality)(pixels)
    assert found.dtype == dtype
    for image, got in zip(pixels, found, strict=True):
        levels = np.rint(image.double().numpy() * 255).astype(np.uint8)
        given = Image.fromarray(levels[0]) if channels == 1 else Image.fromarray(levels.transpose(1, 2, 0))
        given.save(tmp_path / "image.jpg", quality=quality, subsampling=2)  # 4:2:0
        expected = np.asarray(Image.open(tmp_path / "image.jpg"), dtype=np.float32)
        expected = expected[None] if channels == 1 else expected.transpose(2, 0, 1)
        assert torch.equal(got, (torch.tensor(expected) / 255).to(dtype))


def test_jpeg_clips_and_takes_no_images():
    wide = torch.tensor([-0.4, 0.0, 1.0, 1.4]).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    assert torch.equal(Jpeg(100)(wide)[:, 0, 0, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert Jpeg()(images()[:0]).shape == (0, 3, 17, 13)


@pytest.mark.parametrize("module", [Jpeg(30), Bpda(rounded)], ids=["JPEG", "rounding"])
def test_the_gradient_is_that_of_what_follows_at_the_transformed_pixels(module):
    pixels = images().double().requires_grad_()
    changed = module(pixels)
    (changed**3).sum().backward()
    # Of z^3 it is 3 z^2 by the identity, at z = the transform; rounding has the derivative 0 by itself.
    assert torch.equal(pixels.grad, 3 * changed.detach() ** 2)
    assert not torch.equal(changed, pixels)
    with torch.no_grad():
        assert torch.equal(module(pixels), changed)


def test_a_substitute_gives_the_derivative_and_not_the_value():
    pixels = images().double().requires_grad_()
    module = Bpda(lambda x: rounded(x.mean(dim=1)), substitute=lambda x: x.mean(dim=1).sin())
    changed = module(pixels)
    assert torch.equal(changed, rounded(pixels.mean(dim=1)))
    (changed**2).sum().backward()
    expected = (2 * changed * pixels.mean(dim=1).cos()).unsqueeze(1).expand_as(pixels) / 3
    torch.testing.assert_close(pixels.grad, expected.detach(), rtol=1e-12, atol=0)


def test_weights_of_a_substitute_are_trained_and_those_of_a_transform_are_not():
    transform, substitute = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    Bpda(transform, substitute)(images()).sum().backward()
    assert transform.weight.grad is None
    assert substitute.weight.grad is not None


def test_a_transform_may_change_its_argument_and_return_another_dtype():
    pixels = images()
    before = pixels.clone()
    found = Bpda(lambda x: x.mul_(255).round_().byte())(pixels)
    assert torch.equal(pixels, before)
    assert found.dtype == torch.float32
    assert found.max() > 250


def test_copies_and_transformations_of_torch():
    module, pixels = Jpeg(40), images()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(pixels), module(pixels))
    value, tangent = torch.func.jvp(Bpda(torch.round), (pixels,), (2 * pixels,))
    assert torch.equal(value, pixels.round())
    assert torch.equal(tangent, 2 * pixels)


def test_a_fingerprint_knows_the_quality_and_the_library(monkeypatch):
    def digest(module: nn.Module) -> bytes:
        return Fingerprints().of(module)

    assert digest(Jpeg(75)) == digest(Jpeg())
    assert digest(Jpeg(75)) != digest(Jpeg(76))
    before = digest(Jpeg())
    monkeypatch.setattr("PIL.__version__", "0.1")
    assert digest(Jpeg()) != before


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Jpeg(0), ValueError, "quality of JPEG must be a whole number from 1 to 100, got 0"),
        (lambda: Jpeg(75.0), ValueError, "got 75.0"),
        (lambda: Jpeg()(images(2)), ValueError, r"1 or 3 channels, got \(12, 2, 17, 13\)"),
        (lambda: Jpeg()(images() * torch.nan), ValueError, "finite pixels"),
        (lambda: Bpda(None), TypeError, "transform must be a function or module of pixels, got NoneType"),
        (lambda: Bpda(rounded, 3), TypeError, "substitute must be a function or module of pixels, got int"),
        (lambda: Bpda(lambda x: x.numpy())(images()), TypeError, "must return a tensor, got ndarray"),
        (lambda: Bpda(lambda x: x[..., 1:])(images()), ValueError, "its pixels have shape .* substitute that returns"),
        (lambda: Bpda(rounded, lambda x: x[1:])(images()), ValueError, r"the substitute returned shape \(11, "),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.Tanh(), nn.Linear(24, 4))
        model[1].weight.data *= 4
    return model.eval().requires_grad_(False)


def left(model: nn.Module, attack: Attack) -> float:
    """The share of images whose answer an attack does not change."""
    pixels = images(height=8, width=8)
    target = ModuleTarget(model, is_random=False)
    labels = target(pixels).argmax(dim=1)
    return float((target(attack.run(target, pixels, labels, IDS, 0).pixels).argmax(dim=1) == labels).double().mean())


def test_an_attack_on_what_has_no_derivative_names_bpda_and_bpda_lets_it_through(network):
    class Hidden(nn.Module):
        def forward(self, pixels):
            return torch.from_numpy(rounded(pixels.detach()).numpy())

    attack = Attack("pgd", 0.1, steps=20)
    with pytest.raises(ValueError, match=r"denim\.defense\.Bpda around the part .* or use an attack without gradients"):
        left(nn.Sequential(Hidden(), network), attack)
    assert left(nn.Sequential(Bpda(Hidden()), network), attack) < 0.3


def test_jpeg_is_a_row_that_is_attacked(network, tmp_path):
    rows = {"alone": network, "JPEG 50": nn.Sequential(Jpeg(50), network)}
    pixels = images(height=8, width=8)
    data = (pixels, network(pixels).argmax(dim=1))
    done = evaluate(rows, data, EvaluationSettings(("pgd:24/255,steps=10",), examples=0, health_images=0), tmp_path)
    mean = {(cell.defense, cell.attack == "none"): cell.scores.mean.value for cell in done.cells}
    assert mean["JPEG 50", True] > 0.5
    assert mean["JPEG 50", False] < mean["JPEG 50", True] - 0.2
