"""What folders of runs tell of them."""

import json

import pytest
from PIL import Image

from denim.nim.owner import owned
from denim.nim.runs import differences, draw_curve, find_runs, tabulated


def make_run(folder, *, settings=None, updates=(10, 20), finished=False, accuracy=None):
    """A run of 4 epochs of 10 updates each, whose loss halves with every line."""
    folder.mkdir(parents=True)
    given = {"out": str(folder), "epochs": 4, "preset": "micro", "objective": "nim", "seed": 0, **(settings or {})}
    (folder / "run.json").write_text(json.dumps(given))
    lines = [{"update": 1, "bad": 1, "new_bad": {"7": "gone"}}]
    for number, update in enumerate(updates):
        line = {"update": update, "epoch": update / 10, "loss": 0.5**number, "lr": 1e-3, "images_per_second": 1234.5}
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").touch()
    if accuracy is not None:
        (folder / "result.json").write_text(json.dumps({"source": "s", "images": 8, "accuracy": accuracy}))
    return folder


@pytest.fixture
def folder(tmp_path):
    make_run(tmp_path / "b" / "nim")
    make_run(tmp_path / "a", settings={"seed": 1}, updates=(10, 20, 40), finished=True)
    tuned = {"denoiser": "a/model", "trained_on": "clean", "seed": 0}
    make_run(tmp_path / "b" / "tuned", settings=tuned, updates=(), finished=True, accuracy=0.9725)
    (tmp_path / "c").mkdir()
    return tmp_path


def test_runs_are_found_at_any_depth_with_their_state(folder):
    make_run(folder / "a" / "checkpoints" / "inner")  # below a run, nothing is looked for
    with owned(folder / "b" / "nim"):
        a, nim, tuned = find_runs(folder)
    assert [run.folder for run in (a, nim, tuned)] == [folder / "a", folder / "b" / "nim", folder / "b" / "tuned"]
    assert [run.command for run in (a, nim, tuned)] == ["pretrain", "pretrain", "finetune"]
    assert [run.what for run in (a, nim, tuned)] == ["micro nim", "micro nim", "clean"]
    assert a.results() == {
        "updates": "40/40", "loss": "0.2500", "images/s": "1,234", "state": "finished",
    }  # fmt: skip
    assert (nim.progress, nim.state) == ("20/40", "running")
    assert tuned.results() == {
        "updates": "", "loss": "", "images/s": "", "accuracy": "97.25 %", "state": "finished",
    }  # fmt: skip
    assert find_runs(folder / "b" / "nim")[0].state == "stopped"
    assert find_runs(folder / "c") == []


def test_what_models_are_worth_has_a_column_for_each_level(folder):
    """Of the result or, before the end of a run, of the last measurement."""
    lines = [{"update": 10, "psnr_sigma_140": 9.5}, {"update": 20, "psnr_sigma_140": 19.5, "eval_images": 8}]
    with (folder / "b" / "nim" / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    result = {"source": "s", "images": 8, "accuracy": 0.5, "accuracy_sigma_70": 0.25, "eval_images": 4}
    (folder / "b" / "tuned" / "result.json").write_text(json.dumps(result))
    a, nim, tuned = tabulated(find_runs(folder))
    assert list(a) == ["updates", "loss", "images/s", "accuracy", "sigma 70", "sigma 140", "state"]
    assert [row["accuracy"] for row in (a, nim, tuned)] == ["", "", "50.00 %"]
    assert [row["sigma 70"] for row in (a, nim, tuned)] == ["", "", "25.00 %"]
    assert [row["sigma 140"] for row in (a, nim, tuned)] == ["", "19.50 dB", ""]
    (folder / "b" / "tuned" / "result.json").write_text("[")
    assert find_runs(folder / "b" / "tuned")[0].state.startswith("damaged: ")


def test_the_cost_of_a_run_is_shown(folder):
    with (folder / "a" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"update": 40, "epoch": 4.0, "loss": 0.1, "device_seconds": 5400.0}) + "\n")
    a, nim, _ = tabulated(find_runs(folder))
    assert (a["device-hours"], nim["device-hours"]) == ("1.5", "")


def test_a_damaged_run_hides_no_other(folder):
    (folder / "a" / "run.json").write_text("{")
    damaged, *others = find_runs(folder)
    assert damaged.state.startswith(f"damaged: {folder / 'a' / 'run.json'} is not valid JSON")
    assert len(others) == 2
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        find_runs(folder / "nowhere")


def test_settings_that_differ(folder):
    a, nim, _ = find_runs(folder)
    assert differences([a, nim]) == {"seed": ["1", "0"]}
    assert differences([a, a]) == {}
    differing = differences(find_runs(folder))
    assert differing["trained_on"] == ["", "", "clean"]
    assert "out" not in differing


def test_the_curve_is_a_picture_of_loss_and_rate(folder):
    picture = draw_curve(folder / "a")
    assert picture == folder / "a" / "loss.png"
    with Image.open(picture) as image:
        assert image.width > 600
        values = image.convert("RGB").getcolors(1 << 20)
    # matplotlib's first colour is that of the lines.
    assert sum(count for count, colour in values if colour == (31, 119, 180)) > 200
    assert draw_curve(folder / "b" / "tuned") is None  # no line of metrics
    assert not (folder / "b" / "tuned" / "loss.png").exists()
