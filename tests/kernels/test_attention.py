from __future__ import annotations

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from denim.kernels import attention, attention_backends, attention_kernel

CPU_BACKENDS = ("auto", "sdpa", "math")


def make(shape=(2, 3, 5, 8), length=None, width=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, heads, queries, dim = shape
    length, width = length or queries, width or dim
    sizes = ((queries, dim), (length, dim), (length, width))
    return [torch.randn((batch, heads, *s), generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def reference(query, key, value):
    query, key, value = (tensor.detach().double().numpy() for tensor in (query, key, value))
    scores = np.einsum("bhnd,bhmd->bhnm", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return torch.from_numpy(np.einsum("bhnm,bhme->bhne", weights / weights.sum(-1, keepdims=True), value))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "length", "width"), [((2, 3, 5, 8), None, None), ((1, 2, 7, 12), 3, 5), ((2, 1, 1, 1), 9, 1)]
)
def test_equals_the_definition(backend, dtype, shape, length, width, global_rng_untouched):
    tensors = make(shape, length, width, dtype)
    out = attention(*tensors, backend=backend)
    assert out.dtype == dtype
    # Weighted means of values below 4; scores of bfloat16 are rounded at 2^-8 before the softmax.
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4 * 3 * 2**-8}[dtype]
    torch.testing.assert_close(out.double(), reference(*tensors), rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(backend):
    tensors = [tensor.requires_grad_() for tensor in make((2, 2, 3, 4), 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, backend=backend), tensors, fast_mode=True)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_views_of_packed_qkv(backend):
    """Views of (B, N, 3, heads, head_dim), the layout of a ViT block; gradients reach the packed tensor."""
    packed = torch.randn((2, 5, 3, 4, 8), generator=torch.Generator().manual_seed(0)).requires_grad_()
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    assert not query.is_contiguous()
    out = attention(query, key, value, backend=backend)
    torch.testing.assert_close(out.double(), reference(query, key, value), rtol=0, atol=2e-6)
    (grad,) = torch.autograd.grad(out.square().sum(), packed)
    other = packed.detach().double().requires_grad_()
    exact = attention(*other.permute(2, 0, 3, 1, 4).unbind(0), backend="math")
    (expected,) = torch.autograd.grad(exact.square().sum(), other)
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-5)


def test_backends_give_their_reasons():
    reasons = attention_backends(*make())
    assert list(reasons) == ["xformers", "sdpa", "math"]
    assert reasons["sdpa"] == reasons["math"] == []
    assert "CUDA" in reasons["xformers"][0]
    assert "cpu" in reasons["xformers"][0]


@pytest.mark.parametrize(
    ("dtype", "length", "name"),
    [(torch.bfloat16, 1024, "math"), (torch.bfloat16, 1025, "sdpa"), (torch.float32, 9, "sdpa")],
)
def test_bfloat16_on_a_cpu_is_computed_by_plain_products(dtype, length, name):
    query, key = torch.zeros(1, 1, 2, 8, dtype=dtype), torch.zeros(1, 1, length, 8, dtype=dtype)
    assert attention_kernel(query, key, key) == name
    assert next(iter(attention_backends(query, key, key))) == ("math" if name == "math" else "xformers")


def test_auto_takes_the_first_that_serves():
    tensors = make()
    assert attention_kernel(*tensors) == "sdpa"
    assert attention_kernel(*tensors, backend="math") == "math"
    assert torch.equal(attention(*tensors), attention(*tensors, backend="sdpa"))


def test_forced_backend_that_cannot_serve_says_why():
    with pytest.raises(
        ValueError, match=r"'xformers' cannot serve torch.float32 \(2, 3, 5, 8\) on cpu: .*CUDA and ROCm"
    ):
        attention(*make(), backend="xformers")


def test_unknown_backend_lists_the_valid_ones():
    with pytest.raises(ValueError, match="must be auto, xformers, sdpa, math, got 'flash'"):
        attention(*make(), backend="flash")


@pytest.mark.slow
def test_cpu_calls_do_not_import_xformers():
    code = (
        "import sys, torch; from denim.kernels import attention, attention_backends\n"
        "q = torch.zeros(1, 1, 2, 4); attention(q, q, q); attention_backends(q, q, q)\n"
        "print('xformers' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert printed.stdout.split() == ["False"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiles_into_one_graph(backend):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: attention(*t, backend=backend), fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5):
        tensors = [tensor.requires_grad_() for tensor in make((batch, 3, 6, 8))]
        expected = attention(*tensors, backend=backend)
        out = compiled(*tensors)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        for grad, plain in zip(grads, torch.autograd.grad(expected.square().sum(), tensors), strict=True):
            torch.testing.assert_close(grad, plain, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


class Xformers:
    """The part of xformers that Denim uses: forward and backward kernels with reasons, and the call, which is recorded.

    Refusals: {kernel: reasons}, such as {"flashB": ["too old"]}.
    """

    def __init__(self, families=("flash3", "flash", "cutlass", "ck"), **refusals) -> None:
        self.calls, self.asked = [], []
        self.fmha = SimpleNamespace(Inputs=lambda *tensors: tensors)
        for family in families:
            kernels = {part: self.kernel(family + part[0], refusals) for part in ("FwOp", "BwOp")}
            setattr(self.fmha, family, SimpleNamespace(**kernels))

    def kernel(self, name, refusals):
        def not_supported_reasons(inputs):
            self.asked.append((name, [tuple(tensor.shape) for tensor in inputs]))
            return refusals.get(name, [])

        return SimpleNamespace(NAME=name, not_supported_reasons=not_supported_reasons)

    def memory_efficient_attention(self, query, key, value, *, op):
        self.calls.append((query, key, value, [kernel.NAME for kernel in op]))
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)


@pytest.fixture
def on_cuda(monkeypatch):
    """CPU tensors whose device is CUDA, and `Xformers` in the place of xformers."""
    attention_module = sys.modules["denim.kernels.attention"]
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))

    def install(ops, message=""):
        monkeypatch.setattr(attention_module, "load_xformers", lambda: (ops, message))
        return ops

    return install


