"""Checks and measures what needs a GPU: `make gpu-check`, or `python -m benchmarks.gpu_check [--out DIR] [--quick]`.

It needs the repository, torch, triton and timm, and takes less than nine minutes. report.json, report.md and, with
matplotlib, report.png are written again while parts run, so that an interrupted run keeps its results. The exit status
is 0 if all passed, 1 if something failed, and 2 if there is no GPU.

Every part is a process of its own with a time limit. If a kernel hangs, crashes, or leaves the device unusable for its
process, that part fails and the others continue. What the parts do is in `gpu_operators`, `gpu_models` and `gpu_runs`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from .gpu_picture import draw
from .gpu_rows import Row

ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 525  # seconds for all parts; starting and writing stay within the nine minutes
EVERY = 2.0  # seconds between two reports while parts run


@dataclass
class Part:
    """A function that yields rows, its time limit, and its outcome.

    A number whose part failed a check before it is not reported.

    Attributes:
        function: "module:name" of a function of the device, the name of the sizes and `arguments`.
        seconds: after which it is stopped.
        arguments: further ones of the function.
        autotune: launch configurations are measured; otherwise the first one is taken, where only results matter.
        status: "not run", then "passed", "failed", "crashed" or "out of time".
        took: seconds.
        rows: that it has yielded.
        error: why it did not end well.
    """

    function: str
    seconds: float
    arguments: tuple[str, ...] = ()
    autotune: bool = False
    status: str = "not run"
    took: float = 0.0
    rows: list[Row] = field(default_factory=list)
    error: str = ""

    @property
    def name(self) -> str:
        """The function's name, or its arguments, as words."""
        return " ".join(self.arguments or (self.function.split(":")[1],)).replace("_", " ")


def stages() -> list[list[Part]]:
    """Parts of one stage run side by side, stages one after another: what is timed has the machine to itself."""
    from denim.benchmarks.cases import OPERATIONS

    checks = [Part(f"denim.benchmarks.gpu_operators:{name}", 160) for name in ("generator", "instructions")]
    checks += [Part("denim.benchmarks.gpu_operators:operation", 160, (name,)) for name in OPERATIONS]
    checks.append(Part("denim.benchmarks.gpu_operators:attention", 160))
    checks.append(Part("denim.benchmarks.gpu_models:compiled_and_captured", 160))
    checks += [Part(f"denim.benchmarks.gpu_runs:{name}", 160) for name in ("pretraining_run", "two_equal_runs")]
    timed = [("pretraining", 115), ("captured_training", 30), ("sweep", 55), ("attack", 40)]
    timed += [("kernel_times", 65), ("attention_times", 15)]
    parts = [[Part(f"denim.benchmarks.gpu_models:{name}", seconds, autotune=True)] for name, seconds in timed]
    return [checks, *parts, [Part("denim.benchmarks.gpu_runs:sanitizer", 90)]]


def use_repository(folder: Path = ROOT / "build" / "gpu-check") -> None:
    """Make `denim` importable from this checkout, installed or not.

    A folder of links, as the layout wants it (see `make types`).
    """
    for part in ("kernels", "nim", "defense", "benchmarks"):
        package = folder / "denim" / part
        shutil.rmtree(package, ignore_errors=True)
        for source in (ROOT / part).rglob("*.py"):
            link = package / source.relative_to(ROOT / part)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)
    sys.path[:0] = [str(folder), str(ROOT)]


def _work(connection: Connection, part: Part, device: str, sizes: str) -> None:
    """Run a part, in a process of its own: send its rows, then how it ended."""
    os.setsid()  # so that the processes that it starts end with it
    failed = False
    if not part.autotune:
        os.environ["DENIM_AUTOTUNE"] = "0"
    try:
        module, name = part.function.split(":")
        for row in getattr(importlib.import_module(module), name)(device, sizes, *part.arguments):
            if failed and row.limit is None:
                break
            failed = failed or not row.passed
            connection.send(asdict(row))
    except BaseException:  # every failure is reported
        connection.send(("failed", traceback.format_exc()))
    else:
        connection.send(("failed" if failed else "passed", ""))
    connection.close()


