"""The plan of a training step against what autograd keeps, what the allocator gives, and torch's counter."""

import dataclasses

import pytest
import torch

from denim.benchmarks.timing import peak_memory
from denim.benchmarks.training import model_flops
from denim.kernels import Domain, derive_seeds
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
from denim.nim.block import set_lean
from denim.nim.gpus import GPUS, gpu_of_driver
from denim.nim.parallel import transformer_blocks
from denim.nim.plan import (
    Strategy,
    exchange_bytes,
    fitting_micro_batch,
    least_seconds,
    make_plan,
    plan_table,
    with_fitting_micro_batch,
)
from denim.nim.ranks import Ranks
from denim.nim.text import open_console

CPU = torch.device("cpu")
# Odd widths and numbers of heads, two encoder blocks and another number of decoder blocks.
SMALL = preset(
    "tiny",
    img_size=20,
    patch_size=4,
    embed_dim=72,
    num_heads=3,
    depth=3,
    decoder_depth=2,
    decoder_embed_dim=40,
    decoder_num_heads=5,
)
STRATEGIES = [
    (objective, precision, lean, again)
    for objective in ("nim", "mae", "dmae")
    for precision in ("fp32", "bf16")
    for lean, again in ((True, False), (False, False), (True, True))
]


def step_of(config, batch, strategy):
    """A model, and a function that gives the loss of a batch."""
    torch.manual_seed(0)
    model = Autoencoder(config).train()
    set_lean(model, strategy.lean)
    model.set_grad_checkpointing(strategy.grad_checkpointing)
    model.mask_token.requires_grad_(config.objective != "nim")
    objective = Objective.published(config.objective)
    images = torch.randint(0, 256, (batch, *config.img_size, config.channels), dtype=torch.uint8)
    seeds = derive_seeds(0, Domain.TRAINING, torch.arange(batch))
    sigma = None if objective.sigma is None else objective.sigma.sample(seeds)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=strategy.precision == "bf16"):
            return objective.loss(model, images, sigma, seeds)

    return model, loss, (images, seeds)


