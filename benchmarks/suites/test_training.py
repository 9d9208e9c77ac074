"""A pretraining step on the CPU: its time, the share of it that goes into noise, and what lean blocks cost and save."""

import copy
import statistics

import pytest
import torch

from denim.benchmarks.timing import measure, peak_memory
from denim.kernels import Domain, derive_seeds, normal_noise
from denim.nim import Autoencoder, Objective, preset
from denim.nim.block import set_lean

BATCH = 128
CPU = torch.device("cpu")


def build(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Autoencoder(config)


def training_step(model, batch):
    """A function that runs a step on random images of the model's size."""
    height, width = model.config.img_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)
    objective, ids = Objective.published("nim", "uniform:0,150"), torch.arange(batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step():
        seeds = derive_seeds(0, Domain.TRAINING, ids)
        optimizer.zero_grad(set_to_none=True)
        objective.loss(model, images, objective.sigma.sample(seeds), seeds).backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("img_size", [16, 32])
def test_training_step(benchmark, best_seconds, img_size):
    benchmark.group = f"pretraining step, {img_size} x {img_size}"
    step = training_step(build(preset("micro", img_size=img_size, channels=3, target="raw")), BATCH)

    def noise():
        normal_noise(derive_seeds(0, Domain.TRAINING, torch.arange(BATCH)), (img_size, img_size, 3))

    step()
    benchmark.pedantic(step, rounds=10)
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.min
        benchmark.extra_info |= {"images_per_second": BATCH / seconds, "share_of_noise": best_seconds(noise) / seconds}


def test_lean_training_step(benchmark):
    """A ViT-Ti on 32 x 32 in patches of 4; ratios to the step that keeps what lean blocks compute again."""
    benchmark.group = "pretraining step, lean blocks"
    lean = build(preset("tiny", img_size=32, patch_size=4, depth=2 if benchmark.disabled else 12))
    plain = copy.deepcopy(lean)
    set_lean(plain, False)
    step, other = training_step(lean, BATCH // 2), training_step(plain, BATCH // 2)
    if benchmark.disabled:
        benchmark(step)
        return
    step()
    other()
    benchmark.pedantic(step, rounds=3)
    times = measure({"lean": step, "plain": other}, CPU, least=5)
    peaks = {name: peak_memory(function, CPU) for name, function in (("lean", step), ("plain", other))}
    seconds = {name: statistics.median(taken.seconds) for name, taken in times.items()}
    benchmark.extra_info |= {"peak_bytes": peaks["lean"], "plain_peak_bytes": peaks["plain"]}
    for name, values in (("time_ratio", seconds), ("peak_ratio", peaks)):
        benchmark.extra_info[name] = values["lean"] / values["plain"]
