from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import zipfile
from functools import partial

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import SwiGLU, resample_abs_pos_embed
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from denim.kernels import normalized_patches
from denim.kernels.patches import patchify
from denim.nim.autoencoder import IMAGENET_MEAN, IMAGENET_STD, Autoencoder, AutoencoderConfig, Mask
from denim.nim.checkpoint import CheckpointError
from denim.nim.classifier import Classifier, ClassifierConfig
from denim.nim.exchange import from_timm, load_foreign, read_state_dict, to_timm

# An odd depth, and an embed_dim that no published ViT has.
CONFIG = AutoencoderConfig((16, 16), 4, 32, 3, 4, 16, 2, 2)
STATE = {"layer.weight": torch.arange(6.0).view(2, 3), "layer.bias": torch.ones(3, dtype=torch.float16)}
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3)}


def autoencoder(config: AutoencoderConfig = CONFIG) -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        return Autoencoder(config)


def classifier(config: AutoencoderConfig = CONFIG, **changes) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        model = Classifier(ClassifierConfig.for_encoder(config, 5, **changes))
        nn.init.normal_(model.head.weight)
        return model.eval()


def plain_vit(**changes) -> VisionTransformer:
    options = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "num_classes": 5,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        vit = VisionTransformer(**options)
        for parameter in vit.parameters():  # of norms and biases too: with ones and zeros a missing one would not show
            nn.init.normal_(parameter, std=0.2)
        return vit.eval()


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def written(folder: pathlib.Path, content: object, name: str = "file.pth", **options) -> pathlib.Path:
    torch.save(content, folder / name, **options)
    return folder / name


# ------------------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"classifier": state, "epoch": 3},
        lambda state: {"state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}},
        lambda state: {"model": state, "args": argparse.Namespace(lr=1e-3, output_dir="x"), "scaler": {}},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"model": state, "ema": state},
    ],
)
def test_state_dicts_are_found(tmp_path, wrap, zipped):
    file = written(tmp_path, wrap(STATE), _use_new_zipfile_serialization=zipped)
    assert equal(read_state_dict(file), STATE)
    assert equal(read_state_dict(str(file)), STATE)


def test_safetensors_are_read(tmp_path):
    save_file({f"module.{name}": value for name, value in STATE.items()}, tmp_path / "file.safetensors")
    assert equal(read_state_dict(tmp_path / "file.safetensors"), STATE)


def test_part_chooses(tmp_path):
    other = {"head.weight": torch.zeros(2)}
    file = written(tmp_path, {"model": STATE, "classifier": other, "model_ema": other, "epoch": 1})
    assert equal(read_state_dict(file, "model"), STATE)
    assert equal(read_state_dict(file, "classifier"), other)
    assert equal(read_state_dict(file, "model_ema"), other)
    with pytest.raises(CheckpointError, match=r"choose one of \['model', 'classifier', 'model_ema'\] with `part`"):
        read_state_dict(file)
    with pytest.raises(CheckpointError, match=r"no part 'epoch'; state dicts inside: \['model', 'classifier', 'model_"):
        read_state_dict(file, "epoch")
    with pytest.raises(CheckpointError, match="no part 'model'; state dicts inside: none but the file itself"):
        read_state_dict(written(tmp_path, STATE), "model")


def test_only_a_prefix_of_all_names_is_stripped(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert read_state_dict(written(tmp_path, state)).keys() == state.keys()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "backbone.", "encoder."]), max_size=4))
def test_prefixes_of_trainers_are_stripped_in_any_order(tmp_path_factory, prefixes):
    state = {"".join(prefixes) + name: value for name, value in STATE.items()}
    assert equal(read_state_dict(written(tmp_path_factory.mktemp("prefix"), {"model": state})), STATE)


