"""`denim bench`."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from rich.table import Table

    from denim.benchmarks import kernels as bench

COMMANDS = {
    "kernels": "time the fused operations beside PyTorch, torch.compile and a naive kernel",
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
