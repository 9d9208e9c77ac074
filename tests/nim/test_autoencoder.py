from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from denim.kernels import normalized_patches
from denim.nim.autoencoder import PRESETS, Autoencoder, AutoencoderConfig, Mask, preset

TINY = AutoencoderConfig((12, 20), 4, 32, 2, 4, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3))


def build(config: AutoencoderConfig = TINY, seed: int = 0) -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(config)


def patches_for(config: AutoencoderConfig, batch: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, config.num_patches, config.patch_dim, generator=generator, dtype=dtype)


@pytest.mark.slow
def test_published_sizes():
    # Million parameters with the decoder and the fixed positions, summed from the published architecture by hand below,
    # and as the published code counts them.
    for name, millions in {"base": 111.91, "large": 329.54, "huge": 657.07}.items():
        config = PRESETS[name]
        with FakeTensorMode():  # shapes alone
            count = sum(parameter.numel() for parameter in Autoencoder(config).parameters())

        def block(width):
            return 12 * width**2 + 13 * width  # qkv, projection, two MLP layers, their biases, two LayerNorms

        w, d, tokens = config.embed_dim, config.decoder_embed_dim, config.num_patches + 1
        encoder = (config.patch_dim + 1) * w + w + tokens * w + config.depth * block(w) + 2 * w
        decoder = (w + 1) * d + d + tokens * d + config.decoder_depth * block(d) + 2 * d + (d + 1) * config.patch_dim
        assert count == encoder + decoder
        assert round(count / 1e6, 2) == millions


@settings(max_examples=20, deadline=None)
@given(
    patch_size=st.integers(1, 5),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    channels=st.integers(1, 5),
    batch=st.integers(1, 3),
)
def test_any_image_size_patch_and_number_of_channels(patch_size, rows, columns, channels, batch):
    size = (rows * patch_size, columns * patch_size)
    config = AutoencoderConfig(size, patch_size, 8, 1, 2, 8, 1, 2, mean=(0.5,) * channels, std=(0.25,) * channels)
    patches = normalized_patches(
        torch.full((batch, channels, *size), 0.3), patch_size=patch_size, mean=config.mean, std=config.std
    )
    model = build(config)
    predicted = model(patches)
    assert predicted.shape == patches.shape == (batch, rows * columns, patch_size**2 * channels)
    assert predicted.isfinite().all()
    if rows * columns > 1:
        mask = Mask.random(torch.arange(batch), rows * columns, 0.5)
        assert model(patches, mask).shape == patches.shape


def test_encoder_equals_a_plain_timm_vit():
    model = build().double()
    vit = VisionTransformer(
        img_size=TINY.img_size,
        patch_size=TINY.patch_size,
        in_chans=2,
        num_classes=0,
        embed_dim=TINY.embed_dim,
        depth=TINY.depth,
        num_heads=TINY.num_heads,
    ).double()
    vit.load_state_dict({name: model.state_dict()[name] for name in vit.state_dict()})
    pixels = torch.rand(3, 2, *TINY.img_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(value, dtype=torch.float64).view(-1, 1, 1) for value in (TINY.mean, TINY.std))
    patches = normalized_patches(pixels, patch_size=TINY.patch_size, mean=TINY.mean, std=TINY.std)
    # float64 through a few dozen operations on values of size one: 1e-12 is a thousand times its rounding.
    torch.testing.assert_close(model.encode(patches), vit.forward_features((pixels - mean) / std), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 2)])
def test_positions_are_sines_and_cosines_of_column_then_row(grid):
    rows, columns, patch_size, width = *grid, 2, 16
    config = AutoencoderConfig(
        (rows * patch_size, columns * patch_size), patch_size, width, 1, 2, width, 1, 2, mean=(0.5,), std=(0.5,)
    )
    expected = torch.zeros(1, rows * columns + 1, width, dtype=torch.float64)  # the class token's are zero
    for row in range(rows):
        for column in range(columns):
            # He et al. 2022, released code: quarter by quarter, frequencies 10000^(-4 i / width).
            frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) * 4 / width)
            expected[0, 1 + row * columns + column] = torch.cat(
                [f(place * frequencies) for place in (column, row) for f in (torch.sin, torch.cos)]
            )
    model = build(config)
    for positions in (model.pos_embed, model.decoder_pos_embed):
        # Values up to one in float32, from angles below 5: a few units of 6e-8.
        torch.testing.assert_close(positions.double(), expected, rtol=0, atol=1e-6)
        assert not positions.requires_grad


