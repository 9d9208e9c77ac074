from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from denim.benchmarks.launches import ImaginedGPU
from denim.defense import Attack, De3
from denim.kernels import Domain, draw_seeds, normal_noise
from denim.nim import Autoencoder, AutoencoderConfig, CheckpointError, Classifier, ClassifierConfig, Mask, models
from denim.nim.attention import Attention

CONFIG = AutoencoderConfig((8, 12), 4, 16, 1, 2, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3))
BATCH, CLASSES = 3, 5
SEEDS = torch.tensor([[5, -7, 2**40], [11, 12, 13]])
CASES = pytest.mark.parametrize(
    ("degrade", "target", "statistics"),
    [
        ("noise", "raw", "input"),
        ("noise", "norm", "input"),
        ("noise", "norm", "noisy"),
        ("mask", "raw", "input"),
        ("mask", "norm", "input"),
        ("both", "raw", "input"),
        ("both", "norm", "input"),
        ("both", "norm", "noisy"),
    ],
)
# Matrix products of another batch size change the results of a float64 network by about 1e-15. Noise is float32, and
# the same on both sides.
CLOSE = {"rtol": 0, "atol": 1e-12}


def linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES).double()).requires_grad_(False)


def build(target: str = "raw") -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Autoencoder(replace(CONFIG, target=target)).double().eval().requires_grad_(False)


def pixels(batch: int = BATCH) -> Tensor:
    return torch.rand(batch, 2, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def noise_only(**options) -> De3:
    """A classifier whose logits are the noisy pixels, so that two calls that share a draw are equal."""
    return De3(None, nn.Flatten(), 70, **options)


def noise_of(defense: De3, images: Tensor) -> Tensor:
    return (defense(images) - images.flatten(1)) * 255 / 70


def level(degrade: str) -> float:
    return 0.0 if degrade == "mask" else 70.0


class Recorder(nn.Module):
    """Calls a model and records the size of every batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sizes: list[int] = []

    def forward(self, *inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs[0]))
        return self.model(*inputs)


class Table(nn.Module):
    """A classifier whose logits are the rows of a table, whatever its input."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, images: Tensor) -> Tensor:
        return self.rows + 0 * images.flatten(1)[:, :1]


def by_hand(defense: De3, images: Tensor, seeds: Tensor, sigma: float) -> Tensor:
    """Logits of one draw in plain float64, from the text of the method."""

    def patches_of(pictures: Tensor) -> Tensor:
        tiles = ((pictures - mean) / std).unfold(-2, 4, 4).unfold(-2, 4, 4)  # (B, C, rows, columns, P, P)
        return tiles.permute(0, 2, 3, 4, 5, 1).reshape(len(images), 6, 32)

    def pixels_of(patches: Tensor) -> Tensor:
        return patches.view(-1, 2, 3, 4, 4, 2).permute(0, 5, 1, 3, 2, 4).reshape(-1, 2, 8, 12)

    mean, std = (torch.tensor(value, dtype=torch.float64).view(-1, 1, 1) for value in (CONFIG.mean, CONFIG.std))
    noise = normal_noise(seeds, (8, 12, 2)).permute(0, 3, 1, 2).double()
    degraded = images if defense.degrade == "mask" else images + sigma / 255 * noise
    if defense.denoiser is None:
        return defense.classifier(degraded)
    mask = None if defense.degrade == "noise" else Mask.random(seeds, 6, defense.mask_ratio)
    noisy, clean = patches_of(degraded), patches_of(images)
    predicted = defense.denoiser(noisy, mask)
    if defense.denoiser.config.target == "norm" and defense.statistics == "input":
        predicted = predicted * (clean.var(-1, keepdim=True) + 1e-6).sqrt() + clean.mean(-1, keepdim=True)
    elif defense.denoiser.config.target == "norm":
        added = (sigma / 255) ** 2 * (1 / std.square()).mean()
        excess = noisy.var(-1, keepdim=True) - added
        variance = (excess + (excess.square() + 4 * (added.square() * 2 / 31 + 1e-12)).sqrt()) / 2
        predicted = predicted * (variance + 1e-6).sqrt() + noisy.mean(-1, keepdim=True)
    rebuilt = (pixels_of(predicted) * std + mean).clamp(0, 1)
    if defense.degrade == "mask":
        rebuilt = torch.where(pixels_of(mask.hidden[..., None].expand(-1, -1, 32).double()) > 0, rebuilt, images)
    return defense.classifier(rebuilt)


# The method


@CASES
def test_logits_are_those_of_the_steps_by_hand(degrade, target, statistics):
    options = {"degrade": degrade, "mask_ratio": 0.6, "statistics": statistics}
    defense = De3(build(target), linear(), level(degrade), **options)
    expected = torch.stack([by_hand(defense, pixels(), seeds, level(degrade)) for seeds in SEEDS])
    logits = defense.draw_logits(pixels(), SEEDS)
    assert logits.shape == (2, BATCH, CLASSES)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert not torch.equal(logits[0], logits[1])


def test_without_a_denoiser_the_noisy_image_is_classified_as_it_is():
    defense = De3(None, linear(), 140)
    expected = torch.stack([by_hand(defense, pixels(), seeds, 140) for seeds in SEEDS])
    torch.testing.assert_close(defense.draw_logits(pixels(), SEEDS), expected, **CLOSE)
    assert noise_only()(pixels()).min() < 0, "noise alone is not clipped"


def test_a_call_takes_the_next_draws_of_the_stream():
    defense = De3(build(), linear(), 70, seed=-3, draws=2)
    for step in range(3):
        seeds = draw_seeds(-3, Domain.DEFENSE, torch.arange(BATCH), 2, step)
        expected = torch.stack([by_hand(defense, pixels(), draw, 70) for draw in seeds]).mean(dim=0)
        torch.testing.assert_close(defense(pixels()), expected, **CLOSE)


def test_off_is_the_classifier_alone():
    denoiser = Recorder(build())
    denoiser.config = CONFIG
    defense = De3(denoiser, linear(), None, draws=4, aggregate="vote")
    assert torch.equal(defense(pixels()), defense.classifier(pixels()))
    assert torch.equal(defense.draw_logits(pixels(), SEEDS.repeat(4, 1)), defense(pixels()).expand(2, -1, -1))
    assert defense.denoise(pixels()) is not None
    assert torch.equal(defense.denoise(pixels()), pixels())
    assert denoiser.sizes == []
    assert not defense.is_random


def test_sigma_may_be_set_at_any_time():
    defense, images = De3(build(), linear(), None), pixels()
    assert defense.sigma is None
    defense.sigma = 35
    assert defense.sigma == 35
    torch.testing.assert_close(defense.draw_logits(images, SEEDS)[0], by_hand(defense, images, SEEDS[0], 35), **CLOSE)
    with pytest.raises(ValueError, match="finite"):
        defense.sigma = float("nan")
    assert defense.sigma == 35
    defense.sigma = None
    assert torch.equal(defense(images), defense.classifier(images))


@pytest.mark.parametrize(
    ("sigma", "degrade", "random"),
    [(70, "noise", True), (0, "noise", False), (0, "mask", True), (0, "both", True), (None, "noise", False)],
)
def test_is_random_says_whether_calls_differ(sigma, degrade, random):
    defense = De3(build(), linear(), sigma, degrade=degrade, seed=3)  # of six patches, masks of two draws may be equal
    assert defense.is_random is random
    assert torch.equal(defense(pixels()), defense(pixels())) is not random


def test_denoise_shows_what_the_classifier_sees():
    defense, images = De3(build("norm"), linear(), 70), pixels()
    seen = defense.denoise(images, seeds=SEEDS[0])
    assert seen.shape == images.shape
    assert seen.min() >= 0
    assert seen.max() <= 1
    torch.testing.assert_close(defense.classifier(seen), defense.draw_logits(images, SEEDS[:1])[0], **CLOSE)
    other = defense.denoise(images, 140, seeds=SEEDS[0])
    torch.testing.assert_close(defense.classifier(other), by_hand(defense, images, SEEDS[0], 140), **CLOSE)
    assert not torch.equal(defense.denoise(images), defense.denoise(images)), "draws afresh without seeds"


def test_degraded_shows_noise_and_hides_what_the_denoiser_does_not_see():
    images, seeds = pixels(), SEEDS[0]
    noise = normal_noise(seeds, (8, 12, 2)).permute(0, 3, 1, 2).double()
    noisy = images + 70 / 255 * noise
    torch.testing.assert_close(De3(build(), linear(), 70).degraded(images, seeds), noisy, **CLOSE)
    assert torch.equal(De3(build(), linear(), None).degraded(images, seeds), images)
    for degrade, kept in (("mask", images), ("both", noisy)):
        shown = De3(build(), linear(), level(degrade), degrade=degrade, mask_ratio=0.5).degraded(images, seeds)
        tiles = (shown == 0.5).all(dim=1).unfold(1, 4, 4).unfold(2, 4, 4).flatten(-2).all(dim=-1)
        assert torch.equal(tiles.flatten(1), Mask.random(seeds, 6, 0.5).hidden)
        seen = ~tiles.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).expand_as(images)
        torch.testing.assert_close(shown[seen], kept[seen], **CLOSE)


