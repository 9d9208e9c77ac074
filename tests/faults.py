"""Faults in bulk: processes killed at any moment, damaged images, tampered checkpoints and manifests (`make faults`).

Nothing may be lost, crash, hang or change without a word. It prints counts, and exits with status 1 after a failure.

Work runs in forks of this process, which has everything imported and has run nothing: a kill costs no start of Python.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DENIM_NOISE": "eager", "TQDM_DISABLE": "1"}

import numpy as np
import torch
import tyro  # noqa: F401 (the command imports it late)
from PIL import Image
from safetensors import SafetensorError, safe_open

import denim.cli.certify
import denim.cli.data
import denim.cli.evaluate
import denim.cli.finetune
import denim.cli.pretrain
import denim.defense.certification
import denim.defense.certification_report
import denim.defense.evaluation
import denim.defense.report
import denim.nim.finetuning
import denim.nim.pretraining
from denim.nim.data import TrainView, loader_backends, open_loader, open_manifest, open_source
from denim.nim.run import MEASURED

KILLS, RANK_KILLS, IMAGES, TAMPERED = 200, 20, 2000, 100  # at scale 1
LIMIT = 300  # seconds, after which a process hangs
# A kill costs as long as the work has run until then: few images, of few pixels.
RUN = (
    "--epochs", "2", "--warmup-epochs", "0", "--batch-size", "8", "--checkpoint-every", "2", "--log-every", "1",
    "--loader", "torch", "--device", "cpu", "--stall-timeout", "30", "--resume",
)  # fmt: skip
Work = Callable[[], object]


def denim_command(*words: object) -> Work:
    """`denim WORDS`, as the command itself runs it."""

    def work() -> None:
        sys.argv = ["denim", *map(str, words)]
        denim.cli.run()

    return work


class Child:
    """A fork that does some work, with what it prints in a file."""

    def __init__(self, work: Work, log: Path) -> None:
        self.log, self.started = log, time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(work)
        self.status: int | None = None

    def _become(self, work: Work) -> None:
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        status = 1
        try:
            work()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def wait(self, limit: float = LIMIT) -> int | None:
        """Its exit status, negative for a signal; None while it runs after `limit` seconds."""
        end = time.perf_counter() + limit
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.perf_counter() > end:
                return None
            else:
                time.sleep(0.005)
        return self.status

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        status = self.wait()
        assert status is not None
        return status

    def said(self) -> str:
        return self.log.read_text(errors="backslashreplace").strip()


class Faults:
    """Counts, failures, and a folder to work in."""

    def __init__(self, folder: Path, scale: float, seed: int) -> None:
        self.folder, self.scale, self.random = folder, scale, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def amount(self, whole: int) -> int:
        return max(1, round(whole * self.scale))

    def fail(self, text: str, child: Child | None = None) -> None:
        tail = "" if child is None else "\n    ".join(["", *child.said().splitlines()[-6:]])
        self.failures.append(f"{text}{tail}")
        print(f"FAILED: {text}{tail}", flush=True)

    def child(self, work: Work) -> Child:
        return Child(work, self.folder / "log")

    def run(self, what: str, work: Work) -> Child:
        """Do some work to its end, which must be a success."""
        child = self.child(work)
        status = child.wait()
        if status is None:
            child.kill()
        if status != 0:
            self.fail(f"{what}: {'hangs' if status is None else f'ends with {status}'}", child)
        return child

    def say(self, what: str, since: float) -> None:
        print(f"{what}; {time.perf_counter() - since:.0f} s", flush=True)


def content(folder: Path) -> dict[str, object]:
    """What must be equal in two folders: all files by name, without times and speeds.

    safetensors writes the entries of its header in an order that is drawn anew each time.
    """
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "tensorboard" in path.parts or path.is_dir() or path.name == "SHA256SUMS":
            continue
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]
        elif path.name in ("run.json", "training.json"):
            different = ("out", "device_seconds")
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in different}
        elif path.suffix == ".sqlite":
            found[name] = _records(path)
        elif path.name == "results.json":
            results = json.loads(path.read_text())
            cells = [
                {key: value for key, value in cell.items() if key != "seconds"} for cell in results.get("cells", ())
            ]
            found[name] = results | {"cells": cells}
        elif path.name == "certificates.jsonl":  # in the order in which images were finished
            found[name] = sorted(path.read_text().splitlines())
        elif path.name == "results.csv":
            rows = csv.DictReader(path.read_text().splitlines())
            found[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        elif path.name == "report.html":
            measured = r"[\d.]+ s</small>|<p class=\"made\">.*?</p>|download=\"table.csv\" href=\"[^\"]*\""
            found[name] = re.sub(measured, "", path.read_text())
        else:
            found[name] = _whole(path)
    return found


def _whole(path: Path) -> object:
    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    with contextlib.suppress(SafetensorError), safe_open(path, framework="np") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        sums = {key: (value.dtype, value.shape, digest(value.tobytes())) for key, value in tensors.items()}
        return file.metadata(), sums
    return digest(path.read_bytes())


def _records(file: Path) -> list[tuple[object, ...]]:
    """The records of an evaluation, in order. A killed one has stored them in other blocks."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        blocks = database.execute(
            "SELECT defense, attack, ids, labels, predictions, missed, flags, gradients "
            "FROM blocks JOIN cells ON cells.number = cell"
        ).fetchall()
    rows: list[tuple[object, ...]] = []
    for defense, attack, *blobs in blocks:
        kinds = ("<i8", "<i4", "<u2", "<i4", "u1", "<i4")
        ids, labels, predictions, *rest = map(np.frombuffer, blobs, kinds)
        classes = predictions.reshape(len(ids), -1).tolist()
        columns = zip(ids.tolist(), labels.tolist(), classes, *(column.tolist() for column in rest), strict=True)
        rows += [(defense, attack, *row) for row in columns]
    return sorted(rows)


