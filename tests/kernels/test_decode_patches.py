from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from denim.benchmarks.baselines import patchify_planes, unclamped_pixels
from denim.kernels import decode_patches, noise_patchify, normalized_patches, patches

# (B, H, W, C, patch)
SHAPES = [(1, 4, 6, 1, 2), (2, 8, 12, 3, 4), (3, 21, 14, 5, 7), (2, 28, 42, 1, 14), (1, 32, 48, 3, 16)]
MEAN = (0.485, 0.456, 0.406, 0.3, 0.7)
STD = (0.229, 0.224, 0.225, 0.5, 0.1)
# Mean and std of a classifier.
NORMAL = ((0.4, 0.5, 0.6, 0.2, 0.5), (0.25, 0.2, 0.3, 0.4, 0.5))
STATISTICS = (None, "input", "noisy")


def make(shape, statistics, dtype=torch.float64, source_dtype=torch.float64, lead=(), seed=0):
    """A prediction and the keywords of `decode_patches`, with pixels on both sides of 0 and 1."""
    batch, height, width, channels, patch = shape
    generator = torch.Generator().manual_seed(seed)
    length, size = height * width // patch**2, patch * patch * channels
    options = {"img_size": (height, width), "patch_size": patch, "mean": MEAN[:channels], "std": STD[:channels]}
    prediction = 3 * torch.randn((*lead, batch, length, size), generator=generator, dtype=torch.float64)
    if statistics is not None:
        options["statistics"] = statistics
    if statistics == "input":
        images = torch.randint(0, 256, (batch, height, width, channels), generator=generator, dtype=torch.uint8)
        if source_dtype != torch.uint8:
            images = (images.to(torch.float64) / 255).permute(0, 3, 1, 2).to(source_dtype).contiguous()
        options["source"] = images
    if statistics == "noisy":
        source = torch.randn(prediction.shape, generator=generator, dtype=torch.float64)
        options["source"] = source.to(source_dtype)
        # About the deviation of a patch: variance minus that of the noise is positive in some patches, negative in
        # others.
        options["sigma"] = torch.linspace(40, 90, batch, dtype=torch.float64)
    return prediction.to(dtype), options


def normal(channels):
    return tuple(values[:channels] for values in NORMAL)


