"""Run by torchrun for the tests of several ranks: rank_jobs.py FOLDER JOB... Each rank writes FOLDER/JOB-RANK.json."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import denim.nim.parallel
import denim.nim.ranks
from denim.nim import (
    Autoencoder,
    Classifier,
    ClassifierConfig,
    FinetuneConfig,
    Objective,
    PretrainConfig,
    finetune,
    preset,
    pretrain,
)
from denim.nim.augmentation import Augmentation
from denim.nim.data import Batch
from denim.nim.finetuning import FinetuneTask
from denim.nim.parallel import distribute
from denim.nim.pretraining import PretrainTask
from denim.nim.ranks import RankError, Ranks, joined
from denim.nim.stopping import Stopped
from denim.nim.text import open_console

CPU = torch.device("cpu")
QUIET = open_console(quiet=True)
# 50 updates of 160 images, at a rate at which weights move by some percent. After each 10 there is a checkpoint, and a
# measurement on a number of images that no number of ranks divides.
BASE = {
    "epochs": 5, "warmup_epochs": 1, "batch_size": 16, "base_lr": 1e-2, "loader": "torch", "device": "cpu",
    "log_every": 1, "keep_checkpoints": 9, "eval_sigmas": (70.0,), "eval_images": 9,
}  # fmt: skip
LAYOUTS = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "parts": {"micro_batch": 4},
    "fsdp-parts": {"fsdp": True, "micro_batch": 4, "grad_checkpointing": True},
}


def pretraining(folder, name, **changes):
    """A micro model on the images in a folder."""
    settings = {"preset": "micro", "crop_scale": (0.5, 1.0), "data": str(folder / "images"), **BASE, **changes}
    pretrain(PretrainConfig(out=folder / f"pretraining-{name}", **settings), QUIET)


def finetuning(folder, name, **changes):
    """The full recipe, with more drop path and erasing than is published: mixing, erasing, levels, layer decay."""
    settings = {"data": str(folder / "images"), "mixup_group": 4, "drop_path": 0.3, "erasing": 0.5, **BASE, **changes}
    finetune(FinetuneConfig(out=folder / f"finetuning-{name}", denoiser=folder / "denoiser", **settings), QUIET)


KINDS = {"pretraining": pretraining, "finetuning": finetuning}


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
    """The same trainings in several layouts; on two ranks also in parts."""
    world = int(os.environ["WORLD_SIZE"])
    for kind, train in KINDS.items():
        parts = {"pretraining": "fsdp-parts", "finetuning": "parts"}[kind]
        for name in ("ddp", "fsdp", parts)[: 3 if world == 2 else 2]:
            train(folder, f"{name}-{world}", **LAYOUTS[name])
    return {}


def averages(folder):
    """Moving averages of the weights, over 10 updates."""
    for name in ("ddp", "fsdp"):
        pretraining(folder, f"{name}-ema", epochs=1, ema=0.5, **LAYOUTS[name])
    return {}


def moved(folder):
    """Go on with FSDP where one process has stopped."""
    for train in KINDS.values():
        train(folder, "moved", resume=True, fsdp=True)
    return {}


def graphs(folder):
    """For each way of training the numbers of graphs after a first size of the batch and after two more, and of breaks
    in them. The first size is compiled for itself.
    """
    real, found = torch.compile, {}
    with joined(CPU) as ranks:
        for kind in KINDS:
            for layout in ("ddp", "fsdp"):
                torch._dynamo.reset()
                counters.clear()
                counter = CompileCounterWithBackend("eager")
                denim.nim.parallel.torch.compile = lambda block, **options: real(block, backend=counter, **options)  # noqa: B023
                task = task_of(kind)
                config = PretrainConfig(out=folder, batch_size=16, warmup_epochs=1, compile=True, **LAYOUTS[layout])
                module, numbers = distribute(task, config, ranks, CPU, "fp32"), []
                for count in (8, 4, 12):
                    images = torch.zeros(count, 16, 16, 1, dtype=torch.uint8)
                    batch = Batch(images, torch.arange(count) % 2, torch.arange(count))
                    module(**task.prepare(batch, 0)).backward()
                    numbers.append(counter.frame_count)
                found[f"{kind}-{layout}"] = [numbers[0], numbers[-1], sum(counters["graph_break"].values())]
    denim.nim.parallel.torch.compile = real
    return found


def task_of(kind):
    """What is learnt, of a micro model."""
    model = Autoencoder(preset("micro")).train()
    if kind == "pretraining":
        return PretrainTask(model, Objective.published("nim"), 0)
    classifier = Classifier(ClassifierConfig.for_encoder(model.config, 2, drop_path=0.3)).train()
    config = FinetuneConfig(out=Path(), denoiser=Path(), mixup_group=4)
    augmentation = Augmentation(0, (16, 16), (0.5,), (0.25,), 2, mixup_group=4)
    return FinetuneTask(classifier, model.requires_grad_(False), config, augmentation)


def terminated(folder):
    """SIGTERM reaches rank 1 alone, in its first update: it is seen in the next one."""
    if os.environ["RANK"] == "1":
        at_update(1, signal.SIGTERM)
    try:
        pretraining(folder, "stopped")
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
        at_update(15, signal.SIGKILL)
    try:
        pretraining(folder, "killed", stall_timeout=20.0)
    except RankError as error:
        return {"error": str(error)}
    return {}


def hung(folder):
    """Rank 1 stops answering in the second epoch, and does not end."""
    denim.nim.ranks.NAMING_SECONDS = 3
    if os.environ["RANK"] == "1":
        at_update(15, signal.SIGSTOP)
    try:
        pretraining(folder, "hung", stall_timeout=15.0)
    except RankError as error:
        return {"error": str(error)}
    return {}


def hung_resumed(folder):
    """The training that has hung goes on, on two ranks as before."""
    pretraining(folder, "hung", resume=True)
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
