"""Processes that decode images, for which a crash of a decoder is an answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from PIL import Image

from denim.nim.data.decode import PAUSES, Place, Verdict
from denim.nim.text import open_console

__all__ = ["CHUNK", "ask_processes", "processors"]

CHUNK = 64  # images per question
# Signals that others send, and the system where memory runs out; a decoder that fails sends others to itself.
OUTSIDE = frozenset(
    -number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
)


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ask_processes(
    question: str, place: Callable[[int], Place], rows: Sequence[int], title: str
) -> Iterator[tuple[list[int], list[Any]]]:
    """What as many processes as there are processors say of images, chunk by chunk, in any order.

    Args:
        question: "judge" for a `Verdict` on each, or "dali" for what `try_dali` says, and a text for an image that ends
            the process.
        place: where the image of a row is.
        rows: to ask about.
        title: of the progress bar.

    Yields:
        Rows, and the answers to them.

    Raises:
        OSError: processes do not start.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not rows:
        return
    chunks = [list(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    count = min(processors(), len(chunks))
    console = open_console(stderr=True)
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        _Processes(question, count) as processes,
        ThreadPool(count) as pool,
    ):
        bar = progress.add_task("", total=len(rows))
        for chunk, answers in pool.imap_unordered(lambda chunk: (chunk, processes([*map(place, chunk)])), chunks):
            progress.advance(bar, len(chunk))
            yield chunk, answers


class _Processes:
    """Processes that decode. One that dies is replaced, and the image that killed it is answered for."""

    def __init__(self, question: str, count: int) -> None:
        self._question = question
        self._idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._all: list[subprocess.Popen[str]] = []
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by __exit__)
        self._closed = False
        for process in [self._start() for _ in range(count)]:
            self._idle.put(process)
        if not isinstance(self._ask([]), list):  # no image is to blame
            self._errors.seek(0)
            last = self._errors.read().strip().rpartition("\n")[2]
            self.__exit__()
            raise OSError(f"processes that decode images do not start: {last}")

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        for process in self._all:
            process.kill()
            process.wait()
        self._errors.close()

    def __call__(self, places: list[Place]) -> list[Any]:
        answers = self._ask(places)
        # Either one of them did it, or somebody killed the process: one by one tells.
        return answers if isinstance(answers, list) else [self._alone(place) for place in places]

    def _alone(self, place: Place) -> Any:
        """The answer on an image that may kill the decoder. A process that others kill says nothing of the image."""
        deaths = []
        for pause in (0.0, *PAUSES, 2 * PAUSES[-1]):
            time.sleep(pause)
            answer = self._ask([place])
            if isinstance(answer, list):
                return answer[0]
            deaths.append(answer)
            if sum(status not in OUTSIDE for status in deaths) == 2:
                fault = "kills the decoder"
                return Verdict(0, 0, "", fault) if self._question == "judge" else fault
        if self._question != "judge":
            return None
        named = signal.Signals(-deaths[-1]).name if deaths[-1] < 0 else f"status {deaths[-1]}"
        fault = f"the process that decodes it was ended by {named}: if memory ran out, let less run beside it"
        return Verdict(0, 0, "", fault, passing=True)

    def _ask(self, places: list[Place]) -> list[Any] | int:
        """The answers; the exit status where the process dies of it, or was dead."""
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(places) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # the pipe is broken, or closed
            answer = ""
        if answer.endswith("\n"):
            self._idle.put(process)
            said: list[Any] = json.loads(answer)
            return [Verdict(*verdict) for verdict in said] if self._question == "judge" else said
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)  # its output is closed: it is ending
        process.kill()
        status = process.wait()
        self._idle.put(process if self._closed else self._start())
        return status

    def _start(self) -> subprocess.Popen[str]:
        # -P: the modules beside the script are not to be found under their bare names. A session of its own: an
        # interrupt from the keyboard is this process's to handle. At its end stdin closes, and they stop.
        script = Path(__file__).with_name("decode.py")
        process = subprocess.Popen(
            [sys.executable, "-P", script, json.dumps(Image.MAX_IMAGE_PIXELS), self._question],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )
        self._all.append(process)
        return process