def test_gradient_reaches_every_trainable_parameter():
    model = build()
    patches = patches_for(TINY)
    model(patches).square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"pos_embed", "decoder_pos_embed", "mask_token"}
    model(patches, Mask.random(torch.arange(3), TINY.num_patches, 0.5)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_initial_weights():
    config = replace(TINY, embed_dim=128, decoder_embed_dim=96)
    model = build(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.flatten(1)  # the patch projection counts as a linear
            bound = math.sqrt(6 / sum(weight.shape))  # Glorot and Bengio 2010, equation 16
            assert weight.abs().max() <= bound, name
            # A uniform's sample deviation has a relative standard error of sqrt(0.2 / n): five of them.
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=5 * math.sqrt(0.2 / weight.numel()))
            assert (module.bias == 0).all(), name
    for token in (model.cls_token, model.mask_token):
        # A normal's has sqrt(1 / (2 n)).
        assert token.std().item() == pytest.approx(0.02, rel=5 * math.sqrt(0.5 / token.numel()))


# ------------------------------------------------------------------------------------------------------------- masks


@settings(max_examples=50, deadline=None)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    length=st.integers(2, 50),
    ratio=st.floats(0.01, 0.99),
)
def test_mask_hides_an_exact_number_as_a_function_of_the_seed_alone(seeds, length, ratio):
    visible = int(length * (1 - ratio))
    numbers = torch.tensor(seeds)
    if visible == 0 or visible == length:
        with pytest.raises(ValueError, match="mask ratio"):
            Mask.random(numbers, length, ratio)
        return
    mask = Mask.random(numbers, length, ratio)
    assert mask.visible == visible
    assert torch.equal(mask.order.sort(dim=1).values, torch.arange(length).expand(len(seeds), -1))
    assert (mask.hidden.sum(dim=1) == length - visible).all()
    for row in range(len(seeds)):
        alone = Mask.random(numbers[row : row + 1], length, ratio)
        assert torch.equal(alone.order[0], mask.order[row])
        assert not mask.hidden[row, mask.order[row, :visible]].any()


def test_mask_hides_every_patch_equally_often():
    hidden = Mask.random(torch.arange(20_000), 16, 0.75).hidden.double().mean(dim=0)
    # The share of 20,000 has a standard error of sqrt(0.75 * 0.25 / 20000) = 0.0031: five of them, for 16 patches.
    assert (hidden - 0.75).abs().max() < 5 * 0.0031


def test_masked_prediction_depends_on_visible_patches_alone():
    model, patches = build(), patches_for(TINY)
    mask = Mask.random(torch.arange(3), TINY.num_patches, 0.6)
    changed = torch.where(mask.hidden[..., None], torch.full_like(patches, 1e3), patches)
    assert torch.equal(model(changed, mask), model(patches, mask))
    changed = patches.clone()
    first = mask.order[0, 0]
    changed[0, first] += 1
    difference = (model(changed, mask) - model(patches, mask)).abs().amax(dim=(1, 2))
    assert difference[0] > 1e-3
    assert (difference[1:] == 0).all()


def test_visible_patches_alone_are_embedded(monkeypatch):
    model, patches = build().double(), patches_for(TINY, dtype=torch.float64)
    mask = Mask.random(torch.arange(3), TINY.num_patches, 0.6)
    embed, seen = model._embed, []
    monkeypatch.setattr(model, "_embed", lambda given: seen.append(given) or embed(given))
    encoded = model.encode(patches, mask)
    assert [tuple(given.shape) for given in seen] == [(3, mask.visible, TINY.patch_dim)]
    # All are embedded, and the hidden ones dropped.
    tokens = embed(patches) + model.pos_embed[:, 1:]
    tokens = tokens.gather(1, mask.order[:, : mask.visible, None].expand(-1, -1, TINY.embed_dim))
    first = (model.cls_token + model.pos_embed[:, :1]).expand(3, -1, -1)
    expected = model.norm(nn.Sequential(*model.blocks)(torch.cat((first, tokens), dim=1)))
    torch.testing.assert_close(encoded, expected, rtol=0, atol=1e-12)


def test_a_mask_that_hides_nothing_changes_nothing():
    # Attention does not care in which order tokens come, so any order must land where the positions say.
    model, patches = build().double(), patches_for(TINY, dtype=torch.float64)
    order = Mask.random(torch.arange(3), TINY.num_patches, 0.5).order
    torch.testing.assert_close(model(patches, Mask(order, TINY.num_patches)), model(patches), rtol=0, atol=1e-12)


