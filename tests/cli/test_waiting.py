"""How OpenMP's threads wait: chosen from what other processes do."""

import os
import sys

import pytest

from denim.cli import waiting

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def stat(tmp_path, monkeypatch):
    """Writes what the system says about its cores: seconds in use so far, by all processes."""
    monkeypatch.setattr(waiting, "STAT", tmp_path / "stat")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for name in (*waiting.CHOSEN, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr("time.sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))

    def write(used):
        own = sum(os.times()[:2])
        user = round((used + own) * TICKS)
        waiting.STAT.write_text(f"cpu  {user} 0 0 {round(99 * TICKS)} 7 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n")

    write(5)
    return write


def chosen(others):
    waiting.choose_waiting(others)
    return os.environ.pop("OMP_WAIT_POLICY", None)


@pytest.mark.parametrize(("cores", "policy"), [(0, None), (0.3, None), (0.7, "PASSIVE"), (2, "PASSIVE")])
def test_threads_sleep_where_others_need_the_cores(stat, cores, policy):
    others = waiting.Others()
    stat(5 + cores * waiting.SECONDS)
    assert others.cores() == pytest.approx(cores, abs=0.15)  # ticks of 10 ms in 100 ms
    assert chosen(others) == policy


def test_one_thread_waits_for_nobody(stat, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    others = waiting.Others()
    stat(6)
    assert chosen(others) is None


@pytest.mark.parametrize("name", sorted(waiting.CHOSEN))
def test_what_the_user_has_chosen_stays(stat, monkeypatch, name):
    monkeypatch.setenv(name, "ACTIVE")
    others = waiting.Others()
    stat(6)
    waiting.choose_waiting(others)
    assert {key: os.environ[key] for key in waiting.CHOSEN & os.environ.keys()} == {name: "ACTIVE"}


def test_after_torch_it_is_too_late(stat, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", object())
    others = waiting.Others()
    stat(6)
    assert chosen(others) is None


@pytest.mark.parametrize("text", ["", "cpu\n", "cpu  one 2 3 4 5 6 7 8\n"])
def test_a_system_that_says_nothing_is_no_failure(stat, text):
    waiting.STAT.write_text(text)
    others = waiting.Others()
    assert others.cores() is None
    assert chosen(others) is None
    waiting.STAT.unlink()
    assert waiting.Others().cores() is None
