"""A sweep over levels and draws: one batched pass against a loop over both, which gives the same logits."""

import pytest
import torch

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