def reference(prediction, img_size, patch_size, mean, std, statistics=None, source=None, sigma=None):
    """The baseline in float64, before the clamp."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    if source is not None:
        source = source.detach() if source.dtype == torch.uint8 else source.detach().double()
    given = {"statistics": statistics, "source": source, "sigma": None if sigma is None else sigma.double()}
    prediction = prediction.detach().double()
    return unclamped_pixels(prediction, mean, std, img_size=img_size, patch_size=patch_size, **given)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("statistics", "source_dtype"),
    [
        (None, None),
        *(("input", dtype) for dtype in (torch.uint8, torch.float32, torch.float64, torch.bfloat16)),
        *(("noisy", dtype) for dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_plain_computation(shape, statistics, dtype, source_dtype, global_rng_untouched):
    prediction, options = make(shape, statistics, dtype, source_dtype)
    pixels = decode_patches(prediction, **options)
    exact = torch.float64 in (dtype, source_dtype)
    assert pixels.dtype == (torch.float64 if exact else torch.float32)
    assert pixels.is_contiguous()
    unclamped = reference(prediction, **options)
    expected = unclamped.clamp(0, 1)
    assert (expected == 0).any()
    assert (expected == 1).any()
    assert (unclamped != expected).double().mean() < 0.9
    # About ten float32 roundings of numbers up to 10; the difference of variances loses two more digits. Statistics of
    # images other than float64 are computed from float32 patches.
    rounded = statistics == "input" and source_dtype != torch.float64
    tolerance = 1e-4 if statistics == "noisy" and not exact else 1e-5 if rounded or not exact else 1e-12
    torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_patches_are_the_normalised_pixels(shape, statistics, dtype, global_rng_untouched):
    prediction, options = make(shape, statistics, lead=(2,))
    if statistics == "input":
        options["source"] = options["source"].double()
    mean, std = normal(shape[3])
    patches = decode_patches(prediction, **options, normalize=(mean, std), dtype=dtype)
    assert patches.dtype == (dtype or torch.float64)
    assert patches.is_contiguous()
    pixels = reference(prediction, **options).clamp(0, 1)
    centre, scale = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    expected = patchify_planes((pixels - centre) / scale, shape[4])
    # Computed in float64 and rounded once: half a unit in the last place of the dtype, of float16's subnormals too.
    rounding = 0 if patches.dtype == torch.float64 else torch.finfo(patches.dtype).eps / 2
    smallest = max(1e-12, rounding * torch.finfo(patches.dtype).smallest_normal)
    torch.testing.assert_close(patches.double(), expected, rtol=rounding, atol=smallest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pixels_in_another_dtype_are_rounded_once(dtype):
    prediction, options = make(SHAPES[1], "input")
    expected = decode_patches(prediction, **options).to(dtype)
    pixels = decode_patches(prediction, **options, dtype=dtype)
    assert pixels.dtype == dtype
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
@pytest.mark.parametrize("shape", [(1, 4, 6, 1, 2), (2, 4, 6, 3, 2)])
def test_gradcheck(shape, statistics, lead, patches):
    """Saturated and unsaturated pixels. None is so close to 0 or 1 that a difference quotient would cross the kink."""
    prediction, options = make(shape, statistics, lead=lead, seed=1)
    unclamped = reference(prediction, **options)
    assert torch.minimum(unclamped.abs(), (unclamped - 1).abs()).min() > 1e-5
    saturated = (unclamped < 0) | (unclamped > 1)
    assert 0 < saturated.double().mean() < 1
    source = options.pop("source", None)
    options["normalize"] = normal(shape[3]) if patches else None
    inputs = [prediction.requires_grad_(), *([] if source is None else [source.requires_grad_()])]

    def decode(prediction, source=None):
        return decode_patches(prediction, **options, **({} if source is None else {"source": source}))

    # Many outputs and inputs: one random projection of the Jacobian instead of all its entries.
    assert torch.autograd.gradcheck(decode, inputs, fast_mode=prediction.numel() > 100)


@pytest.mark.parametrize("statistics", ["input", "noisy"])
def test_gradient_reaches_either_input_alone(statistics):
    prediction, options = make(SHAPES[1], statistics)
    source = options.pop("source")
    both = [prediction.clone().requires_grad_(), source.clone().requires_grad_()]
    expected = torch.autograd.grad(decode_patches(both[0], source=both[1], **options).square().sum(), both)
    left = prediction.clone().requires_grad_()
    right = source.clone().requires_grad_()
    decode_patches(left, source=source, **options).square().sum().backward()
    decode_patches(prediction, source=right, **options).square().sum().backward()
    assert torch.equal(left.grad, expected[0])
    assert torch.equal(right.grad, expected[1])


class Watch(TorchDispatchMode):
    """Keeps the results of the backward operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.denim.decode_patches_backward.default:
            self.result = result
        return result


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize(
    ("statistics", "dtype", "wanted"),
    [
        ("input", torch.float64, True),
        ("input", torch.float64, False),
        ("input", torch.uint8, False),
        ("noisy", torch.float64, True),
        ("noisy", torch.float64, False),
    ],
)
def test_the_gradient_for_the_source_is_computed_where_it_is_wanted(statistics, dtype, wanted, patches):
    prediction, options = make(SHAPES[1], statistics, source_dtype=dtype, lead=(2,))
    options["normalize"] = normal(3) if patches else None
    prediction.requires_grad_()
    if wanted:
        options["source"].requires_grad_()
    with Watch() as watch:
        decode_patches(prediction, **options).square().sum().backward()
    assert torch.equal(watch.result[0], prediction.grad)
    assert watch.result[1].shape == (options["source"].shape if wanted else (0,))
    # uint8 images have no gradient, even if one is asked for.
    geometry = (4, options["mean"], options["std"], statistics, normal(3)[1])
    grad = torch.ones(prediction.shape, dtype=torch.float64)
    given = (grad, prediction.detach(), options["source"].detach(), options.get("sigma"), *geometry)
    asked, not_asked = (torch.ops.denim.decode_patches_backward(*given, asked) for asked in (True, False))
    assert torch.equal(asked[0], not_asked[0])
    assert asked[1].numel() == (0 if dtype == torch.uint8 else options["source"].numel())
    assert not_asked[1].numel() == 0


