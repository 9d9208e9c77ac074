"""The choice of a configuration, with a simulated timer and device."""

import pytest
import torch

from denim.kernels import tuning

GPU = torch.device("cuda", 0)
TIMES = {"first": 3.0, "second": 1.0, "third": 2.0}


class Launches(list):
    """The list of launches, and a timer that launches twice and takes its answer from TIMES."""

    def __init__(self):
        self.timed = 0

    def milliseconds(self, run):
        self.timed += 1
        run()
        run()
        return TIMES[self[-1]]

    def run(self, *, key=("kernel",), elements=1000, configurations=tuple(TIMES), device=GPU):
        before = len(self)
        tuning.run_tuned(key, elements, configurations, self.append, device, milliseconds=self.milliseconds)
        return self[before:]


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("DENIM_AUTOTUNE", raising=False)
    tuning.autotune.cache_clear()
    yield Launches()
    tuning.autotune.cache_clear()


def test_fastest_is_measured_once_and_stays(launches):
    assert launches.run() == ["first"] * 2 + ["second"] * 2 + ["third"] * 2 + ["second"]
    assert launches.run() == ["second"]
    assert launches.timed == 3


def test_every_key_device_and_power_of_two_is_measured_on_its_own(launches):
    calls = (
        {},
        {"key": ("kernel", torch.bfloat16)},
        {"device": torch.device("cuda", 1)},
        {"elements": 1024},
        {"elements": 100},
    )
    for count, call in enumerate(calls, start=1):
        assert launches.run(**call)[-1] == "second"
        assert launches.timed == 3 * count
    # A smaller last batch of an epoch does not measure again.
    assert launches.run(elements=513) == ["second"]


def test_first_of_equals(launches, monkeypatch):
    monkeypatch.setitem(TIMES, "second", 3.0)
    monkeypatch.setitem(TIMES, "third", 3.0)
    assert launches.run()[-1] == "first"


def test_nothing_is_measured_during_a_capture(launches, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launches.run() == ["first"]
    # A capture chooses nothing. The next call outside measures, and a capture after it uses the result.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert launches.run()[-1] == "second"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launches.run() == ["second"]
    assert launches.timed == 3


def test_switch_takes_the_first(launches, monkeypatch):
    monkeypatch.setenv("DENIM_AUTOTUNE", "0")
    assert launches.run() == ["first"]
    assert launches.timed == 0


def test_switch_measures(launches, monkeypatch):
    monkeypatch.setenv("DENIM_AUTOTUNE", "1")
    assert launches.run()[-1] == "second"


@pytest.mark.parametrize("value", ["yes", "", "2"])
def test_any_other_value_is_refused_before_a_launch(launches, monkeypatch, value):
    monkeypatch.setenv("DENIM_AUTOTUNE", value)
    with pytest.raises(ValueError, match=f"DENIM_AUTOTUNE is '{value}'; expected 1"):
        launches.run()
    assert not launches


def test_nothing_is_measured_without_a_choice_or_a_gpu(launches):
    assert launches.run(configurations=("third",)) == ["third"]
    assert launches.run(device=torch.device("cpu")) == ["first"]
    assert launches.timed == 0


def test_a_failed_measurement_is_no_choice(launches, monkeypatch):
    monkeypatch.delitem(TIMES, "third")
    with pytest.raises(KeyError):
        launches.run(configurations=("first", "third"))
    monkeypatch.setitem(TIMES, "third", 1.0)
    assert launches.run(configurations=("first", "third"))[-1] == "third"
