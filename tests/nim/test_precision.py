"""One word for the precision: what it means on a device, what it sets, and that all is as before after it."""

import pytest
import torch

from denim.nim.precision import PRECISIONS, precise, resolve_precision, tf32_products

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def settings():
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.is_autocast_enabled("cpu"),
    )


@pytest.fixture
def gpu(monkeypatch):
    """gpu(bf16, capability): what torch says of a GPU."""

    def play(bf16, capability):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return play


def test_auto_is_bf16_where_a_gpu_has_it(gpu):
    assert resolve_precision("auto", CPU) == "fp32"
    gpu(True, (9, 0))
    assert [resolve_precision(name, GPU) for name in PRECISIONS] == ["bf16", "bf16", "tf32", "fp32"]
    gpu(False, (7, 5))
    assert resolve_precision("auto", GPU) == "fp32"
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU of capability 8\.0"):
        resolve_precision("tf32", GPU)


def test_a_cpu_has_no_tf32():
    with pytest.raises(ValueError, match="not cpu: take fp32"):
        resolve_precision("tf32", CPU)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="auto, bf16, tf32 or fp32, got 'half'"):
        resolve_precision("half", CPU)


@pytest.mark.parametrize("before", [("highest", True), ("highest", False), ("high", False)])
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_for_products_and_convolutions_and_restored(allowed, before):
    start = settings()
    try:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
        with tf32_products(allowed):
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
        assert settings()[:2] == before
        with pytest.raises(ZeroDivisionError), tf32_products(allowed):
            1 / 0  # noqa: B018
        assert settings()[:2] == before
    finally:
        torch.set_float32_matmul_precision(start[0])
        torch.backends.cudnn.allow_tf32 = start[1]


def test_precise_sets_all_and_restores_all(gpu):
    start, x = settings(), torch.ones(2, 2)
    with precise("bf16", CPU) as resolved:
        assert resolved == "bf16"
        assert (x @ x).dtype == torch.bfloat16
        assert settings() == ("highest", False, True)
    assert settings() == start
    with precise("auto", CPU) as resolved:
        assert resolved == "fp32"
        assert (x @ x).dtype == torch.float32
        assert settings() == ("highest", False, False)
    gpu(True, (8, 0))
    with precise("tf32", GPU):
        assert settings() == ("high", True, False)
    assert settings() == start
