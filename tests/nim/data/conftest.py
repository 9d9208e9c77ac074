"""Images, folders and sources that the tests of data share, as fixtures that give the function or class."""

import numpy as np
import pytest
import torch
from PIL import Image

from denim.nim.data import Digits


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
