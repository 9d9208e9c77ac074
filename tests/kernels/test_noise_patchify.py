from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from denim.benchmarks.baselines import noisy_patches
from denim.kernels import Domain, derive_seeds, draw_seeds, noise_patchify, normal_noise
from denim.kernels import patches as layout
from denim.kernels.patches import patchify, unpatchify

# (B, H, W, C, patch)
SHAPES = [(1, 4, 2, 1, 2), (2, 8, 12, 3, 4), (3, 21, 14, 5, 7), (2, 28, 42, 1, 14), (1, 32, 48, 3, 16), (2, 5, 3, 3, 1)]
MEAN = (0.485, 0.456, 0.406, 0.3, 0.7)
STD = (0.229, 0.224, 0.225, 0.5, 0.1)


def make(shape, dtype, seed=0):
    """Images in the layout of their dtype, and the keywords that go with them."""
    batch, height, width, channels, patch = shape
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, height, width, channels), generator=generator, dtype=torch.uint8)
    if dtype != torch.uint8:
        images = (images.to(torch.float64) / 255).permute(0, 3, 1, 2).to(dtype).contiguous()
    return images, {"patch_size": patch, "mean": MEAN[:channels], "std": STD[:channels]}


def reference(images, sigma, seeds, patch_size, mean, std):
    """The baseline in float64 on the operator's own noise: (S, R, B, L, D) with S and R always there."""
    sigma, seeds = torch.atleast_2d(sigma), torch.atleast_2d(seeds)
    height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
    noise = normal_noise(seeds, (height, width, len(mean))).double().movedim(-1, -3)
    pixels = images if images.dtype == torch.uint8 else images.double()
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    options = {"patch_size": patch_size, "noise": noise, "draws": seeds.shape[:-1], "dtype": torch.float64}
    return noisy_patches(pixels, sigma.double(), mean, std, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_plain_computation(shape, dtype, global_rng_untouched):
    images, geometry = make(shape, dtype)
    sigma = torch.tensor([[0.0], [70.0], [140.5]]).repeat(1, shape[0]) + torch.arange(shape[0])
    seeds = draw_seeds(1, Domain.TRAINING, torch.arange(shape[0]), 2)
    out_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    patches = noise_patchify(images, sigma, seeds, **geometry, dtype=out_dtype)
    expected = reference(images, sigma, seeds, **geometry)
    assert patches.shape == expected.shape
    assert patches.is_contiguous()
    # Values up to (1 + 6 * 143 / 255) / 0.1 = 44 after five float32 roundings of 2^-24 relative each.
    tolerance = 1e-12 if dtype == torch.float64 else 44 * 5 * 2**-24
    torch.testing.assert_close(patches.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sigma_shape", [(), (1,), (3,)])
@pytest.mark.parametrize("seeds_shape", [(), (1,), (2,)])
def test_levels_and_draws_are_an_outer_product(sigma_shape, seeds_shape):
    images, geometry = make(SHAPES[1], torch.uint8)
    sigma = (torch.arange(2 * math.prod(sigma_shape), dtype=torch.float32) * 20).reshape(*sigma_shape, 2)
    seeds = derive_seeds(0, Domain.SCORE, torch.arange(2 * math.prod(seeds_shape))).reshape(*seeds_shape, 2)
    patches = noise_patchify(images, sigma, seeds, **geometry)
    assert patches.shape == (*sigma_shape, *seeds_shape, 2, 6, 48)
    full = noise_patchify(images, torch.atleast_2d(sigma), torch.atleast_2d(seeds), **geometry)
    assert torch.equal(patches.reshape(full.shape), full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_output_is_the_float32_result_rounded(dtype):
    images, geometry = make(SHAPES[1], torch.uint8)
    sigma, seeds = torch.tensor([30.0, 90.0]), torch.tensor([3, 4])
    patches = noise_patchify(images, sigma, seeds, **geometry, dtype=dtype)
    assert patches.dtype == dtype
    assert torch.equal(patches, noise_patchify(images, sigma, seeds, **geometry).to(dtype))


def test_unit_noise_comes_back_exactly():
    """x = 0, sigma = 255, mean 0, std 1: the result is the noise itself."""
    seeds = torch.tensor([[5, -6], [7, 8], [9, 10]])
    images = torch.zeros(2, 3, 8, 12, requires_grad=True)
    patches = noise_patchify(images, torch.full((2,), 255.0), seeds, patch_size=4, mean=(0.0,) * 3, std=(1.0,) * 3)
    noise = normal_noise(seeds, (8, 12, 3))
    assert torch.equal(unpatchify(patches, (8, 12), 4), noise)
    # The noise is a constant for autograd, so the gradient of sum(g * patches) is the sum of g over the draws.
    upstream = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0))
    patches.backward(upstream)
    expected = unpatchify(upstream.double().sum(0), (8, 12), 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(images.grad.double(), expected, rtol=0, atol=3 * 4 * 2**-24)


@given(
    batch=st.integers(1, 4),
    levels=st.integers(1, 3),
    draws=st.integers(1, 3),
    channels=st.sampled_from([1, 3, 5]),
    patch=st.sampled_from([1, 2, 4, 7]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    floating=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25, deadline=None)
def test_looped_or_batched_is_bitwise_the_same(batch, levels, draws, channels, patch, rows, columns, floating, seed):
    shape = (batch, rows * patch, columns * patch, channels, patch)
    images, geometry = make(shape, torch.float32 if floating else torch.uint8, seed % 1000)
    seeds = draw_seeds(seed, Domain.CERTIFY, torch.arange(batch), draws)
    sigma = torch.rand(levels, batch, generator=torch.Generator().manual_seed(seed)) * 200
    patches = noise_patchify(images, sigma, seeds, **geometry)
    for level in range(levels):
        for draw in range(draws):
            for sample in range(batch):
                alone = noise_patchify(
                    images[sample : sample + 1],
                    sigma[level, sample : sample + 1],
                    seeds[draw, sample : sample + 1],
                    **geometry,
                )
                assert torch.equal(alone[0], patches[level, draw, sample])
    # The patch size moves values without changing them.
    pixelwise = noise_patchify(images, sigma, seeds, **{**geometry, "patch_size": 1})
    by_pixel = pixelwise.unflatten(-2, (rows * patch, columns * patch)).flatten(0, 2)
    assert torch.equal(patchify(by_pixel, patch), patches.flatten(0, 2))
    # Strides of the images change nothing either.
    wide = torch.stack([images, images], dim=-1)[..., 0]
    assert wide.stride(-1) == 2
    strided = noise_patchify(wide, sigma.mT.contiguous().mT, seeds.mT.contiguous().mT, **geometry)
    assert torch.equal(strided, patches)
    if floating:
        channels_last = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(noise_patchify(channels_last, sigma, seeds, **geometry), patches)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradcheck(shape):
    images, geometry = make(shape, torch.float64)
    images = images[:, :, : 2 * shape[4], : shape[4]].clone().requires_grad_()
    sigma = torch.tensor([[10.0], [100.0]]).repeat(1, shape[0])
    seeds = draw_seeds(1, Domain.TRAINING, torch.arange(shape[0]), 2)
    assert torch.autograd.gradcheck(
        lambda x: noise_patchify(x, sigma, seeds, **geometry, dtype=torch.float64), images, fast_mode=shape[3] > 1
    )


@pytest.mark.parametrize("image_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_sums_in_float32(image_dtype, dtype):
    """The gradient is rounded to the images' dtype once, not once per level and draw."""
    images, geometry = make(SHAPES[1], image_dtype)
    images.requires_grad_()
    sigma = torch.full((8, 2), 50.0)
    patches = noise_patchify(images, sigma, draw_seeds(1, Domain.ATTACK, torch.arange(2), 8), **geometry, dtype=dtype)
    upstream = torch.randn(patches.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    patches.backward(upstream)
    summed = upstream.double().flatten(0, 1).sum(0).view(2, 6, 4, 4, 3) / torch.tensor(STD[:3], dtype=torch.float64)
    expected = unpatchify(summed.flatten(2), (8, 12), 4).permute(0, 3, 1, 2)
    # 64 summands of at most about 4, divided by 0.22: 64 * 4 / 0.22 * 2^-24, and half an ulp of the images' dtype.
    ulp = torch.finfo(image_dtype).eps
    torch.testing.assert_close(images.grad.double(), expected, rtol=ulp / 2, atol=64 * 4 / 0.22 * 2**-24)


def test_backward_has_a_fixed_order():
    """Bitwise the same with another number of threads."""
    images, geometry = make((2, 64, 64, 3, 16), torch.float32)
    images.requires_grad_()
    sigma, seeds = torch.full((5, 2), 50.0), draw_seeds(1, Domain.ATTACK, torch.arange(2), 7)
    upstream = torch.randn((5, 7, 2, 16, 768), generator=torch.Generator().manual_seed(0))
    threads, gradients = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            patches = noise_patchify(images, sigma, seeds, **geometry)
            gradients += torch.autograd.grad(patches, images, upstream)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("floating", [False, True])
def test_chunks_change_nothing(monkeypatch, floating):
    """Two samples at a time with a rest of one, three with a rest of two, and all at once: bitwise the same."""
    images, geometry = make((5, 8, 12, 3, 4), torch.float32 if floating else torch.uint8)
    sigma, seeds = torch.arange(10.0).reshape(2, 5) * 10, torch.arange(15).view(3, 5)
    results = []
    for chunk in (1, 3 * 3 * 288, 2**17):
        monkeypatch.setattr(layout, "CHUNK", chunk)
        noisy = noise_patchify(images.requires_grad_(floating), sigma, seeds, **geometry)
        results.append((noisy, *(torch.autograd.grad(noisy.square().sum(), images) if floating else ())))
    assert not any(tensor.isnan().any() for tensor in results[0])
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


def test_no_double_backward():
    images, geometry = make(SHAPES[0], torch.float64)
    images.requires_grad_()
    patches = noise_patchify(images, torch.tensor([9.0]), torch.tensor([1]), **geometry)
    upstream = torch.ones_like(patches).requires_grad_()
    (grad,) = torch.autograd.grad(patches, images, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_empty_batch():
    images, geometry = make((2, 8, 12, 3, 4), torch.float32)
    images = images[:0].requires_grad_()
    patches = noise_patchify(images, torch.zeros(3, 0), torch.zeros(2, 0, dtype=torch.int64), **geometry)
    assert patches.shape == (3, 2, 0, 6, 48)
    patches.sum().backward()
    assert images.grad.shape == images.shape


@pytest.mark.parametrize(("levels", "draws"), [(0, 2), (3, 0)])
def test_no_level_or_no_draw(levels, draws):
    images, geometry = make((2, 8, 12, 3, 4), torch.float32)
    images.requires_grad_()
    sigma, seeds = torch.zeros(levels, 2), torch.zeros(draws, 2, dtype=torch.int64)
    patches = noise_patchify(images, sigma, seeds, **geometry)
    assert patches.shape == (levels, draws, 2, 6, 48)
    patches.sum().backward()
    assert torch.equal(images.grad, torch.zeros_like(images))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 12, dtype=torch.int32)}, TypeError, "images must be uint8"),
        ({"images": torch.zeros(3, 8, 12)}, ValueError, r"\(B, C, H, W\)"),
        ({"images": torch.zeros(2, 1, 8, 12)}, ValueError, "3 channels"),
        ({"images": torch.zeros(2, 3, 8, 10)}, ValueError, "multiples of the patch size 4, got 8 x 10"),
        ({"std": (0.1, 0.0, 0.1)}, ValueError, "std must be positive"),
        ({"mean": (0.5,)}, ValueError, "one value per channel"),
        ({"seeds": torch.zeros(2, dtype=torch.int32)}, TypeError, "seeds must be int64, got torch.int32"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds must have shape \(2,\) or \(R, 2\)"),
        ({"seeds": torch.zeros(2, 3, dtype=torch.int64)}, ValueError, r"got \(2, 3\)"),
        ({"seeds": torch.tensor(3)}, ValueError, r"seeds must have shape .* got \(\)"),
        ({"seeds": torch.zeros(1, 1, 2, dtype=torch.int64)}, ValueError, "seeds must have shape"),
        ({"seeds": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "seeds is on meta and images are on"),
        ({"sigma": 70.0}, TypeError, r"sigma must be a tensor with one level per image, got 70.0: torch.full\(\(2,\)"),
        ({"seeds": 3}, TypeError, "seeds must be a tensor, got 3; derive seeds"),
        ({"sigma": torch.zeros(3)}, ValueError, r"sigma must have shape \(2,\) or \(S, 2\) for 2 images, got \(3,\)"),
        ({"sigma": torch.tensor(70.0)}, ValueError, "sigma must have shape"),
        ({"sigma": torch.zeros(2, device="meta")}, ValueError, "sigma is on meta and images are on cpu"),
        ({"sigma": torch.tensor([70, 70])}, TypeError, "sigma must be floating point"),
        ({"sigma": torch.zeros(2, requires_grad=True)}, ValueError, "not differentiable in sigma"),
        ({"dtype": torch.int8}, TypeError, "dtype must be one of torch.float32, .* got torch.int8"),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    good = {
        "images": torch.zeros(2, 3, 8, 12),
        "sigma": torch.zeros(2),
        "seeds": torch.zeros(2, dtype=torch.int64),
        "patch_size": 4,
        "mean": MEAN[:3],
        "std": STD[:3],
    }
    noise_patchify(**good)
    with pytest.raises(error, match=message):
        noise_patchify(**{**good, **changes})
