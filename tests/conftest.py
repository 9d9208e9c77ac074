from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from denim.kernels.noise import noise_backend
from denim.nim.data import Digits

# The time that an example takes depends on what else the machine does.
settings.register_profile("denim", deadline=None)
settings.load_profile("denim")

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


def new_empty(tensor, *size, **options):
    """`Tensor.new_empty` by its operator: Dynamo of torch 2.11 does not trace a method kept under another name."""
    if len(size) == 1 and not isinstance(size[0], int | torch.SymInt):
        (size,) = size
    return torch.ops.aten.new_empty(tensor, size, **options)


# Fixtures that build kernels or start Triton's interpreter: many seconds, whichever test asks for them first.
SLOW_FIXTURES = {"built", "run_script", "run_in_process"}


def pytest_collection_modifyitems(items):
    """A test that uses one of `SLOW_FIXTURES` is marked slow."""
    for item in items:
        if not SLOW_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def unwritten_memory_is_nan():
    """Fresh memory is often zero by luck, which hides what an operator forgot to write."""
    _device_constructors()  # kept at its first call: `with torch.device(...)` must reach the functions themselves
    # Once for the session: compiled code is guarded on these functions, and new ones would compile everything again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
        yield


@pytest.fixture(scope="session", autouse=True)
def noise_compiled_in_this_process_alone():
    """Commands that tests start draw eagerly: compiling again in each would take longer than their work."""
    noise_backend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENIM_NOISE", "eager")
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """What tests index must not stay in the cache of whoever runs them, nor be found there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class _Call(NamedTuple):
    args: tuple
    result: object


@pytest.fixture(scope="session")
def operators():
    """operators(): inside, every call of an operator of torch, with arguments and result, by the operator's name."""

    @contextmanager
    def record():
        calls = defaultdict(list)

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                calls[str(func)].append(_Call(args, result))
                return result

        with Recorder():
            yield calls

    return record


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


@pytest.fixture(scope="session")
def run_script():
    """Runs a script of the tests in a process of its own, since Triton decides to interpret when it is imported.

    The script is named relative to this folder. Its first argument is a file in a folder of the test's, which also gets
    Triton's cache.
    """

    def run(script: str, *arguments) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        cache = Path(arguments[0]).parent / "cache"
        environment |= {"TRITON_CACHE_DIR": str(cache), "DENIM_NOISE": "eager", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "error::RuntimeWarning", Path(__file__).parent / script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


def _noise_image(height, width, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def _make_folder(root, classes=("cat", "dog"), each=3, splits=("train",)):
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(each):
                _noise_image(20 + k, 24, seed=100 * label + k).save(folder / f"{k:04d}.png")
    return root


class InMemory:
    """A source with ids all over int64, images of several sizes, and a count of what was read."""

    name, classes, channels, skipped = "in memory", ("a", "b"), 3, ()

    def __init__(self, count=23):
        words = np.random.default_rng(5).integers(-(2**63), 2**63 - 1, count, dtype=np.int64)
        words[:4] = np.array([0, -1, -(2**63), 2**63 - 1])[:count]
        self.ids = torch.from_numpy(words)
        self.labels = torch.arange(count) % 2
        self.images = [_noise_image(18 + k % 5, 20 + k % 3, seed=k) for k in range(count)]
        self.sizes = torch.tensor([image.size for image in self.images], dtype=torch.int32).reshape(count, 2)
        self.read_indices = []

    def __len__(self):
        return len(self.images)

    def where(self, index):
        return f"in memory:{index}"

    def read(self, index):
        self.read_indices.append(index)
        return self.images[index]


# Session scope lets hypothesis take them: nothing in them changes between examples.


@pytest.fixture(scope="session")
def noise_image():
    """noise_image(height, width, channels=3, seed=0): uniform noise as a Pillow image of mode L or RGB."""
    return _noise_image


@pytest.fixture(scope="session")
def make_folder():
    """make_folder(root, classes=("cat", "dog"), each=3, splits=("train",)): PNGs at root/split/class/0000.png."""
    return _make_folder


@pytest.fixture(scope="session")
def in_memory():
    """in_memory(count=23): a source without files."""
    return InMemory


@pytest.fixture(scope="session")
def digits():
    return Digits("train"), Digits("test")
