"""What an evaluation says: what is right so far, and the time left by passes and not by records."""

import io

import pytest
from rich.console import Console

from denim.defense.progress import EvaluationProgress
from denim.nim import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_the_time_left_is_that_of_the_passes(clock):
    console = Console(file=io.StringIO(), width=200)
    with EvaluationProgress(console, records=40, passes=4000) as report:
        clock[0] += 10.0
        report.finish(20, 100, "A under none")
        report.begin("A under [pgd]", images=20, gradients=1000, passes=3900)
        clock[0] += 30.0
        report.tell(90, 0)
        report.tell(10, 0)
        clock[0] += 30.0
        report.tell(100, 10)  # half of them take no further gradients
        clock[0] += 30.0
        report.finish(20, 0, "A 50.0 % right so far under [pgd]")
        report.close(1234)
    assert console.file.getvalue().splitlines() == [
        "evaluating: 20/40 records  0:06:30 left  A under none",
        # 90 of 1,000 gradients: 100 + 351 of 4,000 passes in 40 s. The next call comes within the same second.
        "evaluating: 20/40 records  0:05:15 left  0 of 20 images misled by 90 gradients  A under [pgd]",
        "evaluating: 20/40 records  0:01:07 left  10 of 20 images misled by 200 gradients  A under [pgd]",
        "evaluating: 40/40 records  0:00:00 left  A 50.0 % right so far under [pgd]",
        "evaluating: 40/40 records  1,234 gradients  in 0:01:40",
    ]


def test_a_bar_says_the_same_in_a_terminal(clock):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, force_interactive=True)
    with EvaluationProgress(console, records=40, passes=4000) as report:
        report.begin("A under [pgd]", images=20, gradients=1000, passes=3900)
        clock[0] += 100.0
        report.tell(100, 5)
    shown = console.file.getvalue()
    assert "0/40" in shown
    assert "5 of 20 images misled by 100 gradients  A under [pgd]" in shown
