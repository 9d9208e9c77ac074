"""`denim plan`."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# Headings of the table behind the step, and what stands under them.
COLUMNS = {
    "images": "images of a pass: the largest divisor of a device's share that fits, unless --micro-batch is given",
    "weights": "weights, AdamW's averages and gradients on one device, GiB",
    "saved": "what a forward pass keeps for its backward pass, GiB",
    "peak": "the most that a forward and backward pass takes, its gradients included, GiB",
    "total": "the most that an update takes on one device, GiB",
    "GFLOP": "operations per image, forward and backward, in 10^9",
    "images/s": "upper bound for all devices",
}
# The same of the table for a whole training.
RUN_COLUMNS = {
    "images": "images of a pass, the largest divisor of a device's share that fits, and how many passes an update has",
    "compute": "ms of an update for products, attention and AdamW, by the data sheet and --share",
    "DDP": "ms for the exchange of an update, while it computes: a ring all-reduce of float32 gradients",
    "FSDP": "the same with --fsdp: weights gathered twice in a pass, gradients reduced and scattered",
    "hours": "of the run with DDP, an update taking the larger of compute and exchange",
    "GPU-hours": "hours times GPUs; with --price also what they cost",
    "images/s": "that one machine of 8 GPUs loads",
    "MB/s": "that it reads",
    "cores": "that decode and crop them",
}


def main(
    preset: str = "base",
    img_size: int | None = None,
    patch_size: int | None = None,
    channels: int | None = None,
    objective: str = "nim",
    mask_ratio: float = 0.75,
    precision: str = "auto",
    batch_size: int = 4096,
    micro_batch: int | None = None,
    devices: tuple[int, ...] = (1,),
    gpu: str = "h100",
    memory: float | None = None,
    images: int | None = None,
    epochs: float = 800,
    share: float = 1.0,
    price: float | None = None,
    network: float = 400.0,
    image_kb: float = 115.0,
    decoded: float = 380.0,
    disk: float = 1.0,
    json: Path | None = None,
) -> None:
    """Say what a pretraining takes in memory and in time at least, from its sizes alone. Nothing is run.

    There is one line for each way to compute a step or, with --images, one of the whole training for each number of
    devices. Speeds are static bounds from the data sheet of the GPU, never reached, and no measurements.

    Args:
        preset: Size of the model: micro, mini, tiny, small, base, large or huge.
        img_size: Side of the images in pixels; without it, that of the preset.
        patch_size: Side of the patches in pixels; without it, that of the preset.
        channels: Channels of the images, 1 or 3; without it, those of the preset.
        objective: What is learnt: nim (remove noise), mae (fill in hidden patches) or dmae (both).
        mask_ratio: Share of hidden patches, for mae and dmae.
        precision: Precision of the networks: fp32, tf32, bf16, or auto, which is bf16.
        batch_size: Images per update, on all devices together.
        micro_batch: Images per forward pass on one device; without it, as many as fit.
        devices: Number of devices; with --images several, such as 8 64 1024.
        gpu: GPU whose data sheet gives the bounds: h100, h200, a100, rtx4090 or another of the table in nim/gpus.py.
        memory: Memory of one device in GiB; without it, that of the GPU's data sheet.
        images: Training images, for a table of the whole training.
        epochs: Passes over the images; this and the following are for that table alone.
        share: Share of the bound of the arithmetic that is reached, at most 1.
        price: Price of a GPU for an hour, in any currency.
        network: Bandwidth between one machine of 8 GPUs and the others, in GB/s in one direction.
        image_kb: Size of an encoded image in kB.
        decoded: Images that a core decodes and crops in a second.
        disk: Bandwidth to the storage of checkpoints, in GB/s.
        json: JSON file that gets everything that was computed.
    """
    from denim.nim.autoencoder import preset as architecture_of
    from denim.nim.files import atomic_write
    from denim.nim.gpus import GPUS
    from denim.nim.objectives import Objective
    from denim.nim.plan import plan_table
    from denim.nim.precision import check_precision
    from denim.nim.scaling import Cluster, scaling_table
    from denim.nim.text import open_console, printable

    check_precision(precision)
    Objective.published(objective, mask_ratio=mask_ratio)
    if gpu not in GPUS:
        raise ValueError(f"unknown gpu {gpu!r}; choose one of {', '.join(GPUS)}")
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"--json {json}: there is no folder {json.parent}")
    if len(devices) != 1 and (images is None or not devices):
        raise ValueError(f"--devices takes one number, or with --images several, got {len(devices)}")
    given = GPUS[gpu].memory if memory is None else memory * 2**30
    model = architecture_of(preset, img_size=img_size, patch_size=patch_size, channels=channels, objective=objective)
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "precision": "bf16" if precision == "auto" else precision,
        "mask_ratio": mask_ratio,
    }
    if images is None:
        rows = plan_table(model, GPUS[gpu], given, micro_batch=micro_batch, devices=devices[0], **settings)
        table = _steps(rows)
        on = f"{devices[0]} x {gpu} with {given / 2**30:.1f} GiB"
        title = f"{rows[0]['parameters'] / 1e6:.1f} million parameters; {batch_size} images per update on {on}"
        end = f"The bound is that of products, attention and AdamW by the data sheet of {gpu}. Nothing was measured."
    else:
        cluster = Cluster(
            network=network * 1e9, share=share, image_bytes=image_kb * 1e3, decoded=decoded, disk=disk * 1e9
        )
        rows = scaling_table(
            model, GPUS[gpu], given, cluster, images=images, epochs=epochs, devices=devices, **settings
        )
        table = _runs(rows, price)
        first = rows[0]
        title = (
            f"{epochs:g} x {images:,} images, {batch_size} per update, {first['updates']:,} updates on {gpu} "
            f"at {share:g} of the bound"
        )
        size, seconds = first["checkpoint"] / 1e9, first["checkpoint_seconds"]
        end = f"A checkpoint has {size:.2f} GB, and takes {seconds:.1f} s at {disk:g} GB/s. Nothing was run."
    if json is not None:
        with atomic_write(json) as staged:
            staged.write_text(dumps({"gpu": gpu, "memory": given, "rows": rows}, indent=1) + "\n")
    console = open_console()
    if not console.is_terminal:  # a pipe has no width: rich would take 80 columns and cut the table
        console = open_console(width=120)
    console.print(f"{preset}, {objective}: {title}", soft_wrap=True)
    console.print(table)
    for heading, what in (COLUMNS if images is None else RUN_COLUMNS).items():
        console.print(f"{heading}: {what}", soft_wrap=True)
    console.print(end, soft_wrap=True)
    if json is not None:
        console.print(f"written: {printable(json)}")


def _steps(rows: list[dict[str, Any]]) -> Table:
    table = _columns("step", COLUMNS)
    for row in rows:
        held = row["weights"] + row["optimizer"] + row["gradients"]
        table.add_row(
            row["step"],
            f"{row['micro_batch']}{'' if row['fits'] else ' (does not fit)'}",
            *(f"{number / 2**30:.2f}" for number in (held, row["saved"], row["peak"], row["total"])),
            f"{row['flops_per_image'] / 1e9:.1f}",
            f"{row['images_per_second']:.0f}",
        )
    return table


def _runs(rows: list[dict[str, Any]], price: float | None) -> Table:
    table = _columns("GPUs", RUN_COLUMNS)
    if price is not None:
        table.add_column("cost", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["devices"]),
            f"{row['micro_batch']} x {row['passes']}",
            *(f"{1e3 * row[name]:.1f}" for name in ("compute", "ddp", "fsdp")),
            f"{row['hours']:,.2f}",
            f"{row['gpu_hours']:,.0f}",
            f"{row['images']:,.0f}",
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['cores']:.0f}",
            *([] if price is None else [f"{price * row['gpu_hours']:,.0f}"]),
        )
    return table


def _columns(first: str, others: dict[str, str]) -> Table:
    from rich.table import Table

    table = Table(box=None)
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
