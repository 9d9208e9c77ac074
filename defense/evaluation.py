"""Evaluation: defenses x attacks, one record per image, scored on fresh draws, resumable.

Three disjoint sets of draws (docs/method.md): the attack chooses its candidate on *selection* draws, *confirmation*
draws choose the worst attack per image, and *score* draws, which nothing has seen, are used once, at the end.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from denim.defense.attacks import Attack, AttackMethod, parse_attack, radius_text
from denim.defense.de3 import De3
from denim.defense.fingerprint import Fingerprints
from denim.defense.images import Images, as_loader, batches_of, identify, pixels_of, same_again
from denim.defense.probe import probe_randomness
from denim.defense.records import RecordColumns, Records
from denim.defense.scores import Interval, Scores, paired_difference, score
from denim.defense.targets import (
    OBJECT,
    ROUNDING,
    ModuleTarget,
    Target,
    as_target,
    import_object,
    keyed_generators,
    normalisation_hint,
)
from denim.kernels import Domain, check_pixels, derive_seeds
from denim.kernels.seeds import check_seed
from denim.nim.checkpoint import first_words
from denim.nim.classifier import check_logits
from denim.nim.data import Batch, Loader, PlannedLoader
from denim.nim.files import atomic_write
from denim.nim.owner import owned_by_first
from denim.nim.precision import check_precision, precise, resolve_precision
from denim.nim.progress import LineClock, clock_text
from denim.nim.ranks import Ranks
from denim.nim.stopping import StopRequest, stop_requests
from denim.nim.text import open_console

__all__ = [
    "Cell",
    "Evaluation",
    "EvaluationSettings",
    "Examples",
    "HealthWarning",
    "evaluate",
    "open_attack",
]

Array = npt.NDArray[Any]

CLEAN = "none"
WORST = "worst"
# Beside the code of a model and its weights, what records depend on.
PACKAGES = ("torch", "timm", "denim-vision")
LONGEST_NAME = 150  # bytes of the name of a file of the gallery before its ending; file systems allow 255


class HealthWarning(UserWarning):
    """A health check doubts a result (docs/method.md). `Evaluation.warnings` and the report have all such warnings."""


def open_attack(text: str) -> tuple[str, AttackMethod]:
    """An attack by its text form, and that form with all that it leaves out.

    Args:
        text: see `parse_attack`; or `package.module:Class`, which is called without arguments and gives an
            `AttackMethod`.

    Raises:
        ValueError: no such form, or no such class.
        TypeError: what it gives has no such method.
    """
    if OBJECT.fullmatch(text) is None:
        attack = parse_attack(text)
        return str(attack), attack
    found = import_object(text)
    made = found() if isinstance(found, type) or inspect.isfunction(found) else found
    if not callable(getattr(made, "run", None)):
        raise TypeError(f"{text} must have a method run(target, pixels, labels, ids, seed), and has none")
    return text, made


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        attacks: text forms of attacks, see `open_attack`; a row without an attack is always added.
        score_draws: R, fresh draws per image for the score, and again for the confirmation.
        seed: of the evaluation.
        max_batch: images that go through the networks in one pass; bounds memory. At least one image, with all draws of
            a gradient of the attack, is in a pass. It is halved where memory does not suffice.
        examples: images that are kept for the gallery.
        precision: of the networks, in attacks and scores: fp32, tf32, bf16 or auto (see `resolve_precision`). What it
            means on the device of the first defense is recorded.
    """

    attacks: tuple[str, ...]
    score_draws: int = 20
    seed: int = 0
    max_batch: int = 256
    examples: int = 6
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_precision(self.precision)
        check_seed(self.seed)
        if self.examples < 0:
            raise ValueError(f"examples must not be negative, got {self.examples}")
        for name in ("score_draws", "max_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        names = [open_attack(attack)[0] for attack in self.attacks]
        if len(set(names)) < len(names):
            raise ValueError(f"attacks must differ, got {', '.join(names)}")


@dataclass(frozen=True)
class Cell:
    """One defense under one attack.

    Attributes:
        defense: name of the defense.
        sigma: its noise level, None for off and for what is no De3.
        frozen: whether its noise is fixed and known to the attacker.
        case: what its classifier sees, see `De3.case`; "undefended" for off, "model" for what is no De3.
        attack: text form, "none", or "worst EPSILON" (per image the attack of that radius that misleads most
            confirmation draws).
        epsilon: radius in [0, 1] units, None without an attack and for an attack that states none.
        scores: accuracy on the score draws.
        difference: of the mean to the first defense under the same attack, paired over images.
    """

    defense: str
    sigma: float | None
    frozen: bool
    case: str
    attack: str
    epsilon: float | None
    scores: Scores
    difference: Interval | None


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


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns and writes as results.json."""

    cells: tuple[Cell, ...]
    classes: tuple[str, ...]
    settings: EvaluationSettings
    warnings: tuple[str, ...]
    versions: dict[str, str]
    examples: dict[tuple[str, str], Examples]


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
    device = _device_of(next(iter(targets.values())))
    settings = replace(settings, precision=resolve_precision(settings.precision, device))
    loader = as_loader(data)
    stopped = f"the finished part is in {out}: the same call goes on there"
    with owned_by_first(out, ranks), stop_requests(stopped) as stop, precise(settings.precision, device):
        return _evaluate(targets, loader, settings, out, classes, console, stop, ranks)


class _Row(NamedTuple):
    """One defense under one attack, and the keys of its records.

    Attributes:
        name: of the defense.
        target: the defense.
        target_key: its fingerprint.
        text: of the attack.
        attack: None for clean images.
        radius: of the attack, with its norm; None without one.
        key: of the records.
        confirms: whether its confirmation draws are read: another attack has the same radius.
    """

    name: str
    target: Any
    target_key: bytes
    text: str
    attack: Any
    radius: tuple[str, float] | None
    key: bytes
    confirms: bool


def _rows(targets: Mapping[str, Any], settings: EvaluationSettings, fingerprints: Fingerprints) -> list[_Row]:
    attacks: list[tuple[str, Any]] = [(CLEAN, None), *map(open_attack, settings.attacks)]
    radii = [_radius(attack) for _, attack in attacks]
    shared = (settings.seed, settings.score_draws, settings.precision, *map(version, PACKAGES))
    rows = []
    for name, target in targets.items():
        target_key = fingerprints.of(target)
        for (text, attack), radius in zip(attacks, radii, strict=True):
            if getattr(attack, "gray", False) and not isinstance(target, De3):
                raise ValueError(
                    f"{text} attacks the classifier behind a De3, and {name} is none: leave `gray` out, or evaluate "
                    "the two apart"
                )
            digest = hashlib.blake2b(target_key + fingerprints.of(attack), digest_size=16)
            digest.update(repr((text, *shared)).encode("utf-8", "surrogatepass"))
            confirms = radius is not None and radii.count(radius) > 1
            rows.append(_Row(name, target, target_key, text, attack, radius, digest.digest(), confirms))
    return rows


def _radius(attack: Any) -> tuple[str, float] | None:
    epsilon = getattr(attack, "epsilon", None)
    return None if epsilon is None else (str(getattr(attack, "norm", "linf")), float(epsilon))


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
    with ranks.together():
        divided = getattr(loader, "world", 1) == ranks.world
        own = _distinct(identify(loader, lambda step: divided or step % ranks.world == ranks.rank))
    images = _distinct(Images.joined(ranks.gather(own)))
    if not len(images):
        raise ValueError("evaluate needs images, and the loader yields none")
    fingerprints = Fingerprints()
    rows = _rows(targets, settings, fingerprints)
    with Records(out, ranks.rank) as records:
        work = _Work(rows, loader, own, settings, out, records, console, stop, ranks)
        work.examine(images, classes)
        work.run()
    with ranks.naming():
        ranks.barrier()
        # By id: a rank reports what it has met.
        bad = {sample: words for state in ranks.gather(loader.state()["bad"]) for sample, words in state.items()}
    with Records(out, ranks.rank) as records:
        found = _Found.of(rows, records, images)
    if not len(found.images):
        raise ValueError(f"none of the {len(images)} images could be read")
    cells = _cells(rows, found, settings)
    notes = _health(rows, found, cells, fingerprints)
    if bad:
        notes.append(f"{len(bad)} images could not be read and are not counted: {'; '.join(bad.values())}")
    evaluation = Evaluation(
        cells,
        tuple(classes),
        settings,
        tuple(notes),
        {package: version(package) for package in ("torch", "timm", "numpy", "denim-vision")},
        _load_gallery(out, rows) if settings.examples else {},
    )
    if ranks.is_first:
        content = {
            "settings": asdict(settings),
            "versions": evaluation.versions,
            "classes": evaluation.classes,
            "warnings": evaluation.warnings,
            "cells": [asdict(cell) for cell in cells],
        }
        with atomic_write(out / "results.json") as staged:
            staged.write_text(json.dumps(content, indent=2) + "\n")
        for note in notes:
            warnings.warn(note, HealthWarning, stacklevel=3)
    return evaluation


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


def _device_of(target: Any) -> torch.device:
    if isinstance(target, nn.Module):
        for tensors in (target.parameters(), target.buffers()):
            for tensor in tensors:
                return tensor.device
    return torch.device("cpu")


def _draws_of(target: Any) -> int:
    """Rows of seeds for one answer of a target."""
    return int(getattr(target, "draws", 1))


@torch.no_grad()
def _predict(target: Any, pixels: Tensor, seeds: Tensor, ids: Tensor, max_batch: int) -> Tensor:
    """Predictions (draws, B) for seeds (draws * n, B), one draw where the target is not random.

    At most max_batch images go through the networks in one pass.
    """
    draws = _draws_of(target)

    def predict(part: Tensor) -> Tensor:
        blocks = []
        images = max(1, max_batch // len(part))
        for first in range(0, len(pixels), images):
            rows = slice(first, first + images)
            logits = target.draw_logits(pixels[rows], part[:, rows])
            check_logits(logits, ids[rows])
            blocks.append(logits.argmax(dim=-1))
        return torch.cat(blocks, dim=1)

    if not target.is_random:
        return predict(seeds[:draws])
    block = max(1, max_batch // (len(pixels) * draws)) * draws
    return torch.cat([predict(part) for part in seeds.split(block)])


class _Attacked(NamedTuple):
    """What an attack has said, in one form: see `AttackMethod.run`."""

    pixels: Tensor
    flags: Array
    gradients: Array


class _Work:
    """What one process computes: which rows lack which images, and the records of these.

    Args:
        rows: all.
        loader: of the images.
        own: the images of this process.
        settings: of the evaluation.
        out: its folder.
        records: of this process.
        console: for progress.
        stop: request to stop.
        ranks: the processes.
    """

    def __init__(
        self,
        rows: Sequence[_Row],
        loader: Loader,
        own: Images,
        settings: EvaluationSettings,
        out: Path,
        records: Records,
        console: Console,
        stop: StopRequest,
        ranks: Ranks,
    ) -> None:
        self.rows, self.loader, self.own, self.settings, self.out = rows, loader, own, settings, out
        self.records, self.console, self.stop, self.ranks = records, console, stop, ranks
        self.lacking: list[Array] = []
        self.gallery: list[_Gallery] = []
        self.batches: Iterator[tuple[int, Batch]] = iter(())
        # By defense, where memory has not sufficed: images in a pass.
        self.limits: dict[str, int] = {}

    def say(self, text: str) -> None:
        """Print a line of progress."""
        self.console.print(f"evaluating: {text}", markup=False, soft_wrap=True)

    def _plan(self) -> None:
        """Find out what has no record, and which galleries do not show the first images."""
        changed: set[int] = set()
        shown = self.own.at(np.arange(min(self.settings.examples, len(self.own)))) if self.ranks.is_first else None
        for row in self.rows:
            known = self.records.is_random(row.target_key)
            if isinstance(row.target, ModuleTarget) and not row.target.is_known and known is not None:
                row.target.is_random = known
            columns = self.records.cell(row.key)
            confirmed = row.confirms and known is not False
            lacking = columns.find(self.own.digests, confirmed=confirmed) < 0
            again = lacking & (columns.find(self.own.digests) >= 0)
            if again.any():
                radius = radius_text(row.radius[1]) if row.radius else ""
                self.say(
                    f"{again.sum()} images of {row.name} are attacked again with {row.text}: another attack of radius "
                    f"{radius} calls for confirmation draws, and they had none"
                )
            changed |= set(self.own.ids[lacking & ~again & np.isin(self.own.ids, columns.ids)].tolist())
            self.lacking.append(lacking)
            self.gallery.append(_Gallery(self.out, row, shown))
        if changed:
            self.say(
                f"{len(changed)} of {len(self.own)} images or their labels have changed since they were evaluated; "
                "what is known of them is computed again"
            )

    def _wanted(self) -> list[Array]:
        """By row, the images that are attacked: those that lack a record or are lacking in the gallery."""
        wanted = []
        for lacking, gallery in zip(self.lacking, self.gallery, strict=True):
            rows = lacking.copy()
            rows[: gallery.wanted] = True
            wanted.append(rows)
        return wanted

    def examine(self, images: Images, classes: Sequence[str]) -> None:
        """Look at every defense that will compute something, on one batch, before anything is computed.

        All ranks must come here: what one of them finds random is random for all.

        Args:
            images: those of all ranks.
            classes: names, may be empty.
        """
        counts: dict[str, int] = {}
        random: dict[str, bool] = {}
        with self.ranks.together():
            self._plan()
            below = images.labels < 0
            if below.any():
                raise ValueError(
                    f"labels must be class numbers from 0 on, got {int(images.labels[below][0])} of sample id "
                    f"{int(images.ids[below][0])}"
                )
            busy = {row.name for row, rows in zip(self.rows, self._wanted(), strict=True) if rows.any()}
            self.batches = batches_of(self.loader, np.unique(self.own.steps[np.any(self._wanted(), axis=0)]))
            if (first := next(self.batches, None)) is not None:
                self.batches = chain([first], self.batches)
                counts, random = self._look(first[1], busy)
        for other_counts, other_random in self.ranks.gather((counts, random)):
            counts = {**other_counts, **counts}
            random = {
                name: random.get(name, False) or other_random.get(name, False) for name in {*random, *other_random}
            }
        for row in self.rows:
            if row.name in random:
                row.target.is_random = random[row.name]
        _check_classes(counts, images, classes)

    @torch.no_grad()
    def _look(self, batch: Batch, names: set[str]) -> tuple[dict[str, int], dict[str, bool]]:
        """Number of classes by defense, and whether those draw of which that is not known."""
        counts: dict[str, int] = {}
        random: dict[str, bool] = {}
        few = _at(batch, np.arange(min(2, len(batch.ids))))
        if not len(few.ids):  # none of them could be read
            return counts, random
        for name, target in {row.name: row.target for row in self.rows if row.name in names}.items():
            pixels, ids = pixels_of(few, _device_of(target)), few.ids.to(_device_of(target))
            try:
                if isinstance(target, ModuleTarget) and not target.is_known:
                    random[name] = target.probe(pixels)
                if isinstance(target, De3):
                    _refuse_hidden_draws(name, target, pixels)
                logits = target.draw_logits(pixels, target.seeds(self.settings.seed, Domain.SELECTION, ids, 1))
            except RuntimeError as error:
                if _is_out_of_memory(error):
                    raise
                raise ValueError(f"{name} does not take pixels of shape {tuple(pixels.shape)}: {error}") from error
            if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (1, len(ids)):
                shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(f"{name}: one draw must give logits (1, {len(ids)}, K), got {shape}")
            counts[name] = logits.shape[-1]
        return counts, random

    def run(self) -> None:
        """Compute what is lacking, batch by batch, each batch under all rows that lack some of it.

        Raises:
            ValueError: an image has changed since it was identified.
        """
        wanted, total, done = self._wanted(), int(np.sum(self.lacking)), 0
        columns = (
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}", markup=False),
        )
        has_bar = self.console.is_terminal or self.console.is_jupyter
        started, lines = time.perf_counter(), LineClock()
        with Progress(*columns, console=self.console, disable=not has_bar) as bar:
            task = bar.add_task("evaluating", total=total, state="")
            for step, batch in self.batches:
                places, open_batch = self._opened(step, batch, np.any(wanted, axis=0))
                for number, row in enumerate(self.rows):
                    chosen = np.flatnonzero(wanted[number][places])
                    for count in self._compute(number, _at(open_batch, chosen), places[chosen]):
                        done += count
                        where = f"{row.name} under {row.text}"
                        bar.update(task, completed=done, state=where)
                        if not has_bar and lines.due():
                            self.say(f"{done}/{total} records  {where}")
                        self.stop.heed()
            for gallery in self.gallery:
                gallery.finish()
            bar.update(task, completed=done, state="")
        self.say(f"{done}/{total} records  in {clock_text(time.perf_counter() - started)}")

    def _opened(self, step: int, batch: Batch, wanted: Array) -> tuple[Array, Batch]:
        """The images of a batch that some row wants: where they are among those of this process, and the images."""
        first, last = np.searchsorted(self.own.steps, [step, step + 1])
        place = dict(zip(self.own.ids[first:last].tolist(), range(first, last), strict=True))
        found = np.array([place.get(sample, -1) for sample in batch.ids.tolist()], np.int64)
        rows = np.flatnonzero((found >= 0) & wanted[found])
        places, chosen = found[rows], _at(batch, rows)
        same = same_again(self.loader, self.own.at(places), chosen)
        moved = [str(i) for i in (*batch.ids[found < 0].tolist(), *chosen.ids[~torch.from_numpy(same)].tolist())]
        # In the place of an image that cannot be read, a loader may give one of another batch.
        if moved and not (same.all() and isinstance(self.loader, PlannedLoader)):
            raise ValueError(
                f"{len(moved)} images have changed while they were evaluated (sample ids {first_words(moved)}), or the "
                "data come in another order each time: the same call evaluates them again"
            )
        return places, chosen

    def _compute(self, number: int, batch: Batch, places: Array) -> Iterator[int]:
        """Attack and score images under one row, pass by pass; yields the number of new records after each."""
        row, settings = self.rows[number], self.settings
        target, device = row.target, _device_of(row.target)
        draws = _draws_of(target)
        each = draws * (int(getattr(row.attack, "eot", 1)) if row.attack is not None and target.is_random else 1)
        first = 0
        while first < len(places):
            limit = self.limits.get(row.name, settings.max_batch)
            whole = row.attack is not None and _takes_max_batch(row.attack)
            part = np.arange(first, min(len(places), first + (len(places) if whole else max(1, limit // each))))
            failure: Exception | None = None
            try:
                count = self._pass(number, _at(batch, part), places[part], device, limit)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # which would keep the tensors
            if failure is None:
                first += len(part)
                yield count
                continue
            used = min(limit, len(part) * max(each, settings.score_draws * draws if target.is_random else 1))
            if used <= 1:
                raise MemoryError(
                    f"{row.name} under {row.text}: the passes of one image do not fit into memory ({failure}); take a "
                    "smaller eot, another precision, or a device with more memory"
                ) from failure
            self.limits[row.name] = used // 2
            self.say(f"out of memory for {row.name} under {row.text}: from now on at most {used // 2} images in a pass")
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _pass(self, number: int, batch: Batch, places: Array, device: torch.device, limit: int) -> int:
        """Attack and score some images, append their records, and return how many."""
        row, settings = self.rows[number], self.settings
        target = row.target
        clean, labels, ids = pixels_of(batch, device), batch.labels.to(device), batch.ids.to(device)
        attacked = _attack(row, clean, labels, ids, settings.seed, limit)
        # The others are attacked again for the gallery alone.
        new = np.flatnonzero(self.lacking[number][places])
        if len(new):
            rows = torch.from_numpy(new).to(device)
            pixels, sample, truth = attacked.pixels[rows], ids[rows], labels[rows]

            def predict(domain: Domain) -> Tensor:
                seeds = target.seeds(settings.seed, domain, sample, settings.score_draws)
                return _predict(target, pixels, seeds, sample, limit)

            try:
                missed = np.full(len(new), -1)
                if row.confirms and target.is_random:
                    missed = (predict(Domain.CONFIRMATION) != truth).sum(dim=0).cpu().numpy()
                predictions = predict(Domain.SCORE).T.cpu().numpy()
            except FloatingPointError as error:
                raise FloatingPointError(f"{row.name} under {row.text}: {error}") from error
            block = RecordColumns(
                self.own.digests[places[new]],
                self.own.ids[places[new]],
                self.own.labels[places[new]],
                predictions,
                missed,
                attacked.flags[new],
                attacked.gradients[new],
            )
            names = (row.name, row.text)
            self.records.append(row.key, row.target_key, bool(target.is_random), names, block)
        self.gallery[number].add(places, clean, attacked.pixels, labels, ids, settings.seed)
        return len(new)


def _at(batch: Batch, rows: Array) -> Batch:
    chosen = torch.from_numpy(rows)
    return Batch(
        batch.images[chosen.to(batch.images.device)], batch.labels[chosen.to(batch.labels.device)], batch.ids[chosen]
    )


def _refuse_hidden_draws(name: str, defense: De3, pixels: Tensor) -> None:
    """Refuse a classifier that draws without a word: it would be attacked and scored as one that does not."""
    found = probe_randomness(defense.classifier, pixels)
    if found.declared or found.largest <= ROUNDING * found.scale:
        return
    raise ValueError(
        f"{name}: its classifier draws by itself in evaluation mode ({found}). If that is meant, set is_random = True "
        "on the classifier: then it is attacked over many draws and scored on fresh ones. Otherwise look for dropout "
        "that stays on, or for noise in its code"
    )


def _takes_max_batch(attack: AttackMethod) -> bool:
    """Whether an attack itself cuts a batch into passes of bounded memory."""
    return "max_batch" in inspect.signature(attack.run).parameters


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's allocator for the CPU, and cuBLAS and cuDNN where the memory of a GPU is full.
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "ALLOC_FAILED"))


def _check_classes(counts: Mapping[str, int], images: Images, classes: Sequence[str]) -> None:
    """Check numbers of classes, by defense, against each other, labels and names."""
    for name, count in counts.items():
        wrong = images.labels >= count
        if wrong.any():
            raise ValueError(
                f"{name} has {count} classes, and {int(wrong.sum())} of {len(images)} labels are none of them, such as "
                f"{int(images.labels[wrong][0])} of sample id {int(images.ids[wrong][0])}: labels must be from 0 to "
                f"{count - 1}, numbered as the outputs of the model"
            )
        if classes and len(classes) != count:
            raise ValueError(
                f"{name} has {count} classes, and {len(classes)} names of classes are given: it is a model for other "
                "data, or these are other names"
            )
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ValueError(f"defenses that are compared must have the same classes, got {listed}")


def _attack(row: _Row, clean: Tensor, labels: Tensor, ids: Tensor, seed: int, limit: int) -> _Attacked:
    """The candidates for clean images (B, C, H, W).

    Raises:
        ValueError: the attack returns something else, or pixels outside of [0, 1].
    """
    count = len(clean)
    if row.attack is None:
        return _Attacked(clean, np.zeros(count, np.uint8), np.zeros(count, np.int64))
    options: dict[str, Any] = {"max_batch": limit} if _takes_max_batch(row.attack) else {}
    if isinstance(row.attack, Attack):
        found = row.attack.run(row.target, clean, labels, ids, seed, **options)
    else:
        # It may draw from the generators of the process, or seed them.
        start = int(derive_seeds(seed, Domain.ATTACK, ids[:1])[0])
        with keyed_generators(start, clean.device):
            found = row.attack.run(row.target, clean, labels, ids, seed, **options)
    pixels = found if isinstance(found, Tensor) else getattr(found, "pixels", None)
    if not isinstance(pixels, Tensor) or pixels.shape != clean.shape:
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(found).__name__
        raise ValueError(f"{row.text} must return pixels {tuple(clean.shape)}, got {shape}")
    pixels = pixels.detach().to(clean.device, clean.dtype)
    try:
        check_pixels(pixels)
    except ValueError as error:
        raise ValueError(f"{row.text} on {row.name} returned images that are none: {error}") from error

    def column(name: str, missing: int) -> Array:
        values = getattr(found, name, None)
        return np.full(count, missing) if values is None else values.cpu().numpy().astype(np.int64)

    flags = RecordColumns.ZERO_GRADIENT * column("zero_gradients", 0) + RecordColumns.BAD_GRADIENT * column(
        "bad_gradients", 0
    )
    return _Attacked(pixels, flags.astype(np.uint8), column("gradients", -1))


class _Gallery:
    """The first images under one row, as a file.

    Args:
        out: folder of the evaluation.
        row: one defense under one attack.
        images: that are to be shown; None where another process shows them.

    Attributes:
        wanted: number of images that have to be attacked for it; 0 where the file shows them.
    """

    def __init__(self, out: Path, row: _Row, images: Images | None) -> None:
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


def _gallery_file(out: Path, row: _Row) -> Path:
    name = quote(os.fsencode(f"{row.name} {row.text}"), safe=" ,=")
    if len(name) > LONGEST_NAME:
        # Names that differ further on must not share a file.
        name = f"{name[:LONGEST_NAME]}-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"
    return out / "examples" / f"{name}.safetensors"


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


def _load_gallery(out: Path, rows: Sequence[_Row]) -> dict[tuple[str, str], Examples]:
    files = {(row.name, row.text): _gallery_file(out, row) for row in rows}
    return {place: Examples(**load_file(file)) for place, file in files.items() if file.exists()}


class _Found(NamedTuple):
    """The records of the images that have one in every row, in the order of their ids.

    Attributes:
        images: N of them.
        predictions: by defense and attack, uint16 (N, R), or (N, 1) of a defense that is not random.
        missed: by defense and attack, int (N,), confirmation draws; -1 where none were made.
        flags: by defense and attack, uint8 (N,), see `RecordColumns`.
    """

    images: Images
    predictions: dict[tuple[str, str], Array]
    missed: dict[tuple[str, str], Array]
    flags: dict[tuple[str, str], Array]

    @classmethod
    def of(cls, rows: Sequence[_Row], records: Records, images: Images) -> _Found:
        """Read them."""
        images = images.at(np.argsort(images.ids))
        columns, places = {}, {}
        for row in rows:
            cell = columns[row.name, row.text] = records.cell(row.key)
            confirmed = row.confirms and records.is_random(row.target_key) is not False
            places[row.name, row.text] = cell.find(images.digests, confirmed=confirmed)
        # Rows must have the same images: one whose file is lost during the evaluation has records in some rows only.
        whole = np.all([place >= 0 for place in places.values()], axis=0)
        found = {key: cell.at(places[key][whole]) for key, cell in columns.items()}
        return cls(
            images.at(whole),
            {key: cell.predictions for key, cell in found.items()},
            {key: cell.missed for key, cell in found.items()},
            {key: cell.flags for key, cell in found.items()},
        )


def _cells(rows: Sequence[_Row], found: _Found, settings: EvaluationSettings) -> tuple[Cell, ...]:
    """Scores of every defense under every attack, then under the worst attack of every radius."""
    labels, draws = found.images.labels, settings.score_draws
    by_name: dict[str, list[_Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    cells: list[Cell] = []
    reference: dict[str, Array] = {}
    for name, own in by_name.items():
        target = own[0].target
        predictions = {
            row.text: np.broadcast_to(found.predictions[name, row.text], (len(labels), draws)) for row in own
        }
        columns = [(row.text, None if row.radius is None else row.radius[1], predictions[row.text]) for row in own]
        for radius in dict.fromkeys(row.radius for row in own if row.confirms):
            assert radius is not None
            candidates = [row.text for row in own if row.radius == radius]
            missed = {text: _missed(found, name, text, labels, draws) for text in candidates}
            # argmax takes the first of equal ones: the attack that misleads most draws of all images.
            candidates.sort(key=lambda text: -missed[text].sum())
            worst = np.argmax([missed[text] for text in candidates], axis=0)
            chosen = np.empty((len(labels), draws), np.uint16)
            for place, text in enumerate(candidates):
                chosen[worst == place] = predictions[text][worst == place]
            norm = "" if radius[0] == "linf" else f"{radius[0]} "
            columns.append((f"{WORST} {norm}{radius_text(radius[1])}", radius[1], chosen))
        sigma = getattr(target, "sigma", None)
        case = str(getattr(target, "case", ModuleTarget.case))
        for text, epsilon, classes in columns:
            shares = (classes == labels[:, None]).mean(axis=1)
            first = reference.setdefault(text, shares)
            cells.append(
                Cell(
                    name,
                    sigma,
                    bool(getattr(target, "is_frozen", False)),
                    "undefended" if isinstance(target, De3) and sigma is None else case,
                    text,
                    epsilon,
                    score(classes, labels),
                    None if first is shares or len(labels) < 2 else paired_difference(shares, first),
                )
            )
    return tuple(cells)


def _missed(found: _Found, name: str, text: str, labels: Array, draws: int) -> Array:
    """Confirmation draws that miss, int (N,): of a defense that is not random, all or none, as its answer is."""
    missed, predictions = found.missed[name, text], found.predictions[name, text]
    return np.where(missed < 0, draws * (predictions[:, 0] != labels), missed)


def _health(rows: Sequence[_Row], found: _Found, cells: Sequence[Cell], fingerprints: Fingerprints) -> list[str]:
    """Warnings of the checks that tell a failed attack from a robust defense (docs/method.md, "Health checks")."""
    targets = {row.name: row.target for row in rows}
    notes = []
    for name, target in targets.items():
        if hint := normalisation_hint(target):
            notes.append(f"{name}: {hint}")
    count = len(found.images)
    for (name, text), flags in found.flags.items():
        zero = int(np.count_nonzero(flags & RecordColumns.ZERO_GRADIENT))
        bad = int(np.count_nonzero(flags & RecordColumns.BAD_GRADIENT))
        if bad or zero > count / 20:
            notes.append(
                f"{name} under {text}: the gradient was zero at some step for {zero} and not finite for {bad} of "
                f"{count} images; the attack is weaker than it looks (docs/method.md, health checks)"
            )
    by_place = {(cell.defense, cell.attack): cell for cell in cells}
    attacks = dict.fromkeys(cell.attack for cell in cells if cell.attack != CLEAN)
    for name, frozen in targets.items():
        for other, random in targets.items():
            if not _is_frozen_twin(frozen, random, fingerprints):
                continue
            pairs = {text: (by_place[name, text].scores.mean, by_place[other, text].scores.mean) for text in attacks}
            below = [f"{text}: {a} against {b}" for text, (a, b) in pairs.items() if a.high < b.low]
            if below:
                notes.append(
                    f"{name} is less accurate than {other}, whose noise is random ({'; '.join(below)}): randomness, "
                    "not denoising, carries the difference (docs/method.md, health checks)"
                )
    return notes


def _is_frozen_twin(frozen: Any, random: Any, fingerprints: Fingerprints) -> bool:
    """Whether two defenses differ in nothing but that the noise of the first is fixed."""
    if not (isinstance(frozen, De3) and isinstance(random, De3) and frozen.is_frozen and not random.is_frozen):
        return False
    settings = ("case", "sigma", "mask_ratio", "draws", "aggregate")
    return all(getattr(frozen, key) == getattr(random, key) for key in settings) and all(
        fingerprints.of(getattr(frozen, key)) == fingerprints.of(getattr(random, key))
        for key in ("classifier", "denoiser")
    )
