import itertools
import math

import pytest
import torch

from denim.nim import Autoencoder, AutoencoderConfig, add_noise, reconstruct
from denim.nim.tiles import _starts, denoise_tiles


def model(target="raw", size=(8, 12)):
    torch.manual_seed(0)
    config = AutoencoderConfig(size, 4, 16, 1, 2, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3), target=target)
    return Autoencoder(config).eval()


@pytest.mark.parametrize("length", range(8, 40))
def test_tiles_cover_an_image_and_overlap_by_half(length):
    starts = _starts(length, 8)
    assert starts[0] == 0
    assert starts[-1] == length - 8
    assert all(0 < b - a <= 4 for a, b in itertools.pairwise(starts))


def test_one_tile_is_what_the_denoiser_makes_of_it():
    denoiser, pixels = model(), torch.rand(1, 2, 8, 12)
    sigma, seeds = torch.tensor([40.0]), torch.tensor([3])
    noisy = add_noise(pixels, sigma, seeds)
    with torch.no_grad():
        expected = reconstruct(denoiser, pixels, sigma, seeds)[0]
    # Noise that is added before or after pixels are cut into patches and normalised differs in its last bits.
    torch.testing.assert_close(denoise_tiles(denoiser, noisy[0]), expected, rtol=0, atol=1e-5)


def test_a_pixel_is_the_weighted_mean_of_the_tiles_that_hold_it():
    denoiser = model(size=(8, 8))
    noisy = torch.rand(2, 8, 12)
    none = torch.zeros(2)
    with torch.no_grad():
        tiles = reconstruct(denoiser, torch.stack([noisy[:, :, :8], noisy[:, :, 4:]]), none, none.long()).double()
    found = denoise_tiles(denoiser, noisy)
    torch.testing.assert_close(found[:, :, :4].double(), tiles[0, :, :, :4], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, :, 8:].double(), tiles[1, :, :, 4:], rtol=0, atol=1e-5)
    for x in range(4, 8):
        one, other = (math.sin(math.pi * (place + 0.5) / 8) ** 2 for place in (x, x - 4))
        mean = (one * tiles[0, :, :, x] + other * tiles[1, :, :, x - 4]) / (one + other)
        torch.testing.assert_close(found[:, :, x].double(), mean, rtol=0, atol=1e-5)


def test_many_tiles_are_finite_and_in_range(monkeypatch):
    monkeypatch.setattr("denim.nim.tiles.BATCH", 3)
    found = denoise_tiles(model(), torch.randn(2, 29, 41))
    assert found.shape == (2, 29, 41)
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("target", "shape", "words"),
    [
        ("norm", (2, 8, 12), "raw target"),
        ("raw", (2, 7, 12), "at least 8 x 12"),
        ("raw", (3, 8, 12), "2 channels"),
        ("raw", (1, 2, 8, 12), r"\(1, 2, 8, 12\)"),
    ],
)
def test_bad_input(target, shape, words):
    with pytest.raises(ValueError, match=words):
        denoise_tiles(model(target), torch.rand(shape))
