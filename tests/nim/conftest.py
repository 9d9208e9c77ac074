from __future__ import annotations

import contextlib
import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from denim.benchmarks.launches import ImaginedGPU
from denim.nim import Autoencoder, Classifier
from denim.nim.attention import Attention
from denim.nim.prefetch import prefetched
from denim.nim.ranks import Ranks


class BegunError(Exception):
    """Raised in place of the training, once everything for it is there."""


@pytest.fixture
def step_on_gpu(monkeypatch):
    """step_on_gpu(trainer, config): launches of an update of `pretrain` or `finetune`, outside of models and optimizer.

    The update, with its batch of the loader, runs on an imagined GPU, where it must not wait. A whole update runs
    before it, in which the optimizer makes its state. The models' own launches are those of calling them again, with
    the same arguments, and of their backward passes.
    """

    def run(trainer, config):
        from denim.nim import engine

        module, begun = importlib.import_module(trainer.__module__), []

        def stop(*arguments, **options):
            begun.append(arguments)
            raise BegunError

        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr(module, "train", stop)
        monkeypatch.setattr(Attention, "backend", "math")  # the others ask the driver for the GPU's generation
        calls = []
        for kind in (Autoencoder, Classifier):
            monkeypatch.setattr(kind, "forward", recorded(kind.forward, calls))
        with ImaginedGPU() as gpu:
            with contextlib.suppress(BegunError):
                # Dynamo does not trace under the modes of an imagined GPU.
                trainer(replace(config, compile=False), Console(quiet=True))
            ((config, task, groups, loader),) = begun
            task.model.train()
            state = engine.begin(config, task, groups, loader, Ranks(), updates_per_epoch=4)

            def prepare(batch, epoch):
                # Without a driver torch's DataLoader pins nothing; that it is asked to is tested with the loaders.
                return task.prepare(replace(batch, images=gpu.pin(batch.images)), epoch)

            counts = {"first": 0, "per_epoch": 4 * state.passes, "stop": 4 * state.passes}
            parts = prefetched(loader, prepare, torch.device("cuda"), **counts, threaded=False)
            for _ in range(2):
                calls.clear()
                with gpu.watch() as launches, torch.random.fork_rng(devices=[]):
                    engine.training_step(state, parts)
            assert state.update == 2
            state.optimizer.zero_grad()
            results = []
            with gpu.watch() as inside:
                for forward, arguments, graded in calls:
                    with torch.set_grad_enabled(graded):
                        results.append(forward(*arguments))
            gradients = [torch.empty_like(result) for result in results if result.requires_grad]
            with gpu.watch() as backward:
                torch.autograd.backward([result for result in results if result.requires_grad], gradients)
                state.optimizer.step()
        return launches - inside - backward

    return run


def recorded(forward, calls):
    def call(*arguments):
        given = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
        calls.append((forward, given, torch.is_grad_enabled()))
        return forward(*arguments)

    return call


# tests/fixtures/vit_mae.safetensors: what `save_pretrained` of transformers 5.24.0 writes for a
# ViTMAEForPreTraining with random weights, under "weights." (8 x 8 pixels, patches of 2, encoder 16 wide, 2 blocks, 4
# heads, decoder 8 wide, 1 block, 2 heads), and its predictions (2, 16, 12) for pixels that are normalised already:
# "masked" with the 4 patches visible that come first in "order", "whole" with all. Parameters are normal with standard
# deviation 0.3, those of the embeddings 0.0009: the variance of a first token is about 1e-5, so eps shows.
VIT_MAE = load_file(Path(__file__).parents[1] / "fixtures" / "vit_mae.safetensors")
NAMINGS = {
    "files of 5": (),
    "files of 4": ((r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),),
    "modules of 5": (
        (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
        (r"^vit\.encoder\.layer\.", "vit.layers."),
        (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    ),
}


@pytest.fixture(params=NAMINGS)
def vit_mae(request, tmp_path):
    """A file of transformers in each naming, and what transformers predicts: pixels, order, masked and whole."""
    state = {name.removeprefix("weights."): value for name, value in VIT_MAE.items() if name.startswith("weights.")}
    for pattern, theirs in NAMINGS[request.param]:
        state = {re.sub(pattern, theirs, name): value for name, value in state.items()}
    save_file(state, tmp_path / "vit_mae.safetensors")
    return tmp_path / "vit_mae.safetensors", VIT_MAE
