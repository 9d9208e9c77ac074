"""The steps that a pretraining is compared with begin where Denim's does, and Denim's is the command's own."""

import functools
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from denim.benchmarks import baselines, training
from denim.benchmarks.timing import WrongResultError
from denim.benchmarks.training import TOLERANCE, Workload, check_loss, compare, open_floor, open_step
from denim.nim import PretrainConfig
from denim.nim.engine import train
from denim.nim.pretraining import PretrainTask

CPU = torch.device("cpu")


def settings(**changes):
    # Not square numbers of patches per image and batch, so that exchanged axes show.
    given = {"preset": "micro", "img_size": 12, "channels": 3, "batch_size": 3, "device": "cpu"} | changes
    return PretrainConfig(**({"out": Path("run")} | given))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sigma", [None, "uniform:20,130", "70"])
@pytest.mark.parametrize("objective", ["nim", "mae", "dmae"])
def test_every_step_begins_with_the_loss_and_the_gradients_of_denims(objective, sigma, precision):
    if objective == "mae" and sigma is not None:
        pytest.skip("mae has no noise")
    target = "raw" if sigma else "norm"
    work = Workload(settings(objective=objective, sigma=sigma, target=target, precision=precision), CPU)
    inputs, reference = work.inputs(), open_step("denim", work)
    for name in ("published", "eager"):
        step = open_step(name, work)
        assert check_loss(step, reference, work) <= TOLERANCE[precision]
        if name == "eager":
            both = [each.loss(inputs, True) for each in (step, reference)]
            for value in both:
                value.backward()
            for own, other in zip(step.model.parameters(), reference.model.parameters(), strict=True):
                assert (own.grad is None) == (other.grad is None)
                if own.grad is not None:
                    # bf16: inputs of 8 bits in products, some of which the two steps round at other places.
                    error = (own.grad - other.grad).norm() / other.grad.norm()
                    assert error <= (1e-4 if precision == "fp32" else 0.1)
    reference.close()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["nim", "mae"])
def test_the_compiled_step_begins_there_too(objective):
    work = Workload(settings(objective=objective), CPU)
    reference = open_step("denim", work)
    assert check_loss(open_step("compiled", work, backend="eager"), reference, work) <= TOLERANCE["fp32"]


def test_denims_step_makes_the_updates_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "UPDATES", 3)
    config = settings(out=tmp_path / "run", epochs=1, micro_batch=3, batch_size=6, warmup_epochs=0, clip_grad=0.1)
    work = Workload(config, CPU)
    step = open_step("denim", work)
    for _ in range(3):
        step.run()
    step.close()
    task = PretrainTask(work.model(), work.objective, config.seed)
    groups = training.param_groups_weight_decay(task.model, config.weight_decay)
    train(config, task, groups, work.loader, title="run", console=Console(file=io.StringIO()))
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    own = dict(step.model.named_parameters())
    assert own["blocks.0.attn.qkv.weight"].ne(dict(work.model().named_parameters())["blocks.0.attn.qkv.weight"]).any()
    assert saved.keys() == own.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, own[name]), name


@pytest.mark.parametrize("name", ["published", "eager"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_others_learn(name, micro_batch):
    work = Workload(settings(batch_size=6, micro_batch=micro_batch, base_lr=0.1, sigma="20"), CPU)
    step, inputs = open_step(name, work), work.inputs()
    before = step.loss(inputs, True).item()
    for _ in range(8):
        step.run()
    assert step.loss(inputs, True).item() < 0.98 * before


def test_a_step_that_computes_something_else_is_not_timed(monkeypatch):
    real = baselines.reconstruction_loss
    monkeypatch.setattr(baselines, "reconstruction_loss", lambda *args, **options: 1.0001 * real(*args, **options))
    with pytest.raises(WrongResultError, match=r"eager: the first loss differs .* 0.0001.* no time is given"):
        compare(settings(), CPU, ["eager"])


def test_wrong_noise_is_found(monkeypatch):
    real = baselines.noisy_patches
    wrong = functools.partial(altered, real)
    monkeypatch.setattr(baselines, "noisy_patches", wrong)
    work = Workload(settings(), CPU)
    reference = open_step("denim", work)
    assert check_loss(open_step("eager", work), reference, work) > TOLERANCE["fp32"]


def altered(real, images, sigma, *arguments, **options):
    return real(images, 1.01 * sigma, *arguments, **options)


@pytest.mark.parametrize("objective", ["nim", "mae"])
def test_the_floor_has_the_products_of_the_model(objective):
    work = Workload(settings(objective=objective), CPU)
    floor = open_floor(work)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        floor()
    assert counter.get_total_flops() == 3 * training.flops_per_image(work)


def test_records_hold_what_was_measured(monkeypatch):
    monkeypatch.setattr(training, "peak_flops", lambda device, precision: 1e9 if precision == "fp32" else None)
    said = []
    config = settings(preset="tiny", img_size=16, patch_size=4, batch_size=8)
    denim, eager, floor = compare(config, CPU, ["eager", "floor"], rounds=3, report=said.append)
    assert [each.name for each in (denim, eager, floor)] == ["denim", "eager", "floor"]
    assert all(len(each.seconds) == 3 for each in (denim, eager, floor))
    assert denim.images_per_second == 8 / sorted(denim.seconds)[1]
    work = Workload(config, CPU)
    assert denim.utilisation == pytest.approx(training.flops_per_image(work) * denim.images_per_second / 1e9)
    assert floor.utilisation is None
    assert (denim.error, floor.error) == (0, None)
    # What lean blocks do not keep.
    assert denim.peak_bytes < eager.peak_bytes
    assert said[0] == "denim: building and checking"
    assert compare(settings(), CPU, [], rounds=1, memory=False)[0].peak_bytes is None


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"against": ["fastest"]}, "unknown step 'fastest'; choose among published, eager, compiled, floor"),
        ({}, {"rounds": 0}, "rounds must be at least 1"),
        ({}, {"clock": "sun"}, "clock must be wall or processor"),
        ({"batch_size": None}, {}, "give a number"),
    ],
)
def test_mistakes_are_refused_before_any_work(changes, options, message):
    said = []
    with pytest.raises(ValueError, match=message):
        compare(settings(**changes), CPU, report=said.append, **options)
    assert said == []


def test_model_flops_equal_the_count_by_hand():
    work = Workload(PretrainConfig(out=Path("run"), preset="micro", batch_size=3), CPU)
    config = work.architecture
    tokens, length = config.num_patches + 1, config.num_patches

    def block(width: int) -> int:
        return 2 * tokens * (12 * width * width) + 4 * tokens * tokens * width

    embed = 2 * length * config.patch_dim * config.embed_dim
    forward = embed + config.depth * block(config.embed_dim) + config.decoder_depth * block(config.decoder_embed_dim)
    forward += 2 * tokens * config.decoder_embed_dim * (config.embed_dim + config.patch_dim)
    # Two products backward for each forward, but for the input, which needs no gradient.
    assert training.flops_per_image(work) == 3 * forward - embed
