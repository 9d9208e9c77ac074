"""The work of one process: what has no record yet is attacked, scored and recorded, pass by pass."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor, nn

from denim.defense.attacked import KeptImages
from denim.defense.attacks import Attack, AttackMethod, radius_text
from denim.defense.de3 import De3
from denim.defense.gallery import Gallery
from denim.defense.generators import keyed_generators
from denim.defense.images import Images, batches_of, pixels_of, same_again
from denim.defense.probe import probe_randomness
from denim.defense.progress import GRADIENT_PASSES, EvaluationProgress
from denim.defense.records import RecordColumns, Records
from denim.defense.rows import EvaluationSettings, Row, most_gradients
from denim.defense.targets import ROUNDING, ModuleTarget
from denim.kernels import Domain, check_pixels, derive_seeds
from denim.nim.checkpoint import first_words
from denim.nim.classifier import check_logits
from denim.nim.data import Batch, Loader, PlannedLoader
from denim.nim.lean import is_plain
from denim.nim.ranks import Ranks
from denim.nim.stopping import StopRequest

__all__ = ["Work", "device_of", "is_out_of_memory"]

Array = npt.NDArray[Any]
# Passes that rows of one group fill, before the images that are left make one that is not full.
FULL_PASSES = 8


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
def _predict(
    target: Any, pixels: Tensor, seeds: Tensor, ids: Tensor, max_batch: int, sigma: Tensor | None = None
) -> Tensor:
    """Predictions (draws, B) for seeds (draws * n, B), one draw where the target is not random.

    At most max_batch images go through the networks in one pass. Of a De3, images may have levels of their own.
    """
    draws = _draws_of(target)

    def predict(part: Tensor) -> Tensor:
        blocks = []
        images = max(1, max_batch // len(part))
        for first in range(0, len(pixels), images):
            rows = slice(first, first + images)
            levels = {} if sigma is None else {"sigma": sigma[rows]}
            logits = target.draw_logits(pixels[rows], part[:, rows], **levels)
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

    def at(self, rows: Array) -> _Attacked:
        """Those of these rows, int (M,)."""
        pixels = self.pixels[torch.from_numpy(rows).to(self.pixels.device)]
        return _Attacked(pixels, self.flags[rows], self.gradients[rows])


class _Group(NamedTuple):
    """Rows that are computed in one batch, and which image of a batch is of which row.

    Attributes:
        rows: with their numbers; of several, each is a De3 of another level under the same attack.
        of: int (B,), for each image the place of its row in `rows`.
    """

    rows: Sequence[tuple[int, Row]]
    of: Array

    def __str__(self) -> str:
        return self.text({})

    def text(self, right: Mapping[int, tuple[float, int]]) -> str:
        """Names of the rows, with their accuracies where they are known, and the attack.

        Args:
            right: see `Work`.
        """
        names = [row.name for _, row in self.rows]
        for place, (number, _) in enumerate(self.rows):
            if number in right:
                share, count = right[number]
                names[place] += f" {100 * share / count:.1f} %"
        known = " right so far" if any(number in right for number, _ in self.rows) else ""
        return f"{', '.join(names)}{known} under {self.rows[0][1].text}"

    def sigma(self, device: torch.device) -> Tensor | None:
        """float32 (B,), the noise level of each image; None for a single row, whose target has its own."""
        if len(self.rows) == 1:
            return None
        levels = np.array([row.target.sigma for _, row in self.rows], np.float32)
        return torch.from_numpy(levels[self.of]).to(device)


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
        only: bool, of the images of this process those that are wanted; None wants all.
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
        only: Array | None = None,
    ) -> None:
        self.only = np.ones(len(own), bool) if only is None else only
        self.rows, self.loader, self.own, self.settings, self.out = rows, loader, own, settings, out
        self.records, self.console, self.stop, self.ranks = records, console, stop, ranks
        self.lacking: list[Array] = []
        self.gallery: list[Gallery] = []
        self.kept: dict[int, KeptImages] = {}  # by row, where attacked images are kept
        self.num_classes: int | None = None
        self.batches: Iterator[tuple[int, Batch]] = iter(())
        # By defense, where memory has not sufficed: images in a pass.
        self.limits: dict[str, int] = {}
        # Of the batch that is open: predictions by domain, defense, place of the image, and digest of the candidate.
        self.scored: dict[tuple[Domain, bytes, int, bytes], Array] = {}
        # By row, of the new records: shares of right predictions, added up, and how many records.
        self.right: dict[int, tuple[float, int]] = {}
        self.gradients = 0  # of the new records, as far as the attacks say

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
            lacking = self.only & (columns.find(self.own.digests, confirmed=confirmed) < 0)
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
            if self.settings.keep_attacked and row.attack is not None:
                self.kept[len(self.lacking) - 1] = KeptImages(self.out, row, self.own, self.ranks.rank)
        if changed:
            self.say(
                f"{len(changed)} of {len(self.own)} images or their labels have changed since they were evaluated; "
                "what is known of them is computed again"
            )

    def _wanted(self) -> list[Array]:
        """By row, the images that are attacked: those that lack a record, or a place among the images that are kept."""
        wanted = []
        for number, (lacking, gallery) in enumerate(zip(self.lacking, self.gallery, strict=True)):
            rows = lacking.copy()
            rows[: gallery.wanted] = True
            if number in self.kept:
                rows |= self.kept[number].lacking & self.only
            wanted.append(rows)
        return wanted

    def examine(self, images: Images, classes: Sequence[str]) -> None:
        """Look at every defense that will compute something, on one batch, before anything is computed.

        All ranks must come here: what one of them finds random is random for all. Afterwards `num_classes` is that of
        the defenses.

        Args:
            images: those of all ranks.
            classes: names, may be empty.
        """
        counts: dict[str, int] = {}
        random: dict[str, bool] = {}
        known: dict[str, int] = {}
        with self.ranks.together():
            self._plan()
            for row in self.rows:
                if (kept := self.records.kept(row.target_key)) is not None:
                    known[row.name] = kept["classes"]
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
        counts = {**known, **counts}
        _check_classes(counts, images, classes)
        self.num_classes = next(iter(counts.values()), None)
        if self.ranks.is_first:
            for row in {row.name: row for row in self.rows if row.name in counts and row.name not in known}.values():
                self.records.keep(row.target_key, {"classes": counts[row.name]})

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
                    _refuse_hidden_draws(target, pixels)
                logits = target.draw_logits(pixels, target.seeds(self.settings.seed, Domain.SELECTION, ids, 1))
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise MemoryError(
                        f"{name}: a pass of {len(ids)} images does not fit into memory ({error}); take another "
                        "precision, or a device with more memory"
                    ) from error
                raise ValueError(f"{name} does not take pixels of shape {tuple(pixels.shape)}: {error}") from error
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
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
        wanted = self._wanted()
        passes = self._announce(wanted)
        with EvaluationProgress(self.console, int(np.sum(self.lacking)), passes) as progress:
            for step, batch in self.batches:
                places, open_batch = self._opened(step, batch, np.any(wanted, axis=0))
                self.scored.clear()
                for numbers in self._kin():
                    of, chosen = np.nonzero(np.stack([wanted[number][places] for number in numbers]))
                    group = _Group([(number, self.rows[number]) for number in numbers], of)
                    for count in self._compute(group, _at(open_batch, chosen), places[chosen], progress):
                        progress.finish(count, count * self._most_passes(group.rows[0][1])[1], group.text(self.right))
                        self.stop.heed()
                    for number in self.kept.keys() & set(numbers):
                        self.kept[number].finish(step)
            for gallery in self.gallery:
                gallery.finish()
            progress.close(self.gradients)

    def _announce(self, wanted: Sequence[Array]) -> int:
        """Say what is to come, and return the passes of one image and one draw that it takes at most."""
        records = gradients = passes = silent = 0
        for row, lacking, attacked in zip(self.rows, self.lacking, wanted, strict=True):
            if count := int(attacked.sum()):
                each = most_gradients(row, self.num_classes or 2)
                silent += each is None
                records, gradients = records + int(lacking.sum()), gradients + count * (each or 0)
                of_attack, of_scores = self._most_passes(row)
                passes += count * of_attack + int(lacking.sum()) * of_scores
        if records or gradients:
            others = f", and those of {silent} rows whose attacks do not say how many" if silent else ""
            self.say(f"{records} records to make, by at most {gradients:,} gradients of one draw{others}")
        return passes

    def _most_passes(self, row: Row) -> tuple[int, int]:
        """Passes of one image and one draw that a record takes at most: for its attack and for its scores."""
        draws, scores = _draws_of(row.target), 1
        if row.target.is_random:
            scores = int(self.settings.score_draws) * (1 + row.confirms)
        return GRADIENT_PASSES * draws * (most_gradients(row, self.num_classes or 2) or 0), draws * scores

    def _kin(self) -> list[list[int]]:
        """Numbers of the rows that are computed together: of a De3 at several levels, under one attack."""
        groups: dict[Any, list[int]] = {}
        for number, row in enumerate(self.rows):
            groups.setdefault(_all_but_sigma(row) or number, []).append(number)
        return list(groups.values())

    def batch_of(self, images: Images) -> Batch:
        """Some images of this process as one batch, without those that cannot be read.

        Args:
            images: of `own`, in its order.

        Raises:
            ValueError: an image has changed since it was identified.
        """
        wanted = np.isin(self.own.ids, images.ids)
        batches = [self._opened(*opened, wanted)[1] for opened in batches_of(self.loader, np.unique(images.steps))]
        return Batch(*(torch.cat(parts) for parts in zip(*((b.images, b.labels, b.ids) for b in batches), strict=True)))

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

    def _compute(self, group: _Group, batch: Batch, places: Array, progress: EvaluationProgress) -> Iterator[int]:
        """Attack and score images of a group, pass by pass; yields the number of new records after each."""
        settings, (row, *_) = self.settings, [row for _, row in group.rows]
        target, device = row.target, device_of(row.target)
        draws = _draws_of(target)
        each = draws * (int(getattr(row.attack, "eot", 1)) if row.attack is not None and target.is_random else 1)
        first = 0
        while first < len(places):
            limit = min(self.limits.get(row.name, settings.max_batch) for _, row in group.rows)
            most = max(1, limit // each)
            if row.attack is not None and _takes(row.attack, "max_batch"):
                # All images of a row, as if it were alone, or of all rows as many as fill passes: an attack keeps some
                # copies of each image.
                most = max(int(np.bincount(group.of).max()), FULL_PASSES * most)
            part = np.arange(first, min(len(places), first + most))
            failure: Exception | None = None
            try:
                some = group._replace(of=group.of[part])
                count = self._pass(some, _at(batch, part), places[part], device, limit, progress)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # which would keep the tensors
            except ValueError as error:  # of an attack, which does not know what the row is called
                raise ValueError(f"{group}: {error}") from error
            if failure is None:
                first += len(part)
                yield count
                continue
            used = min(limit, len(part) * max(each, int(settings.score_draws) * draws if target.is_random else 1))
            if used <= 1:
                raise MemoryError(
                    f"{group}: the passes of one image do not fit into memory ({failure}); take a smaller eot, another "
                    "precision, or a device with more memory"
                ) from failure
            self.limits |= {row.name: used // 2 for _, row in group.rows}
            self.say(f"out of memory for {group}: from now on at most {used // 2} images in a pass")
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _pass(
        self,
        group: _Group,
        batch: Batch,
        places: Array,
        device: torch.device,
        limit: int,
        progress: EvaluationProgress,
    ) -> int:
        """Attack and score some images, append their records, and return how many."""
        started = time.perf_counter()
        settings, row = self.settings, group.rows[0][1]
        target, sigma = row.target, group.sigma(device)
        clean, labels, ids = pixels_of(batch, device), batch.labels.to(device), batch.ids.to(device)
        some, back = np.arange(len(places)), np.arange(len(places))
        if sigma is not None and getattr(row.attack, "gray", False):  # the same at every level
            _, some, back = np.unique(places, return_index=True, return_inverse=True)
        at = torch.from_numpy(some).to(device)
        levels = None if sigma is None else sigma[at]
        most = most_gradients(row, self.num_classes or 2) or 0
        progress.begin(group.text(self.right), len(some), len(some) * most, len(places) * self._most_passes(row)[0])
        attacked = _attack(row, str(group), clean[at], labels[at], ids[at], settings.seed, limit, levels, progress.tell)
        attacked = attacked.at(back)
        # The others are attacked again for images that are kept.
        lacking = np.stack([self.lacking[number] for number, _ in group.rows])[group.of, places]
        digests = [
            hashlib.blake2b(image.numpy(), digest_size=16).digest() for image in attacked.pixels.cpu().contiguous()
        ]

        def predict(domain: Domain, new: Array) -> Array:
            """Predictions (N, R) of these images.

            Draws do not depend on the attack: what several attacks return, be it the clean image, has one score.
            """
            keys = [(domain, group.rows[group.of[i]][1].target_key, int(places[i]), digests[i]) for i in new]
            unknown = [number for number, key in enumerate(keys) if key not in self.scored]
            if unknown:
                rows = torch.from_numpy(new[unknown]).to(device)
                seeds = target.seeds(settings.seed, domain, ids[rows], int(settings.score_draws))
                levels = None if sigma is None else sigma[rows]
                found = _predict(target, attacked.pixels[rows], seeds, ids[rows], limit, levels).T.cpu().numpy()
                self.scored.update(zip((keys[number] for number in unknown), found, strict=True))
            return np.stack([self.scored[key] for key in keys])

        def score(new: Array) -> tuple[Array, Array]:
            """Confirmation draws that missed, (N,), and predictions on the score draws, (N, R)."""
            missed = np.full(len(new), -1)
            if row.confirms and target.is_random:
                missed = (predict(Domain.CONFIRMATION, new) != labels.cpu().numpy()[new, None]).sum(axis=1)
            return missed, predict(Domain.SCORE, new)

        new = np.flatnonzero(lacking)
        missed, predictions = np.empty(0), np.empty(0)
        if len(new):
            try:
                missed, predictions = score(new)
            except FloatingPointError:
                self._name_broken(group, new, score)
                raise
        each = (time.perf_counter() - started) / len(places)
        for place, (number, one) in enumerate(group.rows):
            own = new[group.of[new] == place]
            if len(own):
                here = np.searchsorted(new, own)
                block = RecordColumns(
                    self.own.digests[places[own]],
                    self.own.ids[places[own]],
                    self.own.labels[places[own]],
                    predictions[here],
                    missed[here],
                    attacked.flags[own],
                    attacked.gradients[own],
                    np.full(len(own), each),
                )
                names = (one.name, one.text)
                self.records.append(one.key, one.target_key, bool(target.is_random), names, block)
                share, count = self.right.get(number, (0.0, 0))
                right = float((block.predictions == block.labels[:, None]).mean(axis=1).sum())
                self.right[number] = share + right, count + len(own)
                self.gradients += int(block.gradients.clip(min=0).sum())
            mine = np.flatnonzero(group.of == place)
            at = torch.from_numpy(mine).to(device)
            self.gallery[number].add(places[mine], clean[at], attacked.pixels[at], labels[at], ids[at], settings.seed)
            if number in self.kept:
                self.kept[number].add(places[mine], attacked.pixels[at])
        return len(new)

    @staticmethod
    def _name_broken(group: _Group, new: Array, score: Callable[[Array], object]) -> None:
        """Raise FloatingPointError with the row, of a group whose logits are not finite somewhere."""
        for place, (_, row) in enumerate(group.rows):
            if len(own := new[group.of[new] == place]):
                try:
                    score(own)
                except FloatingPointError as error:
                    raise FloatingPointError(f"{row.name} under {row.text}: {error}") from error


def _all_but_sigma(row: Row) -> Hashable:
    """Equal for rows whose targets differ in the level of a De3 alone; None for those that stand by themselves."""
    target = row.target
    if not (row.attack is None or type(row.attack) is Attack) or type(target) is not De3 or target.sigma is None:
        return None
    if not is_plain(target, De3) or {"draw_logits", "seeds"} & vars(target).keys():
        return None
    modules = id(target.denoiser), id(target.classifier)
    settings = target.degrade, target.mask_ratio, target.statistics, target.draws, target.aggregate
    return row.text, modules, settings, target.is_random, target.seed if target.is_frozen else None


def _at(batch: Batch, rows: Array) -> Batch:
    chosen = torch.from_numpy(rows)
    return Batch(
        batch.images[chosen.to(batch.images.device)], batch.labels[chosen.to(batch.labels.device)], batch.ids[chosen]
    )


def _refuse_hidden_draws(defense: De3, pixels: Tensor) -> None:
    """Refuse a classifier that draws without a word: it would be attacked and scored as one that does not."""
    found = probe_randomness(defense.classifier, pixels)
    if found.declared or found.largest <= ROUNDING * found.scale:
        return
    raise ValueError(
        f"its classifier draws by itself in evaluation mode ({found}). If that is meant, set is_random = True on the "
        "classifier: then it is attacked over many draws and scored on fresh ones. Otherwise look for dropout "
        "that stays on, or for noise in its code"
    )


def _takes(attack: AttackMethod, option: str) -> bool:
    """Whether an attack has an option of `Attack.run`: a `max_batch` says that it bounds the memory of its passes."""
    return option in inspect.signature(attack.run).parameters


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory does not suffice."""
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


