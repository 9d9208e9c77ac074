"""`make faults`: the quick run passes, and what it looks for is found where it is there."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "faults.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("faults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "DENIM_NOISE", "TQDM_DISABLE"):
            patch.setenv(name, os.environ.get(name, ""))  # the script sets them
        spec.loader.exec_module(module)
    return module


def test_the_quick_run_passes():
    done = subprocess.run([sys.executable, SCRIPT, "--scale", "0.01"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills, 20 damaged images, 1 tampered files: 0 failures" in done.stdout


def forgetful(out: Path):
    """Work that does not end with the same bytes after a kill: it counts its starts."""

    def work() -> None:
        out.mkdir(exist_ok=True)
        with (out / "starts").open("a") as file:
            file.write("x")
        time.sleep(0.3)

    return work


def untidy(out: Path):
    """Work that leaves a file of its process behind when it is killed."""

    def work() -> None:
        out.mkdir(exist_ok=True)
        own = out / f"{os.getpid()}.part"
        own.touch()
        time.sleep(0.3)
        own.unlink()

    return work


def stubborn(out: Path):
    """Work that refuses what a killed process has left."""

    def work() -> None:
        out.mkdir()
        time.sleep(0.3)

    return work


def endless(out: Path):
    """Work that waits for ever for what a killed process has left."""

    def work() -> None:
        while out.exists():
            time.sleep(0.01)
        out.mkdir()
        time.sleep(0.3)
        out.rmdir()

    return work


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (forgetful, "after kills, differs in out/starts"),
        (untidy, r"after kills, differs in out/\d+\.part"),
        (stubborn, "ends with 1"),
        (endless, "after kills: hangs"),
    ],
)
def test_kills_find_work_that_does_not_survive_them(script, tmp_path, monkeypatch, capfd, work, words):
    faults = script.Faults(tmp_path, 0.1, 0)
    monkeypatch.setattr(script.Child.wait, "__defaults__", (2,))
    script.kills(faults, {"work": work})
    assert len(faults.failures) >= 1
    assert any(re.search(words, failure) for failure in faults.failures)


def test_damage_changes_most_files(script):
    chance, data = random.Random(0), bytes(range(256)) * 8
    assert sum(script.damaged(data, chance) != data for _ in range(100)) > 90
