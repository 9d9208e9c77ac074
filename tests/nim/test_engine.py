"""The training loop: schedule, accumulation, resumption."""

import errno
import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from denim.nim import files, saving
from denim.nim.checkpoint import CheckpointError, Pretrained
from denim.nim.data import Batch
from denim.nim.engine import Task, train
from denim.nim.files import DamagedFileError, WriteError
from denim.nim.owner import OwnedError, owned
from denim.nim.run import MEASURED
from denim.nim.saving import CheckpointWriter, _sums, latest_checkpoint
from denim.nim.settings import TrainConfig
from denim.nim.stopping import Stopped

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Size:
    width: int = 3


class Line(Pretrained):
    """A linear model."""

    config_class = Size

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.width, 1)
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)


class Regression(Task):
    """A loss of the ids and labels of a part, in its epoch."""

    def __init__(self, model, loss):
        super().__init__(model)
        self.loss = loss

    def prepare(self, batch, epoch):
        return {"ids": batch.ids, "labels": batch.labels, "epoch": torch.tensor(epoch)}

    def forward(self, ids, labels, epoch):
        return self.loss(SimpleNamespace(ids=ids, labels=labels), int(epoch))


class Numbers:
    """A loader of numbers: 5 parts of 2 samples in an epoch."""

    steps_per_epoch = 5

    def epoch(self, epoch, start_step=0):
        for step in range(start_step, self.steps_per_epoch):
            ids = torch.arange(2) + 2 * step + 100 * epoch
            yield Batch(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), ids % 7, ids)

    def state(self):
        return {"bad": {}}

    def load_state(self, state):
        assert state == self.state()


def configure(out, **changes):
    defaults = {
        "epochs": 4, "warmup_epochs": 1, "batch_size": 2, "base_lr": 1.0, "betas": (0.9, 0.95),
        "crop_scale": None, "log_every": 1,
    }  # fmt: skip
    return TrainConfig(out=out, **{**defaults, **changes})


def run(config, *, stop_at=None, loader=None, loss=None, console=QUIET):
    model = Line(Size())
    seen = []

    def default_loss(batch, epoch):
        step = 5 * epoch + int(batch.ids[0]) % 100 // 2
        if step == stop_at:
            raise KeyboardInterrupt
        seen.append(step)
        features = torch.stack([(batch.ids * k % 11).float() / 11 for k in (1, 2, 3)], dim=1)
        return (model.layer(features).squeeze(-1) - batch.labels / 7).square().mean()

    learn(config, model, loss or default_loss, loader=loader, console=console)
    return model, seen


def learn(config, model, loss, *, loader=None, console=QUIET):
    """`train` on a loss(part, epoch)."""
    groups = [{"params": list(model.parameters())}]
    train(config, Regression(model, loss), groups, loader or Numbers(), title="", console=console)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_schedule_is_linear_warm_up_then_cosine_at_every_update(tmp_path):
    config = configure(tmp_path / "run", min_lr=1e-4)
    run(config)
    peak = 1.0 * 2 / 256  # scaled linearly with the batch
    for record in metrics(config.out):
        update = record["update"] - 1  # the rate that this update used
        if update < 5:
            expected = peak * update / 5
        else:
            expected = 1e-4 + (peak - 1e-4) * 0.5 * (1 + math.cos(math.pi * (update - 5) / 15))
        assert record["lr"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [0, 1, 4, 5, 7, 19])
def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, stop_at):
    whole, _ = run(configure(tmp_path / "whole", checkpoint_every=2))
    config = configure(tmp_path / "stopped", checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at=stop_at)
    resumed, seen = run(configure(tmp_path / "stopped", checkpoint_every=2, resume=True))
    assert seen[0] == stop_at - stop_at % 2  # from the last checkpoint, not from the start
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    strip = [
        [{k: v for k, v in r.items() if k not in MEASURED} for r in metrics(tmp_path / n)] for n in ("whole", "stopped")
    ]
    assert strip[0] == strip[1]


