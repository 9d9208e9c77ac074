from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from denim.kernels import Domain, derive_seeds, normalized_patches
from denim.nim.autoencoder import Autoencoder, AutoencoderConfig
from denim.nim.classifier import Classifier, ClassifierConfig, check_logits

BODY = AutoencoderConfig((12, 20), 4, 32, 2, 4, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3))
POOLS = pytest.mark.parametrize("pool", ["avg", "token"])


def build(seed: int = 0, **changes) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(ClassifierConfig.for_encoder(BODY, 7, **changes)).eval()


def encoder(seed: int = 1, config: AutoencoderConfig = BODY) -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(config)
        torch.nn.init.normal_(model.norm.weight)  # with all ones a missing norm weight would not show
        return model


def pixels(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(3, 2, *BODY.img_size, generator=torch.Generator().manual_seed(2), dtype=dtype)


def snapshot(model: Classifier) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@POOLS
def test_logits_are_those_of_a_timm_vit_on_normalised_images(pool):
    model = build(global_pool=pool)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(3))
    vit = VisionTransformer(
        img_size=(12, 20), patch_size=4, in_chans=2, num_classes=7, global_pool=pool, embed_dim=32, depth=2, num_heads=4
    ).eval()
    vit.load_state_dict(model.state_dict())  # strict: the very same names
    normalised = (pixels() - torch.tensor(BODY.mean).view(-1, 1, 1)) / torch.tensor(BODY.std).view(-1, 1, 1)
    assert torch.equal(model(pixels()), vit(normalised))


@POOLS
def test_patches_give_the_logits_and_gradients_of_their_pixels(pool):
    # Statistics that float32, in which the classifier keeps them, has exactly.
    model = build(global_pool=pool).double().requires_grad_(False)
    model.config = replace(model.config, mean=(0.375, 0.5), std=(0.25, 0.3125))
    for name in ("mean", "std"):
        getattr(model, name).copy_(torch.tensor(getattr(model.config, name)).view(-1, 1, 1))
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(3))
    torch.nn.init.normal_(model.patch_embed.proj.bias, generator=torch.Generator().manual_seed(4))
    model.patch_embed.proj.requires_grad_()
    images = pixels(torch.float64).requires_grad_()
    patches = normalized_patches(images, patch_size=4, mean=model.config.mean, std=model.config.std)
    inputs = (images, *model.patch_embed.proj.parameters())
    results = []
    for logits in (model(images), model.forward_patches(patches)):
        assert logits.abs().max() > 1
        results.append((logits, *torch.autograd.grad(logits.square().sum(), inputs)))
    # Sums of 32 products in another order, float64.
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_patches_go_through_what_pixels_go_through():
    """Drop path in training, and checkpointing of activations, which comes with timm's own forward."""
    model = build(drop_path=0.5).train()
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(3))
    patches = normalized_patches(pixels(), patch_size=4, mean=BODY.mean, std=BODY.std)
    first, second = (derive_seeds(0, Domain.AUGMENT, torch.arange(3), epoch) for epoch in range(2))
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        logits = model.forward_patches(patches, first)
        torch.testing.assert_close(logits, model(pixels(), first), rtol=1e-4, atol=1e-4)  # logits of some ten, float32
        assert not torch.allclose(logits, model.forward_patches(patches, second), rtol=1e-2, atol=1e-2)


def test_patch_dtype_is_what_the_embedding_multiplies():
    model = build()
    patches = normalized_patches(pixels(), patch_size=4, mean=BODY.mean, std=BODY.std)
    assert model.patch_dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.patch_dtype == torch.bfloat16
        # Patches are rounded to the same numbers, beforehand or by autocast.
        assert torch.equal(model.forward_patches(patches.bfloat16()), model.forward_patches(patches))
        assert model.double().patch_dtype == torch.float64, "autocast leaves float64 alone"
        assert model.forward_patches(patches.double()).dtype == torch.float64
    assert model.half().patch_dtype == torch.float16


@pytest.mark.parametrize("shape", [(3, 15, 31), (3, 14, 32), (15, 32), (3, 2, 12, 20)])
def test_refuses_patches_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"patches must have shape \(B, 15, 32\), got \(" + str(shape[0])):
        build().forward_patches(torch.zeros(shape))


