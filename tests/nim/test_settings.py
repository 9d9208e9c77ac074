"""Settings: bad ones are refused before any work."""

import math

import pytest
import torch

from denim.nim.settings import TrainConfig, pick_device

SETTINGS = {
    "epochs": 4, "warmup_epochs": 1, "batch_size": 2, "base_lr": 1.0, "betas": (0.9, 0.95), "crop_scale": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 3, "accumulate": 2}, "multiple of accumulate"),
        ({"warmup_epochs": 5}, "warmup_epochs"),
        ({"base_lr": math.nan}, "base_lr"),
        ({"precision": "fp8"}, "auto, bf16, tf32 or fp32"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(out=tmp_path / "run", **{**SETTINGS, **changes})
    assert not (tmp_path / "run").exists()


def test_devices_are_checked():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="unknown device"):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="denim doctor"):
            pick_device("cuda")
