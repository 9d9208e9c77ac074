"""Pretraining on the digits: it learns, it keys its noise, and a resumed run is the same run."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator

from denim.nim import Autoencoder, Objective, PretrainConfig, preset, pretrain
from denim.nim.data import EvalView, ManifestError, TorchLoader
from denim.nim.pretraining import PretrainTask
from denim.nim.run import MEASURED, fitted, training_source
from denim.nim.saving import latest_checkpoint

QUIET = Console(quiet=True)
FAST = {
    "preset": "micro", "data": "digits", "epochs": 2, "warmup_epochs": 0, "batch_size": 256, "base_lr": 2e-3,
    "crop_scale": None, "flip": False, "log_every": 1, "device": "cpu",
}  # fmt: skip


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_defaults_are_the_published_recipe(tmp_path):
    config = PretrainConfig(out=tmp_path)
    assert config.warmup_epochs is config.batch_size is None
    config = config.for_data(1_281_167)
    assert (config.epochs, config.warmup_epochs, config.batch_size) == (800, 40, 4096)
    assert config.lr == pytest.approx(1.5e-4 * 16)
    assert (config.betas, config.weight_decay, config.crop_scale) == ((0.9, 0.95), 0.05, (0.2, 1.0))
    assert str(Objective.published(config.objective, config.sigma).sigma) == "gamma:25,3"
    assert (config.preset, config.target) == ("base", "norm")


@pytest.mark.slow
def test_digits_need_no_settings(tmp_path):
    """The published batch is larger than all digits together. What is chosen is in run.json, and one line says it."""
    console = Console(file=io.StringIO(), width=200)
    config = PretrainConfig(out=tmp_path / "run", data="digits", preset="micro", epochs=1, device="cpu")
    pretrain(config, console)
    assert console.file.getvalue().splitlines()[0] == (
        "digits/train: 1,197 images in batches of 64 (of the published 4096 an epoch would have fewer than 10), "
        "0.05 of 1 epochs of warm-up, learning rate 3.75e-05"
    )
    settings = json.loads((config.out / "run.json").read_text())
    assert (settings["batch_size"], settings["warmup_epochs"]) == (64, 0.05)
    pretrain(replace(config, resume=True), QUIET)  # the same settings are found again


@pytest.mark.parametrize(("objective", "sigma"), [("nim", "100"), ("mae", None), ("dmae", "100")])
def test_a_picture_shows_degraded_rebuilt_and_clean_images(objective, sigma, digits):
    model = Autoencoder(preset("micro", target="raw", objective=objective)).train()
    batch = next(TorchLoader(digits[0], EvalView(16), 3, shuffle=False).epoch(0))
    task = PretrainTask(model, Objective.published(objective, sigma), seed=0, examples=batch)
    state, calls = torch.get_rng_state(), []
    model.register_forward_hook(lambda *_: calls.append((model.training, torch.is_grad_enabled())))
    picture = task.picture()
    assert (model.training, calls) == (True, [(False, False)])
    assert torch.equal(torch.get_rng_state(), state)
    assert picture.shape == (1, 3 * 16, 3 * 16)
    degraded, rebuilt, clean = picture.split(16, dim=-1)
    assert torch.equal(clean, (batch.images.permute(0, 3, 1, 2) / 255).flatten(0, 2).reshape(1, 48, 16))
    error = (degraded - clean).abs()
    if objective == "nim":
        assert 0.05 < error.mean() < 100 / 255  # at sigma 100, what is not clipped
    else:
        assert (degraded == 0.5).float().mean() == pytest.approx(0.75, abs=0.02)  # hidden patches
        assert (objective == "mae") == (error[degraded != 0.5].max() == 0)
    assert not torch.equal(rebuilt, clean)
    assert torch.equal(picture, task.picture())  # the same noise at every checkpoint
    assert PretrainTask(model, task.objective, seed=0).picture() is None


@pytest.mark.parametrize(("base_lr", "warns"), [(9e-6, True), (1e-5, False), (1e-2, False), (1.1e-2, True)])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_learning_rate_far_from_what_is_usual_warns(tmp_path, recwarn, digits, base_lr, warns, is_first):
    config = PretrainConfig(out=tmp_path, base_lr=base_lr, batch_size=128)
    fitted(config, digits[0], QUIET, is_first=is_first)
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (warns and is_first)
    assert all(f"learning rate of {base_lr / 2:.3g}, far from what is usual" in text for text in said)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "target"), [("nim", "raw"), ("mae", "norm"), ("dmae", "norm")])
def test_every_objective_learns(tmp_path, objective, target):
    out = tmp_path / "run"
    model = pretrain(PretrainConfig(out=out, objective=objective, target=target, **FAST), QUIET)
    values = losses(out)
    assert len(values) == 8
    assert values[-1] < 0.8 * values[0]
    saved = Autoencoder.from_pretrained(out / "model")
    assert saved.config.objective == objective
    assert saved.config.target == target
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in model.state_dict().items())
    events = event_accumulator.EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"loss", "lr", "grad_norm", *MEASURED} <= set(events.Tags()["scalars"])
    assert [picture.step for picture in events.Images("reconstructions")] == [4, 8]  # at checkpoints


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path):
    first, again, other = (
        losses_of(tmp_path / name, seed) for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again
    assert first != other


def losses_of(out, seed):
    pretrain(PretrainConfig(out=out, seed=seed, **{**FAST, "epochs": 1}), QUIET)
    return losses(out)


@pytest.mark.slow
def test_a_run_stopped_within_an_epoch_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole = pretrain(PretrainConfig(out=tmp_path / "whole", checkpoint_every=3, **FAST), QUIET)
    calls = []

    def interrupted(self, *arguments):
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, *arguments)

    original = Objective.loss
    monkeypatch.setattr(Objective, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainConfig(out=tmp_path / "run", checkpoint_every=3, **FAST), QUIET)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path / "run").name == "00000003"
    resumed = pretrain(PretrainConfig(out=tmp_path / "run", checkpoint_every=3, resume=True, **FAST), QUIET)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")


def test_a_run_of_the_first_version_resumes(tmp_path):
    settings = {**FAST, "epochs": 1, "batch_size": 512, "img_size": 16}
    pretrain(PretrainConfig(out=tmp_path / "run", **settings), QUIET)
    file = tmp_path / "run" / "run.json"
    text = file.read_text()
    assert '"img_size": 16' in text
    file.write_text(text.replace('"img_size"', '"image_size"'))
    pretrain(PretrainConfig(out=tmp_path / "run", resume=True, **settings), QUIET)
    with pytest.raises(ValueError, match="img_size was 16, is 32"):
        pretrain(PretrainConfig(out=tmp_path / "run", resume=True, **{**settings, "img_size": 32}), QUIET)


@pytest.mark.filterwarnings("ignore:1 images of .* can no longer be read")
@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_run_whose_file_breaks_resumes_bit_for_bit(tmp_path, monkeypatch, loader):
    data = tmp_path / "data"
    data.mkdir()
    for k in range(24):
        pixels = np.random.default_rng(k).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{k}.png")
    content = (data / "7.png").read_bytes()
    settings = {**FAST, "data": str(data), "batch_size": 8, "loader": loader, "max_bad": 0.1, "checkpoint_every": 1}

    def stopped(self, *arguments):
        calls.append(0)
        if calls == [0]:  # after the images have been listed, before the first checkpoint
            (data / "7.png").write_bytes(content[:100])
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return original(self, *arguments)

    original = Objective.loss
    monkeypatch.setattr(Objective, "loss", stopped)
    calls, stop_at = [], None
    whole = pretrain(PretrainConfig(out=tmp_path / "whole", **settings), QUIET)
    (data / "7.png").write_bytes(content)
    calls, stop_at = [], 5
    with pytest.raises(KeyboardInterrupt):
        pretrain(PretrainConfig(out=tmp_path / "run", **settings), QUIET)
    monkeypatch.undo()
    # Opened anew, the folder would have 23 images in another order.
    resumed = pretrain(PretrainConfig(out=tmp_path / "run", resume=True, **settings), QUIET)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    records = [
        [{name: value for name, value in json.loads(line).items() if name not in MEASURED} for line in lines]
        for lines in ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "run"))
    ]
    assert records[0] == records[1]
    assert sum("new_bad" in record for record in records[1]) == 1


def test_a_damaged_manifest_of_a_run_is_named_with_what_to_do(tmp_path, noise_image):
    (tmp_path / "data").mkdir()
    for k in range(2):
        noise_image(9, 9, seed=k).save(tmp_path / "data" / f"{k}.png")
    config = PretrainConfig(out=tmp_path, resume=True, **{**FAST, "data": str(tmp_path / "data")})
    kept = tmp_path / "manifest.safetensors"
    training_source(config, 3, labelled=False).manifest.keep(kept)
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ManifestError, match=rf"the manifest {kept} is damaged: .*, remove {kept}$"):
        training_source(config, 3, labelled=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "giant"}, "micro, mini, tiny, small, base, large, huge"),
        ({"target": "pixels"}, "norm or raw"),
        ({"objective": "simmim"}, "nim, mae, dmae"),
        ({"sigma": "gauss:3"}, "gamma:CONCENTRATION,SCALE"),
        ({"data": "no/such/folder"}, "no/such/folder"),
        ({"img_size": 18}, "multiples of the patch size"),
        ({"batch_size": 4096}, "smaller batch_size"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(PretrainConfig(out=tmp_path / "run", **{**FAST, **changes}), QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "sigma", "launches"),
    [
        # Copies of images, levels and seeds; patches; loss, its gradient from a one; sum of losses; the norm of the
        # gradients (3), whether it is finite (3), sum of norms; copy of the learning rates.
        ("nim", "70", 16),
        ("nim", "uniform:0,150", 16),
        ("nim", "gamma:25,3", 16),
        ("mae", None, 19),  # no levels; words of the mask, their order, what is hidden (2)
        ("dmae", "gamma:25,3", 18),  # words of the mask, their order
    ],
)
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path, step_on_gpu, objective, sigma, launches):
    settings = {**FAST, "objective": objective, "sigma": sigma, "batch_size": 8, "loader": "torch"}
    counted = step_on_gpu(pretrain, PretrainConfig(out=tmp_path / "run", **settings))
    assert counted.total() == launches, counted
    assert counted["denim.patch_loss_backward.default"] == 1
    assert counted["denim.noise_patchify.default"] == 1


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.slow
def test_every_part_of_an_accumulated_step_waits_for_nothing(tmp_path, step_on_gpu):
    settings = {**FAST, "batch_size": 8, "micro_batch": 4, "loader": "torch"}
    counted = step_on_gpu(pretrain, PretrainConfig(out=tmp_path / "run", **settings))
    assert counted["denim.patch_loss_backward.default"] == 2
