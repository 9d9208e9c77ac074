"""What only execution counts: sectors, bank conflicts, divergence, and bytes behind ideal caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from denim.benchmarks.machine_code import run_on_cpu
from denim.benchmarks.machine_code.ptx.counts import Counts

triton = pytest.importorskip("triton", reason="Triton is a dependency on Linux x86-64 alone")
tl = pytest.importorskip("triton.language")

LANES = np.arange(64)
BASE = 1 << 40


@triton.jit
def gather(x, out, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i * stride))


@triton.jit
def turned(x, out, SIZE: tl.constexpr):
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tl.store(out + i * SIZE + j, tl.trans(tl.load(x + i * SIZE + j)))


@pytest.mark.parametrize(
    ("address", "size", "sectors", "least"),
    [
        (LANES * 4, 4, 8, 8),
        (LANES * 16, 16, 32, 32),
        (LANES * 4 + 4, 4, 10, 8),  # each warp begins in the middle of a sector
        (LANES * 32, 4, 64, 8),  # a word of each sector
        (LANES * 0, 4, 2, 2),  # one word for all: a sector of each warp
        (LANES % 8, 1, 2, 2),
    ],
)
def test_sectors_of_two_warps(address, size, sectors, least):
    counts = Counts()
    counts.global_access("load", BASE + address, size, LANES)
    loads = counts.loads
    assert (loads.requests, loads.sectors, loads.least) == (2, sectors, least)
    assert counts.stores.requests == 0
    # The bytes behind ideal caches: however often, and once more for what is written.
    distinct = len(set((address // 32).tolist()))
    counts.global_access("load", BASE + address, size, LANES)
    assert counts.memory_bytes == 32 * distinct
    counts.global_access("store", BASE + address, size, LANES)
    assert counts.memory_bytes == 64 * distinct


def test_lanes_that_do_not_execute_are_no_part_of_a_request():
    counts = Counts()
    counts.global_access("store", BASE + 4 * np.arange(4), 4, np.array([0, 1, 2, 40]))
    assert (counts.stores.requests, counts.stores.sectors, counts.stores.least) == (2, 2, 2)


@pytest.mark.parametrize(
    ("address", "size", "passes", "conflicts"),
    [
        (LANES * 4, 4, 2, 0),
        (LANES * 0, 4, 2, 0),  # one word for all
        (LANES // 2 * 2, 2, 2, 0),
        (LANES * 8, 4, 4, 2),  # two words of a bank, in each warp
        (LANES * 128, 4, 64, 62),  # all of one bank
        (LANES * 8, 8, 4, 0),  # halves of a warp, one after the other
        (LANES * 16, 16, 8, 0),
        (LANES * 32, 16, 16, 8),  # quarters, whose eight lanes need two passes
    ],
)
def test_passes_of_two_warps_through_shared_memory(address, size, passes, conflicts):
    counts = Counts()
    counts.shared_access(address, size, LANES)
    assert (counts.shared_requests, counts.shared_passes, counts.bank_conflicts) == (2, passes, conflicts)


def test_a_copy_needs_the_least_and_a_gather_does_not():
    x, out = torch.randn(8192), torch.empty(1024)
    launched = []
    for stride in (1, 8):
        with run_on_cpu(count=True) as launches:
            gather[(4,)](x, out, stride, BLOCK=256)
        assert torch.equal(out, x[: 1024 * stride : stride])
        launched.append(launches[0].counts)
    copied, gathered = launched
    for counts in launched:
        assert counts.stores.sectors == counts.stores.least == counts.stores.distinct == 1024 * 4 // 32
        assert counts.lanes == 1
        assert (counts.shared_requests, counts.bank_conflicts) == (0, 0)
    assert copied.loads.sectors == copied.loads.least == 128
    assert copied.memory_bytes == 2 * 1024 * 4
    assert gathered.loads.sectors == 1024 == 8 * gathered.loads.least
    assert gathered.memory_bytes == 9 * 1024 * 4


def test_shared_memory_is_counted_where_a_kernel_goes_through_it():
    x, out = torch.randn(32, 32), torch.empty(32, 32)
    with run_on_cpu(count=True) as launches:
        turned[(1,)](x, out, SIZE=32)
    assert torch.equal(out, x.T)
    assert launches[0].counts.shared_requests > 0


def test_nothing_is_counted_unless_it_is_asked_for():
    with run_on_cpu() as launches:
        gather[(1,)](torch.randn(64), torch.empty(64), 1, BLOCK=64)
    assert launches[0].counts is None


def test_both_sides_of_a_branch_count_where_a_warp_diverges(execute):
    """Even threads go one way, and odd ones another; then they meet."""
    even = "\tand.b32 %r6, %r1, 1;\n\tsetp.eq.b32 %p1, %r6, 0;\n"
    body = "\t@%p1 bra $E;\n\tmov.b32 %r5, 1;\n\tmov.b32 %r5, 2;\n\tbra.uni $J;\n$E:\n\tmov.b32 %r5, 3;\n$J:\n"
    store = "\tst.global.b32 [%rd5], %r5;\n"
    execute(even + body + store, count=True)
    counts = execute.machine.counts
    # Around the branches: six of the fixture, three of the test and the branch, the store and the return; in two warps.
    together = 6 + 2 + 1 + 2
    assert counts.warp_instructions == 2 * (together + 3 + 1)
    assert counts.thread_instructions == 64 * together + 32 * 3 + 32
    assert counts.lanes == pytest.approx((together + 2) / (together + 4))
