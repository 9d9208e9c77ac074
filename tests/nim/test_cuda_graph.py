"""Updates that are replayed have the bits of updates that run, where nothing of the host is in the replay.

A tape stands in for the CUDA graph: the operators of one update with the tensors that they took and gave, called again
on the same memory. As in a graph, a number of the host stays what it was when it was recorded.
"""

import contextlib
import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from denim.nim import Autoencoder, FinetuneConfig, PretrainConfig, cuda_graph, engine, finetune, preset, pretrain
from denim.nim.cuda_graph import UpdateGraph, check_capturable
from denim.nim.ranks import Ranks

UPDATES, WARM_UP = 5, 2


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a value"
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() not in given:  # no view, and not changed in place
                        old.copy_(new)


class BegunError(Exception):
    pass


def state_of(state):
    """Every tensor that an update changes and a later one or a checkpoint reads."""
    optimizer = tensors([state.optimizer.state[parameter] for parameter in state.model.parameters()])
    return [*state.model.parameters(), *optimizer, state.losses, state.norms, *(state.average or {}).values()]


@pytest.fixture
def updates(monkeypatch):
    """updates(trainer, config, graph): the tensors after some updates, and the state."""

    def run(trainer, config, graph):
        module, begun = importlib.import_module(trainer.__module__), []

        def stop(*arguments, **options):
            begun.append(arguments)
            raise BegunError

        monkeypatch.setattr(module, "train", stop)
        with contextlib.suppress(BegunError):
            trainer(config, Console(quiet=True))
        ((config, task, groups, loader),) = begun
        state = None

        def capture(function, stream):
            kept = [tensor.clone() for tensor in state_of(state)]
            with Tape() as tape:
                function()
            with torch.no_grad():  # a capture runs nothing
                for tensor, value in zip(state_of(state), kept, strict=True):
                    tensor.copy_(value)
            return tape.replay

        monkeypatch.setattr(cuda_graph, "_capture", capture)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(UpdateGraph, "beside", lambda self: contextlib.nullcontext())
        monkeypatch.setattr(engine, "WARM_UP", WARM_UP)
        config = replace(config, cuda_graph=True)
        state = engine.begin(config, task, groups, loader, Ranks(), loader.steps_per_epoch // config.passes(1)[1])
        if not graph:  # with learning rates as a tensor all the same, as on a GPU: in float32
            state.graph = None
        task.model.train()
        parts = engine.training_parts(state, task, loader)
        for _ in range(UPDATES):
            engine.training_step(state, parts)
        parts.close()
        return [tensor.detach().clone() for tensor in state_of(state)], state

    return run


def pretraining(**changes):
    given = {"out": Path("run"), "preset": "micro", "batch_size": 16, "epochs": 1, "device": "cpu", "workers": 0}
    return PretrainConfig(**(given | {"warmup_epochs": 0.5} | changes))


@pytest.fixture
def finetuning(tmp_path):
    config = preset("micro", depth=2, embed_dim=16, decoder_embed_dim=16)
    Autoencoder(config).save_pretrained(tmp_path / "denoiser")

    def made(**changes):
        given = {"out": tmp_path / "run", "denoiser": tmp_path / "denoiser", "batch_size": 32, "micro_batch": 16}
        given |= {"epochs": 2, "warmup_epochs": 0.5, "device": "cpu", "workers": 0, "drop_path": 0.3}
        return FinetuneConfig(**(given | changes))

    return made


def assert_same_bits(one, other):
    assert len(one) == len(other)
    assert all(torch.equal(mine, yours) for mine, yours in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 8, "clip_grad": 0.05, "ema": 0.9},
        {"objective": "mae"},
        {"objective": "dmae", "precision": "bf16", "target": "raw", "lean": False, "grad_checkpointing": True},
    ],
)
def test_replayed_pretraining_has_the_bits_of_the_one_that_runs(updates, changes):
    eager, _ = updates(pretrain, pretraining(**changes), False)
    replayed, state = updates(pretrain, pretraining(**changes), True)
    assert state.update == UPDATES
    assert state.graph.warm_up == 0
    assert_same_bits(eager, replayed)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"ema": 0.9}, {"trained_on": "clean", "mixup": 0.0}, {"degrade": "both"}])
