"""The timer of the benchmarks, on a CPU."""

from __future__ import annotations

import pytest
import torch

from denim.benchmarks import timing

CPU = torch.device("cpu")


def test_peak_memory_is_the_most_at_one_time():
    data = torch.zeros(1000, 1000)

    def megabytes(function):  # torch turns the numbers 1 to 4 into tensors too, of a few bytes
        return round(timing.peak_memory(function, CPU) / 1e6, 3)

    assert megabytes(lambda: data + 1) == 4
    assert megabytes(lambda: [data + 1 for _ in range(3)]) == 12
    # Each goes before the next one but one comes.
    assert megabytes(lambda: data.add(1).mul(2).add(3).mul(4)) == 8


def test_measure_takes_turns():
    calls = []
    times = timing.measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, least=3)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_measure_goes_on_until_the_time_is_up():
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: now[0])
        times = timing.measure({"a": lambda: sleep(0.25), "b": lambda: sleep(0.5)}, CPU, seconds=2.0, least=1)
    # A round takes 0.75: the third begins at 1.5, a fourth would begin at 2.25.
    assert times == {"a": [0.25] * 3, "b": [0.5] * 3}


def test_the_best_of_ten_calls_leaves_out_the_first():
    durations = iter([0.1, *[3.0] * 9, 2.0])
    now = [0.0]

    def call():
        now[0] += next(durations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: now[0])
        assert timing.best_seconds(call, CPU) == pytest.approx(2.0)
    assert next(durations, None) is None


def test_environment_names_what_times_depend_on():
    found = timing.environment(CPU)
    assert found["device"].startswith("cpu: ")
    assert (found["torch"], found["threads"]) == (torch.__version__, torch.get_num_threads())
