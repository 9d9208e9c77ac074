"""Defended images and attack steps per second of a De3, for `denim bench defend` and `make bench`.

Both tasks are at several noise levels, in two ways that compute the same from the same draws:

- `batched`: the levels share their passes. Images are defended by `De3.sweep`; an attack searches for the images of all
  levels at once, as an evaluation does.
- `looped`: one level after the other, each by calls of its own.

Draws share a pass in both. An attack is PGD by `denim.defense.attacks.search.Search`, on cross entropy.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from denim.benchmarks.timing import WrongResultError, check_clock, peak_memory, turns
from denim.benchmarks.training import peak_flops
from denim.defense.attacks.balls import Ball
from denim.defense.attacks.rules import Pgd, Seen, State
from denim.defense.attacks.search import Items, Search
from denim.defense.de3 import De3
from denim.kernels import Domain
from denim.nim.attention import set_attention
from denim.nim.precision import precise, resolve_precision

__all__ = ["TASKS", "TOLERANCE", "WAYS", "Record", "Workload", "compare", "flops"]

TASKS = ("defend", "attack")
WAYS = ("batched", "looped")
# Largest difference of batched to looped logits or gradients, as a share of the norm of all. In float32 the order of
# sums in a product depends on the batch. Inputs of products have 10 bits in TF32 and 8 in bfloat16, and a gradient goes
# through dozens of layers.
TOLERANCE = {"fp32": 1e-3, "tf32": 3e-2, "bf16": 1e-1}
STEPS = 2  # of an attack, per call
EPSILON = 8 / 255  # of an attack; the speed does not depend on it


@dataclass
class Workload:
    """Images at several noise levels.

    Attributes:
        defense: that is measured, in evaluation mode; its sigma is set to the levels in turn.
        pixels: (B, C, H, W) in [0, 1], on its device.
        labels: int64 (B,), for the loss of the attack.
        sigmas: S noise levels in 0-255 pixel levels.
        draws: answers of each image at each level, and draws of each gradient of the attack.
        max_batch: images in a pass, draws counted.
    """

    defense: De3
    pixels: Tensor
    labels: Tensor
    sigmas: tuple[float, ...]
    draws: int = 4
    max_batch: int = 256
    ids: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not len(self.pixels) or not self.sigmas or self.draws < 1 or self.max_batch < 1:
            raise ValueError(
                "images, levels, draws and max_batch must be at least 1, got "
                f"{len(self.pixels)}, {len(self.sigmas)}, {self.draws}, {self.max_batch}"
            )
        if self.defense.degrade == "mask":
            raise ValueError('degrade="mask" has no noise levels to batch')
        self.ids = torch.arange(len(self.pixels), device=self.pixels.device)

    @property
    def device(self) -> torch.device:
        """Of the images."""
        return self.pixels.device

    def count(self, task: str) -> int:
        """Answers, or attack steps of single images, of one call."""
        return len(self.sigmas) * len(self.pixels) * (self.draws if task == "defend" else STEPS)

    def passes(self, task: str, way: str) -> int:
        """Passes through the networks of one call."""
        images, levels = len(self.pixels), len(self.sigmas)
        if task == "attack":
            slots = max(1, self.max_batch // (self.draws * self.defense.draws))
            each = -(-images * levels // slots) if way == "batched" else levels * -(-images // slots)
            return STEPS * each
        rows = self.draws * self.defense.draws
        blocks = _blocks(levels if way == "batched" else 1, rows, images, self.max_batch)
        return blocks * (1 if way == "batched" else levels)


def _blocks(levels: int, rows: int, images: int, max_batch: int) -> int:
    """Passes of `De3.sweep`."""
    level = min(levels, max_batch)
    row = min(rows, max(1, max_batch // level))
    image = min(images, max(1, max_batch // (level * row)))
    return -(-levels // level) * -(-rows // row) * -(-images // image)


class _Compiled:
    """A De3 whose draws are computed by compiled code."""

    is_random = True

    def __init__(self, defense: De3, backend: str) -> None:
        self.defense, self.seeds = defense, defense.seeds
        self.draw_logits = _compiled(defense.draw_logits, backend)


def _compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """A function as one graph: parts that stayed eager would be timed as compiled ones.

    The result raises ValueError where that cannot be.
    """
    graph = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    def call(*arguments: Any, **options: Any) -> Tensor:
        try:
            found: Tensor = graph(*arguments, **options)
        except Unsupported as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"this defense is no single graph of torch.compile ({reason}): leave out --compile"
            ) from None
        return found

    return call


@dataclass(frozen=True)
class _Recording(Pgd):
    """PGD that keeps the gradients of its first step."""

    first: list[Tensor] = field(default_factory=list)

    def move(self, state: State, seen: Seen) -> None:
        assert seen.gradient is not None
        self.first.append(seen.gradient[seen.step == 0])
        super().move(state, seen)


def _defended(work: Workload, way: str, sweep: Callable[..., Tensor]) -> Tensor:
    """Logits (S, draws, B, K)."""
    seeds = work.defense.seeds(0, Domain.SCORE, work.ids, work.draws)
    given = {"seeds": seeds, "max_batch": work.max_batch}
    if way == "batched":
        return sweep(work.pixels, work.sigmas, work.draws, **given)
    return torch.cat([sweep(work.pixels, (sigma,), work.draws, **given) for sigma in work.sigmas])


def _attacked(work: Workload, way: str, target: Any, rule: Pgd) -> None:
    """Steps of an attack at all levels."""
    slots = max(1, work.max_batch // (work.draws * work.defense.draws))
    search = Search(rule, "ce", work.draws, slots)
    groups = [work.sigmas] if way == "batched" else [(sigma,) for sigma in work.sigmas]
    for group in groups:
        levels = torch.tensor(group, device=work.device).repeat_interleave(len(work.pixels))
        repeated = [
            column.repeat(len(group), *(1,) * (column.dim() - 1)) for column in (work.pixels, work.labels, work.ids)
        ]
        search.run(target, Items(repeated[0], repeated[1], repeated[1], repeated[2], levels), 0)


@dataclass(frozen=True)
class _Variant:
    task: str
    way: str
    precision: str
    compiled: bool

    @property
    def name(self) -> str:
        return f"{self.task}, {self.way}, {self.precision}{', compiled' if self.compiled else ''}"


def _open(work: Workload, variant: _Variant, backend: str) -> tuple[Callable[[], object], Callable[[], Tensor]]:
    """A call to time, and one that gives what is compared: logits, or gradients of the first step."""
    ball, device = Ball(EPSILON), work.device
    compiled = variant.compiled
    target: Any = _Compiled(work.defense, backend) if compiled else work.defense
    sweep = _compiled(work.defense.sweep, backend) if compiled else work.defense.sweep

    def run() -> object:
        with precise(variant.precision, device):
            if variant.task == "defend":
                return _defended(work, variant.way, sweep)
            _attacked(work, variant.way, target, Pgd(ball, STEPS))
            return None

    def result() -> Tensor:
        with precise(variant.precision, device):
            if variant.task == "defend":
                return _defended(work, variant.way, sweep)
            rule = _Recording(ball, STEPS)
            _attacked(work, variant.way, target, rule)
            return torch.cat(rule.first)

    return run, result


def flops(work: Workload, task: str) -> int:
    """Floating point operations of the matrix products and convolutions of one answer for one image, or of a gradient.

    Args:
        work: what is measured.
        task: "defend" or "attack".
    """
    # The counter sees plain products alone, and the user's modules are left as they are.
    defense = copy.deepcopy(work.defense)
    with suppress(ValueError):  # no attention of Denim's
        set_attention(defense, "math")
    pixels = work.pixels[:1].clone().requires_grad_(task == "attack")
    seeds = defense.seeds(0, Domain.SCORE, work.ids[:1])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if task == "defend":
            with torch.no_grad():
                defense.draw_logits(pixels, seeds)
        else:
            torch.autograd.grad(defense.draw_logits(pixels, seeds).logsumexp(-1).sum(), pixels)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Record:
    """What was measured.

    Attributes:
        task: "defend" or "attack".
        way: "batched" or "looped".
        precision: fp32, tf32 or bf16.
        compiled: whether by torch.compile.
        seconds: of each turn, for one call.
        rate: of the median turn: answers, or attack steps of single images, per second.
        error: difference of the logits, or of the first gradients, to those of `looped` in the first precision, as a
            share of their norm.
        peak_bytes: allocated at once by a call; None if it was not measured.
        passes: through the networks, of a call.
        least_bytes: that a call must move at least: the weights, once in each pass and again in its backward pass, the
            pixels and the logits.
        flops: of the products and convolutions of a call.
        method: how a turn was timed.
        utilisation: operations per second over the peak of the device, from 0 to 1; None where that is unknown.
    """

    task: str
    way: str
    precision: str
    compiled: bool
    seconds: list[float]
    rate: float
    error: float
    peak_bytes: int | None
    passes: int
    least_bytes: int
    flops: int
    method: str
    utilisation: float | None


def _difference(found: Tensor, expected: Tensor) -> float:
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf


def _least_bytes(work: Workload, task: str, way: str, classes: int) -> int:
    weights = sum(weight.numel() * weight.element_size() for weight in work.defense.parameters())
    images = work.pixels.numel() * work.pixels.element_size() * len(work.sigmas)
    if task == "defend":
        return work.passes(task, way) * weights + images + 4 * work.count(task) * classes
    # Iterates are read, and read and written again by the step.
    return 2 * work.passes(task, way) * weights + 3 * STEPS * images


def compare(
    work: Workload,
    *,
    tasks: Sequence[str] = TASKS,
    precisions: Sequence[str] = ("fp32", "bf16"),
    compile: bool = False,
    backend: str = "inductor",
    rounds: int = 10,
    memory: bool = True,
    clock: str = "wall",
    report: Callable[[str], None] = lambda text: None,
) -> list[Record]:
    """Check that all ways have the same results, then time them in turns, and measure their memory.

    Args:
        work: what is computed.
        tasks: of `TASKS`.
        precisions: fp32, tf32, bf16 or auto; the first is what others are compared with.
        compile: also the batched way by torch.compile.
        backend: of torch.compile.
        rounds: turns of every row.
        memory: whether memory is measured too.
        clock: see `measure`.
        report: is told what is being done.

    Returns:
        By task, by precision: batched, batched and compiled, looped.

    Raises:
        ValueError: an unknown task or precision, fewer rounds than one, or see `check_clock`.
        WrongResultError: the batched way has other results than the looped one in the same precision.
    """
    check_clock(clock, work.device)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not tasks or not precisions:
        raise ValueError(f"give at least one task and one precision, got {tasks!r} and {precisions!r}")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"unknown task {unknown[0]!r}; choose among {', '.join(TASKS)}")
    names = list(dict.fromkeys(resolve_precision(name, work.device) for name in precisions))
    variants = [
        _Variant(task, way, precision, compiled)
        for task in dict.fromkeys(tasks)
        for precision in names
        for way, compiled in (("batched", False), *((("batched", True),) if compile else ()), ("looped", False))
    ]
    sigma = work.defense.sigma
    work.defense.sigma = max(work.sigmas)
    try:
        runs: dict[str, Callable[[], object]] = {}
        errors: dict[str, float] = {}
        expected: dict[tuple[str, str], Tensor] = {}
        for variant in sorted(variants, key=lambda each: each.way == "batched"):  # the looped ones first
            report(f"{variant.name}: checking")
            runs[variant.name], result = _open(work, variant, backend)
            found = result()
            own = expected.setdefault((variant.task, variant.precision), found)
            if not (error := _difference(found, own)) <= TOLERANCE[variant.precision]:  # written so that NaN fails
                what = "logits" if variant.task == "defend" else "gradients"
                raise WrongResultError(
                    f"{variant.name}: its {what} differ from those of looped levels by {error:.3g} of their norm, more "
                    f"than {TOLERANCE[variant.precision]:g}; no time is given"
                )
            errors[variant.name] = _difference(found, expected[variant.task, names[0]])
        with torch.no_grad():
            classes = int(work.defense(work.pixels[:1]).shape[1])
        report(f"timing {rounds} rounds")
        times, method = turns({each.name: runs[each.name] for each in variants}, work.device, rounds, clock)
        each_flops = {task: flops(work, task) for task in dict.fromkeys(tasks)}
        records = []
        for variant in variants:
            if memory:
                report(f"{variant.name}: measuring the memory")
            seconds = statistics.median(times[variant.name])
            answers = work.count(variant.task) * (1 if variant.task == "defend" else work.draws)
            total = each_flops[variant.task] * answers
            peak = peak_flops(work.device, variant.precision)
            records.append(
                Record(
                    variant.task,
                    variant.way,
                    variant.precision,
                    variant.compiled,
                    times[variant.name],
                    work.count(variant.task) / seconds,
                    errors[variant.name],
                    peak_memory(runs[variant.name], work.device) if memory else None,
                    work.passes(variant.task, variant.way),
                    _least_bytes(work, variant.task, variant.way, classes),
                    total,
                    method,
                    None if peak is None else total / seconds / peak,
                )
            )
        return records
    finally:
        work.defense.sigma = sigma
