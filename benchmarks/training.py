"""Denim's pretraining step and those that it is compared with, for `denim bench train`, gpu-check and `make bench`.

`denim` is what `denim pretrain` runs, by the same functions: `PretrainTask`, `begin`, `training_parts` and
`training_step`. The others are written as one would write them without Denim, with noise and loss as chains of PyTorch
operations (`benchmarks.baselines`), on the same architecture, weights and images:

- `published`: attention by plain products, AdamW that is not fused and takes one parameter after the other;
- `eager`: what a good engineer writes: SDPA, fused AdamW;
- `compiled`: the same, the whole model and its loss in one graph of torch.compile;
- `floor`: the matrix products and the attention of the model alone, forward and backward. No step can be faster.

All compute in the precision of the settings. In two respects the chains are better than published code: their images
are on the device before, and hidden patches are not embedded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from denim.benchmarks import baselines
from denim.benchmarks.timing import WrongResultError, check_clock, peak_memory, turns
from denim.kernels import attention, normal_noise
from denim.nim.attention import set_attention
from denim.nim.autoencoder import Autoencoder, Mask, preset
from denim.nim.block import set_lean
from denim.nim.cuda_graph import WARM_UP, check_capturable
from denim.nim.data import Batch
from denim.nim.engine import begin, keyed_torch, training_parts, training_step
from denim.nim.gpus import gpu_of_driver
from denim.nim.objectives import Objective
from denim.nim.precision import autocast, resolve_precision, tf32_products
from denim.nim.pretraining import PretrainTask
from denim.nim.ranks import Ranks
from denim.nim.settings import PretrainConfig
from denim.nim.sigma import Sigma

__all__ = [
    "BASELINES",
    "TOLERANCE",
    "Record",
    "Step",
    "Workload",
    "check_loss",
    "compare",
    "flops_per_image",
    "model_flops",
    "open_floor",
    "open_step",
    "peak_flops",
]

BASELINES = ("published", "eager", "compiled", "floor")
# Largest relative difference between the first losses of two steps. In float32 the order of sums differs, through some
# dozens of layers. Products in TF32 have inputs of 10 bits and in bfloat16 of 8; the loss averages over very many.
TOLERANCE = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}
UPDATES = 1000  # of an epoch of the images, which stand for an endless data set


class _Images:
    """A loader whose parts are all the same images, in memory, each time under other ids: so noise and masks differ."""

    def __init__(self, images: Tensor, steps_per_epoch: int) -> None:
        self.images = images
        self.steps_per_epoch = steps_per_epoch

    def batch(self, step: int) -> Batch:
        """The part with a number in its epoch."""
        count = len(self.images)
        return Batch(self.images, torch.zeros(count, dtype=torch.int64), torch.arange(count) + step * count)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        for step in range(start_step, self.steps_per_epoch):
            yield self.batch(step)

    def state(self) -> dict[str, Any]:
        return {"bad": {}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass


class Workload:
    """A pretraining on random images, in one process: what all steps of a comparison have in common.

    Args:
        config: the settings; `batch_size` is a number. The folders in it are not touched.
        device: to train on.

    Attributes:
        config: with a number for the warm-up.
        batch: images of an update.
        device: to train on.
        precision: fp32, tf32 or bf16.
        architecture: of the model.
        objective: how images are degraded.
        passes: forward passes of an update.
        loader: yields the parts of updates: uint8 (B, H, W, C), random bytes.

    Raises:
        ValueError: settings that do not fit together, no `batch_size`, or a device without the precision or graphs.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        if config.batch_size is None:
            raise ValueError("batch_size is None: there are no data that it could fit, so give a number")
        self.device = device
        self.batch: int = config.batch_size
        self.precision = resolve_precision(config.precision, device)
        check_capturable(config, device)
        self.config = config.for_data(UPDATES * self.batch)
        self.architecture = preset(
            config.preset,
            img_size=config.img_size,
            patch_size=config.patch_size,
            channels=config.channels,
            target=config.target,
            objective=config.objective,
        )
        self.objective = Objective.published(config.objective, config.sigma, config.mask_ratio)
        micro_batch, self.passes = config.passes(1)
        shape = (micro_batch, *self.architecture.img_size, self.architecture.channels)
        images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        if device.type == "cuda":
            images = images.pin_memory()  # as torch's DataLoader does
        self.loader = _Images(images, UPDATES * self.passes)

    def model(self) -> Autoencoder:
        """A model in training mode on the device, with the weights of the run's seed."""
        with keyed_torch(self.config.seed, torch.device("cpu")):
            model = Autoencoder(self.architecture)
        return model.to(self.device).train()

    def inputs(self) -> dict[str, Tensor]:
        """What the first part of the first update consists of, on the device: images, seeds and, but for MAE, sigma."""
        with torch.device("meta"):  # no weight is needed
            task = PretrainTask(Autoencoder(self.architecture), self.objective, self.config.seed)
        prepared = task.prepare(self.loader.batch(0), 0)
        return {name: tensor.to(self.device) for name, tensor in prepared.items()}


