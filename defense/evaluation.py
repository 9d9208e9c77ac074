"""Evaluation: defenses x attacks, one record per image, scored on fresh draws, resumable.

Three disjoint sets of draws (docs/method.md): the attack chooses its candidate on *selection* draws, *confirmation*
draws choose the worst attack per image, and *score* draws, which nothing has seen, are used once, at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from denim.defense.attacks import Attack, radius_text
from denim.defense.de3 import De3
from denim.defense.scores import Interval, Scores, paired_difference, score
from denim.kernels import Domain
from denim.kernels.seeds import check_seed
from denim.nim.checkpoint import first_words, with_todays_names
from denim.nim.classifier import check_logits
from denim.nim.data import Batch, Loader
from denim.nim.files import append_text, atomic_write, read_json, read_json_lines
from denim.nim.owner import owned
from denim.nim.precision import check_precision, precise, resolve_precision
from denim.nim.progress import LineClock, clock_text
from denim.nim.stopping import StopRequest, stop_requests
from denim.nim.text import open_console

__all__ = ["Cell", "Evaluation", "EvaluationSettings", "Examples", "HealthWarning", "evaluate"]

CLEAN = "none"
# Types of the entries of a record in records.jsonl. Those of the first version have no "image".
RECORD = {
    **dict.fromkeys(("defense", "attack"), str),
    **dict.fromkeys(("id", "label", "missed", "zero_gradients", "bad_gradients"), int),
    "predictions": list,
}
WORST = "worst"


class HealthWarning(UserWarning):
    """A health check doubts a result (docs/method.md). `Evaluation.warnings` and the report have all such warnings."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        attacks: text forms of attacks, see `Attack`; a row without an attack is always added.
        score_draws: R, fresh draws per image for the score, and again for the confirmation.
        seed: of the evaluation.
        max_batch: images that go through the networks in one pass; bounds memory. At least one image, with all draws of
            a gradient of the attack, is in a pass.
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
        names = [str(Attack.parse(attack)) for attack in self.attacks]
        if len(set(names)) < len(names):
            raise ValueError(f"attacks must differ, got {', '.join(names)}")


