from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from denim.kernels.noise import noise_backend

POISONED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def poisoned(allocate):
    """`allocate`, with NaN in the memory it returns; tracing, fake and meta tensors pass untouched."""

    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or tensor.is_meta:
            return tensor
        if tensor.dtype in POISONED and tensor.layout == torch.strided and _get_current_dispatch_mode() is None:
            tensor.detach().fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def unwritten_memory_is_nan():
    """Fresh memory is often zero by luck, which hides what an operator forgot to write."""
    # Once for the session: compiled code is guarded on these functions, and new ones would compile everything again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        yield


@pytest.fixture(scope="session", autouse=True)
def noise_compiled_in_this_process_alone():
    """Commands that tests start draw eagerly: compiling again in each would take longer than their work."""
    noise_backend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENIM_NOISE", "eager")
        yield


@pytest.fixture
def global_rng_untouched():
    """Fails where the test, or what it calls, reads or seeds the global torch generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global torch generator was read or seeded"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real images for tests (DENIM_DATA, or shared/data beside the repository); skips where there are none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DENIM_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no folder of real images at {folder}; set DENIM_DATA to one that holds cifar10_jpeg.tar.xz")
    return folder
