"""SIGTERM and Ctrl-C as requests, which long work heeds where nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from denim.nim.ranks import is_first_process

__all__ = ["StopRequest", "Stopped", "leave_signals_to_parent", "stop_requests"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTED = b"\ndenim: what is running is finished first; another signal ends it at once\n"


class Stopped(KeyboardInterrupt):
    """A signal has ended the work, at a place where nothing is lost.

    Args:
        number: of the signal.
        message: what there is and how to go on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """Whether a signal has asked for the end.

    Args:
        message: what there is and how to go on, for `Stopped`.

    Attributes:
        number: of the signal; 0 while there was none.
    """

    def __init__(self, message: str) -> None:
        self.message, self.number = message, 0

    def __bool__(self) -> bool:
        return self.number != 0

    def heed(self) -> None:
        """End the work if that was asked for.

        Raises:
            Stopped: with the signal and the message.
        """
        if self.number:
            raise Stopped(self.number, self.message)


@contextlib.contextmanager
def stop_requests(message: str) -> Iterator[StopRequest]:
    """Inside, the first SIGTERM or Ctrl-C is noted, which a line on stderr says, and the second raises at once.

    An exception could be swallowed where a library calls Python, or strike in the middle of an update. Whoever works
    inside calls `StopRequest.heed` where nothing is lost; a request that nobody has heeded ends the work at the end of
    the block. Outside of the main thread Python handles no signals: there nothing is noted. Signals that the process
    ignores stay ignored.

    Args:
        message: what there is and how to go on, for `Stopped`.

    Raises:
        Stopped: see above. An error that came after the request (a signal to a group of processes also ends the workers
            that load images) is its cause, and is named.
    """
    request = StopRequest(message)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if request:
            raise Stopped(number, message)
        request.number = number
        if is_first_process():
            # Not by `print`: the signal may have interrupted somebody who holds its lock.
            with contextlib.suppress(OSError):
                os.write(2, NOTED)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, note)
    try:
        try:
            yield request
        except Exception as error:
            if request:
                raise Stopped(request.number, f"{message} ({error})") from error
            raise
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
    request.heed()


def leave_signals_to_parent(worker: int) -> None:
    """Let a process that loads images outlive a signal to the whole group, since the running update needs its images.

    Ctrl-C and the signals of job schedulers reach every process of a group. The worker ends with its parent, as torch's
    workers do, or at the second SIGTERM.

    Args:
        worker: its number; torch's `worker_init_fn` is called with it.
    """
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            os._exit(128 + number)
        seen.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, note)
