"""The images that `denim evaluate` and `denim certify` measure on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from denim.nim.data import PlannedLoader, Source
    from denim.nim.ranks import Ranks


def open_images(
    data: str,
    split: str,
    held_out: float | None,
    training_seed: int,
    channels: int | None,
    classes: Sequence[str] | int | None,
    max_bad: float,
    console: Console,
) -> tuple[Source, str]:
    """The images, and words for which they are.

    Args:
        data, channels, classes, max_bad: see `open_source`.
        split: of the data.
        held_out: the share of the split "train", in place of `split`, that a training has held out; None for none.
        training_seed: the seed of that training.
        console: for a note where images may have been trained on.

    Raises:
        ValueError: see `open_source` and `hold_out`.
    """
    from denim.nim.data import hold_out, open_source
    from denim.nim.data.sources import splits

    source = open_source(data, split if held_out is None else "train", channels, classes=classes, max_bad=max_bad)
    if held_out is not None:
        return hold_out(source, held_out, training_seed)[1], f"{data}, held out of the training: {held_out:g}"
    folder = Path(data).expanduser()
    if folder.is_dir() and not splits(folder):
        console.print(
            f"{data} has no splits, so all of its images are measured on, also those that a model was trained on; "
            "--val-split measures on those that a training with --val-split has held out",
            markup=False,
            soft_wrap=True,
        )
        return source, data
    return source, f"{data}, split {split}"


def open_batches(
    source: Source,
    side: int,
    ranks: Ranks,
    device: torch.device,
    *,
    workers: int | None,
    backend: str,
    max_bad: float,
) -> PlannedLoader:
    """The loader of this process's share of the images, in their order.

    Args:
        source: the images.
        side: that the models take, in pixels.
        ranks: the processes.
        device: of the models.
        workers, backend, max_bad: see `open_loader`.

    Raises:
        ValueError: see `open_loader`.
    """
    from denim.nim.data import EvalView, open_loader

    return open_loader(
        source,
        EvalView(side),
        min(256, -(-len(source) // ranks.world)),
        shuffle=False,
        last="keep" if ranks.world == 1 else "pad",
        workers=workers,
        backend=backend,
        rank=ranks.rank,
        world=ranks.world,
        device=device,
        max_bad=max_bad,
    )
