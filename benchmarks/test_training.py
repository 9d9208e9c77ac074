"""A pretraining step on the CPU, and the share of it that goes into noise."""

import pytest
import torch

from denim.kernels import Domain, derive_seeds, normal_noise
from denim.nim import Autoencoder, Objective, preset

BATCH = 128


@pytest.mark.parametrize("img_size", [16, 32])
def test_training_step(benchmark, best_seconds, img_size):
    benchmark.group = f"pretraining step, {img_size} x {img_size}"
    config = preset("micro", img_size=img_size, channels=3, target="raw")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(config)
        images = torch.randint(0, 256, (BATCH, img_size, img_size, 3), dtype=torch.uint8)
    objective = Objective.published("nim", "uniform:0,150")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.arange(BATCH)

    def step():
        seeds = derive_seeds(0, Domain.TRAINING, ids)
        optimizer.zero_grad(set_to_none=True)
        objective.loss(model, images, objective.sigma.sample(seeds), seeds).backward()
        optimizer.step()

    def noise():
        normal_noise(derive_seeds(0, Domain.TRAINING, ids), (img_size, img_size, 3))

    step()
    benchmark.pedantic(step, rounds=10)
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.min
        benchmark.extra_info |= {"images_per_second": BATCH / seconds, "share_of_noise": best_seconds(noise) / seconds}