def test_print_tells_the_settings():
    text = repr(De3(build(), linear(), 70, degrade="both", mask_ratio=0.6).frozen(8))
    for part in ("sigma=70.0", "degrade='both'", "mask_ratio=0.6", "case='both, raw target'", "frozen=seed 8"):
        assert part in text


# Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigma": float("nan")}, ["sigma", "finite", "nan"]),
        ({"sigma": float("inf")}, ["sigma", "finite", "inf"]),
        ({"sigma": -1.0}, ["sigma", "0 or more", "-1", "None turns the defense off"]),
        ({"sigma": 10001.0}, ["sigma", "at most 10000", "10001"]),
        ({"draws": 0}, ["draws", "at least 1", "0"]),
        ({"aggregate": "mean"}, ["logits", "vote", "mean"]),
        ({"degrade": "blur"}, ["noise", "mask", "both", "blur"]),
        ({"mask_ratio": 1.0}, ["mask_ratio", "between 0 and 1", "1.0"]),
        ({"mask_ratio": float("nan")}, ["mask_ratio", "between 0 and 1", "nan"]),
        ({"statistics": "clean"}, ["input", "noisy", "clean"]),
        ({"denoiser": None, "degrade": "mask", "sigma": 0}, ["mask", "denoiser"]),
        ({"denoiser": None, "degrade": "both"}, ["both", "denoiser"]),
        ({"degrade": "mask"}, ["mask", "sigma=0", "70"]),
        ({"degrade": "mask", "sigma": 0, "statistics": "noisy"}, ["noisy", "mask"]),
    ],
)
def test_bad_options_are_refused(options, words):
    chosen = {"denoiser": build("norm"), "classifier": linear(), "sigma": 70} | options
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        De3(**chosen)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("sigma", [70, None])
@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.full((2, 2, 8, 12), float("nan")), ValueError, ["[0, 1]", "nan"]),
        (torch.full((2, 2, 8, 12), float("inf")), ValueError, ["[0, 1]", "inf"]),
        (torch.full((2, 2, 8, 12), 1.01), ValueError, ["[0, 1]", "1.01", "normalised"]),
        (torch.full((2, 2, 8, 12), -0.01), ValueError, ["[0, 1]", "-0.01"]),
        (torch.full((2, 2, 8, 12), 255, dtype=torch.uint8), TypeError, ["float in [0, 1]", "uint8", "255"]),
        (torch.zeros(2, 8, 12), ValueError, ["(B, C, H, W)", "(2, 8, 12)"]),
    ],
)
def test_bad_pixels_are_refused_before_any_work(images, error, words, sigma):
    classifier = Recorder(linear())
    defense = De3(build(), classifier, sigma)
    calls = [defense, defense.denoise, lambda pixels: defense.sweep(pixels, [35], 1)]
    for call in calls:
        with pytest.raises(error) as caught:
            call(images)
        for word in words:
            assert word in str(caught.value)
    assert classifier.sizes == []


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 3, 8, 12), ["channels", "(2, 3, 8, 12)"]),
        (torch.zeros(2, 2, 8, 8), ["(8, 12)", "(8, 8)"]),
        (torch.zeros(2, 2, 7, 12), ["(8, 12)", "(7, 12)"]),
    ],
)
def test_images_that_the_denoiser_does_not_take_are_refused(images, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        De3(build(), linear(), 70)(images)
    for word in words:
        assert word in str(caught.value)


def test_seeds_of_another_length_are_refused():
    defense = De3(build(), linear(), 70)
    for call in (
        lambda: defense.draw_logits(pixels(), SEEDS[:, :2]),
        lambda: defense.denoise(pixels(), seeds=SEEDS[0, :2]),
        lambda: defense.sweep(pixels(), [35], 3, seeds=SEEDS),
        lambda: defense.sweep(pixels(2), [35], 2, seeds=SEEDS),
    ):
        with pytest.raises(ValueError, match="seeds must have shape"):
            call()


@pytest.mark.parametrize(
    ("degrade", "target", "statistics"),
    [("noise", "raw", "input"), ("noise", "norm", "noisy"), ("both", "norm", "input")],
)
def test_images_of_one_call_may_have_levels_of_their_own(degrade, target, statistics):
    levels = torch.tensor([0.0, 12.5, 70.0])
    defense = De3(build(target), linear(), 35, draws=2, degrade=degrade, statistics=statistics).eval()
    images, seeds = pixels(3), SEEDS[:, :3]
    together = defense.draw_logits(images, seeds, sigma=levels)
    assert defense.sigma == 35
    for number, level in enumerate(levels.tolist()):
        defense.sigma = level
        alone = defense.draw_logits(images[number, None], seeds[:, number, None])
        torch.testing.assert_close(together[:, number, None], alone, rtol=1e-5, atol=1e-6)
    defense.sigma = None
    with pytest.raises(ValueError, match="this defense is off, so it takes no noise levels"):
        defense.draw_logits(images, seeds, sigma=levels)


@pytest.mark.parametrize(
    ("sigmas", "draws", "max_batch", "batch"),
    [([], 1, 8, 1), ([35], 0, 8, 1), ([35], 1, 0, 1), ([35], 1, 8, 0)],
)
def test_an_empty_sweep_is_refused(sigmas, draws, max_batch, batch):
    with pytest.raises(ValueError, match="at least 1"):
        De3(build(), linear(), 70).sweep(pixels(batch), sigmas, draws, max_batch=max_batch)


@pytest.mark.parametrize("path", ["runs/nim/model", Path("runs/nim/model")])
def test_a_path_in_place_of_a_model_is_refused(path):
    with pytest.raises(TypeError, match=r"got the path 'runs/nim/model': Autoencoder\.from_pretrained loads it"):
        De3(path, nn.Identity(), 70)
    with pytest.raises(TypeError, match=r"got the path 'runs/nim/model': Classifier\.from_pretrained loads it"):
        De3(None, path, 70)


def test_a_seed_that_is_no_int64_is_refused():
    with pytest.raises(ValueError, match="seed must be an int64"):
        De3(None, nn.Identity(), 70, seed=2**63)
    with pytest.raises(ValueError, match="seed must be an int64"):
        De3(None, nn.Identity(), 70).frozen(-(2**63) - 1)


def test_a_level_as_if_of_images_in_0_to_1_is_warned_of():
    with pytest.warns(UserWarning, match=r"for 0\.25 of images in \[0, 1\] give 63\.75"):
        De3(None, nn.Identity(), 0.25)


def test_bad_levels_are_refused_wherever_they_come_in():
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number of 0-255"):
            De3(build(), linear(), 70).sweep(pixels(), [35, bad], 1)
        with pytest.raises(ValueError, match="finite number of 0-255"):
            De3(build(), linear(), 70).denoise(pixels(), bad)
    masks = De3(build(), linear(), 0, degrade="mask")
    for call in (lambda: masks.sweep(pixels(), [0, 35], 1), lambda: masks.denoise(pixels(), 35)):
        with pytest.raises(ValueError, match="adds no noise"):
            call()


def tuned(trained_on: str) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        return Classifier(ClassifierConfig.for_encoder(CONFIG, CLASSES, trained_on=trained_on))


@pytest.mark.parametrize(
    ("denoiser", "degrade", "statistics", "case"),
    [
        (None, "noise", "input", "noisy"),
        ("raw", "noise", "input", "noise, raw target"),
        ("raw", "noise", "noisy", "noise, raw target"),
        ("norm", "noise", "input", "noise, input statistics"),
        ("norm", "noise", "noisy", "noise, noisy statistics"),
        ("norm", "both", "noisy", "both, noisy statistics"),
        ("raw", "mask", "input", "mask, raw target"),
    ],
)
def test_a_classifier_of_another_case_warns_and_no_other_does(denoiser, degrade, statistics, case):
    model = None if denoiser is None else build(denoiser)
    options = {"degrade": degrade, "statistics": statistics}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matching = De3(model, tuned(case), level(degrade), **options)
        assert matching.case == case
        matching.frozen()
        De3(model, linear(), level(degrade), **options)  # records nothing
        De3(model, tuned("clean"), None, **options)  # off
    for other in ("clean", "noise, other statistics"):
        with pytest.warns(UserWarning, match=f"{other!r} and is used on {case!r}") as caught:
            De3(model, tuned(other), level(degrade), **options)
        assert len(caught) == 1
        assert caught[0].filename == __file__


# The stream of draws


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("degrade", ["noise", "mask", "both"])
def test_the_global_generator_is_neither_read_nor_moved(degrade):
    defense = De3(build(), linear(), level(degrade), degrade=degrade, seed=3)
    calls = (
        defense,
        defense.denoise,
        lambda images: defense.sweep(images, [level(degrade)], 2),
        copy.deepcopy(defense),
    )
    for call in calls:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = torch.get_rng_state()
            first = call(pixels())
            assert torch.equal(torch.get_rng_state(), state)
            torch.manual_seed(0)
            assert not torch.equal(call(pixels()), first), "a reseeded client must not replay the draws"


def test_without_a_seed_every_defense_has_its_own_stream():
    first, second = noise_only(), noise_only()
    draws = [noise_of(defense, pixels()) for defense in (first, first, second)]
    for one in range(3):
        for other in range(one):
            assert not torch.isclose(draws[one], draws[other]).all(dim=1).any()


def test_images_of_a_batch_have_different_noise():
    noise = noise_of(noise_only(seed=3), pixels(1).expand(3, -1, -1, -1))
    assert not torch.isclose(noise[0], noise[1]).any()


def test_a_seed_fixes_the_sequence():
    first, second, other = noise_only(seed=3), noise_only(seed=3), noise_only(seed=4)
    for _ in range(3):
        result = first(pixels())
        assert torch.equal(result, second(pixels()))
        assert not torch.equal(result, other(pixels()))


def through_file(defense: De3) -> De3:
    file = io.BytesIO()
    torch.save(defense, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda defense: pickle.loads(pickle.dumps(defense)), through_file]
)


