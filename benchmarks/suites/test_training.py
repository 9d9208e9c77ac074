"""A pretraining step on the CPU beside those that it is compared with, and the share of it that goes into noise."""

import functools
from contextlib import closing
from pathlib import Path

import pytest
import torch

from denim.benchmarks.training import Workload, compare, open_step
from denim.kernels import Domain, derive_seeds, normal_noise
from denim.nim import PretrainConfig

BATCH = 128
CPU = torch.device("cpu")
settings = functools.partial(PretrainConfig, out=Path("bench"), device="cpu")


@pytest.mark.parametrize("img_size", [16, 32])
def test_training_step(benchmark, best_seconds, img_size):
    benchmark.group = f"pretraining step, {img_size} x {img_size}"
    work = Workload(settings(preset="micro", img_size=img_size, channels=3, target="raw", batch_size=BATCH), CPU)

    def noise():
        normal_noise(derive_seeds(0, Domain.TRAINING, torch.arange(BATCH)), (img_size, img_size, 3))

    with closing(open_step("denim", work)) as step:
        step.run()
        benchmark.pedantic(step.run, rounds=10)
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.min
        benchmark.extra_info |= {"images_per_second": BATCH / seconds, "share_of_noise": best_seconds(noise) / seconds}


def test_step_beside_others(benchmark):
    """A ViT-Ti on 32 x 32 in patches of 4; ratios to the published and the eager step, and to the floor."""
    benchmark.group = "pretraining step, beside others"
    config = settings(preset="tiny", img_size=32, patch_size=4, batch_size=2 if benchmark.disabled else 64)
    with closing(open_step("denim", Workload(config, CPU))) as step:
        benchmark.pedantic(step.run, rounds=1 if benchmark.disabled else 3, warmup_rounds=1)
    if benchmark.disabled:
        return
    denim, *others = compare(config, CPU, ["published", "eager", "floor"], rounds=5)
    for other in others:
        benchmark.extra_info[f"speed_over_{other.name}"] = denim.images_per_second / other.images_per_second
        benchmark.extra_info[f"peak_over_{other.name}"] = denim.peak_bytes / other.peak_bytes
