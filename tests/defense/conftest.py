from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from denim.kernels import attack_start, attack_step
from denim.nim.data import EvalView, TorchLoader, open_source


@pytest.fixture(scope="session")
def digit_pixels() -> Callable[[str], tuple[Tensor, Tensor, Tensor]]:
    """Pixels in [0, 1], labels and ids of a split of the digits."""

    def of(split: str) -> tuple[Tensor, Tensor, Tensor]:
        loader = TorchLoader(open_source("digits", split), EvalView(16), 2000, shuffle=False, last="keep")
        (batch,) = loader.epoch(0)
        return batch.images.permute(0, 3, 1, 2).float() / 255, batch.labels, batch.ids

    return of


@pytest.fixture(scope="session")
def adversarially_trained(digit_pixels) -> Callable[..., nn.Module]:
    """Adversarial training of a small network on digits, with four steps of PGD."""

    def train(make: Callable[[], nn.Module], *, epochs: int, epsilon: float, step_size: float) -> nn.Module:
        pixels, labels, _ = digit_pixels("train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make()
            optimizer = torch.optim.Adam(model.parameters(), 3e-3)
            for _ in range(epochs):
                for chosen in torch.randperm(len(pixels)).split(128):
                    clean, true = pixels[chosen], labels[chosen]
                    attacked = attack_start(clean, chosen, epsilon=epsilon)
                    for _ in range(4):
                        leaf = attacked.requires_grad_()
                        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), true), leaf)
                        attacked = attack_step(leaf, clean, gradient, step_size=step_size, epsilon=epsilon)
                    optimizer.zero_grad()
                    F.cross_entropy(model(attacked), true).backward()
                    optimizer.step()
        return model.eval().requires_grad_(False)

    return train
