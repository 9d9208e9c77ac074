from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from denim.kernels import Domain, derive_seeds
from denim.nim import Autoencoder, AutoencoderConfig, Classifier, ClassifierConfig, Objective
from denim.nim.attention import Attention
from denim.nim.block import Block, Mlp, set_lean

BODY = AutoencoderConfig((12, 20), 4, 32, 2, 4, 16, 1, 2, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
NORM = "denim.norm_linear.default"
GELU = "denim.gelu_linear.default"


def build(kind, *arguments, **options):
    """A module with weights that do not depend on the test, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*arguments, **options).train()


def block(**options):
    return build(
        Block,
        16,
        2,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        attn_layer=Attention,
        mlp_layer=Mlp,
        **options,
    )


def pair(model):
    """A model as it is built, and a copy of it that keeps everything."""
    other = copy.deepcopy(model)
    set_lean(other, False)
    return model, other


def tokens(*shape, dtype=torch.float32):
    return torch.randn(shape or (2, 5, 16), generator=torch.Generator().manual_seed(1), dtype=dtype)


def run(model, *arguments, autocast=False, **options):
    """Output, and the gradients of all parameters by name."""
    model.zero_grad()
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(5)
        out = model(*arguments, **options)
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(got, expected):
    assert torch.equal(got[0], expected[0])
    assert list(got[1]) == list(expected[1])
    for name, gradient in got[1].items():
        assert torch.equal(gradient, expected[1][name]), name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("objective", ["nim", "mae", "dmae"])
def test_a_pretraining_step_has_the_same_bits(objective, autocast):
    images = torch.randint(
        0, 256, (3, *BODY.img_size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    seeds = derive_seeds(0, Domain.TRAINING, torch.arange(3))
    chosen = Objective.published(objective)
    sigma = None if chosen.sigma is None else chosen.sigma.sample(seeds)
    steps = []
    for model in pair(build(Autoencoder, BODY)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = chosen.loss(model, images, sigma, seeds)
        loss.backward()
        steps.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert_same_bits(*steps)
    assert len(steps[0][1]) > 40


@pytest.mark.parametrize("autocast", [False, True])
def test_a_classifier_has_the_same_bits(autocast):
    model = build(Classifier, ClassifierConfig.for_encoder(BODY, 5, drop_path=0.5))
    pixels = torch.rand(3, 3, *BODY.img_size, generator=torch.Generator().manual_seed(2))
    lean, plain = pair(model)
    seeds = torch.arange(3)  # of drop path
    assert_same_bits(run(lean, pixels, seeds, autocast=autocast), run(plain, pixels, seeds, autocast=autocast))


@pytest.mark.parametrize(
    "options",
    [{"proj_drop": 0.5}, {"attn_drop": 0.5}, {"init_values": 0.1}, {"qk_norm": True}, {"scale_mlp_norm": True}, {}],
    ids=str,
)
def test_a_block_is_timms_block(options):
    """Names, output and gradients, with every option that timm's block has."""
    ours = block(**options)
    theirs = build(TimmBlock, 16, 2, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), **options)
    theirs.load_state_dict(ours.state_dict())
    got, expected = run(ours, tokens()), run(theirs, tokens())
    # Both attentions are torch's SDPA on the CPU, and their dropouts draw the same numbers.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_masks_of_attention_pass_through():
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    lean, plain = pair(block())
    assert_same_bits(run(lean, tokens(), attn_mask=mask), run(plain, tokens(), attn_mask=mask))


def test_what_is_computed_again_is_not_kept():
    """Of a block's activations per token and width: x, qkv 3, attention's result, x again and the MLP's 4 are left."""

    def kept(model, x):
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {}

        def pack(value):
            storage = value.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            out = model(x)
        assert out.requires_grad
        return sum(found.values()) / x.nbytes

    lean, plain = pair(block())
    x = tokens(4, 33, 16).requires_grad_()
    # Two normalised inputs and the activated hidden tokens, and the norms' statistics, two numbers each for 16.
    assert kept(plain, x) - kept(lean, x) == pytest.approx(1 + 1 + 4 + 4 / 16)
    assert kept(lean, x) < 0.65 * kept(plain, x)


# ------------------------------------------------------------------------------------------------- when it is plain