@COPIES
@pytest.mark.parametrize("seed", [None, 3])
def test_copies_draw_differently(duplicate, seed):
    original = noise_only(seed=seed)
    original(pixels())
    family = [original, duplicate(original), duplicate(original)]
    family.append(duplicate(family[1]))
    results = [torch.stack([defense(pixels()) for _ in range(3)]) for defense in family]
    draws = torch.cat(results).flatten(1)
    assert len(draws.unique(dim=0)) == 12


@COPIES
def test_copying_leaves_the_original_and_a_seed_fixes_the_copies_too(duplicate):
    plain, copied = noise_only(seed=3), noise_only(seed=3)
    first, second = duplicate(copied), duplicate(noise_only(seed=3))
    assert torch.equal(first(pixels()), second(pixels()))
    assert torch.equal(plain(pixels()), copied(pixels()))


@COPIES
def test_a_copy_of_a_frozen_defense_is_the_same_function(duplicate):
    frozen = noise_only().frozen(3)
    assert torch.equal(duplicate(frozen)(pixels()), frozen(pixels()))
    assert duplicate(frozen).is_frozen


def test_ranks_draw_differently(monkeypatch):
    alone = noise_only(seed=3)(pixels())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    results = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        results.append(noise_only(seed=3)(pixels()))
        frozen = noise_only().frozen(3)(pixels())
    monkeypatch.undo()
    assert torch.equal(results[0], alone)
    assert len(torch.stack(results).flatten(0, 1).unique(dim=0)) == 3 * BATCH
    assert torch.equal(frozen, noise_only().frozen(3)(pixels()))


