"""Noise against plain torch, in one process and on one thread count. Correct first, then timed.

Run: `make bench`. `extra_info` of each record holds nanoseconds per element and the ratio to the plain version.
"""

from __future__ import annotations

import pytest
import torch

from denim.kernels import Domain, derive_seeds, normal_noise
from denim.kernels.noise import noise_backend, noise_words, normals_from_words

BATCH, SIDE, CHANNELS = 16, 224, 3
ELEMENTS = BATCH * SIDE * SIDE * CHANNELS
ROUNDS = 10


def record(benchmark, best_seconds, function, plain, name: str) -> None:
    seconds = best_seconds(plain)
    benchmark.pedantic(function, rounds=ROUNDS, warmup_rounds=1)
    best = benchmark.stats.stats.min if benchmark.stats else best_seconds(function)  # --benchmark-disable
    benchmark.extra_info |= {
        "backend": noise_backend(),
        "threads": torch.get_num_threads(),
        "ns_per_element": best / ELEMENTS * 1e9,
        f"{name}_ns_per_element": seconds / ELEMENTS * 1e9,
        f"ratio_to_{name}": best / seconds,
    }
    print({key: round(value, 2) if isinstance(value, float) else value for key, value in benchmark.extra_info.items()})


@pytest.fixture
def seeds() -> torch.Tensor:
    return derive_seeds(0, Domain.TRAINING, torch.arange(BATCH))


@pytest.mark.benchmark(group="normal_noise")
def test_normal_noise(benchmark, best_seconds, seeds):
    shape = (SIDE, SIDE, CHANNELS)
    words = noise_words(seeds[:2], SIDE * SIDE * CHANNELS).unflatten(-1, (-1, 2))
    expected = torch.stack(normals_from_words(words[..., 0], words[..., 1]), dim=-1).reshape(2, *shape)
    torch.testing.assert_close(normal_noise(seeds, shape)[:2], expected, rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    record(
        benchmark,
        best_seconds,
        lambda: normal_noise(seeds, shape),
        lambda: torch.randn((BATCH, *shape), generator=generator),
        "randn",
    )
