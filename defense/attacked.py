"""Attacked images that are kept: files of one batch each, and how they are read again."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from denim.defense.gallery import file_name
from denim.defense.images import Images
from denim.defense.rows import Row, open_attack
from denim.nim.files import atomic_write, read_json

__all__ = ["AttackedImages", "KeptImages", "load_attacked"]

Array = npt.NDArray[Any]
NAMES = ("ids", "images", "labels")


class AttackedImages(NamedTuple):
    """Attacked images of one defense under one attack, in the order of their ids.

    Attributes:
        images: (N, C, H, W) in [0, 1], as the attack has left them.
        labels: int64 (N,).
        ids: int64 (N,), sample ids.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class KeptImages:
    """The attacked images of one row, those of this process.

    A file says of which records its images are. One that is lacking, or of other records, is written again, for which
    its images are attacked again.

    Args:
        out: folder of the evaluation.
        row: one defense under one attack.
        images: of this process.
        rank: of this process.
    """

    def __init__(self, out: Path, row: Row, images: Images, rank: int) -> None:
        self.folder, self.row, self.images, self.rank = _folder(out, row.name, row.text), row, images, rank
        self.lacking = np.zeros(len(images), bool)
        self.parts: list[tuple[Array, Tensor]] = []
        for step in np.unique(images.steps).tolist():
            if _header(self._file(step)) != self._header(step):
                self.lacking |= images.steps == step

    def add(self, places: Array, attacked: Tensor) -> None:
        """Take attacked images (B, C, H, W), by their places among the images of this process."""
        self.parts.append((places, attacked.cpu()))

    def finish(self, step: int) -> None:
        """Write those of a batch; an image that cannot be read is in no file."""
        if not self.parts:
            return
        places = np.concatenate([places for places, _ in self.parts])
        images = torch.cat([images for _, images in self.parts])
        self.parts.clear()
        if not self.lacking[places].any():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "ids": torch.from_numpy(self.images.ids[places]),
            "images": images.contiguous(),
            "labels": torch.from_numpy(self.images.labels[places]),
        }
        with atomic_write(self._file(step)) as staged:
            save_file(tensors, staged, metadata=self._header(step))

    def _file(self, step: int) -> Path:
        return self.folder / f"{self.rank}-{step:06d}.safetensors"

    def _header(self, step: int) -> dict[str, str]:
        images = self.images.digests[self.images.steps == step].tobytes()
        # One entry: safetensors writes several in any order.
        return {"records": f"{self.row.key.hex()} {hashlib.blake2b(images, digest_size=16).hexdigest()}"}


def load_attacked(out: str | Path, defense: str, attack: str) -> AttackedImages:
    """The attacked images that a finished evaluation has kept, of one defense under one attack.

    Args:
        out: folder of the evaluation, made with `EvaluationSettings.keep_attacked`.
        defense: its name.
        attack: its text form, as in "pgd:4/255,steps=20".

    Raises:
        ValueError: the evaluation has no such row, or has kept no images of it.
        OSError: there is no evaluation.
    """
    text = open_attack(attack)[0]
    cells = read_json(Path(out) / "results.json", {"cells": list})["cells"]
    keys = {(cell["defense"], cell["attack"]): cell["key"] for cell in cells if cell["key"]}
    if (defense, text) not in keys:
        rows = ", ".join(f"{name} under {attack}" for name, attack in keys)
        raise ValueError(f"{out} has no {defense} under {text}: it has {rows}")
    parts = []
    for file in sorted(_folder(Path(out), defense, text).glob("*.safetensors")):
        # Files of earlier weights stay, as their records do.
        if (_header(file) or {}).get("records", "").startswith(keys[defense, text]):
            parts.append(load_file(file))
    if not parts:
        raise ValueError(
            f"{out} has kept no attacked images of {defense} under {text}: the same evaluation with keep_attacked "
            "(--keep-attacked) attacks them again and keeps them"
        )
    columns = {name: torch.cat([part[name] for part in parts]) for name in NAMES}
    # Another number of processes divides the images differently: an image may be in two files.
    ids, order = np.unique(columns["ids"].numpy(), return_index=True)
    rows_of_ids = torch.from_numpy(order)
    return AttackedImages(columns["images"][rows_of_ids], columns["labels"][rows_of_ids], torch.from_numpy(ids))


def _folder(out: Path, defense: str, attack: str) -> Path:
    return out / "attacked" / file_name(defense, attack)


def _header(file: Path) -> dict[str, str] | None:
    """The header of a file; None where there is none, or one that cannot be read."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            return dict(content.metadata() or {}) if sorted(content.keys()) == list(NAMES) else None
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"{file} is damaged, and is passed over: {error}", stacklevel=2)
        return None