@dataclass(frozen=True)
class Cell:
    """One defense under one attack.

    Attributes:
        defense: name of the defense.
        sigma: its noise level, None for off.
        frozen: whether its noise is fixed and known to the attacker.
        case: what its classifier sees, see `De3.case`; "undefended" for off.
        attack: text form, "none", or "worst EPSILON" (per image the attack of that radius that misleads most
            confirmation draws).
        epsilon: radius in [0, 1] units, None without an attack.
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
    defenses: Mapping[str, De3],
    loader: Loader,
    settings: EvaluationSettings,
    out: Path,
    *,
    classes: Sequence[str] = (),
    console: Console | None = None,
) -> Evaluation:
    """Attack and score defenses.

    Every (defense, attack, image) gives one line in `out/records.jsonl`; a call on the same folder goes on where an
    earlier one stopped, with the same result. A record holds a digest of the image that it was computed from. Images
    that have changed since then, or whose labels have, are evaluated again, and those that are gone are not counted.

    Args:
        defenses: by name, put into evaluation mode; the first one is what the others are compared with.
        loader: its epoch 0 yields the images, in any order; rows that are not real are not counted, nor are images
            that could not be read for every defense and attack.
        settings: attacks, score draws and seed.
        out: folder of the evaluation.
        classes: names of the classes, for the report.
        console: for progress.

    Raises:
        ValueError: no defense, no images, a precision that the device lacks, `out` holds an evaluation of other
            settings, weights or images, or images change while they are evaluated.
        OwnedError: another process writes to `out`.
        Stopped: SIGTERM or Ctrl-C; raised after the batch that was running, whose records are kept.
        FloatingPointError: logits are not finite; the message names the defense, the attack and the images.
    """
    console = console or open_console(stderr=True)
    if not defenses:
        raise ValueError("evaluate needs at least one defense")
    attacks: list[Attack | None] = [None, *(Attack.parse(text) for text in settings.attacks)]
    for defense in defenses.values():
        defense.eval()
    device = _device_of(next(iter(defenses.values())))
    settings = replace(settings, precision=resolve_precision(settings.precision, device))
    stopped = f"the finished part is in {out}: the same call goes on there"
    with owned(out), stop_requests(stopped) as stop, precise(settings.precision, device):
        return _evaluate(defenses, attacks, loader, settings, out, classes, console, stop)


def _evaluate(
    defenses: Mapping[str, De3],
    attacks: Sequence[Attack | None],
    loader: Loader,
    settings: EvaluationSettings,
    out: Path,
    classes: Sequence[str],
    console: Console,
    stop: StopRequest,
) -> Evaluation:
    first = next(loader.epoch(0), None)
    if first is None:
        raise ValueError("evaluate needs images, and the loader yields none")
    _claim_folder(out, defenses, settings)
    records = _Records(out / "records.jsonl")
    _refuse_other_images(out, first.counted(), records)
    # Sample id -> digest, of the images that every cell has met.
    images: dict[int, str] = {}
    changed: set[int] = set()
    notes: list[str] = []
    work = [(name, defense, attack) for name, defense in defenses.items() for attack in attacks]
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}", markup=False),
    )
    has_bar = console.is_terminal or console.is_jupyter
    progress = Progress(*columns, console=console, disable=not has_bar)
    started, lines = time.perf_counter(), LineClock()
    task = progress.add_task("evaluating", total=len(work), state="")
    with progress:
        for number, (name, defense, attack) in enumerate(work):
            text = CLEAN if attack is None else str(attack)
            progress.update(task, completed=number, state=f"{name}, {text}")

            def after_part(images: int, where: str = f"{number}/{len(work)}  {name}, {text}") -> None:
                if not has_bar and lines.due():
                    console.print(f"evaluating: {where}, {images} images", markup=False, soft_wrap=True)
                stop.heed()

            seen, stale = _evaluate_cell(name, defense, attack, text, loader, settings, out, records, after_part)
            images = {i: digest for i, digest in seen.items() if not number or i in images}
            if new := stale - changed:
                changed |= new
                console.print(
                    f"evaluating: {len(new)} of {len(seen)} images or their labels have changed since they were "
                    "evaluated; what is known of them is computed again"
                )
        progress.update(task, completed=len(work), state="")
    passed = clock_text(time.perf_counter() - started)
    console.print(f"evaluating: {len(work)}/{len(work)}  in {passed}", markup=False)
    # Cells must have the same images. One whose file is lost during the evaluation has records in some cells only, and
    # one that is no longer among the images has earlier records.
    moving = records.restrict(images)
    if moving:
        raise ValueError(
            f"{len(moving)} images have changed while they were evaluated (sample ids {first_words(moving)}): the same "
            "call evaluates them again"
        )
    cells = _cells(defenses, attacks, records)
    notes += _health(defenses, cells, records)
    if bad := loader.state()["bad"]:
        notes.append(f"{len(bad)} images could not be read and are not counted: {'; '.join(bad.values())}")
    evaluation = Evaluation(
        cells,
        tuple(classes),
        settings,
        tuple(notes),
        {package: version(package) for package in ("torch", "timm", "numpy", "denim-vision")},
        {(name, CLEAN if a is None else str(a)): _load_examples(out, name, a) for name in defenses for a in attacks}
        if settings.examples
        else {},
    )
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
        warnings.warn(note, HealthWarning, stacklevel=2)
    return evaluation


def _device_of(defense: De3) -> torch.device:
    return next((tensor.device for tensor in defense.classifier.parameters()), torch.device("cpu"))


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _claim_folder(out: Path, defenses: Mapping[str, De3], settings: EvaluationSettings) -> None:
    """Write evaluation.json, or check that the one in the folder is of the same settings and weights."""
    modules = {id(module): module for de3 in defenses.values() for module in (de3.classifier, de3.denoiser) if module}
    weights = {key: _digest(module.state_dict().values()) for key, module in modules.items()}
    content = {
        # max_batch changes nothing but memory.
        "settings": {key: value for key, value in asdict(settings).items() if key != "max_batch"},
        "defenses": {
            name: {
                "settings": de3.extra_repr(),
                "classifier": weights[id(de3.classifier)],
                "denoiser": weights.get(id(de3.denoiser)),
            }
            for name, de3 in defenses.items()
        },
    }
    content = json.loads(json.dumps(content))
    file = out / "evaluation.json"
    earlier = read_json(file) if file.exists() else content
    earlier.pop("images", None)  # of the first batch, by earlier versions
    if isinstance(chosen := earlier.get("settings"), dict):
        # The first versions had no other precision.
        earlier["settings"] = with_todays_names({"precision": "fp32", **chosen}, content["settings"])
    if earlier != content:
        raise ValueError(
            f"{out} holds an evaluation of other settings, weights or images; see {file.name} there, or choose another "
            "folder"
        )
    if not file.exists():
        with atomic_write(file) as staged:
            staged.write_text(json.dumps(content, indent=2) + "\n")


def _image_digests(batch: Batch) -> dict[int, str]:
    """Sample id -> digest of the image and its label."""
    labels, images = batch.labels.tolist(), batch.images.cpu()
    return {
        i: _digest((torch.tensor(label), image))
        for i, label, image in zip(batch.ids.tolist(), labels, images, strict=True)
    }


def _refuse_other_images(out: Path, first: Batch, records: _Records) -> None:
    """Do not replace the records of other images: at least one of the first batch must be as it was."""
    digests = _image_digests(first)
    earlier = [row for cell in records.rows.values() for row in cell.values()]
    # The first version kept no digests: its records are computed again.
    if any("image" in row for row in earlier) and not any(digests.get(row["id"]) == row["image"] for row in earlier):
        raise ValueError(
            f"{out} holds an evaluation of other images, or of images from another loader, whose pixels are not quite "
            "the same: choose another folder"
        )


class _Records:
    """records.jsonl: one line per (defense, attack, image), appended batch by batch."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        if file.exists():
            for row in read_json_lines(file, RECORD):
                self._add(row)
            # The file is rewritten without half a line at the end: the next record would be appended to it.
            with atomic_write(file) as staged:
                staged.write_text(
                    "".join(json.dumps(row) + "\n" for cell in self.rows.values() for row in cell.values())
                )

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.setdefault((row["defense"], row["attack"]), {})[row["id"]] = row

    def cell(self, name: str, attack: str) -> dict[int, dict[str, Any]]:
        return self.rows.get((name, attack), {})

    def restrict(self, images: Mapping[int, str]) -> list[str]:
        """Forget, in memory, images that are not among these; ids of those with records of another image."""
        self.rows = {place: {i: row for i, row in cell.items() if i in images} for place, cell in self.rows.items()}
        return [
            str(i) for i in images if any(cell[i]["image"] != images[i] for cell in self.rows.values() if i in cell)
        ]

    def append(self, rows: list[dict[str, Any]]) -> None:
        append_text(self.file, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            self._add(row)


@torch.no_grad()
def _predict(defense: De3, pixels: Tensor, seeds: Tensor, ids: Tensor, max_batch: int) -> Tensor:
    """Predictions (draws, B) for seeds (draws * defense.draws, B), in passes of at most max_batch images."""

    def predict(part: Tensor) -> Tensor:
        logits = defense.draw_logits(pixels, part)
        check_logits(logits, ids)
        return logits.argmax(dim=-1)

    if not defense.is_random:
        return predict(seeds[: defense.draws]).expand(len(seeds) // defense.draws, -1)
    block = max(1, max_batch // (len(pixels) * defense.draws)) * defense.draws
    return torch.cat([predict(part) for part in seeds.split(block)])


def _evaluate_cell(
    name: str,
    defense: De3,
    attack: Attack | None,
    text: str,
    loader: Loader,
    settings: EvaluationSettings,
    out: Path,
    records: _Records,
    after_part: Callable[[int], None],
) -> tuple[dict[int, str], set[int]]:
    """One cell. Returns the digest of every image by its id, and the ids of those that were evaluated anew.

    After each pass `after_part` is called with the number of images so far.
    """
    device = _device_of(defense)
    file = _examples_file(out, name, attack)
    seen: dict[int, str] = {}
    stale: set[int] = set()
    # The attack's passes hold eot draws of every image, each of them the defense's own draws.
    eot = attack.eot if attack and defense.is_random else 1
    rows = max(1, settings.max_batch // (eot * defense.draws))
    shown = _shown(file)
    wanted = 0 if shown else settings.examples
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for padded in loader.epoch(0):
        batch = padded.counted()
        digests = _image_digests(batch)
        seen |= digests
        # Records of these very images; those of the first version do not say of what they are.
        done = {i for i in digests if records.cell(name, text).get(i, {}).get("image") == digests[i]}
        stale |= {i for i in digests if i not in done and i in records.cell(name, text)}
        for part in range(0, len(batch.ids), rows):
            chosen = slice(part, part + rows)
            missing = sum(len(item[0]) for item in found) < wanted
            open_ids = torch.tensor([int(i) not in done or missing for i in batch.ids[chosen]])
            if not open_ids.any():
                continue
            ids, labels = batch.ids[chosen][open_ids].to(device), batch.labels[chosen][open_ids].to(device)
            clean = batch.images[chosen][open_ids].to(device).permute(0, 3, 1, 2).float() / 255
            pixels, zero, bad = clean, torch.zeros_like(ids), torch.zeros_like(ids)
            if attack is not None:
                pixels, zero, bad, _ = attack.run(defense, clean, labels, ids, settings.seed)
            confirmation = defense.seeds(settings.seed, Domain.CONFIRMATION, ids, settings.score_draws)
            fresh = defense.seeds(settings.seed, Domain.SCORE, ids, settings.score_draws)
            try:
                confirmed = _predict(defense, pixels, confirmation, ids, settings.max_batch)
                scored = _predict(defense, pixels, fresh, ids, settings.max_batch)
            except FloatingPointError as error:
                raise FloatingPointError(f"{name} under {text}: {error}") from error
            missed = (confirmed != labels).sum(dim=0).tolist()
            records.append(
                [
                    {
                        "defense": name,
                        "attack": text,
                        "id": int(ids[row]),
                        "label": int(labels[row]),
                        "image": digests[int(ids[row])],
                        "missed": missed[row],
                        "predictions": scored[:, row].tolist(),
                        "zero_gradients": int(zero[row]),
                        "bad_gradients": int(bad[row]),
                    }
                    for row in range(len(ids))
                    if int(ids[row]) not in done  # else the image is attacked again for the gallery alone
                ]
            )
            if missing:
                found.append((clean.cpu(), pixels.cpu(), labels.cpu(), ids.cpu()))
            after_part(len(seen) - len(batch.ids) + min(part + rows, len(batch.ids)))
    if wanted and found:
        clean, attacked, labels, ids = (torch.cat(parts)[:wanted] for parts in zip(*found, strict=True))
        _save_examples(file, defense, clean, attacked, labels, ids, [*seen.values()][:wanted], settings.seed, device)
    elif shown and shown != [*seen.values()][: settings.examples]:  # other images come first now
        file.unlink()
        _evaluate_cell(name, defense, attack, text, loader, settings, out, records, after_part)
    return seen, stale


def _examples_file(out: Path, name: str, attack: Attack | None) -> Path:
    text = f"{name} {CLEAN if attack is None else attack}"
    return out / "examples" / f"{quote(os.fsencode(text), safe=' ,=')}.safetensors"


@torch.no_grad()
def _save_examples(
    file: Path,
    defense: De3,
    clean: Tensor,
    attacked: Tensor,
    labels: Tensor,
    ids: Tensor,
    digests: Sequence[str],
    seed: int,
    device: torch.device,
) -> None:
    seeds = defense.seeds(seed, Domain.SCORE, ids.to(device), 1)[: defense.draws]
    pixels = attacked.to(device)
    tensors = {
        "clean": clean,
        "attacked": attacked,
        "noisy": defense.degraded(pixels, seeds[0]).cpu(),
        "denoised": defense.denoise(pixels, seeds=seeds[0]).cpu(),
        "labels": labels,
        "clean_predictions": defense.draw_logits(clean.to(device), seeds)[0].argmax(dim=-1).cpu(),
        "predictions": defense.draw_logits(pixels, seeds)[0].argmax(dim=-1).cpu(),
    }
    with atomic_write(file) as staged:
        whole = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        save_file(whole, staged, metadata={"images": json.dumps(digests)})


def _shown(file: Path) -> list[str]:
    """Digests of the images in a gallery; none where there is no gallery, or one that does not say what it shows."""
    if not file.exists():
        return []
    try:
        with safe_open(file, framework="pt") as content:
            names, header = set(content.keys()), content.metadata() or {}
        digests: list[str] = json.loads(header.get("images", "[]"))
    except (SafetensorError, ValueError) as error:
        warnings.warn(f"the gallery {file} is damaged, and is made again: {error}", stacklevel=2)
        return []
    if names != {field.name for field in fields(Examples)}:
        warnings.warn(f"the gallery {file} holds something else, and is made again", stacklevel=2)
        return []
    return digests


def _load_examples(out: Path, name: str, attack: Attack | None) -> Examples:
    return Examples(**load_file(_examples_file(out, name, attack)))


def _cells(defenses: Mapping[str, De3], attacks: Sequence[Attack | None], records: _Records) -> tuple[Cell, ...]:
    """Scores of every defense under every attack, then under the worst attack of every radius."""
    by_radius: dict[float, list[str]] = {}
    for attack in attacks:
        if attack is not None:
            by_radius.setdefault(attack.epsilon, []).append(str(attack))
    columns: list[tuple[str, float | None, list[str]]] = [
        (CLEAN if attack is None else str(attack), None if attack is None else attack.epsilon, []) for attack in attacks
    ]
    for radius, names in by_radius.items():
        if len(names) > 1:
            columns.append((f"{WORST} {radius_text(radius)}", radius, names))
    ids = sorted(records.cell(next(iter(defenses)), CLEAN))
    cells: list[Cell] = []
    reference: dict[str, np.ndarray[Any, Any]] = {}
    for name, defense in defenses.items():
        for text, epsilon, candidates in columns:
            rows = [records.cell(name, candidate) for candidate in candidates or [text]]
            rows.sort(key=lambda cell: -sum(cell[i]["missed"] for i in ids))
            # max takes the first of equal ones: the attack that misleads most draws of all images.
            worst = [max((row[i] for row in rows), key=lambda record: record["missed"]) for i in ids]
            predictions = np.array([record["predictions"] for record in worst])
            labels = np.array([record["label"] for record in worst])
            shares = (predictions == labels[:, None]).mean(axis=1)
            first = reference.setdefault(text, shares)
            cells.append(
                Cell(
                    name,
                    defense.sigma,
                    defense.is_frozen,
                    "undefended" if defense.sigma is None else defense.case,
                    text,
                    epsilon,
                    score(predictions, labels),
                    None if first is shares or len(ids) < 2 else paired_difference(shares, first),
                )
            )
    return tuple(cells)


def _health(defenses: Mapping[str, De3], cells: Sequence[Cell], records: _Records) -> list[str]:
    """Warnings of the checks that tell a failed attack from a robust defense (docs/method.md, "Health checks")."""
    notes = []
    for (name, text), rows in records.rows.items():
        zero = sum(row["zero_gradients"] for row in rows.values())
        bad = sum(row["bad_gradients"] for row in rows.values())
        if bad or zero > len(rows) / 20:
            notes.append(
                f"{name} under {text}: the gradient was zero at some step for {zero} and not finite for {bad} of "
                f"{len(rows)} images; the attack is weaker than it looks (docs/method.md, health checks)"
            )
    by_place = {(cell.defense, cell.attack): cell for cell in cells}
    attacks = dict.fromkeys(cell.attack for cell in cells if cell.epsilon is not None)
    for name, frozen in defenses.items():
        for other, random in defenses.items():
            alike = (frozen.case, frozen.sigma, frozen.mask_ratio) == (random.case, random.sigma, random.mask_ratio)
            if not frozen.is_frozen or random.is_frozen or not alike:
                continue
            pairs = {text: (by_place[name, text].scores.mean, by_place[other, text].scores.mean) for text in attacks}
            below = [f"{text}: {a} against {b}" for text, (a, b) in pairs.items() if a.high < b.low]
            if below:
                notes.append(
                    f"{name} is less accurate than {other}, whose noise is random ({'; '.join(below)}): randomness, "
                    "not denoising, carries the difference (docs/method.md, health checks)"
                )
    return notes