def test_replicas_of_data_parallel_draw_differently():
    defense = noise_only(seed=3)
    results = [defense(pixels())]
    for _ in range(2):  # two calls of DataParallel, each with replicas of its own
        for replica in [defense._replicate_for_data_parallel() for _ in range(2)]:
            replica._calls = torch.zeros_like(defense._calls)  # broadcast copies on other devices
            results.append(replica(pixels()))
    assert len(torch.stack(results).flatten(0, 1).unique(dim=0)) == 5 * BATCH


def test_checkpoints_hold_no_stream():
    defense = De3(build(), linear(), 70)
    names = {f"denoiser.{name}" for name in defense.denoiser.state_dict()}
    assert set(defense.state_dict()) == names | {f"classifier.{name}" for name in defense.classifier.state_dict()}


@pytest.mark.slow
@pytest.mark.parametrize(("degrade", "aggregate"), [("noise", "logits"), ("both", "vote")])
def test_a_compiled_defense_draws_afresh(degrade, aggregate):
    torch.compiler.reset()
    options = {"degrade": degrade, "aggregate": aggregate, "draws": 2, "seed": 3}
    compiled = torch.compile(De3(build(), linear(), 70, **options), fullgraph=True, backend="aot_eager")
    eager = De3(build(), linear(), 70, **options)
    first, second = compiled(pixels()), compiled(pixels())
    torch.testing.assert_close(first, eager(pixels()), **CLOSE)
    torch.testing.assert_close(second, eager(pixels()), **CLOSE)
    assert not torch.equal(first, second)


# Patches for the classifier