@dataclass
class Step:
    """One way to make an update.

    Attributes:
        run: makes an update.
        loss: the loss of given inputs (`Workload.inputs`) as the step computes it, under autocast, attached to its
            graph. With `exact`, on the noise of their seeds; otherwise a chain draws its own.
        model: what is trained.
        close: ends what the step has started.
    """

    run: Callable[[], None]
    loss: Callable[[dict[str, Tensor], bool], Tensor]
    model: Autoencoder
    close: Callable[[], None] = field(default=lambda: None)


def open_step(name: str, work: Workload, *, backend: str = "inductor") -> Step:
    """A step, with a model of its own that nothing has trained yet. Use it under `tf32_products`, and close it.

    Args:
        name: denim, published, eager or compiled.
        work: what it works on.
        backend: of torch.compile, for "compiled".

    Raises:
        ValueError: an unknown name.
    """
    if name == "denim":
        return _denim(work)
    if name == "published":
        return _chain(work, "math", {"foreach": False, "fused": False})
    if name == "eager":
        return _chain(work, "sdpa", {"fused": True})
    if name == "compiled":
        return _chain(work, "sdpa", {"fused": True}, backend)
    raise ValueError(f"unknown step {name!r}; choose denim, published, eager or compiled")


def _denim(work: Workload) -> Step:
    model = work.model()
    task = PretrainTask(model, work.objective, work.config.seed, work.config.precision)
    groups = param_groups_weight_decay(model, work.config.weight_decay)
    state = begin(work.config, task, groups, work.loader, Ranks(), UPDATES)
    model.train()
    parts = training_parts(state, task, work.loader)

    def loss(inputs: dict[str, Tensor], exact: bool) -> Tensor:
        with autocast(work.precision, work.device):
            value: Tensor = state.module(**inputs)
        return value

    return Step(lambda: training_step(state, parts), loss, model, parts.close)


