"""The cases of `denim bench kernels` for pytest-benchmark: the providers of one case are one group, and are ranked.

The fused operation is checked first. `extra_info` of each record holds the batch, the shapes, and the bytes that must
be moved at least. On a GPU a time is that of a call with its launches; `denim bench kernels` times the device alone.
"""

import functools

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


@pytest.fixture(scope="module")
def prepare():
    """`bench.prepare`, which remembers the last case: its providers follow each other."""
    return functools.lru_cache(maxsize=1)(bench.prepare)


@pytest.mark.parametrize("provider", ["fused", "chain", "compiled", "naive"])
@pytest.mark.parametrize("case", bench.BENCHMARKS, ids=lambda case: case.name)
def test_case(benchmark, prepare, case, provider):
    benchmark.group = case.name
    if provider == "naive" and DEVICE.type == "cpu":
        pytest.skip("runs on a GPU alone")
    if provider == "compiled" and benchmark.disabled:
        pytest.skip("takes many seconds to compile")
    providers, error = prepare(case, DEVICE, 1 if benchmark.disabled else None)
    function = getattr(providers, provider)
    if function is None:
        pytest.skip(f"there is no {provider} kernel for this case")

    def call():
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info |= timing.environment(DEVICE) | {
        "batch": providers.batch,
        "shape": providers.shape,
        "minimum_bytes": providers.minimum,
        "error": error,
    }
