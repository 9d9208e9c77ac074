"""Drop path as a function of seeds: which samples drop what, in which batch, compiled and computed again."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer

from denim.kernels import Domain, Stream, derive_seeds, noise_words
from denim.nim.classifier import Classifier, ClassifierConfig
from denim.nim.drop_path import KeyedDropPath, draw_drop_path, key_drop_path

CONFIG = ClassifierConfig(
    7, (12, 20), patch_size=4, embed_dim=32, depth=4, num_heads=4, mean=(0.4, 0.5), std=(0.2, 0.3), drop_path=0.6
)
SEEDS = derive_seeds(0, Domain.AUGMENT, torch.arange(6))


def build(**changes) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(replace(CONFIG, **changes))
        torch.nn.init.normal_(model.head.weight)  # the initial head is next to zero: no difference would show
    return model.train()


def pixels(count: int = len(SEEDS)) -> torch.Tensor:
    return torch.rand(count, 2, *CONFIG.img_size, generator=torch.Generator().manual_seed(1))


def layers(model) -> list[KeyedDropPath]:
    return [module for module in model.modules() if isinstance(module, KeyedDropPath)]


def scales(model) -> torch.Tensor:
    return torch.stack([layer.scale[:, 0, 0] for layer in layers(model)])


def test_rates_and_weights_are_timms():
    model = build()
    vit = VisionTransformer(
        img_size=(12, 20), patch_size=4, in_chans=2, num_classes=7, global_pool="avg", embed_dim=32, depth=4,
        num_heads=4, drop_path_rate=0.6,
    )  # fmt: skip
    theirs = {name: module.drop_prob for name, module in vit.named_modules() if isinstance(module, DropPath)}
    ours = {name: module.rate for name, module in model.named_modules() if isinstance(module, KeyedDropPath)}
    assert ours == theirs
    assert len(ours) == 6  # of four blocks the first has none
    assert model.state_dict().keys() == vit.state_dict().keys()
    assert not any(isinstance(module, DropPath) for module in model.modules())


def test_a_pass_is_timms_with_the_same_samples_dropped(monkeypatch):
    """timm's own blocks and its own `drop_path`, whose generator answers with the choice by seeds."""
    model = build()
    logits = model(pixels(), SEEDS)
    kept = (scales(model) > 0).float()
    assert 0 < kept.mean() < 1
    vit = VisionTransformer(
        img_size=(12, 20), patch_size=4, in_chans=2, num_classes=7, global_pool="avg", embed_dim=32, depth=4,
        num_heads=4, drop_path_rate=0.6,
    ).train()  # fmt: skip
    vit.load_state_dict(model.state_dict())
    answers = iter(kept)
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, p: self.copy_(next(answers).view_as(self)))
    expected = vit((pixels() - model.mean) / model.std)
    assert next(answers, None) is None
    # Another attention kernel and another order of two products, float32 logits of some ten.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_choice_is_a_function_of_the_seed():
    model = build()
    model(pixels(), SEEDS)
    whole = scales(model)
    words = noise_words(SEEDS, 6, Stream.DROP_PATH).double() / 2**32
    for number, layer in enumerate(layers(model)):
        expected = (words[:, number] >= layer.rate).double() / (1 - layer.rate)
        torch.testing.assert_close(whole[number].double(), expected, rtol=1e-7, atol=0)
    for rows in (slice(1, 2), slice(2, 6)):
        model(pixels()[rows], SEEDS[rows])
        assert torch.equal(scales(model), whole[:, rows])
    model(pixels().flip(0), SEEDS.flip(0))
    assert torch.equal(scales(model), whole.flip(1))


def test_shares_of_dropped_samples():
    """4000 samples: each share within five standard errors of the rate, and two layers independent."""
    drop = key_drop_path(torch.nn.Sequential(DropPath(0.1), torch.nn.Sequential(DropPath(0.35)), torch.nn.ReLU()))
    rates = torch.tensor([layer.rate for layer in drop], dtype=torch.float64)
    seeds = derive_seeds(3, Domain.AUGMENT, torch.arange(4000))
    draw_drop_path(drop, (rates * 2**32).long(), 1 / (1 - rates), seeds)
    dropped = torch.stack([layer.scale.flatten() == 0 for layer in drop]).double()
    error = 5 * (rates * (1 - rates) / 4000) ** 0.5
    assert ((dropped.mean(1) - rates).abs() < error).all()
    both = float(rates.prod())
    assert abs(float(dropped.prod(0).mean()) - both) < 5 * (both * (1 - both) / 4000) ** 0.5


def test_evaluation_takes_no_seeds_and_drops_nothing(global_rng_untouched):
    model = build().eval()
    plain = build(drop_path=0.0).eval()
    assert torch.equal(model(pixels()), plain(pixels()))
    assert torch.equal(model.train()(pixels(), SEEDS), model(pixels(), SEEDS))


@pytest.mark.parametrize(
    ("seeds", "message"), [(None, "needs seeds"), (SEEDS[:1], r"each of 6 samples, got shape \(1,\)")]
)
def test_training_without_a_seed_for_each_sample_is_refused(seeds, message):
    with pytest.raises(ValueError, match=message):
        build()(pixels(), seeds)
    with pytest.raises(RuntimeError, match="no draws"):
        build().forward_features(pixels())


def test_without_drop_path_training_takes_no_seeds():
    model = build(drop_path=0.0)
    assert torch.equal(model(pixels()), model.eval()(pixels()))


def test_gradients_of_blocks_that_are_computed_again():
    gradients = []
    for checkpointing in (False, True):
        model = build()
        model.set_grad_checkpointing(checkpointing)
        model(pixels(), SEEDS).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 40
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


def test_a_copy_draws_for_itself():
    model = build()
    model(pixels(), SEEDS)
    other = copy.deepcopy(model)
    other(pixels(), SEEDS.flip(0))
    assert torch.equal(scales(other), scales(model).flip(1))
    assert not torch.equal(scales(other), scales(model))


def test_bfloat16_stays_bfloat16():
    model = build().bfloat16()
    assert model(pixels().bfloat16(), SEEDS).dtype == torch.bfloat16


@pytest.mark.slow
def test_compiled_blocks_and_models_are_compiled_once():
    """Full graphs; other draws, and a model's other blocks, compile nothing again."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    for compiled in ("blocks", "model"):
        torch._dynamo.reset()
        graphs.clear()
        model = build()
        expected = [model(pixels(), seeds) for seeds in (SEEDS, SEEDS.flip(0), SEEDS * 3)]
        for part in model.blocks if compiled == "blocks" else [model]:
            part.compile(backend=backend, fullgraph=True)
        got = [model(pixels(), seeds) for seeds in (SEEDS, SEEDS.flip(0), SEEDS * 3)]
        for left, right in zip(got, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        # The first block has no drop path.
        assert len(graphs) == (2 if compiled == "blocks" else 1)
    torch._dynamo.reset()