class Signalling(Numbers):
    """Sends this process a signal before the fourth part of the second epoch."""

    def __init__(self, number):
        self.number = number

    def epoch(self, epoch, start_step=0):
        for batch in super().epoch(epoch, start_step):
            if int(batch.ids[0]) == 106:
                os.kill(os.getpid(), self.number)
            yield batch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_of_the_running_update(tmp_path, number):
    def strip(out):
        return [{name: value for name, value in r.items() if name not in MEASURED} for r in metrics(out)]

    every = {"checkpoint_every": 5, "log_every": 3}
    whole, _ = run(configure(tmp_path / "whole", **every))
    config = configure(tmp_path / "stopped", **every)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's process may ignore it
    try:
        with pytest.raises(Stopped, match="with --resume goes on") as stopped:
            run(config, loader=Signalling(number))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.number == number
    assert latest_checkpoint(config.out).name == "00000009"
    assert not (config.out / "model").exists()
    resumed, seen = run(configure(tmp_path / "stopped", resume=True, **every))
    assert seen[0] == 9
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    assert strip(tmp_path / "whole") == strip(tmp_path / "stopped")


def test_a_second_process_is_refused_before_it_writes(tmp_path):
    run(configure(tmp_path / "run", epochs=1))
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with owned(tmp_path / "run"), pytest.raises(OwnedError, match=f"process {os.getpid()} "):
        run(configure(tmp_path / "run", epochs=1, resume=True))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("content", [b"{", b"[]"])
def test_damaged_files_of_a_run_are_named(tmp_path, content):
    run(configure(tmp_path / "run", epochs=1))
    whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(content + b"\n" + whole)
    with pytest.raises(DamagedFileError, match=r"line 1 of .*metrics\.jsonl"):
        run(configure(tmp_path / "run", epochs=1, resume=True))
    (tmp_path / "run" / "run.json").write_bytes(content)
    kept = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(DamagedFileError, match=r"run\.json"):
        run(configure(tmp_path / "run", epochs=1, resume=True))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == kept


def test_a_line_of_metrics_that_spans_the_stop_is_the_same(tmp_path):
    run(configure(tmp_path / "whole", checkpoint_every=2, log_every=3))
    with pytest.raises(KeyboardInterrupt):
        run(configure(tmp_path / "stopped", checkpoint_every=2, log_every=3), stop_at=11)
    run(configure(tmp_path / "stopped", checkpoint_every=2, log_every=3, resume=True))
    logged = [[(r["loss"], r["grad_norm"]) for r in metrics(tmp_path / name)] for name in ("whole", "stopped")]
    assert logged[0] == logged[1]


def test_broken_weights_are_never_saved(tmp_path):
    """The loss breaks after update 6, long before the next line of metrics."""

    def loss(batch, epoch):
        calls.append(0)
        return torch.tensor(math.nan if len(calls) > 6 else 1.0, requires_grad=True)

    calls = []
    config = configure(tmp_path / "run", checkpoint_every=2, log_every=20)
    with pytest.raises(FloatingPointError, match="00000006"):
        run(config, loss=loss)
    assert latest_checkpoint(config.out).name == "00000006"


class Breaking(torch.autograd.Function):
    """The identity; where `broken`, its gradient is NaN, while the loss stays finite."""

    @staticmethod
    def forward(value, broken):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.broken = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan if ctx.broken else gradient, None


