"""What a run says: a line within seconds, then by the clock."""

import io

import pytest
from rich.console import Console

from denim.nim import progress
from denim.nim.progress import ProgressReport


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_come_by_the_clock(clock):
    console = Console(file=io.StringIO(), width=200)
    with ProgressReport(console, "run", done=10, total=1000, batch_size=64) as report:
        for update in range(11, 101):
            clock[0] += 1.0
            if update == 20:
                report.show(0.25, report.rate(update))
            report.tick(update)
    lines = console.file.getvalue().splitlines()
    assert lines == [
        "run: 13/1000  64 images/s  0:16:27 left  0.000833 device-hours",
        "run: 43/1000  loss 0.2500  64 images/s  0:15:57 left  0.00917 device-hours",
        "run: 73/1000  loss 0.2500  64 images/s  0:15:27 left  0.0175 device-hours",
    ]


def test_what_the_model_is_worth_is_shown_and_is_no_time_of_training(clock):
    console = Console(file=io.StringIO(), width=200)
    with ProgressReport(console, "run", done=0, total=100, batch_size=64) as report:
        for update in (1, 2, 3):
            clock[0] += 1.0
            report.tick(update)
        clock[0] += 7.0
        report.show_measured({"accuracy": 0.5, "accuracy_sigma_35": 0.25, "eval_images": 8}, 7.0)
        assert report.rate(3) == 64
        report.show(0.25, 64.0)
        clock[0] += 30.0
        report.tick(4)
    assert (
        console.file.getvalue()
        .splitlines()[-1]
        .startswith("run: 4/100  loss 0.2500  64 images/s  accuracy: 50.00 %  sigma 35: 25.00 %  ")
    )


def test_the_last_update_has_a_line(clock):
    console = Console(file=io.StringIO(), width=200)
    with ProgressReport(console, "[run]", done=0, total=2, batch_size=64, devices=8) as report:
        for seconds in (899.5, 0.5):
            clock[0] += seconds
            report.tick(report.total - (seconds > 1))
    assert console.file.getvalue().splitlines() == [
        "[run]: 1/2",  # the first update, which compiles, tells nothing of the speed of the others
        "[run]: 2/2  128 images/s  in 0:15:00  2 device-hours",
    ]


def test_earlier_parts_of_a_run_count(clock):
    console = Console(file=io.StringIO(), width=200)
    with ProgressReport(console, "run", done=9, total=10, batch_size=64, devices=2, spent=7200.0) as report:
        clock[0] += 1800.0
        assert report.device_seconds() == 10800
        report.tick(10)
    assert console.file.getvalue().endswith("in 0:30:00  3 device-hours\n")


def test_a_run_of_one_update_has_a_line(clock):
    console = Console(file=io.StringIO(), width=200)
    with ProgressReport(console, "run", done=0, total=1, batch_size=64) as report:
        clock[0] += 0.5
        report.tick(1)
    assert console.file.getvalue() == "run: 1/1  128 images/s  in 0:00:00  0.000139 device-hours\n"


def test_a_terminal_has_a_bar_and_no_lines(clock):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with ProgressReport(console, "run", done=0, total=100, batch_size=64) as report:
        clock[0] += 60.0
        report.tick(50)
    assert "50/100" in console.file.getvalue()
    assert "0.0167 device-hours" in console.file.getvalue()
    assert "left" not in console.file.getvalue()
