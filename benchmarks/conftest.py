import time

import pytest

ROUNDS = 10


@pytest.fixture(scope="session")
def best_seconds():
    """Best of ROUNDS after a first call: other work on the machine only ever adds time."""

    def measure(function) -> float:
        function()
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    return measure