def packed_views():
    packed = torch.randn((2, 5, 3, 4, 8), generator=torch.Generator().manual_seed(0)).requires_grad_()
    return packed, [part.transpose(1, 2) for part in packed.unbind(2)]


def test_xformers_gets_the_views_themselves(on_cuda):
    ops = on_cuda(Xformers())
    packed, views = packed_views()
    out = attention(*views)
    (*tensors, kernels) = ops.calls[0]
    assert kernels == ["flash3F", "flash3B"]
    for index, tensor in enumerate(tensors):
        # (B, N, heads, head_dim) in the memory of (B, N, 3, heads, head_dim).
        assert tensor.shape == (2, 5, 4, 8)
        assert tensor.stride() == (5 * 96, 96, 8, 1)
        assert tensor.data_ptr() == packed.data_ptr() + 4 * 32 * index
    torch.testing.assert_close(out.double(), reference(*views), rtol=0, atol=2e-6)
    (grad,) = torch.autograd.grad(out.square().sum(), packed)
    (expected,) = torch.autograd.grad(attention(*views, backend="math").square().sum(), packed)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("refusals", "training", "evaluation"),
    [
        ({}, "flash3", "flash3"),
        ({"flash3F": ["not built"]}, "flash", "flash"),
        ({"flash3B": ["not built"]}, "flash", "flash3"),
        ({"flash3F": ["not built"], "flashB": ["head_dim"], "flashF": ["float32"]}, "cutlass", "cutlass"),
        ({"flash3B": ["no"], "flashB": ["no"], "cutlassB": ["not deterministic"]}, "ck", "flash3"),
    ],
)
def test_forward_and_backward_kernel_are_those_that_were_asked(on_cuda, refusals, training, evaluation):
    """A backward kernel that refuses matters only if a gradient is needed."""
    ops = on_cuda(Xformers(**refusals))
    _, views = packed_views()
    attention(*views)
    with torch.no_grad():
        attention(*views)
    attention(*(view.detach() for view in views))
    assert [kernels for *_, kernels in ops.calls] == [
        [f"{name}F", f"{name}B"] for name in (training, *[evaluation] * 2)
    ]
    assert attention_kernel(*views) == f"xformers {training}F {training}B"
    assert attention_kernel(*(view.detach() for view in views)) == f"xformers {evaluation}F"
    assert attention_backends(*views)["xformers"] == []
    assert all(shapes == [(2, 5, 4, 8)] * 3 for _, shapes in ops.asked)


def test_reasons_of_every_kernel_are_given(on_cuda):
    refusals = {f"{family}F": [f"{family} is too old"] for family in ("flash", "cutlass")}
    ops = on_cuda(Xformers(("flash", "cutlass"), **refusals, flashB=["flash is too old", "no backward"]))
    _, views = packed_views()
    expected = ["flashF: flash is too old; no backward", "cutlassF: cutlass is too old"]
    assert attention_backends(*views)["xformers"] == expected
    with pytest.raises(ValueError, match=r"flash is too old; no backward.*cutlass is too old"):
        attention(*views, backend="xformers")
    assert torch.equal(attention(*views), attention(*views, backend="sdpa"))
    assert ops.calls == []


@pytest.mark.parametrize(
    ("ops", "message", "reason"),
    [
        (None, "xformers cannot be imported: no", "xformers cannot be imported: no"),
        (Xformers(()), "", "this xformers has none of the kernels flash3, flash, cutlass and ck"),
    ],
)
def test_without_xformers_sdpa_serves(on_cuda, ops, message, reason):
    on_cuda(ops, message)
    _, views = packed_views()
    assert attention_backends(*views) == {"xformers": [reason], "sdpa": [], "math": []}
    assert torch.equal(attention(*views), attention(*views, backend="sdpa"))


def test_inside_compile_sdpa_serves(on_cuda, monkeypatch):
    ops = on_cuda(Xformers())
    _, views = packed_views()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    reasons = ["inside torch.compile SDPA is used: it does not break the graph"]
    assert attention_backends(*views) == {"xformers": reasons, "sdpa": [], "math": []}
    assert torch.equal(attention(*views), attention(*views, backend="sdpa"))
    assert ops.calls == []