def test_hidden_patches_are_decoded_from_the_mask_token():
    model, patches = build().double(), patches_for(TINY, dtype=torch.float64)
    mask = Mask.random(torch.arange(3), TINY.num_patches, 0.6)
    tokens = model.encode(patches, mask)
    assert tokens.shape == (3, 1 + mask.visible, TINY.embed_dim)
    # Decoding all tokens, those of hidden patches chosen so that the embedding takes them to the mask token.
    wanted = (model.mask_token - model.decoder_embed.bias).view(-1, 1)
    hidden = torch.linalg.lstsq(model.decoder_embed.weight, wanted, driver="gelsd").solution.view(1, 1, -1)
    full = hidden.expand(3, TINY.num_patches, -1).clone()
    for row in range(3):
        full[row, mask.order[row, : mask.visible]] = tokens[row, 1:]
    by_hand = model.decode(torch.cat((tokens[:, :1], full), dim=1))
    torch.testing.assert_close(model.decode(tokens, mask), by_hand, rtol=0, atol=1e-10)


def test_autocast_with_a_mask():
    model, patches = build(), patches_for(TINY)
    mask = Mask.random(torch.arange(3), TINY.num_patches, 0.5)
    expected = model(patches, mask)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(patches, mask)
    predicted.float().square().mean().backward()
    # bfloat16 keeps 8 bits, 4e-3 per operation; predictions are of size one.
    assert (predicted.float() - expected).abs().max() < 0.1
    assert model.mask_token.grad.isfinite().all()


# --------------------------------------------------------------------------------------------------- clear refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": (30, 32)}, r"multiples of the patch size 16.*\(30, 32\)"),
        ({"img_size": (0, 32)}, "multiples of the patch size"),
        ({"img_size": (32, 32, 32)}, "two multiples"),
        ({"patch_size": 0}, "patch_size must be a positive integer, got 0"),
        ({"patch_size": 16.0}, "patch_size must be a positive integer"),
        ({"num_heads": 0}, "num_heads must be a positive integer"),
        ({"depth": -1}, "depth must be a positive integer"),
        ({"decoder_depth": "8"}, "decoder_depth must be a positive integer, got '8'"),
        ({"num_heads": 7}, "embed_dim 768 must be a multiple of num_heads 7"),
        ({"decoder_num_heads": 3}, "decoder_embed_dim 512 must be a multiple of decoder_num_heads 3"),
        ({"embed_dim": 6, "num_heads": 3}, "and of 4"),
        ({"mean": (0.5,)}, "one finite value per channel"),
        ({"mean": (), "std": ()}, "one finite value per channel"),
        ({"mean": (0.5, float("nan"), 0.5)}, "one finite value per channel"),
        ({"std": (0.2, 0.0, 0.2)}, "std > 0"),
        ({"std": (0.2, float("nan"), 0.2)}, "std > 0"),
        ({"objective": "jepa"}, "nim, mae or dmae, got 'jepa'"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**change)


def test_presets():
    assert preset("micro") == PRESETS["micro"]
    assert preset("tiny", img_size=64, patch_size=8).grid_size == (8, 8)
    assert preset("micro", channels=3).mean == (0.485, 0.456, 0.406)
    assert preset("base", channels=1).std == (0.25,)
    assert preset("base", channels=1, mean=(0.1,), std=(0.2,)).std == (0.2,)
    assert preset("base", channels=1, std=(0.2,)).std == (0.2,)
    with pytest.raises(
        ValueError, match="unknown preset 'giant'; choose one of micro, mini, tiny, small, base, large, huge"
    ):
        preset("giant")
    with pytest.raises(ValueError, match="3 channels need one mean and std each"):
        preset("micro", channels=3, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="multiples of the patch size"):
        preset("base", img_size=100)


@pytest.mark.parametrize("shape", [(3, 15), (3, 1, 32), (3, 14, 32), (3, 15, 16), (1, 3, 15, 32)])
def test_patches_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"patches must have shape \(N, 15, 32\)"):
        build()(torch.zeros(shape))


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, 0.99])
def test_mask_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match=f"mask ratio {ratio}"):
        Mask.random(torch.arange(2), 16, ratio)


@pytest.mark.parametrize("name", PRESETS)
def test_heads_of_presets_suit_xformers_in_half_precision(name):
    config = PRESETS[name]
    assert config.embed_dim // config.num_heads % 8 == 0
    assert config.decoder_embed_dim // config.decoder_num_heads % 8 == 0
