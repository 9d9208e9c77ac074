from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import denim.nim.attention as module
from denim.nim import Autoencoder, AutoencoderConfig, Classifier, ClassifierConfig, Mask
from denim.nim.attention import Attention, set_attention

BODY = AutoencoderConfig((12, 20), 4, 32, 2, 4, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3))
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)
# The arguments that timm's blocks pass, and the others that its attention has.
FORMS = {
    "as in Denim": {"qkv_bias": True},
    "no biases": {"proj_bias": False},
    "norms of queries and keys": {"qk_norm": True, "qkv_bias": True},
    "norm of the output": {"scale_norm": True},
    "dropout": {"attn_drop": 0.5, "proj_drop": 0.25},
    "another head width and output width": {"attn_head_dim": 5, "dim_out": 7},
}
HAS_GATES = "gated" in inspect.signature(TimmAttention).parameters  # since timm 1.0.28
if HAS_GATES:
    FORMS["gated"] = {"gated": True}


def pair(seed: int = 0, **options) -> tuple[TimmAttention, Attention]:
    """timm's module, and Denim's with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = TimmAttention(12, 3, norm_layer=LAYER_NORM, **options)
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        ours = Attention(12, 3, norm_layer=LAYER_NORM, **options)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape or (2, 5, 12), generator=torch.Generator().manual_seed(1), dtype=dtype)


def run(layer: nn.Module, x: torch.Tensor, **options) -> list[torch.Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        out = layer(x, **options)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_equals_timm_bit_for_bit(form, train, dtype):
    """Both call torch's SDPA on equal tensors, so their outputs and gradients are equal."""
    plain, ours = (layer.train(train).to(dtype) for layer in pair(**FORMS[form]))
    ours.backend = "sdpa"
    assert list(plain.state_dict()) == list(ours.state_dict())
    for value, expected in zip(run(ours, tokens(dtype=dtype)), run(plain, tokens(dtype=dtype)), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("options", [{"attn_mask": torch.tensor([[0.0, -1.0, -9.0, 3.0, 0.5]])}, {"is_causal": True}])
def test_masks_are_timms(options):
    plain, ours = pair()
    for value, expected in zip(run(ours, tokens(), **options), run(plain, tokens(), **options), strict=True):
        assert torch.equal(value, expected)
    assert not torch.equal(ours(tokens(), **options), ours(tokens()))


@pytest.mark.parametrize("form", ["as in Denim", "norms of queries and keys"])
def test_autocast_equals_timm(form):
    plain, ours = pair(**FORMS[form])
    ours.backend = "sdpa"
    with torch.autocast("cpu", torch.bfloat16):
        results = [run(layer, tokens()) for layer in (ours, plain)]
    assert results[0][0].dtype == torch.bfloat16
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


def test_maths_is_the_same_function():
    plain, ours = (layer.double() for layer in pair(qkv_bias=True))
    ours.backend = "math"
    # Float64 through sums of a dozen terms of size up to a hundred.
    for value, expected in zip(run(ours, tokens().double()), run(plain, tokens().double()), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-10)


def test_queries_keys_and_values_are_views_of_one_packed_tensor(monkeypatch):
    _, ours = pair(qkv_bias=True)
    packed, seen = [], []
    ours.qkv.register_forward_hook(lambda layer, inputs, output: packed.append(output))

    def spy(query, key, value, *, backend):
        seen.extend((query, key, value))
        return F.scaled_dot_product_attention(query, key, value)

    monkeypatch.setattr(module, "attention", spy)
    ours(tokens())
    # (B, N, 3, heads, head_dim) in memory: head_dim 4, heads 3, so 12 elements of each of the three in a token's 36.
    for index, view in enumerate(seen):
        assert view.untyped_storage().data_ptr() == packed[0].untyped_storage().data_ptr()
        assert view.storage_offset() == 12 * index
        assert view.shape == (2, 3, 5, 4)
        assert view.stride() == (5 * 36, 4, 36, 1)
        assert torch.equal(view.transpose(1, 2).flatten(2), packed[0][..., 12 * index : 12 * index + 12])


def test_one_packed_product_and_no_copy_of_it():
    """Biases would be copied into the outputs of the linear layers; without them nothing is."""
    _, ours = pair(proj_bias=False)
    x = tokens()
    with torch.no_grad(), torch.profiler.profile() as profile:
        ours(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::linear"] == 2
    assert not counts.keys() & {"aten::copy_", "aten::clone", "aten::cat", "aten::stack", "aten::_to_copy"}


@pytest.mark.parametrize(
    ("build", "call"),
    [
        ({}, {"attn_mask": torch.zeros(5, 5)}),
        ({}, {"is_causal": True}),
        ({"attn_drop": 0.5}, {}),
        *([({"gated": True}, {})] if HAS_GATES else []),
    ],
)
@pytest.mark.parametrize("backend", ["xformers", "math"])
def test_a_chosen_backend_is_never_silently_left(backend, build, call):
    _, ours = pair(**build)
    ours.backend = backend
    with pytest.raises(ValueError, match=f"attention backend '{backend}' has no masks, attention dropout or gates"):
        ours(tokens(), **call)
    ours.backend = "sdpa"
    ours(tokens(), **call)


def test_dropout_is_none_of_a_backend_in_evaluation():
    _, ours = pair(attn_drop=0.5)
    ours.backend = "math"
    torch.testing.assert_close(ours.eval()(tokens()), pair(attn_drop=0.5)[0].eval()(tokens()), rtol=1e-5, atol=1e-4)


def models() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        return {"autoencoder": Autoencoder(BODY), "classifier": Classifier(ClassifierConfig.for_encoder(BODY, 7))}


@pytest.mark.parametrize("name", ["autoencoder", "classifier"])
def test_every_block_of_denims_models_has_it(name):
    model = models()[name]
    layers = [layer for layer in model.modules() if isinstance(layer, TimmAttention)]
    assert len(layers) == {"autoencoder": BODY.depth + BODY.decoder_depth, "classifier": BODY.depth}[name]
    assert all(type(layer) is Attention for layer in layers)


@pytest.mark.parametrize("name", ["autoencoder", "classifier"])
def test_the_backend_of_a_whole_model(name, monkeypatch):
    model, used = models()[name], []
    kernel = module.attention

    def spy(*tensors, backend):
        used.append(backend)
        return kernel(*tensors, backend=backend)

    monkeypatch.setattr(module, "attention", spy)
    inputs = torch.rand(2, 2, 12, 20) if name == "classifier" else torch.rand(2, 15, 32)
    layers = sum(isinstance(layer, Attention) for layer in model.modules())
    expected = model(inputs)
    assert used == ["auto"] * layers
    for backend in ("math", "sdpa", "auto"):
        used.clear()
        set_attention(model, backend)
        # Values of size one after a handful of layers in float32.
        torch.testing.assert_close(copy.deepcopy(model)(inputs), expected, rtol=0, atol=1e-5)
        assert used == [backend] * layers
    set_attention(model, "xformers")
    with pytest.raises(ValueError, match=r"'xformers' cannot serve torch.float32 .* on cpu: .*CUDA and ROCm"):
        model(inputs)


def test_it_goes_into_timms_own_models():
    build = partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    with torch.random.fork_rng(devices=[]):
        ours, plain = build(attn_layer=Attention), build()
    plain.load_state_dict(ours.state_dict())
    set_attention(ours, "sdpa")
    assert torch.equal(ours.eval()(torch.ones(1, 3, 32, 32)), plain.eval()(torch.ones(1, 3, 32, 32)))


def test_mistakes_of_the_choice():
    model = models()["autoencoder"]
    with pytest.raises(ValueError, match="must be auto, xformers, sdpa, math, got 'flash'"):
        set_attention(model, "flash")
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"VisionTransformer has no attention .* attn_layer=denim.nim.attention"):
        set_attention(vit, "sdpa")
    assert {layer.backend for layer in model.modules() if isinstance(layer, Attention)} == {"auto"}


@pytest.mark.slow
def test_compiles_into_one_graph():
    block = Block(12, 3, qkv_bias=True, attn_layer=Attention)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    traces = []
    for batch in (2, 3, 7):
        results = [run(layer, tokens(batch, 5, 12)) for layer in (compiled, block)]
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        traces.append(counter.frame_count)
    assert traces[0] == traces[-1] > 0


def test_masked_autoencoder_equals_one_of_timms_blocks(monkeypatch):
    model = models()["autoencoder"]
    monkeypatch.setattr("denim.nim.autoencoder.Attention", TimmAttention)
    plain = models()["autoencoder"]
    assert type(plain.blocks[0].attn) is TimmAttention
    plain.load_state_dict(model.state_dict())
    patches, mask = tokens(3, BODY.num_patches, BODY.patch_dim), Mask.random(torch.arange(3), BODY.num_patches, 0.5)
    assert torch.equal(model(patches, mask), plain(patches, mask))