def test_averaged_weights_are_chosen_by_part(tmp_path):
    average = {name: value + 1 for name, value in STATE.items()}
    swa = {"n_averaged": torch.tensor(9), **{f"module.{name}": value for name, value in average.items()}}
    assert equal(read_state_dict(written(tmp_path, {"ema": {"module": average, "decay": 0.999}})), average)
    assert equal(read_state_dict(written(tmp_path, swa)), average)
    file = written(tmp_path, {"model": STATE, "ema": {"module": average, "decay": 0.999}, "state_dict_ema": swa})
    assert equal(read_state_dict(file), STATE)
    for part in ("ema", "ema.module", "state_dict_ema"):
        assert equal(read_state_dict(file, part), average)
    with pytest.raises(CheckpointError, match=r"no part 'emas'.*\['model', 'ema.module', 'state_dict_ema'\]"):
        read_state_dict(file, "emas")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    "beside",
    [
        np.float64(93.1), np.float32(0.5), np.int64(3), np.bool_(True), argparse.Namespace(out=pathlib.Path("/x")),
        pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("C:/a"), {"best": [np.float16(1)]},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_and_paths_beside_the_weights_are_harmless(tmp_path, beside, zipped):
    file = written(tmp_path, {"model": STATE, "beside": beside}, _use_new_zipfile_serialization=zipped)
    assert equal(read_state_dict(file), STATE)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_a_tensor_of_which_the_file_has_not_all_numbers_is_refused(tmp_path):
    state = {**STATE, "head.weight": torch.zeros(1).expand(10**6, 10**6)}
    with pytest.raises(CheckpointError, match=r"has 4 bytes for head\.weight of \(1000000, 1000000\)"):
        read_state_dict(written(tmp_path, {"model": state}))
    with pytest.raises(CheckpointError, match=r"layer\.bias as no plain tensor"):
        read_state_dict(written(tmp_path, {"model": {**STATE, "layer.bias": torch.eye(3).to_sparse()}}))


def test_a_file_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    file = written(tmp_path, {"model": {"a": torch.zeros(10**6)}})
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"of \d+ bytes unpacks to 40\d{5}"):
        read_state_dict(file)


