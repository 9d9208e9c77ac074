"""`denim plan`."""

from __future__ import annotations

from json import dumps
from pathlib import Path

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
    devices: int = 1,
    gpu: str = "h100",
    memory: float | None = None,
    json: Path | None = None,
) -> None:
    """Say what a pretraining takes in memory and in time at least, from its sizes alone. Nothing is run.

    There is one line for each way to compute a step. Speeds are static bounds from the data sheet of the GPU, never
    reached, and no measurements.

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
        devices: Number of devices.
        gpu: GPU whose data sheet gives the bounds: h100, h200, a100, rtx4090 or another of the table in nim/gpus.py.
        memory: Memory of one device in GiB; without it, that of the GPU's data sheet.
        json: JSON file that gets everything that was computed.
    """
    from rich.table import Table

    from denim.nim.autoencoder import preset as architecture_of
    from denim.nim.files import atomic_write
    from denim.nim.gpus import GPUS
    from denim.nim.objectives import Objective
    from denim.nim.plan import plan_table
    from denim.nim.precision import check_precision
    from denim.nim.text import open_console, printable

    check_precision(precision)
    Objective.published(objective, mask_ratio=mask_ratio)
    if gpu not in GPUS:
        raise ValueError(f"unknown gpu {gpu!r}; choose one of {', '.join(GPUS)}")
    if json is not None and not json.parent.is_dir():
        raise ValueError(f"--json {json}: there is no folder {json.parent}")
    given = GPUS[gpu].memory if memory is None else memory * 2**30
    rows = plan_table(
        architecture_of(preset, img_size=img_size, patch_size=patch_size, channels=channels, objective=objective),
        GPUS[gpu],
        given,
        batch_size=batch_size,
        micro_batch=micro_batch,
        devices=devices,
        precision="bf16" if precision == "auto" else precision,
        mask_ratio=mask_ratio,
    )
    if json is not None:
        with atomic_write(json) as staged:
            staged.write_text(dumps({"gpu": gpu, "memory": given, "rows": rows}, indent=1) + "\n")
    console = open_console()
    if not console.is_terminal:  # a pipe has no width: rich would take 80 columns and cut the table
        console = open_console(width=120)
    first = rows[0]
    title = (
        f"{preset}, {objective}: {first['parameters'] / 1e6:.1f} million parameters; {batch_size} images per update on "
        f"{devices} x {gpu} with {given / 2**30:.1f} GiB"
    )
    table = Table(title=title, box=None)
    table.add_column("step", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        held = row["weights"] + row["optimizer"] + row["gradients"]
        table.add_row(
            row["step"],
            f"{row['micro_batch']}{'' if row['fits'] else ' (does not fit)'}",
            *(f"{number / 2**30:.2f}" for number in (held, row["saved"], row["peak"], row["total"])),
            f"{row['flops_per_image'] / 1e9:.1f}",
            f"{row['images_per_second']:.0f}",
        )
    console.print(table)
    for heading, what in COLUMNS.items():
        console.print(f"{heading}: {what}", soft_wrap=True)
    console.print(
        f"The bound is that of products, attention and AdamW by the data sheet of {gpu}. Nothing was measured.",
        soft_wrap=True,
    )
    if json is not None:
        console.print(f"written: {printable(json)}")
