"""Activation checkpointing: a recomputation draws what the first run drew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from denim.defense import De3
from denim.nim import Autoencoder, AutoencoderConfig, Classifier, ClassifierConfig

CONFIG = AutoencoderConfig((8, 12), 4, 16, 1, 2, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3), target="raw")
CLASSES = 5
pytestmark = [
    pytest.mark.filterwarnings("ignore:the classifier was trained on"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # the inner of two reentrant regions
]
# The same operations on the same numbers: equal up to the order in which gradients are added up.
CLOSE = {"rtol": 0, "atol": 1e-12}


def defense(kind: str, **options) -> De3:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Autoencoder(CONFIG).double().eval().requires_grad_(False)
        if kind == "patches":
            classifier = Classifier(ClassifierConfig.for_encoder(CONFIG, CLASSES, trained_on="noise, raw target"))
            nn.init.normal_(classifier.head.weight)
        else:
            classifier = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(240, CLASSES))
    return De3(denoiser, classifier.double().eval().requires_grad_(False), 70, **{"seed": 3, **options})


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 2, 8, 12, generator=generator, dtype=torch.float64).requires_grad_()


def through(call, images: Tensor, reentrant: bool) -> Tensor:
    return checkpoint(call, images, use_reentrant=reentrant)


def gradient(loss: Tensor, images: Tensor, **options) -> Tensor:
    images.grad = None
    loss.backward(**options)
    return images.grad


REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved"])


@REENTRANT
@pytest.mark.parametrize("kind", ["patches", "pixels"])
@pytest.mark.parametrize("options", [{}, {"draws": 2, "aggregate": "vote"}, {"degrade": "both", "mask_ratio": 0.5}])
def test_the_gradient_is_that_of_the_draws_of_the_forward_pass(kind, options, reentrant):
    images = pixels()
    plain, checkpointed = defense(kind, **options), defense(kind, **options)
    for _ in range(2):  # every call draws afresh
        expected = gradient(plain(images).square().sum(), images)
        logits = through(checkpointed, images, reentrant)
        torch.testing.assert_close(gradient(logits.square().sum(), images), expected, **CLOSE)
    assert torch.equal(plain(images), checkpointed(images)), "a recomputation takes nothing of the stream"


@REENTRANT
def test_calls_on_the_same_images_are_told_apart_whatever_their_order_in_backward(reentrant):
    images, plain, checkpointed = pixels(), defense("pixels"), defense("pixels")
    wanted = [gradient(plain(images).square().sum(), images) for _ in range(3)]
    losses = [through(checkpointed, images, reentrant).square().sum() for _ in range(3)]
    for number in (1, 0, 2):
        torch.testing.assert_close(gradient(losses[number], images), wanted[number], **CLOSE)


@REENTRANT
def test_several_calls_in_one_region_and_a_loss_behind_them(reentrant):
    def twice(model: De3):
        return lambda images: (model(images).softmax(-1) * model(images * 0.5).log_softmax(-1)).sum()

    images, plain, checkpointed = pixels(), defense("pixels"), defense("pixels")
    expected = gradient(twice(plain)(images), images)
    loss = through(twice(checkpointed), images, reentrant)
    for _ in range(2):
        torch.testing.assert_close(gradient(loss, images, retain_graph=True), expected, **CLOSE)


@REENTRANT
@pytest.mark.parametrize("inner", [True, False], ids=["reentrant", "saved"])
def test_regions_within_regions(reentrant, inner):
    images, plain, checkpointed = pixels(), defense("pixels"), defense("pixels")
    expected = gradient(plain(images * 0.5).square().sum(), images)
    logits = through(lambda outer: through(checkpointed, outer * 0.5, inner), images, reentrant)
    torch.testing.assert_close(gradient(logits.square().sum(), images), expected, **CLOSE)


def test_without_the_early_stop_and_with_hooks_of_the_user():
    images, plain, checkpointed = pixels(), defense("pixels"), defense("pixels")
    expected = gradient(plain(images).square().sum(), images)

    def saved(inputs: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            return checkpointed(inputs)

    with set_checkpoint_early_stop(False):
        loss = through(saved, images, False).square().sum()
    torch.testing.assert_close(gradient(loss, images), expected, **CLOSE)


def test_a_call_that_only_the_backward_pass_makes_is_refused():
    class Late(torch.autograd.Function):
        """A checkpoint of one's own, which torch knows nothing of."""

        @staticmethod
        def forward(ctx, images, model):
            ctx.save_for_backward(images)
            ctx.model = model
            return model(images)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaf = ctx.saved_tensors[0].detach().requires_grad_()
                return *torch.autograd.grad(ctx.model(leaf), leaf, grad), None

    images, random = pixels(), defense("pixels")
    with pytest.raises(RuntimeError, match="within a backward pass, and its draws of the forward pass are not known"):
        Late.apply(images, random).sum().backward()
    frozen = random.frozen(1)
    expected = gradient(frozen(images).sum(), images)
    torch.testing.assert_close(gradient(Late.apply(images, frozen).sum(), images), expected, **CLOSE)
    hooked = images.sum()
    hooked.register_hook(lambda grad: random(images.detach()) and None)
    with pytest.raises(RuntimeError, match="within a backward pass"):
        hooked.backward()


@REENTRANT
@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_compiled_calls_are_repeated_too(reentrant, inside):
    torch.compiler.reset()
    images, plain, checkpointed = pixels(), defense("pixels"), defense("pixels")
    if inside:
        run = torch.compile(lambda x: through(checkpointed, x, reentrant), backend="aot_eager")
    else:
        compiled = torch.compile(checkpointed, backend="aot_eager", fullgraph=True)
        run = lambda x: through(compiled, x, reentrant)  # noqa: E731
    expected = gradient(plain(images).square().sum(), images)
    torch.testing.assert_close(gradient(run(images).square().sum(), images), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["number_of_call", "member_of_vmap"])
def test_the_operators_are_such_that_torch_can_trace_them(name):
    opcheck(getattr(torch.ops.denim, name).default, (torch.tensor(3),))