def with_names_of_transformers(state: dict[str, Tensor], body: str) -> dict[str, Tensor]:
    """What transformers' ViTForImageClassification and ViTMAEForPreTraining (4.57) call the same weights."""
    outside = {
        "cls_token": f"{body}embeddings.cls_token",
        "pos_embed": f"{body}embeddings.position_embeddings",
        "patch_embed.proj": f"{body}embeddings.patch_embeddings.projection",
        "norm": f"{body}layernorm",
        "head": "classifier",
        **{name: f"decoder.{name}" for name in ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm")},
        "decoder_pred": "decoder.decoder_pred",
    }
    inside = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if not module.startswith(("blocks.", "decoder_blocks.")):
            found[f"{outside[module]}.{kind}" if module else outside[name]] = tensor
            continue
        blocks, number, layer = module.split(".", 2)
        block = f"{body}encoder.layer.{number}" if blocks == "blocks" else f"decoder.decoder_layers.{number}"
        if layer == "attn.qkv":
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{block}.attention.attention.{part}.{kind}"] = rows.clone()
        else:
            found[f"{block}.{inside[layer]}.{kind}"] = tensor
    return found


def test_weights_of_transformers_are_renamed(tmp_path):
    for model in (autoencoder(), classifier(global_pool="token")):
        state = with_names_of_transformers(model.state_dict(), "vit.")
        save_file(state, tmp_path / "model.safetensors")
        options = {"decoder_num_heads": 2, "target": "norm"} if isinstance(model, Autoencoder) else {}
        loaded = load_foreign(tmp_path / "model.safetensors", num_heads=4, **options)
        assert type(loaded) is type(model)
        assert equal(loaded.state_dict(), model.state_dict())
        assert loaded.config.norm_eps == 1e-12
    # An encoder alone, with the pooler of ViTModel.
    encoder = {name: value for name, value in autoencoder().state_dict().items() if "decoder" not in name}
    encoder.pop("mask_token")
    state = with_names_of_transformers(encoder, "") | {"pooler.dense.weight": torch.ones(32, 32)}
    assert equal(read_state_dict(written(tmp_path, state)), encoder)
    state.pop("encoder.layer.1.attention.attention.key.weight")
    with pytest.raises(ValueError, match=r"1 weights missing, first \['blocks\.1\.attn\.qkv\.weight'\]"):
        classifier().load_encoder(read_state_dict(written(tmp_path, state)))


def test_predictions_are_those_of_transformers(vit_mae):
    file, expected = vit_mae
    model = load_foreign(file, num_heads=4, decoder_num_heads=2, target="raw")
    patches = patchify(expected["pixels"].movedim(1, -1), 2)
    # float32 in another order of summation: 1e-5 of predictions of about 0.3. With eps 1e-6 they differ by 1e-3.
    mask = Mask(expected["order"], 4)
    torch.testing.assert_close(model(patches, mask), expected["masked"], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(patches), expected["whole"], rtol=0, atol=1e-5)


class Call:
    """An object whose pickle is a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Call(print, "the file ran code"), r"(builtins\.)?print"),
        (Call(os.system, "echo the file ran code"), r"\w+\.system"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
        (
            Call(pathlib.Path.touch, pathlib.Path("the file ran code")),
            r"\S*(getattr|touch)",
        ),
        (np.array([None]), r"numpy\S+"),
    ],
    ids=["print", "os.system", "module", "path", "array"],
)
def test_a_pickle_that_runs_code_is_refused(tmp_path, capfd, content, name, zipped):
    file = written(tmp_path, {"model": content}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"Python objects \({name}\).*run code.*save the state_dict"):
        read_state_dict(file)
    assert "the file ran code" not in capfd.readouterr().out


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file(tmp_path, zipped, share):
    whole = written(tmp_path, {"model": {"weight": torch.zeros(1000)}}, _use_new_zipfile_serialization=zipped)
    data = whole.read_bytes()
    whole.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"file\.pth is truncated, damaged"):
        read_state_dict(whole)


@pytest.mark.parametrize("data", [b"", b"P", b"<!DOCTYPE html><html>", b"version https://git-lfs", b"\x00" * 64])
def test_not_a_checkpoint(tmp_path, data):
    (tmp_path / "file.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"file\.pt is not a checkpoint"):
        read_state_dict(tmp_path / "file.pt")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04"]))
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_bytes_are_refused_in_words(tmp_path_factory, data, start):
    file = tmp_path_factory.getbasetemp() / "any.pt"
    file.write_bytes(start + data)
    with pytest.raises(CheckpointError, match=r"any\.pt"):
        read_state_dict(file)


def test_other_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"no file .*absent\.pt"):
        read_state_dict(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="is a folder; `from_pretrained` reads"):
        read_state_dict(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_state_dict(tmp_path / "bad.safetensors")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(CheckpointError, match=r"plain\.pkl"):
        read_state_dict(tmp_path / "plain.pkl")
    for content, words in (
        ({"epoch": 3, "args": 4}, r"keys \['epoch', 'args'\], and no state dict"),
        ({"ema": STATE, "teacher": STATE}, r"choose one of \['ema', 'teacher'\]"),
        ([1, 2], "a list, and no state dict"),
        ({}, r"keys \[\], and no state dict"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_state_dict(written(tmp_path, content))


# ------------------------------------------------------------------------------------------------------ load_foreign

GREY = {"mean": (0.5,), "std": (0.25,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (CONFIG, {"num_heads": 4, "decoder_num_heads": 2}),
        (AutoencoderConfig((32, 32), 16, 192, 1, 3, 512, 1, 16), {}),
        (AutoencoderConfig((28, 28), 14, 384, 1, 6, 16, 1, 2), {"decoder_num_heads": 2}),
        (AutoencoderConfig((8, 8), 8, 768, 1, 12, 16, 1, 4), {"decoder_num_heads": 4}),
        (AutoencoderConfig((8, 8), 8, 1024, 1, 16, 16, 1, 4), {"decoder_num_heads": 4}),
        (AutoencoderConfig((8, 8), 8, 1280, 1, 16, 16, 1, 4), {"decoder_num_heads": 4}),
        (AutoencoderConfig((8, 8), 8, 192, 1, 6, 16, 1, 4), {"num_heads": 6, "decoder_num_heads": 4}),
        (AutoencoderConfig((8, 24), 4, 32, 1, 4, 16, 1, 2, **GREY, target="raw", objective="mae"),
         {"num_heads": 4, "decoder_num_heads": 2, "img_size": (8, 24), "target": "raw", "objective": "mae", **GREY}),
        (AutoencoderConfig((8, 32), 4, 32, 1, 4, 16, 1, 2),
         {"num_heads": 4, "decoder_num_heads": 2, "img_size": (8, 32)}),
    ],
)  # fmt: skip
def test_an_autoencoder_is_read_off_its_weights(tmp_path, config, options, global_rng_untouched):
    state = autoencoder(config).state_dict()
    loaded = load_foreign(written(tmp_path, {"model": state}), **{"target": "norm", **options})
    assert isinstance(loaded, Autoencoder)
    assert loaded.config == config
    assert equal(loaded.state_dict(), state)
    assert not loaded.training


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_classifier_is_read_off_its_weights(tmp_path, pool, global_rng_untouched):
    model = classifier(global_pool=pool, trained_on="noise, input statistics")
    file = written(tmp_path, {"classifier": model.state_dict()})
    loaded = load_foreign(file, num_heads=4, trained_on="noise, input statistics")
    assert isinstance(loaded, Classifier)
    assert loaded.config == model.config
    assert equal(loaded.state_dict(), model.state_dict())
    assert not loaded.training


def test_an_encoder_alone_goes_into_a_classifier(tmp_path):
    state = {name: value for name, value in autoencoder().state_dict().items() if "decoder" not in name}
    del state["mask_token"]
    file = written(tmp_path, {"model": state})
    with pytest.raises(CheckpointError, match=r"Classifier\.load_encoder\(read_state_dict\(path\)\)"):
        load_foreign(file, num_heads=4)
    model = classifier()
    model.load_encoder(read_state_dict(file))
    assert torch.equal(model.state_dict()["blocks.2.mlp.fc1.weight"], state["blocks.2.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^num_heads is needed.*embed_dim of 32 \(known: 192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16\)"),
        ({"num_heads": 4}, "decoder_num_heads is needed.*embed_dim of 16"),
        ({"num_heads": 5, "decoder_num_heads": 2}, "embed_dim 32 must be a multiple of num_heads 5"),
        ({"num_heads": 4, "decoder_num_heads": 2, "img_size": 18}, "multiples of the patch size"),
        ({"num_heads": 4, "decoder_num_heads": 2, "patch_size": 2}, "decoder of patches of 4 pixels.*cannot become 2"),
        ({"num_heads": 4, "decoder_num_heads": 2, "norm_eps": 0.0}, "norm_eps must lie between 0 and 1, got 0.0"),
        ({"num_heads": 4, "decoder_num_heads": 2, "img_size": (17, 16)}, "multiples of the patch size"),
        ({"num_heads": 4, "decoder_num_heads": 2, **GREY}, r"takes images of 3 channels, got mean \(0.5,\)"),
        ({"num_heads": 4, "decoder_num_heads": 2, "objective": "jepa"}, "nim, mae or dmae"),
    ],
)
def test_options_that_are_needed_or_contradict(tmp_path, options, message):
    file = written(tmp_path, autoencoder().state_dict())
    with pytest.raises(ValueError, match=message):
        load_foreign(file, **options)


@pytest.mark.parametrize(("img_size", "patch_size"), [((16, 24), None), (20, None), ((12, 18), 3), (None, 8), (8, 2)])
def test_another_size_is_resampled_as_timm_does_it(tmp_path, img_size, patch_size):
    vit = plain_vit(global_pool="avg")  # 16 pixels, patches of 4
    options = {"img_size": img_size or 16, "patch_size": patch_size or 4, "global_pool": "avg"}
    expected = plain_vit(**options)
    expected.load_state_dict(vision_transformer.checkpoint_filter_fn(vit.state_dict(), expected))
    sizes = {"img_size": img_size, "patch_size": patch_size}
    model = load_foreign(written(tmp_path, vit.state_dict()), num_heads=4, **sizes, **STATISTICS)
    assert model.config.patch_size == options["patch_size"]
    assert model.config.img_size == expected.patch_embed.img_size
    images = pixels(size=model.config.img_size)
    assert torch.equal(model(images), expected(normalised(images, model.config)))


def test_the_positions_of_a_decoder_are_resampled_too(tmp_path):
    state = autoencoder().state_dict()
    options = {"num_heads": 4, "decoder_num_heads": 2, "target": "raw"}
    model = load_foreign(written(tmp_path, state), img_size=(8, 16), **options)
    assert model.config.grid_size == (2, 4)
    for name in ("pos_embed", "decoder_pos_embed"):
        expected = resample_abs_pos_embed(state[name], [2, 4])
        assert torch.equal(model.state_dict()[name], expected)
    assert torch.equal(model.state_dict()["decoder_pred.weight"], state["decoder_pred.weight"])
    with pytest.raises(ValueError, match="has 8 patches, no square"):
        load_foreign(written(tmp_path, model.state_dict()), img_size=16, **options)


def test_a_target_that_is_not_given_is_detected(tmp_path, monkeypatch):
    file = written(tmp_path, autoencoder().state_dict())
    options = {"num_heads": 4, "decoder_num_heads": 2}
    with pytest.raises(ValueError, match=r"does not show whether its target was.*with weight .*\): give target"):
        load_foreign(file, **options)  # weights that have learnt nothing
    monkeypatch.setattr(Autoencoder, "forward", lambda self, patches, mask=None: patches)  # a raw target, unmoved
    with pytest.warns(UserWarning, match=r"file\.pth: the target is taken to be 'raw' \(predictions of photos"):
        model = load_foreign(file, **options)
    assert model.config.target == "raw"
    assert load_foreign(file, target="norm", **options).config.target == "norm"


def test_statistics_and_sides_are_needed_where_nothing_tells(tmp_path):
    config = AutoencoderConfig((8, 12), 4, 32, 1, 4, 16, 1, 2, **GREY)
    file = written(tmp_path, autoencoder(config).state_dict())
    with pytest.raises(ValueError, match="images of 1 channels: mean and std are needed"):
        load_foreign(file, num_heads=4, decoder_num_heads=2, img_size=(8, 12))
    with pytest.raises(ValueError, match=r"has 6 patches, no square: `load_foreign` with img_size=\(H, W\)"):
        load_foreign(file, num_heads=4, decoder_num_heads=2, **GREY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_token": None}, "cls_token is missing"),
        ({"pos_embed": None}, "pos_embed is missing"),
        ({"patch_embed.proj.weight": torch.zeros(32, 48)}, r"proj.weight has 4 dimensions, here \(32, 48\)"),
        ({"patch_embed.proj.weight": torch.zeros(32, 3, 4, 8)}, "patches of 4 x 8"),
        ({"blocks.1.attn.qkv.bias": None}, "blocks.1.attn.qkv.bias is missing"),
        ({"blocks.1.ls1.gamma": torch.ones(32)}, "blocks.1.ls1.gamma is unknown"),
        ({"reg_token": torch.ones(1, 4, 32)}, "reg_token is unknown"),
        ({"blocks.0.mlp.fc1.weight": torch.ones(64, 32)}, r"fc1.weight is \(64, 32\), expected \(128, 32\)"),
        ({"decoder_pred.weight": torch.ones(40, 16)}, r"decoder_pred.weight is \(40, 16\), expected \(48, 16\)"),
        ({"decoder_pred.weight": None}, "an encoder alone"),
    ],
)
def test_weights_of_another_architecture(tmp_path, change, message):
    state = {name: value for name, value in {**autoencoder().state_dict(), **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        load_foreign(written(tmp_path, state), num_heads=4, decoder_num_heads=2)


def test_weights_of_no_vit(tmp_path):
    with pytest.raises(CheckpointError, match=r"no ViT.*first weights \['layer.weight', 'layer.bias'\]"):
        load_foreign(written(tmp_path, STATE))


# --------------------------------------------------------------------------------------------------------------- timm


def normalised(pixels: Tensor, config: ClassifierConfig | AutoencoderConfig) -> Tensor:
    mean, std = (torch.tensor(value, dtype=pixels.dtype).view(-1, 1, 1) for value in (config.mean, config.std))
    return (pixels - mean) / std


def pixels(channels: int = 3, size: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(3, channels, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def no_shared_memory(first: nn.Module, second: nn.Module) -> bool:
    places = [
        {value.untyped_storage().data_ptr() for value in model.state_dict().values()} for model in (first, second)
    ]
    return places[0].isdisjoint(places[1])


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_timm_vit_becomes_a_classifier_with_its_logits(pool, global_rng_untouched):
    vit = plain_vit(global_pool=pool)
    model = from_timm(vit, **STATISTICS, classes="abcde")
    expected = vit(normalised(pixels(), model.config))
    assert torch.equal(model(pixels()), expected)  # the same operations on the same numbers
    assert model.config == ClassifierConfig(
        5, (16, 16), 4, 32, 2, 4, **STATISTICS, global_pool=pool, classes=tuple("abcde")
    )
    assert not model.training
    assert no_shared_memory(model, vit)


@settings(max_examples=15, deadline=None)
@given(
    patch_size=st.integers(1, 4),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    channels=st.integers(1, 4),
    depth=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    pool=st.sampled_from(["avg", "token"]),
)
def test_any_classifier_goes_to_timm_and_back(patch_size, rows, columns, channels, depth, heads, pool):
    size = (rows * patch_size, columns * patch_size)
    body = AutoencoderConfig(size, patch_size, 16, depth, heads, mean=(0.4,) * channels, std=(0.3,) * channels)
    model = classifier(body, global_pool=pool)
    vit = to_timm(model)
    assert type(vit) is VisionTransformer
    assert not vit.training
    assert torch.equal(vit(normalised(pixels(channels, size), body)), model(pixels(channels, size)))
    back = from_timm(vit, mean=body.mean, std=body.std)
    assert back.config == model.config
    assert equal(back.state_dict(), model.state_dict())
    assert no_shared_memory(model, vit)
    assert no_shared_memory(back, vit)


def test_an_autoencoder_becomes_a_timm_encoder(global_rng_untouched):
    model = autoencoder().double()
    vit = to_timm(model)
    patches = normalized_patches(pixels(dtype=torch.float64), patch_size=4, mean=CONFIG.mean, std=CONFIG.std)
    features = vit.forward_features(normalised(pixels(dtype=torch.float64), CONFIG))
    # float64 in another order of summation (a convolution against a linear): 1e-12 is a thousand roundings.
    torch.testing.assert_close(features, model.encode(patches), rtol=0, atol=1e-12)
    assert torch.equal(vit(normalised(pixels(dtype=torch.float64), CONFIG)), features[:, 0])
    assert no_shared_memory(model, vit)
    with torch.random.fork_rng(devices=[]):
        vit.reset_classifier(10)
    vit.double()  # timm 1.0.26 makes a float32 head, whatever the body's dtype
    assert vit(pixels(dtype=torch.float64)).shape == (3, 10)


def test_the_eps_of_the_norms_comes_along():
    vit = plain_vit(norm_layer=partial(nn.LayerNorm, eps=1e-3))
    model = from_timm(vit, **STATISTICS)
    assert model.config.norm_eps == 1e-3
    expected = vit(normalised(pixels(), model.config))
    assert torch.equal(model(pixels()), expected)
    assert torch.equal(to_timm(model)(normalised(pixels(), model.config)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_comes_along(dtype):
    model = from_timm(plain_vit().to(dtype), **STATISTICS)
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    assert {value.dtype for value in to_timm(model).state_dict().values()} == {dtype}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_models_of_timm_by_name(name):
    with torch.random.fork_rng(devices=[]):
        vit = timm.create_model(name, img_size=32, num_classes=5, drop_path_rate=0.1, drop_rate=0.1).eval()
    model = from_timm(vit, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), vit(normalised(images, model.config)))
    vit.load_state_dict(model.state_dict())  # back, by name


REFUSED = [
    ({"reg_tokens": 4}, "4 register tokens"),
    ({"qk_norm": True}, r"qk-norm \(blocks\.\*\.attn\.q_norm is LayerNorm"),
    ({"init_values": 1e-5}, r"layer scale \(blocks\.\*\.ls1 is LayerScale"),
    ({"mlp_layer": SwiGLU}, r"blocks\.\*\.mlp is SwiGLU, a plain ViT has Mlp"),
    ({"mlp_ratio": 2}, r"blocks\.\*\.mlp\.fc1\.weight is \(64, 32\), a plain ViT has \(128, 32\)"),
    ({"class_token": False, "global_pool": "avg"}, "no class token"),
    ({"pre_norm": True}, r"a norm before the blocks \(norm_pre"),
    ({"embed_norm_layer": nn.LayerNorm}, r"patch_embed\.norm is LayerNorm"),
    ({"act_layer": "quick_gelu"}, r"mlp\.act is QuickGELU"),
    ({"act_layer": partial(nn.GELU, approximate="tanh")}, r"mlp\.act has approximate tanh, a plain ViT none"),
    ({"qkv_bias": False}, r"blocks\.\*\.attn\.qkv\.bias is missing"),
    ({"proj_bias": False}, r"blocks\.\*\.attn\.proj\.bias is missing"),
    ({"norm_layer": "rmsnorm"}, r"norm1 is RmsNorm"),
    ({"pos_embed": "none"}, "no absolute positions"),
    ({"no_embed_class": True}, "no_embed_class"),
    ({"dynamic_img_size": True}, "dynamic image size"),
    ({"dynamic_img_pad": True}, "dynamic image size"),
    ({"block_fn": vision_transformer.ParallelScalingBlock}, r"blocks\.\* is ParallelScalingBlock"),
    ({"block_fn": vision_transformer.ResPostBlock}, r"blocks\.\* is ResPostBlock"),
    ({"global_pool": "map"}, "global_pool='map'.*attn_pool is AttentionPoolLatent"),
    ({"global_pool": "avgmax"}, "global_pool='avgmax'"),
    ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix"),
    ({"global_pool": "avg", "fc_norm": False}, r"another place of the final norm \(fc_norm"),
    ({"fc_norm": True}, r"another place of the final norm \(fc_norm"),
    ({"final_norm": False}, "norm is Identity, a plain ViT has LayerNorm"),
    ({"scale_attn_norm": True}, r"blocks\.\*\.attn\.norm is LayerNorm"),
    ({"scale_mlp_norm": True}, r"blocks\.\*\.mlp\.norm is LayerNorm"),
    ({"num_classes": 0}, r"no head \(num_classes=0\)"),
    ({"patch_size": (4, 8)}, r"patches of \(4, 8\)"),
    ({"img_size": 18}, r"image size \(18, 18\), no multiple of the patch size"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[" ".join(change) for change, _ in REFUSED])
def test_a_variant_is_refused_with_what_is_in_the_way(change, message, global_rng_untouched):
    with pytest.raises(ValueError, match=rf"cannot be exchanged: .*{message}.*Plain ViTs can be exchanged: timm's"):
        from_timm(plain_vit(**change), **STATISTICS)


def test_all_that_is_in_the_way_is_named_once():
    vit = plain_vit(reg_tokens=2, qk_norm=True, init_values=1e-5)
    with pytest.raises(ValueError, match=r"2 register tokens.*qk-norm.*layer scale") as caught:
        from_timm(vit, **STATISTICS)
    assert str(caught.value).count("q_norm") == 1


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="it is a Classifier, not timm's VisionTransformer itself"):
        from_timm(classifier(), **STATISTICS)
    with pytest.raises(ValueError, match="it is a Linear"):
        from_timm(nn.Linear(2, 2), **STATISTICS)
    vit = plain_vit()
    vit.blocks[1].attn.num_heads = 2
    with pytest.raises(ValueError, match=r"blocks\.\*\.attn has num_heads 2, a plain ViT 4"):
        from_timm(vit, **STATISTICS)
    vit = plain_vit()
    vit.norm.eps = 1e-5
    with pytest.raises(ValueError, match="norm has eps 1e-05, a plain ViT 1e-06"):
        from_timm(vit, **STATISTICS)
    vit = plain_vit()
    vit.patch_embed = nn.Conv2d(3, 32, 4, 4)
    with pytest.raises(ValueError, match="patch_embed is Conv2d"):
        from_timm(vit, **STATISTICS)


def test_statistics_and_classes_must_fit():
    with pytest.raises(ValueError, match="takes 3 channels"):
        from_timm(plain_vit(), **GREY)
    with pytest.raises(ValueError, match="2 class names for 5 classes"):
        from_timm(plain_vit(), **STATISTICS, classes=("cat", "dog"))