def _kill(process: Any) -> None:
    """End a part and all processes that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have a group of its own yet
    process.join()


def run_stage(parts: Iterable[Part], device: str, sizes: str, deadline: float = math.inf) -> Iterator[Part]:
    """Run parts side by side; yield each when it has ended, its outcome filled in, and others when they have new rows.

    Args:
        parts: the stage.
        device: "cuda" or "cpu".
        sizes: a key of `gpu_rows.SIZES`.
        deadline: in time.monotonic(); nothing runs longer. A part without a second left is not started.
    """
    # Spawned, since a forked process cannot use CUDA after its parent has initialised it.
    context = multiprocessing.get_context("spawn")
    running: dict[Any, tuple[Part, Any, float, float]] = {}
    for part in parts:
        start = time.monotonic()
        end = min(start + part.seconds, deadline)
        if end - start < 1:
            yield part
            continue
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, part, device, sizes), daemon=False)
        process.start()
        sender.close()  # so that the end of the process closes the pipe
        running[receiver] = (part, process, start, end)
    try:
        while running:
            first = min(end for *_, end in running.values())
            ready = wait(list(running), max(0.0, first - time.monotonic()))
            for receiver in [connection for connection in running if connection in ready]:
                part, process, start, end = running[receiver]
                try:
                    message = receiver.recv()
                except EOFError:
                    process.join()
                    message = ("crashed", f"the process ended with exit code {process.exitcode}")
                if isinstance(message, dict):
                    part.rows.append(Row(**message))
                    part.took = time.monotonic() - start
                    yield part
                else:
                    part.status, part.error = message
            for receiver, (part, process, start, end) in list(running.items()):
                if part.status == "not run" and time.monotonic() < end:
                    continue
                if part.status == "not run":
                    part.status, part.error = "out of time", f"stopped after {time.monotonic() - start:.0f} s"
                else:
                    process.join(10)  # it has reported, and may hang while it ends
                _kill(process)
                receiver.close()
                del running[receiver]
                part.took = time.monotonic() - start
                yield part
    finally:
        for _, process, *_ in running.values():
            _kill(process)


def _command(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def facts(device: str) -> dict[str, Any]:
    """Device, driver, versions and commit."""
    import torch

    versions = {"torch": str(torch.__version__)}
    for package in ("triton", "timm", "xformers", "nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    found: dict[str, Any] = {"device": platform.processor() or platform.machine(), "driver": None}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory"] = f"{properties.total_memory / 2**30:.1f} GiB"
        found["multiprocessors"] = properties.multi_processor_count
        found["driver"] = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    changed = _command("git", "status", "--porcelain")
    commit = _command("git", "rev-parse", "HEAD")
    return {
        **found,
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda or torch.version.hip,
        "commit": commit and commit + (" with changes" if changed else ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _number(row: Row) -> str:
    return f"{row.value:.4g}{' ' if row.unit else ''}{row.unit}"


def markdown(found: dict[str, Any], parts: list[Part], picture: bool = False) -> str:
    """The report in Markdown, about a page: the parts, what failed, and the numbers. All rows are in the JSON file."""
    ended = [part for part in parts if part.status != "not run"]
    good = sum(part.status == "passed" for part in parts)
    lines = ["# GPU check", "", f"{good} of {len(parts)} parts passed, {len(ended)} have ended.", ""]
    for key, value in found.items():
        text = ", ".join(f"{name} {number}" for name, number in value.items()) if isinstance(value, dict) else value
        lines.append(f"- {key}: {text}")
    if picture:
        lines += ["", "![Speeds](report.png)"]
    lines += ["", "| part | outcome | checks passed | seconds | at most |", "|---|---|---|---|---|"]
    for part in parts:
        checks = [row for row in part.rows if row.limit is not None]
        passed = sum(row.passed for row in checks)
        lines.append(
            f"| {part.name} | {part.status} | {passed} of {len(checks)} | {part.took:.1f} | {part.seconds:.0f} |"
        )
    for part in parts:
        failed = [row for row in part.rows if not row.passed]
        if failed or part.error:
            lines += ["", f"## {part.name}: {part.status}", ""]
        if failed:
            lines += ["| what | value | limit | note |", "|---|---|---|---|"]
            lines += [f"| {row.what} | {_number(row)} | {row.limit:.4g} | {_cell(row.note)} |" for row in failed]
        if part.error:
            lines += ["", "```", part.error.strip(), "```"]
    absent = [(part, row) for part in parts for row in part.rows if row.limit == 0 and row.note and row.passed]
    if absent:
        lines += ["", "## Not run", ""]
        lines += [f"- {part.name}: {row.what} ({_cell(row.note)})" for part, row in absent]
    for part in parts:
        numbers = [row for row in part.rows if row.limit is None]
        if numbers:
            lines += ["", f"## {part.name}", "", *_numbers(numbers)]
    return "\n".join(lines) + "\n"


def _numbers(rows: list[Row]) -> list[str]:
    """A table of measured numbers. Rows "SUBJECT: WHAT" of several subjects have a line for each subject."""
    columns = list(dict.fromkeys(row.what.rpartition(": ")[2] for row in rows))
    subjects = list(dict.fromkeys(row.what.rpartition(": ")[0] for row in rows))
    if "" in subjects or len(columns) >= len(subjects):
        lines = ["| what | value | note |", "|---|---|---|"]
        return lines + [f"| {row.what} | {_number(row)} | {_cell(row.note)} |" for row in rows]
    lines = ["| | " + " | ".join(columns) + " | note |", "|---" * (len(columns) + 2) + "|"]
    for subject in subjects:
        found = {row.what.rpartition(": ")[2]: row for row in rows if row.what.rpartition(": ")[0] == subject}
        cells = [_number(found[name]) if name in found else "" for name in columns]
        notes = "; ".join(_cell(row.note) for row in found.values() if row.note)
        lines.append(f"| {subject} | " + " | ".join([*cells, notes]) + " |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _write(path: Path, text: str) -> None:
    """Write a file atomically."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    staged = Path(name)
    staged.chmod(0o644)
    staged.replace(path)


