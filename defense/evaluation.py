"""Evaluation: defenses x attacks, one record per image, scored on fresh draws, resumable.

Three disjoint sets of draws (docs/method.md): the attack chooses its candidate on *selection* draws, *confirmation*
draws choose the worst attack per image, and *score* draws, which nothing has seen, are used once, at the end.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from denim.defense.cells import Cell, Found, cells_of, warnings_about
from denim.defense.de3 import De3
from denim.defense.fingerprint import Fingerprints
from denim.defense.gallery import Examples, load_gallery
from denim.defense.health import DefenseHealth, health_of
from denim.defense.images import Images, as_loader, identify_all
from denim.defense.records import Records
from denim.defense.rows import EvaluationSettings, Row, rows_of
from denim.defense.scores import FEWEST_DRAWS, draws_needed
from denim.defense.targets import Target, as_target, own_models
from denim.defense.work import Work, device_of
from denim.nim.checkpoint import first_words
from denim.nim.data import Loader
from denim.nim.files import atomic_write, read_json
from denim.nim.owner import owned_by_first
from denim.nim.parallel import compiled_blocks
from denim.nim.precision import precise, resolve_precision
from denim.nim.ranks import Ranks
from denim.nim.stopping import StopRequest, stop_requests
from denim.nim.text import open_console

__all__ = ["Evaluation", "HealthWarning", "evaluate"]


# What chooses the number of score draws where that is "auto".
DRAWS_FILE = "score_draws.json"
PILOT_IMAGES, PILOT_DRAWS = 32, 20


class HealthWarning(UserWarning):
    """A health check doubts a result (docs/method.md). `Evaluation.warnings` and the report have all such warnings."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns and writes as results.json."""

    cells: tuple[Cell, ...]
    classes: tuple[str, ...]
    settings: EvaluationSettings
    warnings: tuple[str, ...]
    versions: dict[str, str]
    examples: dict[tuple[str, str], Examples]
    health: tuple[DefenseHealth, ...] = ()


