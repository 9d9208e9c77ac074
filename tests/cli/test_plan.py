"""`denim plan`."""

import json
import sys

import pytest

from denim import cli


@pytest.fixture
def denim(monkeypatch, capsys):
    """Run the command in this process; answer status, output and errors."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["denim", "plan", *map(str, words)])
        status = 0
        try:
            cli.run()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_table_and_json(denim, tmp_path):
    status, shown, errors = denim("--preset", "base", "--batch-size", 256, "--devices", 2, "--memory", 24, "--gpu",
                                  "rtx4090", "--json", tmp_path / "plan.json")  # fmt: skip
    assert (status, errors) == (0, "")
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["memory"] == 24 * 2**30
    assert len(written["rows"]) == 6
    for row in written["rows"]:
        line = next(line for line in shown.splitlines() if line.split("  ")[0].strip() == row["step"])
        for number in (str(row["micro_batch"]), f"{row['total'] / 2**30:.2f}", f"{row['images_per_second']:.0f}"):
            assert number in line.split()
    assert "111.9 million parameters" in shown
    assert "Nothing was measured" in shown
    heading = next(line for line in shown.splitlines() if "images/s" in line)
    for word in heading.split()[1:]:
        assert any(line.startswith(f"{word}: ") for line in shown.splitlines()), word


def test_what_does_not_fit_says_so(denim):
    status, shown, _ = denim("--preset", "huge", "--memory", 4)
    assert status == 0
    assert shown.count("(does not fit)") == 3


def test_a_whole_training(denim, tmp_path):
    sizes = ("--preset", "tiny", "--images", 10_000, "--epochs", 2.5, "--batch-size", 1000, "--devices", 1, 10, 20)
    cluster = ("--price", 3, "--share", 0.5, "--network", 10, "--image-kb", 50, "--decoded", 100, "--disk", 0.5)
    status, shown, errors = denim(*sizes, *cluster, "--json", tmp_path / "plan.json")
    assert (status, errors) == (0, "")
    rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert [row["devices"] for row in rows] == [1, 10, 20]
    assert all(row["updates"] == 25 for row in rows)
    for row in rows:
        line = next(line.split() for line in shown.splitlines() if line.split()[:1] == [str(row["devices"])])
        for number in (f"{1e3 * row['compute']:.1f}", f"{row['hours']:.2f}", f"{row['images']:,.0f}"):
            assert number in line
        assert line[-1] == f"{3 * row['gpu_hours']:,.0f}"
    heading = next(line for line in shown.splitlines() if "GPU-hours" in line)
    for word in heading.split()[1:-1]:
        assert any(line.startswith(f"{word}: ") for line in shown.splitlines()), word
    assert f"{rows[0]['checkpoint'] / 1e9:.2f} GB, and takes {rows[0]['checkpoint'] / 0.5e9:.1f} s" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "h1000"), "unknown gpu 'h1000'; choose one of a100"),
        (("--preset", "enormous"), "unknown preset"),
        (("--objective", "gan"), "unknown objective"),
        (("--mask-ratio", "1.5"), "mask_ratio must be between"),
        (("--precision", "fp8"), "precision must be"),
        (("--devices", "3"), "multiple of the 3 devices"),
        (("--memory", "0"), "memory must be"),
        (("--devices", "1", "2"), "--devices takes one number, or with --images several, got 2"),
        (("--images", "4095"), "an epoch has 4095 images, fewer than a batch of 4096"),
        (("--images", "5000", "--devices", "3"), "multiple of the 3 devices"),
        (("--images", "5000", "--epochs", "0"), "epochs must be positive"),
        (("--images", "5000", "--share", "1.5"), "share is at most 1"),
        (("--images", "5000", "--network", "0"), "network must be positive"),
        (("--images", "5000", "--preset", "huge", "--memory", "4"), "a training step takes at least"),
        (("--json", "no/such/folder/plan.json"), "there is no folder no/such/folder"),
    ],
)
def test_mistakes_end_in_one_message(denim, words, message):
    status, shown, errors = denim(*words)
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    assert not shown
