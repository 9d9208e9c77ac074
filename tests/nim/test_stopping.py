"""SIGTERM and Ctrl-C as requests."""
# ruff: noqa: PT012  # what happens after a signal within the block is what is tested

from __future__ import annotations

import os
import signal
import threading

import pytest

from denim.nim.stopping import Stopped, stop_requests

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def own_handlers():
    """pytest's process may ignore SIGINT, as background jobs of a shell do."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) is signal.default_int_handler
        signal.signal(number, handler)


@BOTH
def test_the_first_signal_is_noted_and_heeded(number):
    with pytest.raises(Stopped, match="come back") as stopped, stop_requests("come back") as stop:
        stop.heed()
        os.kill(os.getpid(), number)
        assert stop
        stop.heed()
        pytest.fail("not heeded")
    assert stopped.value.number == number


@BOTH
def test_the_first_signal_is_answered_on_stderr_by_one_process(number, capfd, monkeypatch):
    for rank, answers in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        said = []
        with pytest.raises(Stopped), stop_requests("come back"):
            said.append(capfd.readouterr().err)
            os.kill(os.getpid(), number)
            said.append(capfd.readouterr().err)
        # Not in the block, where an error after a signal becomes its cause.
        assert said[0] == ""
        assert said[1].count("another signal ends it at once\n") == answers


@BOTH
def test_a_request_that_nobody_heeds_ends_the_work_after_it(number):
    done = []
    with pytest.raises(Stopped), stop_requests("come back"):
        os.kill(os.getpid(), number)
        done.append(1)
    assert done == [1]


@BOTH
def test_the_second_signal_ends_at_once(number):
    with pytest.raises(Stopped), stop_requests("come back"):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), number)
        pytest.fail("the second signal was noted alone")


def test_an_error_after_a_signal_is_named_by_it():
    with pytest.raises(Stopped, match=r"come back \(a worker died\)") as stopped, stop_requests("come back"):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("a worker died")
    assert isinstance(stopped.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="before"), stop_requests("come back"):
        raise RuntimeError("before any signal")


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requests("come back") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_of_the_main_thread_nothing_is_noted():
    done = []

    def work():
        with stop_requests("come back") as stop:
            done.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [False]
