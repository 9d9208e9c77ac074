"""What a model is worth on images that are not trained on, while it learns and at its end."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator

from denim.defense import De3
from denim.kernels import Domain, derive_seeds, normal_noise
from denim.nim import (
    Autoencoder,
    FinetuneConfig,
    PretrainConfig,
    finetune,
    preset,
    pretrain,
)
from denim.nim.data import EvalView, Subset, TorchLoader, hold_out, open_source
from denim.nim.ranks import Ranks
from denim.nim.settings import TrainConfig
from denim.nim.validation import HeldOut, at_levels, divided, psnr

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
FAST = {
    "data": "digits", "epochs": 2, "warmup_epochs": 0, "batch_size": 256, "base_lr": 2e-3, "crop_scale": None,
    "flip": False, "log_every": 3, "device": "cpu",
}  # fmt: skip
PLAIN = {"drop_path": 0.0, "auto_augment": None, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
NIM = {**FAST, "preset": "micro", "target": "raw", "sigma": "uniform:0,150"}


def metrics(out, name="psnr_sigma_70"):
    return [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if name in line]


def result_of(out):
    return json.loads((out / "result.json").read_text())


def test_psnr_is_that_of_float64():
    images, reference = np.random.default_rng(0).random((2, 3, 2, 5, 7))
    expected = -10 * np.log10(np.square(images - reference).mean(axis=(1, 2, 3)))
    found = psnr(torch.tensor(images), torch.tensor(reference))
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32
    assert psnr(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).tolist() == [100.0]
    assert psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1)).item() == pytest.approx(20)


class Ranked(Ranks):
    """One of several ranks, whose sums are added up by the test."""

    def __init__(self, rank, world):
        super().__init__()
        self.rank, self.world = rank, world
        self.sent = []

    def gather(self, value):
        if value is not None:  # the words of `together`
            self.sent.append(value)
        return [value]


def config_of(tmp_path, **changes):
    return TrainConfig(
        out=tmp_path, epochs=1, warmup_epochs=0, batch_size=12, base_lr=1, betas=(0, 0), crop_scale=None, **changes
    )


@pytest.mark.parametrize(("world", "eval_images"), [(1, 23), (2, 23), (4, 9), (4, 2), (3, 1000)])
def test_every_chosen_image_counts_once_on_any_number_of_ranks(tmp_path, in_memory, world, eval_images):
    source = in_memory(23)
    config = config_of(tmp_path, eval_images=eval_images, seed=5)
    chosen = Subset(source, min(eval_images, 23), 5)
    ids, seeds, sizes = [], [], set()

    def values(images, labels, keys):
        sizes.add(len(images))
        assert images.dtype == torch.uint8
        seeds.extend(keys.tolist())
        return {"brightness": images.double().mean(dim=(1, 2, 3)), "label": labels}

    counts = []
    for rank in range(world):
        ranks = Ranked(rank, world)
        held_out = HeldOut(source, 16, config, ranks, CPU)
        if sum(int(torch.ones(len(b.ids)).sum() if b.real is None else b.real.sum()) for b in held_out.batches) == 0:
            with pytest.raises(ZeroDivisionError):  # a rank that stands alone here and has padding alone
                held_out.measure(values)
        else:
            held_out.measure(values)
        counts.append(len(held_out.batches))
        ids.append(ranks.sent[-1])
    assert len(set(counts)) == len(sizes) == 1  # as FSDP needs it
    batches = list(TorchLoader(chosen, EvalView(16), len(chosen), shuffle=False).epoch(0))
    assert sum(sums["eval_images"] for sums in ids) == len(chosen)
    assert sum(sums["label"] for sums in ids) == int(batches[0].labels.sum())
    expected = float(batches[0].images.double().mean(dim=(1, 2, 3)).sum())
    assert sum(sums["brightness"] for sums in ids) == pytest.approx(expected, rel=1e-12)
    assert set(derive_seeds(5, Domain.VALIDATION, chosen.ids).tolist()) == set(seeds)


def test_a_mean_that_is_not_finite_is_an_error(tmp_path, in_memory):
    held_out = HeldOut(in_memory(5), 16, config_of(tmp_path), Ranks(), CPU)
    with pytest.raises(FloatingPointError, match="b of images that are not trained on is not finite"):
        held_out.measure(lambda images, labels, seeds: {"a": labels.float(), "b": labels * math.inf})


def test_images_that_cannot_be_read_are_not_counted(tmp_path, in_memory, monkeypatch):
    source = in_memory(23)
    read = source.read

    def broken(index):
        if index == 3:
            raise OSError("gone")
        return read(index)

    monkeypatch.setattr(source, "read", broken)
    held_out = HeldOut(source, 16, config_of(tmp_path, max_bad=0.1), Ranks(), CPU)
    with pytest.warns(UserWarning, match="can no longer be read"):
        found = held_out.measure(lambda images, labels, seeds: {"label": labels})
    assert found["eval_images"] == 22
    assert found["label"] == pytest.approx(float((source.labels.sum() - source.labels[3]) / 22))


def test_levels_have_names():
    found = at_levels("psnr", (35, 70.5), lambda level: 2 * level, 3, CPU)
    assert {name: value.tolist() for name, value in found.items()} == {
        "psnr_sigma_35": [70.0] * 3, "psnr_sigma_70.5": [141.0] * 3,
    }  # fmt: skip


@pytest.mark.slow
def test_measuring_a_pretraining_changes_none_of_its_bits(tmp_path):
    """Metrics, TensorBoard, the progress and the result have the PSNR, which is that of denoising by hand."""
    console = Console(file=io.StringIO(), width=200)
    plain = pretrain(PretrainConfig(out=tmp_path / "plain", **NIM), QUIET)
    config = PretrainConfig(out=tmp_path / "run", eval_sigmas=(0.0, 70.0), eval_images=48, **NIM)
    model = pretrain(config, console)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    losses = [[line["loss"] for line in metrics(tmp_path / name, "loss")] for name in ("plain", "run")]
    assert losses[0] == losses[1]

    lines = metrics(config.out)
    assert [(line["update"], line["epoch"], line["eval_images"]) for line in lines] == [(4, 1.0, 48), (8, 2.0, 48)]
    result = result_of(config.out)
    assert {name: result[name] for name in lines[-1] if name not in ("update", "epoch")} == {
        name: value for name, value in lines[-1].items() if name not in ("update", "epoch")
    }
    assert result["source"] == "digits/test"
    events = event_accumulator.EventAccumulator(str(config.out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("psnr_sigma_70")] == [4, 8]
    assert f"sigma 70: {lines[-1]['psnr_sigma_70']:.2f} dB" in console.file.getvalue().splitlines()[-1]
    default = result_of(tmp_path / "plain")
    assert (default["source"], default["eval_images"], len(default)) == ("digits/test", 512, 3)

    batch = next(TorchLoader(Subset(open_source("digits", "test"), 48, 0), EvalView(16), 48, shuffle=False).epoch(0))
    clean = batch.images.permute(0, 3, 1, 2).double() / 255
    seeds, found = derive_seeds(0, Domain.VALIDATION, batch.ids), []
    noisy = clean + 70 / 255 * normal_noise(seeds, (16, 16, 1)).permute(0, 3, 1, 2)
    side, patch = model.config.grid_size[0], model.config.patch_size
    mean, std = model.config.mean[0], model.config.std[0]
    patches = ((noisy - mean) / std).view(-1, side, patch, side, patch).transpose(2, 3).flatten(3).flatten(1, 2)
    with torch.no_grad():
        predicted = model.double()(patches) * std + mean
    rebuilt = predicted.view(-1, side, side, patch, patch).transpose(2, 3).reshape(clean.shape).clamp(0, 1)
    found = -10 * (rebuilt - clean).square().flatten(1).mean(dim=1).log10()
    # float32 against float64: about 1e-5 of an error of about 0.1 per pixel.
    assert result["psnr_sigma_70"] == pytest.approx(float(found.mean()), abs=1e-3)
    assert result["psnr_sigma_0"] > result["psnr_sigma_70"] + 0.1


@pytest.mark.slow
def test_a_resumed_run_has_the_same_measurements(tmp_path):
    config = PretrainConfig(out=tmp_path / "run", eval_sigmas=(70.0,), eval_images=16, **NIM)
    pretrain(config, QUIET)
    whole = metrics(config.out)
    assert len(whole) == 2
    for path in ("model/model.safetensors", "checkpoints/00000008/SHA256SUMS"):
        (config.out / path).unlink()
    with pytest.warns(UserWarning, match="00000008 is damaged"):
        pretrain(replace(config, resume=True, eval_sigmas=(70.0, 140.0)), QUIET)
    again = metrics(config.out)
    assert [again[0], {name: again[1][name] for name in whole[1]}] == whole
    assert {"psnr_sigma_70", "psnr_sigma_140"} <= result_of(config.out).keys()


@pytest.mark.slow
@pytest.mark.parametrize("trained_on", ["denoised", "noisy"])
def test_a_fine_tuning_is_measured_as_the_defense_that_it_is_for(tmp_path, trained_on):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Autoencoder(preset("micro", target="raw")).save_pretrained(tmp_path / "denoiser")
    settings = {**FAST, **PLAIN, "denoiser": tmp_path / "denoiser", "trained_on": trained_on, "ema": 0.5}
    settings["epochs"] = 1
    plain = finetune(FinetuneConfig(out=tmp_path / "plain", **settings), QUIET)
    config = FinetuneConfig(out=tmp_path / "run", eval_sigmas=(10.0, 70.0), eval_images=100, **settings)
    model = finetune(config, QUIET)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())

    (line,) = metrics(config.out, "accuracy_sigma_10")
    assert (line["update"], line["eval_images"]) == (4, 100)
    result = result_of(config.out)
    assert result.keys() == {
        "source", "images", "accuracy", "eval_images", "accuracy_sigma_10", "accuracy_sigma_70",
    }  # fmt: skip
    assert result["accuracy"] == result_of(tmp_path / "plain")["accuracy"]  # of all images
    batch = next(TorchLoader(Subset(open_source("digits", "test"), 100, 0), EvalView(16), 100, shuffle=False).epoch(0))
    pixels, seeds = batch.images.permute(0, 3, 1, 2) / 255, derive_seeds(0, Domain.VALIDATION, batch.ids)[None]
    denoiser = None if trained_on == "noisy" else Autoencoder.from_pretrained(tmp_path / "denoiser")
    for sigma in (10, 70):
        # The averaged weights, which are those of the finished model.
        defense = De3(denoiser, model, None)
        defense.sigma = sigma
        with torch.no_grad():
            right = defense.draw_logits(pixels, seeds)[0].argmax(dim=-1) == batch.labels
        assert result[f"accuracy_sigma_{sigma}"] == pytest.approx(float(right.double().mean()))


@pytest.mark.slow
def test_an_objective_without_noise_has_no_psnr(tmp_path):
    pretrain(PretrainConfig(out=tmp_path / "mae", objective="mae", **{**NIM, "epochs": 1, "sigma": None}), QUIET)
    assert not (tmp_path / "mae" / "result.json").exists()
    pretrain(PretrainConfig(out=tmp_path / "dmae", objective="dmae", **{**NIM, "epochs": 1}), QUIET)
    assert result_of(tmp_path / "dmae")["psnr_sigma_70"] > 5


@pytest.mark.slow
def test_a_pretraining_holds_images_out(tmp_path, make_folder, monkeypatch):
    folder = make_folder(tmp_path / "flat", each=20, splits=(".",))
    config = PretrainConfig(out=tmp_path / "run", val_split="0.25", eval_images=3, channels=1,
                            **{**NIM, "data": str(folder), "batch_size": 4})  # fmt: skip
    _, held = hold_out(open_source(folder, "train", 1), 0.25, 0)
    pretrain(config, QUIET)
    result = result_of(config.out)
    assert (result["source"], result["eval_images"]) == ("flat, held out", 3)
    assert f"Trained on flat, {40 - len(held)} images" in (config.out / "model" / "README.md").read_text()
    pretrain(replace(config, out=tmp_path / "none", val_split=None), QUIET)
    assert not (tmp_path / "none" / "result.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_sigmas": (-1.0,)}, r"eval_sigmas takes noise levels .* got \(-1.0,\)"),
        ({"eval_sigmas": (math.nan,)}, "eval_sigmas takes noise levels"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"eval_images": 0}, "eval_images must be at least 1"),
        ({"val_split": "1.5"}, "a share between 0 and 1, got 1.5"),
        ({"eval_sigmas": (70.0,), "objective": "mae", "sigma": None}, "mae adds no noise"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        PretrainConfig(out=tmp_path / "run", **{**NIM, **changes})


def test_levels_need_images_and_noise(tmp_path, make_folder):
    with pytest.raises(ValueError, match="degrade=mask adds no noise"):
        FinetuneConfig(out=tmp_path, denoiser=tmp_path, degrade="mask", eval_sigmas=(70.0,))
    folder = make_folder(tmp_path / "flat", splits=(".",))
    config = PretrainConfig(out=tmp_path / "run", eval_sigmas=(70.0,), **{**NIM, "data": str(folder)})
    with pytest.raises(ValueError, match=r"eval_sigmas needs images .* --val-split 0\.1 holds out a tenth"):
        pretrain(config, QUIET)
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match=r"0\.5 is less than one level"):
        PretrainConfig(out=tmp_path / "run", eval_sigmas=(0.5,))


def test_an_unlabelled_split_may_have_other_folders(tmp_path, make_folder):
    folder = make_folder(tmp_path / "set", classes=("cat", "dog"))
    make_folder(tmp_path / "set", classes=("emu",), splits=("val",))
    config = PretrainConfig(out=tmp_path, **{**NIM, "data": str(folder)})
    whole = open_source(folder, "train", 3)
    source, validation = divided(config, whole, labelled=False)
    assert source is whole
    assert (validation.name, len(validation)) == ("set/val", 3)
    with pytest.raises(ValueError, match="emu"):
        divided(config, whole, labelled=True)