@pytest.mark.parametrize("every", [3, 20])  # updates between lines of metrics
@pytest.mark.parametrize("update", [2, 20])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing_and_stops_the_run(tmp_path, monkeypatch, update, every, on_cpu):
    """Also in the last of 20 updates, after which no loss would show it."""
    model, calls, before = Line(Size()), [], {}

    def loss(batch, epoch):
        calls.append(0)
        if len(calls) == update:
            before.update({name: value.clone() for name, value in model.state_dict().items()})
        return Breaking.apply(model.layer(torch.ones(2, 3)).square().mean(), len(calls) == update)

    if not on_cpu:  # where reading a number waits for the device, it is read with the losses
        monkeypatch.setattr("denim.nim.engine.READS_ARE_FREE", ())
    config = configure(tmp_path / "run", checkpoint_every=1000, log_every=every)
    noticed = update if on_cpu else min(-(-update // every) * every, 20)
    message = f"norm of the gradients is nan near update {noticed}; there is no checkpoint"
    with pytest.raises(FloatingPointError, match=message):
        learn(config, model, loss)
    if on_cpu:
        assert len(calls) == update
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not (config.out / "model").exists()
    assert latest_checkpoint(config.out) is None


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The gradients are finite, and the step makes an infinite weight."""
    model = Line(Size())

    def loss(batch, epoch):
        if epoch == 1:
            model.layer.weight.data[0, 1] = math.inf
        return model.layer.bias.square().sum()

    config = configure(tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"not saved: layer\.weight; the last finite .*00000005;"):
        learn(config, model, loss)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["00000005"]


def test_the_norm_of_the_gradients_is_in_the_metrics(tmp_path):
    model, norms = Line(Size()), []

    def loss(batch, epoch):
        value = model.layer(torch.ones(2, 3) * (1 + len(norms))).square().mean()
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        norms.append(math.sqrt(sum(float(each.double().square().sum()) for each in gradients)))
        return value

    config = configure(tmp_path / "run", epochs=1, log_every=2)
    learn(config, model, loss)
    expected = [sum(norms[:2]) / 2, sum(norms[2:4]) / 2, norms[4]]
    assert [record["grad_norm"] for record in metrics(config.out)] == pytest.approx(expected, rel=1e-5)


def test_waiting_for_data_and_memory_are_in_the_metrics(tmp_path):
    class Slow(Numbers):
        def epoch(self, epoch, start_step=0):
            for batch in super().epoch(epoch, start_step):
                time.sleep(0.05 * epoch)
                yield batch

    def loss(batch, epoch):
        time.sleep(0.05 * (1 - epoch))
        return torch.ones((), requires_grad=True)

    held = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
    run(configure(tmp_path / "run", epochs=2, log_every=5), loader=Slow(), loss=loss)
    held.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    first, second = metrics(tmp_path / "run")
    # In the first epoch updates take 0.05 s, in the second the batches.
    assert 0 <= first["data_wait"] < 0.5 < second["data_wait"] <= 1
    assert held[0] <= first["peak_memory"] <= second["peak_memory"] <= held[1]


def test_a_finished_run_resumes_at_once(tmp_path):
    first, _ = run(configure(tmp_path / "run"))
    second, seen = run(configure(tmp_path / "run", resume=True))
    assert seen == []
    assert torch.equal(first.layer.weight, second.layer.weight)


def spent(folder):
    return [record["device_seconds"] for record in metrics(folder)]


def test_a_resumed_run_counts_the_time_of_all_its_parts(tmp_path):
    """Also that of updates which a killed run has lost, and of a part that ended between two lines of metrics."""

    class Slow(Numbers):
        def epoch(self, epoch, start_step=0):
            for batch in super().epoch(epoch, start_step):
                time.sleep(0.02)
                yield batch

    with pytest.raises(KeyboardInterrupt):
        run(configure(tmp_path / "run"), loader=Slow(), stop_at=9)
    first = spent(tmp_path / "run")
    assert first == sorted(first)
    assert first[-1] >= 9 * 0.02
    saved = json.loads((latest_checkpoint(tmp_path / "run") / "training.json").read_text())["device_seconds"]
    assert first[4] <= saved <= first[5]
    run(configure(tmp_path / "run", resume=True), loader=Slow())
    whole = spent(tmp_path / "run")
    assert len(whole) == 20
    assert whole[:5] == first[:5]
    assert whole[5] >= first[-1] + 0.02  # updates 6 to 9 were lost, and their time was spent
    assert whole[-1] >= first[-1] + 15 * 0.02

    with pytest.raises(KeyboardInterrupt):
        run(configure(tmp_path / "rare", log_every=20), loader=Slow(), stop_at=12)
    run(configure(tmp_path / "rare", log_every=20, resume=True), loader=Slow())
    (total,) = spent(tmp_path / "rare")
    assert total >= 20 * 0.02  # no line of metrics before it: the checkpoint has the time


def test_a_checkpoint_of_a_version_that_counted_no_time_is_read(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    forged(latest_checkpoint(tmp_path / "run"), training=lambda state: state.pop("device_seconds"))
    run(configure(tmp_path / "run", resume=True))


class Fragile(Numbers):
    """Numbers whose samples 4 and 7 are found bad when they first come."""

    def __init__(self):
        self.bad = {}
        self.loaded = []

    def epoch(self, epoch, start_step=0):
        for batch in super().epoch(epoch, start_step):
            self.bad |= {str(i): f"sample {i} is gone" for i in batch.ids.tolist() if i in (4, 7)}
            yield batch

    def state(self):
        return {"bad": dict(self.bad), "more": "of the loader's own"}

    def load_state(self, state):
        self.loaded.append(state)
        self.bad |= state["bad"]


def test_bad_samples_are_in_metrics_and_checkpoints_and_are_reported(tmp_path):
    def strip(records):
        return [{k: v for k, v in r.items() if k not in MEASURED} for r in records]

    printed = Console(record=True, width=200, file=io.StringIO())
    run(configure(tmp_path / "whole", checkpoint_every=2), loader=Fragile(), console=printed)
    lines = [record for record in metrics(tmp_path / "whole") if "bad" in record]
    assert lines == [
        {"update": 3, "bad": 1, "new_bad": {"4": "sample 4 is gone"}},
        {"update": 4, "bad": 2, "new_bad": {"7": "sample 7 is gone"}},
    ]
    text = printed.export_text()
    assert "2 images could not be read and were replaced by others:" in text
    assert "sample 4 is gone" in text
    assert "sample 7 is gone" in text

    # Stopped between the two; what came after the checkpoint is found, and written, again.
    with pytest.raises(KeyboardInterrupt):
        run(configure(tmp_path / "stopped", checkpoint_every=3), loader=Fragile(), stop_at=5)
    loader = Fragile()
    run(configure(tmp_path / "stopped", checkpoint_every=3, resume=True), loader=loader)
    assert loader.loaded == [{"bad": {"4": "sample 4 is gone"}, "more": "of the loader's own"}]
    assert strip(metrics(tmp_path / "stopped")) == strip(metrics(tmp_path / "whole"))


def test_accumulation_averages_the_parts(tmp_path):
    class Halves(Numbers):
        steps_per_epoch = 10

        def epoch(self, epoch, start_step=0):
            for batch in Numbers().epoch(epoch):
                for row in range(2):
                    yield Batch(*(part[row : row + 1] for part in (batch.images, batch.labels, batch.ids)))

    def loss_of(model):
        def loss(batch, epoch):
            features = torch.stack([(batch.ids * k % 11).float() / 11 for k in (1, 2, 3)], dim=1)
            return (model.layer(features).squeeze(-1) - batch.labels / 7).square().mean()

        return loss

    models = []
    for accumulate, loader in ((1, Numbers()), (2, Halves())):
        model = Line(Size())
        config = configure(tmp_path / str(accumulate), micro_batch=2 // accumulate)
        learn(config, model, loss_of(model), loader=loader)
        models.append(model)
    # Sums in another order: float32 rounding, which AdamW's normalisation of tiny gradients magnifies a little.
    torch.testing.assert_close(models[0].layer.weight, models[1].layer.weight, rtol=1e-4, atol=1e-6)
    # AdamW would not notice gradients that are twice as large.
    losses, norms = ([[r[name] for r in metrics(tmp_path / run)] for run in "12"] for name in ("loss", "grad_norm"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = []

    def loss(batch, epoch):
        return model.layer(torch.ones(2, 3)).sum()

    model = Line(Size())
    for seed in (1, 2):
        torch.manual_seed(seed)
        before.append(torch.get_rng_state())
        config = configure(tmp_path / str(seed), epochs=1)
        learn(config, model, loss)
        assert torch.equal(before[-1], torch.get_rng_state())


def test_two_checkpoints_are_kept_and_each_is_a_model(tmp_path):
    config = configure(tmp_path / "run")
    model, _ = run(config)
    kept = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert kept == ["00000015", "00000020"]
    assert torch.equal(Line.from_pretrained(config.out / "checkpoints" / kept[1]).layer.weight, model.layer.weight)
    assert torch.equal(Line.from_pretrained(config.out / "model").layer.weight, model.layer.weight)


def test_a_folder_with_a_run_needs_resume_and_the_same_settings(tmp_path):
    run(configure(tmp_path / "run", epochs=1))
    with pytest.raises(ValueError, match="holds a run already; resume it"):
        run(configure(tmp_path / "run", epochs=1))
    with pytest.raises(ValueError, match=r"epochs was 1, is 2"):
        run(configure(tmp_path / "run", epochs=2, resume=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower base_lr"):
        run(configure(tmp_path / "run"), loss=lambda batch, epoch: torch.tensor(math.nan, requires_grad=True))


def test_an_epoch_must_hold_one_update(tmp_path):
    with pytest.raises(ValueError, match="smaller batch_size"):
        run(configure(tmp_path / "run", batch_size=12, micro_batch=2))


@pytest.mark.slow
@pytest.mark.parametrize("at", ["optimizer", "training.json"])
def test_killed_while_writing_a_checkpoint_the_previous_one_loads(tmp_path, at):
    """SIGKILL in the middle of the second checkpoint, in a process of its own."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        import test_engine as here
        from denim.nim import saving
        def kill(*arguments, **options):
            if sys.argv[3] == "optimizer":
                real(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        real = saving.save
        class Killing(saving.CheckpointWriter):
            def save(self, model, optimizer, average, progress):
                if progress.update == 10:
                    saving.save = kill if sys.argv[3] == "optimizer" else real
                    saving._sums = kill if sys.argv[3] == "training.json" else saving._sums
                super().save(model, optimizer, average, progress)
        from denim.nim import engine
        engine.CheckpointWriter = Killing
        here.run(here.configure(Path(sys.argv[2])))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "run"), at],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert latest_checkpoint(tmp_path / "run").name == "00000005"
    assert list((tmp_path / "run" / "checkpoints").glob(".denim-*.part"))
    resumed, seen = run(configure(tmp_path / "run", resume=True))
    assert seen[0] == 5
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]
    whole, _ = run(configure(tmp_path / "whole"))
    assert torch.equal(whole.layer.weight, resumed.layer.weight)


