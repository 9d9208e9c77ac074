from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from denim.defense import (
    Attack,
    De3,
    EvaluationSettings,
    evaluate,
    paired_difference,
    resubmission_curve,
    score,
)
from denim.defense import evaluation as evaluating
from denim.defense import records as storing
from denim.defense import rows as numbering
from denim.defense import work as working
from denim.defense.report import write_report
from denim.defense.scores import draws_needed
from denim.kernels import Domain, derive_seeds, draw_seeds, normal_noise
from denim.nim import (
    Autoencoder,
    AutoencoderConfig,
    Classifier,
    ClassifierConfig,
    PretrainConfig,
    pretrain,
    progress,
    reconstruct,
)
from denim.nim.data import Batch, EvalView, Subset, TorchLoader
from denim.nim.files import DamagedFileError, WriteError
from denim.nim.owner import OwnedError, owned
from denim.nim.ranks import joined
from denim.nim.stopping import Stopped

pytestmark = pytest.mark.slow

CONFIG = AutoencoderConfig((8, 8), 4, 16, 1, 2, 16, 1, 2, mean=(0.5,), std=(0.25,), target="raw")
COUNT, CLASSES = 10, 3
IDS = torch.tensor([3, 2**40, -5, 0, 77, 8, 9, 10, 11, 12])
SETTINGS = EvaluationSettings(
    ("fgsm:12/255,eot=2", "pgd:12/255,steps=3,eot=2"), score_draws=5, seed=4, max_batch=8, examples=3, health_images=0
)


class Linear(nn.Module):
    """Computes in float64, so that the sign of a gradient does not depend on the batch, and keeps all batch sizes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(64, CLASSES).double().requires_grad_(False)
        self.sizes: list[int] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.sizes.append(len(pixels))
        return self.layer(pixels.flatten(1).double())


class Wavy(Linear):
    """Gradients differ from draw to draw, and with them the candidates."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward((12 * pixels).sin())


class Images:
    """A loader of ten images in batches of 4, 4 and 2; it can raise after a number of batches."""

    steps_per_epoch = 3

    def __init__(self, images: Tensor, labels: Tensor, ids: Tensor = IDS, fail_after: int | None = None) -> None:
        self.images, self.labels, self.ids = images, labels, ids
        self.left = fail_after

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        assert epoch == 0
        for part in torch.arange(len(self.ids)).split(4)[start_step:]:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            yield Batch(self.images[part], self.labels[part], self.ids[part])

    def state(self) -> dict[str, dict[str, str]]:
        return {"bad": {}}