@pytest.mark.parametrize("situation", ["evaluation mode", "no gradients", "frozen weights", "switched off"])
def test_where_nothing_is_kept_nothing_is_computed_again(operators, situation):
    model = block()
    if situation == "evaluation mode":
        model.eval()
    if situation == "frozen weights":
        model.requires_grad_(False)
    if situation == "switched off":
        set_lean(model, False)
    with operators() as calls, torch.set_grad_enabled(situation != "no gradients"):
        model(tokens().requires_grad_())
    assert not {NORM, GELU} & set(calls)


def test_a_block_in_training_uses_the_operators(operators):
    with operators() as calls:
        block()(tokens())
    assert (len(calls[NORM]), len(calls[GELU])) == (2, 1)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(name):
    def change(model):
        seen = []
        model.get_submodule(name).register_forward_hook(lambda *arguments: seen.append(name))
        return seen

    return change


def replaced(name, kind):
    def change(model):
        old = model.get_submodule(name)
        model.set_submodule(name, build(kind, old.in_features, old.out_features))

    return change


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.mlp.fc2)


def forward_of_its_own(model):
    norm = model.norm2
    norm.forward = lambda x: 3 * type(norm).forward(norm, x)


def approximate(model):
    model.mlp.act = nn.GELU("tanh")


def without_bias(model):
    model.norm1.register_parameter("bias", None)


@pytest.mark.parametrize(
    "change",
    [
        *map(hooked, ("norm1", "attn", "attn.qkv", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2")),
        *(replaced(name, Doubled) for name in ("attn.qkv", "mlp.fc1", "mlp.fc2")),
        parametrised,
        forward_of_its_own,
        approximate,
        without_bias,
    ],
)
def test_modules_that_are_more_than_torchs_own_are_called(operators, change):
    model = block()
    seen = change(model)
    with operators() as calls:
        got = run(model, tokens())
    assert len(calls[NORM]) + len(calls[GELU]) == 2  # and the third is called
    if seen is not None:
        assert len(seen) == 1
    set_lean(model, False)
    assert_same_bits(got, run(model, tokens()))


def test_torch_func_on_a_model_in_evaluation_mode():
    model, x = block().eval(), tokens()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    got = torch.func.grad(lambda given: torch.func.functional_call(model, given, (x,)).square().sum())(parameters)
    assert_same_bits((x, got), (x, run(model, x)[1]))


def test_the_switch_reaches_every_block():
    model = build(Autoencoder, BODY)
    for on in (False, True):
        set_lean(model, on)
        layers = [module for module in model.modules() if isinstance(module, (Block, Mlp))]
        assert len(layers) == 2 * (BODY.depth + BODY.decoder_depth)
        assert {layer.lean for layer in layers} == {on}
    with pytest.raises(ValueError, match="Sequential has no blocks that can be lean"):
        set_lean(nn.Sequential(TimmMlp(4)), True)


# ---------------------------------------------------------------------------------- with the parts of torch around it


def test_activation_checkpointing_has_the_same_bits():
    model = block()
    expected = run(model, tokens().requires_grad_())
    again = copy.deepcopy(model)
    again.forward = partial(checkpoint, model.__class__.forward.__get__(again), use_reentrant=False)
    assert_same_bits(run(again, tokens().requires_grad_()), expected)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_a_block_is_one_graph(autocast):
    model = block()
    expected = run(model, tokens(), autocast=autocast)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        got = run(compiled, tokens(), autocast=autocast)
    assert counter.frame_count == 1
    # Traced, linear layers are torch's decompositions of them.
    torch.testing.assert_close(got, expected, rtol=1e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)


@pytest.fixture
def one_process(tmp_path):
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_distributed_training_has_the_same_bits(one_process, way):
    model = block()
    expected = run(model, tokens())
    if way == "ddp":
        got = run(DistributedDataParallel(copy.deepcopy(model)), tokens())
        gradients = {name.removeprefix("module."): value for name, value in got[1].items()}
    else:
        sharded = fully_shard(copy.deepcopy(model), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert isinstance(sharded, Block)
        got = run(sharded, tokens())
        gradients = {name: value.full_tensor() for name, value in got[1].items()}
    assert_same_bits((got[0], gradients), expected)
