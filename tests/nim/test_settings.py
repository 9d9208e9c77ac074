"""Settings: bad ones are refused before any work."""

import math

import pytest
import torch

from denim.nim.settings import FinetuneConfig, PretrainConfig, TrainConfig, pick_device

SETTINGS = {
    "epochs": 4, "warmup_epochs": 1, "batch_size": 2, "base_lr": 1.0, "betas": (0.9, 0.95), "crop_scale": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 3, "micro_batch": 2}, "multiple of micro_batch"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"clip_grad": 0.0}, "clip_grad must be positive"),
        ({"stall_timeout": math.inf}, "stall_timeout must be positive"),
        ({"warmup_epochs": 5}, "warmup_epochs"),
        ({"base_lr": math.nan}, "base_lr"),
        ({"precision": "fp8"}, "auto, bf16, tf32 or fp32"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"min_lr": math.nan}, "min_lr must not be negative, got nan"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"seed": 2**63}, "seed must be an int64"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(out=tmp_path / "run", **{**SETTINGS, **changes})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("batch_size", "micro_batch", "world", "passes"),
    [(12, None, 1, (12, 1)), (12, None, 3, (4, 1)), (12, 2, 1, (2, 6)), (12, 2, 3, (2, 2)), (12, 6, 3, (4, 1))],
)
def test_a_batch_is_cut_among_devices_and_passes(tmp_path, batch_size, micro_batch, world, passes):
    settings = {**SETTINGS, "batch_size": batch_size, "micro_batch": micro_batch}
    assert TrainConfig(out=tmp_path / "run", **settings).passes(world) == passes


@pytest.mark.parametrize(
    ("images", "batch_size"),
    [(1, 1), (19, 1), (20, 2), (1197, 64), (1280, 128), (40_959, 2048), (40_960, 4096), (10**9, 4096)],
)
def test_a_batch_fits_the_data(tmp_path, images, batch_size):
    """The published batch, or the largest power of two of which an epoch has at least 10."""
    assert PretrainConfig(out=tmp_path).for_data(images).batch_size == batch_size
    assert PretrainConfig(out=tmp_path, batch_size=48).for_data(images).batch_size == 48


@pytest.mark.parametrize(
    ("changes", "images", "batch_size"),
    [
        ({}, 40, 16),  # a group, however few images there are
        ({}, 1197, 64),
        ({"mixup_group": 6}, 1197, 96),
        ({"mixup": 0.0, "cutmix": 0.0}, 40, 4),
        ({}, 50_000, 1024),
    ],
)
def test_a_batch_that_fits_the_data_has_whole_groups(tmp_path, changes, images, batch_size):
    config = FinetuneConfig(out=tmp_path, denoiser=tmp_path, epochs=1, **changes)
    assert config.for_data(images).batch_size == batch_size


@pytest.mark.parametrize(("micro_batch", "world", "message"), [(None, 5, "of the 5 devices"), (4, 2, "is 6 images on")])
def test_a_batch_that_cannot_be_cut_is_refused(tmp_path, micro_batch, world, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(out=tmp_path / "run", **{**SETTINGS, "batch_size": 12, "micro_batch": micro_batch}).passes(world)


@pytest.mark.parametrize(
    ("name", "expected"), [("cuda", "cuda:3"), ("auto", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_each_local_rank_has_a_gpu_of_its_own(monkeypatch, name, expected):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": -1.0}, "mixup must not be negative, got -1.0"),
        ({"cutmix": math.inf}, "cutmix must not be negative, got inf"),
        ({"layer_decay": math.nan}, "layer_decay must be positive, got nan"),
        ({"layer_decay": 0.0}, "layer_decay must be positive, got 0.0"),
    ],
)
def test_bad_settings_of_fine_tuning_are_refused(tmp_path, changes, message):
    FinetuneConfig(out=tmp_path, denoiser=tmp_path)
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(out=tmp_path, denoiser=tmp_path, **changes)


def test_devices_are_checked():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="unknown device"):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="denim doctor"):
            pick_device("cuda")
