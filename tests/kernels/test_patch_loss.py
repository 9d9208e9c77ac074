from __future__ import annotations

import pytest
import torch

from denim.benchmarks.baselines import reconstruction_loss
from denim.kernels import patch_loss, patches

# (B, H, W, C, patch)
SHAPES = [(1, 4, 2, 1, 2), (2, 8, 12, 3, 4), (3, 21, 14, 5, 7), (2, 28, 42, 1, 14), (1, 32, 48, 3, 16)]
MEAN = (0.485, 0.456, 0.406, 0.3, 0.7)
STD = (0.229, 0.224, 0.225, 0.5, 0.1)


def make(shape, image_dtype=torch.float64, dtype=torch.float64, seed=0):
    """Prediction, images, a mask with both values, and the keywords that go with them."""
    batch, height, width, channels, patch = shape
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, height, width, channels), generator=generator, dtype=torch.uint8)
    if image_dtype != torch.uint8:
        images = (images.to(torch.float64) / 255).permute(0, 3, 1, 2).to(image_dtype).contiguous()
    length, size = height * width // patch**2, patch * patch * channels
    prediction = torch.randn((batch, length, size), generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand((batch, length), generator=generator) < 0.5
    mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return prediction, images, mask, {"patch_size": patch, "mean": MEAN[:channels], "std": STD[:channels]}


def reference(prediction, images, mask, norm_pix, patch_size, mean, std):
    """The baseline in float64: the loss, and its gradient."""
    prediction = prediction.detach().double().requires_grad_()
    pixels = images if images.dtype == torch.uint8 else images.double()
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    options = {"patch_size": patch_size, "norm_pix": norm_pix, "mask": mask}
    loss = reconstruction_loss(prediction, pixels, mean, std, **options)
    return loss.item(), torch.autograd.grad(loss, prediction)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_equal_the_plain_computation(
    shape, dtype, image_dtype, norm_pix, masked, global_rng_untouched
):
    prediction, images, mask, geometry = make(shape, image_dtype, dtype)
    prediction.requires_grad_()
    mask = mask if masked else None
    loss = patch_loss(prediction, images, **geometry, norm_pix=norm_pix, mask=mask)
    exact = torch.float64 in (dtype, image_dtype)
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    # An upstream gradient other than 1: a backward pass that ignores it would go unnoticed with 1.
    (loss * -3.5).backward()
    expected, gradient = reference(prediction, images, mask, norm_pix, **geometry)
    # A target is float32 unless the images are float64. Its normalisation has about ten roundings of numbers up to 10,
    # which is 1e-5 absolute, and as much in the square of an error of about 1.
    precise = image_dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-12 if precise else 1e-5)
    ulp = torch.finfo(dtype).eps / 2
    gradient = gradient * -3.5
    scale = gradient.abs().max().item()
    # Near zero, the numbers of float16 are 2^-24 apart.
    absolute = scale * (1e-12 if precise and dtype == torch.float64 else 1e-5) + 2**-25 * (dtype == torch.float16)
    assert prediction.grad.dtype == dtype
    torch.testing.assert_close(prediction.grad.double(), gradient, rtol=ulp, atol=absolute)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradcheck(shape, masked, norm_pix):
    prediction, images, mask, geometry = make(shape)
    prediction.requires_grad_()

    def loss(p):
        return 2.5 * patch_loss(p, images, **geometry, norm_pix=norm_pix, mask=mask if masked else None)

    assert torch.autograd.gradcheck(loss, prediction)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_strides_change_nothing(dtype):
    prediction, images, mask, geometry = make(SHAPES[1], dtype, torch.float32)
    prediction.requires_grad_()
    loss = patch_loss(prediction, images, **geometry, mask=mask)
    (grad,) = torch.autograd.grad(loss, prediction)
    strided = prediction.detach().mT.contiguous().mT.requires_grad_()
    wide = torch.stack([images, images], dim=-1)[..., 0]
    other = patch_loss(strided, wide, **geometry, mask=mask.mT.contiguous().mT)
    # The sums may differ in their order only: 288 float32 terms of one sign.
    torch.testing.assert_close(other, loss, rtol=288 * 2**-24, atol=0)
    torch.testing.assert_close(torch.autograd.grad(other, strided)[0], grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_samples_do_not_depend_on_the_chunk(monkeypatch, masked):
    """Chunks of one sample, of two with a rest of one, and all at once: the same errors, summed per patch."""
    prediction, images, mask, geometry = make((5, 8, 12, 3, 4), torch.uint8, torch.float32)
    prediction.requires_grad_()
    results = []
    for chunk in (1, 2 * 288, 2**17):
        monkeypatch.setattr(patches, "CHUNK", chunk)
        loss = patch_loss(prediction, images, **geometry, mask=mask if masked else None)
        results.append((loss, *torch.autograd.grad(loss, prediction)))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_masked_patches_do_not_count():
    prediction, images, mask, geometry = make(SHAPES[1])
    loss = patch_loss(prediction, images, **geometry, mask=mask)
    changed = torch.where(mask[..., None], prediction, 1e6)
    assert patch_loss(changed, images, **geometry, mask=mask) == loss
    assert patch_loss(prediction, images, **geometry, mask=torch.zeros_like(mask)).isnan()


def test_constant_patch_has_target_zero():
    """The variance of a flat patch is 0; only the 1e-6 inside the root keeps the division finite."""
    images = torch.full((1, 8, 8, 1), 128, dtype=torch.uint8)
    loss = patch_loss(torch.ones(1, 4, 16), images, patch_size=4, mean=(0.5,), std=(0.25,))
    # The mean of equal float32 numbers is off by some 2^-24, divided by 1e-3.
    assert loss.item() == pytest.approx(1.0, abs=2 * 4 * 2**-24 / 1e-3)


def test_empty_batch_is_nan_like_torch():
    prediction = torch.zeros(0, 4, 16, requires_grad=True)
    loss = patch_loss(prediction, torch.zeros(0, 1, 8, 8), patch_size=4, mean=(0.5,), std=(0.25,))
    assert loss.isnan()
    loss.backward()
    assert prediction.grad.shape == prediction.shape


def test_no_double_backward():
    prediction, images, _, geometry = make(SHAPES[0])
    prediction.requires_grad_()
    (grad,) = torch.autograd.grad(patch_loss(prediction, images, **geometry), prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prediction": torch.zeros(2, 6, 48, dtype=torch.int64)}, TypeError, "prediction must be floating point"),
        ({"prediction": torch.zeros(2, 5, 48)}, ValueError, r"must have shape \(2, 6, 48\) .* got \(2, 5, 48\)"),
        ({"prediction": torch.zeros(6, 48)}, ValueError, r"got \(6, 48\)"),
        (
            {"prediction": torch.zeros(2, 6, 48, device="meta")},
            ValueError,
            "images are on cpu and prediction is on meta",
        ),
        ({"images": torch.zeros(2, 8, 12, 3, dtype=torch.int64)}, TypeError, "images must be uint8"),
        ({"images": torch.zeros(2, 8, 12, 3)}, ValueError, "3 channels"),
        ({"images": torch.zeros(2, 3, 8, 10)}, ValueError, "multiples of the patch size 4, got 8 x 10"),
        ({"images": torch.zeros(2, 3, 8, 12, requires_grad=True)}, ValueError, "not differentiable in the images"),
        ({"images": torch.zeros(3, 3, 8, 12)}, ValueError, r"must have shape \(3, 6, 48\)"),
        ({"mean": (0.5,)}, ValueError, "one value per channel"),
        ({"std": (1.0, -1.0, 1.0)}, ValueError, "std must be positive"),
        ({"mask": torch.ones(2, 6)}, TypeError, r"mask must be bool \(B, L\), got torch.float32"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"mask must have shape \(2, 6\), got \(2, 5\)"),
        ({"mask": torch.ones(2, 6, 1, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta"),
        (
            {"patch_size": 1, "images": torch.zeros(2, 1, 8, 12), "mean": (0.5,), "std": (1.0,)}
            | {"prediction": torch.zeros(2, 96, 1)},
            ValueError,
            "norm_pix needs at least two values",
        ),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    good = {
        "prediction": torch.zeros(2, 6, 48),
        "images": torch.zeros(2, 3, 8, 12),
        "patch_size": 4,
        "mean": MEAN[:3],
        "std": STD[:3],
    }
    patch_loss(**good)
    with pytest.raises(error, match=message):
        patch_loss(**{**good, **changes})
