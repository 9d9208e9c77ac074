"""`denim bench kernels`, `denim bench train` and `denim bench defend` on a CPU."""

import json
import sys

import pytest

from denim import cli
from denim import kernels as operations


@pytest.fixture
def denim(monkeypatch, capsys):
    """Run the command in this process; answer status, output and errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["denim", "bench", *map(str, words)])
        status = 0
        try:
            cli.run()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_table_and_json(denim, tmp_path):
    words = ("--only", "patch_loss, 32 x 32, uint8, patch 4, fp32, forward + backward", "attack_step, 32 x 32, fp32")
    options = ("--device", "cpu", "--batch", 1, "--seconds", 0.01, "--no-compile", "--json", tmp_path / "bench.json")
    status, shown, errors = denim("kernels", *words, *options)
    assert (status, errors) == (0, "")
    for text in ("attack_step, 32 x 32, fp32", "GB/s", "torch", "threads", "compiled: not asked for"):
        assert text in shown
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["environment"]["device"].startswith("cpu")
    attack, loss = written["records"]
    assert loss["case"] == words[1]
    assert loss["best_seconds"]["chain"] / loss["best_seconds"]["fused"] == loss["ratios"]["chain"]
    assert f"{loss['ratios']['chain']:.2f}x" in shown
    assert "16x64x48 to a number" in shown
    assert [line for line in shown.splitlines() if line.startswith("times of ")] == [
        "times of chain, copy, fused: wall clock"
    ]
    assert attack["batch"] == 16
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_every_column_is_explained_and_a_faster_baseline_is_marked(denim, monkeypatch):
    from denim.benchmarks import kernels as bench
    from denim.benchmarks.timing import WALL, Times

    seconds = iter([{"fused": 2.0, "chain": 1.5, "copy": 1.0}, {"fused": 1.0, "chain": 1.5, "copy": 1.0}])
    monkeypatch.setattr(
        bench, "measure", lambda *_, **__: {name: Times([value], WALL) for name, value in next(seconds).items()}
    )
    status, shown, _ = denim("kernels", "--only", "attack_step, 32", "--batch", 1, "--no-compile", "--device", "cpu")
    assert status == 0
    header, *lines = shown.splitlines()[1:]
    for heading in header.split()[1:]:
        assert any(line.startswith(f"{heading}: ") for line in lines), heading
    first, second = (
        next(line for line in lines if f"attack_step, 32 x 32, {name}" in line) for name in ("fp32", "bf16")
    )
    assert "0.75x <" in first
    assert "1.50x " in second
    assert "<" not in second
    assert any(line.startswith("<: ") and "in 1 of 2 rows" in line for line in lines)


def test_progress_is_shown_in_a_pipe_by_time(denim, monkeypatch):
    words = ("kernels", "--only", "attack_step, 32", "--batch", 1, "--seconds", 0.01, "--no-compile", "--device", "cpu")
    assert denim(*words)[2] == ""
    monkeypatch.setattr("denim.cli.bench.EVERY", 0.0)
    assert denim(*words)[2].splitlines() == [
        "1 of 2 cases checked and timed, the last: attack_step, 32 x 32, fp32, forward",
        "2 of 2 cases checked and timed, the last: attack_step, 32 x 32, bf16, forward",
    ]


def test_a_wrong_operation_fails_without_a_time(denim, monkeypatch, tmp_path):
    monkeypatch.setattr(operations, "attack_step", lambda **given: given["pixels"])
    status, shown, errors = denim(
        "kernels", "--only", "attack_step, 32 x 32", "--batch", 1, "--json", tmp_path / "b.json"
    )
    assert status == 1
    assert "attack_step, 32 x 32, fp32, forward: the result is off by" in errors
    assert "GB/s" not in shown
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("kernels", "--only", "no_such_case"), "these are the cases:\n  attack_step, 224 x 224, fp32"),
        (("kernels", "--batch", "0"), "batch must be at least 1"),
        (("kernels", "--device", "tpu"), "unknown device"),
        (("kernels", "--json", "no/such/folder/bench.json"), "there is no folder no/such/folder"),
        ((), "kernels"),
        (("nothing",), "unknown command 'nothing'"),
    ],
)
def test_mistakes_end_in_one_message(denim, words, message):
    status, shown, errors = denim(*words)
    assert status == 2
    assert message in shown + errors
    assert "Traceback" not in errors


def test_cuda_without_a_gpu_is_refused(denim, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, _, errors = denim("kernels", "--device", "cuda")
    assert status == 2
    assert "torch sees no CUDA device" in errors


SMALL = ("train", "--preset", "micro", "--batch-size", 4, "--device", "cpu", "--rounds", 1, "--against")


def test_steps_of_training_are_compared(denim, tmp_path):
    status, shown, errors = denim(*SMALL, "eager", "floor", "--json", tmp_path / "train.json")
    assert status == 0
    assert errors.splitlines()[0] == "denim: building and checking"
    written = json.loads((tmp_path / "train.json").read_text())
    assert (written["settings"]["preset"], written["settings"]["batch_size"]) == ("micro", 4)
    denims, eager, floor = written["records"]
    cells = [text.split() for text in shown.splitlines() if text.strip()]
    line = {name: next(row for row in cells if row[0] == name) for name in ("denim", "eager", "floor")}
    assert line["denim"][1] == f"{denims['images_per_second']:.1f}"
    assert line["eager"][3] == f"{denims['images_per_second'] / eager['images_per_second']:.2f}x"
    assert line["eager"][4] == f"{floor['seconds'][0] / eager['seconds'][0]:.2f}"
    assert line["eager"][6] == f"{denims['peak_bytes'] / eager['peak_bytes']:.2f}x"
    assert line["floor"][3] == line["denim"][3] == "-"
    for heading in ("images/s", "of the floor", "Denim's memory", "published"):
        assert any(text.startswith(f"{heading}: ") for text in shown.splitlines()) == (heading != "published")
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_a_step_of_training_that_differs_has_no_time(denim, monkeypatch, tmp_path):
    from denim.benchmarks import baselines

    real = baselines.reconstruction_loss
    monkeypatch.setattr(baselines, "reconstruction_loss", lambda *args, **options: 1.01 * real(*args, **options))
    status, shown, errors = denim(*SMALL, "eager", "--json", tmp_path / "train.json")
    assert (status, shown) == (1, "")
    assert "eager: the first loss differs from Denim's" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eager", "--preset", "enormous"), "unknown preset"),
        (("fastest",), "unknown step 'fastest'"),
        (("eager", "--cuda-graph"), "cuda_graph needs a GPU, not cpu"),
        (("eager", "--clock", "sun"), "clock must be wall or processor"),
        (("eager", "--json", "no/such/folder/bench.json"), "there is no folder no/such/folder"),
        (("eager", "--batch-size", "4", "--micro-batch", "3"), "must be a multiple of micro_batch 3"),
    ],
)
def test_mistakes_in_training_settings_end_in_one_message(denim, words, message):
    status, shown, errors = denim(*SMALL, *words)
    assert (status, shown) == (2, "")
    assert message in errors
    assert "Traceback" not in errors


DEFEND = ("defend", "--device", "cpu", "--batch-size", 2, "--draws", 2, "--sigmas", 35, 70, "--rounds", 1)


def test_levels_in_a_batch_are_compared_with_levels_in_turn(denim, tmp_path, monkeypatch):
    (tmp_path / "models_of_bench.py").write_text(
        "from torch import nn\ndef linear():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    own = ("--model", "models_of_bench:linear", "--img-size", 8, "--json", "defend.json")
    status, shown, errors = denim(*DEFEND, *own)
    assert status == 0
    assert errors.splitlines()[0] == "defend, looped, fp32: checking"
    written = json.loads((tmp_path / "defend.json").read_text())
    assert written["settings"]["classifier"] == "models_of_bench:linear"
    assert (written["settings"]["side"], written["settings"]["denoiser"]) == (8, None)
    records = {(each["task"], each["way"], each["precision"]): each for each in written["records"]}
    lines = {text.split("  ")[0].strip(): text.split()[3:] for text in shown.splitlines()}
    assert len(records) == 8
    for (task, way, precision), each in records.items():
        cells = lines[f"{task}, {way}, {precision}"]
        assert cells[0] == f"{each['rate']:.1f}"
        assert cells[2] == f"{each['rate'] / records[task, 'looped', 'fp32']['rate']:.2f}x"
        assert cells[5] == str(each["passes"])
    for heading in ("/s", "off by", "MB to move", "of the peak", "looped"):
        assert any(f"{heading}: " in text for text in shown.splitlines())
    sys.modules.pop("models_of_bench")


@pytest.mark.slow
def test_a_preset_is_timed_without_models_and_a_difference_ends_without_a_time(denim, monkeypatch, tmp_path):
    from denim.benchmarks import defense

    small = (*DEFEND, "--preset", "micro", "--precisions", "fp32", "--tasks", "defend", "--no-memory")
    status, shown, _ = denim(*small)
    assert status == 0
    assert "classifier: random, micro, denoiser: random, micro, images: 2, side: 16" in shown
    monkeypatch.setitem(defense.TOLERANCE, "fp32", -1.0)
    status, shown, errors = denim(*small, "--json", tmp_path / "defend.json")
    assert (status, shown) == (1, "")
    assert "defend, looped, fp32: its logits differ from those of looped levels" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "enormous"), "unknown preset"),
        (("--classifier", "a", "--model", "b:c"), "give --classifier or --model, not both"),
        (("--weights", "a.pt"), "--weights needs --model"),
        (("--model", "json:loads"), "json:loads must be a function or class that is called without arguments"),
        (
            ("--model", "torch.nn:Flatten"),
            "torch.nn:Flatten does not say what size of images it takes: give --img-size",
        ),
        (("--json", "no/such/folder/bench.json"), "there is no folder no/such/folder"),
        (("--preset", "micro", "--clock", "sun"), "clock must be wall or processor"),
        (("--preset", "micro", "--sigmas"), "must be at least 1, got 2, 0, 2, 256"),
    ],
)
def test_mistakes_in_a_defense_to_time_end_in_one_message(denim, words, message):
    status, shown, errors = denim(*DEFEND, *words)
    assert (status, shown) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
