"""Run by torchrun for the tests of several ranks: rank_jobs.py FOLDER JOB... Each rank writes FOLDER/JOB-RANK.json."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import denim.nim.ranks
from denim.nim import PretrainConfig, pretrain
from denim.nim.ranks import RankError, Ranks, joined
from denim.nim.stopping import Stopped
from denim.nim.text import open_console

CPU = torch.device("cpu")
QUIET = open_console(quiet=True)


def settings(out, **changes):
    """Six updates of a micro model on digits, which is measured after each epoch."""
    base = {
        "preset": "micro", "data": "digits", "epochs": 2, "warmup_epochs": 1, "batch_size": 320, "base_lr": 1e-3,
        "crop_scale": (0.8, 1.0), "loader": "torch", "device": "cpu", "log_every": 1,
        "eval_sigmas": (70.0,), "eval_images": 33,
    }  # fmt: skip
    return PretrainConfig(out=out, **{**base, **changes})


def messages(folder):
    """What `Ranks` exchanges."""
    with joined(CPU, 20) as ranks:
        found = {
            "ranks": [ranks.rank, ranks.world, ranks.local_rank],
            "agree": ranks.agree(ranks.rank == 1, False, True),
            "gather": ranks.gather(10 + ranks.rank),
            "share": ranks.share(f"of rank {ranks.rank}"),
        }
        order = folder / "order"
        with ranks.in_turn(), order.open("a") as file:
            file.write(f"{ranks.rank}")
        try:
            with ranks.together():
                if ranks.rank == 1:
                    raise ValueError("broken")
        except (ValueError, RankError) as error:
            found["together"] = f"{type(error).__name__}: {error}"
        return found


def trainings(folder):
    """The same training in several layouts, and one that is stopped to be resumed on another number of ranks."""
    for name, changes in {
        "ddp": {},
        "parts": {"micro_batch": 40},
        "fsdp": {"fsdp": True},
        "ema": {"ema": 0.5},
        "fsdp-ema": {"fsdp": True, "ema": 0.5},
        "fsdp-parts": {"fsdp": True, "micro_batch": 80, "grad_checkpointing": True},
    }.items():
        pretrain(settings(folder / name, **changes), QUIET)
    return {}


def moved(folder):
    """Go on with FSDP where one rank has stopped."""
    pretrain(settings(folder / "moved", resume=True, fsdp=True), QUIET)
    return {}


def terminated(folder):
    """SIGTERM reaches rank 1 alone, in its first update: it is seen in the next one."""
    if os.environ["RANK"] == "1":
        at_update(1, signal.SIGTERM)
    try:
        pretrain(settings(folder / "stopped"), QUIET)
    except Stopped as stop:
        return {"stopped": stop.number}
    return {}


def at_update(number, signal_number):
    """Send this process a signal once, when it has done some updates."""
    real, calls = Ranks.agree, []

    def agree(self, *flags):
        calls.append(0)
        if len(calls) == number:
            os.kill(os.getpid(), signal_number)
        return real(self, *flags)

    Ranks.agree = agree


def killed(folder):
    """Rank 1 is killed in the second epoch."""
    if os.environ["RANK"] == "1":
        at_update(5, signal.SIGKILL)
    try:
        pretrain(settings(folder / "killed", stall_timeout=20.0), QUIET)
    except RankError as error:
        return {"error": str(error)}
    return {}


def stalled(folder):
    """Rank 1 does not come."""
    denim.nim.ranks.NAMING_SECONDS = 3
    with joined(CPU, 2) as ranks:
        if ranks.rank == 1:
            time.sleep(8)
            return {}
        try:
            ranks.agree(True)
        except RankError as error:
            return {"error": str(error)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for job in sys.argv[2:]:
        result = globals()[job](folder)
        (folder / f"{job}-{os.environ['RANK']}.json").write_text(json.dumps(result))
    sys.stderr.flush()
    os._exit(0)  # groups that have lost a rank cannot be left
