"""A pretraining that starts from other weights."""

from __future__ import annotations

import io
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from rich.console import Console
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from denim.kernels.patches import patchify
from denim.nim import (
    Autoencoder,
    AutoencoderConfig,
    CheckpointError,
    Classifier,
    ClassifierConfig,
    Mask,
    PretrainConfig,
    pretrain,
)
from denim.nim.warm_start import warm_start

CONFIG = AutoencoderConfig((16, 16), 4, 16, 2, 2, 8, 1, 2)


def autoencoder(seed: int = 0, **changes) -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Autoencoder(replace(CONFIG, **changes))
        for (
            parameter
        ) in model.parameters():  # of norms and biases too: with ones and zeros a missing one would not show
            parameter.data.normal_(std=0.2)
        return model


def same(model: Autoencoder, other: Autoencoder, names: tuple[str, ...]) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours if name.startswith(names))


DECODER = ("decoder_", "mask_token")
ENCODER = ("patch_embed", "cls_token", "pos_embed", "blocks", "norm")


def test_from_files_of_transformers_with_their_predictions(vit_mae):
    file, expected = vit_mae
    model = Autoencoder(AutoencoderConfig((8, 8), 2, 16, 2, 4, 8, 1, 2, norm_eps=1e-12, target="raw"))
    assert warm_start(model, str(file)) == f"weights of {file}: encoder and decoder"
    patches = patchify(expected["pixels"].movedim(1, -1), 2)
    # float32 in another order of summation, as in test_exchange.py.
    masked = model(patches, Mask(expected["order"], 4))
    torch.testing.assert_close(masked, expected["masked"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(patches), expected["whole"], rtol=0, atol=1e-5)


def test_from_a_folder_and_from_the_hub(tmp_path, monkeypatch):
    other = autoencoder(1, target="raw")
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "other"))
    for source in (str(tmp_path / "other"), "owner/name"):
        model = autoencoder()
        words = warm_start(model, source)
        assert words == f"weights of {source}: encoder and decoder (of target raw, which is norm here)"
        assert same(model, other, ("",))
        assert not model.pos_embed.requires_grad


def test_from_the_encoder_of_mae_alone(tmp_path):
    other, model, before = autoencoder(1), autoencoder(), autoencoder()
    state = {name: value for name, value in other.state_dict().items() if not name.startswith(DECODER)}
    torch.save({"model": state}, tmp_path / "mae_pretrain.pth")
    assert warm_start(model, str(tmp_path / "mae_pretrain.pth")).endswith("the decoder is new, for there is none")
    assert same(model, other, ENCODER)
    assert same(model, before, DECODER)


def test_from_a_classifier_of_timm(tmp_path):
    with torch.random.fork_rng(devices=[]):
        other, model = Classifier(ClassifierConfig.for_encoder(CONFIG, 3, global_pool="token")), autoencoder()
    torch.save(other.state_dict(), tmp_path / "vit.pth")
    warm_start(model, str(tmp_path / "vit.pth"))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in other.state_dict().items()
               if name.startswith(ENCODER))  # fmt: skip


