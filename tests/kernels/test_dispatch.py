"""Which implementation of an operator serves a call, and what importing the operators costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from denim.kernels import attack_step, dispatch, gelu_linear

AMD = dispatch.GPU("gcn", 64)
PIXELS = torch.full((2, 3), 0.5)


@pytest.fixture
def launched(monkeypatch):
    """Replaces the launcher of `attack_step` by one that serves float32, and records its calls."""
    calls = []

    def launch(pixels, *others, gpu):
        calls.append((len(others), gpu))
        return torch.full_like(pixels, 7)

    module = SimpleNamespace(serves=lambda pixels, *others: pixels.dtype == torch.float32, launch=launch)
    monkeypatch.setattr(dispatch, "_triton_module", lambda name: module)
    return calls


def step(pixels=PIXELS):
    return attack_step(pixels, pixels, torch.ones_like(pixels), step_size=0.125, epsilon=0.25)


def test_cpu_tensors_take_the_way_of_cuda_tensors_inside_triton_on_cpu_alone(launched):
    assert step().unique().tolist() == [0.625]
    for gpu in (AMD, dispatch.GPU("ptx", 32)):
        with dispatch.triton_on_cpu(gpu):
            assert step().unique().tolist() == [7]
            assert torch.compile(step, backend="aot_eager", fullgraph=True)(PIXELS).unique().tolist() == [7]
            assert step(PIXELS.double()).unique().tolist() == [0.625]  # what the launcher does not serve
        assert launched == [(4, gpu), (4, gpu)]
        launched.clear()
        assert step().unique().tolist() == [0.625]
    with pytest.raises(RuntimeError, match="stops"), dispatch.triton_on_cpu(AMD):
        raise RuntimeError("stops")
    assert step().unique().tolist() == [0.625]
    assert launched == []


X, WEIGHT = torch.linspace(-2, 2, 12).view(3, 4), torch.linspace(-1, 1, 8).view(2, 4)


def called(run):
    """The operators of Denim's that torch's dispatcher calls inside of `run`, and what it returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        result = run()
    return {event.name for event in profiler.events() if event.name.startswith("denim::")}, result


def test_calls_that_nothing_watches_go_to_the_reference(operators):
    def run():
        x = X.clone().requires_grad_()
        gelu_linear(x, WEIGHT).sum().backward()
        return x.grad

    names, gradient = called(run)
    assert names == set()
    with operators() as calls:
        names, watched = called(run)
    assert names == {"denim::gelu_linear", "denim::gelu_linear_backward"}
    assert {f"{name}.default".replace("::", ".") for name in names} <= set(calls)
    assert torch.equal(gradient, watched)


def test_subclasses_of_tensors_are_told_of_operators():
    seen = []

    class Told(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
            made.inner = inner
            return made

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*(value.inner if isinstance(value, Told) else value for value in args), **(kwargs or {}))

    assert torch.equal(gelu_linear(Told(X), WEIGHT), gelu_linear(X, WEIGHT))
    assert "denim.gelu_linear.default" in seen


def test_an_operator_without_a_derivative_says_so():
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gelu_linear(x, WEIGHT).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gelu_linear_backward.* no autograd formula"):
        gradient.sum().backward()


def test_without_triton_the_reference_serves(monkeypatch):
    monkeypatch.setattr(dispatch, "_triton_module", lambda name: None)
    with dispatch.triton_on_cpu(AMD):
        assert step().unique().tolist() == [0.625]
    with pytest.raises(ModuleNotFoundError, match="Triton is not installed"):
        dispatch.launcher("attack_step")


def test_launchers_take_the_arguments_of_their_operators():
    pytest.importorskip("triton")
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("denim::")}
    with_triton = sorted(name for name in names if name in dispatch._OPERATORS)
    # The two of denim.defense are there once that is imported.
    assert set(names) - set(with_triton) - {"number_of_call", "member_of_vmap"} == {"normal_noise"}
    for name in with_triton:
        arguments = [argument.name for argument in getattr(torch.ops.denim, name).default._schema.arguments]
        serves, launch = dispatch.launcher(name)
        assert list(inspect.signature(serves).parameters) == arguments
        parameters = inspect.signature(launch).parameters
        assert [key for key, value in parameters.items() if value.kind is value.POSITIONAL_OR_KEYWORD] == arguments
        assert parameters["gpu"].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(
    ("hip", "warp_size", "expected"),
    [(None, 32, ("ptx", 32)), ("6.3", 64, ("gcn", 64)), ("6.3", 32, ("plain", 32))],
    ids=["NVIDIA", "CDNA", "RDNA"],
)
def test_instruction_set_of_a_gpu(monkeypatch, hip, warp_size, expected):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(warp_size=warp_size))
    assert dispatch.gpu_of.__wrapped__(torch.device("cuda", 0)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("triton", ["present", "absent"])
def test_import_is_silent_and_loads_nothing_beyond_torch(triton):
    program = "import sys; "
    if triton == "absent":
        program += "sys.modules['triton'] = None; "
    program += (
        "import torch; before = set(sys.modules); import denim.kernels; "
        "loaded = {name for name in set(sys.modules) - before if not name.startswith('denim')}; "
        "assert not loaded, loaded; assert sys.modules.get('triton') is None, 'imported Triton'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