def vit(kind: type[Classifier] = Classifier, **changes) -> Classifier:
    # Other statistics than the denoiser's, and exact in float32, in which the classifier keeps them.
    config = replace(
        ClassifierConfig.for_encoder(CONFIG, CLASSES), mean=(0.375, 0.5), std=(0.25, 0.3125), trained_on="any"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = kind(replace(config, **changes)).double().eval().requires_grad_(False)
        nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def handed(monkeypatch):
    """The kinds of input that classifiers get, call by call."""
    calls = []

    def record(name, plain):
        def recorded(self, images):
            calls.append((name, images.dtype))
            return plain(self, images)

        monkeypatch.setattr(Classifier, name, recorded)

    for name in ("forward", "forward_patches"):
        record(name, getattr(Classifier, name))
    return calls


@pytest.mark.filterwarnings("ignore:the classifier was trained on")
@CASES
def test_a_fitting_classifier_gets_patches_and_answers_the_same(degrade, target, statistics, handed):
    options = {"degrade": degrade, "statistics": statistics, "mask_ratio": 0.5, "draws": 2, "seed": 3}
    results = []
    for classifier in (vit(), Recorder(vit())):
        defense = De3(build(target), classifier, level(degrade), **options)
        images = pixels().requires_grad_()
        logits = defense.draw_logits(images, SEEDS)
        (gradient,) = torch.autograd.grad(logits.square().sum(), images)
        swept = defense.sweep(pixels(), [level(degrade)], 2, max_batch=5)
        results.append((logits, gradient, swept, defense(pixels())))
        kinds = {kind for kind, _ in handed}
        assert kinds == ({"forward_patches"} if isinstance(classifier, Classifier) else {"forward"})
        handed.clear()
    assert results[0][0].abs().max() > 1
    assert results[0][1].abs().max() > 1
    # Sums of 32 products in another order, float64, at values up to a hundred.
    for bridged, plain in zip(*results, strict=True):
        torch.testing.assert_close(bridged, plain, rtol=1e-11, atol=1e-11)


class Changed(Classifier):
    """A subclass with a forward of its own."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.flip(-1))


def spy(*_) -> None:
    """A hook that changes nothing."""


def with_lambda_forward(model: Classifier) -> None:
    model.forward = lambda images: Classifier.forward(model, images)


@pytest.mark.filterwarnings("ignore:the classifier was trained on")
@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model.register_forward_hook(spy),
        lambda model: model.register_forward_pre_hook(spy),
        lambda model: model.register_full_backward_hook(spy),
        lambda model: model.register_full_backward_pre_hook(spy),
        lambda model: model.patch_embed.register_forward_pre_hook(spy),
        lambda model: model.patch_embed.proj.register_forward_hook(spy),
        lambda model: model.compile(backend="eager"),
        lambda model: nn.utils.parametrizations.weight_norm(model.patch_embed.proj),
        with_lambda_forward,
    ],
    ids=["hook", "pre-hook", "backward", "backward pre-hook", "embed", "proj", "compiled", "parametrized", "replaced"],
)
def test_who_watches_or_changes_the_classifier_sees_pixels(prepare, handed):
    model = vit()
    defense = De3(build(), model, 70)
    expected = defense.draw_logits(pixels(), SEEDS)
    assert {kind for kind, _ in handed} == {"forward_patches"}
    handed.clear()
    prepare(model)
    logits = defense.draw_logits(pixels(), SEEDS)
    assert {kind for kind, _ in handed} == {"forward"}
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:the classifier was trained on")
@pytest.mark.parametrize(
    ("denoiser", "classifier"),
    [
        (True, vit(Changed)),
        (True, vit(patch_size=2)),
        (True, nn.Sequential(vit())),
        (False, vit()),
    ],
    ids=["subclass", "other patches", "wrapper", "no denoiser"],
)
def test_other_classifiers_see_pixels(denoiser, classifier, handed):
    defense = De3(build() if denoiser else None, classifier, 70)
    expected = torch.stack([by_hand(defense, pixels(), seeds, 70) for seeds in SEEDS])
    torch.testing.assert_close(defense.draw_logits(pixels(), SEEDS), expected, **CLOSE)
    assert {kind for kind, _ in handed} == {"forward"}


@pytest.mark.filterwarnings("ignore:the classifier was trained on")
def test_patches_under_autocast_are_in_its_dtype(handed):
    images, outcomes = pixels().float(), {}
    for name, classifier in (("patches", vit().float()), ("pixels", Recorder(vit().float()))):
        defense = De3(build("norm").float(), classifier, 70).frozen(3)
        outcomes[name, "float32"] = defense(images)
        with torch.autocast("cpu", torch.bfloat16):
            given = images.clone().requires_grad_()
            outcomes[name, "bfloat16"] = defense(given).float()
            assert torch.autograd.grad(outcomes[name, "bfloat16"].sum(), given)[0].isfinite().all()
    assert handed == [("forward_patches", torch.float32), ("forward_patches", torch.bfloat16), *handed[2:]]
    assert {kind for kind, _ in handed[2:]} == {"forward"}
    torch.testing.assert_close(outcomes["patches", "float32"], outcomes["pixels", "float32"], rtol=1e-4, atol=1e-4)
    exact = outcomes["pixels", "float32"]
    error = {name: (outcomes[name, "bfloat16"] - exact).abs().max() for name in ("patches", "pixels")}
    # Up to the embedding the roundings are equal; after it, sums in another order round differently.
    assert 0 < error["patches"] < 2 * error["pixels"] + 0.02 * exact.abs().max()


@pytest.mark.filterwarnings("ignore:the classifier was trained on")
@pytest.mark.parametrize(
    ("degrade", "target", "draws", "launches"),
    [
        # Ids, seeds, the count of calls, the level; noise, pixels of the prediction; the mean over draws.
        ("noise", "raw", 1, 8),
        ("noise", "norm", 20, 8),
        ("both", "raw", 1, 10),
        ("mask", "raw", 1, 14),  # clean patches for both networks; what is hidden (2), the choice
    ],
)
def test_launches_of_a_call_outside_of_the_networks(monkeypatch, degrade, target, draws, launches):
    """Without the check of the pixels, which waits for the device."""
    calls = []

    def recorded(forward):
        return lambda *arguments: calls.append((forward, arguments)) or forward(*arguments)

    for kind, name in ((Autoencoder, "forward"), (Classifier, "forward_patches")):
        monkeypatch.setattr(kind, name, recorded(getattr(kind, name)))
    monkeypatch.setattr("denim.defense.de3.check_pixels", lambda pixels: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Attention, "backend", "math")
    with ImaginedGPU() as gpu, torch.no_grad():
        defense = De3(build(target).float(), vit().float(), level(degrade), degrade=degrade, draws=draws).to("cuda")
        images = pixels().float().to("cuda")
        with gpu.watch() as whole:
            defense(images)
        with gpu.watch() as networks:
            for forward, arguments in list(calls):
                forward(*arguments)
    assert len(calls) == 2
    assert (whole - networks).total() == launches, whole - networks


@pytest.mark.filterwarnings("ignore:the classifier was trained on")
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(("target", "statistics"), [("raw", "input"), ("norm", "input"), ("norm", "noisy")])
def test_noisy_patches_are_in_the_dtype_in_which_the_denoiser_computes(operators, target, statistics, autocast):
    """In a call, in the gradient for an attack, and in a sweep."""
    images, dtype = pixels().float(), torch.bfloat16 if autocast else torch.float32
    defense = De3(build(target).float(), vit().float(), 70, statistics=statistics, seed=0)
    given = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), operators() as calls:
        defense(images)
        total = defense.draw_logits(given, SEEDS).float().sum()
        defense.sweep(images, [0, 70], 2)
    with operators() as backward:
        (gradient,) = torch.autograd.grad(total, given)
    assert [call.args[-1] for call in calls["denim.noise_patchify.default"]] == [dtype] * 3
    assert [call.result.dtype for call in calls["denim.decode_patches.default"]] == [dtype] * 3
    assert [call.args[0].dtype for call in backward["denim.noise_patchify_backward.default"]] == [dtype]
    assert gradient.dtype == torch.float32
    # The denoiser takes its patches, and the classifier its own, as they are.
    sizes = {call.args[0].shape[-1] for call in calls["aten._to_copy.default"] if call.args[0].dim() == 3}
    assert defense.denoiser.config.patch_dim not in sizes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the classifier was trained on")
def test_patches_for_the_classifier_are_one_compiled_graph():
    torch.compiler.reset()
    frozen, images = De3(build("norm"), vit(), 70, draws=2).frozen(3), pixels().requires_grad_()
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(frozen(images).square().sum(), images)
    logits = compiled(images)
    torch.testing.assert_close(logits, frozen(images), **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), images)[0], expected, rtol=0, atol=1e-10)
    # A hook that is registered later counts as well.
    seen = []
    frozen.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    frozen(images)
    assert seen == [(2 * BATCH, 2, 8, 12)]


# Frozen


@CASES
def test_frozen_is_a_function_of_the_image_whatever_the_batch(degrade, target, statistics):
    options = {"degrade": degrade, "statistics": statistics, "mask_ratio": 0.5, "draws": 2}
    random = De3(build(target), linear(), level(degrade), **options)
    frozen, images = random.frozen(7), pixels()
    assert frozen.is_frozen
    assert not frozen.is_random
    assert random.is_random
    together = frozen(images)
    assert torch.equal(frozen(images), together)
    torch.testing.assert_close(frozen(images[[2]]), together[[2]], **CLOSE)
    torch.testing.assert_close(frozen(images[[1, 0, 1, 2]]), together[[1, 0, 1, 2]], **CLOSE)
    torch.testing.assert_close(random.frozen(7)(images), together, **CLOSE)
    assert not torch.allclose(random.frozen(8)(images), together)
    # The defense with the frozen seeds, derived by hand, has the same logits.
    seeds = frozen.seeds(123, Domain.SCORE, torch.arange(BATCH), 1)
    assert seeds.shape == (2, BATCH)
    assert (seeds == seeds[:, :1]).all()
    expected = torch.stack([by_hand(random, images, draw, level(degrade)) for draw in seeds]).mean(dim=0)
    torch.testing.assert_close(together, expected, **CLOSE)


def test_frozen_answers_every_stage_with_the_same_draws():
    frozen, ids = noise_only(draws=2).frozen(7), torch.tensor([4, 9])
    attack = frozen.seeds(1, Domain.ATTACK, ids, 1, step=5)
    assert torch.equal(frozen.seeds(2, Domain.SCORE, ids, 3), attack.repeat(3, 1))


def test_frozen_shares_the_modules():
    defense = De3(build(), linear(), 70)
    assert defense.frozen().denoiser is defense.denoiser
    assert defense.frozen().classifier is defense.classifier


# Training and evaluation mode


def normalizing(training: bool) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)).double().train(training)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_defense_is_in_the_mode_of_its_modules(frozen):
    def mode(denoiser: nn.Module | None, classifier: nn.Module) -> bool:
        defense = De3(denoiser, classifier, 70)
        return (defense.frozen() if frozen else defense).training

    assert not mode(build(), normalizing(False))
    assert mode(None, normalizing(True))
    assert mode(build().train(), normalizing(True))
    assert not mode(build(), normalizing(True)), "one part is not in training mode"
    assert not mode(build().train(), normalizing(False))
    partly = normalizing(True)
    partly[1].eval()  # a frozen batch norm in a network that is trained
    assert not mode(None, partly)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_client_that_restores_the_mode_does_not_train_the_batch_norm(frozen):
    classifier = normalizing(False)
    defense = De3(build(), classifier, 70)
    defense = defense.frozen() if frozen else defense
    noted = defense.training
    defense.eval()
    defense(pixels())
    defense.train(noted)
    defense(pixels())
    assert not any(part.training for part in defense.modules())
    assert torch.equal(classifier[1].running_mean, torch.zeros(192, dtype=torch.float64))


# Several draws


def test_draws_are_averaged_by_default():
    defense, images = De3(build(), linear(), 70, draws=2), pixels()
    seeds = draw_seeds(0, Domain.SCORE, torch.arange(BATCH), 6)
    single = De3(build(), linear(), 70).draw_logits(images, seeds)
    torch.testing.assert_close(defense.draw_logits(images, seeds), single.view(3, 2, BATCH, -1).mean(dim=1), **CLOSE)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_vote_is_the_majority_with_ties_broken_by_the_mean_probability(data):
    draws, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 5))
    logit = st.integers(-3000, 3000) | st.integers(-2, 2)  # far apart: probabilities that underflow
    rows = torch.tensor(
        data.draw(
            st.lists(st.lists(logit, min_size=classes, max_size=classes, unique=True), min_size=draws, max_size=draws)
        ),
        dtype=torch.float64,
    ).requires_grad_()
    defense = De3(None, Table(rows), 70, draws=draws, aggregate="vote")
    image = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    result = defense(image)
    assert result.isfinite().all()

    votes = torch.bincount(rows.argmax(dim=1), minlength=classes)
    log_mean = (rows.softmax(dim=1).mean(dim=0)).detach().log()
    order = sorted(range(classes), key=lambda k: (int(votes[k]), float(log_mean[k])))
    winner, second = order[-1], order[-2]
    if votes[winner] > votes[second] or log_mean[winner] - log_mean[second] > 1e-9:
        assert result.argmax() == winner
    # The logs of the shares of votes, off by the tie break alone, which is less than half a vote.
    assert ((result.exp()[0] - votes / draws).abs() <= 0.25 / draws + 1e-12).all()

    upward = torch.arange(1.0, classes + 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(result[0] @ upward, rows)
    surrogate = rows.log_softmax(dim=1).logsumexp(dim=0)
    (expected,) = torch.autograd.grad(surrogate @ upward, rows)
    torch.testing.assert_close(gradient, expected, **CLOSE)
    seeds = torch.zeros(draws, 1, dtype=torch.int64)
    climbed = defense.draw_logits(image, seeds, surrogate=True)[0, 0]
    torch.testing.assert_close(climbed, surrogate - torch.tensor(float(draws)).double().log(), rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["logits", "vote"])
@pytest.mark.parametrize(
    ("target", "statistics"), [("raw", "input"), ("norm", "input"), ("norm", "noisy")], ids=["raw", "input", "noisy"]
)
def test_gradients_through_the_whole_defense(target, statistics, aggregate):
    options = {"statistics": statistics, "draws": 2, "aggregate": aggregate}
    defense = De3(build(target), linear(), 70, **options).frozen(1)
    images = (pixels(1) * 0.8 + 0.1).requires_grad_()
    seeds = defense.seeds(0, Domain.ATTACK, torch.arange(1), 1)
    assert torch.autograd.gradcheck(lambda x: defense.draw_logits(x, seeds, surrogate=True), images)
    if aggregate == "logits":
        assert torch.autograd.gradcheck(defense, images)
    (gradient,) = torch.autograd.grad(defense(images).sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().amax() > 0


@pytest.mark.slow
@pytest.mark.parametrize("degrade", ["mask", "both"])
def test_gradients_through_masks(degrade):
    defense = De3(build(), linear(), level(degrade), degrade=degrade, mask_ratio=0.5).frozen(1)
    assert torch.autograd.gradcheck(defense, (pixels(1) * 0.8 + 0.1).requires_grad_())


# Sweeps

BUILT = {target: build(target) for target in ("raw", "norm")}


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    levels=st.lists(st.sampled_from([0.0, 12.5, 70.0, 140.0]), min_size=1, max_size=4),
    draws=st.integers(1, 3),
    own=st.integers(1, 2),
    max_batch=st.integers(1, 40),
    aggregate=st.sampled_from(["logits", "vote"]),
    case=st.sampled_from([("noise", "raw", "input"), ("noise", "norm", "noisy"), ("both", "norm", "input"), ("none",)]),
)
def test_a_sweep_is_the_loop_over_levels_and_never_larger_than_it_may(
    batch, levels, draws, own, max_batch, aggregate, case
):
    classifier = Recorder(linear())
    denoiser = None if case == ("none",) else BUILT[case[1]]
    options = {} if denoiser is None else {"degrade": case[0], "statistics": case[2]}
    defense = De3(denoiser, classifier, 35, draws=own, aggregate=aggregate, **options)
    images = pixels(batch)
    seeds = draw_seeds(0, Domain.SCORE, torch.arange(batch), draws * own)
    result = defense.sweep(images, levels, draws, seeds=seeds, max_batch=max_batch)
    assert max(classifier.sizes) <= max_batch
    assert sum(classifier.sizes) == len(levels) * draws * own * batch
    assert result.shape == (len(levels), draws, batch, CLASSES)
    assert not result.requires_grad
    for sigma, logits in zip(levels, result, strict=True):
        defense.sigma = sigma
        torch.testing.assert_close(logits, defense.draw_logits(images, seeds), **CLOSE)


def test_a_sweep_over_masks_repeats_the_level_that_masks_have():
    defense = De3(build(), linear(), 0, degrade="mask", mask_ratio=0.5)
    for max_batch in (1, 5, 256):
        result = defense.sweep(pixels(), [0, 0], 2, seeds=SEEDS, max_batch=max_batch)
        expected = defense.draw_logits(pixels(), SEEDS).expand(2, -1, -1, -1)
        torch.testing.assert_close(result, expected, **CLOSE)


def test_a_sweep_without_seeds_takes_fresh_draws_of_the_stream():
    swept, called = De3(build(), linear(), 70, seed=3), De3(build(), linear(), 70, seed=3)
    result = swept.sweep(pixels(), [70], 2)
    torch.testing.assert_close(result[0], torch.stack([called(pixels()), called(pixels())]), **CLOSE)
    assert not torch.allclose(swept.sweep(pixels(), [70], 2), result)


def test_a_sweep_of_a_frozen_defense_is_frozen():
    frozen = De3(build(), linear(), 70).frozen(3)
    result = frozen.sweep(pixels(), [70], 2)
    torch.testing.assert_close(result[0], frozen(pixels()).expand(2, -1, -1), **CLOSE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"draws": 3, "aggregate": "vote"},
        {"sigma": 0, "degrade": "mask"},
        {"degrade": "both"},
        {"denoiser": None},
        {"sigma": None},
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_empty_batch_gives_empty_logits(options, frozen):
    with torch.random.fork_rng(devices=[]):
        config = AutoencoderConfig((8, 8), 4, 16, 1, 2, 16, 1, 2, mean=(0.5,), std=(0.25,))
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        defense = De3(**{"denoiser": Autoencoder(config), "classifier": network, "sigma": 70, **options}).eval()
    if frozen:
        defense = defense.frozen(1)
    pixels, none = torch.rand(0, 1, 8, 8).requires_grad_(), torch.zeros(0, dtype=torch.int64)
    logits = defense(pixels)
    assert logits.shape == (0, 5)
    logits.sum().backward()
    assert pixels.grad.shape == pixels.shape
    assert defense.denoise(pixels).shape == pixels.shape
    for attack in (Attack("fgsm", 0.1, eot=2), Attack("pgd", 0.1, steps=2, restarts=2, gray=True)):
        assert [len(part) for part in attack.run(defense, pixels.detach(), none, none, 0)] == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------- saved and loaded


def pair(target: str = "raw", case: str = "noise, raw target") -> tuple[Autoencoder, Classifier]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        classifier = Classifier(ClassifierConfig.for_encoder(CONFIG, CLASSES, trained_on=case))
        return Autoencoder(replace(CONFIG, target=target)).eval(), classifier.eval()


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("new", [True, False])
def test_a_saved_defense_answers_the_same(tmp_path, new, global_rng_untouched):
    folder = tmp_path / "defense"
    if not new:
        folder.mkdir()
    denoiser, classifier = pair("norm", "both, noisy statistics")
    options = {"draws": 2, "aggregate": "vote", "degrade": "both", "mask_ratio": 0.5, "statistics": "noisy"}
    defense = De3(denoiser, classifier, 70, **options, seed=4)
    defense.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = De3.from_pretrained(str(folder))
    seeds, images = torch.arange(2 * BATCH).view(2, BATCH), pixels().float()
    assert torch.equal(loaded.draw_logits(images, seeds), defense.draw_logits(images, seeds))
    assert {name: getattr(loaded, name) for name in options} == options
    assert (loaded.sigma, loaded.seed, loaded.training) == (70.0, None, False)
    # One name serves all three.
    assert torch.equal(Autoencoder.from_pretrained(folder).cls_token, denoiser.cls_token)
    assert torch.equal(Classifier.from_pretrained(folder).head.weight, classifier.head.weight)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"README.md", "de3.json"} | {
        f"{part}/{file}"
        for part in ("denoiser", "classifier")
        for file in ("README.md", "config.json", "model.safetensors")
    }
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert 'De3.from_pretrained("owner/name", sigma=70.0)' in card.text
    assert (card.data.license, card.data.library_name) == (None, "denim")


def test_the_defense_that_ships_is_whole(recwarn):
    defense = De3.from_pretrained("cifar10-tiny", seed=0)
    assert (defense.sigma, defense.case, defense.training) == (70.0, "noise, raw target", False)
    assert defense.classifier.config.classes[:2] == ("airplane", "automobile")
    # The classifier was fine-tuned on images of this kind, and this level is what its name means.
    assert not recwarn.list
    logits = defense(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, 10)
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


def test_settings_may_be_others_than_those_that_were_saved(tmp_path):
    De3(*pair(), 70).save_pretrained(tmp_path / "defense")
    loaded = De3.from_pretrained(tmp_path / "defense", sigma=35, draws=3, seed=5)
    assert (loaded.sigma, loaded.draws, loaded.seed, loaded.aggregate) == (35.0, 3, 5, "logits")
    assert De3.from_pretrained(tmp_path / "defense", sigma=None).sigma is None
    with pytest.raises(CheckpointError, match=r"no defense can be made of .*draws must be at least 1, got 0"):
        De3.from_pretrained(tmp_path / "defense", draws=0)
    with pytest.raises(TypeError, match="levels"):
        De3.from_pretrained(tmp_path / "defense", levels=3)


def test_a_defense_without_a_denoiser_has_none_when_it_is_loaded(tmp_path):
    De3(None, pair(case="noisy")[1], None).save_pretrained(tmp_path / "defense", license="mit")
    for card in (tmp_path / "defense", tmp_path / "defense" / "classifier"):
        assert huggingface_hub.ModelCard.load(card / "README.md").data.license == "mit"
    loaded = De3.from_pretrained(tmp_path / "defense")
    assert (loaded.denoiser, loaded.sigma) == (None, None)
    with pytest.raises(CheckpointError, match="it is a defense, and has no such model"):
        Autoencoder.from_pretrained(tmp_path / "defense")


def test_a_defense_has_a_name_like_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "FOLDER", tmp_path)
    De3(*pair(), 70).save_pretrained(tmp_path / "tiny")
    assert De3.from_pretrained("tiny", sigma=140).sigma == 140
    assert Classifier.from_pretrained("tiny").config.num_classes == CLASSES
    asked = []

    def download(*names, allow_patterns, **_):
        asked.append((names, sorted(allow_patterns)))
        return str(tmp_path / "tiny")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert De3.from_pretrained("owner/tiny").sigma == 70
    parts, files = ("classifier", "denoiser"), ("README.md", "config.json", "model.safetensors")
    wanted = sorted(["de3.json", *(f"{part}/{file}" for part in parts for file in files)])
    assert asked == [(("owner/tiny",), wanted)]
    with pytest.raises(CheckpointError, match=r"no folder large, .*; with Denim ship tiny$"):
        De3.from_pretrained("large")


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path):
    denoiser, classifier = pair()
    with pytest.raises(TypeError, match="a Sequential cannot be written: only a Classifier of Denim can"):
        De3(build(), linear(), 70).save_pretrained(tmp_path / "defense")
    with pytest.raises(ValueError, match="noise of a frozen defense is not written"):
        De3(denoiser, classifier, 70).frozen().save_pretrained(tmp_path / "defense")
    broken = copy.deepcopy(classifier)
    broken.head.bias.data[1] = math.nan
    with pytest.raises(FloatingPointError, match=r"head\.bias"):
        De3(denoiser, broken, 70).save_pretrained(tmp_path / "defense")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thesis.txt").write_text("precious")
    for taken in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="holds something already; choose a new folder"):
            De3(denoiser, classifier, 70).save_pretrained(taken)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "de3.json").unlink(), r"holds no de3\.json, so it is no defense"),
        (lambda folder: (folder / "de3.json").write_text("{"), r"de3\.json is not valid JSON"),
        (lambda folder: edit(folder / "de3.json", model="Classifier"), "describes a Classifier, expected De3"),
        (lambda folder: edit(folder / "de3.json", level=3), r"missing or unknown: \['level'\]"),
        (lambda folder: edit(folder / "de3.json", sigma="70"), "sigma must be of type float . None, got '70'"),
        (lambda folder: edit(folder / "de3.json", sigma=True), "sigma must be of type float . None, got True"),
        (lambda folder: edit(folder / "de3.json", sigma=-1), r"no defense can be made of .*0 or more"),
        (lambda folder: edit(folder / "de3.json", draws=2.0), "draws must be of type int"),
        (lambda folder: edit(folder / "de3.json", aggregate="mean"), '"logits" or "vote"'),
        (
            lambda folder: edit(folder / "de3.json", case="noisy"),
            r"for images of the kind 'noisy', and .* makes 'noise, raw",
        ),
        (lambda folder: edit(folder / "denoiser/config.json", target="norm"), "makes 'noise, input statistics'"),
        (
            lambda folder: shutil.rmtree(folder / "denoiser"),
            "makes 'noisy': files of two defenses, or some are missing",
        ),
        (lambda folder: (folder / "classifier/model.safetensors").write_bytes(b"x"), "truncated or not a safetensors"),
    ],
)
def test_a_damaged_defense_is_refused(tmp_path, damage, message):
    De3(*pair(), 70).save_pretrained(tmp_path / "defense")
    damage(tmp_path / "defense")
    with pytest.raises(CheckpointError, match=message):
        De3.from_pretrained(tmp_path / "defense")