def difference(ours: dict[str, object], expected: dict[str, object]) -> str:
    return ", ".join(sorted(name for name in ours.keys() | expected.keys() if ours.get(name) != expected.get(name)))


# ---------------------------------------------------------------------------------------------------------------- kills


def works(faults: Faults) -> dict[str, Callable[[Path], Work]]:
    """What is killed: by name, a function from the folder that it writes to its work."""
    given = faults.folder / "given"
    photos, small = given / "photos", given / "small"
    rng = np.random.default_rng(0)
    for folder, count, side in ((photos / "train", 100, 96), (small / "train", 16, 16), (small / "test", 6, 16)):
        for name in ("cat", "dog"):
            (folder / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{number}.png")

    def pretrain(out: Path) -> Work:
        size = ("--preset", "micro", "--img-size", "16", "--patch-size", "8")
        return denim_command("pretrain", "--out", out, "--data", small, *size, *RUN)

    def finetune(out: Path) -> Work:
        augmentation = ("--auto-augment", "None", "--mixup", "0", "--cutmix", "0")
        models = ("--denoiser", given / "nim/model")
        return denim_command("finetune", "--out", out, "--data", small, *models, *augmentation, *RUN)

    def evaluate(out: Path) -> Work:
        models = ("--classifier", given / "classifier/model", "--denoiser", given / "nim/model")
        few = ("--data", small, "--score-draws", "2", "--max-batch", "4", "--examples", "2", "--loader", "torch")
        few = (*few, "--health-images", "0")
        attacks = ("--sigmas", "70", "--frozen", "None", "--attacks", "fgsm:4/255,eot=1", "pgd:4/255,steps=1,eot=2")
        return denim_command("evaluate", "--out", out, *models, *few, *attacks)

    def certify(out: Path) -> Work:
        models = (
            "--classifier",
            given / "classifier/model",
            "--denoiser",
            given / "nim/model",
            "--statistics",
            "noisy",
        )
        few = ("--data", small, "--draws", "300", "--selection-draws", "20", "--max-batch", "32", "--loader", "torch")
        return denim_command("certify", "--out", out, *models, *few)

    def index(out: Path) -> Work:
        return functools.partial(open_manifest, photos, "train", cache=out)

    def pack(out: Path) -> Work:
        size = ("--shard-size", "100kB", "--cache", given / "cache")
        return denim_command("data", "pack", photos, out, *size)

    os.environ["XDG_CACHE_HOME"] = str(given)  # the user's own is left alone
    faults.run("index", functools.partial(open_manifest, small, "test"))
    faults.run("pretrain", pretrain(given / "nim"))
    faults.run("finetune", finetune(given / "classifier"))
    faults.run("index", index(given / "cache"))
    return {
        "pretrain": pretrain,
        "finetune": finetune,
        "evaluate": evaluate,
        "certify": certify,
        "index": index,
        "pack": pack,
    }


def kills(faults: Faults, tasks: dict[str, Callable[[Path], Work]]) -> None:
    """Kill each work at random moments, let it end, and compare with one that nothing has disturbed."""
    for name, work in tasks.items():
        since, wanted, killed, rounds = time.perf_counter(), faults.amount(KILLS // len(tasks)), 0, 0
        whole = faults.folder / "whole"
        whole.mkdir()
        first = time.perf_counter()
        faults.run(name, work(whole / "out"))
        duration, expected = time.perf_counter() - first, content(whole)
        while killed < wanted and not faults.failures:
            place = faults.folder / "killed"
            place.mkdir()
            for _ in range(min(faults.random.randint(1, 8), wanted - killed)):
                child = faults.child(work(place / "out"))
                if child.wait(faults.random.uniform(0, duration)) is None:
                    killed += child.kill() == -signal.SIGKILL
                elif child.status != 0:
                    faults.fail(f"{name}, after a kill, ends with {child.status}", child)
            child = faults.run(f"{name}, after kills", work(place / "out"))
            if child.status == 0 and (other := difference(content(place), expected)):
                faults.fail(f"{name}, after kills, differs in {other}")
            shutil.rmtree(place)
            rounds += 1
        shutil.rmtree(whole)
        faults.counts["kills"] += killed
        faults.say(f"{name}: {killed} kills in {rounds} runs, which end with the same bytes", since)


# ---------------------------------------------------------------------------------------------------------------- ranks


def two_ranks(faults: Faults, work: Work) -> list[Child]:
    """Two processes that do some work together, as torchrun would start them."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]

    def of_rank(rank: int) -> Work:
        def run() -> None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work()

        return run

    return [Child(of_rank(rank), faults.folder / f"log-{rank}") for rank in range(2)]


def ranks(faults: Faults, tasks: dict[str, Callable[[Path], Work]]) -> None:
    """Kill one rank of two, or both, at random moments, and compare with a training that nothing has disturbed."""
    since, wanted, killed, rounds = time.perf_counter(), round(RANK_KILLS * faults.scale), 0, 0
    if wanted == 0:
        return

    def end(out: Path) -> None:
        for child in two_ranks(faults, tasks["pretrain"](out)):
            if child.wait() != 0:
                faults.fail(f"two ranks: one ends with {child.status}", child)

    first = time.perf_counter()
    end(faults.folder / "whole/out")
    duration, expected = time.perf_counter() - first, content(faults.folder / "whole")
    while killed < wanted and not faults.failures:
        place = faults.folder / "killed"
        for _ in range(min(faults.random.randint(1, 5), wanted - killed)):
            children = two_ranks(faults, tasks["pretrain"](place / "out"))
            children[0].wait(faults.random.uniform(0, duration))
            victims = faults.random.choice(([0], [1], [0, 1]))
            if all(children[rank].wait(0) is None for rank in victims):
                killed += {children[rank].kill() for rank in victims} == {-signal.SIGKILL}
            for child in children:
                if child.wait() is None:
                    faults.fail("two ranks: one goes on when the other is gone", child)
                elif child.status == 1:
                    faults.fail("two ranks: one ends without words when the other is gone", child)
        end(place / "out")
        if other := difference(content(place), expected):
            faults.fail(f"two ranks, after kills: {other} differs")
        shutil.rmtree(place)
        rounds += 1
    shutil.rmtree(faults.folder / "whole")
    for rank in range(2):
        (faults.folder / f"log-{rank}").unlink()
    faults.counts["kills of ranks"] += killed
    faults.say(f"two ranks: {killed} kills in {rounds} runs, which end with the same bytes", since)


# --------------------------------------------------------------------------------------------------------------- images


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A file with bits flipped, cut off, with a part twice, with a part of zeros, or with noise in it."""
    content = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(content))
        length = min(chance.choice((1, 1, 4, 64, 1024)), len(content) - start)
        match chance.randrange(6):
            case 0 | 1:
                content[start] ^= 1 << chance.randrange(8)
            case 2:
                del content[max(16, start) :]
            case 3:
                content[start:start] = content[start : start + length]
            case 4:
                content[start : start + length] = bytes(length)
            case _:
                content[start : start + length] = chance.randbytes(length)
    return bytes(content)


def seeds_of_images() -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((96, 72), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x112] = 6
    for ending, kind, image, options in (
        ("jpg", "JPEG", smooth, {"quality": 90}),
        ("jpg", "JPEG", smooth, {"progressive": True, "exif": exif}),
        ("jpg", "JPEG", smooth.convert("L"), {}),
        ("jpg", "JPEG", smooth.convert("CMYK"), {}),
        ("png", "PNG", smooth, {}),
        ("png", "PNG", smooth.convert("P"), {}),
        ("png", "PNG", smooth.convert("RGBA"), {}),
        ("webp", "WEBP", smooth, {}),
        ("bmp", "BMP", smooth, {}),
        ("tif", "TIFF", smooth, {"compression": "tiff_lzw"}),
        ("ppm", "PPM", smooth, {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        yield ending, buffer.getvalue()


def read_with(folder: Path, cache: Path, backend: str) -> Work:
    """One epoch of a folder with a backend; the images that it reads are kept as `BACKEND.npz` in the cache."""

    def work() -> None:
        source = open_source(folder, "train", labelled=False, max_bad=1, cache=cache)
        loader = open_loader(
            source, TrainView(64, None, flip=False), 16, shuffle=False, last="keep", backend=backend, max_bad=1
        )
        images = {}
        for batch in loader.epoch(0):
            counted = batch.counted()
            images |= dict(zip(map(str, counted.ids.tolist()), counted.images.numpy(), strict=True))
        np.savez(cache / f"{backend}.npz", **images)

    return work


def images(faults: Faults, tasks: dict[str, Callable[[Path], Work]]) -> None:
    """Damaged images through both loaders, beside whole ones: they read the same ones, as the same pictures."""
    since, seeds = time.perf_counter(), list(seeds_of_images())
    folder, cache = faults.folder / "damaged", faults.folder / "cache"
    probe = faults.folder / "given/photos"
    source = open_source(probe, "train", labelled=False, cache=faults.folder / "given/cache")
    why = loader_backends(source, TrainView(64, None, flip=False))
    backends = [name for name, reasons in why.items() if not reasons]
    for name in why.keys() - set(backends):
        print(f"images: not with {name}: {'; '.join(why[name])}")
    total, read, other = faults.amount(IMAGES), 0, 0
    for start in range(0, total, 500):
        (folder / "a").mkdir(parents=True)
        cache.mkdir()
        for number in range(start, min(total, start + 500)):
            ending, data = faults.random.choice(seeds)
            (folder / "a" / f"{number:05d}.{ending}").write_bytes(damaged(data, faults.random))
        for number, (ending, data) in enumerate(seeds):
            (folder / "a" / f"whole{number}.{ending}").write_bytes(data)
        before = content(folder)
        for backend in backends:
            faults.run(f"images {start} and on, with {backend}", read_with(folder, cache, backend))
        if content(folder) != before:
            faults.fail("the folder of images was changed")
        with contextlib.ExitStack() as stack:
            found = [
                stack.enter_context(np.load(cache / f"{b}.npz")) for b in backends if (cache / f"{b}.npz").exists()
            ]
            if any(set(each.files) != set(found[0].files) for each in found):
                faults.fail(f"images {start} and on: the loaders do not read the same ones")
                continue
            if found and len(found[0].files) < len(seeds):
                faults.fail(f"images {start} and on: only {len(found[0].files)} could be read, {len(seeds)} are whole")
            for name in found[0].files if found else ():
                read += 1
                levels = [each[name].astype(int) for each in found]
                # Rounding alone is less than two levels on average.
                other += any(np.abs(each - levels[0]).mean() >= 2 for each in levels)
        shutil.rmtree(folder)
        shutil.rmtree(cache)
    if other:
        faults.fail(f"{other} images are other pictures with another loader")
    faults.counts["damaged images"] += total
    faults.say(f"images: {total} damaged ones through {' and '.join(backends)}, {read} reads of what is whole", since)


# ------------------------------------------------------------------------------------------------------------ tampering


def tamper(folder: Path, chance: random.Random) -> str:
    """Change one file below a folder; says how."""
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    name, data = file.relative_to(folder), file.read_bytes()
    kind = chance.choice(("flip", "flip", "damage", "truncate", "remove", "swap", "forge"))
    if kind == "flip":
        place = chance.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
    elif kind == "truncate":
        file.write_bytes(data[: chance.randrange(len(data))])
    elif kind == "remove":
        file.unlink()
    elif kind == "swap":
        file.write_bytes(chance.choice(sorted(path for path in folder.rglob("*") if path.is_file())).read_bytes())
    else:
        file.write_bytes(damaged(data, chance))
    checkpoint = next((parent for parent in file.parents if (parent / "SHA256SUMS").exists()), None)
    if kind == "forge" and checkpoint:  # sums that agree with what is there
        lines = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(checkpoint)}\n"
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file() and path.name != "SHA256SUMS"
        ]
        (checkpoint / "SHA256SUMS").write_text("".join(lines))
    return f"{kind} {name}"


def refused_in_words(child: Child) -> bool:
    return child.status == 2 and child.said().splitlines()[-2:-1] != [] and "Traceback" not in child.said()


def tampering(faults: Faults, tasks: dict[str, Callable[[Path], Work]]) -> None:
    """Tampered checkpoints and manifests: refused in words, or as good as whole ones."""
    since, given, outcomes = time.perf_counter(), faults.folder / "given", Counter()
    manifests = content(given / "cache")
    models = content(given / "nim" / "model")
    for number in range(faults.amount(TAMPERED)):
        place = faults.folder / "tampered"
        if number % 3 < 2:
            shutil.copytree(given / "nim", place / "out")
            shutil.rmtree(place / "out/model")
            how = tamper(place / "out/checkpoints", faults.random)
            child = faults.child(tasks["pretrain"](place / "out"))
        else:
            shutil.copytree(given / "cache", place / "out")
            how = tamper(place / "out", faults.random)
            child = faults.child(denim_command("data", "check", given / "photos", "--cache", place / "out"))
        status = child.wait()
        if status is None:
            child.kill()
            faults.fail(f"{how}: hangs")
        elif status == 0 and number % 3 < 2:
            # The model alone: a checkpoint that was not taken may stay as damaged as it is.
            same = content(place / "out" / "model") == models
            outcomes["resumed to the same model" if same else "forged, resumed to another model"] += 1
            if not same and not how.startswith("forge"):
                faults.fail(f"{how}: resumed without a word to another model")
        elif status == 0:
            if other := difference(content(place / "out"), manifests):
                faults.fail(f"{how}: believed, or made anew with other content: {other}")
            outcomes["manifests as good as whole ones"] += 1
        elif refused_in_words(child):
            outcomes["refused in words"] += 1
        else:
            faults.fail(f"{how}: ends with {status}", child)
        shutil.rmtree(place)
        faults.counts["tampered files"] += 1
    faults.say(f"tampering: {', '.join(f'{count} {what}' for what, count in sorted(outcomes.items()))}", since)


PARTS = {"kills": kills, "ranks": ranks, "images": images, "tampering": tampering}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the faults; 0.02 takes a minute or two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Image.preinit()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), options.scale, options.seed)
        tasks = works(faults)
        given = content(Path(folder) / "given")
        if not faults.failures:
            for part in options.parts:
                PARTS[part](faults, tasks)
            if foreign := difference(content(Path(folder) / "given"), given):
                faults.fail(f"what was given has changed: {foreign}")
            left = {path.name for path in Path(folder).iterdir()} - {"given", "log"}
            if left and not faults.failures:
                faults.fail(f"something is left over: {', '.join(left)}")
    print(f"{', '.join(f'{count} {what}' for what, count in faults.counts.items())}: {len(faults.failures)} failures")
    return 1 if faults.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
