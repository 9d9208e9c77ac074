"""The timer of the benchmarks: on a CPU, and on a GPU whose host and device are played."""

from __future__ import annotations

import contextlib
import types

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
    assert {name: len(taken.seconds) for name, taken in times.items()} == {"a": 3, "b": 3}
    assert {taken.method for taken in times.values()} == {timing.WALL}


def test_measure_goes_on_until_the_time_is_up():
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "perf_counter", lambda: now[0])
        times = timing.measure({"a": lambda: sleep(0.25), "b": lambda: sleep(0.5)}, CPU, seconds=2.0, least=1)
    # A round takes 0.75: the third begins at 1.5, a fourth would begin at 2.25.
    assert {name: taken.seconds for name, taken in times.items()} == {"a": [0.25] * 3, "b": [0.5] * 3}


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


class Machine:
    """A host that enqueues and a GPU that works in order, each with a clock of its own (seconds)."""

    def __init__(self, cache=50_000_000):
        self.cache = cache
        self.host = self.device = 0.0
        self.written, self.chosen = [], []

    def launch(self, work, host=0.0):
        self.host += host
        self.device = max(self.device, self.host) + work

    def wait(self):
        self.host = max(self.host, self.device)

    def install(self, patch):
        machine = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                assert stream == "stream of cuda:1"
                machine.launch(0)
                self.at = machine.device

            def query(self):
                return machine.host >= self.at

            def synchronize(self):
                machine.host = max(machine.host, self.at)

            def elapsed_time(self, other):
                return (other.at - self.at) * 1000

        class Buffer:
            def zero_(self):
                machine.launch(1e-4)
                machine.written.append(self)

        def empty(size, dtype, device):
            assert (size, dtype, str(device)) == (max(2**28, 2 * machine.cache), torch.uint8, "cuda:1")
            return Buffer()

        @contextlib.contextmanager
        def chosen(device):
            machine.chosen.append(str(device))
            yield

        for name, fake in {
            "Event": Event,
            "_sleep": lambda cycles: machine.launch(cycles / 2e9),
            "current_stream": lambda device: f"stream of {device}",
            "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=machine.cache),
            "device": chosen,
            "synchronize": lambda device: machine.wait(),
        }.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(timing.torch, "empty", empty)
        patch.setattr(timing.time, "perf_counter", lambda: machine.host)


GPU = torch.device("cuda", 1)


@pytest.mark.parametrize("host", [3e-4, 2e-2])
def test_a_gpu_is_timed_without_the_host(monkeypatch, host):
    """Python takes longer for a call than the device works on it, also longer than the first delay."""
    machine = Machine()
    machine.install(monkeypatch)

    def call():  # three kernels, between which the host is busy
        for _ in range(3):
            machine.launch(3e-5, host / 3)

    times = timing.measure({"a": call, "b": lambda: machine.launch(2e-5, 1e-5)}, GPU, least=4)
    assert times["a"].seconds == pytest.approx([9e-5] * 4)
    assert times["b"].seconds == pytest.approx([2e-5] * 4)
    assert {taken.method for taken in times.values()} == {timing.DEVICE}
    assert machine.chosen == ["cuda:1"]
    assert machine.written == []
    assert timing.best_seconds(call, GPU) == pytest.approx(9e-5)


@pytest.mark.parametrize("cache", [50_000_000, 200_000_000])
def test_a_cold_cache_is_overwritten_before_every_call_and_not_timed(monkeypatch, cache):
    machine = Machine(cache)
    machine.install(monkeypatch)
    calls = []
    functions = {name: lambda: calls.append(machine.launch(2e-5, 1e-5)) for name in "ab"}
    times = timing.measure(functions, GPU, least=3, cold=True)
    assert len(machine.written) == len(calls) == 6
    assert times["b"].seconds == pytest.approx([2e-5] * 3)
    with pytest.raises(ValueError, match="L2 cache of a GPU"):
        timing.measure(functions, CPU, cold=True)


def test_a_call_that_waits_for_the_device_is_told_from_others(monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)

    def call():  # as `tensor.item()` in the middle
        machine.launch(2e-5, 1e-5)
        machine.wait()
        machine.launch(2e-5, 1e-4)

    times = timing.measure({"a": call, "b": lambda: machine.launch(2e-5)}, GPU, least=3)
    assert times["a"].method == timing.HOST
    assert times["a"].seconds == pytest.approx([2e-5 + 1e-4 + 2e-5] * 3)
    assert times["b"].method == timing.DEVICE
    # The longest delay is found once, not in every call.
    assert machine.host < 10 * timing.LONGEST


@pytest.mark.parametrize(("host", "work"), [(1e-3, 5e-3), (5e-3, 1e-3)])
def test_steps_take_what_is_slower_of_host_and_device(monkeypatch, host, work):
    machine = Machine()
    machine.install(monkeypatch)
    times = timing.step_seconds(lambda: machine.launch(work, host), GPU, 5)
    assert times[1:] == pytest.approx([5e-3] * 4)
    assert len(times) == 5
    assert len(timing.step_seconds(lambda: None, CPU, 3)) == 3
