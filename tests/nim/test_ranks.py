"""Several processes, as torchrun starts them: messages, equal results in every layout, and what becomes of failures."""

import importlib.util
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from denim.nim import Autoencoder, preset
from denim.nim.ranks import Ranks
from denim.nim.run import MEASURED
from denim.nim.saving import latest_checkpoint, newest_whole

SCRIPT = Path(__file__).with_name("rank_jobs.py")
pytestmark = pytest.mark.slow


KINDS = ("pretraining", "finetuning")


@pytest.fixture(scope="module")
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


def start_without_agent(folder, job):
    """The processes of a job on two ranks, without torchrun: it ends the others of a rank that is gone."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DENIM_NOISE": "eager"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [subprocess.Popen([sys.executable, SCRIPT, folder, job], env=each) for each in ranks]


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
def alone(jobs, make_folder, tmp_path_factory):
    """A folder with images, a denoiser, and the trainings of one process, whole and in parts."""
    folder = tmp_path_factory.mktemp("ranks")
    make_folder(folder / "images", each=80, splits=("train", "test"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Autoencoder(preset("micro", channels=3)).save_pretrained(folder / "denoiser")
    for train in jobs.KINDS.values():
        train(folder, "alone")
        train(folder, "parts-1", **jobs.LAYOUTS["parts"])
    return folder


@pytest.fixture(scope="module")
def two(alone):
    """The folder with all that two ranks do; starting them takes longer than what they do."""
    done = launch(alone, "messages", "trainings", "averages", "graphs", "terminated", "stalled")
    assert done.returncode == 0, done.stderr
    return alone


@pytest.fixture(scope="module")
def four(two, jobs):
    """The folder with what four ranks do. They also go on where one process went on where two ranks had stopped."""
    for kind, train in jobs.KINDS.items():
        as_it_was(two / f"{kind}-ddp-2", two / f"{kind}-between", 20)
        train(two, "between", resume=True)
        as_it_was(two / f"{kind}-between", two / f"{kind}-moved", 30)
    done = launch(two, "trainings", "moved", world=4)
    assert done.returncode == 0, done.stderr
    return two


def as_it_was(run, copy, update):
    """A copy of a run as it was after an update, if a process had been killed before the next checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    (copy / "result.json").unlink()
    for checkpoint in (copy / "checkpoints").iterdir():
        if int(checkpoint.name) > update:
            shutil.rmtree(checkpoint)
    assert int(latest_checkpoint(copy).name) == update


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

    Weights are compared by the norm of the difference of each tensor, relative to the norm of the tensor: 1e-6 is 16
    times the precision of float32. AdamW does not magnify rounding where gradients are larger than it. But the
    gradient of a key's bias is zero (softmax ignores what is added to all scores of a query): what is computed is
    rounding alone, whose sign Adam follows. So these numbers are left out.
    """
    weights, others = load_file(run / "model" / "model.safetensors"), load_file(other / "model" / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        mine, theirs = weight.double(), others[name].double()
        if name.endswith("qkv.bias"):
            mine, theirs = (part.unflatten(0, (3, -1))[[0, 2]] for part in (mine, theirs))
        assert (mine - theirs).norm() <= 1e-6 * mine.norm(), name
    lines, others = [[json.loads(line) for line in (each / "metrics.jsonl").open()] for each in (run, other)]
    for line, another in zip(lines, others, strict=True):
        kept = [{name: value for name, value in each.items() if name not in MEASURED} for each in (line, another)]
        assert kept[0] == pytest.approx(kept[1], rel=1e-5)  # an accuracy, a PSNR and a norm of gradients, too
    results = [json.loads((each / "result.json").read_text()) for each in (run, other)]
    assert results[0].pop("source") == results[1].pop("source")
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_the_trainings_move_the_weights(alone):
    """By more than 1 %: else their equality would say little."""
    for kind in KINDS:
        steps = sorted((alone / f"{kind}-alone" / "checkpoints").iterdir())
        assert [int(step.name) for step in steps] == [10, 20, 30, 40, 50]
        first, last = (load_file(step / "model.safetensors") for step in (steps[0], steps[-1]))
        moved = sum(float((first[name] - last[name]).square().sum()) for name in first)
        assert moved > 0.01**2 * sum(float(weight.square().sum()) for weight in last.values()), kind


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *itertools.product(KINDS, ["parts-1", "ddp-2", "fsdp-2", "ddp-4", "fsdp-4"]),
        ("pretraining", "fsdp-parts-2"),
        ("finetuning", "parts-2"),
    ],
)
def test_every_layout_learns_the_same(request, kind, layout):
    """50 updates on 1, 2 and 4 ranks: DDP, FSDP2, and the gradients of parts added up."""
    folder = request.getfixturevalue({"1": "alone", "2": "two", "4": "four"}[layout[-1]])
    assert_equal(folder / f"{kind}-alone", folder / f"{kind}-{layout}")
    settings = json.loads((folder / f"{kind}-{layout}" / "model" / "config.json").read_text())
    assert settings["model"] == {"pretraining": "Autoencoder", "finetuning": "Classifier"}[kind]  # not FSDP's class


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_two_ranks_to_one_to_four(four, kind):
    for name in ("between", "moved"):
        assert_equal(four / f"{kind}-alone", four / f"{kind}-{name}")


def test_averages_are_the_same_with_fsdp(two):
    assert_equal(two / "pretraining-ddp-ema", two / "pretraining-fsdp-ema")


def test_what_is_measured_is_in_the_lines_and_the_result(alone):
    for kind, name in (("pretraining", "psnr_sigma_70"), ("finetuning", "accuracy_sigma_70")):
        lines = [json.loads(line) for line in (alone / f"{kind}-alone" / "metrics.jsonl").open()]
        assert [line["update"] for line in lines if name in line] == [10, 20, 30, 40, 50]
        assert len([line for line in lines if "loss" in line]) == 50
        assert name in json.loads((alone / f"{kind}-alone" / "result.json").read_text())


def test_blocks_are_whole_graphs_and_a_new_batch_size_compiles_once_more(two):
    for each in found(two, "graphs"):
        assert each.keys() == {f"{kind}-{layout}" for kind in KINDS for layout in ("ddp", "fsdp")}
        for name, (first, last, breaks) in each.items():
            assert breaks == 0, name
            assert first >= 1, name
            assert last <= 2 * first, name


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(two):
    assert found(two, "terminated") == [{"stopped": signal.SIGTERM}] * 2
    assert latest_checkpoint(two / "pretraining-stopped").name == "00000002"
    assert not (two / "pretraining-stopped" / "model").exists()


def test_a_rank_that_does_not_answer_is_named(two):
    error = found(two, "stalled")[0]["error"]
    assert "rank 0 has waited for the others in vain" in error
    assert "1" in error.partition("in vain")[2]


def test_a_training_that_hangs_ends_and_goes_on_with_the_same_bits(two):
    waiting, hanging = start_without_agent(two, "hung")
    try:
        assert waiting.wait(timeout=300) == 0
        assert hanging.poll() is None
    finally:
        for process in (waiting, hanging):
            process.kill()
            process.wait()
    error = json.loads((two / "hung-0.json").read_text())["error"]
    assert "rank 0 has waited for the others in vain" in error
    assert "1" in error.partition("in vain")[2]
    run = two / "pretraining-hung"
    assert newest_whole(run).name == "00000010"
    done = launch(two, "hung_resumed")
    assert done.returncode == 0, done.stderr
    got, expected = (load_file(two / f"pretraining-{name}" / "model/model.safetensors") for name in ("hung", "ddp-2"))
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_killed_rank_is_named_by_the_other_and_the_checkpoint_stays(alone, jobs):
    processes = start_without_agent(alone, "killed")
    assert [process.wait(timeout=300) for process in processes] == [0, -signal.SIGKILL]
    error = json.loads((alone / "killed-0.json").read_text())["error"]
    assert "rank 0 has waited for the others in vain" in error
    assert "1" in error.partition("in vain")[2]
    assert latest_checkpoint(alone / "pretraining-killed").name == "00000010"
    jobs.pretraining(alone, "killed", resume=True)
    assert_equal(alone / "pretraining-alone", alone / "pretraining-killed")
