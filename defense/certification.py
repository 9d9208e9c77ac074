"""Certificates by randomized smoothing (Cohen et al. 2019): no change of an image within a radius changes its class."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from denim.defense.certificates import (
    SELECTION,
    Certification,
    CertificationSettings,
    LevelCertificates,
    check_certifiable,
)
from denim.defense.de3 import De3
from denim.defense.fingerprint import Fingerprints
from denim.defense.images import Images, as_loader, batches_of, identify_all, pixels_of, same_again
from denim.defense.probe import probe_randomness
from denim.defense.targets import ROUNDING, ModuleTarget, normalisation_hint, own_models
from denim.defense.work import is_out_of_memory
from denim.kernels import Domain, derive_seeds
from denim.nim.checkpoint import first_words
from denim.nim.classifier import check_logits
from denim.nim.data import Batch, Loader, PlannedLoader
from denim.nim.files import append_text, json_lines, translated
from denim.nim.owner import owned_by_first
from denim.nim.parallel import compiled_blocks
from denim.nim.precision import precise, resolve_precision
from denim.nim.progress import LineClock, clock_text
from denim.nim.ranks import Ranks
from denim.nim.stopping import StopRequest, stop_requests
from denim.nim.text import open_console

__all__ = ["certify"]

Array = npt.NDArray[Any]

# Beside the code of the defense and its weights, what certificates depend on.
PACKAGES = ("torch", "timm", "denim-vision")
RECORDS = "certificates.jsonl"
ENTRIES: dict[str, type] = {
    "key": str, "id": int, "label": int, "sigma": float, "top": int, "draws": int, "successes": int, "bound": float,
}  # fmt: skip


def certify(
    defense: De3,
    data: Loader | DataLoader[Any] | Dataset[Any] | tuple[Tensor, Tensor],
    settings: CertificationSettings,
    out: Path,
    *,
    classes: Sequence[str] = (),
    console: Console | None = None,
    ranks: Ranks | None = None,
) -> Certification:
    """Certify the majority vote of a defense over its noise, image by image, at several noise levels.

    For each image n0 draws choose the top class; up to N further draws bound its probability p from below at confidence
    1 - alpha; if the bound exceeds 1/2, no change of the image by less than s Phi^-1(bound) in L2, s = sigma/255,
    changes the vote. With radii or a tolerance an estimation stops early (see `Estimation`), with the same alpha.

    Every draw is keyed by the seed, the sample id, the noise level and its number. So a certificate depends neither on
    the other images nor on the batch, but for the last bits of the networks' logits, which may depend on the batch.

    A certificate is one line of `out`/certificates.jsonl, or of certificates-K.jsonl if rank K has made it. It is kept
    under a digest of all that it was computed from: the weights, settings and code of the defense, the settings of the
    certification, the versions of torch, timm and Denim, and the image with its id and label. A call computes what has
    no line.

    Args:
        defense: `De3` with one draw per call, put into evaluation mode; its own sigma is not used.
        data: the images, see `denim.defense.images.as_loader`. Of a loader, epoch 0 is taken.
        settings: levels, draws and error.
        out: folder of the certification; it gets certificates.jsonl and results.json.
        classes: names of the classes, to check their number.
        console: for progress.
        ranks: the processes of the certification, which share `out` (see `denim.nim.ranks.joined`); by default this one
            alone. The batches are divided among them, by the loader if it was made for as many ranks, else here. All
            return the same.

    Returns:
        Certificates of all images.

    Raises:
        TypeError: no `De3`, or no data.
        ValueError: a defense that cannot be certified (see `check_certifiable`), one whose classifier draws by itself;
            no images, labels that are no classes, repeated sample ids, or images that change while they are certified.
        OwnedError: another process writes to `out`.
        DamagedFileError: certificates.jsonl holds something else.
        WriteError: `out` cannot be written to.
        Stopped: SIGTERM or Ctrl-C; finished certificates are kept.
        FloatingPointError: logits are not finite.
        MemoryError: one image does not fit into memory.
        RankError: another rank has failed, or does not answer.

    Source: Cohen, Rosenfeld and Kolter (2019), arXiv 1902.02918, algorithm CERTIFY.
    """
    check_certifiable(defense)
    ranks = ranks or Ranks()
    console = console or open_console(stderr=True, quiet=not ranks.is_first)
    defense.eval()
    device = next(chain(defense.parameters(), defense.buffers())).device
    compile = device.type == "cuda" if settings.compile is None else settings.compile
    settings = replace(settings, precision=resolve_precision(settings.precision, device), compile=compile)
    loader = as_loader(data)
    stopped = f"the finished certificates are in {out}: the same call goes on there"
    with (
        owned_by_first(out, ranks),
        stop_requests(stopped) as stop,
        precise(settings.precision, device),
        torch.no_grad(),
    ):
        own, images = identify_all(loader, ranks)
        if not len(images):
            raise ValueError("certify needs images, and the loader yields none")
        if len(np.unique(images.ids)) < len(images):
            raise ValueError("sample ids must be distinct: draws are keyed by them, and two images have one")
        notes = _doubts(defense, settings)
        if ranks.is_first:
            for note in notes:
                warnings.warn(note, stacklevel=2)
        with ranks.together():
            work = _Work(defense, loader, own, settings, out, device, console, stop, ranks)
            work.examine(images, classes)
        with compiled_blocks(own_models([defense]) if compile else ()):
            work.run()
        with ranks.naming():
            ranks.barrier()
        return work.results(images, classes, notes)


def _doubts(defense: De3, settings: CertificationSettings) -> list[str]:
    """What a user should know before anything is computed."""
    notes = []
    for sigma in settings.sigmas:
        largest = settings.largest_radius(sigma)
        if above := [f"{radius:g}" for radius in settings.radii if radius > largest]:
            notes.append(
                f"no image can be certified at radius {', '.join(above)} with sigma {sigma:g}: with {settings.draws} "
                f"draws and alpha {settings.alpha:g} the largest radius is {largest:.4g} in [0, 1] units; take more "
                "draws or more noise"
            )
    if hint := normalisation_hint(defense):
        notes.append(hint)
    return notes


@dataclass(eq=False)
class _Item:
    """One image at one noise level, on its way to a certificate."""

    place: int
    level: int
    pixels: Tensor
    sample: int
    selected: Array | None = None
    selection_left: int = 0
    top: int = -1
    asked: int = 0
    look: int = 0
    successes: int = 0
    bound: float = 0.0


@dataclass(frozen=True)
class _Part:
    """Draws of one item in one pass."""

    item: _Item
    first: int
    count: int


class _Work:
    """What one process computes: which of its images lack certificates at which levels, and these certificates."""

    def __init__(
        self,
        defense: De3,
        loader: Loader,
        own: Images,
        settings: CertificationSettings,
        out: Path,
        device: torch.device,
        console: Console,
        stop: StopRequest,
        ranks: Ranks,
    ) -> None:
        self.defense, self.loader, self.settings, self.out, self.ranks = defense, loader, settings, out, ranks
        self.file = out / (f"certificates-{ranks.rank}.jsonl" if ranks.rank else RECORDS)
        self.images, self.console, self.stop = own.at(np.argsort(own.steps, kind="stable")), console, stop
        self.device = device
        self.estimations = [settings.estimation(sigma) for sigma in settings.sigmas]
        # Levels are told apart by the bits of float64, which fill the place of the step in the key of a draw.
        self.level_keys = [struct.unpack("<q", struct.pack("<d", sigma))[0] for sigma in settings.sigmas]
        self.origins = _origins(defense, settings)
        self.keys = self._keys(self.images)
        found = self._read()
        self.lacking = np.array([[key not in found for key in row] for row in self.keys], bool)  # levels by images
        batches = batches_of(loader, np.unique(self.images.steps[self.lacking.any(axis=0)]))
        self.waiting = self._items(batches)
        self.room = settings.max_batch

    def _keys(self, images: Images) -> list[list[str]]:
        """By level and image, the digest of all that a certificate is computed from."""
        return [
            [hashlib.blake2b(origin + words.tobytes(), digest_size=16).hexdigest() for words in images.digests]
            for origin in self.origins
        ]

    def _read(self) -> dict[str, dict[str, Any]]:
        """The certificates that all ranks have kept, by key.

        What a killed process has left of a last line is passed over, and cut off where this one is going to append.
        """
        found: dict[str, dict[str, Any]] = {}
        for file in sorted({*self.out.glob("certificates-*.jsonl"), *self.out.glob(RECORDS)}):
            with translated(file), file.open("r+b" if file == self.file else "rb") as handle:
                whole = 0
                for value, end in json_lines(handle, file, ENTRIES):
                    found[value["key"]], whole = value, end
                if file == self.file:
                    handle.truncate(whole)
        return found

    def say(self, text: str) -> None:
        self.console.print(f"certifying: {text}", markup=False, soft_wrap=True)

    def run(self) -> None:
        """Compute what is lacking, in passes that are filled from as many images as they take."""
        total, done, spent = int(self.lacking.sum()), 0, 0
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        state = TextColumn("{task.fields[state]}", markup=False)
        has_bar = self.console.is_terminal or self.console.is_jupyter
        started, lines, active = time.perf_counter(), LineClock(), list[_Item]()
        most = self.settings.selection_draws + self.settings.draws
        every = sum(self.ranks.gather(total))
        if every:
            share = f", of which this process makes {total}" if every > total else ""
            self.say(f"{every} certificates of at most {most:,} draws each{share}")
        with Progress(*columns, state, console=self.console, disable=not has_bar) as bar:
            task = bar.add_task("certifying", total=total, state="")
            while parts := self._next_pass(active):
                failure: Exception | None = None
                try:
                    finished = self._pass(parts)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failure = error.with_traceback(None)  # which would keep the tensors
                if failure is not None:
                    self._make_smaller(sum(part.count for part in parts), failure)
                    continue
                spent += sum(part.count for part in parts)
                if finished:
                    self._append(finished)
                    active = [item for item in active if item not in finished]
                    done += len(finished)
                seconds = time.perf_counter() - started
                rate = f"{spent / seconds:,.0f} draws/s"
                bar.update(task, completed=done, state=rate)
                if not has_bar and lines.due():
                    left = f"at most {clock_text(seconds * (total * most / spent - 1))} left"
                    if done:
                        left = f"{clock_text(seconds * (total - done) / done)} left"
                    self.say(f"{done}/{total} certificates  {rate}  {left}")
                self.stop.heed()
        if total:
            each = f"{spent / max(done, 1):,.0f} draws each"
            self.say(f"{done}/{total} certificates  {each}  in {clock_text(time.perf_counter() - started)}")

    def _make_smaller(self, count: int, failure: Exception) -> None:
        """Halve the passes, of which one with so many images did not fit into memory."""
        if count <= 1:
            raise MemoryError(
                f"a pass of one image does not fit into memory ({failure}); take another precision, or a device with "
                "more memory"
            ) from failure
        self.room = count // 2
        self.say(f"out of memory: from now on at most {self.room} images in a pass")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def examine(self, images: Images, classes: Sequence[str]) -> None:
        """Look at the defense on the first image that lacks a certificate, before anything is computed.

        Args:
            images: those of all ranks.
            classes: names, may be empty.
        """
        if (first := next(self.waiting, None)) is None:
            return
        self.waiting = chain([first], self.waiting)
        pixels = first.pixels[None]
        seeds, sigma = torch.zeros(1, 1, dtype=torch.int64, device=self.device), self.settings.sigmas[0]
        try:
            logits = self.defense.draw_logits(pixels, seeds, sigma=pixels.new_full((1,), sigma))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self._make_smaller(1, error)  # raises: no pass is smaller
            raise ValueError(f"the defense does not take pixels of shape {tuple(pixels.shape)}: {error}") from error
        outputs, labels = logits.shape[-1], images.labels
        if labels.min() < 0 or labels.max() >= outputs:
            raise ValueError(
                f"the defense has {outputs} classes, and labels reach from {labels.min()} to {labels.max()}: they must "
                f"be from 0 to {outputs - 1}, numbered as its outputs"
            )
        if classes and len(classes) != outputs:
            raise ValueError(
                f"the defense has {outputs} classes, and {len(classes)} names of classes are given: it is a model for "
                "other data, or these are other names"
            )
        classifier = self.defense.classifier
        if isinstance(classifier, ModuleTarget) and not classifier.is_known:
            classifier.probe(pixels)
            check_certifiable(self.defense)
        found = probe_randomness(classifier, pixels)
        if found.largest > ROUNDING * found.scale:
            raise ValueError(
                f"the classifier draws by itself in evaluation mode ({found}): a certificate could not be repeated; "
                "look for dropout that stays on, or for noise in its code"
            )

    def _items(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[_Item]:
        """The images that lack a certificate, level by level, as they are decoded."""
        for step, batch in batches:
            first, last = np.searchsorted(self.images.steps, [step, step + 1])
            place = dict(zip(self.images.ids[first:last].tolist(), range(first, last), strict=True))
            places = np.array([place.get(sample, -1) for sample in batch.ids.tolist()], np.int64)
            known = np.flatnonzero(places >= 0)
            rows = torch.from_numpy(known)
            chosen = Batch(batch.images[rows.to(batch.images.device)], batch.labels[rows.to(batch.labels.device)],
                           batch.ids[rows])  # fmt: skip
            same = same_again(self.loader, self.images.at(places[known]), chosen)
            # In the place of an image that cannot be read, a loader may give one of another batch.
            if not same.all() or (len(known) < len(places) and not isinstance(self.loader, PlannedLoader)):
                moved = [*batch.ids[places < 0].tolist(), *chosen.ids[~torch.from_numpy(same)].tolist()]
                raise ValueError(
                    f"{len(moved)} images have changed while they were certified (sample ids "
                    f"{first_words(list(map(str, moved)))}), or the data come in another order each time"
                )
            for row, image in enumerate(pixels_of(chosen, self.device)):
                for level in np.flatnonzero(self.lacking[:, places[known[row]]]):
                    yield _Item(
                        int(places[known[row]]),
                        int(level),
                        image,
                        int(chosen.ids[row]),
                        selection_left=self.settings.selection_draws,
                    )

    def _next_pass(self, active: list[_Item]) -> list[_Part]:
        """Draws for one pass: of the active items in their order, then of waiting ones, which become active."""
        parts: list[_Part] = []
        room = self.room
        for number in count():
            if number == len(active) and room and (item := next(self.waiting, None)) is not None:
                active.append(item)
            if number == len(active) or not room:
                return parts
            parts.append(self._part(active[number], room))
            room -= parts[-1].count
        raise AssertionError

    def _part(self, item: _Item, room: int) -> _Part:
        if item.selection_left:
            first = SELECTION + self.settings.selection_draws - item.selection_left
            return _Part(item, first, min(room, item.selection_left))
        return _Part(item, item.asked, min(room, self.estimations[item.level].looks[item.look] - item.asked))

    def _pass(self, parts: Sequence[_Part]) -> set[_Item]:
        """Draw, count, and return the items that are finished."""
        counts = [part.count for part in parts]
        rows = torch.repeat_interleave(torch.tensor(counts)).to(self.device)

        def column(values: Sequence[float | int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)[rows]

        pixels = torch.stack([part.item.pixels for part in parts])[rows]
        ids = column([part.item.sample for part in parts], torch.int64)
        levels = column([self.level_keys[part.item.level] for part in parts], torch.int64)
        draws = torch.cat([torch.arange(part.first, part.first + part.count) for part in parts]).to(self.device)
        seeds = derive_seeds(self.settings.seed, Domain.CERTIFY, ids, levels, draws)
        sigma = column([self.settings.sigmas[part.item.level] for part in parts], torch.float32).to(pixels.dtype)
        logits = self.defense.draw_logits(pixels, seeds[None], sigma=sigma)[0]
        check_logits(logits, ids)
        answers = logits.argmax(dim=-1).cpu().numpy()
        finished = set()
        for part, answer in zip(parts, np.split(answers, np.cumsum(counts)[:-1]), strict=True):
            if self._count(part.item, answer, logits.shape[-1]):
                finished.add(part.item)
        return finished

    def _count(self, item: _Item, answer: Array, classes: int) -> bool:
        """Count the answers of an item's draws; whether it is finished."""
        if item.selection_left:
            votes = np.bincount(answer, minlength=classes)
            item.selected = votes if item.selected is None else item.selected + votes
            item.selection_left -= len(answer)
            if not item.selection_left:
                item.top = int(item.selected.argmax())
            return False
        item.asked += len(answer)
        item.successes += int((answer == item.top).sum())
        estimation = self.estimations[item.level]
        if item.asked < estimation.looks[item.look]:
            return False
        item.bound = max(item.bound, float(estimation.bound(item.look, item.successes)))
        item.look += 1
        return bool(estimation.enough(item.look - 1, item.successes, item.bound))

    def results(self, images: Images, classes: Sequence[str], notes: Sequence[str]) -> Certification:
        """The certificates of the images of all ranks that have one at every level, in the order of their ids."""
        order = np.argsort(images.ids)
        with self.ranks.together():
            found = self._read()
        rows = [[found.get(row[place]) for place in order] for row in self._keys(images)]
        whole = [all(certificates) for certificates in zip(*rows, strict=True)]
        if not any(whole):
            raise ValueError(f"none of the {len(order)} images could be read")
        levels = []
        for sigma, estimation, certificates in zip(self.settings.sigmas, self.estimations, rows, strict=True):
            kept = [each for each, is_whole in zip(certificates, whole, strict=True) if is_whole and each]
            ids, labels, tops, draws, successes = (
                np.array([each[name] for each in kept], np.int64)
                for name in ("id", "label", "top", "draws", "successes")
            )
            bounds = np.array([each["bound"] for each in kept])
            radii = estimation.radius(bounds) * sigma / 255
            levels.append(
                LevelCertificates(
                    sigma, ids, labels, tops, successes, bounds, radii, draws, estimation.largest_radius * sigma / 255
                )
            )
        with self.ranks.naming():
            # By id: a rank reports what it has met.
            bad = {id: words for state in self.ranks.gather(self.loader.state()["bad"]) for id, words in state.items()}
        if bad:
            words = f"{len(bad)} images could not be read and are not counted: {'; '.join(bad.values())}"
            notes = [*notes, words]
        versions = {package: version(package) for package in ("torch", "timm", "numpy", "scipy", "denim-vision")}
        return Certification(self.settings, tuple(levels), self.defense.case, tuple(classes), tuple(notes), versions)

    def _append(self, items: set[_Item]) -> None:
        lines = []
        for item in sorted(items, key=lambda item: (item.place, item.level)):
            entry = {
                "key": self.keys[item.level][item.place],
                "id": item.sample,
                "label": int(self.images.labels[item.place]),
                "sigma": self.settings.sigmas[item.level],
                "top": item.top,
                "draws": item.asked,
                "successes": item.successes,
                "bound": item.bound,
            }
            lines.append(json.dumps(entry) + "\n")
        append_text(self.file, "".join(lines))


def _origins(defense: De3, settings: CertificationSettings) -> list[bytes]:
    """By level, what a certificate is computed from, but for the image."""
    fingerprints = Fingerprints()
    models = b"".join(fingerprints.of(part) for part in (type(defense), defense.denoiser, defense.classifier))
    shared = (
        defense.degrade,
        defense.mask_ratio if defense.degrade != "noise" else None,
        defense.case,
        *(getattr(settings, name) for name in ("draws", "selection_draws", "alpha", "radii", "tolerance", "seed")),
        settings.precision,
        *map(version, PACKAGES),
    )
    return [models + repr((sigma, *shared)).encode() for sigma in settings.sigmas]
