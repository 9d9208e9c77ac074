"""Levels and draws in one batched pass against a loop over them, which gives the same logits and gradients."""

import pytest
import torch

from denim.benchmarks.defense import Workload, _open, _Variant, compare
from denim.defense import De3
from denim.kernels import Domain
from denim.nim import Autoencoder, Classifier, ClassifierConfig, preset

SIGMAS, DRAWS, BATCH = (0.0, 35.0, 70.0, 140.0), 4, 16


@pytest.mark.benchmark(group="sweep")
def test_sweep(benchmark, best_seconds):
    config = preset("micro", target="raw")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(config).eval()
        classifier = Classifier(ClassifierConfig.for_encoder(config, 10, trained_on="noise, raw target")).eval()
        pixels = torch.rand(BATCH, 1, 16, 16)
    defense = De3(model, classifier, 70.0, seed=0)
    seeds = defense.seeds(0, Domain.SCORE, torch.arange(BATCH), DRAWS)

    def batched():
        return defense.sweep(pixels, SIGMAS, DRAWS, seeds=seeds)

    @torch.no_grad()
    def looped():
        rows = []
        for sigma in SIGMAS:
            defense.sigma = sigma
            rows.append(torch.cat([defense.draw_logits(pixels, row[None]) for row in seeds]))
        return torch.stack(rows)

    # The order of sums in a matrix product depends on the batch.
    torch.testing.assert_close(batched(), looped(), rtol=1e-4, atol=1e-5)
    benchmark.pedantic(batched, rounds=10, warmup_rounds=1)
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.min
        benchmark.extra_info |= {
            "loop_over_batched": best_seconds(looped) / seconds,
            "images_per_second": BATCH * len(SIGMAS) * DRAWS / seconds,
        }


@pytest.mark.parametrize("task", ["defend", "attack"])
def test_levels_beside_one_another(benchmark, task):
    """A ViT-Ti on 32 x 32 in patches of 4, at five levels; ratios to levels one after the other, in both precisions."""
    benchmark.group = f"{task} at five levels"
    config = preset("tiny", img_size=32, patch_size=4, target="raw")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(config)
        classifier = Classifier(ClassifierConfig.for_encoder(config, 10, trained_on="noise, raw target"))
        pixels = torch.rand(2, 3, 32, 32)
    defense = De3(model, classifier, 70.0).eval().requires_grad_(False)
    work = Workload(
        defense, pixels, torch.arange(2), (0.0, 35.0, 70.0, 105.0, 140.0), draws=1 if benchmark.disabled else 4
    )
    variant = _Variant(task, "batched", "fp32", False)
    benchmark.pedantic(_open(work, variant, "inductor")[0], rounds=1 if benchmark.disabled else 5, warmup_rounds=1)
    if benchmark.disabled:
        return
    records = {(each.way, each.precision): each for each in compare(work, tasks=[task], rounds=5)}
    batched, slow = records["batched", "fp32"], records["looped", "fp32"]
    benchmark.extra_info |= {
        "per_second": batched.rate,
        "speed_over_looped": batched.rate / slow.rate,
        "peak_over_looped": batched.peak_bytes / slow.peak_bytes,
        "bf16_over_fp32": records["batched", "bf16"].rate / batched.rate,
    }
