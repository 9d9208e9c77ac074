"""The work of one process: what has no record yet is attacked, scored and recorded, pass by pass."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from denim.defense.attacks import Attack, AttackMethod, radius_text
from denim.defense.de3 import De3
from denim.defense.gallery import Gallery
from denim.defense.images import Images, batches_of, pixels_of, same_again
from denim.defense.probe import probe_randomness
from denim.defense.records import RecordColumns, Records
from denim.defense.rows import EvaluationSettings, Row
from denim.defense.targets import ROUNDING, ModuleTarget, keyed_generators
from denim.kernels import Domain, check_pixels, derive_seeds
from denim.nim.checkpoint import first_words
from denim.nim.classifier import check_logits
from denim.nim.data import Batch, Loader, PlannedLoader
from denim.nim.progress import LineClock, clock_text
from denim.nim.ranks import Ranks
from denim.nim.stopping import StopRequest

__all__ = ["Work", "device_of"]

Array = npt.NDArray[Any]


def device_of(target: Any) -> torch.device:
    """Where a target computes: the device of its first parameter or buffer, the CPU where it has none."""
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


class Work:
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
        rows: Sequence[Row],
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
        self.gallery: list[Gallery] = []
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
            self.gallery.append(Gallery(self.out, row, shown))
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
            pixels, ids = pixels_of(few, device_of(target)), few.ids.to(device_of(target))
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
        target, device = row.target, device_of(row.target)
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


def _attack(row: Row, clean: Tensor, labels: Tensor, ids: Tensor, seed: int, limit: int) -> _Attacked:
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
