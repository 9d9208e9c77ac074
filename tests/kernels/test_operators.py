"""What torch requires of every operator: correct fake kernels, no aliases of inputs, one compiled graph."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from denim.benchmarks.cases import OPERATIONS
from denim.kernels import (
    attack_start,
    attack_step,
    decode_patches,
    derive_seeds,
    draw_seeds,
    noise_patchify,
    normal_noise,
    normalized_patches,
    patch_loss,
    uniform_noise,
)
from denim.kernels.noise import Stream
from denim.kernels.seeds import Domain

OPS = torch.ops.denim
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.5, 1.0]


def rand(*shape, grad=False, seed=0):
    """Values in [0, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def ids(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def strided(tensor):
    """The same values with gaps, and the last two dimensions in the other order."""
    tensor = tensor.detach().mT.contiguous().mT if tensor.dim() > 1 else tensor.detach()
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def form(argument):
    """What an operator branches on: dimensions, bytes or floats, what is missing, words; not sizes and values."""
    if isinstance(argument, torch.Tensor):
        return argument.dim(), argument.is_floating_point(), argument.requires_grad
    if isinstance(argument, (list, torch.dtype)):
        return bool(argument)
    return argument == 1 if type(argument) is int else argument


def calls():
    """(operator, arguments): every form in which the small cases of the table call an operator."""
    yield "normal_noise", (ids(2, 3), 37)
    yield "normal_noise", (ids(1), 1)
    yield "noise_words", (ids(2, 3), 37, 2)
    yield "noise_words", (ids(), 1, 0)
    yield "derive_seeds", (ids(2, 3), 1, 5, 6, 7, None, None, None)
    yield "derive_seeds", (ids(2, 1), 1, 0, 0, 0, ids(), ids(3), ids(4, 1, 1))
    for operation, cases in OPERATIONS.items():
        seen = set()
        for case in cases:
            inputs = {name: value.nan_to_num(0) for name, value in case.inputs("cpu").items()}
            size = sum(value.numel() for value in inputs.values())
            if not 0 < size < 4000 or getattr(case, "patch", 1) > 4:
                continue
            if case.leaves:
                result = case.fused(**case.inputs("meta"))
                upstream = rand(*result.shape).to(result.dtype)
                backward = case.backward_arguments(inputs, upstream)
                if ("backward", *map(form, backward)) not in seen:
                    seen.add(("backward", *map(form, backward)))
                    yield f"{operation}_backward", backward
            for name in case.leaves:
                inputs[name] = inputs[name].detach().requires_grad_()
            forward = case.arguments(inputs)
            if tuple(map(form, forward)) not in seen:
                seen.add(tuple(map(form, forward)))
                yield operation, forward


CALLS = list(calls())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_opcheck(name, arguments, layout):
    if layout == "strided":
        arguments = [
            strided(value).requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
            for value in arguments
        ]
    opcheck(getattr(OPS, name).default, arguments)


def test_every_operator_is_checked():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("denim::")}
    # Two belong to denim.defense (tests/defense/test_replay.py).
    assert registered - {"number_of_call", "member_of_vmap"} == {name for name, _ in CALLS}


GEOMETRY = {"patch_size": 4, "mean": MEAN, "std": STD}


def train_step(pixels, prediction, ids):
    seeds = derive_seeds(5, Domain.TRAINING, ids, step=3)
    sigma = 90 * uniform_noise(seeds, (), Stream.SIGMA)
    noisy = noise_patchify(pixels, sigma, seeds, **GEOMETRY)
    return patch_loss(noisy * prediction, pixels.detach(), **GEOMETRY)


def masked_loss(pixels, prediction, ids):
    mask = uniform_noise(ids, (6,), Stream.MASK) < 0.9
    return patch_loss(prediction, pixels.detach(), **GEOMETRY, norm_pix=False, mask=mask) + 0 * pixels.sum()


def sweep(pixels, prediction, ids):
    sigma = torch.tensor([20.0, 60.0, 120.0])[:, None].expand(3, ids.shape[0])
    noisy = noise_patchify(pixels, sigma, draw_seeds(5, Domain.SCORE, ids, 2), **GEOMETRY)
    levels = sigma[:, None, :]
    options = {"img_size": (8, 12), **GEOMETRY}
    decoded = decode_patches(noisy * prediction, **options, statistics="noisy", source=noisy, sigma=levels)
    return (decoded - decode_patches(noisy * prediction, **options, statistics="input", source=pixels)).square().mean()


def to_patches(pixels, prediction, ids):
    options = {"img_size": (8, 12), **GEOMETRY, "normalize": (STD, MEAN)}
    decoded = decode_patches(prediction, **options, statistics="input", source=pixels)
    raw = decode_patches(prediction, **options, dtype=torch.bfloat16)
    fixed = decode_patches(prediction, **options, statistics="input", source=pixels.detach())
    return (decoded - raw.float()).square().mean() + fixed.square().mean()


def raw_target(pixels, prediction, ids):
    patches = normalized_patches(pixels, **GEOMETRY) + normal_noise(ids, (6, 48))
    return decode_patches(patches * prediction, img_size=(8, 12), **GEOMETRY).square().mean()


def attack(pixels, prediction, ids):
    moved = attack_start(pixels, ids, epsilon=0.03)
    moved = attack_step(moved, pixels, prediction.reshape(pixels.shape), step_size=0.01, epsilon=0.03)
    radius = uniform_noise(ids, (), Stream.START)
    moved = attack_step(moved, pixels, pixels - 0.5, step_size=radius, epsilon=radius)
    return (moved * pixels * prediction.reshape(pixels.shape)).sum()


@pytest.mark.slow
@pytest.mark.parametrize("function", [train_step, masked_loss, sweep, to_patches, raw_target, attack])
def test_one_graph_for_every_batch(function):
    """fullgraph, forward and backward; the first batch size's graph is used for the other batch sizes."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    traces = []
    for batch in (2, 3, 7):
        inputs = [rand(batch, 3, 8, 12, grad=True), rand(batch, 6, 48, grad=True, seed=1)]
        expected = function(*inputs, ids(batch))
        loss = compiled(*inputs, ids(batch))
        # The operators are the same; operations between them may sum in another order.
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        gradients = torch.autograd.grad(loss, inputs)
        for gradient, plain in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
            assert plain.abs().sum() > 0 or function is masked_loss
            torch.testing.assert_close(gradient, plain, rtol=1e-5, atol=1e-7)
        traces.append(counter.frame_count)
    assert traces[0] == traces[-1] > 0


def test_no_constant_is_copied_from_the_host(monkeypatch):
    """A copy from the host synchronises, and CUDA graphs cannot capture it."""
    pixels, seeds = torch.zeros(2, 3, 8, 12, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, None)
    for name in ("item", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, None)
    assert attack_start(pixels, seeds, epsilon=0.1).shape == pixels.shape
    assert attack_step(pixels, pixels, pixels, step_size=0.1, epsilon=1).shape == pixels.shape
    patches = normalized_patches(pixels, **GEOMETRY)
    assert decode_patches(patches, img_size=(8, 12), **GEOMETRY).shape == pixels.shape


@pytest.mark.slow
def test_inductor_forward_and_backward():
    """The default backend, whose layouts differ from aot_eager's."""
    compiled = torch.compile(sweep, fullgraph=True, dynamic=True)
    inputs = [rand(3, 3, 8, 12, grad=True), rand(3, 6, 48, grad=True, seed=1)]
    expected = sweep(*inputs, ids(3))
    loss = compiled(*inputs, ids(3))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(loss, inputs)
    for gradient, plain in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-7)


def test_unwritten_memory_is_nan():
    """The fixture of conftest works. Without it, the tests above could pass on memory that happens to be right."""
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(3).new_empty((2, 2)).isnan().all()
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64

    def allocate(x):
        return torch.empty(x.shape[0]).fill_(1) + x.new_empty(x.shape).fill_(2) + torch.empty_like(x).fill_(3)

    compiled = torch.compile(allocate, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(3)).tolist() == [6, 6, 6]
