"""`denim bench`."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.table import Table

    from denim.benchmarks import defense, training
    from denim.benchmarks import kernels as bench

COMMANDS = {
    "kernels": "time the fused operations beside PyTorch, torch.compile and a naive kernel",
    "train": "time a pretraining step of your settings beside published, eager and compiled PyTorch",
    "defend": "time a defense of your models and attacks on it, all noise levels in a batch beside one after the other",
    "data": "time the loaders on your images beside torchvision and DALI's own reader",
}


# Headings of the table of `denim bench kernels` behind the case, and what stands under them.
COLUMNS = {
    "images": "images of a call",
    "shape": "the first input and the result; levels and draws stand in front of the images",
    "ms": "best time of the fused operation",
    "median": "its median time, ms",
    "GB/s": "the bytes that it must move at least, over its best time",
    "copy": "time of a copy of as many bytes, over its best time",
    "chain": "how many times as long the chain of PyTorch operations takes",
    "compiled": "likewise the chain under torch.compile",
    "naive": "likewise a kernel that is written naively",
    "MB": "allocated at once by the fused operation",
    "chain's": "likewise by the chain, MB",
}
# Steps of `denim bench train`, in words, and the headings of its table behind them.
STEPS = {
    "denim": "what `denim pretrain` runs, by the same functions, its inputs included",
    "published": "attention by plain products, AdamW that is not fused, noise and loss as chains of operations",
    "eager": "a good engineer's: SDPA, fused AdamW, noise and loss as chains of operations",
    "compiled": "the same, model and loss in one graph of torch.compile",
    "floor": "the model's matrix products and attention alone, forward and backward",
}
RATES = {
    "images/s": "of the median turn",
    "ms": "the median turn, one update",
    "Denim's speed": "Denim's images/s over those of this step",
    "of the floor": "the floor's time over the time of this step",
    "MB": "allocated at once by an update, beyond weights and optimizer",
    "Denim's memory": "Denim's MB over those of this step",
    "of the peak": "operations of the model's products per second over what the GPU's data sheet states",
}
# Headings of the table of `denim bench defend` behind the row.
DEFENDED = {
    "/s": "in the median turn: answers, one for each image, level and draw; or attack steps of single images",
    "ms": "the median turn, one call",
    "speed": "this row's /s over those of looped levels in the first precision",
    "off by": "logits, or first gradients, less those of looped levels in the first precision: the share of their norm",
    "MB": "allocated at once by a call",
    "passes": "through the networks, of a call",
    "MB to move": "by a call at least: weights once in each pass, and again in its backward pass; pixels; logits",
    "GFLOP": "of the products and convolutions of a call",
    "GFLOP/s": "the same in a second of the median turn",
    "of the peak": "the same over what the GPU's data sheet states",
}
# Seconds between two lines of progress, where there is no terminal.
EVERY = 10.0


def _versus(record: bench.Record, name: str) -> str:
    return f"{record.ratios[name]:.2f}x{' <' if name in record.faster else ''}" if name in record.ratios else "-"


def _table(records: Sequence[bench.Record], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, box=None)
    table.add_column("case", min_width=24, overflow="fold")
    for heading in COLUMNS:
        left = heading == "shape"
        table.add_column(
            heading, justify="left" if left else "right", no_wrap=not left, overflow="fold" if left else "ellipsis"
        )
    for record in records:
        table.add_row(
            record.case,
            str(record.batch),
            record.shape,
            f"{record.best_seconds['fused'] * 1e3:.3f}",
            f"{record.median_seconds['fused'] * 1e3:.3f}",
            f"{record.gigabytes_per_second:.1f}",
            f"{record.copy_share:.0%}",
            *(_versus(record, name) for name in ("chain", "compiled", "naive")),
            *(f"{record.peak_bytes[name] / 1e6:.1f}" for name in ("fused", "chain")),
        )
    return table


def _explained(records: Sequence[bench.Record]) -> list[str]:
    """The lines under the table."""
    lines = [f"{heading}: {what}" for heading, what in COLUMNS.items()]
    slower = [record for record in records if record.faster]
    lines.append(f"<: the baseline is faster than the fused operation: in {len(slower)} of {len(records)} rows")
    methods: dict[str, set[str]] = {}
    for record in records:
        for name, method in record.methods.items():
            methods.setdefault(method, set()).add(name)
    for method, names in methods.items():
        lines.append(f"times of {', '.join(sorted(names))}: {method}")
    lines.append(f"caches: {'L2 overwritten before every call' if records[0].cold else 'as the call before left them'}")
    return lines


def kernels(
    device: str = "auto",
    only: tuple[str, ...] = (),
    batch: int | None = None,
    seconds: float = 1.0,
    compile: bool = True,
    cold: bool = False,
    json: Path | None = None,
) -> None:
    """Check the fused operations against chains of PyTorch operations, then time both.

    The lines under the table say what its columns are and how the times were taken.

    Args:
        device: Device to measure on: auto (a GPU where there is one), cpu or cuda.
        only: Words; only cases with one of them in their names are run. Without it, all are.
        batch: Images of 224 x 224 per call, and sixteen times as many of 32 x 32; without it, 16 on a CPU and 256 on a
            GPU.
        seconds: Time to measure each case for, in seconds.
        compile: Also time the chain of operations under torch.compile.
        cold: Overwrite the L2 cache of the GPU before every call.
        json: JSON file that gets everything that was measured.
    """
    from denim.benchmarks import kernels as bench
    from denim.benchmarks.timing import environment
    from denim.nim.files import atomic_write
    from denim.nim.settings import pick_device
    from denim.nim.text import open_console, printable

    console = open_console()
    if not console.is_terminal:  # a pipe has no width: rich would take 80 columns and cut the table
        console = open_console(width=210)
    where = pick_device(device)
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"--json {json}: there is no folder {json.parent}")
    made = environment(where)
    total, done, said = len(bench.select(only)), 0, time.monotonic()
    with console.status(f"0 of {total} cases") as status:

        def report(record: bench.Record) -> None:
            nonlocal done, said
            done += 1
            text = f"{done} of {total} cases checked and timed, the last: {record.case}"
            status.update(text)
            if not console.is_terminal and time.monotonic() - said >= EVERY:
                print(text, file=sys.stderr, flush=True)
                said = time.monotonic()

        try:
            records = bench.run(where, only, batch, seconds=seconds, compile=compile, cold=cold, report=report)
        except bench.WrongResultError as error:
            print(f"denim: {error}", file=sys.stderr)
            raise SystemExit(1) from None
    if json is not None:  # before anything is printed: what was measured must not be lost with the terminal
        content = {"environment": made, "records": [dataclasses.asdict(record) for record in records]}
        with atomic_write(json) as staged:
            staged.write_text(dumps(content, indent=1) + "\n")
    title = ", ".join(f"{name} {value}" for name, value in made.items())
    console.print(_table(records, title))
    for line in _explained(records):
        console.print(line, soft_wrap=True)
    for name, reason in sorted({pair for record in records for pair in record.absent.items()}):
        console.print(f"{name}: {printable(reason)}")
    if json is not None:
        console.print(f"written: {printable(json)}")


def _steps_table(records: Sequence[training.Record], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, box=None)
    table.add_column("step", no_wrap=True)
    for heading in RATES:
        table.add_column(heading, justify="right", no_wrap=True)
    named = {record.name: record for record in records}
    denim, floor = named["denim"], named.get("floor")
    for record in records:
        memory = (record.peak_bytes, denim.peak_bytes)
        table.add_row(
            record.name,
            f"{record.images_per_second:.1f}",
            f"{statistics.median(record.seconds) * 1e3:.1f}",
            "-" if record in (denim, floor) else f"{denim.images_per_second / record.images_per_second:.2f}x",
            "-" if floor is None else f"{record.images_per_second / floor.images_per_second:.2f}",
            "-" if memory[0] is None else f"{memory[0] / 1e6:.1f}",
            "-" if record in (denim, floor) or not memory[0] or memory[1] is None else f"{memory[1] / memory[0]:.2f}x",
            "-" if record.utilisation is None else f"{record.utilisation:.1%}",
        )
    return table


def train(
    preset: str = "base",
    img_size: int | None = None,
    patch_size: int | None = None,
    channels: int | None = None,
    objective: str = "nim",
    target: str = "norm",
    mask_ratio: float = 0.75,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    lean: bool = True,
    compile: bool | None = None,
    cuda_graph: bool = False,
    grad_checkpointing: bool = False,
    against: tuple[str, ...] = ("published", "eager", "compiled", "floor"),
    rounds: int = 10,
    memory: bool = True,
    clock: str = "wall",
    json: Path | None = None,
) -> None:
    """Time a pretraining step of your settings beside published, eager and compiled PyTorch, and a floor.

    All steps must begin with the same loss. Then they take turns in one process. The images are random bytes in memory:
    `denim bench data` times loaders.

    Args:
        preset: Size of the model: micro, mini, tiny, small, base, large or huge.
        img_size: Side of the images in pixels; without it, that of the preset.
        patch_size: Side of the patches in pixels; without it, that of the preset.
        channels: Channels of the images, 1 or 3; without it, those of the preset.
        objective: What is learnt: nim (remove noise), mae (fill in hidden patches) or dmae (both).
        target: Target of the loss: norm (each patch normalised by its own mean and variance) or raw pixels.
        mask_ratio: Share of hidden patches, for mae and dmae.
        batch_size: Images per update; without it, 8 on a CPU and 256 on a GPU.
        micro_batch: Images per forward pass; without it, all of an update.
        device: Device to train on: auto (a GPU where there is one) or a torch device such as cpu or cuda:0.
        precision: Precision of all steps: fp32, tf32, bf16, or auto: bf16 where a GPU has it, else fp32.
        lean: Of Denim's step, as in `denim pretrain`.
        compile: Of Denim's step, as in `denim pretrain`.
        cuda_graph: Of Denim's step, as in `denim pretrain`.
        grad_checkpointing: Of Denim's step, as in `denim pretrain`.
        against: Other steps: published, eager, compiled, floor.
        rounds: Turns of every step.
        memory: Also measure the memory.
        clock: On a CPU, wall, or processor: the processor time of one thread, for busy machines (OMP_NUM_THREADS=1).
        json: JSON file that gets everything that was measured.
    """
    from denim.benchmarks.timing import WrongResultError, environment
    from denim.benchmarks.training import compare
    from denim.nim import PretrainConfig
    from denim.nim.files import atomic_write
    from denim.nim.precision import resolve_precision
    from denim.nim.settings import pick_device
    from denim.nim.text import open_console, printable

    console = open_console()
    if not console.is_terminal:
        console = open_console(width=150)
    where = pick_device(device)
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"--json {json}: there is no folder {json.parent}")
    config = PretrainConfig(
        out=Path("bench"),  # nothing is written there
        preset=preset,
        img_size=img_size,
        patch_size=patch_size,
        channels=channels,
        objective=objective,
        target=target,
        mask_ratio=mask_ratio,
        batch_size=batch_size or (256 if where.type == "cuda" else 8),
        micro_batch=micro_batch,
        device=device,
        precision=precision,
        lean=lean,
        compile=compile,
        cuda_graph=cuda_graph,
        grad_checkpointing=grad_checkpointing,
    )
    made = environment(where)
    with console.status("") as status:

        def report(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                print(text, file=sys.stderr, flush=True)

        try:
            records = compare(config, where, against, rounds=rounds, memory=memory, clock=clock, report=report)
        except WrongResultError as error:
            print(f"denim: {error}", file=sys.stderr)
            raise SystemExit(1) from None
    if json is not None:  # before anything is printed: what was measured must not be lost with the terminal
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
        content = {
            "environment": made,
            "settings": settings,
            "records": [dataclasses.asdict(record) for record in records],
        }
        with atomic_write(json) as staged:
            staged.write_text(dumps(content, indent=1) + "\n")
    made |= {"precision": resolve_precision(precision, where), "preset": preset, "batch": config.batch_size}
    console.print(_steps_table(records, ", ".join(f"{name} {value}" for name, value in made.items())))
    for name in (record.name for record in records):
        console.print(f"{name}: {STEPS[name]}", soft_wrap=True)
    for heading, what in RATES.items():
        console.print(f"{heading}: {what}", soft_wrap=True)
    console.print(f"times: {records[0].method}; {rounds} turns of each step", soft_wrap=True)
    if json is not None:
        console.print(f"written: {printable(json)}")


def _defended_table(records: Sequence[defense.Record], title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, box=None)
    table.add_column("row", no_wrap=True)
    for heading in DEFENDED:
        table.add_column(heading, justify="right", no_wrap=True)
    looped: dict[str, float] = {}
    for record in records:
        if record.way == "looped":
            looped.setdefault(record.task, record.rate)
    for record in records:
        seconds = statistics.median(record.seconds)
        table.add_row(
            ", ".join((record.task, record.way, record.precision, *(("compiled",) if record.compiled else ()))),
            f"{record.rate:.1f}",
            f"{seconds * 1e3:.1f}",
            f"{record.rate / looped[record.task]:.2f}x",
            f"{record.error:.1e}",
            "-" if record.peak_bytes is None else f"{record.peak_bytes / 1e6:.1f}",
            str(record.passes),
            f"{record.least_bytes / 1e6:.1f}",
            f"{record.flops / 1e9:.2f}",
            f"{record.flops / 1e9 / seconds:.1f}",
            "-" if record.utilisation is None else f"{record.utilisation:.1%}",
        )
    return table


def defend(
    classifier: str | None = None,
    denoiser: str | None = None,
    model: str | None = None,
    weights: Path | None = None,
    preset: str = "base",
    img_size: int | None = None,
    sigmas: tuple[float, ...] = (0.0, 35.0, 70.0, 105.0, 140.0),
    draws: int = 4,
    batch_size: int | None = None,
    max_batch: int = 256,
    tasks: tuple[str, ...] = ("defend", "attack"),
    precisions: tuple[str, ...] = ("fp32", "bf16"),
    compile: bool = False,
    device: str = "auto",
    rounds: int = 10,
    memory: bool = True,
    clock: str = "wall",
    json: Path | None = None,
) -> None:
    """Time De3 before your classifier, and attacks on it: all noise levels in a batch beside one after the other.

    Both ways must have the same logits and gradients, from the same draws. Then they take turns in one process. The
    images are random.

    Args:
        classifier: The classifier: folder of a model or a run, name of a model that ships with Denim, or owner/name on
            the Hugging Face hub.
        denoiser: The denoiser, likewise; without it, with a classifier or a model, the defense is noise alone.
        model: Another classifier in place of --classifier: package.module:factory or timm:NAME, as in `denim evaluate`.
        weights: A .pt or .safetensors file for --model.
        preset: Without --classifier and --model, size of a denoiser and a classifier of random weights: micro, mini,
            tiny, small, base, large or huge.
        img_size: Side of the images, for a model that does not say it.
        sigmas: Noise levels, in 0-255 pixel levels.
        draws: Answers of each image at each level, and draws of each gradient.
        batch_size: Images; without it, 4 on a CPU and 64 on a GPU.
        max_batch: Images per pass, levels and draws counted.
        tasks: What is timed: defend, attack.
        precisions: Precisions of the networks: fp32, tf32, bf16 or auto; the first is what others are compared with.
        compile: Also time batched levels by torch.compile, in one graph.
        device: Device to compute on: auto (a GPU where there is one) or a torch device such as cpu or cuda:0.
        rounds: Turns of every row.
        memory: Also measure the memory.
        clock: On a CPU, wall, or processor: the processor time of one thread, for busy machines (OMP_NUM_THREADS=1).
        json: JSON file that gets everything that was measured.
    """
    import torch
    from torch import nn

    from denim.benchmarks.defense import Workload, compare
    from denim.benchmarks.timing import WrongResultError, environment
    from denim.defense import De3
    from denim.defense.generators import keyed_generators
    from denim.defense.targets import input_size, open_target
    from denim.nim import Autoencoder, Classifier, ClassifierConfig
    from denim.nim import preset as architecture
    from denim.nim.files import atomic_write
    from denim.nim.settings import pick_device
    from denim.nim.text import open_console, printable

    console = open_console()
    if not console.is_terminal:
        console = open_console(width=160)
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"--json {json}: there is no folder {json.parent}")
    if classifier is not None and model is not None:
        raise ValueError("give --classifier or --model, not both")
    if weights is not None and model is None:
        raise ValueError("--weights needs --model")
    where = pick_device(device)
    rebuild = None if denoiser is None else Autoencoder.from_pretrained(denoiser)
    subject: nn.Module
    if classifier is not None:
        subject = Classifier.from_pretrained(classifier)
    elif model is not None:
        subject = open_target(model, weights)
        if not isinstance(subject, nn.Module):
            raise ValueError(f"{model} gives a {type(subject).__name__}, which is no module: De3 stands before modules")
    else:
        config = architecture(preset, img_size=img_size, target="raw") if rebuild is None else rebuild.config
        with keyed_generators(0, torch.device("cpu")):
            rebuild = rebuild or Autoencoder(config)
            kind = De3(rebuild, nn.Identity(), None).case
            subject = Classifier(ClassifierConfig.for_encoder(config, 1000, trained_on=kind))
    made_of = next((part.config for part in (rebuild, subject) if isinstance(part, (Autoencoder, Classifier))), None)
    channels, side = input_size(subject) if made_of is None else (len(made_of.mean), made_of.img_size[0])
    if (side := img_size or side) is None:
        raise ValueError(f"{model} does not say what size of images it takes: give --img-size")
    defended = De3(rebuild, subject, sigmas[0] if sigmas else None).to(where).eval().requires_grad_(False)
    count = batch_size or (64 if where.type == "cuda" else 4)
    pixels = torch.rand(count, channels or 3, side, side, generator=torch.Generator().manual_seed(0)).to(where)
    work = Workload(defended, pixels, torch.zeros(count, dtype=torch.int64, device=where), sigmas, draws, max_batch)
    made = environment(where)
    with console.status("") as status:

        def report(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                print(text, file=sys.stderr, flush=True)

        try:
            records = compare(
                work, tasks=tasks, precisions=precisions, compile=compile, rounds=rounds, memory=memory, clock=clock,
                report=report,
            )  # fmt: skip
        except WrongResultError as error:
            print(f"denim: {error}", file=sys.stderr)
            raise SystemExit(1) from None
    settings = {
        "classifier": classifier or model or f"random, {preset}",
        "denoiser": denoiser or (None if rebuild is None else f"random, {preset}"),
        "images": count,
        "side": side,
        "sigmas": sigmas,
        "draws": draws,
        "max_batch": max_batch,
    }
    if json is not None:  # before anything is printed: what was measured must not be lost with the terminal
        content = {"environment": made, "settings": settings, "records": [dataclasses.asdict(each) for each in records]}
        with atomic_write(json) as staged:
            staged.write_text(dumps(content, indent=1) + "\n")
    console.print(
        _defended_table(records, ", ".join(f"{name} {printable(str(value))}" for name, value in made.items()))
    )
    console.print(", ".join(f"{name}: {printable(str(value))}" for name, value in settings.items()), soft_wrap=True)
    console.print("batched: all levels share their passes; looped: one level after the other", soft_wrap=True)
    for heading, what in DEFENDED.items():
        console.print(f"{heading}: {what}", soft_wrap=True)
    console.print(f"times: {records[0].method}; {rounds} turns of each row", soft_wrap=True)
    if json is not None:
        console.print(f"written: {printable(json)}")


def data(
    folder: Annotated[Path, tyro.conf.Positional],
    split: str = "train",
    size: int = 224,
    batch_size: int = 64,
    workers: int = 2,
    loaders: tuple[str, ...] = ("dali", "torch", "torchvision", "dali-reader", "pillow"),
    seconds: float = 3.0,
    rounds: int = 3,
    memory: bool = True,
    cache: Path | None = None,
) -> None:
    """Load random crops of your images with every loader: images per second, and memory.

    The pixels of DALI and of Pillow are compared first. The loaders take turns in one process, and the best turn of
    each counts. Memory is the peak of all processes of a loader together, less that of a process without a loader.

    Args:
        folder: Folder of images, class folders or shards, or of split folders (train, test, ...) that hold those.
        split: Split to load, such as train or test.
        size: Side of the crops, in pixels.
        batch_size: Images per batch.
        workers: Threads (DALI) or processes (torch) that decode images.
        loaders: Loaders to time: dali and torch are those of Denim, torchvision is its own pipeline, dali-reader is
            DALI with its own reader, pillow decodes in one process.
        seconds: Length of a turn, in seconds.
        rounds: Turns of each loader.
        memory: Also measure the memory.
        cache: Folder for the manifest; without it, the folder of the images, or the user's cache if that is read-only.
    """
    from rich.table import Table

    from denim.benchmarks import loaders as loading
    from denim.nim.text import open_console, printable

    console = open_console()
    if not console.is_terminal:
        console = open_console(width=120)
    task = loading.open_task(folder, split, size, batch_size, workers, cache)
    with console.status("") as status:
        if {"dali", "torch"} <= set(loaders) and loading.reason("dali", task) is None:
            found = loading.compare(task)
            print(
                f"DALI and Pillow, {found.images} crops of the same windows: {found.mean:.2f} levels of 255 apart on "
                f"average, {found.most} at most"
            )
        records, absent = loading.run(
            task, loaders, seconds=seconds, rounds=rounds, memory=memory, report=status.update
        )
    rates = {record.name: record.images_per_second for record in records}
    title = (
        f"{printable(task.source.name)}: {len(task.source)} images, {size}x{size}, batches of {batch_size}, "
        f"{workers} workers"
    )
    table = Table(title=title, box=None)
    for heading in ("loader", "", "images/s", "of torchvision", "of dali-reader", "MB"):
        table.add_column(heading, justify="left" if heading in ("loader", "") else "right", no_wrap=True)
    for record in records:
        table.add_row(
            record.name,
            loading.WHAT[record.name],
            f"{record.images_per_second:.0f}",
            *(
                f"{record.images_per_second / rates[other]:.2f}" if other in rates else "-"
                for other in ("torchvision", "dali-reader")
            ),
            "-" if record.peak_bytes is None else f"{record.peak_bytes / 1e6:.0f}",
        )
    console.print(table)
    for name, why in absent.items():
        console.print(f"{name}: {printable(why)}")
