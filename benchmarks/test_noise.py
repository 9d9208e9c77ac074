"""Noise and noisy patches against plain torch, in one process and on one thread count. Correct first, then timed.

Run: `make bench`. `extra_info` of each record holds nanoseconds per element and the ratio to the plain version.
"""

from __future__ import annotations

import pytest
import torch

from denim.kernels import Domain, derive_seeds, noise_patchify, normal_noise
from denim.kernels.noise import noise_backend, noise_words, normals_from_words

BATCH, SIDE, CHANNELS, PATCH = 16, 224, 3, 16
ELEMENTS = BATCH * SIDE * SIDE * CHANNELS
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_noise_patchify(benchmark, best_seconds, seeds, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, SIDE, SIDE, CHANNELS), generator=generator, dtype=torch.uint8)
    sigma = torch.linspace(0, 150, BATCH)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)

    def chain(noise: torch.Tensor) -> torch.Tensor:
        noisy = (images / 255 + sigma[:, None, None, None] / 255 * noise - mean) / std
        tiles = noisy.unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH)).transpose(2, 3)
        return tiles.flatten(3).flatten(1, 2).to(dtype)

    def fused() -> torch.Tensor:
        return noise_patchify(images, sigma, seeds, patch_size=PATCH, mean=MEAN, std=STD, dtype=dtype)

    expected = chain(normal_noise(seeds, (SIDE, SIDE, CHANNELS)))
    # Values up to 20 after some five roundings of float32, and one of the dtype.
    torch.testing.assert_close(fused(), expected, rtol=torch.finfo(dtype).eps, atol=20 * 5 * 2**-24)
    record(
        benchmark,
        best_seconds,
        fused,
        lambda: chain(torch.randn((BATCH, SIDE, SIDE, CHANNELS), generator=generator)),
        "torch_chain",
    )
