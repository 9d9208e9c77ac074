from __future__ import annotations

import numpy as np
import pytest
import torch

from denim.kernels import check_pixels, normalized_patches, patches
from denim.kernels.patches import clean_patches, patch_moments, patchify, sample_chunks, unpatchify

GEOMETRY = {"patch_size": 2, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


def random_images(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("height", "width", "channels", "patch"),
    [(4, 6, 1, 2), (8, 12, 3, 4), (21, 14, 5, 7), (28, 42, 1, 14), (32, 48, 3, 16), (5, 3, 3, 1)],
)
def test_patch_vectors_run_by_row_column_channel(height, width, channels, patch):
    images = torch.arange(2 * height * width * channels).reshape(2, height, width, channels)
    patches = patchify(images, patch)
    columns = width // patch
    for index in range(patches.shape[1]):
        top, left = index // columns * patch, index % columns * patch
        expected = images[:, top : top + patch, left : left + patch, :].reshape(2, -1)
        assert torch.equal(patches[:, index], expected)
    assert torch.equal(unpatchify(patches, (height, width), patch), images)
    lead = torch.stack([patches, patches + 1])[None]
    assert torch.equal(unpatchify(lead, (height, width), patch)[0, 1], images + 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normalized_patches(dtype):
    shape = (2, 4, 6, 3) if dtype == torch.uint8 else (2, 3, 4, 6)
    images = random_images(shape, dtype)
    nhwc = images.numpy() / 255.0 if dtype == torch.uint8 else images.double().permute(0, 2, 3, 1).numpy()
    normal = (nhwc - np.array(GEOMETRY["mean"])) / np.array(GEOMETRY["std"])
    patches = normalized_patches(images, **GEOMETRY)
    assert patches.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Three float32 roundings of numbers below 3; bfloat16 and float16 images are exact once they are upcast.
    tolerance = 1e-15 if dtype == torch.float64 else 1e-6
    expected = torch.from_numpy(np.stack([normal[:, r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2, 4)], axis=1))
    torch.testing.assert_close(patches.double(), expected.flatten(2), rtol=0, atol=tolerance)

    assert torch.equal(patches, clean_patches(images, **GEOMETRY))
    for narrow in (torch.bfloat16, torch.float16):
        assert torch.equal(normalized_patches(images, dtype=narrow, **GEOMETRY), patches.to(narrow))
    with pytest.raises(TypeError, match=r"dtype must be one of .*, got torch\.int32"):
        normalized_patches(images, dtype=torch.int32, **GEOMETRY)


def test_gradient_of_normalized_patches():
    images = random_images((2, 3, 4, 6), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalized_patches(x, **GEOMETRY), (images,))
    images = images.detach().float().requires_grad_()
    upstream = torch.randn((2, 6, 12), generator=torch.Generator().manual_seed(0)).bfloat16()
    normalized_patches(images, dtype=torch.bfloat16, **GEOMETRY).backward(upstream)
    exact = unpatchify(upstream.double(), (4, 6), 2).permute(0, 3, 1, 2)
    exact = exact / torch.tensor(GEOMETRY["std"], dtype=torch.float64)[:, None, None]
    # One float32 rounding of 1 / std and one of the product.
    torch.testing.assert_close(images.grad.double(), exact, rtol=2**-22, atol=0)


@pytest.mark.parametrize("size", [2, 48, 768, 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patch_moments(dtype, size):
    generator = torch.Generator().manual_seed(size)
    # The mean is far larger than the deviation: mean of squares minus square of mean would lose the variance.
    values = (torch.randn((3, 5, size), generator=generator, dtype=torch.float64) * 0.1 + 5).to(dtype)
    centred, centre, variance = patch_moments(values)
    exact = values.double().numpy()
    assert centre.shape == variance.shape == (3, 5, 1)
    # Roundings of numbers around 5 whose squared deviations are 0.01; the error of the mean is the same for all of
    # them.
    step = 5 * torch.finfo(dtype).eps
    torch.testing.assert_close(centre.squeeze(-1).double(), torch.from_numpy(exact.mean(-1)), rtol=0, atol=2 * step)
    torch.testing.assert_close(centred, values - centre, rtol=0, atol=0)
    spread = torch.from_numpy(exact.var(-1, ddof=1))
    torch.testing.assert_close(variance.squeeze(-1).double(), spread, rtol=1e4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    ("batch", "elements", "least"), [(0, 5, 1), (1, 5, 1), (7, 5, 1), (7, 5, 2), (7, 100, 2), (5, 0, 1)]
)
def test_sample_chunks_cover_the_batch_once(monkeypatch, batch, elements, least):
    monkeypatch.setattr(patches, "CHUNK", 16)
    samples = torch.arange(batch)
    parts = [samples[chunk] for chunk in sample_chunks(batch, elements, torch.device("cpu"), least)]
    assert torch.equal(torch.cat([samples[:0], *parts]), samples)
    assert all(len(part) <= max(least, 16 // max(1, elements)) for part in parts)
    assert all(len(part) >= least for part in parts[:-1])
    whole = [samples[chunk] for chunk in sample_chunks(batch, elements, torch.device("cuda"), least)]
    assert len(whole) == (batch > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pixels_in_range_pass(dtype):
    check_pixels(torch.tensor([0.0, 0.5, 1.0], dtype=dtype))
    check_pixels(torch.empty(0, dtype=dtype))


def test_pixels_may_leave_the_range_by_1e_4():
    check_pixels(torch.tensor([-0.99e-4, 1 + 0.99e-4]))
    for value in (-1.01e-4, 1 + 1.01e-4):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            check_pixels(torch.tensor([0.5, value]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.5, 2.0, 255.0])
@pytest.mark.parametrize("place", [0, 1, 1500, -1])
def test_bad_pixels_are_refused_wherever_they_are(value, place):
    pixels = torch.full((2, 3, 16, 16), 0.5)
    pixels.view(-1)[place] = value
    with pytest.raises(ValueError, match="normalisation lives inside the model"):
        check_pixels(pixels)


def test_integer_pixels_are_refused():
    with pytest.raises(TypeError, match="divide uint8 images by 255"):
        check_pixels(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("images", "changes", "error", "message"),
    [
        (torch.zeros(2, 4, 6, 3, dtype=torch.int64), {}, TypeError, "uint8 .* or float .* got torch.int64"),
        (torch.zeros(2, 4, 6, 3, dtype=torch.bool), {}, TypeError, "got torch.bool"),
        (torch.zeros(3, 4, 6), {}, ValueError, r"\(B, C, H, W\), got \(3, 4, 6\)"),
        (torch.zeros(4, 6, 3, dtype=torch.uint8), {}, ValueError, r"\(B, H, W, C\), got \(4, 6, 3\)"),
        (torch.zeros(2, 4, 6, 3), {}, ValueError, r"mean and std have 3 channels, got images .* with 4"),
        (torch.zeros(2, 3, 4, 6, dtype=torch.uint8), {}, ValueError, "3 channels, got images .* with 6"),
        (torch.zeros(2, 3, 5, 6), {}, ValueError, "multiples of the patch size 2, got 5 x 6"),
        (torch.zeros(2, 4, 7, 3, dtype=torch.uint8), {}, ValueError, "multiples of the patch size 2, got 4 x 7"),
        (torch.zeros(2, 3, 0, 6), {}, ValueError, "got 0 x 6"),
        (torch.zeros(2, 3, 4, 6), {"patch_size": 0}, ValueError, "patch size 0"),
        (torch.zeros(2, 3, 4, 6), {"std": (0.2, 0.0, 0.4)}, ValueError, "std must be positive"),
        (torch.zeros(2, 3, 4, 6), {"std": (0.2, -0.1, 0.4)}, ValueError, "std must be positive"),
        (torch.zeros(2, 3, 4, 6), {"std": (0.2, float("nan"), 0.4)}, ValueError, "std must be positive"),
        (torch.zeros(2, 3, 4, 6), {"std": (0.2, 0.3)}, ValueError, "one value per channel each, got 3 and 2"),
        (torch.zeros(2, 3, 4, 6), {"mean": (), "std": ()}, ValueError, "one value per channel each"),
    ],
)
def test_bad_images_are_refused(images, changes, error, message):
    with pytest.raises(error, match=message):
        normalized_patches(images, **{**GEOMETRY, **changes})
