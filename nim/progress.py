"""What a run says while it works: a bar in a terminal or a notebook, lines by the clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LineClock", "ProgressReport", "clock_text", "measured_texts"]

# Seconds until the first line and between all others, where there is no bar.
FIRST, BETWEEN = 3.0, 30.0


class LineClock:
    """When a line of progress is due: one within seconds, then one at regular times."""

    def __init__(self) -> None:
        self._next = time.perf_counter() + FIRST

    def due(self) -> bool:
        """Whether a line is due now. The next one is counted from it."""
        now = time.perf_counter()
        is_due = now >= self._next
        if is_due:
            self._next = now + BETWEEN
        return is_due


class ProgressReport:
    """Progress of a run that counts updates.

    Args:
        console: where it is shown.
        title: of the run.
        done: updates that were done before.
        total: updates of the whole run.
        batch_size: images of an update.
        devices: that the run takes.
        spent: seconds times devices that earlier parts of the run have taken.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        done: int,
        total: int,
        batch_size: int,
        devices: int = 1,
        spent: float = 0.0,
    ) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.title = title
        self.total = total
        self.batch_size = batch_size
        self.devices = devices
        self.spent = spent
        self._has_bar = console.is_terminal or console.is_jupyter
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not self._has_bar)
        self._task = self._bar.add_task(title, total=total, completed=done, state="")
        self._started = now = time.perf_counter()
        self._began, self._first = now, done
        self._measured, self._since = now, done
        self._lines = LineClock()
        self._state = self._worth = ""
        self._measures = False  # the first update starts workers and compiles: it tells nothing of the others

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a message of the run."""
        self.console.print(text, markup=False, soft_wrap=True)

    def device_seconds(self) -> float:
        """Seconds times devices that the run has taken until now, with its earlier parts."""
        return self.spent + self.devices * (time.perf_counter() - self._started)

    def rate(self, update: int) -> float:
        """Images per second since the last call."""
        now = time.perf_counter()
        rate = (update - self._since) * self.batch_size / (now - self._measured)
        self._measured, self._since = now, update
        return rate

    def show(self, loss: float, rate: float) -> None:
        """Take the numbers of a line of metrics, which are shown from now on."""
        self._state = f"loss {loss:.4f}  {rate:,.0f} images/s"

    def show_measured(self, numbers: Mapping[str, float], seconds: float) -> None:
        """Take what the model was measured to be worth, which is shown from now on.

        Args:
            numbers: by name, see `measured_texts`.
            seconds: that it took; they are no time of training for `rate`.
        """
        self._measured += seconds
        self._worth = "".join(f"  {name}: {text}" for name, text in measured_texts(numbers).items())

    def tick(self, update: int) -> None:
        """Note an update that is done. A line is due by the clock, and for the last update."""
        cost = f"{self.device_seconds() / 3600:.3g} device-hours"
        self._bar.update(self._task, completed=update, state=f"{self._state}{self._worth}  {cost}")
        now, last = time.perf_counter(), update == self.total
        if last or (not self._has_bar and self._lines.due()):
            seconds = (now - self._began) / max(1, update - self._first)
            words = [f"{self.title}: {update}/{self.total}"]
            if self._state or self._measures or last:
                words.append((self._state or f"{self.batch_size / seconds:,.0f} images/s") + self._worth)
            if last:
                words += [f"in {clock_text(now - self._started)}", cost]
            elif self._measures:
                words += [f"{clock_text(seconds * (self.total - update))} left", cost]
            self.say("  ".join(words))
        if not self._measures:
            self._measures, self._began, self._first = True, now, update


def measured_texts(numbers: Mapping[str, object]) -> dict[str, str]:
    """What models are worth, for people: texts by "accuracy" (undefended) and "sigma 35" (PSNR, or accuracy defended).

    Args:
        numbers: by name: "accuracy", "accuracy_sigma_35" (shares) and "psnr_sigma_35" (dB); others are left out.
    """
    texts = {}
    for name, value in numbers.items():
        kind, _, level = name.partition("_sigma_")
        if kind in ("accuracy", "psnr") and isinstance(value, float):
            texts[f"sigma {level}" if level else kind] = f"{value:.2f} dB" if kind == "psnr" else f"{100 * value:.2f} %"
    return texts


def clock_text(seconds: float) -> str:
    """A duration as hours, minutes and seconds, such as "0:16:27"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
