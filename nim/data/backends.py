"""Which loader serves a source and a view: DALI or torch."""

from __future__ import annotations

import os

import torch

from denim.nim.data.dali_loader import DaliLoader
from denim.nim.data.dali_loader import reasons as dali_reasons
from denim.nim.data.loader import PlannedLoader, TorchLoader
from denim.nim.data.processes import processors
from denim.nim.data.sources import EncodedSource, Source
from denim.nim.data.views import TrainView, View, dali_policy

__all__ = ["default_workers", "loader_backends", "open_loader"]

# Images of an epoch for which a worker is started. Measured on a CPU: a worker takes 0.2 to 0.3 s to start, in every
# epoch anew, and a small image (32 x 32) takes 1 ms to decode.
IMAGES_OF_A_WORKER = 1000
MOST_WORKERS = 16  # each keeps two batches in shared memory


def default_workers(source: Source, world: int = 1) -> int:
    """Processes of the torch loader that pay for themselves; 0 decodes in the process of the training.

    As many as there are processors for each rank of this machine (torchrun sets LOCAL_WORLD_SIZE), at most 16; none for
    a source in memory, and none for fewer than 1,000 images.

    Args:
        source: images.
        world: number of ranks that share them.
    """
    if not isinstance(source, EncodedSource):
        return 0
    share = processors() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(share, len(source) // (world * IMAGES_OF_A_WORKER), MOST_WORKERS)


def loader_backends(source: Source, view: View, device: torch.device | str = "cpu") -> dict[str, list[str]]:
    """Loaders by name, best first, each with the reasons why it cannot serve; none means that it can.

    Args:
        source: images.
        view: what is to be made of them.
        device: where batches are wanted.
    """
    return {"dali": dali_reasons(source, view, torch.device(device)), "torch": _torch_reasons(view)}


def _torch_reasons(view: View) -> list[str]:
    if isinstance(view, TrainView) and dali_policy(view.auto_augment) is not None:
        return [f"auto_augment={view.auto_augment!r} is DALI's policy (loader 'dali'); timm's begin with 'rand'"]
    return []


def open_loader(
    source: Source,
    view: View,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    last: str = "drop",
    workers: int | None = None,
    backend: str = "auto",
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    max_bad: float = 0.01,
) -> PlannedLoader:
    """A loader on the backend that was asked for, or on the first that can serve.

    Args:
        source: see `PlannedLoader`, as for all arguments that are not listed here.
        workers: processes (torch) or threads (DALI) that decode. None: `default_workers` processes, or a thread for
            each processor that this rank has.
        backend: "auto", "dali" or "torch". Order, windows and flips are the same on both; pixels differ by rounding.
        device: where DALI leaves its batches. Those of torch lie on the CPU, pinned if this is a CUDA device.

    Raises:
        ValueError: an unknown backend, or one that cannot serve, with the reasons; and what the loader itself raises.
    """
    reasons = {"torch": _torch_reasons(view)} if backend == "torch" else loader_backends(source, view, device)
    if backend == "auto":
        able = [name for name, why in reasons.items() if not why]
        if not able:
            against = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())
            raise ValueError(f"no loader can make this view of {source.name}: {against}")
        backend = able[0]
    if backend not in reasons:
        raise ValueError(f"loader must be auto, {' or '.join(reasons)}, got {backend!r}")
    if reasons[backend]:
        raise ValueError(f"the loader {backend!r} cannot serve {source.name}: {'; '.join(reasons[backend])}")
    if workers is None:
        workers = default_workers(source, world) if backend == "torch" else 0
    if backend == "torch":
        return TorchLoader(
            source, view, batch_size,
            seed=seed, shuffle=shuffle, last=last, workers=workers, rank=rank, world=world, max_bad=max_bad,
            pin_memory=torch.device(device).type == "cuda",
        )  # fmt: skip
    return DaliLoader(
        source, view, batch_size,
        seed=seed, shuffle=shuffle, last=last, workers=workers, rank=rank, world=world, device=device, max_bad=max_bad,
    )  # fmt: skip
