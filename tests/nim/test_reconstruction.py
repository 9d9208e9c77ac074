from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from denim.kernels import normal_noise
from denim.nim.autoencoder import Autoencoder, AutoencoderConfig, Mask
from denim.nim.classifier import Classifier, ClassifierConfig
from denim.nim.reconstruction import add_noise, reconstruct

CONFIG = AutoencoderConfig((8, 12), 4, 16, 1, 2, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3))
GRID, BATCH = (2, 3), 3
SEEDS = torch.tensor([5, -7, 2**40])
CASES = pytest.mark.parametrize(
    ("degrade", "target", "statistics"),
    [
        ("noise", "raw", "input"),
        ("noise", "norm", "input"),
        ("noise", "norm", "noisy"),
        ("mask", "raw", "input"),
        ("mask", "norm", "input"),
        ("both", "raw", "input"),
        ("both", "norm", "input"),
        ("both", "norm", "noisy"),
    ],
)


def build(target: str = "norm", config: AutoencoderConfig = CONFIG) -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Autoencoder(replace(config, target=target)).double().eval().requires_grad_(False)


def pixels(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(BATCH, 2, 8, 12, generator=torch.Generator().manual_seed(1), dtype=dtype)


def levels(degrade: str, value: float) -> Tensor | None:
    return None if degrade == "mask" else torch.full((BATCH,), value)


def to_patches(images: Tensor) -> Tensor:
    tiles = images.unfold(-2, 4, 4).unfold(-2, 4, 4)  # (B, C, rows, columns, P, P)
    return tiles.permute(0, 2, 3, 4, 5, 1).reshape(len(images), 6, 32)


def to_pixels(patches: Tensor) -> Tensor:
    return patches.view(-1, *GRID, 4, 4, 2).permute(0, 5, 1, 3, 2, 4).reshape(-1, 2, 8, 12)


def by_hand(
    model: Autoencoder, images: Tensor, sigma: Tensor | None, seeds: Tensor, degrade: str, statistics: str, ratio: float
) -> Tensor:
    """One level and one draw in plain float64, from the text of the method."""
    mean, std = (torch.tensor(value, dtype=torch.float64).view(-1, 1, 1) for value in (CONFIG.mean, CONFIG.std))
    degraded = images
    if sigma is not None:
        noise = normal_noise(seeds, (8, 12, 2)).permute(0, 3, 1, 2).double()
        degraded = images + sigma.double().view(-1, 1, 1, 1) / 255 * noise
    patches = to_patches((degraded - mean) / std)
    mask = None if degrade == "noise" else Mask.random(seeds, 6, ratio)
    predicted = model(patches, mask)
    if model.config.target == "norm" and statistics == "input":
        clean = to_patches((images - mean) / std)
        predicted = predicted * (clean.var(-1, keepdim=True) + 1e-6).sqrt() + clean.mean(-1, keepdim=True)
    elif model.config.target == "norm":
        added = (sigma.double() / 255).square().view(-1, 1, 1) * (1 / std.square()).mean()
        excess = patches.var(-1, keepdim=True) - added
        variance = (excess + (excess.square() + 4 * (added.square() * 2 / 31 + 1e-12)).sqrt()) / 2
        predicted = predicted * (variance + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    rebuilt = (to_pixels(predicted) * std + mean).clamp(0, 1)
    if degrade == "mask":
        hidden = to_pixels(mask.hidden[..., None].expand(-1, -1, 32).double()) > 0
        rebuilt = torch.where(hidden, rebuilt, images)
    return rebuilt


@CASES
def test_is_the_method_step_by_step(degrade, target, statistics):
    model, sigma = build(target), levels(degrade, 70.0)
    rebuilt = reconstruct(model, pixels(), sigma, SEEDS, degrade=degrade, mask_ratio=0.6, statistics=statistics)
    expected = by_hand(model, pixels(), sigma, SEEDS, degrade, statistics, 0.6)
    # float64 throughout, the noise alone float32 and the same on both sides: 1e-12 is a thousand roundings.
    torch.testing.assert_close(rebuilt, expected, rtol=0, atol=1e-12)
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1


@CASES
def test_levels_and_draws_in_one_pass_are_the_single_ones(degrade, target, statistics):
    model = build(target)
    draws = torch.stack((SEEDS, SEEDS + 1))
    options = {"degrade": degrade, "mask_ratio": 0.6, "statistics": statistics}
    stack = None if degrade == "mask" else torch.tensor([[0.0, 1.0, 2.0], [30.0, 40.0, 50.0], [140.0, 100.0, 70.0]])
    for sigma in [None] if stack is None else [stack[1], stack]:
        several = sigma is not None and sigma.dim() == 2
        for seeds in (SEEDS, draws):
            rebuilt = reconstruct(model, pixels(), sigma, seeds, **options)
            lead = (3,) * several + (2,) * (seeds.dim() == 2)
            assert rebuilt.shape == (*lead, BATCH, 2, 8, 12)
            single = [
                reconstruct(model, pixels(), level, draw, **options)
                for level in (sigma if several else [sigma])
                for draw in seeds.view(-1, BATCH)
            ]
            # The batch of the matrix products differs, and with it float64 rounding.
            torch.testing.assert_close(rebuilt.view(-1, BATCH, 2, 8, 12), torch.stack(single), rtol=0, atol=1e-12)


@CASES
def test_an_image_is_rebuilt_the_same_in_any_batch(degrade, target, statistics):
    model, sigma = build(target), levels(degrade, 70.0)
    options = {"degrade": degrade, "mask_ratio": 0.6, "statistics": statistics}
    together = reconstruct(model, pixels(), sigma, SEEDS, **options)
    order = torch.tensor([2, 0])
    apart = reconstruct(model, pixels()[order], None if sigma is None else sigma[order], SEEDS[order], **options)
    torch.testing.assert_close(apart, together[order], rtol=0, atol=1e-12)


@pytest.mark.slow
@CASES
def test_gradient_for_pixels(degrade, target, statistics):
    config = AutoencoderConfig((4, 4), 2, 8, 1, 2, 8, 1, 2, mean=(0.45,), std=(0.25,))
    model = build(target, config)
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    sigma = None if degrade == "mask" else torch.tensor([20.0, 60.0])

    def rebuild(x):
        return reconstruct(
            model, x, sigma, torch.stack((SEEDS[:2], SEEDS[1:])), degrade=degrade, mask_ratio=0.5, statistics=statistics
        )

    rebuilt = rebuild(images)
    assert ((rebuilt > 0) & (rebuilt < 1)).double().mean() > 0.2  # the clamp leaves something to check
    assert torch.autograd.gradcheck(rebuild, images)


def test_visible_pixels_are_kept_exactly():
    model, images = build().float(), pixels(torch.float32)
    draws = torch.stack((SEEDS, SEEDS + 1))
    rebuilt = reconstruct(model, images, None, draws, degrade="mask", mask_ratio=0.5)
    for draw in range(2):
        hidden = Mask.random(draws[draw], 6, 0.5).hidden
        same = to_patches((rebuilt[draw] == images).float()).bool().all(dim=-1)
        assert torch.equal(same, ~hidden)


@CASES
def test_uint8_images_are_the_same_images(degrade, target, statistics):
    model = build(target).float()
    images = (pixels() * 255).round().to(torch.uint8)
    options = {"degrade": degrade, "statistics": statistics, "mask_ratio": 0.5}
    from_bytes = reconstruct(model, images.permute(0, 2, 3, 1).contiguous(), levels(degrade, 70.0), SEEDS, **options)
    from_floats = reconstruct(model, images.float() / 255, levels(degrade, 70.0), SEEDS, **options)
    assert from_bytes.dtype == torch.float32
    torch.testing.assert_close(from_bytes, from_floats, rtol=0, atol=1e-6)  # values in [0, 1], a few units of 6e-8


def classifier(**changes) -> Classifier:
    # Other statistics than the denoiser's, and exact in float32, in which the classifier keeps them.
    config = replace(ClassifierConfig.for_encoder(CONFIG, 3), mean=(0.375, 0.5), std=(0.25, 0.3125))
    with torch.random.fork_rng(devices=[]):
        return Classifier(replace(config, **changes)).double().eval()


@CASES
@pytest.mark.parametrize("layout", ["float", "uint8"])
def test_patches_for_a_classifier_are_the_rebuilt_pixels_normalised(degrade, target, statistics, layout):
    model, images, reader = build(target), pixels(), classifier()
    if layout == "uint8":
        images = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    draws = torch.stack((SEEDS, SEEDS + 1))
    given = (images, levels(degrade, 70.0), draws)
    options = {"degrade": degrade, "mask_ratio": 0.5, "statistics": statistics}
    patches = reconstruct(model, *given, **options, classifier=reader)
    rebuilt = reconstruct(model, *given, **options)
    assert patches.shape == (2, BATCH, 6, 32)
    normalised = (rebuilt.double() - reader.mean) / reader.std
    expected = to_patches(normalised.flatten(0, 1)).view(patches.shape)
    # Visible bytes are divided by 255 in float32.
    tolerance = 1e-6 if layout == "uint8" else 1e-12
    torch.testing.assert_close(patches, expected, rtol=0, atol=tolerance)
    assert patches.dtype == torch.float64
    assert reconstruct(model, *given, **options, classifier=reader.float()).dtype == torch.float32


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(
    ("degrade", "statistics"), [("noise", "input"), ("noise", "noisy"), ("both", "input"), ("mask", "input")]
)
def test_patches_are_in_the_dtype_in_which_the_denoiser_computes(operators, degrade, statistics, autocast):
    model, given = build().float(), []
    encode = model.encode
    model.encode = lambda patches, mask: given.append(patches) or encode(patches, mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), operators() as calls:
        rebuilt = reconstruct(
            model, pixels(torch.float32), levels(degrade, 70.0), SEEDS, degrade=degrade, statistics=statistics
        )
    dtype = torch.bfloat16 if autocast else torch.float32
    assert [patches.dtype for patches in given] == [dtype]
    assert [call.args[-1] for call in calls["denim.noise_patchify.default"]] == [dtype]
    assert rebuilt.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 2}, r"patches of 4 in images of \(8, 12\) with 2 channels, the classifier of 2 in \(8, 12\)"),
        ({"img_size": (8, 8)}, r"the classifier of 4 in \(8, 8\) with 2; hand it pixels"),
        ({"mean": (0.5,), "std": (0.5,)}, "2 channels, the classifier of .* with 1"),
    ],
)
def test_refuses_patches_for_a_classifier_of_others(change, words):
    with pytest.raises(ValueError, match=words):
        reconstruct(build(), pixels(), levels("noise", 70.0), SEEDS, classifier=classifier(**change))


