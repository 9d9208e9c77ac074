"""How a task is wrapped for training in one process; `test_ranks.py` has several."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from denim.nim import Autoencoder, AutoencoderConfig, Classifier, ClassifierConfig, Objective, preset
from denim.nim.block import Block, Mlp
from denim.nim.engine import Task
from denim.nim.parallel import compiled_blocks, distribute, transformer_blocks
from denim.nim.pretraining import PretrainTask
from denim.nim.ranks import Ranks
from denim.nim.settings import TrainConfig

CPU = torch.device("cpu")


def wrapped(tmp_path, objective="nim", width=64, **changes):
    """A pretraining task of a micro model, distributed by the settings."""
    settings = {"epochs": 1, "warmup_epochs": 0, "batch_size": 4, "base_lr": 1e-3, "betas": (0.9, 0.95)}
    config = TrainConfig(out=tmp_path, crop_scale=None, **settings, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(preset("micro", objective=objective, embed_dim=width))
    task = PretrainTask(model.train(), Objective.published(objective), seed=0)
    return task, distribute(task, config, Ranks(), CPU, "fp32")


def gradients(task, module, count=4):
    images = torch.arange(count * 16 * 16, dtype=torch.int64).view(count, 16, 16, 1) * 7 % 251
    inputs = {"images": images.to(torch.uint8), "seeds": torch.arange(count)}
    if task.objective.sigma is not None:
        inputs["sigma"] = torch.full((count,), 70.0)
    loss = module(**inputs)
    loss.backward()
    found = {name: parameter.grad for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    task.model.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.parametrize(("lean", "width", "found"), [(True, 160, True), (False, 160, False), (True, 128, False)])
def test_the_switch_for_lean_blocks_reaches_the_model(tmp_path, lean, width, found):
    """On a CPU narrow models are not lean: it would cost them time."""
    task, _ = wrapped(tmp_path, lean=lean, width=width)
    assert {module.lean for module in task.modules() if isinstance(module, (Block, Mlp))} == {found}


def test_narrow_models_are_lean_elsewhere(tmp_path):
    config = TrainConfig(
        out=tmp_path,
        compile=False,
        epochs=1,
        warmup_epochs=0,
        batch_size=4,
        base_lr=1e-3,
        betas=(0.9, 0.95),
        crop_scale=None,
    )
    task = PretrainTask(Autoencoder(preset("micro")), Objective.published("nim"), seed=0)
    distribute(task, config, Ranks(), torch.device("cuda"), "fp32")
    assert {module.lean for module in task.modules() if isinstance(module, (Block, Mlp))} == {True}


@pytest.mark.parametrize("objective", ["nim", "mae"])
def test_every_parameter_that_learns_has_a_gradient(tmp_path, objective):
    """DDP waits for all of them: the mask token of NIM, which hides nothing, is frozen."""
    task, module = wrapped(tmp_path, objective)
    _, found = gradients(task, module)
    assert all(gradient is not None for gradient in found.values())
    assert ("mask_token" in found) == (objective == "mae")


@pytest.mark.parametrize("objective", ["nim", "mae"])
def test_recomputed_activations_give_the_same_bits(tmp_path, objective):
    plain, kept = [gradients(*wrapped(tmp_path, objective, grad_checkpointing=on)) for on in (False, True)]
    assert torch.equal(plain[0], kept[0])
    assert all(torch.equal(plain[1][name], kept[1][name]) for name in plain[1])


def test_recomputed_activations_keep_one_tensor_per_block(tmp_path):
    def saved(on):
        task, module = wrapped(tmp_path, grad_checkpointing=on)
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            module(torch.zeros(64, 16, 16, 1, dtype=torch.uint8), torch.arange(64), torch.full((64,), 70.0))
        weights = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
        return sum(size for place, size in sizes.items() if place not in weights)

    assert saved(True) < 0.3 * saved(False)


@pytest.mark.slow
def test_each_block_is_one_graph_and_a_new_batch_size_compiles_once_more(tmp_path, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    real = torch.compile

    def compile_counted(function, **options):
        assert options == {"fullgraph": True}
        return real(function, backend=counter, **options)

    expected, plain = gradients(*wrapped(tmp_path))
    monkeypatch.setattr("denim.nim.parallel.torch.compile", compile_counted)
    torch._dynamo.reset()
    task, module = wrapped(tmp_path, compile=True)
    loss, compiled = gradients(task, module)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, gradient in compiled.items():
        torch.testing.assert_close(
            gradient, plain[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    first = counter.frame_count
    for count in (3, 6, 5):
        gradients(task, module, count)
    assert counter.frame_count <= first + len(transformer_blocks(task.model))
    assert task.model.state_dict().keys() == Autoencoder(task.model.config).state_dict().keys()


@pytest.mark.slow
def test_compiled_blocks_agree_with_eager_ones_and_are_afterwards_as_before(monkeypatch):
    """By Inductor: one graph of a width with gradients, and one without."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(AutoencoderConfig((8, 8), 4, 16, 2, 2, 16, 1, 2, target="raw")).eval().requires_grad_(False)
    own = model.blocks[1].forward
    model.blocks[1].forward = own  # somebody's
    tokens = torch.randn(6, 4, model.config.patch_dim, generator=torch.Generator().manual_seed(1))

    def run():
        leaf = tokens.clone().requires_grad_()
        prediction = model(leaf)
        (gradient,) = torch.autograd.grad(prediction.square().sum(), leaf)
        with torch.no_grad():
            return prediction.detach(), gradient, model(leaf)

    counter = CompileCounterWithBackend("inductor")
    real = torch.compile
    monkeypatch.setattr(
        "denim.nim.parallel.torch.compile", lambda block, **options: real(block, backend=counter, **options)
    )
    expected = run()
    torch._dynamo.reset()
    with compiled_blocks([model]):
        for got, exact in zip(run(), expected, strict=True):
            # float32: only the order of sums differs, through three blocks.
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 2
    assert "forward" not in vars(model.blocks[0])
    assert model.blocks[1].forward is own
    with compiled_blocks([]):
        pass


def test_blocks_of_a_classifier_are_found():
    model = Classifier(ClassifierConfig(3, (8, 8), 4, 16, 2, 2, mean=(0.5,), std=(0.5,)))
    assert transformer_blocks(model) == list(model.blocks)


@pytest.mark.parametrize(
    ("changes", "message"), [({"grad_checkpointing": True}, "has no blocks"), ({"lean": False}, "no blocks")]
)
def test_a_model_without_blocks_is_refused(tmp_path, changes, message):
    settings = {"epochs": 1, "warmup_epochs": 0, "batch_size": 4, "base_lr": 1e-3, "betas": (0.9, 0.95)}
    config = TrainConfig(out=tmp_path, crop_scale=None, **settings, **changes)
    with pytest.raises(ValueError, match=message):
        distribute(Task(torch.nn.Linear(2, 2)), config, Ranks(), CPU, "fp32")
