"""De3 as a module among others: compiled, transformed, in half precision, replicated, copied, in inference mode."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel, replicate

from denim.defense import De3
from denim.nim import Autoencoder, AutoencoderConfig, Classifier, ClassifierConfig

CONFIG = AutoencoderConfig((8, 12), 4, 16, 1, 2, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3), target="norm")
CLASSES, BATCH = 5, 3
SEEDS = torch.tensor([[5, -7, 2**40], [11, 12, 13]])
# Two float64 computations of the same numbers, in products of other sizes, at logits of up to ten.
CLOSE = {"rtol": 0, "atol": 1e-11}
KINDS = pytest.mark.parametrize("kind", ["patches", "pixels"])
pytestmark = [
    pytest.mark.filterwarnings("ignore:the classifier was trained on"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]


def build(kind: str, dtype: torch.dtype = torch.float64, **options) -> De3:
    """With a `Classifier`, which gets patches, or with a foreign network, which gets pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Autoencoder(CONFIG).eval()
        if kind == "patches":
            classifier = Classifier(ClassifierConfig.for_encoder(CONFIG, CLASSES)).eval()
            nn.init.normal_(classifier.head.weight)
        else:
            layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(240, CLASSES)
            classifier = nn.Sequential(*layers).eval()
    return De3(denoiser, classifier, 70, **{"seed": 3, **options}).to(dtype)


def pixels(batch: int = BATCH) -> Tensor:
    return torch.rand(batch, 2, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradient(defense, images: Tensor) -> Tensor:
    leaf = images.detach().requires_grad_()
    return torch.autograd.grad(defense(leaf).square().sum(), leaf)[0]


def square(defense):
    return lambda images: defense(images).square().sum()


# torch.func


@KINDS
@pytest.mark.parametrize("options", [{}, {"draws": 2, "aggregate": "vote"}, {"degrade": "both", "mask_ratio": 0.5}])
def test_transformations_differentiate_the_next_call(kind, options):
    plain, given, images = build(kind, **options), build(kind, **options), pixels()
    first, second = gradient(plain, images), gradient(plain, images)
    torch.testing.assert_close(torch.func.grad(square(given))(images), first, **CLOSE)
    torch.testing.assert_close(torch.func.jacrev(square(given))(images), second, **CLOSE)
    third = gradient(plain, images)
    logits, pull = torch.func.vjp(given, images)
    torch.testing.assert_close(pull(2 * logits)[0], third, **CLOSE)
    fourth = gradient(plain, images)
    tangent = pixels().flip(0)
    _, moved = torch.func.jvp(square(given), (images,), (tangent,))
    torch.testing.assert_close(moved, (fourth * tangent).sum(), **CLOSE)
    torch.testing.assert_close(given(images), plain(images), **CLOSE)


@KINDS
def test_forward_mode_of_a_frozen_defense(kind):
    frozen, images = build(kind).frozen(1), pixels(1)
    backward = torch.func.jacrev(frozen)(images)
    torch.testing.assert_close(torch.func.jacfwd(frozen)(images), backward, **CLOSE)
    assert backward.abs().max() > 1e-3


@KINDS
def test_members_of_vmap_draw_like_images_of_a_batch(kind):
    plain, given, images = build(kind), build(kind), pixels()
    for _ in range(2):  # every call draws afresh
        member = torch.vmap(lambda image: given(image[None])[0], randomness="different")
        torch.testing.assert_close(member(images), plain(images), **CLOSE)
    each = torch.vmap(torch.func.grad(lambda image: given(image[None]).square().sum()))
    torch.testing.assert_close(each(images), gradient(plain, images), **CLOSE)
    pairs = torch.vmap(torch.vmap(lambda image: given(image[None])[0]))(pixels(4).view(2, 2, *images.shape[1:]))
    torch.testing.assert_close(pairs.flatten(0, 1), plain(pixels(4)), **CLOSE)


def test_members_of_vmap_share_their_draws_where_that_is_asked_for():
    defense, images = build("pixels"), pixels(1).expand(3, -1, -1, -1)
    same = torch.vmap(lambda image: defense(image[None])[0], randomness="same")
    results = same(images), same(images)
    for logits in results:
        torch.testing.assert_close(logits, logits[:1].expand(3, -1), **CLOSE)
    assert not torch.allclose(*results)


@KINDS
def test_parameters_may_be_arguments(kind):
    defense, images = build(kind), pixels()
    weights = dict(defense.named_parameters())
    expected = build(kind)(images)
    torch.testing.assert_close(torch.func.functional_call(defense, weights, (images,)), expected, **CLOSE)
    plain, given = build(kind), build(kind)
    name = "classifier.head.weight" if kind == "patches" else "classifier.4.weight"
    (wanted,) = torch.autograd.grad(square(plain)(images), plain.get_parameter(name))

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(given, {name: weight}, (images,)).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(given.get_parameter(name).detach()), wanted, **CLOSE)