def evaluate(
    defenses: Mapping[str, De3 | Target | nn.Module],
    data: Loader | DataLoader[Any] | Dataset[Any] | tuple[Tensor, Tensor],
    settings: EvaluationSettings,
    out: Path,
    *,
    classes: Sequence[str] = (),
    console: Console | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Attack and score defenses.

    Every (defense, attack, image) gives one record in `out` (see `denim.defense.records`). A record is kept under a
    key, the digest of all that it is computed from: the weights, settings and code of the defense, the attack, the
    seed, the score draws, the precision, the versions of torch, timm and Denim, and the image with its id and label. A
    call computes what has no record, and keeps all others. So a call that goes on where an earlier one stopped has the
    same result, and one with more images, attacks or defenses, or with images that have changed, computes these alone.

    Args:
        defenses: by name, put into evaluation mode; the first one is what the others are compared with. `De3`, any
            other `Target`, or any module from pixels (B, C, H, W) in [0, 1] to logits (see `ModuleTarget`), mixed.
        data: the images, in any order; see `denim.defense.images.as_loader`. Of a loader, epoch 0 is taken; rows that
            are not real are not counted, nor are images that could not be read for every defense and attack.
        settings: attacks, score draws and seed.
        out: folder of the evaluation.
        classes: names of the classes, for the report.
        console: for progress.
        ranks: the processes of the evaluation, which share `out` (see `denim.nim.ranks.joined`); by default this one
            alone. The batches are divided among them, by the loader if it was made for as many ranks, else here. All
            return the same; rank 0 writes the results.

    Raises:
        ValueError: no defense, no images, labels that are no classes of a defense, defenses of different numbers of
            classes or another number than there are names, a precision that the device lacks, or images change while
            they are evaluated.
        TypeError: a defense, or the data, is none.
        OwnedError: another process writes to `out`.
        DamagedFileError: the records in `out` are damaged.
        WriteError: `out` cannot be written to.
        Stopped: SIGTERM or Ctrl-C; raised after the batch that was running, whose records are kept.
        FloatingPointError: logits are not finite; the message names the defense, the attack and the images.
        MemoryError: one image, with all draws of a gradient, does not fit into memory.
    """
    ranks = ranks or Ranks()
    console = console or open_console(stderr=True, quiet=not ranks.is_first)
    if not defenses:
        raise ValueError("evaluate needs at least one defense")
    targets = {name: as_target(defense) for name, defense in defenses.items()}
    for target in targets.values():
        if isinstance(target, nn.Module):
            target.eval()
    device = device_of(next(iter(targets.values())))
    compile = device.type == "cuda" if settings.compile is None else settings.compile
    settings = replace(settings, precision=resolve_precision(settings.precision, device), compile=compile)
    loader = as_loader(data)
    stopped = f"the finished part is in {out}: the same call goes on there"
    with owned_by_first(out, ranks), stop_requests(stopped) as stop, precise(settings.precision, device):
        return _evaluate(targets, loader, settings, out, classes, console, stop, ranks)


def _evaluate(
    targets: Mapping[str, Any],
    loader: Loader,
    settings: EvaluationSettings,
    out: Path,
    classes: Sequence[str],
    console: Console,
    stop: StopRequest,
    ranks: Ranks,
) -> Evaluation:
    if (out / "records.jsonl").exists() and not any(out.glob("records*.sqlite")):
        console.print(
            f"evaluating: {out / 'records.jsonl'} is of an earlier version and does not say what its records were "
            "computed from: they are computed anew",
            markup=False,
        )
    own, images = map(_distinct, identify_all(loader, ranks))
    if not len(images):
        raise ValueError("evaluate needs images, and the loader yields none")
    fingerprints = Fingerprints()

    def compute(settings: EvaluationSettings, images: Images) -> Work:
        """Compute the records of these images."""
        rows = rows_of(targets, settings, fingerprints)
        with Records(out, ranks.rank) as records:
            wanted = np.isin(own.ids, images.ids)
            work = Work(rows, loader, own, settings, out, records, console, stop, ranks, wanted)
            work.examine(images, classes)
            with compiled_blocks(own_models(targets.values()) if settings.compile else ()):
                work.run()
        with ranks.naming():
            ranks.barrier()
        return work

    if settings.score_draws == "auto":
        file = out / DRAWS_FILE
        if file.exists():
            draws = int(read_json(file, {"score_draws": int})["score_draws"])
        else:
            first = images.at(np.sort(np.argsort(images.ids)[:PILOT_IMAGES]))
            console.print(f"evaluating: {len(first)} images to choose the number of score draws", markup=False)
            rows = compute(replace(settings, score_draws=PILOT_DRAWS, examples=0, keep_attacked=False), first).rows
            with Records(out, ranks.rank) as records:
                draws = _draws_needed(rows, Found.of(rows, records, first), len(images))
            if ranks.is_first:
                with atomic_write(file) as staged:
                    staged.write_text(json.dumps({"score_draws": draws, "pilot_images": len(first)}, indent=2) + "\n")
        console.print(f"evaluating: {draws} score draws, by the width of the intervals", markup=False)
        settings = replace(settings, score_draws=draws)
    work = compute(settings, images)
    rows = work.rows
    with ranks.naming():
        # By id: a rank reports what it has met.
        bad = {sample: words for state in ranks.gather(loader.state()["bad"]) for sample, words in state.items()}
    with Records(out, ranks.rank) as records:
        found = Found.of(rows, records, images)
        if not len(found.images):
            raise ValueError(f"none of the {len(images)} images could be read")
        cells = cells_of(rows, found, settings, work.num_classes)
        health: tuple[DefenseHealth, ...] = ()
        with ranks.together():
            if ranks.is_first:
                health = health_of(work, records, cells, fingerprints)
    health = ranks.share(health)
    notes = [*warnings_about(rows, found, cells, fingerprints), *(note for part in health for note in part.warnings())]
    if bad:
        notes.append(f"{len(bad)} images could not be read and are not counted: {'; '.join(bad.values())}")
    evaluation = Evaluation(
        cells,
        tuple(classes),
        settings,
        tuple(notes),
        {package: version(package) for package in ("torch", "timm", "numpy", "denim-vision")},
        load_gallery(out, rows) if settings.examples else {},
        health,
    )
    if ranks.is_first:
        keys = {(row.name, row.text): row.key.hex() for row in rows}
        content = {
            "settings": asdict(settings),
            "versions": evaluation.versions,
            "classes": evaluation.classes,
            "warnings": evaluation.warnings,
            "health": [asdict(part) for part in health],
            # The records that a cell is made of; the worst of several attacks has none of its own.
            "cells": [asdict(cell) | {"key": keys.get((cell.defense, cell.attack))} for cell in cells],
        }
        with atomic_write(out / "results.json") as staged:
            staged.write_text(json.dumps(content, indent=2) + "\n")
        for note in notes:
            warnings.warn(note, HealthWarning, stacklevel=3)
    return evaluation


def _draws_needed(rows: Sequence[Row], found: Found, images: int) -> int:
    """The most that any row needs; see `draws_needed`."""
    needed = [FEWEST_DRAWS]
    for row in rows:
        predictions = found.predictions[row.name, row.text]
        if predictions.shape[1] > 1 and len(predictions) > 1:
            needed.append(draws_needed(predictions == found.images.labels[:, None], images))
    return max(needed)


def _distinct(images: Images) -> Images:
    """The images without repetitions, in their order.

    Raises:
        ValueError: two images have one id.
    """
    _, first, inverse = np.unique(images.ids, return_index=True, return_inverse=True)
    other = (images.digests != images.digests[first[inverse]]).any(axis=1)
    if other.any():
        twins = [str(i) for i in images.ids[other].tolist()]
        raise ValueError(
            f"sample ids must be distinct: {len(twins)} images have that of another ({first_words(twins)})"
        )
    return images.at(np.sort(first))
