from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from denim.nim.autoencoder import Autoencoder, AutoencoderConfig
from denim.nim.checkpoint import CheckpointError
from denim.nim.classifier import Classifier, ClassifierConfig

CONFIG = AutoencoderConfig((8, 12), 4, 16, 1, 2, 16, 1, 2, mean=(0.4, 0.5), std=(0.2, 0.3), target="raw")


def build(seed: int = 0, config: AutoencoderConfig = CONFIG) -> Autoencoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Autoencoder(config)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def saved(tmp_path) -> Path:
    build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ----------------------------------------------------------------------------------------------------- round trips


def test_autoencoder_comes_back_bit_for_bit(tmp_path, global_rng_untouched):
    model = build()
    model.save_pretrained(tmp_path / "not" / "there" / "yet")
    loaded = Autoencoder.from_pretrained(tmp_path / "not" / "there" / "yet")
    assert same(loaded, model)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert [parameter.requires_grad for parameter in loaded.parameters()] == [
        parameter.requires_grad for parameter in model.parameters()
    ]


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_classifier_comes_back_bit_for_bit(tmp_path, pool):
    config = ClassifierConfig.for_encoder(
        CONFIG, 2, global_pool=pool, classes=("cat", "dög"), trained_on="noise, raw target"
    )
    with torch.random.fork_rng(devices=[]):
        model = Classifier(config)
    model.save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(str(tmp_path))
    assert same(loaded, model)
    assert loaded.config == config
    assert torch.equal(loaded.mean, model.mean)


