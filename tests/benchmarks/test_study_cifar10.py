import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro

from denim.benchmarks import study_cifar10
from denim.benchmarks.study_cifar10 import COMMANDS, PROTOCOLS, RADII, ROWS
from denim.defense import Attack
from denim.nim import Autoencoder, AutoencoderConfig, Classifier, ClassifierConfig, FinetuneConfig, PretrainConfig
from denim.nim.data import open_source

CONFIGS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def settings_of(name):
    command, *words = COMMANDS[name].format(out="study").split()
    return tyro.cli(CONFIGS[command], args=[*words, "--out", "study/run"])


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_settings_that_exist(name):
    assert settings_of(name).batch_size == 128


def test_the_page_has_every_command_of_the_study():
    page = (Path(__file__).parents[2] / "docs" / "study-cifar10.md").read_text()
    commands = re.sub(r"\s*\\\n\s*", " ", page.split("## Commands")[1])
    for name, options in COMMANDS.items():
        command, rest = options.format(out="runs/study").split(" ", 1)
        assert f"    denim {command} --out runs/study/{name} --data cifar10 {rest}\n" in commands, name


def test_columns_of_a_table_are_in_the_order_of_the_longest_row():
    lines = study_cifar10._table({"short": {"a": "1", "c": "2"}, "long": {"a": "3", "b": "4", "c": "5"}})
    assert lines[0] == "|  | a | b | c |"
    assert lines[2:] == ["| short | 1 |  | 2 |", "| long | 3 | 4 | 5 |"]


def test_rows_use_their_models_as_they_were_trained():
    for row in ROWS:
        config = settings_of(row.classifier)
        kinds = {"clean": "clean", "at": "clean", "noise": "noisy"}
        assert config.trained_on == kinds.get(row.classifier, "denoised")
        if row.denoiser is not None:
            assert str(config.denoiser) == f"study/{row.denoiser}"
            assert (config.degrade, config.statistics) == (row.degrade, row.statistics)
            assert settings_of(row.denoiser).objective == {"noise": "nim", "mask": "mae", "both": "dmae"}[row.degrade]


@pytest.fixture
def study(tmp_path, make_folder):
    """A folder with finished runs of the study, whose models are tiny and untrained."""
    torch.manual_seed(0)
    data = make_folder(tmp_path / "data", each=3, splits=("test",))
    for name, options in COMMANDS.items():
        target = "norm" if "--target norm" in options else "raw"
        if options.startswith("pretrain"):
            model = Autoencoder(AutoencoderConfig((8, 8), 4, 16, 1, 2, 16, 1, 2, target=target))
        else:
            row = next(row for row in ROWS if row.classifier == name)
            statistics = "raw target" if row.denoiser != "nim-norm" else f"{row.statistics} statistics"
            trained_on = {"noise": "noisy"}.get(
                name, "clean" if row.denoiser is None else f"{row.degrade}, {statistics}"
            )
            model = Classifier(ClassifierConfig(2, (8, 8), 4, 16, 1, 2, trained_on=trained_on))
        model.save_pretrained(tmp_path / name / "model")
        lines = [{"update": n, "epoch": n / 2, "loss": 1.0 / (1 + n), "lr": 1e-3} for n in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name / "run.json").write_text(json.dumps({"epochs": 1}))
    return tmp_path, str(data or tmp_path / "data")


@pytest.mark.slow
def test_a_study_of_finished_runs_is_measured_without_training(study, capsys, monkeypatch):
    out, data = study
    monkeypatch.setattr(study_cifar10, "_denim", lambda arguments: pytest.fail("it trains again"))
    study_cifar10.main(data, out, num_images=6, score_draws=2, attacked_images=0)
    table = (out / "tables.md").read_text()
    assert capsys.readouterr().out.endswith(table)
    for row in ROWS:
        (accuracy,) = [line for line in table.split("Accuracy")[1].splitlines() if line.startswith(f"| {row.name} |")]
        assert accuracy.count("[") == 1 + len(row.dials)
    for picture in ("losses.png", "reconstructions.png"):
        assert (out / picture).stat().st_size > 5000