def images() -> Tensor:
    return torch.randint(30, 226, (COUNT, 8, 8, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def pixels() -> Tensor:
    return images().permute(0, 3, 1, 2).float() / 255


def loader(fail_after: int | None = None) -> Images:
    labels = Linear()(pixels()).argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % CLASSES  # two of ten are wrong without an attack
    return Images(images(), labels, fail_after=fail_after)


def defenses() -> dict[str, De3]:
    classifier = Linear()
    noisy = De3(None, classifier, 70)
    return {"off": De3(None, classifier, None), "noise": noisy, "frozen": noisy.frozen(1)}


def run(out: Path, chosen=None, source=None, options: EvaluationSettings = SETTINGS, **more):
    console = Console(file=io.StringIO())
    return evaluate(chosen or defenses(), source or loader(), options, out, console=console, **more)


def records(out: Path) -> list[dict]:
    """All records of a folder, in the order in which they were appended, by plain SQL."""
    rows = []
    for file in sorted(out.glob("records*.sqlite")):
        with contextlib.closing(sqlite3.connect(file)) as database:
            blocks = database.execute(
                "SELECT defense, attack, ids, labels, predictions, missed, flags, gradients "
                "FROM blocks JOIN cells ON cells.number = cell ORDER BY blocks.number"
            ).fetchall()
        for defense, attack, *blobs in blocks:
            kinds = ("<i8", "<i4", "<u2", "<i4", "u1", "<i4")
            ids, labels, predictions, *rest = map(np.frombuffer, blobs, kinds)
            for row, (i, label, *last) in enumerate(zip(ids, labels, *rest, strict=True)):
                classes = predictions.reshape(len(ids), -1)[row].tolist()
                keys = ("missed", "flags", "gradients")
                rows.append(
                    {"defense": defense, "attack": attack, "id": int(i), "label": int(label), "predictions": classes}
                    | dict(zip(keys, map(int, last), strict=True))
                )
    return rows


def cell_of(evaluation, defense: str, attack: str):
    (cell,) = [cell for cell in evaluation.cells if (cell.defense, cell.attack) == (defense, attack)]
    return cell


@pytest.fixture(scope="module", autouse=True)
def quick_commits():
    """What a killed process has committed is in the system's cache; only a power cut needs it on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storing, "SYNCHRONOUS", "OFF")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, object]:
    out = tmp_path_factory.mktemp("finished") / "new" / "folder"
    return out, run(out, classes=("a", "b", "c"))


ROWS = ("none", "fgsm:12/255,eot=2", "pgd:12/255,steps=3,eot=2")


# Results


def test_one_record_for_every_defense_attack_and_image(finished):
    out, _ = finished
    keys = [(row["defense"], row["attack"], row["id"]) for row in records(out)]
    assert len(keys) == len(set(keys))
    assert set(keys) == {(name, attack, int(i)) for name in defenses() for attack in ROWS for i in IDS}


@pytest.mark.parametrize("name", ["off", "noise", "frozen"])
@pytest.mark.parametrize("attack", ROWS)
def test_predictions_are_those_of_the_score_draws_and_misses_those_of_the_confirmation_draws(finished, name, attack):
    out, _ = finished
    defense, source = defenses()[name], loader()
    attacked = pixels()
    if attack != "none":
        attacked = Attack.parse(attack).run(defense, attacked, source.labels, IDS, 4).pixels

    def predictions(domain: Domain) -> Tensor:
        if name == "off":
            return Linear()(attacked).argmax(dim=1).expand(5, -1)
        if name == "frozen":
            return defense(attacked).argmax(dim=1).expand(5, -1)
        seeds = draw_seeds(4, domain, IDS, 5)
        noise = normal_noise(seeds, (8, 8, 1)).permute(0, 1, 4, 2, 3)
        return torch.stack([Linear()(attacked + 70 / 255 * draw).argmax(dim=1) for draw in noise])

    scored, missed = predictions(Domain.SCORE), (predictions(Domain.CONFIRMATION) != source.labels).sum(dim=0)
    if name != "noise":  # one answer says it all
        scored, missed = scored[:1], torch.full_like(missed, -1)
    if attack == "none":  # no other attack has its radius
        missed = torch.full_like(missed, -1)
    rows = {row["id"]: row for row in records(out) if (row["defense"], row["attack"]) == (name, attack)}
    for number, i in enumerate(IDS.tolist()):
        assert rows[i]["predictions"] == scored[:, number].tolist()
        assert rows[i]["missed"] == missed[number]
        assert rows[i]["label"] == source.labels[number]


def test_cells_score_the_records_and_are_compared_with_the_first_defense(finished):
    out, evaluation = finished
    assert [(cell.defense, cell.attack) for cell in evaluation.cells] == [
        (name, attack) for name in defenses() for attack in (*ROWS, "worst 12/255")
    ]
    table = {}
    for row in sorted(records(out), key=lambda row: row["id"]):
        classes = row["predictions"] * (5 if row["defense"] != "noise" else 1)
        table.setdefault((row["defense"], row["attack"]), []).append((classes, row["label"]))
    for (name, attack), items in table.items():
        cell = cell_of(evaluation, name, attack)
        predictions, labels = (np.array(column) for column in zip(*items, strict=True))
        assert cell.scores == score(predictions, labels)
        first = np.mean([np.array(p) == label for p, label in table["off", attack]], axis=1)
        shares = (predictions == labels[:, None]).mean(axis=1)
        assert cell.difference == (None if name == "off" else paired_difference(shares, first))
        assert cell.epsilon == (None if attack == "none" else 12 / 255)
        curve = resubmission_curve(predictions, labels) if name == "noise" else ()
        assert cell.resubmission == curve
    assert cell_of(evaluation, "off", "none").scores.mean.value == 0.8
    assert cell_of(evaluation, "off", ROWS[2]).scores.mean.value < 0.8
    described = {cell.defense: (cell.sigma, cell.frozen, cell.case) for cell in evaluation.cells}
    assert described == {
        "off": (None, False, "undefended"),
        "noise": (70.0, False, "noisy"),
        "frozen": (70.0, True, "noisy"),
    }


def test_cells_have_the_gradients_that_were_spent_and_saved(finished):
    out, evaluation = finished
    spent = Counter()
    for row in records(out):
        spent[row["defense"], row["attack"]] += row["gradients"]
    for cell in evaluation.cells:
        assert cell.seconds > 0
        if cell.attack in ROWS:
            assert cell.gradients == spent[cell.defense, cell.attack]
    for name in defenses():
        parts = [cell_of(evaluation, name, attack) for attack in ROWS[1:]]
        worst = cell_of(evaluation, name, "worst 12/255")
        assert worst.gradients == sum(part.gradients for part in parts)
        assert worst.seconds == pytest.approx(sum(part.seconds for part in parts))
    # PGD has two losses, and a third where the draws differ; its 3 steps have 2 draws each there.
    most = {"off": 2 * 3, "noise": 3 * 3 * 2, "frozen": 2 * 3}
    for name, each in most.items():
        cell = cell_of(evaluation, name, ROWS[2])
        assert cell.gradients + cell.gradients_saved == COUNT * each
    assert cell_of(evaluation, "off", ROWS[2]).gradients_saved > 0, "two images are misled from the start"
    assert cell_of(evaluation, "noise", ROWS[2]).gradients_saved == 0, "with few steps no image leaves a random defense"
    assert cell_of(evaluation, "off", "none").gradients == 0


def test_records_of_the_version_before_stay_and_have_no_seconds(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    with contextlib.closing(sqlite3.connect(tmp_path / "copy" / "records.sqlite")) as database:
        for statement in ("DROP TABLE kept", "ALTER TABLE blocks DROP COLUMN seconds", "PRAGMA user_version = 1"):
            database.execute(statement)
        database.commit()
    chosen = defenses()
    again = run(tmp_path / "copy", chosen, classes=("a", "b", "c"))
    assert chosen["off"].classifier.sizes == []
    assert {cell.seconds for cell in again.cells} == {None}
    assert again.cells == tuple(replace(cell, gradients_saved=None) for cell in finished[1].cells)


def test_a_model_of_other_classes_is_refused_beside_finished_ones(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    with pytest.raises(ValueError, match=r"must have the same classes, got off: 3, .* wide: 7"):
        run(tmp_path / "copy", defenses() | {"wide": Wide()})


def test_the_worst_attack_is_chosen_by_confirmation_and_never_by_the_score(tmp_path):
    attacks = ("fgsm:6/255,eot=1", "pgd:6/255,steps=1,eot=1", "pgd:6/255,steps=2,eot=1", "fgsm:20/255,eot=1")
    noise = {"noise": De3(None, Wavy(), 70)}
    evaluation = run(tmp_path, noise, options=replace(SETTINGS, attacks=attacks, score_draws=3))
    by_image = {}
    for row in records(tmp_path):
        if "6/255" in row["attack"]:
            by_image.setdefault(row["id"], []).append(row)

    def scores(key):
        chosen = [max(by_image[i], key=key) for i in sorted(by_image)]
        return score([row["predictions"] for row in chosen], [row["label"] for row in chosen])

    total = Counter()
    for rows in by_image.values():
        total.update({row["attack"]: row["missed"] for row in rows})
    honest = scores(lambda row: (row["missed"], total[row["attack"]]))
    lucky = scores(lambda row: sum(prediction != row["label"] for prediction in row["predictions"]))
    assert lucky.mean.value < honest.mean.value, "the two choices differ here, so this can be seen"
    cell = cell_of(evaluation, "noise", "worst 6/255")
    assert cell.scores == honest
    assert cell.epsilon == 6 / 255
    assert not [cell for cell in evaluation.cells if cell.attack == "worst 20/255"], "one attack is no choice"


def test_the_sets_of_draws_are_disjoint(tmp_path):
    asked: dict[Domain, list[Tensor]] = {}
    drawn: list[tuple[Tensor, bool]] = []

    class Spy(De3):
        def seeds(self, run_seed, domain, ids, draws=1, step=0):
            seeds = super().seeds(run_seed, domain, ids, draws, step)
            asked.setdefault(domain, []).append(seeds)
            return seeds

        def draw_logits(self, images, seeds, *, surrogate=False):
            drawn.append((seeds, torch.is_grad_enabled()))
            return super().draw_logits(images, seeds, surrogate=surrogate)

    run(tmp_path, {"noise": Spy(None, Linear(), 70, draws=2)})
    assert set(asked) == {Domain.ATTACK, Domain.SELECTION, Domain.CONFIRMATION, Domain.SCORE}
    sets = {domain: {int(seed) for part in parts for seed in part.flatten()} for domain, parts in asked.items()}
    for one in sets:
        for other in sets:
            assert one == other or not sets[one] & sets[other]
    assert len(sets[Domain.SCORE]) == len(sets[Domain.CONFIRMATION]) == COUNT * 5 * 2  # the same for every attack
    with_gradient = {int(seed) for seeds, grad in drawn for seed in seeds.flatten() if grad}
    assert with_gradient == sets[Domain.ATTACK]
    assert {int(seed) for seeds, grad in drawn for seed in seeds.flatten()} == set().union(*sets.values())


def test_the_order_of_images_changes_nothing(finished, tmp_path):
    _, evaluation = finished
    source, order = loader(), torch.tensor([9, 3, 1, 0, 2, 8, 7, 4, 6, 5])
    other = run(tmp_path, source=Images(source.images[order], source.labels[order], IDS[order]))
    assert other.cells == evaluation.cells


def test_padding_is_not_counted(finished, tmp_path):
    class Padded(Images):
        def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
            for batch in super().epoch(epoch, start_step):
                rows = torch.tensor([0, *range(len(batch.ids)), 0])  # the first image again, before and after
                real = torch.tensor([False, *[True] * len(batch.ids), False])
                yield Batch(batch.images[rows], batch.labels[rows], batch.ids[rows], real)

    plain, (_, evaluation) = loader(), finished
    other = run(tmp_path, source=Padded(plain.images, plain.labels))
    assert other.cells == evaluation.cells
    assert len(records(tmp_path)) == COUNT * len(defenses()) * len(ROWS)
    assert all(torch.equal(shown.clean, pixels()[:3]) for shown in other.examples.values())


@pytest.mark.parametrize("lost_in", [0, 1])
def test_an_image_lost_half_way_is_left_out_everywhere(tmp_path, lost_in):
    """Before it is identified, and after."""

    class Losing(Images):
        passes = 0

        def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
            self.passes += 1
            for batch in super().epoch(epoch, start_step):
                yield replace(batch, real=batch.ids != IDS[4]) if self.passes > lost_in else batch

        def state(self) -> dict[str, dict[str, str]]:
            return {"bad": {"77": "k.png is gone"} if self.passes > lost_in else {}}

    plain, rest = loader(), torch.arange(COUNT) != 4
    with pytest.warns(UserWarning, match="1 images could not be read and are not counted: k.png is gone"):
        lost = run(tmp_path / "lost", source=Losing(plain.images, plain.labels))
    assert lost.cells == run(tmp_path / "rest", source=Images(plain.images[rest], plain.labels[rest], IDS[rest])).cells


class Dozing(Linear):
    """Dropout that evaluation mode does not turn off."""

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(pixels), 0.5, training=True)


@pytest.mark.parametrize("sigma", [None, 35.0])
def test_a_classifier_that_draws_without_a_word_is_refused_and_one_that_says_so_is_random(tmp_path, sigma):
    hidden = De3(None, Dozing(), sigma)
    with pytest.raises(ValueError, match=r"its classifier draws by itself in evaluation mode .* set is_random = True"):
        run(tmp_path / "hidden", {"hidden": hidden})
    hidden.classifier.is_random = True
    evaluation = run(tmp_path / "said", {"said": De3(None, hidden.classifier, sigma)})
    assert {cell.scores.score_draws for cell in evaluation.cells} == {SETTINGS.score_draws}


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("max_batch", [1, 7, 1000])
def test_max_batch_bounds_memory_and_changes_nothing_else(tmp_path, max_batch, draws):
    classifier = Linear()
    chosen = {"noise": De3(None, classifier, 70, draws=draws)}
    chosen["frozen"] = chosen["noise"].frozen(1)
    expected = run(tmp_path / "expected", chosen).cells
    classifier.sizes.clear()
    options = replace(SETTINGS, max_batch=max_batch, examples=0)
    assert run(tmp_path / "other", chosen, options=options).cells == expected
    # One image with all draws of a gradient (eot 2, each of the defense's own draws) always goes at once.
    assert max(classifier.sizes) <= max(max_batch, 2 * draws)
    assert max_batch < 1000 or max(classifier.sizes) == 4 * 5 * draws


def test_defenses_with_a_denoiser_run_too(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Autoencoder(CONFIG).eval().requires_grad_(False)
    chosen = {
        "de3": De3(denoiser, Linear(), 70, draws=2, aggregate="vote"),
        "mae": De3(denoiser, Linear(), 0, degrade="mask", mask_ratio=0.5),
    }
    evaluation = run(tmp_path, chosen)
    assert {cell.case for cell in evaluation.cells} == {"noise, raw target", "mask, raw target"}
    shown = evaluation.examples["mae", "none"]
    assert ((shown.noisy == 0.5).flatten(1).sum(dim=1) >= 32).all()
    assert not torch.equal(shown.denoised, shown.clean)


# Folder


def test_results_are_what_is_returned(finished):
    out, evaluation = finished
    content = json.loads((out / "results.json").read_text())
    assert content["classes"] == ["a", "b", "c"]
    assert content["settings"]["seed"] == 4
    assert content["warnings"] == list(evaluation.warnings)
    assert set(content["versions"]) >= {"torch", "denim-vision"}
    for written, cell in zip(content["cells"], evaluation.cells, strict=True):
        assert (written["defense"], written["attack"], written["sigma"]) == (cell.defense, cell.attack, cell.sigma)
        assert written["scores"]["mean"] == vars(cell.scores.mean)
        assert written["difference"] == (cell.difference and vars(cell.difference))


def test_examples_show_one_score_draw(finished):
    _, evaluation = finished
    assert set(evaluation.examples) == {(name, attack) for name in defenses() for attack in ROWS}
    for (name, attack), shown in evaluation.examples.items():
        assert torch.equal(shown.clean, pixels()[:3])
        assert torch.equal(shown.labels, loader().labels[:3])
        distance = (shown.attacked - shown.clean).abs().amax()
        assert distance == 0 if attack == "none" else distance == pytest.approx(12 / 255, abs=1e-6)
        predictions = Linear()(shown.denoised).argmax(dim=1)
        assert torch.equal(shown.predictions, predictions)
        if attack == "none":
            assert torch.equal(shown.clean_predictions, predictions)
        if name == "off":
            assert torch.equal(shown.denoised, shown.attacked)
        else:
            seeds = defenses()[name].seeds(4, Domain.SCORE, IDS[:3], 1)[0]
            noise = normal_noise(seeds, (8, 8, 1)).permute(0, 3, 1, 2)
            torch.testing.assert_close(shown.noisy, shown.attacked + 70 / 255 * noise, rtol=0, atol=1e-6)
            torch.testing.assert_close(shown.denoised, shown.noisy, rtol=0, atol=1e-6)


def contents(out: Path) -> dict[str, object]:
    """The bytes of all files, and in place of a database its records, in any order."""
    files = {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    return {name: value for name, value in files.items() if not name.endswith((".sqlite", "results.json"))} | {
        "records": sorted(map(str, records(out))),
        "results": results(out) if (out / "results.json").exists() else None,
    }


def results(out: Path) -> dict[str, object]:
    """results.json without the seconds, which differ from run to run."""
    content = json.loads((out / "results.json").read_text())
    for cell in content["cells"]:
        assert cell.pop("seconds") > 0
    return content


def failing_after(blocks: int):
    """An `append` that ends the process in place of block number `blocks`."""
    append, left = storing.Records.append, iter(range(blocks))

    def failing(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        append(*arguments)

    return failing


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_a_killed_evaluation_goes_on_to_the_same_records(finished, tmp_path_factory, data):
    """The loader fails, or the process ends between two blocks of one batch."""
    expected, out = contents(finished[0]), tmp_path_factory.mktemp("killed")
    for _ in range(data.draw(st.integers(1, 3), label="kills")):
        source = loader(fail_after=data.draw(st.integers(0, 5), label="batches"))
        blocks = data.draw(st.integers(0, 20), label="blocks")
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(storing.Records, "append", failing_after(blocks))
            run(out, source=source, classes=("a", "b", "c"))
    run(out, classes=("a", "b", "c"))
    assert contents(out) == expected
    # A call on a finished evaluation attacks nothing.
    chosen = defenses()
    run(out, chosen, classes=("a", "b", "c"))
    assert chosen["off"].classifier.sizes == []
    assert contents(out) == expected


def kill_often(out: Path) -> None:
    """Twelve forks that evaluate into a folder and are killed before a statement that writes."""
    storing.SYNCHRONOUS, opened = "OFF", storing._opened
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options=replace(SETTINGS, examples=0))  # what is loaded late, once for all forks
    for kill in range(12):
        child = os.fork()
        if child == 0:
            left = iter(range(3 + kill % 7))

            def count(statement: str, left=left) -> None:
                if not statement.startswith(("SELECT", "PRAGMA")) and next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)

            def traced(*arguments, count=count):
                connection = opened(*arguments)
                connection.set_trace_callback(count)
                return connection

            storing._opened = traced
            try:
                run(out, options=replace(SETTINGS, examples=0))
            finally:
                os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(records(out)))  # noqa: T201


def test_sigkill_at_any_statement_loses_at_most_the_running_batch(finished, tmp_path):
    """Twelve kills that land, most within a transaction; then the evaluation is finished, and extended."""
    # A process of its own, with one thread: it may fork.
    done = subprocess.run(
        [sys.executable, __file__, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DENIM_NOISE": "eager"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    ends, kept = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert ends == (-signal.SIGKILL,) * 12, done.stderr
    assert list(kept) == sorted(kept)
    assert 0 < kept[-1] < 3 * ALL
    run(tmp_path, classes=("a", "b", "c"))
    assert contents(tmp_path) == contents(finished[0])
    run(tmp_path, options=replace(SETTINGS, attacks=(*SETTINGS.attacks, "fgsm:2/255,eot=2")))
    assert len(records(tmp_path)) == 3 * (ALL + COUNT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_evaluation_after_the_running_batch(finished, tmp_path, number):
    class Signalling(Images):
        def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
            for batch in super().epoch(epoch, start_step):
                sent.append(1)
                if len(sent) == 5:  # three batches are identified first
                    os.kill(os.getpid(), number)
                yield batch

    sent: list[int] = []
    source = loader()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's process may ignore it
    try:
        with pytest.raises(Stopped, match="the same call goes on there") as stopped:
            run(tmp_path, source=Signalling(source.images, source.labels))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.number == number
    assert len(records(tmp_path)) == 4 * len(defenses()) * len(ROWS) + 4
    run(tmp_path, classes=("a", "b", "c"))
    assert results(tmp_path) == results(finished[0])


def test_an_evaluation_has_one_owner(finished, tmp_path):
    with owned(tmp_path), pytest.raises(OwnedError, match=f"process {os.getpid()} "):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["header", "page", "blob", "foreign", "text", "newer"])
def test_damaged_records_are_named(finished, tmp_path, how):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    file = out / "records.sqlite"
    if how == "header":
        file.write_bytes(b"SQLite format 4" + file.read_bytes()[15:])
    elif how == "page":
        content = file.read_bytes()
        file.write_bytes(content[:4096] + bytes(4096) + content[8192:])
    elif how == "foreign":
        file.unlink()
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("CREATE TABLE numbers (a)")
    else:
        with contextlib.closing(sqlite3.connect(file)) as database:
            if how == "blob":
                database.execute("UPDATE blocks SET predictions = zeroblob(length(predictions)) WHERE number = 3")
            elif how == "text":
                database.execute("UPDATE blocks SET flags = 'none' WHERE number = 3")
            else:
                database.execute("PRAGMA user_version = 99")
            database.commit()
    words = "records of version 99" if how == "newer" else r"records\.sqlite is damaged: .* move it away"
    with pytest.raises(DamagedFileError, match=words):
        run(out)
    file.unlink()
    assert run(out).cells == finished[1].cells


def test_a_link_in_the_place_of_the_records_is_refused(finished, tmp_path):
    before = (finished[0] / "records.sqlite").read_bytes()
    (tmp_path / "records.sqlite").symlink_to(finished[0] / "records.sqlite")
    with pytest.raises(WriteError, match=r"cannot write .*records\.sqlite"):
        run(tmp_path)
    assert (finished[0] / "records.sqlite").read_bytes() == before


def test_a_full_disk_is_named_and_loses_nothing_that_was_kept(finished, tmp_path, monkeypatch):
    opened = storing._opened

    def small(*arguments):
        connection = opened(*arguments)
        connection.execute("PRAGMA max_page_count = 6")
        return connection

    monkeypatch.setattr(storing, "_opened", small)
    with pytest.raises(WriteError, match=r"cannot write .*records\.sqlite: No space left on device; make room"):
        run(tmp_path)
    kept = len(records(tmp_path))
    assert 0 < kept < COUNT * len(defenses()) * len(ROWS)
    monkeypatch.undo()
    assert run(tmp_path).cells == finished[1].cells


def test_records_of_an_earlier_version_are_computed_anew_and_left_alone(finished, tmp_path):
    (tmp_path / "records.jsonl").write_text('{"defense": "off"}\n')
    printed = io.StringIO()
    done = evaluate(defenses(), loader(), SETTINGS, tmp_path, console=Console(file=printed, width=300))
    assert done.cells == finished[1].cells
    assert printed.getvalue().count("is of an earlier version") == 1
    assert (tmp_path / "records.jsonl").read_text() == '{"defense": "off"}\n'


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is damaged, and is made again: "),
        (lambda file: save_file({"clean": torch.zeros(1)}, file), "holds something else, and is made again"),
    ],
)
def test_a_damaged_gallery_is_named_and_made_again(finished, tmp_path, damage, words):
    shutil.copytree(finished[0], tmp_path / "copy")
    file = tmp_path / "copy" / "examples" / "noise none.safetensors"
    damage(file)
    with pytest.warns(UserWarning, match=rf"the gallery .*noise none\.safetensors {words}"):
        again = run(tmp_path / "copy")
    made, before = (load_file(place) for place in (file, finished[0] / "examples" / file.name))
    assert made.keys() == before.keys()
    assert all(torch.equal(made[key], before[key]) for key in made)
    assert again.cells == finished[1].cells


def test_an_evaluation_may_go_on_with_another_max_batch(finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=loader(fail_after=4))
    assert run(tmp_path, options=replace(SETTINGS, max_batch=3)).cells == finished[1].cells


def masked(ratio: float) -> De3:
    with torch.random.fork_rng(devices=[]):
        return De3(Autoencoder(CONFIG).eval(), Linear(), 0, degrade="both", mask_ratio=ratio)


class Halved(Linear):
    """The same weights as `Linear`, and other logits."""

    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels / 2)


def replaced() -> dict[str, De3]:
    """The same modules, with a `forward` of their own."""
    chosen = defenses()
    classifier = chosen["off"].classifier
    classifier.forward = lambda pixels: Linear.forward(classifier, pixels.flip(-1))
    return chosen


def hooked() -> dict[str, De3]:
    chosen = defenses()
    chosen["off"].classifier.layer.register_forward_hook(lambda module, given, logits: logits.flip(-1))
    return chosen


def scaled() -> dict[str, De3]:
    chosen = defenses()
    chosen["off"].classifier.scale = 2.0
    return chosen


def shifted() -> dict[str, De3]:
    chosen = defenses()
    chosen["off"].classifier.layer.bias += 0.25
    return chosen


def of(classifier: nn.Module) -> dict[str, De3]:
    noisy = De3(None, classifier, 70)
    return {"off": De3(None, classifier, None), "noise": noisy, "frozen": noisy.frozen(1)}


ALL = len(ROWS) * COUNT


@pytest.mark.parametrize(
    ("chosen", "options", "computed"),
    [
        (defenses, SETTINGS, 0),
        (lambda: defenses() | {"noise": De3(None, Linear(), 71)}, SETTINGS, ALL),
        (lambda: defenses() | {"frozen": De3(None, Linear(), 70).frozen(2)}, SETTINGS, ALL),
        (lambda: defenses() | {"more": De3(None, Linear(), 69)}, SETTINGS, ALL),
        (lambda: defenses() | {"twin": De3(None, Linear(), 70)}, SETTINGS, 0),
        (lambda: defenses() | {"noise": De3(None, Linear(), 70, draws=2)}, SETTINGS, ALL),
        (lambda: {"other name": defenses()["noise"]}, SETTINGS, 0),
        (lambda: of(Halved()), SETTINGS, 3 * ALL),
        (replaced, SETTINGS, 3 * ALL),
        (hooked, SETTINGS, 3 * ALL),
        (scaled, SETTINGS, 3 * ALL),
        (shifted, SETTINGS, 3 * ALL),
        (defenses, replace(SETTINGS, score_draws=6), 3 * ALL),
        (defenses, replace(SETTINGS, seed=5), 3 * ALL),
        (defenses, replace(SETTINGS, precision="bf16"), 3 * ALL),
        (defenses, replace(SETTINGS, attacks=SETTINGS.attacks[:1]), 0),
        (defenses, replace(SETTINGS, attacks=(*SETTINGS.attacks, "fgsm:3/255,eot=2")), 3 * COUNT),
        (defenses, replace(SETTINGS, attacks=(*SETTINGS.attacks, "fgsm:12/255,eot=3")), 3 * COUNT),
        (defenses, replace(SETTINGS, max_batch=3, examples=0), 0),
    ],
)
def test_what_has_no_record_of_its_key_is_computed_and_the_rest_stands(finished, tmp_path, chosen, options, computed):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    options = replace(options, examples=0)
    again = run(out, chosen(), options=options)
    old, new = records(finished[0]), records(out)
    assert new[: len(old)] == old
    assert len(new) == len(old) + computed
    assert again.cells == run(tmp_path / "fresh", chosen(), options=options).cells
    # Back to what was, and nothing is left to do.
    assert run(out, options=replace(SETTINGS, examples=0)).cells == finished[1].cells
    assert len(records(out)) == len(new)


def test_another_torch_is_another_key(finished, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    real = numbering.version
    monkeypatch.setattr(numbering, "version", lambda name: "9.9" if name == "timm" else real(name))
    run(out, options=replace(SETTINGS, examples=0))
    assert len(records(out)) == 2 * 3 * ALL


def test_confirmation_draws_are_made_where_a_second_attack_reads_them(tmp_path):
    """They are those of an evaluation that had both attacks from the start; until then nothing asks for them."""
    asked: list[Domain] = []

    class Spy(De3):
        def seeds(self, run_seed, domain, ids, draws=1, step=0):
            asked.append(domain)
            return super().seeds(run_seed, domain, ids, draws, step)

    def spy() -> dict[str, De3]:
        return {"noise": Spy(None, Wavy(), 70), "off": Spy(None, Wavy(), None)}

    one = replace(SETTINGS, attacks=SETTINGS.attacks[:1], examples=0)
    run(tmp_path / "grown", spy(), options=one)
    assert Domain.CONFIRMATION not in asked
    assert {row["missed"] for row in records(tmp_path / "grown")} == {-1}
    printed = io.StringIO()
    both = replace(SETTINGS, examples=0)
    grown = evaluate(spy(), loader(), both, tmp_path / "grown", console=Console(file=printed, width=300))
    assert Domain.CONFIRMATION in asked
    assert grown.cells == run(tmp_path / "fresh", spy(), options=both).cells
    assert printed.getvalue().count("10 images of noise are attacked again with fgsm:12/255,eot=2") == 1
    assert "of off are attacked again" not in printed.getvalue()
    assert {row["missed"] for row in records(tmp_path / "fresh") if row["defense"] == "off"} == {-1}


def test_the_precision_is_that_of_every_network_and_is_recorded(tmp_path):
    """Attacks, confirmation, scores and gallery; gradients are taken outside of autocast."""
    dtypes, passes = set(), []

    class Watched(Linear):
        def forward(self, given):
            dtypes.add(torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype)
            given.requires_grad and given.register_hook(lambda _: passes.append(torch.is_autocast_enabled("cpu")))
            return super().forward(given)

    def results(precision):
        options = replace(SETTINGS, precision=precision)
        evaluation = run(tmp_path / precision, {"noise": De3(None, Watched(), 70, seed=0)}, options=options)
        assert not torch.is_autocast_enabled("cpu")
        assert (
            evaluation.settings.precision
            == json.loads((tmp_path / precision / "results.json").read_text())["settings"]["precision"]
        )
        return evaluation.settings.precision

    assert results("bf16") == "bf16"
    assert dtypes == {torch.bfloat16}
    assert passes
    assert not any(passes)
    dtypes.clear()
    assert results("auto") == results("fp32") == "fp32"
    assert dtypes == {torch.float32}
    with pytest.raises(ValueError, match="tf32 needs an NVIDIA GPU"):
        run(tmp_path / "tf32", options=replace(SETTINGS, precision="tf32"))
    assert not (tmp_path / "tf32").exists()


def test_bf16_has_the_robust_accuracy_of_fp32(tmp_path, digits):
    """On a small denoiser of digits and a classifier of what it rebuilds: within the intervals over images."""
    train, test = digits
    recipe = {"epochs": 3, "warmup_epochs": 1, "batch_size": 64, "base_lr": 6e-3, "crop_scale": None, "flip": False}
    config = PretrainConfig(out=tmp_path / "nim", preset="micro", target="raw", device="cpu", **recipe)
    denoiser = pretrain(config, Console(quiet=True)).requires_grad_(False)
    (batch,) = TorchLoader(train, EvalView(16), len(train), shuffle=False).epoch(0)
    levels, seeds = torch.full((len(train),), 70.0), derive_seeds(0, Domain.TRAINING, batch.ids)
    parts = zip(*(values.split(200) for values in (batch.images, levels, seeds)), strict=True)
    rebuilt = torch.cat([reconstruct(denoiser, *part) for part in parts])
    fitted = LogisticRegression(max_iter=300).fit(rebuilt.flatten(1).numpy(), batch.labels.numpy())
    linear = nn.Linear(256, 10).requires_grad_(False)
    linear.weight.copy_(torch.from_numpy(fitted.coef_))
    linear.bias.copy_(torch.from_numpy(fitted.intercept_))
    defended = {"sigma 70": De3(denoiser, nn.Sequential(nn.Flatten(), linear), 70, seed=0)}
    cells = []
    for precision in ("fp32", "bf16"):
        options = EvaluationSettings(
            ("fgsm:24/255,eot=4",), score_draws=5, examples=0, health_images=0, precision=precision
        )
        source = TorchLoader(Subset(test, 120, 0), EvalView(16), 120, shuffle=False)
        cells.append(run(tmp_path / precision, defended, source, options).cells)
    for exact, rounded in zip(*cells, strict=True):
        assert exact.scores.mean.low <= rounded.scores.mean.value <= exact.scores.mean.high, (exact, rounded)
    clean, attacked = (cell.scores.mean.value for cell in cells[0])
    assert 0.1 < attacked < clean - 0.1  # the attack succeeds in part
    assert clean > 0.5


def test_compiled_blocks_give_the_records_of_eager_ones(tmp_path, monkeypatch):
    """Denoiser and classifier have two widths; records do not tell who computed them."""
    counter = CompileCounterWithBackend("aot_eager")
    real = torch.compile

    def counted(function, **options):
        mine = options == {"fullgraph": True}  # and not the noise's, which says more
        return real(function, **options, **({"backend": counter} if mine else {}))

    monkeypatch.setattr(torch, "compile", counted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = Autoencoder(CONFIG).eval().requires_grad_(False)
        classifier = Classifier(ClassifierConfig(CLASSES, (8, 8), 4, 32, 1, 2, mean=(0.5,), std=(0.25,)))
        nn.init.normal_(classifier.head.weight)
    classifier.eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a classifier of clean images
        rows = {"off": De3(None, classifier, None)} | {
            str(sigma): De3(denoiser, classifier, sigma) for sigma in (9, 35)
        }
    plain = replace(SETTINGS, attacks=SETTINGS.attacks[:1], examples=0)
    options = replace(plain, compile=True)
    torch._dynamo.reset()
    done = run(tmp_path / "compiled", rows, options=options)
    # Of each width one graph with gradients and one without, for the first size and for others.
    assert 4 <= counter.frame_count <= 2 * 2 * 2
    assert done.settings.compile
    assert not [block for block in (*denoiser.blocks, *classifier.blocks) if "forward" in vars(block)]
    eager = run(tmp_path / "eager", rows, options=plain)
    assert by_key(tmp_path / "compiled") == by_key(tmp_path / "eager")
    assert not eager.settings.compile
    run(tmp_path / "eager", rows, options=options)
    assert len(records(tmp_path / "eager")) == 3 * 2 * COUNT


def test_another_mask_ratio_is_computed(tmp_path):
    options = EvaluationSettings((), score_draws=1, examples=0, health_images=0)
    run(tmp_path, {"dmae": masked(0.5)}, options=options)
    run(tmp_path, {"dmae": masked(0.75)}, options=options)
    assert len(records(tmp_path)) == 2 * COUNT


def test_results_are_replaced_in_one_step(tmp_path, monkeypatch):
    options = EvaluationSettings((), score_draws=1, examples=0, health_images=0)
    run(tmp_path, options=options)
    before = contents(tmp_path)
    write = Path.write_text

    def killed(self: Path, text: str, *args, **kwargs):
        if '"cells"' in text:
            write(self, text[: len(text) // 2])
            raise KeyboardInterrupt
        return write(self, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, options=options)
    assert contents(tmp_path) == before


# Bad input and health


def test_no_defense_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="at least one defense"):
        evaluate({}, loader(), SETTINGS, tmp_path)
    assert list(tmp_path.iterdir()) == []


class Brightness(nn.Module):
    """Class 1 above a threshold of the mean, with a slope or without one."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, pixels: Tensor) -> Tensor:
        margin = pixels.flatten(1).mean(dim=1, keepdim=True) - 0.5
        return torch.cat((0 * margin, margin.sign() if self.flat else margin), dim=1)


def grey(level: int, count: int = COUNT) -> Images:
    images = torch.full((count, 8, 8, 1), level, dtype=torch.uint8)
    return Images(images, torch.ones(count, dtype=torch.int64), torch.arange(count))


def test_gradients_that_are_zero_are_reported_and_others_are_not(tmp_path):
    options = EvaluationSettings(("fgsm:4/255",), score_draws=1, examples=0, health_images=0)
    with pytest.warns(UserWarning, match="gradient was zero at some step for 10 and not finite for 0 of 10") as caught:
        flat = run(tmp_path / "flat", {"flat": De3(None, Brightness(True), None)}, grey(140), options)
    assert len(caught) == 1
    assert len(flat.warnings) == 1
    assert flat.warnings[0].startswith("flat under fgsm:4/255,eot=20: ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path / "steep", {"s": De3(None, Brightness(False), None)}, grey(140), options).warnings == ()


def test_photos_with_three_channels(tmp_path):
    """With more than one channel, NHWC batches and NCHW pixels differ in memory layout."""
    images = torch.randint(0, 256, (COUNT, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    defended = De3(None, Brightness(False), 70)
    options = EvaluationSettings(("fgsm:4/255,eot=2",), score_draws=2, examples=3, health_images=0)
    done = run(tmp_path, {"noise": defended}, Images(images, torch.ones(COUNT, dtype=torch.int64)), options)
    kept = done.examples["noise", "fgsm:4/255,eot=2"]
    assert torch.equal(kept.clean, images[:3].permute(0, 3, 1, 2).float() / 255)
    assert (kept.attacked - kept.clean).abs().max() <= 4 / 255 + 1e-6


def test_a_frozen_defense_far_below_the_random_one_is_reported(tmp_path):
    """A frozen draw that happens to darken every image: randomness alone carries the difference."""
    random = De3(None, Brightness(False), 140)
    shift = {
        seed: float(normal_noise(random.frozen(seed).seeds(0, Domain.SCORE, torch.tensor([0]), 1)[0, 0], (64,)).mean())
        for seed in range(20)
    }
    dark, light = min(shift, key=shift.__getitem__), max(shift, key=shift.__getitem__)
    options = EvaluationSettings(("fgsm:1/255,eot=1",), score_draws=20, examples=0, health_images=0)
    with pytest.warns(UserWarning, match="randomness, not denoising, carries the difference") as caught:
        bad = run(tmp_path / "dark", {"random": random, "frozen": random.frozen(dark)}, grey(132, 40), options)
    assert len(caught) == 1
    assert cell_of(bad, "frozen", "fgsm:1/255,eot=1").scores.mean.value == 0
    assert cell_of(bad, "random", "fgsm:1/255,eot=1").scores.mean.value > 0.4
    assert bad.warnings[0].startswith(
        "frozen is less accurate than random, whose noise is random, under fgsm:1/255,eot=1 (0.0 ["
    )
    # Of several attacks it names the one with the largest difference.
    several = replace(options, attacks=("fgsm:1/255,eot=1", "fgsm:60/255,eot=1", "fgsm:4/255,eot=1"))
    with pytest.warns(UserWarning, match="carries the difference"):
        bad = run(tmp_path / "dark", {"random": random, "frozen": random.frozen(dark)}, grey(132, 40), several)
    gaps = {
        text: cell_of(bad, "random", text).scores.mean.value - cell_of(bad, "frozen", text).scores.mean.value
        for text in several.attacks
    }
    assert 0 <= gaps["fgsm:60/255,eot=1"] < 0.1 < gaps["fgsm:4/255,eot=1"] < gaps["fgsm:1/255,eot=1"]
    assert "under 2 of 3 attacks, most under fgsm:1/255,eot=1 (0.0 [" in bad.warnings[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "light", {"random": random, "frozen": random.frozen(light)}, grey(132, 40), options)
        other = {"random": De3(None, Brightness(False), 135), "frozen": random.frozen(dark)}
        run(tmp_path / "other level", other, grey(132, 40), options)


class Broken(Linear):
    """Not finite for the one brightest image."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, pixels: Tensor) -> Tensor:
        logits = super().forward(pixels)
        bright = (pixels.mean(dim=(1, 2, 3)) > 0.9)[:, None]
        return torch.where(bright & (torch.arange(CLASSES) == 1), self.value, logits)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sigma", [None, 10])
def test_logits_that_are_not_finite_are_an_error_with_the_row_and_the_images(tmp_path, value, sigma):
    source = loader()
    source.images[5] = 250
    with pytest.raises(FloatingPointError, match=r"^row under none: the logits of 1 of \d images .*\(sample ids 8\)"):
        run(tmp_path, {"row": De3(None, Broken(value), sigma)}, source)
    assert not (tmp_path / "results.json").exists()
    assert 8 not in {row["id"] for row in records(tmp_path)}


# The number of score draws


def test_the_number_of_score_draws_is_chosen_once_and_kept(tmp_path):
    auto = replace(SETTINGS, score_draws="auto", examples=0)

    def rows(*sigmas: float) -> dict[str, De3]:
        return {str(sigma): De3(None, Wavy(), sigma) for sigma in sigmas}

    done = run(tmp_path / "auto", rows(0, 70), options=auto)
    draws = json.loads((tmp_path / "auto" / "score_draws.json").read_text())
    chosen = done.settings.score_draws
    assert draws == {"score_draws": chosen, "pilot_images": COUNT}
    assert json.loads((tmp_path / "auto" / "results.json").read_text())["settings"]["score_draws"] == chosen
    # By hand, of the random row under the attack that needs the most.
    by_hand = run(tmp_path / "pilot", rows(70), options=replace(auto, score_draws=20))
    assert {cell.scores.score_draws for cell in by_hand.cells} == {20}
    right = {}
    for row in records(tmp_path / "pilot"):
        right.setdefault(row["attack"], []).append([prediction == row["label"] for prediction in row["predictions"]])
    assert chosen == max(draws_needed(hits, COUNT) for hits in right.values())
    assert 4 < chosen < 20
    assert done.cells == run(tmp_path / "fixed", rows(0, 70), options=replace(auto, score_draws=chosen)).cells
    # What is there decides, also for rows that would need more.
    count = len(records(tmp_path / "auto"))
    assert run(tmp_path / "auto", rows(0, 70), options=auto).cells == done.cells
    assert len(records(tmp_path / "auto")) == count
    (tmp_path / "auto" / "score_draws.json").write_text('{"score_draws": 4}')
    assert run(tmp_path / "auto", rows(0, 5), options=auto).settings.score_draws == 4


def test_the_pilot_has_the_images_of_the_lowest_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "PILOT_IMAGES", 4)
    run(tmp_path, {"row": De3(None, Wavy(), 70)}, options=replace(SETTINGS, score_draws="auto", examples=0))
    pilot = {row["id"] for row in records(tmp_path) if len(row["predictions"]) == 20}
    assert pilot == set(sorted(IDS.tolist())[:4])


# Levels


def levels(classifier: nn.Module, *sigmas: float) -> dict[str, De3]:
    rows = {f"sigma {sigma:g}": De3(None, classifier, sigma) for sigma in sigmas}
    return rows | {f"{name} frozen": row.frozen(1) for name, row in rows.items()}


def by_key(out: Path) -> dict[tuple[str, str, int], dict]:
    return {(row["defense"], row["attack"], row["id"]): row for row in records(out)}


GRAY = replace(SETTINGS, attacks=(*SETTINGS.attacks, "pgd:12/255,steps=3,eot=2,gray"), examples=2)


@pytest.fixture(scope="module")
def levels_alone(tmp_path_factory) -> dict[tuple[str, str, int], dict]:
    """Records of three levels, random and frozen, each in an evaluation of its own."""
    found = {}
    for name, row in levels(Wavy(), 0, 35, 70.5).items():
        found |= by_key(run(out := tmp_path_factory.mktemp("alone"), {name: row}, options=GRAY) and out)
    return found


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_levels_in_one_batch_have_the_records_of_each_alone(levels_alone, tmp_path, slots):
    classifier = Wavy()
    done = run(tmp_path, levels(classifier, 0, 35, 70.5), options=replace(GRAY, max_batch=2 * slots))
    assert by_key(tmp_path) == levels_alone
    assert len({tuple(row["predictions"]) for row in levels_alone.values() if row["attack"] == ROWS[2]}) > 4
    shown = run(tmp_path / "one", {"sigma 35": De3(None, Wavy(), 35)}, options=GRAY).examples
    for (name, attack), examples in shown.items():
        for field, tensor in vars(done.examples[name, attack]).items():
            assert torch.equal(tensor, getattr(examples, field)), field


def test_levels_fill_passes(tmp_path):
    """Batches of 4, 4 and 2 images with two draws, at one level and at two."""

    class Watched(Wavy):
        def forward(self, given: Tensor) -> Tensor:
            if given.requires_grad:
                gradients.append(len(given))
            return super().forward(given)

    found = []
    attack = "pgd:12/255,steps=3,eot=2,loss=dlr,full"
    for sigmas in ((35,), (35, 70)):
        classifier, gradients = Watched(), []
        rows = {str(sigma): De3(None, classifier, sigma) for sigma in sigmas}
        options = replace(SETTINGS, attacks=(attack,), max_batch=16, examples=0)
        run(tmp_path / str(len(sigmas)), rows, options=options)
        found.append(gradients)
    assert found == [[8] * 6 + [4] * 3, [16] * 6 + [8] * 3]


def test_a_level_that_is_added_is_computed_alone(tmp_path):
    options = replace(GRAY, examples=0)
    run(tmp_path, levels(Wavy(), 35, 70.5), options=options)
    old = records(tmp_path)
    grown = run(tmp_path, levels(Wavy(), 35, 50, 70.5), options=options)
    new = records(tmp_path)
    assert new[: len(old)] == old
    assert {row["defense"] for row in new[len(old) :]} == {"sigma 50", "sigma 50 frozen"}
    assert grown.cells == run(tmp_path / "fresh", levels(Wavy(), 35, 50, 70.5), options=options).cells


def test_of_levels_in_one_batch_the_broken_one_is_named(tmp_path):
    source = loader()
    source.images[5] = 250
    rows = {str(sigma): De3(None, Broken(float("nan")), sigma) for sigma in (3, 200)}
    rows["200"].classifier = rows["3"].classifier  # one classifier, and at the higher level the image is darker
    with pytest.raises(FloatingPointError, match=r"^3 under none: the logits of 1 of \d images .*\(sample ids 8\)"):
        run(tmp_path, rows, source)


def test_of_levels_in_one_batch_all_have_smaller_passes_where_memory_does_not_suffice(tmp_path):
    class Small(Wavy):
        def forward(self, given: Tensor) -> Tensor:
            if len(given) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().forward(given)

    printed = io.StringIO()
    rows = levels(Small(), 35, 70)
    done = evaluate(rows, loader(), SETTINGS, tmp_path / "small", console=Console(file=printed, width=200))
    assert done.cells == run(tmp_path / "large", levels(Wavy(), 35, 70)).cells
    words = "out of memory for sigma 35, sigma 70 under none: from now on at most 4 images in a pass"
    assert printed.getvalue().count(words) == 1


# Images that change


def some_changed() -> Images:
    """Two other images, one of which is shown, and one other label."""
    source = loader()
    source.images[1], source.images[9] = 255 - source.images[1], 255 - source.images[9]
    source.labels[7] = (source.labels[7] + 1) % CLASSES
    return source


def test_progress_comes_by_the_clock(tmp_path, monkeypatch):
    """In a pipe: the first line within seconds, however long one attack on one defense takes."""
    now, printed = [0.0], io.StringIO()
    console = Console(file=printed, width=200)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    real = working._predict

    def slow(*arguments):
        now[0] += 1.0  # twice for each pass
        return real(*arguments)

    monkeypatch.setattr(working, "_predict", slow)
    evaluate(defenses(), loader(), SETTINGS, tmp_path, console=console)
    announced, *lines = printed.getvalue().splitlines()
    total = COUNT * len(defenses()) * (1 + len(SETTINGS.attacks))
    assert announced.startswith(f"evaluating: {total} records to make, by at most ")
    assert re.fullmatch(rf"evaluating: \d+/{total} records  \d:\d\d:\d\d left  .*off.* under .*", lines[0])
    assert 3 <= len(lines) == 2 + (now[0] - 3) // 30  # after the pass that ends at 3 s, every 30 s, and at the end
    assert re.fullmatch(rf"evaluating: {total}/{total} records  [\d,]+ gradients  in \d:\d\d:\d\d", lines[-1])


def test_progress_comes_from_within_an_attack(tmp_path, monkeypatch):
    """One attack on one batch may take hours. The gradients to come are said before, those that were spent after."""
    printed = io.StringIO()
    monkeypatch.setattr(progress.LineClock, "due", lambda self: True)
    monkeypatch.setitem(sys.modules, "attacks_of_others", sys.modules[__name__])
    attacks = ("pgd:24/255,steps=6,eot=1,loss=ce", "attacks_of_others:Half")
    options = EvaluationSettings(attacks, score_draws=2, health_images=0, examples=0)
    console = Console(file=printed, width=200)
    found = evaluate({"off": De3(None, Linear(), None)}, loader(), options, tmp_path, console=console)
    lines = printed.getvalue().splitlines()
    assert lines[0] == (
        f"evaluating: {3 * COUNT} records to make, by at most {6 * COUNT} gradients of one draw, and those of 1 rows "
        "whose attacks do not say how many"
    )
    right = next(cell.scores.mean.value for cell in found.cells if cell.attack.startswith("pgd"))
    assert any(re.search(r"left  \d of \d images misled by \d+ gradients  off.* under pgd:", line) for line in lines)
    assert any(f"off {100 * right:.1f} % right so far under pgd:" in line for line in lines)
    spent = sum(cell.gradients or 0 for cell in found.cells)
    assert 0 < spent < 6 * COUNT
    assert f"records  {spent} gradients  in " in lines[-1]


class Softer(Attack):
    """An attack of somebody else that has no options but its own."""

    def run(self, target, pixels, labels, ids, seed):  # type: ignore[override]
        return pixels


def softer():
    return Softer("fgsm", 4 / 255)


def test_an_attack_may_be_one_of_ours_without_its_options(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "attacks_of_others", sys.modules[__name__])
    options = replace(SETTINGS, attacks=("attacks_of_others:softer",), examples=0)
    found = run(tmp_path, {"off": De3(None, Linear(), None)}, options=options)
    assert found.cells[0].scores.mean == found.cells[1].scores.mean


def test_images_that_have_changed_are_evaluated_again(finished, tmp_path):
    out, printed = tmp_path / "copy", io.StringIO()
    shutil.copytree(finished[0], out)
    fresh = run(tmp_path / "fresh", source=some_changed(), classes=("a", "b", "c"))
    chosen = defenses()
    console = Console(file=printed, width=200)
    again = evaluate(chosen, some_changed(), SETTINGS, out, classes=("a", "b", "c"), console=console)
    assert again.cells == fresh.cells != finished[1].cells
    assert results(out) == results(tmp_path / "fresh")
    lines = [line for line in printed.getvalue().splitlines() if "changed" in line]
    assert len(lines) == 1
    assert "3 of 10 images or their labels have changed" in lines[0]
    for place, shown in fresh.examples.items():
        for name, value in vars(shown).items():
            assert torch.equal(value, getattr(again.examples[place], name))
    chosen["off"].classifier.sizes.clear()
    run(out, chosen, some_changed(), classes=("a", "b", "c"))
    assert chosen["off"].classifier.sizes == []
    assert results(out) == results(tmp_path / "fresh")
    # Kept records are the old ones, and of the three new ones there is one for each row.
    old, new = records(finished[0]), records(out)
    assert new[: len(old)] == old
    assert len(new) == len(old) + 3 * len(ROWS) * len(defenses())


def test_images_that_are_gone_are_not_counted(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    fewer = loader()
    fewer.images, fewer.labels, fewer.ids = fewer.images[:8], fewer.labels[:8], fewer.ids[:8]
    again = run(out, source=fewer)
    assert {cell.scores.num_images for cell in again.cells} == {8}
    assert again.cells == run(tmp_path / "fresh", source=fewer).cells


def test_other_images_are_computed_and_those_that_were_stand(finished, tmp_path):
    out, source = tmp_path / "copy", loader()
    shutil.copytree(finished[0], out)
    source.images = 255 - source.images
    again = run(out, source=source)
    assert again.cells == run(tmp_path / "fresh", source=source).cells != finished[1].cells
    assert len(records(out)) == 2 * 3 * ALL
    assert run(out).cells == finished[1].cells
    assert len(records(out)) == 2 * 3 * ALL


def test_images_that_are_added_are_computed_alone(finished, tmp_path):
    fewer, out = loader(), tmp_path / "grown"
    fewer.images, fewer.labels, fewer.ids = fewer.images[:7], fewer.labels[:7], fewer.ids[:7]
    run(out, source=fewer)
    assert run(out).cells == finished[1].cells
    assert len(records(out)) == 3 * ALL


def test_images_that_change_while_they_are_evaluated_are_an_error(tmp_path):
    class Moving(Images):
        epochs = 0

        def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
            self.epochs += 1
            if self.epochs == 2:
                self.images[3] = 0
            return super().epoch(epoch, start_step)

    source = loader()
    with pytest.raises(ValueError, match=r"1 images have changed while they were evaluated \(sample ids 0\)"):
        run(tmp_path / "moving", source=Moving(source.images, source.labels))
    source.images[3] = 0
    done = run(tmp_path / "moving", source=source)
    assert done.cells == run(tmp_path / "fresh", source=source).cells


# Anything plugs in


class Noisy(nn.Module):
    """Draws by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.inner(pixels + 0.3 * torch.randn(pixels.shape))


class Fixed:
    """A target that is no module."""

    is_random = False

    def seeds(self, run_seed, domain, ids, draws=1, step=0):
        return draw_seeds(run_seed, domain, ids, draws, step)

    def draw_logits(self, pixels, seeds, *, surrogate=False):
        return Linear()(pixels).float().expand(len(seeds), -1, -1)


class Brighter:
    """An attack of somebody else, which draws from the process's generator and returns pixels alone."""

    epsilon = 12 / 255

    def run(self, target, pixels, labels, ids, seed):
        return (pixels + self.epsilon * torch.rand(pixels.shape)).clamp(0, 1)


class Outside(Brighter):
    def run(self, target, pixels, labels, ids, seed):
        return pixels + 1


class Half(Brighter):
    """Leaves the images with even ids as they are."""

    def run(self, target, pixels, labels, ids, seed):
        return torch.where((ids % 2 == 0)[:, None, None, None], pixels, (pixels + self.epsilon).clamp(0, 1))


class HalfAgain(Half):
    pass


@pytest.mark.parametrize("sigma", [None, 70.0])
def test_what_several_attacks_return_is_scored_once(tmp_path, monkeypatch, sigma):
    monkeypatch.setitem(sys.modules, "attacks_of_others", sys.modules[__name__])
    options = replace(SETTINGS, attacks=("attacks_of_others:Half", "attacks_of_others:HalfAgain"), examples=0)
    asked: list[tuple[int, ...]] = []
    real = working._predict

    def watched(target, images, seeds, ids, *rest):
        asked.append(tuple(ids.tolist()))
        return real(target, images, seeds, ids, *rest)

    monkeypatch.setattr(working, "_predict", watched)
    defense = De3(None, Wavy(), sigma)
    run(tmp_path, {"row": defense}, Images(images(), loader().labels), options)
    all_ids = sorted(IDS.tolist())
    odd = [i for i in all_ids if i % 2]
    # Scores of the clean images, and of what is new; confirmation draws of two attacks, of which the first one's serve.
    expected = all_ids + odd if sigma is None else all_ids + odd + all_ids
    assert sorted(i for ids in asked for i in ids) == sorted(expected)
    rows = by_key(tmp_path)
    for name in ("Half", "HalfAgain"):
        attacked = Half().run(defense, pixels(), loader().labels, IDS, 4)
        seeds = defense.seeds(4, Domain.SCORE, IDS, 5)
        alone = defense.draw_logits(attacked, seeds).argmax(dim=-1).T[:, : 5 if sigma else 1]
        kept = [rows["row", f"attacks_of_others:{name}", i]["predictions"] for i in IDS.tolist()]
        assert kept == alone.tolist()
        missed = [rows["row", f"attacks_of_others:{name}", i]["missed"] for i in IDS.tolist()]
        assert missed == [rows["row", "attacks_of_others:Half", i]["missed"] for i in IDS.tolist()]


@pytest.mark.usefixtures("global_rng_untouched")
def test_modules_and_targets_of_others_stand_beside_de3(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "attacks_of_others", sys.modules[__name__])
    options = replace(SETTINGS, attacks=(*SETTINGS.attacks, "attacks_of_others:Brighter"))

    def mixed() -> dict[str, object]:
        return {"off": De3(None, Linear(), None), "noisy": Noisy(), "module": Linear(), "fixed": Fixed()}

    data = (pixels(), loader().labels)
    done = run(tmp_path, mixed(), data, options)
    rows = records(tmp_path)
    assert len(rows) == 4 * 4 * COUNT
    assert {row["defense"]: len(row["predictions"]) for row in rows} == {"off": 1, "noisy": 5, "module": 1, "fixed": 1}
    for text in (*ROWS, "worst 12/255"):
        scores = [cell_of(done, name, text).scores for name in ("off", "module", "fixed")]
        assert scores[0] == scores[1] == scores[2], text
    assert {cell.case for cell in done.cells} == {"undefended", "model"}
    # A new process does not know that the module draws, and finds it in the records.
    assert run(tmp_path, mixed(), data, options).cells == done.cells
    assert len(records(tmp_path)) == len(rows)
    assert run(tmp_path / "fresh", mixed(), data, options).cells == done.cells
    with pytest.raises(
        ValueError, match=r"off under \S*Outside: the attack returned images that are none: pixels must"
    ):
        run(tmp_path / "out", {"off": mixed()["off"]}, data, replace(SETTINGS, attacks=("attacks_of_others:Outside",)))


class Wide(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :7]


@pytest.mark.parametrize(
    ("chosen", "labels", "more", "words"),
    [
        (defenses, [3] * COUNT, {}, "off has 3 classes, and 10 of 10 labels are none of them, such as 3 of sample id"),
        (defenses, [-1, *[0] * 9], {}, "labels must be class numbers from 0 on, got -1 of sample id 0"),
        (lambda: defenses() | {"wide": Wide()}, [0] * COUNT, {}, "must have the same classes, got off: 3, .* wide: 7"),
        (lambda: {"wide": Wide()}, [0] * COUNT, {"classes": ("a", "b")}, "wide has 7 classes, and 2 names"),
        (lambda: {"flat": nn.Flatten(0)}, [0] * COUNT, {}, r"Flatten must return logits \(B, K\)"),
        (lambda: {"other": nn.Linear(5, 5)}, [0] * COUNT, {}, r"other does not take pixels of shape \(2, 1, 8, 8\)"),
        (
            lambda: {"module": Linear()},
            [0] * COUNT,
            {"options": replace(SETTINGS, attacks=("fgsm:1/255,gray",))},
            "De3",
        ),
    ],
)
def test_models_and_labels_that_do_not_fit_are_refused_before_any_work(tmp_path, chosen, labels, more, words):
    with pytest.raises(ValueError, match=words):
        run(tmp_path, chosen(), (pixels(), torch.tensor(labels)), **more)
    assert not list(tmp_path.glob("*"))


def test_a_timm_model_on_pixels_is_a_warning(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=3).eval().requires_grad_(False)
    photos = torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    options = EvaluationSettings((), score_draws=1, examples=0, health_images=0)
    with pytest.warns(UserWarning, match="vit: VisionTransformer is a model of timm, which expects images normalised"):
        assert len(run(tmp_path, {"vit": model}, photos, options).warnings) == 1


def test_errors_of_an_attack_and_of_the_first_look_name_the_row(tmp_path):
    class Hidden(Linear):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given.detach())

    class Large(Linear):
        def forward(self, given: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    class Flat(Linear):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given)[0]

    for model, error, message in (
        (Hidden(), ValueError, r"^mine under fgsm:.*: the logits do not depend on the pixels .* denim\.defense\.Bpda"),
        (
            Large(),
            MemoryError,
            r"^mine: a pass of 2 images does not fit into memory \(CUDA .*\); take another precision",
        ),
        (Flat(), ValueError, r"^mine: Flat must return logits \(B, K\) for pixels"),
    ):
        with pytest.raises(error, match=message):
            run(tmp_path / type(model).__name__, {"mine": model})


def test_memory_that_does_not_suffice_halves_the_passes_and_says_so(finished, tmp_path):
    class Small(Linear):
        most = 5

        def forward(self, given: Tensor) -> Tensor:
            if len(given) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().forward(given)

    printed = io.StringIO()
    console = Console(file=printed, width=200)
    done = evaluate(of(Small()), loader(), SETTINGS, tmp_path / "small", console=console)
    assert done.cells == finished[1].cells
    assert printed.getvalue().count("out of memory for noise under none: from now on at most 4 images in a pass") == 1
    small = Small()
    small.most = 1
    with pytest.raises(MemoryError, match=r"noise under .* the passes of one image do not fit into memory"):
        run(tmp_path / "none", {"noise": De3(None, small, 70)}, (pixels()[:1], loader().labels[:1]))


@pytest.mark.parametrize("name", ["x" * 300, "\u0633" * 300, "=cmd|' /C calc'!A0", "../../up", "a/b\\c\n"])
def test_any_name_of_a_defense_makes_files(tmp_path, name):
    long = {name: De3(None, Linear(), None), f"{name}2": De3(None, Linear(), 70)}
    options = EvaluationSettings(("fgsm:12/255,eot=2",), score_draws=2, examples=2, health_images=0)
    done = run(tmp_path / "out", long, options=options)
    assert set(done.examples) == {(row, text) for row in long for text in ("none", "fgsm:12/255,eot=2")}
    assert len(list((tmp_path / "out" / "examples").iterdir())) == 4
    write_report(done, tmp_path / "out", title="long")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        kept = [row["defense"] for row in csv.DictReader(file)]
    assert kept[0] == (f"'{name}" if name.startswith("=") else name)


def test_two_ranks_have_the_results_of_one(finished, tmp_path):
    """Each evaluates its own batches; then one process goes on with what both have."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DENIM_NOISE": "eager"}
    done = subprocess.run([*command, __file__, tmp_path, "ranks"], env=environment, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()
    assert results(tmp_path) == results(finished[0])
    parts = []
    for file in ("records.sqlite", "records-1.sqlite"):
        (tmp_path / file).rename(tmp_path / "alone.sqlite")
        with contextlib.closing(sqlite3.connect(tmp_path / "alone.sqlite")) as database:
            parts.append(database.execute("SELECT sum(count) FROM blocks").fetchone()[0])
        (tmp_path / "alone.sqlite").rename(tmp_path / file)
    assert parts == [6 * 9, 4 * 9]  # batches of 4, 4 and 2: the first and the third, and the second
    chosen = defenses()
    assert (
        run(tmp_path, chosen, classes=("a", "b", "c"), options=replace(SETTINGS, examples=0)).cells == finished[1].cells
    )
    assert chosen["off"].classifier.sizes == []


def work_of_ranks(out: Path) -> None:
    storing.SYNCHRONOUS = "OFF"
    with joined(torch.device("cpu"), 100) as ranks:
        done = run(out, classes=("a", "b", "c"), ranks=ranks)
        assert len(ranks.gather(len(done.cells))) == 2


if __name__ == "__main__":
    (work_of_ranks if sys.argv[2:] else kill_often)(Path(sys.argv[1]))
