"""The product on its compiled kernels: operations take the way of CUDA tensors, and what is compiled for an H100 runs.

Held against the same runs on the torch references.
"""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from rich.console import Console

from denim.benchmarks.machine_code import run_on_cpu
from denim.defense import Attack, De3
from denim.kernels.dispatch import GPU, triton_on_cpu
from denim.nim import Autoencoder, FinetuneConfig, PretrainConfig, finetune, parallel, pretrain

pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
# Three updates.
TINY = {
    "epochs": 1, "warmup_epochs": 0, "batch_size": 4, "flip": False, "log_every": 1, "device": "cpu",
    "precision": "fp32", "loader": "torch",
}  # fmt: skip
PATHS = ("reference", "compiled")


@contextlib.contextmanager
def path(name, kernels):
    """Inside "compiled", operations run their kernels' machine code; `kernels` gets their names."""
    if name == "reference":
        yield
        return
    with pytest.MonkeyPatch.context() as patch, triton_on_cpu(GPU("ptx", 32)), run_on_cpu(90) as launches:
        patch.setattr(parallel, "LEAN_WIDTH", 0)  # as on a GPU, where models of any width are lean
        yield
    kernels.update(launch.kernel for launch in launches)


def losses(out):
    return torch.tensor([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])


@pytest.fixture(scope="module")
def data(make_folder, tmp_path_factory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("data"), each=6))


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> dict:
    """{path: (folder of the run, names of the kernels that ran)}."""
    runs = {}
    for name in PATHS:
        out, kernels = tmp_path_factory.mktemp(name) / "run", set()
        with path(name, kernels):
            pretrain(PretrainConfig(out=out, data=data, preset="micro", base_lr=0.1, **TINY), QUIET)
        runs[name] = out, kernels
    return runs


@pytest.fixture(scope="module")
def finetuned(data, pretrained, tmp_path_factory) -> dict:
    """{path: (classifier, folder of the run, names of the kernels that ran)}, all from one denoiser."""
    denoiser, runs = pretrained["reference"][0] / "model", {}
    for name in PATHS:
        out, kernels = tmp_path_factory.mktemp(name) / "run", set()
        with path(name, kernels):
            settings = {"sigma": "70", "auto_augment": None, "base_lr": 0.5, "mixup_group": 4, **TINY}
            config = FinetuneConfig(out=out, data=data, denoiser=denoiser, **settings)
            runs[name] = finetune(config, QUIET), out, kernels
    return runs


def test_pretraining_has_the_same_losses(pretrained):
    """Normals differ by 1e-5 at most (the noise contract), sums by their order, so each loss by far less than 1e-4 of
    it. Adam may turn the sign of an update whose gradient is nearly zero, which moves the later losses as little."""
    (reference, none), (compiled, kernels) = (pretrained[name] for name in PATHS)
    values = losses(reference)
    assert len(values) == 3
    torch.testing.assert_close(losses(compiled), values, rtol=1e-4, atol=0)
    assert values.unique().numel() == 3
    assert not none
    assert kernels == {
        "decode_kernel",  # of the picture at a checkpoint
        "norm_kernel",
        "norm_backward_kernel",
        "gelu_kernel",
        "gelu_backward_kernel",
        "noise_patchify_kernel",
        "partials_kernel",
        "loss_kernel",
        "prediction_grad_kernel",
        "seeds_kernel",
        "words_kernel",
    }


def test_finetuning_has_the_same_losses(finetuned):
    (_, reference, none), (_, compiled, kernels) = (finetuned[name] for name in PATHS)
    values = losses(reference)
    torch.testing.assert_close(losses(compiled), values, rtol=1e-4, atol=0)
    assert values.unique().numel() == 3
    assert not none
    assert {"noise_patchify_kernel", "decode_kernel", "seeds_kernel", "words_kernel"} <= kernels
    assert {"norm_kernel", "norm_backward_kernel", "gelu_kernel", "gelu_backward_kernel"} <= kernels


@pytest.fixture(scope="module")
def defense(pretrained, finetuned) -> De3:
    denoiser = Autoencoder.from_pretrained(pretrained["reference"][0] / "model")
    return De3(denoiser, finetuned["reference"][0], 70, seed=1)


@pytest.fixture(scope="module")
def images() -> tuple:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 16, 16, generator=generator), torch.arange(2), torch.arange(2)


def test_a_sweep_has_the_same_logits(defense, images):
    """Normals differ by 1e-5 at most, and by 1e-7 on average; the first layer averages over them."""
    pixels, _, ids = images
    seeds, curves, kernels = defense.seeds(0, 1, ids, 2), {}, set()
    for name in PATHS:
        with path(name, kernels):
            curves[name] = defense.sweep(pixels, sigmas=[0, 70], draws=2, seeds=seeds)
    assert curves["compiled"].shape == (2, 2, 2, 2)
    torch.testing.assert_close(curves["compiled"], curves["reference"], rtol=0, atol=1e-5)
    # The levels differ by far more than the tolerance; how far depends on three updates of a classifier.
    assert (curves["reference"][0] - curves["reference"][1]).abs().max() > 1e-3
    assert kernels >= {"noise_patchify_kernel", "decode_kernel"}


def test_an_attack_has_the_same_pixels(defense, images):
    """But where a gradient is so small that rounding turns its sign."""
    pixels, labels, ids = images
    attacked, kernels = {}, set()
    for name in PATHS:
        with path(name, kernels):
            attacked[name] = Attack.parse("pgd:32/255,steps=2,eot=2").run(defense, pixels, labels, ids, seed=0)
    got, expected = attacked["compiled"].pixels, attacked["reference"].pixels
    assert (got - expected).abs().gt(1e-6).float().mean() < 0.01
    assert (expected - pixels).abs().max() > 0.1
    assert kernels == {
        "attack_start_kernel",
        "attack_step_kernel",
        "noise_patchify_kernel",
        "noise_patchify_backward_kernel",
        "decode_kernel",
        "decode_backward_kernel",
        "seeds_kernel",
    }
