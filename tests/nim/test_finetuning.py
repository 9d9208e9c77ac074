"""Fine-tuning: the recipe's parameter groups, the training images, and that it learns."""

import io
import json
import math
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from timm.optim import param_groups_layer_decay

from denim.nim import (
    Autoencoder,
    CheckpointError,
    Classifier,
    ClassifierConfig,
    FinetuneConfig,
    LinearProbeConfig,
    add_noise,
    finetune,
    preset,
    reconstruct,
)
from denim.nim.adversarial import AdversarialTraining
from denim.nim.data import EvalView, TorchLoader, hold_out, open_source
from denim.nim.finetuning import FinetuneTask, accuracy, standardise_features
from denim.nim.ranks import Ranks
from denim.nim.run import settings_of_run
from denim.nim.saving import latest_checkpoint

QUIET = Console(quiet=True)
PLAIN = {"drop_path": 0.0, "auto_augment": None, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}
FAST = {
    "data": "digits", "epochs": 1, "warmup_epochs": 0, "batch_size": 256, "base_lr": 2e-3, "crop_scale": None,
    "flip": False, "log_every": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoiser")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Autoencoder(preset("micro", target="norm")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("size", "epochs", "drop_path"),
    [("tiny", 100, 0.1), ("base", 100, 0.1), ("large", 50, 0.1), ("huge", 50, 0.2)],
)
def test_defaults_are_the_published_recipe(tmp_path, size, epochs, drop_path):
    config = FinetuneConfig(out=tmp_path, denoiser=tmp_path)
    assert config.epochs is config.drop_path is config.warmup_epochs is config.batch_size is None
    config = config.for_denoiser(preset(size)).for_data(1_281_167)
    assert (config.epochs, config.warmup_epochs, config.batch_size) == (epochs, 5, 1024)
    assert config.lr == pytest.approx(4e-3)
    assert (config.min_lr, config.betas, config.weight_decay) == (1e-6, (0.9, 0.999), 0.05)
    assert (config.layer_decay, config.drop_path, config.crop_scale) == (0.75, drop_path, (0.08, 1.0))
    assert (config.auto_augment, config.erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (config.mixup, config.cutmix, config.mixup_group, config.smoothing) == (0.8, 1.0, 16, 0.1)
    assert (config.trained_on, config.sigma) == ("denoised", "uniform:0,30")


def test_given_epochs_and_drop_path_hold_for_every_size(tmp_path):
    config = FinetuneConfig(out=tmp_path, denoiser=tmp_path, epochs=7, warmup_epochs=2, drop_path=0.0)
    assert config.for_denoiser(preset("huge")) == config
    half = replace(config, epochs=25, warmup_epochs=None)
    assert half.for_denoiser(preset("large")).warmup_epochs == 2.5  # 5 of 50 are published
    assert half.for_denoiser(preset("base")).warmup_epochs == 1.25  # 5 of 100
    with pytest.raises(ValueError, match=r"between 0 and epochs \(50\), got 60"):
        FinetuneConfig(out=tmp_path, denoiser=tmp_path, warmup_epochs=60).for_denoiser(preset("large"))


def test_parameter_groups_are_those_of_the_published_code():
    """Layer 0: tokens, positions, patches; layer i + 1: block i; last: norm and head (He et al. 2022, code)."""
    model = Classifier(ClassifierConfig.for_encoder(preset("micro"), 10))
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.75)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    depth = model.config.depth
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = depth + 1
        group = found[id(parameter)]
        assert group["lr_scale"] == pytest.approx(0.75 ** (depth + 1 - layer)), name
        free = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0.0 if free else 0.05), name