# Fake CUDA tensors have a device and no memory. xformers asks torch for the capability of that device.
INSTALLED = """
import inspect, json, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from denim.kernels import attention_backends, attention_kernel
from denim.kernels.attention import load_xformers

ops, _ = load_xformers()
x = torch.zeros(1, 2, 3, 8)
for pair in [getattr(ops.fmha, name) for name in ("flash3", "flash", "cutlass", "ck")]:
    for op in (pair.FwOp, pair.BwOp):
        reasons = op.not_supported_reasons(ops.fmha.Inputs(x, x, x))
        assert isinstance(op.NAME, str) and any("device=cpu" in reason for reason in reasons), op
assert inspect.signature(ops.memory_efficient_attention).parameters["op"].kind.name == "KEYWORD_ONLY"

torch.cuda.get_device_capability = lambda *_: (9, 0)
answers = {}
with FakeTensorMode():
    for dtype in ("float32", "bfloat16", "float16"):
        for head_dim in (32, 64, 80, 12):
            x = torch.empty(2, 3, 5, head_dim, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
            kernel = attention_kernel(x, x, x)
            answers[f"{dtype} {head_dim}"] = [kernel, attention_kernel(*[x.detach()] * 3), attention_backends(x, x, x)]
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_the_installed_xformers_serves_on_a_gpu_of_capability_9():
    """In a process of its own, since nothing else here imports xformers: names, signature, reasons, and the choice."""
    pytest.importorskip("xformers", reason="xformers is a dependency on Linux x86-64 alone")
    printed = subprocess.run([sys.executable, "-c", INSTALLED], check=True, capture_output=True, text=True)
    answers = json.loads(printed.stdout)
    for case, (training, evaluation, reasons) in answers.items():
        dtype, head_dim = case.split()
        if dtype != "float32" and head_dim == "12":  # half precision takes multiples of eight alone
            assert (training, evaluation) == ("sdpa", "sdpa")
            needed = "in half precision xformers takes head dimensions that are multiples of 8, not 12"
            assert reasons["xformers"] == [needed]
        else:
            family = "cutlass" if dtype == "float32" else "fa"
            assert re.fullmatch(rf"xformers {family}\S*F\S* {family}\S*B\S*", training), case
            assert re.fullmatch(rf"xformers {family}\S*F\S*", evaluation), case
            assert reasons["xformers"] == []


def test_the_cuda_runtime_of_xformers_is_loaded_from_its_wheel(monkeypatch, tmp_path):
    module, loaded = sys.modules["denim.kernels.attention"], []
    monkeypatch.setattr(module.ctypes, "CDLL", loaded.append)
    files = [
        SimpleNamespace(name=name, locate=lambda name=name: tmp_path / name) for name in ("a.h", "libcudart.so.12")
    ]
    monkeypatch.setattr(module.importlib.metadata, "files", lambda name: files)
    module._preload_cuda_runtime()
    assert loaded == [str(tmp_path / "libcudart.so.12")]


def test_without_the_wheel_nothing_is_loaded(monkeypatch):
    module = sys.modules["denim.kernels.attention"]
    monkeypatch.setattr(module.ctypes, "CDLL", None)

    def missing(name):
        raise module.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module.importlib.metadata, "files", missing)
    module._preload_cuda_runtime()


GOOD = (2, 3, 5, 8)


@pytest.mark.parametrize("call", [attention, attention_backends, attention_kernel])
@pytest.mark.parametrize(
    ("place", "tensor", "error", "message"),
    [
        (0, torch.zeros(3, 5, 8), ValueError, r"takes \(B, heads, N, head_dim\) tensors"),
        (1, torch.zeros(3, 5, 8), ValueError, r"key \(3, 5, 8\)"),
        (2, torch.zeros(3, 5, 8), ValueError, r"value \(3, 5, 8\)"),
        (2, torch.zeros(2, 3, 4, 8), ValueError, "key and value of one length"),
        (0, torch.zeros(2, 3, 5, 4), ValueError, "agree in batch, heads and head_dim"),
        (0, torch.zeros(2, 1, 5, 8), ValueError, "agree in batch, heads and head_dim"),
        (0, torch.zeros(1, 3, 5, 8), ValueError, "agree in batch, heads and head_dim"),
        (1, torch.zeros(GOOD, dtype=torch.float64), TypeError, "key is torch.float64 and query is torch.float32"),
        (2, torch.zeros(GOOD, dtype=torch.bfloat16), TypeError, "value is torch.bfloat16"),
        (1, torch.zeros(GOOD, device="meta"), ValueError, "key is on meta and query is on cpu"),
        (2, torch.zeros(GOOD, device="meta"), ValueError, "value is on meta and query is on cpu"),
    ],
)
def test_bad_input_is_refused(call, place, tensor, error, message):
    tensors = [torch.zeros(GOOD) for _ in range(3)]
    call(*tensors)
    tensors[place] = tensor
    with pytest.raises(error, match=message):
        call(*tensors)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="takes floating point tensors"):
        attention(*(torch.zeros(GOOD, dtype=torch.int64) for _ in range(3)))
