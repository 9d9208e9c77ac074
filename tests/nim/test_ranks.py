"""Several processes, as torchrun starts them: messages, equal results in every layout, and what becomes of failures."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from denim.nim import pretrain
from denim.nim.ranks import Ranks
from denim.nim.saving import latest_checkpoint
from denim.nim.text import open_console

SCRIPT = Path(__file__).with_name("rank_jobs.py")
pytestmark = pytest.mark.slow


def jobs():
    spec = importlib.util.spec_from_file_location("rank_jobs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(folder, *names, world=2):
    """Run jobs on several ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DENIM_NOISE": "eager"}
    command += [SCRIPT, folder, *names]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


def found(folder, job):
    """What both ranks have written."""
    return [json.loads((folder / f"{job}-{rank}.json").read_text()) for rank in range(2)]


def test_one_process_exchanges_nothing():
    ranks = Ranks()
    assert ranks.is_first
    assert (ranks.agree(True, False), ranks.gather(3), ranks.share(4)) == ([True, False], [3], 4)
    with pytest.raises(ValueError, match="mine"), ranks.together():
        raise ValueError("mine")
    entered = []
    with ranks.in_turn():
        entered.append(0)
    assert entered == [0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    pretrain(jobs().settings(folder / "run"), open_console(quiet=True))
    return folder / "run"


@pytest.fixture(scope="module")
def two(alone, tmp_path_factory):
    """A folder with all that two ranks do; starting them takes longer than what they do."""
    folder = tmp_path_factory.mktemp("two")
    after_the_first_epoch(alone, folder / "moved")
    done = launch(folder, "messages", "trainings", "moved", "terminated", "stalled")
    assert done.returncode == 0, done.stderr
    return folder


def after_the_first_epoch(run, copy):
    """A copy of a run as it was after its first epoch."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(latest_checkpoint(copy))
    assert latest_checkpoint(copy).name == "00000003"


def test_messages(two):
    for rank, each in enumerate(found(two, "messages")):
        assert each["ranks"] == [rank, 2, rank]
        assert (each["agree"], each["gather"], each["share"]) == ([True, False, True], [10, 11], "of rank 0")
        assert each["together"] == (
            "ValueError: broken" if rank else "RankError: rank 1 has failed: ValueError: broken"
        )
    assert (two / "order").read_text() == "01"


def assert_equal(run, other):
    """The same weights, losses and measurements, but for the rounding of sums in another order.

    The gradient of a key's bias is zero (softmax ignores what is added to all scores of a query): what is computed is
    rounding alone, whose sign Adam follows. So these numbers are left out.
    """
    weights, others = load_file(run / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        mine, theirs = weight, others[name]
        if name.endswith("qkv.bias"):
            mine, theirs = (part.unflatten(0, (3, -1))[[0, 2]] for part in (mine, theirs))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    lines = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()] for each in (run, other)]
    for name, count in (("loss", 6), ("psnr_sigma_70", 2)):
        mine, theirs = ([line[name] for line in each if name in line] for each in lines)
        assert len(mine) == count
        # A weight that differs by 1e-6 moves the PSNR, in dB, by no more than some 1e-5.
        assert mine == pytest.approx(theirs, abs=1e-6 if name == "loss" else 1e-4)
    assert [line["eval_images"] for line in lines[1] if "eval_images" in line] == [33, 33]
    results = [json.loads((each / "result.json").read_text()) for each in (run, other)]
    assert results[0] == {**results[1], "psnr_sigma_70": pytest.approx(results[1]["psnr_sigma_70"], abs=1e-4)}


@pytest.mark.parametrize("layout", ["ddp", "parts", "fsdp", "fsdp-parts", "moved"])
def test_every_layout_learns_the_same(alone, two, layout):
    assert_equal(alone, two / layout)
    settings = json.loads((two / layout / "model" / "config.json").read_text())
    assert settings["model"] == "Autoencoder"  # and not the class that FSDP makes of it


def test_averages_are_the_same_with_fsdp(two):
    assert_equal(two / "ema", two / "fsdp-ema")


def test_parts_of_one_process_learn_the_same(alone, tmp_path):
    pretrain(jobs().settings(tmp_path / "run", micro_batch=80, grad_checkpointing=True), open_console(quiet=True))
    assert_equal(alone, tmp_path / "run")


def test_one_process_goes_on_where_two_with_fsdp_have_stopped(alone, two, tmp_path):
    after_the_first_epoch(two / "fsdp", tmp_path / "run")
    pretrain(jobs().settings(tmp_path / "run", resume=True), open_console(quiet=True))
    assert_equal(alone, tmp_path / "run")


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(two):
    assert found(two, "terminated") == [{"stopped": signal.SIGTERM}] * 2
    assert latest_checkpoint(two / "stopped").name == "00000002"
    assert not (two / "stopped" / "model").exists()


def test_a_rank_that_does_not_answer_is_named(two):
    error = found(two, "stalled")[0]["error"]
    assert "rank 0 has waited for the others in vain" in error
    assert "1" in error.partition("in vain")[2]


def test_a_killed_rank_ends_the_run_and_the_checkpoint_stays(alone, tmp_path):
    done = launch(tmp_path, "killed")
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert latest_checkpoint(tmp_path / "killed").name == "00000003"
    pretrain(jobs().settings(tmp_path / "killed", resume=True), open_console(quiet=True))
    assert_equal(alone, tmp_path / "killed")
