"""The gallery: a file with the first images under each row, from clean to denoised."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from denim.defense.de3 import De3
from denim.defense.images import Images
from denim.defense.rows import Row
from denim.kernels import Domain
from denim.nim.files import atomic_write

__all__ = ["Examples", "Gallery", "file_name", "load_gallery"]

Array = npt.NDArray[Any]
LONGEST_NAME = 150  # bytes of the name of a file of the gallery before its ending; file systems allow 255


@dataclass(frozen=True)
class Examples:
    """Images for the gallery, of one defense under one attack; all (N, C, H, W), on the CPU.

    Attributes:
        clean, attacked: what came in.
        noisy, denoised: one score draw of the degraded and the rebuilt attacked image; the image itself for off.
        labels: int64 (N,).
        clean_predictions, predictions: int64 (N,), of that draw, for the clean and the attacked image.
    """

    clean: Tensor
    attacked: Tensor
    noisy: Tensor
    denoised: Tensor
    labels: Tensor
    clean_predictions: Tensor
    predictions: Tensor


class Gallery:
    """The first images under one row, as a file.

    Args:
        out: folder of the evaluation.
        row: one defense under one attack.
        images: that are to be shown; None where another process shows them.

    Attributes:
        wanted: number of images that have to be attacked for it; 0 where the file shows them.
    """

    def __init__(self, out: Path, row: Row, images: Images | None) -> None:
        self.file, self.row, self.images = _gallery_file(out, row), row, images
        shows = [] if images is None else [words.tobytes().hex() for words in images.digests]
        # One entry: safetensors writes several in any order.
        self.header = {"records": json.dumps([row.key.hex(), *shows])}
        self.wanted = 0 if images is None or _shown(self.file) == self.header else len(images)
        self.seed = 0
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def add(self, places: Array, clean: Tensor, attacked: Tensor, labels: Tensor, ids: Tensor, seed: int) -> None:
        """Take those images that it shows, by their places among the images of this process."""
        rows = torch.from_numpy(np.flatnonzero(places < self.wanted)).to(clean.device)
        if len(rows):
            self.seed = seed
            self.parts.append((clean[rows], attacked[rows], labels[rows], ids[rows]))
            if sum(len(part[0]) for part in self.parts) == self.wanted:
                self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Write the images that there are, if they are not written."""
        if not self.parts:
            return
        clean, attacked, labels, ids = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        self.parts.clear()
        target = self.row.target
        seeds = target.seeds(self.seed, Domain.SCORE, ids, 1)
        stages = (attacked, attacked)
        if isinstance(target, De3):
            stages = (target.degraded(attacked, seeds[0]), target.denoise(attacked, seeds=seeds[0]))
        tensors = {
            "clean": clean,
            "attacked": attacked,
            "noisy": stages[0],
            "denoised": stages[1],
            "labels": labels,
            "clean_predictions": target.draw_logits(clean, seeds)[0].argmax(dim=-1),
            "predictions": target.draw_logits(attacked, seeds)[0].argmax(dim=-1),
        }
        with atomic_write(self.file) as staged:
            whole = {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
            save_file(whole, staged, metadata=self.header)


def file_name(defense: str, attack: str) -> str:
    """A name for files about a row, without an ending: it tells all rows apart, and every file system takes it."""
    name = quote(os.fsencode(f"{defense} {attack}"), safe=" ,=")
    if len(name) > LONGEST_NAME:
        # Names that differ further on must not share a file.
        name = f"{name[:LONGEST_NAME]}-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"
    return name


def _gallery_file(out: Path, row: Row) -> Path:
    return out / "examples" / f"{file_name(row.name, row.text)}.safetensors"


def _shown(file: Path) -> dict[str, str] | None:
    """The header of a gallery; None where there is no gallery, or one that does not say what it shows."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            names, header = set(content.keys()), content.metadata() or {}
    except (SafetensorError, ValueError) as error:
        warnings.warn(f"the gallery {file} is damaged, and is made again: {error}", stacklevel=2)
        return None
    if names != {field.name for field in fields(Examples)}:
        warnings.warn(f"the gallery {file} holds something else, and is made again", stacklevel=2)
        return None
    return header


def load_gallery(out: Path, rows: Sequence[Row]) -> dict[tuple[str, str], Examples]:
    """What the files in the folder of an evaluation show, by defense and attack."""
    files = {(row.name, row.text): _gallery_file(out, row) for row in rows}
    return {place: Examples(**load_file(file)) for place, file in files.items() if file.exists()}
