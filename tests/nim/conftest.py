from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from denim.benchmarks.launches import ImaginedGPU
from denim.nim.attention import Attention


@pytest.fixture
def step_on_gpu(monkeypatch):
    """step_on_gpu(trainer, config): the launches of an update of `pretrain` or `finetune`, by operator.

    The update, with its batch of the loader, runs on an imagined GPU, where it must not wait. A whole update runs
    before it, in which the optimizer makes its state.
    """

    def run(trainer, config):
        from denim.nim import engine

        module, begun = importlib.import_module(trainer.__module__), []
        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr(module, "train", lambda *arguments, **options: begun.append(arguments))
        monkeypatch.setattr(Attention, "backend", "math")  # the others ask the driver for the GPU's generation
        with ImaginedGPU() as gpu:
            trainer(config, Console(quiet=True))
            ((config, model, groups, loader, loss),) = begun
            state = engine._begin(config, model.train(), groups, loader, loss, updates_per_epoch=4)
            # Without a driver torch's DataLoader pins nothing; that it is asked to is tested with the loaders.
            parts = (replace(batch, images=gpu.pin(batch.images)) for batch in loader.epoch(0))
            for _ in range(2):
                with gpu.watch() as launches, torch.random.fork_rng(devices=[]):
                    engine.training_step(state, parts)
            assert state.update == 2
        return launches

    return run
