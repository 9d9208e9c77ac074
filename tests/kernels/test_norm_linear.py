from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from denim.kernels import norm_linear

NAMES = ("x", "norm_weight", "norm_bias", "weight", "bias")


def make(*shape, dtype=torch.float32, outputs=7, bias=True, seed=0):
    """x of a shape, and parameters, all of which require gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": shape, "norm_weight": shape[-1:], "norm_bias": shape[-1:], "weight": (outputs, shape[-1])}
    sizes |= {"bias": (outputs,)} if bias else {}
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}


def plain(x, norm_weight, norm_bias, weight, bias=None, eps=1e-6):
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)


def lean(x, norm_weight, norm_bias, weight, bias=None):
    return norm_linear(x, norm_weight, norm_bias, weight, bias, eps=1e-6)


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
def test_bits_are_those_of_layer_norm_and_linear(shape, dtype, bias, global_rng_untouched):
    tensors = make(*shape, dtype=dtype, bias=bias)
    assert_same_bits(run(lean, tensors), run(plain, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_autocast(dtype):
    """The norm is computed in the dtype of x, the product in bfloat16; parameters and their gradients stay float32."""
    tensors = make(2, 17, 48)
    tensors["x"] = tensors["x"].detach().to(dtype).requires_grad_()
    got = run(lean, tensors, autocast=True)
    assert got[0].dtype == torch.bfloat16
    assert [value.dtype for value in got[1:]] == [dtype, *[torch.float32] * 4]
    assert_same_bits(got, run(plain, tensors, autocast=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_strided_tokens(dtype):
    tensors = make(3, 8, 5, dtype=dtype)
    tensors["x"] = tensors["x"].detach().mT.contiguous().mT.requires_grad_()
    assert_same_bits(run(lean, tensors), run(plain, tensors))


def test_gradients_by_finite_differences():
    tensors = make(2, 3, 5, dtype=torch.float64, outputs=4)
    assert torch.autograd.gradcheck(lean, tuple(tensors.values()))


@pytest.mark.parametrize("frozen", NAMES)
def test_a_frozen_tensor_costs_nothing_and_gets_no_gradient(operators, frozen):
    tensors = make(2, 5, 8)
    expected = dict(zip(tensors, run(lean, tensors)[1:], strict=True))
    del expected[frozen]
    tensors[frozen].requires_grad_(False)
    with operators() as calls:
        got = run(lean, tensors)
    assert_same_bits(got[1:], expected.values())
    (call,) = calls["denim.norm_linear_backward.default"]
    assert call.result[NAMES.index(frozen)].numel() == 0


def kept(function, tensors):
    """Bytes that autograd keeps, of other memory than the arguments'."""
    given = {value.untyped_storage().data_ptr() for value in tensors.values()}
    found = {}

    def pack(value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in given:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = function(**tensors)
    assert out.requires_grad
    return sum(found.values())


def test_nothing_is_kept_but_the_arguments():
    tensors = make(2, 65, 48)
    assert kept(plain, tensors) >= tensors["x"].nbytes
    assert kept(lean, tensors) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 6)}, r"x must have shape \(..., 5\) for this weight, got \(2, 6\)"),
        ({"x": torch.zeros(())}, r"x must have shape \(..., 5\)"),
        ({"weight": torch.zeros(5)}, r"weight must have shape \(out_features, in_features\), got \(5,\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(7,\), got \(4,\)"),
        ({"norm_weight": torch.zeros(1, 5)}, r"norm_weight must have shape \(5,\), got \(1, 5\)"),
        ({"norm_bias": torch.zeros(4)}, r"norm_bias must have shape \(5,\), got \(4,\)"),
        ({"bias": torch.zeros(7, device="meta")}, "bias is on meta and weight is on cpu"),
        ({"norm_bias": torch.zeros(5, device="meta")}, "norm_bias is on meta and x is on cpu"),
    ],
)
def test_wrong_shapes_and_devices_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        lean(**make(2, 5) | changes)


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_refused(name):
    tensors = make(2, 5)
    with pytest.raises(TypeError, match=f"{name} must be floating point, got torch.int64"):
        lean(**tensors | {name: tensors[name].detach().long()})


def test_mixed_dtypes_are_refused_outside_of_autocast():
    with pytest.raises(TypeError, match=r"one dtype outside of autocast, got torch.bfloat16, torch.float32"):
        lean(**make(2, 5) | {"x": torch.zeros(2, 5, dtype=torch.bfloat16)})
