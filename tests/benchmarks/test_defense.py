"""Levels in one batch and one after the other have the same logits and gradients, and what is measured is right."""

import statistics

import pytest
import torch
from torch import nn

from denim.benchmarks import defense as bench
from denim.benchmarks.defense import STEPS, TOLERANCE, Workload, compare, flops
from denim.benchmarks.timing import WrongResultError
from denim.defense import De3
from denim.nim import Autoencoder, AutoencoderConfig, Classifier, ClassifierConfig

CONFIG = AutoencoderConfig((8, 8), 4, 16, 1, 2, 16, 1, 2, mean=(0.5,), std=(0.25,), target="raw")


def models(denoiser=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rebuild = Autoencoder(CONFIG).eval().requires_grad_(False)
        classifier = Classifier(ClassifierConfig.for_encoder(CONFIG, 3, trained_on="noise, raw target"))
        classifier.head.weight.data.normal_()
        linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    return (rebuild, classifier.eval().requires_grad_(False)) if denoiser else (None, linear.requires_grad_(False))


def workload(denoiser=True, *, images=3, sigmas=(0.0, 35.0, 70.0), draws=2, max_batch=256, **options):
    pixels = torch.rand(images, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    made = De3(*models(denoiser), 20.0, **options).eval()
    return Workload(made, pixels, torch.arange(images) % 3, sigmas, draws, max_batch)


def counted(monkeypatch):
    """The passes through the networks, as they are made."""
    passes, real = [], De3._defended

    def defended(self, pixels, sigma, seeds):
        passes.append(seeds.shape[0] * sigma.numel())
        return real(self, pixels, sigma, seeds)

    monkeypatch.setattr(De3, "_defended", defended)
    return passes


@pytest.mark.parametrize("options", [{}, {"draws": 3}, {"max_batch": 4}, {"max_batch": 5, "images": 4}])
@pytest.mark.parametrize("task", bench.TASKS)
@pytest.mark.parametrize("way", bench.WAYS)
def test_passes_and_images_are_those_of_a_call(monkeypatch, way, task, options):
    work = workload(**options)
    passes = counted(monkeypatch)
    run, _ = bench._open(work, bench._Variant(task, way, "fp32", False), "eager")
    run()
    assert len(passes) == work.passes(task, way)
    assert max(passes) <= work.max_batch
    assert sum(passes) == work.count(task) * (1 if task == "defend" else work.draws)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("denoiser", [True, False])
def test_ways_agree_and_the_gradients_are_those_of_the_pixels(denoiser, precision):
    work = workload(denoiser, max_batch=7, images=4)
    found = {}
    for task in bench.TASKS:
        for way in bench.WAYS:
            found[task, way] = bench._open(work, bench._Variant(task, way, precision, False), "eager")[1]()
        error = bench._difference(found[task, "batched"], found[task, "looped"])
        assert error <= TOLERANCE[precision]
    assert found["defend", "batched"].shape == (3, 2, 4, 3)
    assert found["attack", "batched"].shape == (12, 1, 8, 8)
    # Another level has other gradients, so that levels in the wrong order would show.
    each = found["attack", "batched"].unflatten(0, (3, 4))
    assert bench._difference(each[0], each[2]) > (1e-6 if not denoiser else 10 * TOLERANCE["fp32"])


@pytest.mark.slow
def test_records_hold_what_was_measured(monkeypatch):
    monkeypatch.setattr(bench, "peak_flops", lambda device, precision: 1e9 if precision == "fp32" else None)
    said, work = [], workload()
    records = compare(work, rounds=3, report=said.append)
    assert [(each.task, each.way, each.precision) for each in records] == [
        (task, way, precision) for task in bench.TASKS for precision in ("fp32", "bf16") for way in bench.WAYS
    ]
    for each in records:
        seconds = statistics.median(each.seconds)
        assert len(each.seconds) == 3
        assert each.rate == 3 * 3 * (2 if each.task == "defend" else STEPS) / seconds
        assert each.flops == flops(work, each.task) * 3 * 3 * (2 if each.task == "defend" else STEPS * 2)
        assert each.peak_bytes > 0
        assert (each.utilisation is None) == (each.precision == "bf16")
        if each.utilisation is not None:
            assert each.utilisation == pytest.approx(each.flops / seconds / 1e9)
        else:
            assert 1e-4 < each.error < TOLERANCE["bf16"]
    assert said[0] == "defend, looped, fp32: checking"
    assert work.defense.sigma == 20.0
    few = compare(workload(), tasks=["attack"], precisions=["fp32"], rounds=1, memory=False)
    assert [(each.way, each.peak_bytes) for each in few] == [("batched", None), ("looped", None)]


def test_operations_and_bytes_equal_those_by_hand():
    work = workload(denoiser=False)
    assert flops(work, "defend") == 2 * 64 * 3
    assert flops(work, "attack") == 2 * flops(work, "defend")
    weights, images = 4 * (64 * 3 + 3), 4 * 3 * 64 * 3
    assert bench._least_bytes(work, "defend", "batched", 3) == weights + images + 4 * 18 * 3
    assert bench._least_bytes(work, "defend", "looped", 3) == 3 * weights + images + 4 * 18 * 3
    assert bench._least_bytes(work, "attack", "looped", 3) == 2 * 3 * STEPS * weights + 3 * STEPS * images
    # Aggregated draws are operations of one answer.
    assert flops(workload(draws=1, aggregate="vote"), "defend") == flops(workload(), "defend")
    several = workload(denoiser=False)
    several.defense.draws = 4
    assert flops(several, "defend") == 4 * 2 * 64 * 3


@pytest.mark.parametrize("task", bench.TASKS)
def test_levels_that_get_other_results_in_a_batch_are_not_timed(monkeypatch, task):
    real = De3._defended

    def wrong(self, pixels, sigma, seeds):
        return real(self, pixels, sigma.flip(0) if len(sigma.unique()) > 1 else sigma, seeds)

    monkeypatch.setattr(De3, "_defended", wrong)
    what = {"defend": "logits", "attack": "gradients"}[task]
    with pytest.raises(WrongResultError, match=rf"{task}, batched, fp32: its {what} differ .* no time is given"):
        compare(workload(), tasks=[task], precisions=["fp32"], rounds=1)


@pytest.mark.slow
def test_compiled_levels_agree_and_a_classifier_that_cannot_be_one_graph_is_named():
    records = compare(workload(), precisions=["fp32"], compile=True, backend="eager", rounds=1, memory=False)
    assert [(each.task, each.compiled) for each in records if each.way == "batched"] == [
        *(("defend", False), ("defend", True), ("attack", False), ("attack", True)),
    ]
    assert all(each.error <= TOLERANCE["fp32"] for each in records)

    class Broken(nn.Module):
        def forward(self, pixels):
            print(float(pixels.sum()))  # noqa: T201
            return pixels.flatten(1)

    work = workload(denoiser=False)
    work.defense.classifier = Broken()
    with pytest.raises(ValueError, match=r"no single graph of torch.compile \(.*\): leave out --compile"):
        compare(work, precisions=["fp32"], compile=True, backend="eager", rounds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["train"]}, "unknown task 'train'; choose among defend, attack"),
        ({"tasks": []}, "at least one task and one precision"),
        ({"precisions": ["fp8"]}, "precision must be"),
        ({"precisions": ["tf32"]}, "tf32 needs an NVIDIA GPU"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"clock": "sun"}, "clock must be wall or processor"),
    ],
)
def test_mistakes_are_refused_before_any_work(options, message):
    said = []
    with pytest.raises(ValueError, match=message):
        compare(workload(), report=said.append, **options)
    assert said == []


@pytest.mark.parametrize("options", [{"images": 0}, {"sigmas": ()}, {"draws": 0}, {"max_batch": 0}])
def test_a_workload_of_nothing_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1, got"):
        workload(**options)


def test_masks_have_no_levels():
    made = De3(*models(), 0.0, degrade="mask")
    with pytest.raises(ValueError, match="no noise levels to batch"):
        Workload(made, torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), (0.0,))