OPTIMIZER = "optimizer/shard-00001-model-00001-of-00001.safetensors"


def forged(folder: Path, *, training=None, optimizer=None) -> None:
    """Rewrite training.json or the optimizer's state, and the sums, as whoever forges a checkpoint would."""
    if training is not None:
        state = json.loads((folder / "training.json").read_text())
        training(state)
        (folder / "training.json").write_text(json.dumps(state))
    if optimizer is not None:
        with safe_open(folder / OPTIMIZER, "pt") as file:
            metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shards = json.loads(metadata["DCP_SHARDING_INFO"])
        optimizer(state)
        shards = {name: shards.get(name, {"saved_offsets": [0] * tensor.dim()}) for name, tensor in state.items()}
        save_file(state, folder / OPTIMIZER, {**metadata, "DCP_SHARDING_INFO": json.dumps(shards)})
    sums = _sums(folder)
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    config = configure(tmp_path_factory.mktemp("whole") / "run")
    run(config)
    return config.out


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "training.json", OPTIMIZER, "SHA256SUMS"])
def test_one_flipped_bit_in_a_checkpoint_is_noticed(whole_run, tmp_path, name):
    """The newest one that is whole is taken; the damaged one is kept under another name."""
    shutil.copytree(whole_run, tmp_path / "run")
    newest, older = (tmp_path / "run" / "checkpoints" / number for number in ("00000020", "00000015"))
    flip_a_bit(newest / name)
    with pytest.warns(UserWarning, match=r"20 is damaged: .* not as in SHA256SUMS; .*\.damaged, and .*15 is used"):
        resumed, seen = run(configure(tmp_path / "run", resume=True))
    assert seen == [15, 16, 17, 18, 19]
    assert torch.equal(resumed.layer.weight, weight(whole_run))
    assert sorted(path.name for path in older.parent.iterdir()) == ["00000015", "00000020", "00000020.damaged"]


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        flip_a_bit(folder / "training.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*20 is damaged: training\.json.*; .*15 is"):
        run(configure(tmp_path / "run", resume=True))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def weight(folder):
    return Line.from_pretrained(folder / "model").layer.weight