def test_another_size_is_resampled(tmp_path):
    other, model, before = autoencoder(1), autoencoder(img_size=(16, 24)), autoencoder(img_size=(16, 24))
    other.save_pretrained(tmp_path)
    words = warm_start(model, str(tmp_path))
    assert words.endswith(": encoder and decoder; positions resampled from 4 x 4 to 4 x 6 patches")
    for name in ("pos_embed", "decoder_pos_embed"):
        expected = resample_abs_pos_embed(other.state_dict()[name], [4, 6])
        assert torch.equal(model.state_dict()[name], expected)
    assert same(model, other, ("blocks", "decoder_blocks", "decoder_pred"))

    model = autoencoder(patch_size=8)
    words = warm_start(model, str(tmp_path))
    assert (
        "the decoder is new, for the other one does not fit (decoder_pred.weight is (48, 8), expected (192, 8)" in words
    )
    assert words.endswith("patches resampled from 4 to 8 pixels; positions resampled from 4 x 4 to 2 x 2 patches")
    expected = resample_patch_embed(other.patch_embed.proj.weight.data, [8, 8])
    assert torch.equal(model.patch_embed.proj.weight, expected)
    assert not same(model, before, ("blocks",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder_depth": 2}, "decoder_blocks.1.norm1.weight is unknown"),
        ({"decoder_num_heads": 1}, "decoder_num_heads is 1, expected 2"),
        ({"decoder_embed_dim": 4}, "mask_token is (1, 1, 4), expected (1, 1, 8)"),
    ],
)
def test_a_decoder_that_does_not_fit_is_new(tmp_path, changes, words):
    other, model, before = autoencoder(1, **changes), autoencoder(), autoencoder()
    other.save_pretrained(tmp_path)
    assert words in warm_start(model, str(tmp_path))
    assert same(model, other, ENCODER)
    assert same(model, before, DECODER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, r"encoder of another architecture: blocks\.2\.norm1\.weight is unknown"),
        ({"depth": 1}, r"encoder of another architecture: blocks\.1\.norm1\.weight is missing"),
        ({"embed_dim": 32}, r"cls_token is \(1, 1, 32\), expected \(1, 1, 16\)"),
        ({"num_heads": 4}, "has num_heads 4, this model 2: its encoder would compute something else"),
        ({"mean": (0.5,) * 3}, r"has mean \(0\.5, 0\.5, 0\.5\), this model \(0\.485"),
    ],
)
def test_another_encoder_is_refused(tmp_path, changes, message):
    autoencoder(1, **changes).save_pretrained(tmp_path)
    model = autoencoder()
    with pytest.raises(CheckpointError, match=message):
        warm_start(model, str(tmp_path))
    assert same(model, autoencoder(), ("",))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.ones(1)}, r"holds no ViT: no patch_embed\.proj\.weight of 4 dimensions, first weights \['a'\]"),
        ({"patch_embed.proj.weight": torch.ones(4, 4)}, r"holds no ViT: no patch_embed\.proj\.weight of 4 dimensions"),
        ({"patch_embed.proj.weight": torch.ones(4, 3, 2, 2), "pos_embed": torch.ones(1, 6, 4)}, "5 patches, no square"),
    ],
)
def test_a_file_of_no_vit_is_refused(tmp_path, state, message):
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        warm_start(autoencoder(), str(tmp_path / "file.pth"))


FAST = {"preset": "micro", "epochs": 1, "warmup_epochs": 0, "batch_size": 1024, "base_lr": 1e-9, "crop_scale": None,
        "device": "cpu"}  # fmt: skip


def test_pretraining_starts_from_them_and_a_resumed_run_does_not_ask_again(tmp_path):
    with torch.random.fork_rng(devices=[]):
        other = Autoencoder(AutoencoderConfig((16, 16), 4, 64, 3, 4, 64, 1, 4, mean=(0.5,), std=(0.25,)))
    other.save_pretrained(tmp_path / "other")
    config = PretrainConfig(out=tmp_path / "run", init=str(tmp_path / "other"), **FAST)
    printed = io.StringIO()
    model = pretrain(config, Console(file=printed, width=60))
    assert f"weights of {tmp_path / 'other'}: encoder and decoder\n" in printed.getvalue()
    for name, value in other.state_dict().items():  # one update of 4e-9: by Adam no weight moves further than that
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-7)
    (tmp_path / "other").rename(tmp_path / "elsewhere")
    again = pretrain(replace(config, resume=True), Console(quiet=True))
    assert same(again, model, ("",))
    with pytest.raises(CheckpointError, match=r"no folder .*other"):
        pretrain(replace(config, out=tmp_path / "new"), Console(quiet=True))
    assert not (tmp_path / "new").exists()