def test_replayed_fine_tuning_has_the_bits_of_the_one_that_runs(updates, finetuning, changes):
    eager, _ = updates(finetune, finetuning(**changes), False)
    replayed, _ = updates(finetune, finetuning(**changes), True)
    assert_same_bits(eager, replayed)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["learning rate", "noise", "step of the optimizer"])
def test_a_number_of_the_host_in_an_update_shows(updates, monkeypatch, what):
    eager, _ = updates(pretrain, pretraining(), False)
    if what == "learning rate":
        init = engine.Schedule.__init__

        def forgets(self, *arguments):
            init(self, *arguments)
            self.rates = None

        monkeypatch.setattr(engine.Schedule, "__init__", forgets)
    elif what == "noise":
        run = UpdateGraph.run
        first = []

        def keeps(self, update, parts):
            first.append(parts)
            run(self, update, [part | {"seeds": first[0][0]["seeds"]} for part in parts])

        monkeypatch.setattr(UpdateGraph, "run", keeps)
    else:
        replay = Tape.replay

        def forgets_steps(self):
            self.calls = [call for call in self.calls if call[0] is not torch.ops.aten._foreach_add_.Scalar]
            replay(self)

        monkeypatch.setattr(Tape, "replay", forgets_steps)
    replayed, _ = updates(pretrain, pretraining(), True)
    assert any(not torch.equal(mine, yours) for mine, yours in zip(eager, replayed, strict=True))


def test_inputs_of_another_shape_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(cuda_graph, "_capture", lambda function, stream: function)
    graph, seen = UpdateGraph(torch.device("cuda"), warm_up=0), []

    def update(parts):
        seen.append(parts[0]["images"].clone())

    for value in (1, 2):
        graph.run(update, [{"images": torch.full((3,), value)}])
    assert [tensor.tolist() for tensor in seen] == [[1, 1, 1], [2, 2, 2]]
    for other in (
        {"images": torch.zeros(4, dtype=torch.int64)},
        {"images": torch.zeros(3)},
        {"pixels": torch.zeros(3)},
    ):
        with pytest.raises(ValueError, match="has captured inputs"):
            graph.run(update, [other])


def test_the_order_of_streams(monkeypatch):
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            said.append("replay")

    @contextlib.contextmanager
    def within(*what, **options):
        said.append(f"begin {options.get('capture_error_mode', 'stream')}")
        assert options.get("stream", what[0]).name == "side"
        yield
        said.append("end")

    for name, fake in {
        "Stream": lambda device: Stream("side"),
        "current_stream": lambda device: Stream("current"),
        "stream": within,
        "CUDAGraph": Graph,
        "graph": within,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graph = UpdateGraph(torch.device("cuda"), warm_up=1)
    for _ in range(3):
        graph.run(lambda parts: said.append("update"), [{"x": torch.zeros(1)}])
    warm = ["side waits for current", "begin stream", "update", "end", "current waits for side"]
    assert said == [*warm, "begin thread_local", "update", "end", "replay", "replay"]


def test_what_cannot_be_captured_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="cuda_graph cannot capture fsdp"):
        pretraining(cuda_graph=True, fsdp=True)
    with pytest.raises(ValueError, match="cuda_graph does not capture adversarial training"):
        FinetuneConfig(out=tmp_path, denoiser=tmp_path, trained_on="clean", adversarial="pgd", cuda_graph=True)
    for trainer, config in (
        (pretrain, pretraining(out=tmp_path / "run", cuda_graph=True)),
        (finetune, FinetuneConfig(out=tmp_path / "run", denoiser=tmp_path, device="cpu", cuda_graph=True)),
    ):
        with pytest.raises(ValueError, match="cuda_graph needs a GPU, not cpu"):
            trainer(config, Console(quiet=True))
    assert not (tmp_path / "run").exists()
    check_capturable(pretraining(cuda_graph=True), torch.device("cuda"))