class _Chain(nn.Module):
    """The loss of an objective by chains of PyTorch operations.

    Args:
        model: not lean, with the attention of the step.
        objective: what is lost.
    """

    def __init__(self, model: Autoencoder, objective: Objective) -> None:
        super().__init__()
        config = model.config
        self.model = model
        self.objective = objective
        self.visible = int(config.num_patches * (1 - objective.mask_ratio))
        device = next(model.parameters()).device
        self.mean, self.std = (torch.tensor(values, device=device) for values in (config.mean, config.std))

    def draw(self, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Levels (B,) and orders of patches (B, L) for `forward`, from torch's generator, as the objective needs."""
        sigma = order = None
        if self.objective.sigma is not None:
            sigma = _levels(self.objective.sigma, count, self.mean.device)
        if self.objective.name != "nim":
            order = torch.rand(count, self.model.config.num_patches, device=self.mean.device).argsort(dim=1)
        return sigma, order

    def forward(
        self, images: Tensor, sigma: Tensor | None, order: Tensor | None, noise: Tensor | None = None
    ) -> Tensor:
        """The loss of images uint8 (B, H, W, C), a scalar. Noise (B, C, H, W) is by default from torch's generator."""
        config = self.model.config
        pixel = {"mean": self.mean, "std": self.std, "patch_size": config.patch_size}
        if sigma is None:
            patches = baselines.patch_target(images, norm_pix=False, **pixel)
        else:
            patches = baselines.noisy_patches(images, sigma, noise=noise, **pixel)
        mask = None if order is None else Mask(order, self.visible)
        prediction = self.model(patches, mask)
        hidden = mask.hidden if mask is not None and self.objective.name == "mae" else None
        norm_pix = config.target == "norm"
        return baselines.reconstruction_loss(prediction, images, norm_pix=norm_pix, mask=hidden, **pixel)


def _levels(sigma: Sigma, count: int, device: torch.device) -> Tensor:
    """Noise levels (B,) of a distribution, by torch on the device."""
    values = [torch.full((), value, device=device) for value in sigma.values]
    if sigma.kind == "constant":
        return values[0].expand(count)
    if sigma.kind == "uniform":
        return torch.rand(count, device=device) * (values[1] - values[0]) + values[0]
    return torch.distributions.Gamma(values[0], 1 / values[1], validate_args=False).sample((count,))


def _chain(work: Workload, attention_backend: str, fusion: dict[str, bool], backend: str | None = None) -> Step:
    config, device = work.config, work.device
    model = work.model()
    set_lean(model, False)
    set_attention(model, attention_backend)
    chain = _Chain(model, work.objective)
    function: Callable[..., Tensor] = chain
    if backend is not None:
        function = torch.compile(chain, fullgraph=True, backend=backend)
    groups = param_groups_weight_decay(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, **fusion)
    images = work.loader.images.to(device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(work.passes):
            drawn = chain.draw(len(images))
            with autocast(work.precision, device):
                value = function(images, *drawn)
            if work.passes > 1:
                value = value / work.passes
            value.backward()
        optimizer.step()

    def loss(inputs: dict[str, Tensor], exact: bool) -> Tensor:
        seeds, sigma = inputs["seeds"], inputs.get("sigma")
        order = noise = None
        if work.objective.name != "nim":
            order = Mask.random(seeds, model.config.num_patches, work.objective.mask_ratio).order
        if exact and sigma is not None:
            noise = normal_noise(seeds, tuple(images.shape[1:])).permute(0, 3, 1, 2)
        with autocast(work.precision, device):
            # Noise as an argument would be another graph.
            return (chain if noise is not None else function)(inputs["images"], sigma, order, noise)

    return Step(run, loss, model)


def open_floor(work: Workload) -> Callable[[], None]:
    """A function that does what an update cannot do without: the products and the attention, forward and backward.

    The products come one after the other, each with a weight of its own, in the dtype of the precision.
    """
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    model, device = work.model(), work.device
    config, count = model.config, len(work.loader.images)
    weights: dict[nn.Module, Tensor] = {
        module: module.weight.detach().to(dtype).requires_grad_()
        for module in model.modules()
        if isinstance(module, nn.Linear)
    }
    embedding = model.patch_embed.proj.weight.detach().flatten(1).to(dtype).requires_grad_()
    used = [embedding, *weights.values()]
    hides = work.objective.name != "nim"
    seen = int(config.num_patches * (1 - work.objective.mask_ratio)) if hides else config.num_patches
    patches = torch.randn(count, seen, config.patch_dim, device=device, dtype=dtype)
    # What a class token and mask tokens add is not a product.
    first = torch.randn(count, 1, config.embed_dim, device=device, dtype=dtype)
    hidden = torch.randn(count, config.num_patches - seen, config.decoder_embed_dim, device=device, dtype=dtype)
    upstream = torch.randn(count, config.num_patches, config.patch_dim, device=device, dtype=dtype)

    def linear(module: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, weights[module])

    def blocks(modules: nn.ModuleList, x: Tensor) -> Tensor:
        for block in modules:
            part: Any = block
            heads = part.attn.num_heads
            packed = linear(part.attn.qkv, x).unflatten(-1, (3, heads, -1))
            mixed = attention(*(each.transpose(1, 2) for each in packed.unbind(2)))
            x = linear(part.attn.proj, mixed.transpose(1, 2).flatten(-2))
            x = linear(part.mlp.fc2, linear(part.mlp.fc1, x))
        return x

    def run() -> None:
        x = torch.cat((first, F.linear(patches, embedding)), dim=1)
        x = linear(model.decoder_embed, blocks(model.blocks, x))
        x = blocks(model.decoder_blocks, torch.cat((x, hidden), dim=1) if hides else x)
        for _ in torch.autograd.grad(linear(model.decoder_pred, x)[:, 1:], used, upstream):
            pass

    def passes() -> None:
        for _ in range(work.passes):
            run()

    return passes


def check_loss(step: Step, reference: Step, work: Workload) -> float:
    """The relative difference between the first losses of a step and of Denim's, on the same images, noise and masks.

    A graph of torch.compile takes no noise, so it is compared at noise levels of 0, and the other steps also there.

    Args:
        step: that nothing has trained yet.
        reference: Denim's, likewise.
        work: of both.

    Returns:
        The larger of the two differences. It should be at most `TOLERANCE[work.precision]`.
    """
    worst, inputs = 0.0, work.inputs()
    for exact in (True, False):
        given = inputs if exact or "sigma" not in inputs else inputs | {"sigma": torch.zeros_like(inputs["sigma"])}
        got, expected = step.loss(given, exact).item(), reference.loss(given, exact).item()
        error = abs(got / expected - 1)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def model_flops(model: Autoencoder, loss: Callable[[], Tensor]) -> int:
    """Floating point operations of the matrix products of one forward and backward pass.

    Args:
        model: that is trained, as it was made: its attention is "auto", and it is lean.
        loss: computes it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Plain products, since the backward of fused attention computes products again, and some kernels are not counted:
    # the counter does not see into operators of Denim's.
    set_attention(model, "math")
    set_lean(model, False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss().backward()
    set_attention(model, "auto")
    set_lean(model, True)
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


def flops_per_image(work: Workload) -> float:
    """Floating point operations of the matrix products of a forward and backward pass, for one image."""
    model = work.model()
    inputs = {name: tensor[:1] for name, tensor in work.inputs().items()}
    task = PretrainTask(model, work.objective, work.config.seed)
    return model_flops(model, lambda: task(**inputs))


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that the maker of a GPU states; None for a device that is not in the table."""
    gpu = gpu_of_driver(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.peak(precision)


@dataclass(frozen=True)
class Record:
    """What was measured of a step.

    Attributes:
        name: of the step.
        seconds: of each turn, for one update.
        images_per_second: of the median turn.
        error: relative difference of the first loss to Denim's; None for the floor, and 0 for Denim's.
        peak_bytes: allocated at once by an update, beyond weights and optimizer; None if it was not measured.
        method: how a turn was timed.
        utilisation: model FLOPs over the peak of the device, from 0 to 1; None where that is unknown.
    """

    name: str
    seconds: list[float]
    images_per_second: float
    error: float | None
    peak_bytes: int | None
    method: str
    utilisation: float | None


def compare(
    config: PretrainConfig,
    device: torch.device,
    against: Sequence[str] = BASELINES,
    *,
    rounds: int = 10,
    memory: bool = True,
    clock: str = "wall",
    report: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Check that all steps begin with the same loss, then time them in turns, and measure their memory.

    Args:
        config: the settings of Denim's step.
        device: to train on.
        against: the others, of `BASELINES`.
        rounds: turns of every step, after two updates that are not counted.
        memory: whether memory is measured too.
        clock: see `measure`.
        report: is told what is being done.

    Returns:
        Denim's first.

    Raises:
        ValueError: settings that do not fit together, an unknown name, fewer rounds than one, or see `check_clock`.
        WrongResultError: a step begins with another loss.
    """
    check_clock(clock, device)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if unknown := [name for name in against if name not in BASELINES]:
        raise ValueError(f"unknown step {unknown[0]!r}; choose among {', '.join(BASELINES)}")
    work = Workload(config, device)
    names = ("denim", *dict.fromkeys(against))
    with ExitStack() as stack, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        stack.enter_context(tf32_products(work.precision == "tf32"))
        flops = flops_per_image(work)
        steps: dict[str, Step] = {}
        errors: dict[str, float] = {}
        updates: dict[str, Callable[[], None]] = {}
        for name in names:
            report(f"{name}: building and checking")
            if name == "floor":
                updates[name] = open_floor(work)
                continue
            step = steps[name] = open_step(name, work)
            stack.callback(step.close)
            updates[name] = step.run
            error = errors[name] = check_loss(step, steps["denim"], work)
            if not error <= TOLERANCE[work.precision]:  # written so that NaN fails
                raise WrongResultError(
                    f"{name}: the first loss differs from Denim's by {error:.3g} of it, more than "
                    f"{TOLERANCE[work.precision]:g}; no time is given"
                )
        for name, run in updates.items():
            report(f"{name}: first updates")
            for _ in range(2 + (WARM_UP if config.cuda_graph and name == "denim" else 0)):
                run()
        report(f"timing {rounds} rounds")
        times, method = turns(updates, device, rounds, clock)
        peaks: dict[str, int] = {}
        for name, run in updates.items() if memory else ():
            report(f"{name}: measuring the memory")
            if name in steps:
                steps[name].model.zero_grad(set_to_none=True)  # else the update would begin by freeing them
            peaks[name] = peak_memory(run, device)
        peak = peak_flops(device, work.precision)
    records = []
    for name in names:
        rate = work.batch / statistics.median(times[name])
        share = None if peak is None or name == "floor" else flops * rate / peak
        records.append(Record(name, times[name], rate, errors.get(name), peaks.get(name), method, share))
    return records
