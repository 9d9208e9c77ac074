"""The `denim` command as a user meets it: every subcommand once, and what mistakes answer."""

import json
import shutil
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from denim import cli
from denim.cli import demo
from denim.defense import De3
from denim.nim import Autoencoder, Classifier, models
from denim.nim.data import hold_out, open_source

FAST = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "256", "--crop-scale", "None", "--no-flip"]
PLAIN = ["--drop-path", "0", "--auto-augment", "None", "--erasing", "0", "--mixup", "0", "--cutmix", "0"]


def denim(*words, status=0):
    """Run the command in this process: starting Python anew for each would take longer than the work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["denim", *map(str, words)])
        try:
            cli.run()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    assert code == status


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A denoiser and a classifier, trained for one epoch by the commands."""
    folder = tmp_path_factory.mktemp("runs")
    denim("pretrain", "--out", folder / "nim", "--preset", "micro", "--target", "raw", *FAST)
    model = folder / "nim" / "model"
    denim("finetune", "--out", folder / "ft", "--denoiser", model, *FAST, *PLAIN)
    return folder


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


@pytest.mark.slow
def test_evaluate_writes_every_result_and_goes_on_where_it_stopped(runs, tmp_path, capsys):
    words = (
        *("evaluate", "--classifier", runs / "ft" / "model", "--denoiser", runs / "nim" / "model"),
        *(
            "--out",
            tmp_path / "ev",
            "--num-images",
            "12",
            "--sigmas",
            "0",
            "70",
            "--score-draws",
            "3",
            "--examples",
            "2",
        ),
        *("--attacks", "fgsm:8/255,eot=2", "pgd:8/255,steps=2,eot=2,gray"),
    )
    denim(*words)
    shown = capsys.readouterr().out
    assert "sigma 70 frozen" in " ".join(shown.split())
    assert "precision: fp32 on cpu" in shown
    assert str(tmp_path / "ev" / "report.html") in shown
    results = json.loads((tmp_path / "ev" / "results.json").read_text())
    assert {cell["defense"] for cell in results["cells"]} == {"defense off", "sigma 0", "sigma 70", "sigma 70 frozen"}
    assert all(cell["scores"]["num_images"] == 12 for cell in results["cells"])
    assert (tmp_path / "ev" / "tradeoff.png").stat().st_size > 5000
    before = (tmp_path / "ev" / "records.sqlite").read_bytes()
    denim(*words)
    assert (tmp_path / "ev" / "records.sqlite").read_bytes() == before


@pytest.mark.slow
def test_evaluate_states_the_accuracy_that_the_training_has_stated(runs, tmp_path):
    held = ("--val-split", "0.1")
    trained = ("finetune", "--out", tmp_path / "ft", "--denoiser", runs / "nim", "--seed", "5", *FAST, *PLAIN)
    denim(*trained, "--trained-on", "clean", *held)
    stated = json.loads((tmp_path / "ft" / "result.json").read_text())
    subject = ("--classifier", tmp_path / "ft", *held, "--val-seed", "5", "--num-images", "0")
    none = ("--sigmas", "--frozen", "None", "--attacks", "fgsm:1/255", "--examples", "0", "--health-images", "0")
    denim("evaluate", "--out", tmp_path / "ev", *subject, *none)
    cell = json.loads((tmp_path / "ev" / "results.json").read_text())["cells"][0]
    assert (cell["attack"], cell["scores"]["num_images"]) == ("none", stated["images"])
    assert cell["scores"]["mean"]["value"] == pytest.approx(stated["accuracy"], abs=1e-6)
    assert "held out of the training: 0.1" in (tmp_path / "ev" / "report.html").read_text()
    few = ("--sigmas", "70", "--draws", "20", "--selection-draws", "10", "--num-images", "3")
    denim("certify", "--out", tmp_path / "ce", "--classifier", tmp_path / "ft", *held, "--val-seed", "5", *few)
    ids = {json.loads(line)["id"] for line in (tmp_path / "ce" / "certificates.jsonl").read_text().splitlines()}
    assert ids <= set(hold_out(open_source("digits", "train", 1), 0.1, 5)[1].ids.tolist())