def test_a_folder_holds_three_plain_files(saved):
    assert sorted(file.name for file in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    content = json.loads((saved / "config.json").read_text())
    assert content["model"] == "Autoencoder"
    assert content["img_size"] == [8, 12]
    assert set(load_file(saved / "model.safetensors")) == set(build().state_dict())


def test_saving_again_replaces(saved):
    other = build(1, replace(CONFIG, depth=2))
    other.save_pretrained(saved)
    assert same(Autoencoder.from_pretrained(saved), other)
    assert len(list(saved.iterdir())) == 3


def test_views_and_half_precision_can_be_saved(tmp_path):
    model = build().to(torch.bfloat16)
    model.decoder_pred.weight = torch.nn.Parameter(model.decoder_pred.weight.t().contiguous().t())
    model.save_pretrained(tmp_path)
    assert same(Autoencoder.from_pretrained(tmp_path), model.float())


# What the first version of Denim wrote.
OLD_AUTOENCODER = """{"model": "Autoencoder", "image_size": [8, 12], "patch_size": 4, "width": 16, "depth": 1,
"heads": 2, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 1, "mean": [0.4, 0.5], "std": [0.2, 0.3],
"norm_pix": %s, "objective": "dmae"}"""
OLD_CLASSIFIER = """{"model": "Classifier", "num_classes": 2, "image_size": [8, 12], "patch_size": 4, "width": 16,
"depth": 1, "heads": 2, "mean": [0.4, 0.5], "std": [0.2, 0.3], "pool": "token", "drop_path": 0.0,
"classes": ["cat", "dog"], "images": "noise, raw target"}"""


@pytest.mark.parametrize(("norm_pix", "target"), [("true", "norm"), ("false", "raw")])
def test_an_autoencoder_of_the_first_version_is_read(tmp_path, norm_pix, target):
    config = AutoencoderConfig((8, 12), 4, 16, 1, 2, 8, 1, 1, (0.4, 0.5), (0.2, 0.3), target, "dmae")
    build(0, config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(OLD_AUTOENCODER % norm_pix)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert loaded.config == config
    assert same(loaded, build(0, config))


def test_a_classifier_of_the_first_version_is_read(tmp_path):
    config = ClassifierConfig(
        2, (8, 12), 4, 16, 1, 2, (0.4, 0.5), (0.2, 0.3), "token", 0.0, ("cat", "dog"), "noise, raw target"
    )
    Classifier(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(OLD_CLASSIFIER)
    assert Classifier.from_pretrained(tmp_path).config == config


# ----------------------------------------------------------------------------------------------------- bad folders


def edit(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def test_a_run_stands_for_its_model(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a run that has not finished: resume it first"):
        Autoencoder.from_pretrained(tmp_path)
    build(1).save_pretrained(tmp_path / "model")
    assert same(Autoencoder.from_pretrained(tmp_path), build(1))
    with pytest.raises(CheckpointError, match=r"model/config\.json describes a Autoencoder, expected Classifier"):
        Classifier.from_pretrained(tmp_path)


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json: not a checkpoint folder of Denim"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda folder: truncate(folder / "model.safetensors", 0), "truncated or not a safetensors file"),
        (lambda folder: truncate(folder / "model.safetensors", 100), "truncated or not a safetensors file"),
        (lambda folder: truncate(folder / "model.safetensors", -1), "truncated or not a safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"PK" * 99), "not a safetensors file"),
        (lambda folder: truncate(folder / "config.json", 40), r"config\.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[1, 2]"), r"config\.json holds b'\[1, 2\]', expected"),
        (lambda folder: edit(folder, model=None), "describes a model of another library, expected Autoencoder"),
        (lambda folder: edit(folder, model="Classifier"), "describes a Classifier, expected Autoencoder"),
        (lambda folder: edit(folder, depht=3), r"unknown entries \['depht'\]; known are \['decoder_depth', "),
        (lambda folder: edit(folder, depth="3"), "does not describe a Autoencoder: depth must be a positive integer"),
        (lambda folder: edit(folder, patch_size=0), "patch_size must be a positive integer"),
        (lambda folder: edit(folder, patch_size=5), "multiples of the patch size 5"),
        (lambda folder: edit(folder, img_size=8), "does not describe a Autoencoder"),
        (lambda folder: edit(folder, std=["a", "b"]), "does not describe a Autoencoder"),
        (
            lambda folder: edit(folder, depth=2),
            "another architecture than its config.json: blocks.1.norm1.weight is",
        ),
        (lambda folder: edit(folder, depth=True), "depth must be a positive integer, got True"),
        (lambda folder: edit(folder, depth=1.0), "depth must be a positive integer, got 1.0"),
        (lambda folder: edit(folder, img_size=[8.0, 12]), r"img_size must be two multiples.*got \(8.0, 12\)"),
        (lambda folder: edit(folder, mean=["0.4", "0.5"]), r"mean must be of type .*got \('0.4', '0.5'\)"),
        (lambda folder: edit(folder, mean=[True, True]), r"mean must be of type .*got \(True, True\)"),
        (lambda folder: edit(folder, target=1), "target must be of type str, got 1"),
        (lambda folder: edit(folder, mean=[10**400, 1]), "does not describe a Autoencoder"),
        (
            lambda folder: (folder / "config.json").write_text(OLD_AUTOENCODER % '"false"'),
            "norm_pix must be true or false, got 'false'",
        ),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), r"config\.json is not valid JSON"),
        # None of these may take memory: the weights themselves would take terabytes.
        (lambda folder: edit(folder, depth=999), r"config.json: \d+ weights cannot be those of 1000 blocks"),
        (lambda folder: edit(folder, embed_dim=2**20), r"cls_token is \(1, 1, 16\), expected \(1, 1, 1048576\)"),
        (lambda folder: edit(folder, img_size=[2**40] * 2), r"another architecture than its config\.json"),
        (lambda folder: edit(folder, embed_dim=32), r"cls_token is \(1, 1, 16\), expected \(1, 1, 32\).*and \d+ more"),
        (
            lambda folder: save_file(
                {**load_file(folder / "model.safetensors"), "extra": torch.ones(1)}, folder / "model.safetensors"
            ),
            "extra is unknown",
        ),
    ],
)
def test_a_damaged_folder_is_named_and_refused(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        Autoencoder.from_pretrained(saved)
    assert str(saved) in str(caught.value)


def test_a_file_is_not_a_folder(saved):
    with pytest.raises(CheckpointError, match=r"is a file; a checkpoint of Denim is a folder.*load_foreign"):
        Autoencoder.from_pretrained(saved / "model.safetensors")


@pytest.mark.parametrize("source", ["/no/such/folder", "./runs/x", "~/model", "name", "a/b/c", Path("owner/name")])
def test_no_such_folder_asks_no_hub(source, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(CheckpointError, match=r"no folder .*not have the form owner/name"):
        Autoencoder.from_pretrained(source)


# --------------------------------------------------------------------------------------------------------- the hub


def test_the_hub_gives_a_folder(saved, monkeypatch):
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(Autoencoder.from_pretrained("owner/name", revision="v1"), build())
    assert asked["repo"] == "owner/name"
    assert asked["revision"] == "v1"
    wanted = ["config.json", "model.safetensors", "README.md"]
    assert asked["allow_patterns"] == [*wanted, *(f"denoiser/{file}" for file in wanted)]


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route to host"),
        huggingface_hub.errors.LocalEntryNotFoundError("no route to host"),
        huggingface_hub.errors.HFValidationError("no route to host"),
    ],
)
def test_no_network(error, monkeypatch):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        CheckpointError,
        match=r"no folder owner/name, and no repository of that name could be fetched.*no route to host",
    ):
        Autoencoder.from_pretrained("owner/name")


def test_push_uploads_what_is_saved(monkeypatch):
    uploaded = {}

    def create(self, repo_id, **_):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload(self, *, repo_id, folder_path, **_):
        uploaded.update(repo=repo_id, model=Autoencoder.from_pretrained(folder_path))
        uploaded["card"] = huggingface_hub.ModelCard.load(folder_path / "README.md")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    build().push_to_hub("owner/name", model_card_kwargs={"license": "mit", "sigma": "gamma:25,3"})
    assert uploaded["repo"] == "owner/name"
    assert same(uploaded["model"], build())
    assert uploaded["card"].data.license == "mit"
    assert "Noise levels of the training, in 0-255 pixel levels: gamma:25,3." in uploaded["card"].text
    with pytest.raises(ValueError, match="the configuration of a model is its own"):
        build().push_to_hub("owner/name", config={"depth": 2})