def test_statistics_have_no_effect_on_a_raw_target():
    model = build(target="raw")
    results = [
        reconstruct(model, pixels(), levels("noise", 70.0), SEEDS, statistics=statistics)
        for statistics in ("input", "noisy")
    ]
    assert torch.equal(*results)


def test_the_global_generator_is_left_alone(global_rng_untouched):
    for degrade in ("noise", "mask", "both"):
        reconstruct(build(), pixels(), levels(degrade, 70.0), SEEDS, degrade=degrade)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"degrade": "blur"}, "degrade must be one of noise, mask, both, got 'blur'"),
        ({"statistics": "clean"}, 'statistics must be "input" or "noisy"'),
        ({"sigma": None}, "degrade='noise' needs a sigma"),
        ({"degrade": "mask"}, "degrade='mask' takes no sigma"),
        ({"degrade": "mask", "sigma": None, "statistics": "noisy"}, 'statistics="noisy" needs noise'),
        ({"degrade": "both", "mask_ratio": 1.0}, "mask ratio 1.0 leaves 0 of 6"),
        ({"images": torch.zeros(3, 2, 8, 8)}, r"takes images of \(8, 12\), got \(8, 8\)"),
        ({"images": torch.zeros(3, 1, 8, 12)}, "2 channels"),
        ({"images": torch.zeros(2, 8, 12)}, "takes images of"),
        ({"images": torch.zeros(3, 8, 12, dtype=torch.uint8)}, r"must have shape \(B, H, W, C\)"),
        ({"sigma": torch.ones(2)}, r"sigma must have shape \(3,\)"),
        ({"seeds": SEEDS[:1]}, r"seeds must have shape \(3,\)"),
        ({"seeds": SEEDS[:1], "degrade": "mask", "sigma": None}, r"seeds must have shape \(3,\) or \(R, 3\)"),
        ({"seeds": SEEDS[:2], "degrade": "mask", "sigma": None}, r"seeds must have shape \(3,\) or \(R, 3\)"),
        ({"seeds": SEEDS.view(1, 1, 3), "degrade": "mask", "sigma": None}, r"seeds must have shape"),
    ],
)
def test_refuses(change, message):
    given = {"images": pixels(), "sigma": levels("noise", 70.0), "seeds": SEEDS} | change
    with pytest.raises(ValueError, match=message):
        reconstruct(build(), given.pop("images"), given.pop("sigma"), given.pop("seeds"), **given)