def saved_bytes(model, loss, inputs):
    """Bytes of the storages that autograd keeps, without weights and inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *inputs)}
    found, kept = {}, []

    def pack(tensor):
        kept.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(found.values())


@pytest.mark.parametrize(("objective", "precision", "lean", "again"), STRATEGIES)
def test_saved_bytes_are_those_that_autograd_keeps(objective, precision, lean, again):
    config = dataclasses.replace(SMALL, objective=objective)
    strategy = Strategy(precision=precision, lean=lean, grad_checkpointing=again, on_cpu=True)
    model, loss, inputs = step_of(config, 7, strategy)
    plan = make_plan(config, 7, strategy)
    # What is promised; the sums of shapes are in fact exact.
    assert plan.saved == pytest.approx(saved_bytes(model, loss, inputs), rel=0.01)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("config", "batch", "strategy"),
    [
        (SMALL, 48, Strategy(precision="fp32", on_cpu=True)),
        (SMALL, 48, Strategy(precision="bf16", lean=False, on_cpu=True)),
        (SMALL, 48, Strategy(precision="fp32", grad_checkpointing=True, on_cpu=True)),
        (SMALL, 48, Strategy(precision="bf16", grad_checkpointing=True, on_cpu=True)),
        (SMALL, 48, Strategy(precision="bf16", lean=False, grad_checkpointing=True, on_cpu=True)),
        # Few wide patches: the loss takes the most.
        (preset("tiny", depth=3, decoder_depth=1, objective="mae"), 4, Strategy(precision="fp32", on_cpu=True)),
    ],
)
def test_peak_is_that_of_the_allocator(config, batch, strategy):
    model, loss, _ = step_of(config, batch, strategy)

    def step():
        model.zero_grad(set_to_none=True)
        loss().backward()

    step()
    model.zero_grad(set_to_none=True)
    assert make_plan(config, batch, strategy).peak == pytest.approx(peak_memory(step, CPU), rel=0.03)


@pytest.mark.parametrize("objective", ["nim", "mae"])
def test_operations_are_those_that_torch_counts(objective):
    config = dataclasses.replace(SMALL, objective=objective)
    model, loss, _ = step_of(config, 2, Strategy(precision="fp32", lean=False, on_cpu=True))
    counted = model_flops(model, loss)
    assert 2 * make_plan(config, 2, Strategy(precision="fp32")).flops_per_image == counted
    again = make_plan(config, 2, Strategy(precision="fp32", grad_checkpointing=True)).flops_per_image
    blocks = sum(
        depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
        for depth, width, tokens in (
            (config.depth, config.embed_dim, (25 if objective == "nim" else 6) + 1),
            (config.decoder_depth, config.decoder_embed_dim, 26),
        )
    )
    assert 2 * (again - blocks) == counted


def test_weights_of_a_classifier():
    config = ClassifierConfig.for_encoder(SMALL, 11)
    plan = make_plan(config, 4, Strategy())
    assert plan.parameters == plan.trainable == sum(each.numel() for each in Classifier(config).parameters())
    assert plan.optimizer == 8 * plan.trainable


def test_saved_bytes_of_a_classifier():
    config = ClassifierConfig.for_encoder(SMALL, 11)
    model, pixels = Classifier(config).train(), torch.rand(6, 3, 20, 20)
    kept = saved_bytes(model, lambda: torch.nn.functional.cross_entropy(model(pixels), torch.arange(6)), [pixels])
    # Pixels in normalised space take the place of patches; the logits are left out.
    assert make_plan(config, 6, Strategy(precision="fp32", on_cpu=True)).saved == pytest.approx(kept, rel=0.01)


def test_fsdp_cuts_what_it_shards():
    whole, cut = (make_plan(SMALL, 4, Strategy(devices=4, fsdp=fsdp)) for fsdp in (False, True))
    for name in ("weights", "optimizer", "gradients"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name) / 4, abs=1), name
    assert whole.gathered == 0
    assert cut.gathered > 2 * 2 * (12 * 72**2 + 13 * 72)  # two blocks in bfloat16
    assert cut.flops_per_image == whole.flops_per_image


@pytest.mark.parametrize("objective", ["nim", "mae"])
def test_bytes_of_an_exchange_are_those_of_the_parameters(objective):
    """Of the ones that FSDP gathers: each block's before forward and backward, the others once; see `distribute`."""
    model, _, _ = step_of(dataclasses.replace(SMALL, objective=objective), 1, Strategy(precision="fp32"))
    inside = sum(parameter.numel() for block in transformer_blocks(model) for parameter in block.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = model.config
    for devices in (1, 2, 8):
        ring = (devices - 1) / devices
        ddp = exchange_bytes(config, Strategy(devices=devices), passes=3)
        assert ddp == pytest.approx(ring * 2 * 4 * trained, abs=1)
        fsdp = exchange_bytes(config, Strategy(devices=devices, fsdp=True), passes=3)
        gathered = 3 * (2 * inside + everything - inside)
        assert fsdp == pytest.approx(ring * (2 * gathered + 4 * trained), abs=1)
        fsdp = exchange_bytes(config, Strategy(devices=devices, fsdp=True, precision="fp32"))
        assert fsdp == pytest.approx(ring * (4 * gathered / 3 + 4 * trained), abs=1)


def test_least_seconds_follow_the_limit_that_binds():
    gpu = GPUS["h100"]
    config, strategy = preset("base"), Strategy()
    plan = make_plan(config, 256, strategy)
    # Large products: arithmetic binds, and AdamW moves 28 bytes for each weight.
    arithmetic = 256 * plan.flops_per_image / gpu.bf16 + 28 * plan.trainable / gpu.bandwidth
    assert least_seconds(config, 256, strategy, gpu) == pytest.approx(arithmetic, rel=0.1)
    assert least_seconds(config, 256, strategy, gpu) > 0.999 * arithmetic
    # Memory a thousand times slower binds everywhere, and then the peak of the arithmetic does not matter.
    slow = gpu._replace(bandwidth=gpu.bandwidth / 1000)
    assert least_seconds(config, 256, strategy, slow) == least_seconds(config, 256, strategy, slow._replace(bf16=1e16))
    # Two passes of half the images: the same operations, and one step of AdamW.
    halves = least_seconds(config, 128, strategy, gpu, passes=2)
    assert halves == pytest.approx(least_seconds(config, 256, strategy, gpu), rel=0.05)


def test_the_largest_divisor_that_fits():
    strategy = Strategy()
    needs = {size: make_plan(SMALL, size, strategy, passes=60 // size).total for size in (12, 15, 60)}
    assert fitting_micro_batch(SMALL, 60, needs[60], strategy) == 60
    assert fitting_micro_batch(SMALL, 60, needs[15], strategy) == 15
    assert fitting_micro_batch(SMALL, 60, needs[15], strategy, multiple_of=6) == 12
    assert fitting_micro_batch(SMALL, 60, needs[15], strategy, besides=1) == 12
    with pytest.raises(ValueError, match=r"at least .* GiB, and 0\.0 GiB are free: grad_checkpointing or fsdp"):
        fitting_micro_batch(SMALL, 60, 1000, strategy)
    with pytest.raises(ValueError, match="no multiple of 7"):
        fitting_micro_batch(SMALL, 60, 1e12, strategy, multiple_of=7)


def test_rows_of_the_table():
    rows = plan_table(SMALL, GPUS["a100"], 2**30, batch_size=64, devices=4)
    assert [row["step"] for row in rows] == [
        "--no-lean",
        "default",
        "--grad-checkpointing",
        "--no-lean --fsdp",
        "--fsdp",
        "--grad-checkpointing --fsdp",
    ]
    assert all(row["micro_batch"] == 16 and row["fits"] for row in rows)
    assert rows[0]["saved"] > rows[1]["saved"] > rows[2]["saved"]
    assert rows[1]["images_per_second"] == 64 / rows[1]["seconds"]
    (first, *_) = plan_table(SMALL, GPUS["a100"], 1, batch_size=64)
    assert (first["micro_batch"], first["fits"]) == (1, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"devices": 3}, "multiple of the 3 devices"),
        ({"micro_batch": 5}, "no multiple of micro_batch 5"),
        ({"precision": "auto"}, "precision must be bf16, tf32 or fp32"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        plan_table(SMALL, GPUS["a100"], 2**30, **{"batch_size": 64, **changes})
    with pytest.raises(ValueError, match="micro_batch must be at least 1"):
        make_plan(SMALL, 0, Strategy())


def test_gpus_of_drivers():
    assert gpu_of_driver("NVIDIA H200") is GPUS["h200"]
    assert gpu_of_driver("NVIDIA H200 MIG 1g.18gb") is None
    names = [name for gpu in GPUS.values() for name in gpu.drivers]
    assert len(set(names)) == len(names)
    assert all(gpu.bf16 > gpu.tf32 >= gpu.fp32 for gpu in GPUS.values())


GPU = torch.device("cuda:0")


@pytest.fixture
def free(monkeypatch):
    """Set the free memory of a GPU that is not there."""

    def set(value):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (value, 2**40))

    return set


def settings(tmp_path, **changes):
    return PretrainConfig(out=tmp_path, batch_size=64, warmup_epochs=1, precision="fp32", **changes)


def test_a_share_that_does_not_fit_is_cut_and_said(tmp_path, free, capsys):
    console = open_console()
    strategy = Strategy(precision="fp32")
    needs = {size: make_plan(SMALL, size, strategy, passes=64 // size).total for size in (16, 64)}
    free(needs[64] / 0.9 + 1)
    config = settings(tmp_path)
    assert with_fitting_micro_batch(config, SMALL, GPU, Ranks(), console) == config
    assert capsys.readouterr().out == ""
    free(needs[16] / 0.9 + 1)
    cut = with_fitting_micro_batch(config, SMALL, GPU, Ranks(), console)
    assert cut == dataclasses.replace(config, micro_batch=16)
    assert cut.passes(1) == (16, 4)
    (line,) = capsys.readouterr().out.splitlines()
    assert "4 passes of 16 each" in line
    # What other models take counts too, and the settings of the run.
    assert with_fitting_micro_batch(config, SMALL, GPU, Ranks(), console, besides=10).micro_batch == 8
    again = settings(tmp_path, grad_checkpointing=True)
    assert with_fitting_micro_batch(again, SMALL, GPU, Ranks(), console).passes(1)[0] > 16


def test_the_rank_with_the_least_memory_decides(tmp_path, free):
    strategy = Strategy(precision="fp32", devices=2)
    needs = {size: make_plan(SMALL, size, strategy, passes=32 // size).total for size in (8, 32)}

    class Two(Ranks):
        """One of two ranks; the other has room for 8 images."""

        def __init__(self):
            self.world = 2

        def gather(self, value):
            return [value, needs[8] / 0.9 + 1]

    free(needs[32] / 0.9 + 1)
    cut = with_fitting_micro_batch(settings(tmp_path), SMALL, GPU, Two(), open_console(quiet=True))
    assert cut.passes(2) == (8, 4)


def test_a_cpu_and_a_given_micro_batch_stay(tmp_path, monkeypatch):
    def fail(device):
        raise AssertionError("asked for the memory of a GPU")

    monkeypatch.setattr("torch.cuda.mem_get_info", fail)
    console = open_console(quiet=True)
    for config, device in ((settings(tmp_path), CPU), (settings(tmp_path, micro_batch=32), GPU)):
        assert with_fitting_micro_batch(config, SMALL, device, Ranks(), console) is config


def test_nothing_fits(tmp_path, free):
    free(1000)
    with pytest.raises(ValueError, match="a micro_batch in the settings is tried without this check"):
        with_fitting_micro_batch(settings(tmp_path), SMALL, GPU, Ranks(), open_console(quiet=True))


class AskedError(Exception):
    """In place of a training."""


def test_trainings_ask_before_they_load_images(tmp_path, monkeypatch):
    def ask(config, architecture, device, ranks, console, **rest):
        raise AskedError(architecture, rest)

    for name in ("pretraining", "finetuning"):
        monkeypatch.setattr(f"denim.nim.{name}.with_fitting_micro_batch", ask)
    quiet = open_console(quiet=True)
    with pytest.raises(AskedError) as asked:
        pretrain(settings(tmp_path / "run", preset="micro", objective="mae", mask_ratio=0.5, device="cpu"), quiet)
    architecture, rest = asked.value.args
    assert architecture == preset("micro", objective="mae")
    assert rest == {"mask_ratio": 0.5}
    Autoencoder(preset("micro")).save_pretrained(tmp_path / "denoiser")
    config = FinetuneConfig(out=tmp_path / "run", denoiser=tmp_path / "denoiser", device="cpu", mixup_group=8)
    with pytest.raises(AskedError) as asked:
        finetune(config, quiet)
    architecture, rest = asked.value.args
    assert architecture.num_classes == 10
    assert rest["multiple_of"] == 8
    assert rest["besides"] == make_plan(preset("micro"), 1, Strategy()).weights
