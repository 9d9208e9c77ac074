"""The imagined GPU tells launches, and finds every way in which the host waits."""

import pytest
import torch
import torch.nn.functional as F

from denim.benchmarks.launches import ImaginedGPU, WaitError
from denim.kernels import Domain, derive_seeds


@pytest.fixture
def gpu():
    with ImaginedGPU() as gpu:
        yield gpu


def on(gpu, *shape):
    return torch.zeros(shape or (3, 4), device="cuda")


def test_its_tensors_are_on_a_cuda_device(gpu):
    tensor = torch.zeros(3).to("cuda")
    for made in (tensor, on(gpu), torch.arange(3, device=torch.device("cuda", 0)), tensor.new_empty(2) + 1):
        assert made.device == torch.device("cuda", 0)
        assert made.is_cuda
    assert torch.zeros(3).device.type == "cpu"
    assert torch.zeros(3).tolist() == [0, 0, 0]


def test_after_it_nothing_is_changed():
    exchange = torch.cuda._exchange_device
    with ImaginedGPU():
        assert torch.cuda._exchange_device is not exchange
    assert torch.cuda._exchange_device is exchange
    assert torch.zeros(1, device="meta").device.type == "meta"


def test_launches_are_operators_without_views_and_allocations(gpu):
    tensor, host = on(gpu), torch.zeros(3, 4)
    with gpu.watch() as launches:
        _ = host + 1
        _ = tensor[1:].t().reshape(8).unsqueeze(0)  # the reshape copies
        _ = torch.empty(5, device="cuda"), tensor.new_empty(3)
        _ = F.linear(tensor, tensor).relu_() * 2 + torch.ones((), device="cuda")
        _ = derive_seeds(0, Domain.TRAINING, torch.arange(3, device="cuda"))
    assert dict(launches) == {
        "aten.clone.default": 1, "aten.mm.default": 1, "aten.relu_.default": 1, "aten.mul.Tensor": 1,
        "aten.add.Tensor": 1, "aten.ones.default": 1, "aten.arange.default": 1, "denim.derive_seeds.default": 1,
    }  # fmt: skip


def test_backward_is_counted_and_watched(gpu):
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float(gradient.sum())

    leaf = on(gpu).requires_grad_()
    with gpu.watch() as launches:
        leaf.exp().sum().backward()
    assert launches["aten.mul.Tensor"] == 1
    with pytest.raises(WaitError), gpu.watch():
        Reads.apply(leaf).sum().backward()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.zeros(3, 4).copy_(x),
        lambda x: int(x.sum()),
        lambda x: bool(x.any()),
        lambda x: 1 if x.max() > 2 else 0,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: torch.zeros(3, 4).to("cuda"),
        lambda x: torch.zeros(3, 4).to("cuda", non_blocking=True),
        lambda x: torch.zeros(3, 4).pin_memory().to("cuda"),
        lambda x: x.copy_(torch.zeros(3, 4)),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x.new_tensor([1.0]),
        lambda x: x[torch.tensor([0, 1])],
    ],
)
def test_waiting_is_found(gpu, wait):
    tensor = on(gpu)
    with pytest.raises(WaitError), gpu.watch():
        wait(tensor)


def test_what_does_not_wait_passes(gpu):
    tensor = on(gpu)
    with gpu.watch() as launches:
        torch.zeros(3, 4).pin_memory().to("cuda", non_blocking=True)
        tensor.copy_(torch.zeros(3, 4).pin_memory(), non_blocking=True)
        tensor.mul_(torch.tensor(3.0))  # a number of the host
        torch.where(tensor > 0, tensor, 0.0)
    assert launches["aten._to_copy.default"] == launches["aten.copy_.default"] == 1