@pytest.mark.slow
def test_evaluate_models_of_others(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "models_of_test.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Plain(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(256, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.save({"1.weight": torch.zeros(10, 256), "1.bias": torch.arange(10.0)}, tmp_path / "nine.pt")
    base = ("evaluate", "--out", "ev", "--num-images", "30", "--attacks", "fgsm:8/255", "--examples", "0")
    base = (*base, "--health-images", "0")
    named = ("--model", "nine=models_of_test:Plain", "--weights", "nine.pt")
    denim(*base, *named, "--img-size", "16")
    cells = json.loads((tmp_path / "ev" / "results.json").read_text())["cells"]
    assert {(cell["defense"], cell["case"]) for cell in cells} == {("nine", "model")}
    assert 0 < cells[0]["scores"]["mean"]["value"] < 0.3  # the share of nines
    classifier = ("--classifier", runs / "ft" / "model", "--sigmas", "70", "--frozen", "None", "--score-draws", "3")
    denim(*base, *named, *classifier)
    cells = json.loads((tmp_path / "ev" / "results.json").read_text())["cells"]
    assert list(dict.fromkeys(cell["defense"] for cell in cells)) == ["defense off", "sigma 70", "nine"]
    capsys.readouterr()
    for words, message in (
        ((), "nothing to evaluate: give --classifier, or --model"),
        (("--model", "models_of_test:Plain"), "models_of_test:Plain does not say what size of images it takes"),
        ((*named[:2], "--weights", "a.pt", "b.pt"), "--weights needs a file for each --model, got 2 for 1"),
        ((*named, "--clean-classifier", runs / "ft" / "model"), "--clean-classifier needs --classifier"),
    ):
        denim(*base, *words, status=2)
        assert message in capsys.readouterr().err
    sys.modules.pop("models_of_test")


@pytest.mark.slow
def test_evaluate_with_the_denoiser_jpeg_and_noise_before_a_model(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "models_before.py").write_text(
        "from torch import nn\n"
        "def linear():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))\n"
        "def large():\n    model = linear()\n    model.pretrained_cfg = {'input_size': (1, 32, 32)}\n    return model\n"
        "class Drawing:\n"
        "    is_random = True\n"
        "    def seeds(self, *args): ...\n"
        "    def draw_logits(self, *args): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    base = ("evaluate", "--num-images", "4", "--attacks", "fgsm:8/255,eot=1", "--examples", "0", "--score-draws", "2")
    base = (*base, "--health-images", "0")
    before = ("--jpeg", "75", "30", "--noise-only", "35", "--sigmas", "70", "--frozen", "None")

    def rows(*words):
        denim(*base, *before, *words)
        cells = json.loads((tmp_path / words[1] / "results.json").read_text())["cells"]
        return {cell["defense"]: (cell["sigma"], cell["case"]) for cell in cells}

    nim = runs / "nim" / "model"
    assert rows("--out", "model", "--model", "a=models_before:linear", "--denoiser", nim) == {
        "a": (None, "model"),
        "a, sigma 70": (70, "noise, raw target"),
        "a, noise alone, sigma 35": (35, "noisy"),
        "a, JPEG 75": (None, "model"),
        "a, JPEG 30": (None, "model"),
    }
    given = ("--classifier", runs / "ft" / "model", "--denoiser", nim, "--model", "a=models_before:linear")
    assert list(rows("--out", "classifier", *given)) == [
        *("defense off", "sigma 70", "noise alone, sigma 35", "JPEG 75", "JPEG 30", "a"),
    ]
    capsys.readouterr()
    for words, message in (
        (("--model", "models_before:linear", "--jpeg", "0"), "quality of JPEG must be a whole number from 1 to 100"),
        (("--model", "a=models_before:linear", "--jpeg", "75", "75"), "the name 'a, JPEG 75': give each level and"),
        (("--model", "models_before:Drawing", "--jpeg", "75"), "Drawing, which is no module: --denoiser, --jpeg"),
        (
            ("--model", "models_before:large", "--denoiser", nim),
            "takes images of side 16, and models_before:large of 32",
        ),
    ):
        denim(*base, "--out", "no", *words, status=2)
        assert message in capsys.readouterr().err
    sys.modules.pop("models_before")


def test_jpeg_stands_before_the_clean_classifier(runs, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("denim.defense.evaluate", lambda defenses, *args, **options: seen.update(defenses))
    monkeypatch.setattr("denim.defense.write_report", lambda *args, **options: tmp_path)
    monkeypatch.setattr("denim.defense.print_table", lambda *args: None)
    with pytest.raises(AttributeError):  # of what the evaluation would have returned
        denim("evaluate", "--classifier", runs / "ft" / "model", "--clean-classifier", runs / "ft" / "model",
              "--jpeg", "75", "--noise-only", "35")  # fmt: skip
    assert seen["JPEG 75"][1] is seen["clean classifier"].classifier
    assert seen["noise alone, sigma 35"].classifier is seen["defense off"].classifier
    assert not any(row.training for row in seen.values())


def test_evaluate_by_masking(runs, tmp_path):
    words = (
        "evaluate",
        "--classifier",
        runs / "ft" / "model",
        "--denoiser",
        runs / "nim" / "model",
        "--degrade",
        "mask",
    )
    with pytest.warns(UserWarning, match="trained on images of the kind"):
        denim(
            *words,
            "--out",
            tmp_path / "ev",
            "--num-images",
            "6",
            "--health-images",
            "0",
            "--mask-ratios",
            "0.5",
            "--attacks",
            "fgsm:8/255,eot=1",
        )
    results = json.loads((tmp_path / "ev" / "results.json").read_text())
    assert {cell["defense"] for cell in results["cells"]} == {"defense off", "mask 0.5"}


@pytest.mark.slow
def test_certify_writes_every_result(runs, tmp_path, capsys):
    model = ("--classifier", runs / "ft" / "model", "--denoiser", runs / "nim" / "model")
    words = (
        "certify",
        *model,
        "--out",
        tmp_path / "cert",
        "--num-images",
        "5",
        "--sigmas",
        "40",
        "70",
        "--draws",
        "60",
    )
    denim(*words)
    shown = " ".join(capsys.readouterr().out.split())
    assert "sigma 70" in shown
    assert "average radius" in shown
    assert "5 images, at most N = 60 draws, alpha = 0.001" in shown
    results = json.loads((tmp_path / "cert" / "results.json").read_text())
    assert [level["sigma"] for level in results["levels"]] == [40.0, 70.0]
    assert results["case"] == "noise, raw target"
    assert len((tmp_path / "cert" / "certificates.jsonl").read_text().splitlines()) == 10
    assert (tmp_path / "cert" / "certified.png").stat().st_size > 5000
    before = (tmp_path / "cert" / "certificates.jsonl").read_bytes()
    denim(*words)
    assert (tmp_path / "cert" / "certificates.jsonl").read_bytes() == before
    capsys.readouterr()
    for wrong, message in (
        ((), "give either --classifier, or --model"),
        ((*model, "--model", "timm:resnet18"), "give either --classifier, or --model"),
        ((*model, "--weights", "a.pt"), "--weights are those of a --model"),
        ((*model, "--sigmas", "0"), "nothing is smoothed"),
        ((*model, "--degrade", "mask", "--sigmas", "70"), "adds no noise"),
        ((*model, "--num-images", "-1"), "0 takes all"),
    ):
        denim("certify", "--out", tmp_path / "new", *wrong, status=2)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_certify_a_model_of_others(tmp_path, capsys, monkeypatch):
    (tmp_path / "smoothed_of_test.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Nine(nn.Module):\n"
        "    def forward(self, pixels):\n"
        "        return torch.arange(10.0).expand(len(pixels), -1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = ("certify", "--model", "smoothed_of_test:Nine", "--num-images", "40", "--draws", "50", "--sigmas", "64")
    denim(*words, "--out", "cert", status=2)
    assert "does not say what size of images it takes: give --img-size" in capsys.readouterr().err
    denim(*words, "--out", "cert", "--img-size", "8")
    curve = json.loads((tmp_path / "cert" / "results.json").read_text())["curve"]
    assert {row["certified"] for row in curve} == {curve[0]["certified"]}  # the share of nines, at every radius
    assert 0 < curve[0]["certified"] < 0.3
    sys.modules.pop("smoothed_of_test")


def test_runs_are_listed_compared_and_drawn(runs, capsys, monkeypatch):
    assert {path.parent.name for path in runs.glob("*/loss.png")} == {"nim", "ft"}  # drawn at the end of each
    (runs / "nim" / "loss.png").unlink()
    denim("runs", runs, "--plot")
    head, ft, nim, picture, _ = capsys.readouterr().out.replace("/nim/loss", "/ft/loss").splitlines()
    assert head.split() == ["run", "command", "of", "updates", "loss", "images/s", "device-hours", "accuracy",
                            "sigma", "70", "state"]  # fmt: skip
    assert ft.split()[:4] == [str(runs / "ft"), "finetune", "denoised", "4/4"]
    assert nim.split()[:5] == [str(runs / "nim"), "pretrain", "micro", "nim", "4/4"]
    assert ft.endswith("finished")
    assert nim.endswith("finished")
    assert f"{100 * json.loads((runs / 'ft' / 'result.json').read_text())['accuracy']:.2f} %" in ft
    assert picture == str(runs / "ft" / "loss.png")
    assert (runs / "nim" / "loss.png").exists()
    denim("runs", runs / "ft", runs / "nim", "--compare")
    shown = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert shown["base_lr"] == ["0.001", "0.00015"]
    assert shown["updates"] == ["4/4", "4/4"]
    assert "epochs" not in shown
    denim("runs", runs / "ft", "--compare", status=2)
    assert "is the only run" in capsys.readouterr().err
    monkeypatch.chdir(runs / "ft" / "tensorboard")
    denim("runs", status=2)
    assert "no folder runs" in capsys.readouterr().err


def test_a_comparison_has_no_empty_rows(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"epochs": 1, "objective": "nim", "seed": seed}))
    denim("runs", tmp_path, "--compare")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [["seed", "0", "1"], ["state", "stopped", "stopped"]]


def test_one_process_prints_for_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("denim.nim.finetuning.finetune", lambda _: None)
    words = ("finetune", "--out", tmp_path, "--denoiser", tmp_path)
    denim(*words)
    assert "no accuracy is stated" in capsys.readouterr().out
    result = {"source": "set/val", "images": 8, "accuracy": 0.75}
    (tmp_path / "result.json").write_text(json.dumps(result))
    denim(*words)
    assert "accuracy on clean images of set/val, undefended: 75.00 % of 8\n" in capsys.readouterr().out
    (tmp_path / "result.json").write_text(json.dumps({**result, "accuracy_sigma_35": 0.5, "eval_images": 4}))
    denim(*words)
    assert "% of 8\ndefended: 50.00 % at sigma 35, of 4 of them\n" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    denim(*words)
    assert capsys.readouterr().out == ""


def test_denoise_writes_a_picture(runs, tmp_path, photo, capsys):
    target = tmp_path / "out.png"
    denim("denoise", photo, "--sigma", "70", "140", "--denoiser", runs / "nim" / "model", "--out", target)
    with Image.open(target) as picture:
        assert picture.width > picture.height > 300
    whole = target.read_bytes()
    denim("denoise", photo, "--denoiser", runs / "nim" / "model", "--out", target, "--precision", "bf16")
    assert target.read_bytes() != whole
    denim("denoise", photo, "--denoiser", runs / "nim" / "model", "--precision", "fp16", status=2)
    assert "auto, bf16, tf32 or fp32" in capsys.readouterr().err


@pytest.mark.slow
def test_doctor_names_what_it_looked_at(capsys):
    denim("doctor")
    shown = capsys.readouterr().out
    for name in ("torch", "GPU", "noise on the CPU", "triton", "xformers", "DALI", "attention: sdpa"):
        assert name in shown


@pytest.mark.slow
def test_demo_runs_end_to_end(tmp_path, monkeypatch, capsys):
    """The demo's own path with the sizes turned down."""
    monkeypatch.setattr(demo, "EPOCHS", {"pretraining": 1, "clean": 1, "denoised": 1})
    monkeypatch.setattr(demo, "IMAGES", 10)
    monkeypatch.setattr(demo, "SIGMAS", (0.0, 70.0))
    monkeypatch.setattr(demo, "ATTACKS", ("fgsm:16/255,eot=2",))
    denim("demo", "--out", tmp_path / "demo")
    shown = " ".join(capsys.readouterr().out.split())
    for row in ("clean classifier", "defense off", "De3, sigma 0", "De3, sigma 70", "frozen"):
        assert row in shown
    assert (tmp_path / "demo" / "evaluation" / "report.html").exists()
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["training_seconds"] > 0


def test_demo_leaves_foreign_folders_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    denim("demo", "--out", tmp_path, status=2)
    assert "no demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_help_and_mistakes_list_the_commands(capsys):
    denim("--help")
    assert "doctor" in capsys.readouterr().out
    denim("train", status=2)
    error = capsys.readouterr().err
    assert "unknown command 'train'" in error
    assert all(name in error for name in cli.COMMANDS)


def test_unknown_options_are_named(capsys, tmp_path):
    denim("pretrain", "--out", tmp_path / "run", "--epoch-count", "3", status=2)
    error = capsys.readouterr().err
    assert "--epoch-count" in error
    assert " --epochs --warmup-epochs " in error.splitlines()[-1]
    denim("evaluate", "--classifier", "x", "--sigma", "70", status=2)
    assert " --sigmas --frozen " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pretrain", "--preset", "giant"), "micro, mini, tiny, small, base, large, huge"),
        (("pretrain", "--data", "no/such/folder"), "no/such/folder"),
        (("pretrain", "--sigma", "-5"), "not negative"),
        (("finetune", "--denoiser", "nowhere/model"), "nowhere/model"),
        (("evaluate", "--classifier", "nowhere/model"), "nowhere/model"),
    ],
)
def test_mistakes_end_in_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse_hub)
    denim(*words, "--out", tmp_path / "run", status=2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def refuse_hub(*_, **__):
    raise OSError("no network in tests")


def test_models_may_be_on_the_hub(runs, tmp_path, photo, capsys, monkeypatch):
    asked = []

    def download(name, **_):
        asked.append(name)
        return str(runs / {"owner/denoiser": "nim", "owner/classifier": "ft"}[name] / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    denim("denoise", photo, "--denoiser", "owner/denoiser", "--out", tmp_path / "picture.png")
    denim(
        *("evaluate", "--classifier", "owner/classifier", "--denoiser", "owner/denoiser"),
        *("--clean-classifier", "owner/classifier", "--out", tmp_path / "evaluation", "--sigmas", "70"),
        *("--frozen", "None", "--attacks", "fgsm:4/255", "--num-images", "4", "--score-draws", "2", "--examples", "0"),
        *("--health-images", "0"),
    )
    denim("finetune", "--out", tmp_path / "ft", "--denoiser", "owner/denoiser", *FAST, *PLAIN)
    # denoise; the denoiser and two classifiers of evaluate; finetune
    assert asked == ["owner/denoiser", "owner/denoiser", "owner/classifier", "owner/classifier", "owner/denoiser"]


@pytest.mark.slow
def test_models_may_be_runs_or_ship_with_the_package(runs, tmp_path, photo, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse_hub)
    defense = De3(Autoencoder.from_pretrained(runs / "nim"), Classifier.from_pretrained(runs / "ft"), 70)
    defense.save_pretrained(tmp_path / "models" / "tiny")
    monkeypatch.setattr(models, "FOLDER", tmp_path / "models")
    for denoiser in ("tiny", runs / "nim"):
        denim("denoise", photo, "--denoiser", denoiser, "--out", tmp_path / "picture.png")
    denim("pretrain", "--out", tmp_path / "nim", "--preset", "micro", "--target", "raw", "--init", "tiny", *FAST)
    denim("finetune", "--out", tmp_path / "ft", "--denoiser", "tiny", *FAST, *PLAIN)
    shutil.rmtree(tmp_path / "ft" / "model")
    denim("finetune", "--resume", tmp_path / "ft")
    words = (
        "--frozen",
        "None",
        "--attacks",
        "fgsm:4/255",
        "--num-images",
        "4",
        "--score-draws",
        "2",
        "--examples",
        "0",
    )
    denim("evaluate", "--classifier", "tiny", "--denoiser", "tiny", "--clean-classifier", tmp_path / "ft",
          "--out", tmp_path / "evaluation", "--sigmas", "70", *words)  # fmt: skip
    capsys.readouterr()
    for command in (
        ("denoise", photo, "--denoiser"),
        ("finetune", "--out", tmp_path / "new", "--denoiser"),
        ("pretrain", "--out", tmp_path / "new", "--preset", "micro", "--init"),
        ("evaluate", "--classifier"),
        ("evaluate", "--classifier", "tiny", "--denoiser"),
        ("evaluate", "--classifier", "tiny", "--clean-classifier"),
    ):
        for name in ("tinny", "owner/tinny"):
            denim(*command, name, status=2)
            error = capsys.readouterr().err
            assert f"no folder {name}, " in error
            assert error.splitlines()[-2].endswith("; with Denim ship tiny")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_linear_probe_is_an_option_of_fine_tuning(runs, tmp_path, capsys):
    words = ("finetune", "--linear-probe", "--out", tmp_path / "probe", "--denoiser", runs / "nim", *FAST)
    denim(*words)
    assert "accuracy on clean images of digits/test, undefended: " in capsys.readouterr().out
    settings = json.loads((tmp_path / "probe" / "run.json").read_text())
    assert (settings["linear_probe"], settings["layer_decay"], settings["trained_on"]) == (True, 1.0, "clean")
    shutil.rmtree(tmp_path / "probe" / "model")
    for again in (("--resume", tmp_path / "probe"), (*words[1:], "--resume")):
        denim("finetune", *again)
        denim("runs", tmp_path / "probe")
        assert " linear probe, clean " in capsys.readouterr().out
    denim(*words, "--layer-decay", "0.75", "--out", tmp_path / "other", status=2)
    assert "layer_decay must be 1 and drop_path 0, got 0.75" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("sigma", "message"), [("-1", "0 or more"), ("nan", "finite"), ("10001", "at most 10000")])
def test_denoise_checks_sigma(runs, photo, capsys, sigma, message):
    denim("denoise", photo, "--sigma", sigma, "--denoiser", runs / "nim" / "model", status=2)
    assert message in capsys.readouterr().err


def test_denoise_needs_a_photo(runs, tmp_path, capsys):
    (tmp_path / "page.jpg").write_text("<html>")
    denim("denoise", tmp_path / "page.jpg", "--denoiser", runs / "nim" / "model", status=2)
    assert "cannot be read as an image" in capsys.readouterr().err


def test_denoise_alone_takes_the_denoiser_that_ships(tmp_path, photo, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    denim("denoise", photo)
    assert capsys.readouterr().out == "photo-denoised.png\n"
    with Image.open("photo-denoised.png") as picture:
        assert picture.width > picture.height > 300


def test_denoise_makes_pictures_of_any_side_by_tiles_of_the_raw_target(runs, tmp_path, photo, capsys):
    target = tmp_path / "out.png"
    words = ("denoise", photo, "--denoiser", runs / "nim" / "model", "--out", target, "--side")
    pictures = []
    for side in (16, 23):
        denim(*words, side)
        pictures.append(target.read_bytes())
    assert pictures[0] != pictures[1]
    denim(*words, 15, status=2)
    assert "--side must be at least 16" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_resumed_by_its_folder_alone(tmp_path, capsys):
    words = ["--data", "digits", "--preset", "micro", *FAST, "--device", "cpu", "--base-lr", "1e-3"]
    run = tmp_path / "run"
    denim("pretrain", *words, "--out", run)
    worth = json.loads((run / "result.json").read_text())["psnr_sigma_70"]
    assert f"PSNR of 512 denoised images of digits/test: {worth:.2f} dB at sigma 70\n" in capsys.readouterr().out
    for path in ("model", "checkpoints"):
        shutil.rmtree(run / path)
    denim("pretrain", "--resume", run, "--log-every", "1")
    assert (run / "model" / "config.json").exists()
    assert json.loads((run / "run.json").read_text())["base_lr"] == 1e-3
    for words, message in (
        (["pretrain", "--resume", run, "--base-lr", "0.1"], "base_lr was 0.001, is 0.1"),
        (["pretrain", "--resume", tmp_path], "there is no run.json in it"),
        (["finetune", "--resume", run], "does not have the settings of a FinetuneConfig: channels is unknown"),
    ):
        capsys.readouterr()
        denim(*words, status=2)
        assert message in capsys.readouterr().err
