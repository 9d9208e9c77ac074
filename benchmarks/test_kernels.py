"""The cases of `denim bench kernels`: fused operations against their chains, eager and compiled, in one process.

Checked first, then timed. `extra_info` of each record holds how many times as long the chains take, peak memory, and
the bytes that must be moved at least.
"""

import dataclasses

import pytest
import torch

from denim.benchmarks import kernels as bench
from denim.benchmarks import timing

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 10


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Chains draw from the global generator, and are compiled more often than torch expects of a function."""
    with bench.chains_may_run(DEVICE):
        yield


@pytest.mark.parametrize("case", bench.BENCHMARKS, ids=lambda case: case.name)
def test_case(benchmark, case):
    providers, _ = bench.prepare(case, DEVICE, 1 if benchmark.disabled else None)

    def fused():
        providers.fused()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(fused, rounds=ROUNDS, warmup_rounds=1)
    if not benchmark.disabled:
        benchmark.extra_info |= dataclasses.asdict(bench.compare(case, DEVICE)) | timing.environment(DEVICE)