# torch.compile


@pytest.mark.slow
@KINDS
def test_compiled_calls_draw_what_plain_calls_draw(kind):
    torch.compiler.reset()
    plain, given, images = build(kind), build(kind), pixels()
    compiled = torch.compile(given, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(gradient(compiled, images), gradient(plain, images), **CLOSE)
    torch.testing.assert_close(given(images), plain(images), **CLOSE)  # compiled and plain calls have one stream


# Precision and layout


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["weights", "weights and pixels", "autocast"])
def test_half_precision(kind, dtype, how):
    exact = build(kind).draw_logits(pixels(), SEEDS)
    defense = build(kind, torch.float32 if how == "autocast" else dtype)
    images = pixels().to(dtype if how == "weights and pixels" else torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        logits, fresh = defense.draw_logits(images, SEEDS), defense(images)
    assert logits.dtype == fresh.dtype == torch.float32
    # A few roundings of 2^-11 or 2^-8 in a row, in networks of depth one and at logits of up to ten.
    assert (logits.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps
    (grad,) = torch.autograd.grad(logits.square().sum(), images)
    assert grad.dtype == images.dtype
    assert grad.isfinite().all()
    assert grad.abs().max() > 0


def test_half_pixels_do_not_round_the_noise_level():
    images = torch.full((1, 2, 8, 12), 0.5)
    defense = De3(None, nn.Flatten(), 75.3)
    exact = defense.draw_logits(images, SEEDS[:, :1])
    # The noisy pixels are float32: the pixels, 0.5, are exact in bfloat16, and so is nothing else rounded.
    assert torch.equal(defense.draw_logits(images.bfloat16(), SEEDS[:, :1]), exact)
    assert torch.equal(defense.sweep(images.bfloat16(), [75.3], 2, seeds=SEEDS[:, :1])[0], exact)


@KINDS
def test_channels_last(kind):
    plain, other, images = build(kind), build(kind).to(memory_format=torch.channels_last), pixels()
    laid = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(gradient(other, laid), gradient(plain, images), **CLOSE)
    torch.testing.assert_close(other(laid), plain(images), **CLOSE)


# Copies and modes


@KINDS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda defense: pickle.loads(pickle.dumps(defense))])
def test_a_copy_answers_the_same_for_the_same_seeds(kind, duplicate):
    defense = build(kind)
    twin = duplicate(defense)
    assert torch.equal(twin.draw_logits(pixels(), SEEDS), defense.draw_logits(pixels(), SEEDS))
    assert not torch.allclose(twin(pixels()), defense(pixels()))
    assert torch.equal(duplicate(defense.frozen(1))(pixels()), defense.frozen(1)(pixels()))


@KINDS
def test_a_defense_that_inference_mode_has_made_or_copied(kind):
    plain, images = build(kind), pixels()
    with torch.inference_mode():
        made = De3(plain.denoiser, plain.classifier, 70, seed=3)
        moved = build("pixels").float()
        copied = copy.deepcopy(plain.frozen(1))
        torch.testing.assert_close(made(images), plain(images), **CLOSE)
    for _ in range(2):
        torch.testing.assert_close(gradient(made, images), gradient(plain, images), **CLOSE)
        with torch.no_grad():  # its weights are inference tensors now, which autograd does not take; so is its counter
            assert not torch.equal(moved(images.float()), moved(images.float()))
            assert torch.equal(copied(images), plain.frozen(1)(images))


@KINDS
def test_replicas_of_data_parallel(kind, monkeypatch):
    """`nn.DataParallel` needs GPUs to scatter; here its replicas are made as it makes them, with copies on the CPU."""
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[tensor.clone() for tensor in tensors] for _ in devices],
    )
    images, seen = pixels(), []
    for dtype in (torch.float64, torch.bfloat16):
        defense = build(kind, dtype)
        for _ in range(2):
            for replica in replicate(defense, [0, 1]):
                results = replica.draw_logits(images, SEEDS), defense.draw_logits(images, SEEDS)
                torch.testing.assert_close(*results, **CLOSE)
                seen.append(replica(images).double())
    assert len(torch.cat(seen).unique(dim=0)) == 8 * BATCH


@KINDS
def test_distributed_data_parallel(kind):
    images, plain = pixels(), build(kind)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        given = DistributedDataParallel(build(kind))
        for _ in range(2):
            torch.testing.assert_close(gradient(given, images), gradient(plain, images), **CLOSE)
    finally:
        torch.distributed.destroy_process_group()


@KINDS
@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad, torch.func.jacrev], ids=["call", "grad", "jacrev"])
def test_empty_batches(kind, transform):
    defense = build(kind)
    assert transform(square(defense))(pixels(0)).numel() == (1 if transform.__name__ == "<lambda>" else 0)
    assert defense(pixels(0)).shape == (0, CLASSES)