def check(
    plan: list[list[Part]], device: str, sizes: str, out: Path, *, seconds: float = DEADLINE
) -> tuple[bool, list[Part]]:
    """Run the stages of a plan, and write the reports while parts run and after each.

    Returns whether all parts passed, and the parts.
    """
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    parts, found = [part for stage in plan for part in stage], facts(device)
    written = -math.inf

    def write() -> None:
        nonlocal written
        records = [
            asdict(part) | {"rows": [asdict(row) | {"passed": row.passed} for row in part.rows]} for part in parts
        ]
        passed = all(part.status == "passed" for part in parts)
        # JSON has no NaN; it is written as text.
        text = json.dumps(_finite({"passed": passed, "sizes": sizes, "facts": found, "parts": records}), indent=1)
        _write(out / "report.json", text + "\n")
        picture = draw(parts, out / "report.png")
        _write(out / "report.md", markdown(found, parts, picture))
        written = time.monotonic()

    write()
    for stage in plan:
        for part in run_stage(stage, device, sizes, deadline):
            running = part.status == "not run" and part.rows
            if not running or time.monotonic() - written > EVERY:
                write()
            if running:
                continue
            checks = sum(row.limit is not None for row in part.rows)
            print(f"{part.name}: {part.status}, {checks} checks, {part.took:.0f} s", flush=True)
            for row in part.rows:
                if row.limit is None:
                    print(f"    {row.what}: {_number(row)} {row.note}".rstrip(), flush=True)
                elif not row.passed:
                    print(f"    FAILED {row.what}: {_number(row)} exceeds {row.limit:.4g} {row.note}", flush=True)
            if part.error:
                print("    " + part.error.strip().splitlines()[-1], flush=True)
    return all(part.status == "passed" for part in parts), parts


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="folder of the reports")
    parser.add_argument("--quick", action="store_true", help="fewer cases, 2^26 words, shorter measurements")
    chosen = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print(
            "no GPU: torch sees none, and nothing was checked. `make test` runs the kernels' sources in Triton's "
            "interpreter and builds them for GPUs, on any machine.",
            file=sys.stderr,
        )
        return 2
    # Parts have sessions of their own: as an exception, a request to stop ends them with this process.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    use_repository()
    passed, _ = check(stages(), "cuda", "quick" if chosen.quick else "full", chosen.out)
    print(f"{'all passed' if passed else 'FAILED'}: {chosen.out / 'report.md'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