def _attack(
    row: Row,
    where: str,
    clean: Tensor,
    labels: Tensor,
    ids: Tensor,
    seed: int,
    limit: int,
    sigma: Tensor | None,
    tell: Callable[[int, int], None],
) -> _Attacked:
    """The candidates for clean images (B, C, H, W), which may have noise levels of their own.

    Args:
        where: what is attacked and how, for messages.
        tell: see `Attack.run`.

    Raises:
        ValueError: the attack returns something else, or pixels outside of [0, 1].
    """
    count = len(clean)
    if row.attack is None:
        return _Attacked(clean, np.zeros(count, np.uint8), np.zeros(count, np.int64))
    options: dict[str, Any] = {"max_batch": limit} if _takes(row.attack, "max_batch") else {}
    if isinstance(row.attack, Attack):
        options |= {} if sigma is None else {"sigma": sigma}
        options |= {"tell": tell} if _takes(row.attack, "tell") else {}
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
        raise ValueError(f"{where}: the attack returned images that are none: {error}") from error

    def column(name: str, missing: int) -> Array:
        values = getattr(found, name, None)
        return np.full(count, missing) if values is None else values.cpu().numpy().astype(np.int64)

    flags = RecordColumns.ZERO_GRADIENT * column("zero_gradients", 0) + RecordColumns.BAD_GRADIENT * column(
        "bad_gradients", 0
    )
    return _Attacked(pixels, flags.astype(np.uint8), column("gradients", -1))