@pytest.mark.slow
def test_it_learns_the_digits(denoiser, tmp_path):
    settings = {**FAST, **PLAIN, "epochs": 12, "batch_size": 128, "base_lr": 6e-3, "layer_decay": 1.0}
    model = finetune(FinetuneConfig(out=tmp_path / "run", denoiser=denoiser, trained_on="clean", **settings), QUIET)
    # Chance is 10 %; a network that does not learn stays within a few percent of it.
    source = open_source("digits", "test")
    share = accuracy(model, source)
    assert share > 0.5
    # Neither the images that can no longer be read are counted nor those that replace them.
    lost, read = {7, 300, 599}, source.read

    def broken(index):
        if index in lost:
            raise OSError(source.where(index))
        return read(index)

    right = []
    for batch in TorchLoader(source, EvalView(16), 100, shuffle=False).epoch(0):
        pixels = batch.images.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            right += (model(pixels).argmax(dim=-1) == batch.labels).tolist()
    assert share == sum(right) / 600
    source.read = broken
    with pytest.warns(UserWarning, match="can no longer be read"):
        left = accuracy(model, source, 250)
    assert left == sum(hit for k, hit in enumerate(right) if k not in lost) / 597
    saved = Classifier.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.trained_on == "clean"
    assert saved.config.classes == tuple(str(digit) for digit in range(10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained_on", "degrade", "case"),
    [
        ("clean", "noise", "clean"),
        ("noisy", "noise", "noisy"),
        ("denoised", "noise", "noise, input statistics"),
        ("denoised", "mask", "mask, input statistics"),
        ("denoised", "both", "both, input statistics"),
    ],
)
def test_the_classifier_sees_the_images_that_it_records(denoiser, tmp_path, monkeypatch, trained_on, degrade, case):
    """The images that the classifier gets are those that the recorded function returned."""
    seen = []
    forward = Classifier.forward

    def record(self, pixels, *seeds):
        seen.append(pixels)
        return forward(self, pixels, *seeds)

    made = []

    def spy(function):
        def call(*arguments, **options):
            made.append(function(*arguments, **options))
            return made[-1]

        return call

    monkeypatch.setattr(Classifier, "forward", record)
    monkeypatch.setattr("denim.nim.finetuning.reconstruct", spy(reconstruct))
    monkeypatch.setattr("denim.nim.finetuning.add_noise", spy(add_noise))
    config = FinetuneConfig(
        out=tmp_path / "run", denoiser=denoiser, trained_on=trained_on, degrade=degrade, **FAST, **PLAIN
    )
    model = finetune(config, QUIET)
    assert model.config.trained_on == case
    assert len(made) == (0 if trained_on == "clean" else 4)
    for shown, wanted in zip(seen, made, strict=False):
        assert torch.equal(shown, wanted)
    if trained_on == "noisy":
        assert any((pixels < 0).any() for pixels in seen)  # not clipped
    else:
        assert all(pixels.min() >= 0 and pixels.max() <= 1 for pixels in seen)


@pytest.mark.slow
def test_the_full_recipe_is_keyed(denoiser, tmp_path):
    """Erasing, mixup, cutmix, drop path and RandAugment draw from keyed streams: two runs are one run."""
    import random

    import numpy as np

    results = []
    for name, noise in (("first", 1), ("second", 2)):
        random.seed(noise)
        np.random.seed(noise)  # noqa: NPY002
        with torch.random.fork_rng():
            torch.manual_seed(noise)
            out = tmp_path / name
            finetune(FinetuneConfig(out=out, denoiser=denoiser, **FAST), QUIET)
        results.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert results[0] == results[1]
    assert json.loads((out / "run.json").read_text())["drop_path"] == 0.1, "what was resolved for the denoiser's size"


@pytest.mark.slow
def test_the_denoiser_stays_frozen(denoiser, tmp_path):
    before = Autoencoder.from_pretrained(denoiser).state_dict()
    model = finetune(FinetuneConfig(out=tmp_path / "run", denoiser=denoiser, **FAST, **PLAIN), QUIET)
    after = Autoencoder.from_pretrained(denoiser).state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained_on": "blurred"}, "denoised, noisy or clean"),
        ({"degrade": "blur"}, "noise, mask, both"),
        ({"statistics": "none"}, '"input" or "noisy"'),
        ({"degrade": "mask", "statistics": "noisy"}, "needs noise"),
        ({"micro_batch": 8}, "whole groups of 16 images, and a micro-batch has 8"),
        ({"mixup_group": 3}, "an even number, .* got 3"),
        ({"cutmix": -0.1}, "cutmix must not be negative"),
        ({"mixup": math.nan}, "mixup must not be negative"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\)"),
        ({"smoothing": 1.5}, "smoothing"),
        ({"data": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(denoiser, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(FinetuneConfig(out=tmp_path / "run", denoiser=denoiser, **{**FAST, **changes}), QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accuracy_is_that_of_images_that_were_not_trained_on(denoiser, tmp_path, make_folder, monkeypatch):
    """By default the test split; with a share, images that no batch of the training holds, also when it is resumed."""
    config = FinetuneConfig(out=tmp_path / "digits", denoiser=denoiser, trained_on="clean", **FAST, **PLAIN)
    model = finetune(config, QUIET)
    expected = accuracy(model, open_source("digits", "test"))
    result = json.loads((config.out / "result.json").read_text())
    assert result == {"source": "digits/test", "images": 600, "accuracy": expected}

    used = set()
    prepare = FinetuneTask.prepare

    def record(self, batch, epoch):
        used.update(batch.ids.tolist())
        return prepare(self, batch, epoch)

    monkeypatch.setattr(FinetuneTask, "prepare", record)
    folder = make_folder(tmp_path / "flat", each=40, splits=(".",))
    settings = {**FAST, **PLAIN, "data": str(folder), "batch_size": 4, "val_split": "0.25", "trained_on": "clean"}
    config = FinetuneConfig(out=tmp_path / "run", denoiser=denoiser, **settings)
    finetune(config, QUIET)
    _, held = hold_out(open_source(folder, "train", 1), 0.25, config.seed)
    whole = json.loads((config.out / "result.json").read_text())
    assert (whole["source"], whole["images"]) == ("flat, held out", len(held))
    assert len(used) > 40
    assert used.isdisjoint(held.ids.tolist())
    for name in ("model", "checkpoints"):
        shutil.rmtree(config.out / name)
    (config.out / "result.json").unlink()
    used.clear()
    finetune(replace(config, resume=True), QUIET)
    assert used.isdisjoint(held.ids.tolist())
    assert json.loads((config.out / "result.json").read_text()) == whole


def test_without_other_images_no_accuracy_is_stated(denoiser, tmp_path, make_folder):
    console = Console(file=io.StringIO(), width=200)
    folder = make_folder(tmp_path / "flat", each=4, splits=(".",))
    settings = {**FAST, **PLAIN, "data": str(folder), "batch_size": 8, "trained_on": "clean"}
    finetune(FinetuneConfig(out=tmp_path / "run", denoiser=denoiser, **settings), console)
    assert "no accuracy will be stated: --val-split 0.1 holds out a tenth" in console.file.getvalue()
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("splits", "val_split", "message"),
    [
        (("train", "val"), "train", "its images are trained on"),
        ((".",), "val", "has no folders or shards of splits"),
        (("train", "val"), "test", "has no split 'test', it has 'train', 'val'"),
        (("train",), "1.5", "the name of a split or a share between 0 and 1, got 1.5"),
        (("train",), "nan", "got nan"),
    ],
)
def test_the_split_is_checked_before_the_training(denoiser, tmp_path, make_folder, splits, val_split, message):
    folder = make_folder(tmp_path / "data", splits=splits)
    settings = {**FAST, **PLAIN, "data": str(folder), "batch_size": 2}
    with pytest.raises(ValueError, match=message):
        finetune(FinetuneConfig(out=tmp_path / "run", denoiser=denoiser, val_split=val_split, **settings), QUIET)
    assert not (tmp_path / "run").exists()


def test_a_missing_denoiser_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        finetune(FinetuneConfig(out=tmp_path / "run", denoiser=tmp_path / "nowhere", **FAST), QUIET)


NO_MIXING = {"mixup": 0.0, "cutmix": 0.0}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "trained_on", "degrade", "sigma", "launches"),
    [
        (PLAIN, "clean", "noise", "70", 28),
        (NO_MIXING, "clean", "noise", "70", 28 + 9),  # pixels in boxes (5), their noise (3), the choice
        ({"erasing": 0.0}, "clean", "noise", "70", 28 + 10),  # pixels in boxes, shares, partners, mixed, label (2)
        ({"erasing": 0.0, "cutmix": 0.0}, "clean", "noise", "70", 28 + 4),  # no boxes
        ({}, "clean", "noise", "70", 42),
        ({}, "noisy", "noise", "uniform:0,30", 42 + 3),  # copies of levels and seeds, noise
        ({}, "denoised", "noise", "uniform:0,30", 42 + 4),  # and pixels of the prediction
        ({}, "denoised", "both", "gamma:25,3", 42 + 6),  # and words of the mask, their order
        ({}, "denoised", "mask", "70", 42 + 10),  # clean patches; what is hidden (2), its pixels, the choice
    ],
)
def test_a_step_on_a_gpu_waits_for_nothing(
    denoiser, tmp_path, step_on_gpu, recipe, launches, trained_on, degrade, sigma
):
    """And launches as often for any number of erased boxes and groups."""
    settings = {**FAST, "batch_size": 32, "loader": "torch", "erasing": 0.5, "drop_path": 0.5, **recipe}
    config = FinetuneConfig(
        out=tmp_path / "run", denoiser=denoiser, trained_on=trained_on, degrade=degrade, sigma=sigma, **settings
    )
    counted = step_on_gpu(finetune, config)
    assert counted.total() == launches, counted
    noises = (trained_on != "clean") + (settings["erasing"] > 0)
    assert counted["denim.noise_patchify.default"] == noises


def features(model, pixels):
    with torch.no_grad():
        return model.forward_head(model.forward_features(pixels), pre_logits=True).double()


@pytest.mark.filterwarnings("ignore:base_lr")
@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"micro_batch": 16}, {"fsdp": True}])
def test_a_linear_probe_learns_the_head_alone(denoiser, tmp_path, layout):
    """Behind features of the frozen encoder that have mean 0 and variance 1; accuracy is stated as ever."""
    settings = {**FAST, "epochs": 1 if layout else 6, "batch_size": 64, "base_lr": 1e-2 if layout else 2e-2, **layout}
    config = LinearProbeConfig(out=tmp_path / "run", denoiser=denoiser, **settings)
    model = finetune(config, QUIET)
    before, after = Autoencoder.from_pretrained(denoiser).state_dict(), model.state_dict()
    encoder = [name for name in after if name in before]
    assert encoder == [name for name in after if not name.startswith(("head.", "fc_norm."))]
    assert all(torch.equal(after[name], before[name]) for name in encoder)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        assert not torch.equal(after["head.weight"], Classifier(model.config).head.weight)

    batch = next(TorchLoader(open_source("digits", "train"), EvalView(16), 1197, shuffle=False).epoch(0))
    pixels = batch.images.permute(0, 3, 1, 2) / 255
    found = features(model, pixels)
    model.fc_norm.reset_parameters()
    raw = features(model, pixels)
    expected = (raw - raw.mean(dim=0)) / (raw.var(dim=0, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # float32, of features up to 5
    assert found.mean(dim=0).abs().max() < 1e-4

    # Chance is a tenth; in six epochs it is 0.4 without standardising.
    assert json.loads((config.out / "result.json").read_text())["accuracy"] > (0.15 if layout else 0.45)
    assert json.loads((config.out / "run.json").read_text())["linear_probe"] is True
    assert model.config.trained_on == "clean"
    if not layout:
        shutil.rmtree(config.out / "model")
        shutil.rmtree(latest_checkpoint(config.out))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("denim.nim.finetuning.standardise_features", lambda *_: pytest.fail("standardised again"))
            again = finetune(settings_of_run(config.out, FinetuneConfig), QUIET)
        assert all(
            torch.equal(value, again.state_dict()[name]) for name, value in after.items() if "fc_norm" not in name
        )


def test_a_linear_probe_has_the_published_settings(tmp_path):
    config = LinearProbeConfig(out=tmp_path, denoiser=tmp_path).for_denoiser(preset("huge"))
    assert (config.epochs, config.warmup_epochs, config.drop_path, config.weight_decay) == (90, 10, 0, 0)
    assert (config.mixup, config.cutmix, config.erasing, config.smoothing, config.auto_augment) == (0, 0, 0, 0, None)
    assert (config.trained_on, config.crop_scale, config.flip, config.batch_unit) == ("clean", (0.08, 1.0), True, 1)
    for changes in ({"layer_decay": 0.75}, {"drop_path": 0.1}):
        with pytest.raises(ValueError, match="layer_decay must be 1 and drop_path 0, got"):
            LinearProbeConfig(out=tmp_path, denoiser=tmp_path, **changes)
    with pytest.raises(ValueError, match=r"got 0\.75 and None; the settings of `LinearProbeConfig`"):
        FinetuneConfig(out=tmp_path, denoiser=tmp_path, linear_probe=True)


def test_a_probe_of_denoised_images_has_features_of_them(denoiser, tmp_path, monkeypatch):
    """And of a part of the images, where there are many."""
    monkeypatch.setattr("denim.nim.finetuning.PROBE_IMAGES", 40)
    seen = []
    monkeypatch.setattr(
        "denim.nim.finetuning.reconstruct", lambda *images, **how: seen.append(images[2]) or reconstruct(*images, **how)
    )
    body = Autoencoder.from_pretrained(denoiser)
    model = Classifier(ClassifierConfig.for_encoder(body.config, 10))
    config = LinearProbeConfig(
        out=tmp_path, denoiser=denoiser, trained_on="denoised", sigma="uniform:20,30", **{**FAST, "batch_size": 16}
    )
    source = open_source("digits", "train")
    standardise_features(FinetuneTask(model, body, config, None), source, Ranks())
    assert sorted(map(len, seen)) == [8, 16, 16]
    levels = torch.cat(seen)
    assert levels.min() >= 20
    assert levels.max() <= 30
    assert not torch.equal(model.fc_norm.weight, torch.ones_like(model.fc_norm.weight))


@pytest.mark.slow
def test_adversarial_training_resists_more(denoiser, tmp_path):
    """After as many updates, images that are attacked have a lower loss than without it."""
    images = open_source("digits", "test")
    pixels = torch.stack([torch.from_numpy(np.array(images.read(number)))[None] for number in range(100)])
    pixels, labels = F.interpolate(pixels.float() / 255, (16, 16)), images.labels[:100]
    attack, raised = (AdversarialTraining("pgd", epsilon=16, step_size=4, steps=5),
                      partial(F.cross_entropy, target=labels, reduction="sum"))  # fmt: skip
    settings = {**FAST, **PLAIN, "epochs": 4, "batch_size": 64, "trained_on": "clean", "base_lr": 4e-3}
    losses = {}
    for name in (None, "pgd", "trades"):
        config = FinetuneConfig(out=tmp_path / str(name), denoiser=denoiser, **settings, adversarial=name, epsilon=16.0,
                                attack_steps=2)  # fmt: skip
        model = finetune(config, QUIET)
        attacked = attack.attacked(model, pixels, torch.arange(100), raised)
        losses[name] = float(F.cross_entropy(model(attacked), labels).detach())
    assert max(losses["pgd"], losses["trades"]) < 0.95 * losses[None], losses