@pytest.mark.parametrize("degrade", ["noise", "mask"])
def test_refuses_seeds_of_another_dtype(degrade):
    with pytest.raises(TypeError, match="seeds must be int64"):
        reconstruct(build(), pixels(), levels(degrade, 70.0), SEEDS.int(), degrade=degrade)


# ----------------------------------------------------------------------------------------------------- noise alone


@pytest.mark.parametrize("layout", ["float", "uint8"])
def test_noise_is_added_in_pixels_and_not_clipped(layout):
    images = (pixels() * 255).round() / 255
    given = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1) if layout == "uint8" else images
    sigma, draws = torch.tensor([[0.0, 0.0, 0.0], [70.0, 100.0, 200.0]]), torch.stack((SEEDS, SEEDS + 1))
    noisy = add_noise(given, sigma, draws)
    noise = normal_noise(draws, (8, 12, 2)).permute(0, 1, 4, 2, 3).double()
    expected = images + sigma.double().view(2, 1, 3, 1, 1, 1) / 255 * noise
    assert noisy.shape == (2, 2, 3, 2, 8, 12)
    # uint8 goes through float32: values below 5, units of 2.4e-7.
    torch.testing.assert_close(noisy.double(), expected, rtol=0, atol=1e-12 if layout == "float" else 1e-6)
    assert noisy.min() < 0
    assert noisy.max() > 1


def test_noise_on_black_at_255_is_the_noise():
    noisy = add_noise(torch.zeros(3, 2, 8, 12), torch.full((3,), 255.0), SEEDS)
    assert torch.equal(noisy, normal_noise(SEEDS, (8, 12, 2)).permute(0, 3, 1, 2))


def test_noise_passes_gradients_through():
    images = pixels().requires_grad_()
    weight = torch.rand(2, BATCH, 2, 8, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (add_noise(images, torch.full((2, 3), 50.0), SEEDS) * weight).sum().backward()
    torch.testing.assert_close(images.grad, weight.sum(dim=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(8, 12, 2, dtype=torch.uint8), ValueError, r"images must be .* got \(8, 12, 2\)"),
        (torch.zeros(2, 8, 12), ValueError, r"images must be .* got \(2, 8, 12\)"),
        (torch.zeros(3, 2, 8, 12, dtype=torch.int32), TypeError, "uint8"),
        (torch.zeros(2, 2, 8, 12), ValueError, r"sigma must have shape \(2,\)"),
    ],
)
def test_noise_refuses(images, error, message):
    with pytest.raises(error, match=message):
        add_noise(images, torch.full((3,), 70.0), SEEDS)