def test_the_sums_are_those_of_sha256sum(whole_run):
    for checkpoint in (whole_run / "checkpoints").iterdir():
        lines = dict(reversed(line.split("  ")) for line in (checkpoint / "SHA256SUMS").read_text().splitlines())
        assert sorted(lines) == ["README.md", "config.json", "model.safetensors", OPTIMIZER, "training.json"]
        for name, digest in lines.items():
            assert digest == hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"layer.weight.exp_avg": torch.zeros(1)}), r"layer\.weight\.exp_avg is \(1,\)"),
        (
            lambda s: s.update({"layer.weight.exp_avg": torch.zeros(1, 3).double()}),
            r"layer\.weight\.exp_avg is \(1, 3\) torch\.float64, expected \(1, 3\) torch\.float32",
        ),
        (lambda s: s.pop("layer.bias.step"), r"layer\.bias\.step is missing"),
        (lambda s: s["layer.weight.exp_avg"].fill_(math.nan), r"layer\.weight\.exp_avg not finite"),
        (lambda s: s.update({"other.exp_avg": torch.zeros(1)}), r"other\.exp_avg is unknown"),
    ],
)
def test_an_optimizer_state_of_another_model_is_refused(whole_run, tmp_path, change, message):
    """The fused step would read as many numbers as a parameter has, whatever the size of its state."""
    shutil.copytree(whole_run, tmp_path / "run")
    forged(latest_checkpoint(tmp_path / "run"), optimizer=change)
    with pytest.raises(CheckpointError, match=rf"00000020/optimizer does not fit this run: .*{message}"):
        run(configure(tmp_path / "run", resume=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(update=19), "update is 19 and logged 20"),
        (lambda s: s.update(update=20.0), r"update is '20\.0'"),
        (lambda s: s.update(update=True), "update is 'True'"),
        (lambda s: s.update(logged=21), "logged 21"),
        (lambda s: s.update(losses=math.nan), "losses is nan"),
        (lambda s: s.pop("loaders"), "loaders is 'None'"),
        (lambda s: s.update(loaders=[3]), "loaders holds something else"),
        (lambda s: s.update(device_seconds=-1.0), r"device_seconds is -1\.0"),
    ],
)
def test_a_forged_checkpoint_is_refused_before_anything_is_loaded(whole_run, tmp_path, change, message):
    shutil.copytree(whole_run, tmp_path / "run")
    forged(latest_checkpoint(tmp_path / "run"), training=change)
    with pytest.raises(CheckpointError, match=rf"training\.json does not fit this run: .*{message}"):
        run(configure(tmp_path / "run", resume=True))