@pytest.mark.slow
def test_every_defense_is_attacked_random_and_frozen(study, monkeypatch):
    out, data = study
    monkeypatch.setattr(
        study_cifar10, "PROTOCOLS", {"PGD-10": "pgd:{radius}/255,steps=1,eot=1", "AutoPGD": "fgsm:{radius}/255,eot=2"}
    )
    source = open_source(data, "test", 3)
    cells = study_cifar10.attacked(out, source, 4, 2, "fp32")
    random = {(row, level) for row, level, is_frozen in cells if is_frozen}
    for row in ROWS:
        assert (row.name, "off", False) in cells
        for dial in row.dials:
            draws = row.degrade != "noise" or dial > 0
            assert ((row.name, study_cifar10._dial(row, dial)) in random) == draws
    (jpeg,) = [row for row in ROWS if row.jpeg is not None]
    assert "none" in cells[jpeg.name, "off", False]
    means = study_cifar10._means(cells)
    assert means["clean classifier", "off"].keys() == {
        "clean",
        *(f"{p}, {r}/255" for p in ("PGD-10", "AutoPGD") for r in (4, 8)),
    }
    assert "frozen, 8/255" in means["NIM, raw target", "sigma 70"]
    assert (out / "robustness" / "report.html").exists()
    assert study_cifar10.draw_robustness(out, cells).stat().st_size > 5000


def test_the_table_has_each_attack_of_the_random_row_and_the_strong_one_of_its_frozen_twin():
    def cells(first):
        texts = ["none", *(str(Attack.parse(form.format(radius=r))) for r in RADII for form in PROTOCOLS.values())]
        means = {text: first + number / 100 for number, text in enumerate(texts)}
        return {
            text: SimpleNamespace(scores=SimpleNamespace(mean=SimpleNamespace(value=x))) for text, x in means.items()
        }

    found = study_cifar10._means({("row", "sigma 70", False): cells(0.5), ("row", "sigma 70", True): cells(0.25)})
    expected = {
        "clean": 50, "FGSM, 4/255": 51, "PGD-10, 4/255": 52, "AutoPGD, 4/255": 53, "frozen, 4/255": 28,
        "FGSM, 8/255": 54, "PGD-10, 8/255": 55, "AutoPGD, 8/255": 56, "frozen, 8/255": 31,
    }  # fmt: skip
    assert found == {("row", "sigma 70"): pytest.approx(expected)}


def test_psnr_is_that_of_the_mean_over_the_images(study):
    out, data = study
    source = open_source(data, "test", 3)
    found = study_cifar10.psnrs(out, source, 6)
    assert set(found["MAE, share hidden"]) == {"25 % hidden", "50 % hidden", "75 % hidden"}
    # Fewer hidden patches leave more of the image as it is.
    few, _, many = map(float, found["MAE, share hidden"].values())
    assert few > many
    # An untrained denoiser of a raw target predicts almost the same for any noise.
    levels = [float(value) for value in found["NIM, raw target"].values()]
    assert max(levels) - min(levels) < 3


def test_a_stopped_run_is_resumed_and_a_missing_one_begun(study, monkeypatch):
    out, data = study
    for name in ("mae", "at"):
        (out / name / "model" / "config.json").unlink()
    (out / "at" / "run.json").unlink()
    called = []

    class DoneError(Exception):
        pass

    def run(arguments):
        called.append(arguments)
        name = "mae" if "pretrain" in arguments else "at"
        (out / name / "model" / "config.json").write_text("{}")
        if name == "at":
            raise DoneError

    monkeypatch.setattr(study_cifar10, "_denim", run)
    with pytest.raises(DoneError):
        study_cifar10.main(data, out)
    assert called[0] == ["pretrain", "--resume", str(out / "mae")]
    assert called[1][:5] == ["finetune", "--out", str(out / "at"), "--data", data]
    assert str(out / "nim-raw") in called[1]