def test_the_card_says_what_the_model_is_and_how_to_load_it(saved):
    card = huggingface_hub.ModelCard.load(saved / "README.md")
    assert card.data.library_name == "denim"
    assert {"denim", "pytorch_model_hub_mixin"} <= set(card.data.tags)
    assert card.data.license is None
    for words in ("# Autoencoder of Denim", "objective nim, target raw.", "pixel levels: not recorded here.",
                  'Autoencoder.from_pretrained("owner/name")',
                  "| img_size | (8, 12) |", "https://arxiv.org/abs/2302.01056"):  # fmt: skip
        assert words in card.text
    classifier = Classifier(ClassifierConfig.for_encoder(CONFIG, 2, trained_on="noise, raw target"))
    assert 'images of the kind "noise, raw target".' in str(classifier.generate_model_card(license="mit"))


def test_a_card_that_was_edited_stays(saved):
    (saved / "README.md").write_text("mine")
    build(1).save_pretrained(saved)
    assert (saved / "README.md").read_text() == "mine"
    assert same(Autoencoder.from_pretrained(saved), build(1))


def test_a_card_that_is_damaged_is_taken_along_and_named(saved, tmp_path):
    damaged = b"---\n: [\n---\n"
    (saved / "README.md").write_bytes(damaged + b"\xff")
    model = Autoencoder.from_pretrained(saved)
    model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_bytes() == damaged + "\ufffd".encode()
    with pytest.raises(ValueError, match=r"the README\.md of this model has a damaged head"):
        model.save_pretrained(tmp_path / "other", model_card_kwargs={"license": "mit"})
    assert not (tmp_path / "other").exists()


def test_a_folder_without_a_card_is_read(saved):
    (saved / "README.md").unlink()
    assert same(Autoencoder.from_pretrained(saved), build())


# ------------------------------------------------------------------------------------------------ interrupted saving


def test_a_model_that_cannot_be_written_leaves_the_old_one(saved, monkeypatch):
    def full_disk(tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("denim.nim.checkpoint.save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            build(1).save_pretrained(saved)
    other = build(1)
    other.config = replace(CONFIG, objective="mae")
    object.__setattr__(other.config, "target", torch.tensor(1))  # what JSON cannot hold
    with pytest.raises(TypeError, match="not JSON serializable"):
        other.save_pretrained(saved)
    assert same(Autoencoder.from_pretrained(saved), build())
    assert len(list(saved.iterdir())) == 3


# Saves over a model in a child process, which is killed with half the weights written, or after the weights and before
# the config, or before the folder gets its name.
KILLED = """
import contextlib, os, signal, sys
from pathlib import Path
import denim.nim.checkpoint as checkpoint
import denim.nim.files as files
from denim.nim.autoencoder import Autoencoder

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(tensors, file, **options):
    whole(tensors, file, **options)
    os.truncate(file, os.path.getsize(file) // 2)
    kill()

whole = checkpoint.save_file
for moment in ("weights", "config", "folder"):
    folder = Path(sys.argv[1]) / moment
    model = Autoencoder.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.fill_(1)
    child = os.fork()
    if child == 0:
        if moment == "weights":
            checkpoint.save_file = half
        if moment == "config":
            Path.write_text = kill
        new = files.atomic_folder(folder / "next") if moment == "folder" else contextlib.nullcontext(folder)
        with new as target:
            model.save_pretrained(target)
            kill()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    moments = ("weights", "config", "folder")
    for moment in moments:
        build().save_pretrained(tmp_path / moment)
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert run.stdout.split() == ["-9"] * 3, run.stderr
    loaded = {moment: Autoencoder.from_pretrained(tmp_path / moment) for moment in moments}
    assert same(loaded["weights"], build())
    # The weights are the new ones, whole; the config was and is the same.
    assert all((parameter == 1).all() for parameter in loaded["config"].parameters())
    assert same(loaded["folder"], build())
    assert not (tmp_path / "folder" / "next").exists()


# --------------------------------------------------------------------------------------- weights that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(saved, value):
    model = build(1)
    model.decoder_pred.bias.data[3] = value
    with pytest.raises(FloatingPointError, match=r"not finite and are not saved: decoder_pred\.bias$"):
        model.save_pretrained(saved)
    assert same(Autoencoder.from_pretrained(saved), build())
    state = load_file(saved / "model.safetensors")
    state["decoder_pred.bias"][3] = value
    save_file(state, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds weights that are not finite \(decoder"):
        Autoencoder.from_pretrained(saved)
    classifier = Classifier(ClassifierConfig.for_encoder(CONFIG, 2))
    broken = {name: tensor * value for name, tensor in build().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"the encoder holds weights that are not finite \(cls_token"):
        classifier.load_encoder(broken)


@pytest.mark.parametrize("convert", [torch.Tensor.long, torch.Tensor.bool, lambda tensor: tensor.double() + 1e300])
def test_weights_that_are_no_float32_numbers_are_refused(saved, convert):
    state = load_file(saved / "model.safetensors")
    state["norm.weight"] = convert(state["norm.weight"])
    save_file(state, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"that are (no floating-point numbers: |not finite \()norm\.weight"):
        Autoencoder.from_pretrained(saved)
