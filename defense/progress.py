"""What an evaluation says while it works: what is done, what is right so far, and the time that is left."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from denim.nim.progress import LineClock, clock_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["GRADIENT_PASSES", "EvaluationProgress"]

# A gradient is a forward pass and a backward pass, which takes twice as long.
GRADIENT_PASSES = 3


class EvaluationProgress:
    """Progress of an evaluation, which counts records: a bar in a terminal or a notebook, lines by the clock elsewhere.

    The time left is that of the passes that the other records take at most, at the rate of the passes so far. Passes
    that an attack did not need, since images left early, count as made: so the time also goes by how many leave.

    Args:
        console: where it is shown.
        records: that are to be made.
        passes: of one image and one draw through the networks that all takes at most, with images that are attacked
            again.
    """

    def __init__(self, console: Console, records: int, passes: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console, self.records, self.passes = console, records, passes
        self._has_bar = console.is_terminal or console.is_jupyter
        columns = ("{task.description}", BarColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn())
        state = TextColumn("{task.fields[state]}", markup=False)
        self._bar = Progress(*columns, state, console=console, disable=not self._has_bar)
        self._task = self._bar.add_task("evaluating", total=passes, done=f"0/{records}", state="")
        self._started, self._lines = time.perf_counter(), LineClock()
        self._done = self._made = self._open = self._gradients = 0
        self._attack = ("", 1, 1, 0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(f"evaluating: {text}", markup=False, soft_wrap=True)

    def begin(self, what: str, images: int, gradients: int, passes: int) -> None:
        """Begin to attack some images.

        Args:
            what: the rows that are attacked.
            images: how many.
            gradients: of one draw, that this takes at most.
            passes: that these gradients are.
        """
        self._attack, self._gradients, self._open = (what, images, gradients, passes), 0, 0

    def tell(self, gradients: int, misled: int) -> None:
        """Note what the attack has done since the last call; see `Attack.run`."""
        what, images, most, passes = self._attack
        self._gradients += gradients
        # An image that has left takes no further passes.
        share = max(self._gradients / most, misled / images)
        self._open = max(self._open, int(passes * min(share, 1)))
        self._show(f"{misled} of {images} images misled by {self._gradients:,} gradients  {what}")

    def finish(self, records: int, passes: int, state: str) -> None:
        """Note records that are made.

        Args:
            records: how many.
            passes: that their scores took, beside those of the attack that has begun last.
            state: what they say.
        """
        self._done, self._made, self._open = self._done + records, self._made + self._attack[-1] + passes, 0
        self._show(state)

    def close(self, gradients: int) -> None:
        """Say what was done.

        Args:
            gradients: of one draw that were computed.
        """
        self._bar.update(self._task, completed=self.passes, done=f"{self._done}/{self.records}", state="")
        spent = f"  {gradients:,} gradients" if gradients else ""
        self.say(f"{self._done}/{self.records} records{spent}  in {clock_text(time.perf_counter() - self._started)}")

    def _show(self, state: str) -> None:
        made = self._made + self._open
        self._bar.update(self._task, completed=made, done=f"{self._done}/{self.records}", state=state)
        if not self._has_bar and self._lines.due():
            seconds = time.perf_counter() - self._started
            left = f"  {clock_text(seconds * (self.passes / made - 1))} left" if made else ""
            self.say(f"{self._done}/{self.records} records{left}  {state}")
