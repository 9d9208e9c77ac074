from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from denim.kernels import gelu_linear

NAMES = ("x", "weight", "bias")


def make(*shape, dtype=torch.float32, outputs=7, bias=True, seed=0):
    """x of a shape, and parameters, all of which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": shape, "weight": (outputs, shape[-1])} | ({"bias": (outputs,)} if bias else {})
    tensors = {name: 2 * torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}


def plain(x, weight, bias=None):
    return F.linear(F.gelu(x), weight, bias)


def run(function, tensors, autocast=False):
    """Result and gradients, for an upstream gradient that is not contiguous."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = function(**tensors)
    upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape[::-1]).permute(*range(out.dim())[::-1])
    wanted = [value for value in tensors.values() if value.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


def assert_same_bits(got, expected):
    for value, other in zip(got, expected, strict=True):
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 65, 48), (2, 3, 5, 33), (0, 5, 8)])
def test_bits_are_those_of_gelu_and_linear(shape, dtype, bias, global_rng_untouched):
    tensors = make(*shape, dtype=dtype, bias=bias)
    assert_same_bits(run(gelu_linear, tensors), run(plain, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_autocast(dtype):
    """The GELU is computed in the dtype of x, the product in bfloat16; parameters and their gradients stay float32."""
    tensors = make(2, 17, 48)
    tensors["x"] = tensors["x"].detach().to(dtype).requires_grad_()
    got = run(gelu_linear, tensors, autocast=True)
    assert got[0].dtype == torch.bfloat16
    assert [value.dtype for value in got[1:]] == [dtype, torch.float32, torch.float32]
    assert_same_bits(got, run(plain, tensors, autocast=True))


def test_strided_tokens():
    tensors = make(3, 8, 5, dtype=torch.float64)
    tensors["x"] = tensors["x"].detach().mT.contiguous().mT.requires_grad_()
    # torch adds the gradient of the bias up in another order.
    torch.testing.assert_close(run(gelu_linear, tensors), run(plain, tensors), rtol=1e-14, atol=1e-14)


def test_gradients_by_finite_differences():
    tensors = make(2, 3, 5, dtype=torch.float64, outputs=4)
    assert torch.autograd.gradcheck(gelu_linear, tuple(tensors.values()))


@pytest.mark.parametrize("frozen", NAMES)
def test_a_frozen_tensor_costs_nothing_and_gets_no_gradient(operators, frozen):
    tensors = make(2, 5, 8)
    expected = dict(zip(tensors, run(gelu_linear, tensors)[1:], strict=True))
    del expected[frozen]
    tensors[frozen].requires_grad_(False)
    with operators() as calls:
        got = run(gelu_linear, tensors)
    assert_same_bits(got[1:], expected.values())
    (call,) = calls["denim.gelu_linear_backward.default"]
    assert call.result[NAMES.index(frozen)].numel() == 0


def test_nothing_is_kept_but_the_arguments():
    tensors, found = make(2, 65, 48), []
    given = {value.untyped_storage().data_ptr() for value in tensors.values()}

    def pack(value):
        found.append(value.untyped_storage().data_ptr())
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        gelu_linear(**tensors)
        assert set(found) <= given
        plain(**tensors)
        assert not set(found) <= given


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_refused(name):
    tensors = make(2, 5)
    with pytest.raises(TypeError, match=f"{name} must be floating point, got torch.int64"):
        gelu_linear(**tensors | {name: tensors[name].detach().long()})


def test_a_width_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"x must have shape \(..., 5\) for this weight, got \(2, 6\)"):
        gelu_linear(**make(2, 5) | {"x": torch.zeros(2, 6)})