def test_uint8_source_gives_the_prediction_its_gradient():
    prediction, options = make(SHAPES[1], "input", source_dtype=torch.uint8)
    prediction.requires_grad_()
    decode_patches(prediction, **options).sum().backward()
    floating = {**options, "source": options["source"].permute(0, 3, 1, 2).double() / 255}
    other = prediction.detach().clone().requires_grad_()
    decode_patches(other, **floating).sum().backward()
    torch.testing.assert_close(prediction.grad, other.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("patches", [False, True])
@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_gradient(statistics, dtype, patches):
    """The gradients of float64 on the same numbers, rounded once."""
    prediction, options = make(SHAPES[1], statistics, dtype, dtype, lead=(2,))
    upstream = torch.randn((2, 2, 3, 8, 12), generator=torch.Generator().manual_seed(3))
    # Predictions away from the kinks of the clamp, where the two precisions may fall on different sides.
    unclamped = reference(prediction, **options)
    upstream[(unclamped.abs() < 1e-3) | ((unclamped - 1).abs() < 1e-3)] = 0
    if patches:
        upstream, options["normalize"] = patchify_planes(upstream, 4), normal(3)

    def gradients(precision):
        tensors = {"prediction": prediction, **options}
        converted = {k: v.to(precision) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
        inputs = [converted[name].requires_grad_() for name in ("prediction", "source") if name in converted]
        pixels = decode_patches(**converted)
        return torch.autograd.grad(pixels, inputs, upstream.to(pixels.dtype))

    # Float32 roundings of sums over 48 values, then half a unit in the last place of the dtype.
    for low, exact in zip(gradients(dtype), gradients(torch.float64), strict=True):
        assert low.dtype == dtype
        scale = exact.abs().max().item()
        torch.testing.assert_close(low.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=scale * 48 * 2**-24)


def test_gradient_of_the_clamp():
    """The clamp's gradient: 1 on [0, 1], ends included, and 0 outside, even for an infinite upstream gradient."""
    values = torch.tensor([-0.5, -1e-7, 0.0, 0.5, 1.0, 1.0 + 1e-6, 2.0, float("nan")])
    for upstream in (1.0, float("inf")):
        prediction = values.clone().view(1, 2, 4).requires_grad_()
        pixels = decode_patches(prediction, img_size=(2, 4), patch_size=2, mean=(0.0,), std=(1.0,))
        pixels.backward(torch.full_like(pixels, upstream))
        assert prediction.grad.flatten().tolist() == [0, 0, upstream, upstream, upstream, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decoding_the_normalised_target_gives_the_image_back(dtype):
    images = torch.rand((2, 3, 8, 12), generator=torch.Generator().manual_seed(0), dtype=dtype)
    geometry = {"patch_size": 4, "mean": MEAN[:3], "std": STD[:3]}
    raw = normalized_patches(images, **geometry)
    target = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True) + 1e-6).sqrt()
    back = decode_patches(target, img_size=(8, 12), **geometry, statistics="input", source=images)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6  # some ten roundings of numbers up to 3
    torch.testing.assert_close(back, images, rtol=0, atol=tolerance)
    torch.testing.assert_close(decode_patches(raw, img_size=(8, 12), **geometry), images, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_noisy_statistics_find_the_clean_spread():
    """Without noise, the statistics are those of the input; with noise, its variance is subtracted on average."""
    images = torch.rand((64, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    geometry = {"patch_size": 16, "mean": MEAN[:3], "std": STD[:3]}
    options = {"img_size": 16, **geometry}
    prediction = torch.full((64, 1, 768), 0.1, dtype=torch.float64)
    expected = decode_patches(prediction, **options, statistics="input", source=images)
    for sigma in (0.0, 70.0):
        level = torch.full((64,), sigma, dtype=torch.float64)
        noisy = noise_patchify(images, level, torch.arange(64), **geometry, dtype=torch.float64)
        pixels = decode_patches(prediction, **options, statistics="noisy", source=noisy, sigma=level)
        # sigma 0: only the floor of 1e-6. Otherwise the mean of 768 normals with deviation 70 / 255, over 64 images.
        bound = 1e-6 if sigma == 0 else 5 * 70 / 255 / 16 / 8
        assert (pixels - expected).mean().abs() < bound


def test_sigma_broadcasts_over_leading_dimensions():
    prediction, options = make(SHAPES[1], "noisy", lead=(3, 2))
    levels = torch.tensor([[10.0], [50.0], [90.0]], dtype=torch.float64)[..., None].expand(3, 1, 2)
    pixels = decode_patches(prediction, **{**options, "sigma": levels})
    for level in range(3):
        for draw in range(2):
            alone = {**options, "source": options["source"][level, draw], "sigma": levels[level, 0]}
            torch.testing.assert_close(
                decode_patches(prediction[level, draw], **alone), pixels[level, draw], rtol=0, atol=1e-14
            )


@pytest.mark.parametrize("statistics", STATISTICS)
def test_strides_change_nothing(statistics):
    prediction, options = make(SHAPES[1], statistics)
    expected = decode_patches(prediction, **options)
    strided = {k: torch.stack([v, v], -1)[..., 0] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    pixels = decode_patches(prediction.mT.contiguous().mT, **strided)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-14)  # sums may run in another order


@pytest.mark.filterwarnings("ignore:var_mean")  # torch warns of zero degrees of freedom for an empty batch
def test_empty_batch():
    for statistics in STATISTICS:
        prediction, options = make((2, 8, 12, 3, 4), statistics, lead=(2,))
        prediction = prediction[:, :0].requires_grad_()
        if statistics == "input":
            options["source"] = options["source"][:0].requires_grad_()
        if statistics == "noisy":
            options["source"], options["sigma"] = options["source"][:, :0], options["sigma"][:0]
        pixels = decode_patches(prediction, **options)
        assert pixels.shape == (2, 0, 3, 8, 12)
        pixels.sum().backward()
        assert prediction.grad.shape == prediction.shape


def test_no_double_backward():
    prediction, options = make(SHAPES[0], None)
    prediction.requires_grad_()
    pixels = decode_patches(prediction, **options)
    upstream = torch.ones_like(pixels).requires_grad_()
    (grad,) = torch.autograd.grad(pixels, prediction, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


IMAGES = torch.zeros(2, 3, 8, 12)
NOISY = torch.zeros(2, 6, 48)
SIGMA = torch.zeros(2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prediction": torch.zeros(2, 6, 48, dtype=torch.int64)}, TypeError, "prediction must be floating point"),
        ({"prediction": torch.zeros(2, 5, 48)}, ValueError, r"shape \(..., B, 6, 48\), got \(2, 5, 48\)"),
        ({"prediction": torch.zeros(6, 48)}, ValueError, r"got \(6, 48\)"),
        ({"img_size": (8, 10)}, ValueError, "multiples of the patch size 4, got 8 x 10"),
        ({"img_size": 6}, ValueError, "multiples of the patch size 4, got 6 x 6"),
        ({"patch_size": 0}, ValueError, "patch size 0"),
        ({"mean": (0.5,)}, ValueError, "one value per channel and std > 0"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "one value per channel and std > 0"),
        (
            {"normalize": (MEAN[:1], STD[:1])},
            ValueError,
            "a mean and a std > 0 for each of 3 channels, got",
        ),
        ({"normalize": ((0.5,) * 3, (0.5, 0.0, 0.5))}, ValueError, "a mean and a std > 0 for each of 3 channels"),
        ({"dtype": torch.int32}, TypeError, "dtype must be one of torch.float32, .* got torch.int32"),
        ({"statistics": "clean"}, ValueError, 'statistics must be None, "input" or "noisy", got \'clean\''),
        ({"statistics": "input"}, ValueError, "statistics='input' needs a source"),
        ({"source": IMAGES}, ValueError, "statistics=None takes no source"),
        ({"sigma": SIGMA}, ValueError, "statistics=None takes no sigma"),
        ({"statistics": "input", "source": IMAGES, "sigma": SIGMA}, ValueError, "statistics='input' takes no sigma"),
        ({"statistics": "noisy", "source": NOISY}, ValueError, "statistics='noisy' needs a sigma"),
        ({"statistics": "input", "source": IMAGES[:1]}, ValueError, "source must hold 2 images of 8 x 12"),
        ({"statistics": "input", "source": IMAGES.mT}, ValueError, "source must hold 2 images of 8 x 12"),
        ({"statistics": "input", "source": IMAGES[:, :1]}, ValueError, "3 channels"),
        ({"statistics": "input", "source": IMAGES.int()}, TypeError, "images must be uint8"),
        (
            {"statistics": "input", "source": IMAGES.to("meta")},
            ValueError,
            "source is on meta and prediction is on cpu",
        ),
        ({"statistics": "noisy", "source": NOISY[:1], "sigma": SIGMA}, ValueError, r"shape \(2, 6, 48\), got \(1, 6"),
        ({"statistics": "noisy", "source": NOISY.int(), "sigma": SIGMA}, TypeError, "source must be .* floating point"),
        ({"statistics": "noisy", "source": NOISY, "sigma": SIGMA.int()}, TypeError, "sigma must be floating point"),
        (
            {"statistics": "noisy", "source": NOISY, "sigma": torch.zeros(2, requires_grad=True)},
            ValueError,
            "not differentiable in sigma",
        ),
        (
            {"statistics": "noisy", "source": NOISY, "sigma": torch.zeros(3)},
            ValueError,
            r"broadcast to \(2,\), got \(3,\)",
        ),
        ({"statistics": "noisy", "source": NOISY, "sigma": torch.zeros(1, 2)}, ValueError, "sigma must broadcast"),
        ({"statistics": "noisy", "source": NOISY, "sigma": SIGMA.to("meta")}, ValueError, "sigma is on meta"),
        (
            {"patch_size": 1, "prediction": torch.zeros(1, 96, 1), "mean": (0.5,), "std": (0.5,), "statistics": "noisy"}
            | {"source": torch.zeros(1, 96, 1), "sigma": torch.zeros(1)},
            ValueError,
            "at least two values per patch",
        ),
    ],
)
def test_bad_input_is_refused(changes, error, message):
    good = {
        "prediction": torch.zeros(2, 6, 48),
        "img_size": (8, 12),
        "patch_size": 4,
        "mean": MEAN[:3],
        "std": STD[:3],
    }
    decode_patches(**good)
    with pytest.raises(error, match=message):
        decode_patches(**{**good, **changes})


@pytest.mark.parametrize("normalized", [False, True], ids=["pixels", "patches"])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_samples_do_not_depend_on_the_chunk(monkeypatch, statistics, normalized):
    """Chunks of one sample, of two with a rest of one, and all at once: the same bits, forward and backward."""
    prediction, options = make(SHAPES[2], statistics, torch.float32, torch.float32, lead=(2,))
    options |= {"normalize": normal(5)} if normalized else {}
    leaves = [tensor.requires_grad_() for tensor in (prediction, options.get("source")) if tensor is not None]
    results = []
    for chunk in (1, 2 * prediction[:, :1].numel(), 2**20):
        monkeypatch.setattr(patches, "CHUNK", chunk)
        decoded = decode_patches(prediction, **options)
        results.append((decoded, *torch.autograd.grad(decoded.square().sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))