def test_a_checkpoint_of_an_earlier_version_says_what_can_be_done(whole_run, tmp_path):
    shutil.copytree(whole_run, tmp_path / "run")
    newest = latest_checkpoint(tmp_path / "run")
    (newest / "training.json").rename(newest / "training.pt")
    forged(newest)
    with pytest.raises(CheckpointError, match=r"00000020 is the checkpoint of an earlier version.*--init .*00000020"):
        run(configure(tmp_path / "run", resume=True))


def test_checkpoints_that_stay_for_good(tmp_path):
    config = configure(tmp_path / "run", checkpoint_every=2, keep_checkpoints=1, keep_every=6)
    run(config)
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == [
        "00000006", "00000012", "00000018", "00000020"
    ]  # fmt: skip


def test_checkpoints_by_the_clock(tmp_path):
    config = configure(tmp_path / "run", epochs=1, checkpoint_minutes=1e-9, keep_checkpoints=9)
    run(config)
    assert len(list((config.out / "checkpoints").iterdir())) == 5


@pytest.mark.parametrize("name", ["rmtree", "remove_folder"])
def test_a_process_that_is_killed_as_it_removes_a_checkpoint_leaves_no_part_of_it(tmp_path, monkeypatch, name):
    def killed(path, **_):
        if path.exists():
            raise KeyboardInterrupt

    folder = tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil if name == "rmtree" else saving, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run(configure(tmp_path / "run", checkpoint_every=1))
    assert len(list(folder.iterdir())) == 3
    left = list(folder.glob("[0-9]*"))
    assert [saving._damage(checkpoint) for checkpoint in left] == [""] * (2 if name == "rmtree" else 3)
    run(configure(tmp_path / "run", checkpoint_every=10**6, resume=True))
    assert sorted(path.name for path in folder.iterdir()) == [sorted(left)[-1].name, "00000020"]