def test_initial_head_is_next_to_zero():
    model = build()
    # 224 draws of N(0, 2e-5): the deviation's relative standard error is sqrt(1 / 448); five of them.
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=5 * (1 / 448) ** 0.5)
    assert (model.head.bias == 0).all()
    assert model.pos_embed.requires_grad


# ---------------------------------------------------------------------------------------------------------- the encoder


@POOLS
def test_takes_the_encoder_of_an_autoencoder(pool):
    source, model = encoder().double(), build(global_pool=pool).double()
    head, fc_norm = model.head.weight.clone(), model.fc_norm.state_dict()
    model.load_encoder(source.state_dict())
    patches = normalized_patches(pixels(torch.float64), patch_size=4, mean=BODY.mean, std=BODY.std)
    normalised = (pixels(torch.float64) - model.mean) / model.std
    features = model.forward_features(normalised)
    if pool == "token":
        expected = source.encode(patches)
    else:  # the published mean pool drops the encoder's final norm
        source.norm = torch.nn.Identity()
        expected = source.encode(patches)
    # mean and std are float32 in the classifier: 1e-8 of values up to ten.
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert torch.equal(model.head.weight, head)
    assert all(torch.equal(value, fc_norm[name]) for name, value in model.fc_norm.state_dict().items())


@POOLS
def test_takes_the_body_of_a_classifier(pool):
    source, model = build(5, global_pool="token"), build(global_pool=pool)
    model.load_encoder(source.state_dict())
    for name in ("patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.1.mlp.fc2.bias"):
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])
    assert not torch.equal(model.head.weight, source.head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.qkv.bias": None}, r"1 weights missing, first \['blocks.1.attn.qkv.bias'\]"),
        ({"pos_embed": torch.zeros(1, 17, 32)}, r"pos_embed has shape \(1, 17, 32\), expected \(1, 16, 32\)"),
        ({"blocks.0.ls1.gamma": torch.ones(32)}, r"1 weights unknown, first \['blocks.0.ls1.gamma'\]"),
        ({"reg_token": torch.ones(1, 4, 32)}, "1 weights unknown"),
        ({"blocks.2.norm1.weight": torch.ones(32)}, "1 weights unknown"),
    ],
)
def test_refuses_another_encoder_and_changes_nothing(change, message):
    state = {**encoder().state_dict(), **change}
    state = {name: value for name, value in state.items() if value is not None}
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.load_encoder(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_token_pool_needs_the_final_norm():
    state = {name: value for name, value in encoder().state_dict().items() if not name.startswith("norm.")}
    build(global_pool="avg").load_encoder(state)
    with pytest.raises(ValueError, match="2 weights missing"):
        build(global_pool="token").load_encoder(state)


# ----------------------------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_pool": "max"}, "global_pool must be avg or token, got 'max'"),
        ({"num_classes": 0}, "num_classes must be a positive integer, got 0"),
        ({"img_size": (225, 224)}, "multiples of the patch size 16"),
        ({"patch_size": 0}, "patch_size must be a positive integer"),
        ({"num_heads": 5}, "embed_dim 768 must be a multiple of num_heads 5"),
        ({"mean": (0.5,)}, "one finite value per channel"),
        ({"std": (0.2, -0.2, 0.2)}, "std > 0"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"classes": ("cat", "dog")}, "2 class names for 1000 classes"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**change)


def test_config_for_an_encoder():
    config = ClassifierConfig.for_encoder(BODY, 2, classes=["cat", "dog"], trained_on="noise, raw target")
    assert (config.embed_dim, config.depth, config.num_heads, config.mean) == (32, 2, 4, (0.4, 0.5))
    assert config.classes == ("cat", "dog")
    assert replace(config, img_size=[24, 20]).img_size == (24, 20)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_logits_that_are_not_finite_are_named_by_their_images(shape):
    logits, ids = torch.zeros(shape), torch.tensor([7, -(2**60), 9])
    check_logits(logits, ids)
    logits[..., 1, 4] = float("nan")
    logits[..., 2, 0] = -float("inf")
    with pytest.raises(FloatingPointError, match=rf"2 of 3 images are not finite \(sample ids {-(2**60)}, 9\)"):
        check_logits(logits, ids)
    check_logits(logits[..., :0, :], ids[:0])
