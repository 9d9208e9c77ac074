"""What execution counts of the compared kernels and of what a user would run without them."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

WHERE = "Triton is a dependency on Linux x86-64 alone"
pytest.importorskip("triton", reason=WHERE)
executed = pytest.importorskip("denim.benchmarks.machine_code.executed", reason=WHERE)
inductor = pytest.importorskip("denim.benchmarks.machine_code.inductor", reason=WHERE)
counts = pytest.importorskip("denim.benchmarks.machine_code.ptx.counts", reason=WHERE)

PIXELS = 3 * 224 * 224
TITLES = ("Baselines", "Executed")
PAGE = Path(__file__).parents[3] / "docs" / "kernels-tables.md"


def test_launches_are_summed():
    first, second = (counts.Counts(warp_instructions=n, thread_instructions=32 * n - 64) for n in (10, 30))
    lanes = np.arange(32)
    first.global_access("load", (1 << 40) + 64 * lanes, 4, lanes)
    second.global_access("load", (1 << 40) + 4 * lanes, 4, lanes)
    second.shared_access(8 * lanes, 4, lanes)
    got = executed.summary([first, second], 64)
    assert got == {
        "kernels": 2,
        "instructions": 32 * 40 / 64,
        "lanes": (32 * 40 - 128) / (32 * 40),
        "loads": (32 + 4) / (4 + 4),
        "stores": None,
        "conflicts": 1.0,
        "memory": 32 * (32 + 4),
        "launches": [
            {"warp_instructions": 10, "memory": 32 * 32, "sectors": 32, "bytes": 128, "passes": 0},
            {"warp_instructions": 30, "memory": 32 * 4, "sectors": 4, "bytes": 128, "passes": 2},
        ],
    }


def test_bounds_follow_from_execution_where_the_same_kernels_ran():
    slow = counts.Counts(warp_instructions=8)
    slow.global_access("load", (1 << 40) + 32 * np.arange(1 << 20), 4, np.arange(1 << 20))
    one = executed.summary([slow], 1)
    limits = {"memory": 1.0, "issue": 20.0, "multiply": 0.0, "integer": 0.0, "special": 0.0, "binds": "issue"}
    kinds = {
        "fused": {"kernels": 1, "rooflines": [limits], "bound": 20.0},
        "naive": {"kernels": 2, "rooflines": [limits, limits], "bound": 40.0},
        "compiled": {"kernels": 1, "rooflines": [limits], "bound": 20.0},
        "eager": {"kernels": 9, "moved": 1e6},
    }
    table = {"a": {"forward": kinds}, "b": {"forward": {"fused": kinds["fused"]}}}
    ran = {"a": {"forward": {"fused": one, "naive": one, "compiled": "Race: two threads write"}}}
    got = executed.bounds(table, ran)
    fused, naive, compiled = (got["a"]["forward"][kind] for kind in ("fused", "naive", "compiled"))
    # 2^20 sectors of 32 bytes at 3.35 TB/s; the eight instructions take no time beside that.
    assert fused["bound"] == fused["rooflines"][0]["memory"] == pytest.approx(2**25 / 3.35e6)
    assert fused["counted"] == "execution"
    for numbers, name in ((naive, "naive"), (compiled, "compiled"), (got["b"]["forward"]["fused"], "fused")):
        assert numbers == kinds[name] | {"counted": "code"}
    assert got["a"]["forward"]["eager"] == kinds["eager"]


@pytest.fixture
def run_in_process():
    """Calls a function in a process of its own: this one's Triton is not told of a GPU."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        yield lambda function, *given: pool.submit(function, *given).result()


def test_an_attack_step_and_its_baseline_move_the_same_sectors(run_in_process):
    (kinds,) = run_in_process(executed._execute, "attack_step, fp32").values()
    assert set(kinds) == {"fused"} | ({"compiled"} if inductor.unavailable() is None else set())
    for numbers in kinds.values():
        assert numbers["kernels"] == numbers["lanes"] == numbers["loads"] == numbers["stores"] == 1
        # Pixels, origin and gradient in, pixels out; step size and radius, each a sector.
        assert 4 * PIXELS * 4 <= numbers["memory"] <= 4 * PIXELS * 4 + 4 * 32
        assert 15 < numbers["instructions"] < 30


def test_noise_and_the_naive_kernel(run_in_process):
    (kinds,) = run_in_process(executed._execute, "noise_patchify, uint8, patch 16, bf16").values()
    for kind in ("fused", "naive"):
        assert PIXELS * 3 <= kinds[kind]["memory"] <= PIXELS * 3 + 8 * 32
    assert kinds["fused"]["lanes"] == 1 > kinds["naive"]["lanes"]  # sine and cosine have a slow path
    assert kinds["naive"]["instructions"] > 3 * kinds["fused"]["instructions"]
    if inductor.unavailable() is None:
        # The noise is written and read as float32.
        assert kinds["compiled"]["memory"] == pytest.approx(PIXELS * (3 + 8), rel=0.01)


def test_the_page_has_a_row_of_every_case():
    baselines, rows = (PAGE.read_text().split(f"### {title}, H100")[1].split("###")[0] for title in TITLES)
    for case in executed.CASES_EXECUTED:
        assert f"| {case.operation}, {case.name} | forward | fused | " in rows
    bounds = [line.split(" | ") for line in baselines.splitlines() if " | fused | " in line]
    assert len(bounds) >= len(inductor.COMPARED)
    assert {cells[-2] for cells in bounds} == {"execution"}