@pytest.mark.parametrize("line", ["{}", '{"update": "3"}', '{"update": true}'])
def test_lines_of_metrics_without_an_update_are_named(whole_run, tmp_path, line):
    shutil.copytree(whole_run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(DamagedFileError, match=r"line 1 of .*metrics\.jsonl has .*'update'"):
        run(configure(tmp_path / "run", resume=True))


def test_checkpoints_in_the_background_are_the_same(tmp_path, monkeypatch):
    def in_background(*arguments, **options):
        return CheckpointWriter(*arguments, **{**options, "in_background": True})

    run(configure(tmp_path / "before"))
    monkeypatch.setattr("denim.nim.engine.CheckpointWriter", in_background)
    run(configure(tmp_path / "beside"))
    files = [path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*.safetensors")]
    assert len(files) == 5
    for file in files:
        before, beside = load_file(tmp_path / "before" / file), load_file(tmp_path / "beside" / file)
        assert before.keys() == beside.keys()
        assert all(torch.equal(before[name], beside[name]) for name in before)


def test_a_failure_in_the_background_reaches_the_run(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def in_background(*arguments, **options):
        return CheckpointWriter(*arguments, **{**options, "in_background": True})

    monkeypatch.setattr("denim.nim.engine.CheckpointWriter", in_background)
    monkeypatch.setattr("denim.nim.saving.save", full)
    with pytest.raises(WriteError, match="make room there"):
        run(configure(tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("at", ["optimizer", "weights", "sums"])
def test_a_disk_that_is_full_in_a_checkpoint_costs_no_more_than_that_checkpoint(tmp_path, monkeypatch, at):
    """The second of four, while a part of it is written already."""
    place, name = {"optimizer": (saving, "save"), "weights": (Line, "save_pretrained"), "sums": (saving, "_sums")}[at]
    real, calls = getattr(place, name), []

    def full(*arguments, **options):
        calls.append(0)
        result = real(*arguments, **options)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return result

    folder = tmp_path / "run" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        with pytest.raises(
            WriteError, match=f"^cannot write {folder}/00000010: No space left on device; make room there"
        ):
            run(configure(tmp_path / "run"))
    assert [path.name for path in folder.iterdir()] == ["00000005"]
    assert saving._damage(folder / "00000005") == ""
    resumed, seen = run(configure(tmp_path / "run", resume=True))
    assert seen[0] == 5
    whole, _ = run(configure(tmp_path / "whole"))
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_settings_of_a_later_version_have_their_defaults_in_an_earlier_run(tmp_path):
    run(configure(tmp_path / "run", epochs=1))
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("clip_grad", "fsdp", "precision"):
        del settings[name]
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    run(configure(tmp_path / "run", epochs=1, resume=True))
    with pytest.raises(ValueError, match=r"clip_grad was None, is 1\.0"):
        run(configure(tmp_path / "run", epochs=1, resume=True, clip_grad=1.0))


def test_gradients_are_clipped_to_a_norm(tmp_path):
    """As torch's clip_grad_norm_, in float64."""
    norms = []

    class Watching(torch.optim.AdamW):
        def step(self, *arguments):
            gradients = [each.grad.double() for group in self.param_groups for each in group["params"]]
            norms.append(math.sqrt(sum(float(each.square().sum()) for each in gradients)))
            return super().step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watching)
        run(configure(tmp_path / "free", epochs=1))
        free = list(norms)
        norms.clear()
        run(configure(tmp_path / "clipped", epochs=1, base_lr=1e-9, clip_grad=0.5))
    assert max(free) > 0.5
    assert max(norms) == pytest.approx(0.5, rel=1e-5)
    assert metrics(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(free[0], rel=1e-6)


@pytest.mark.parametrize("stop_at", [None, 7])
def test_the_finished_model_has_moving_averages(tmp_path, stop_at):
    """By the recurrence in float64, from the weights of every update; also of a run that was stopped."""
    weights = []

    class Watching(torch.optim.AdamW):
        def step(self, *arguments):
            super().step(*arguments)
            weights.append(self.param_groups[0]["params"][0].detach().double().clone())

    config = configure(tmp_path / "run", ema=0.9, checkpoint_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watching)
        if stop_at is not None:
            with pytest.raises(KeyboardInterrupt):
                run(config, stop_at=stop_at)
            config = configure(tmp_path / "run", ema=0.9, checkpoint_every=1, resume=True)
        last, _ = run(config)
    assert len(weights) == 20
    average = torch.ones(1, 3, dtype=torch.float64)
    for weight_of_update in weights:
        average = 0.9 * average + 0.1 * weight_of_update
    torch.testing.assert_close(weight(config.out).double(), average, rtol=1e-6, atol=0)
    assert not torch.equal(weight(config.out), last.layer.weight)
    checkpoint = Line.from_pretrained(latest_checkpoint(config.out))
    assert torch.equal(checkpoint.layer.weight, last.layer.weight)  # a run goes on with the weights themselves
