"""The memories and their checks, one access at a time."""

from __future__ import annotations

import numpy as np
import pytest

from denim.benchmarks.machine_code.ptx.memory import PROGRAM, Buffer, GlobalMemory, LocalMemory, SharedMemory
from denim.benchmarks.machine_code.ptx.traps import Misaligned, OutOfBounds, Race, StoredTwice


def numbers(*values):
    return np.array(values, np.int64)


@pytest.fixture
def word():
    """A buffer of 64 bytes, all different."""
    data = np.arange(128, dtype=np.uint8)
    start = -data.ctypes.data % 64  # aligned, so that offsets tell alignment
    return data[start : start + 64]


def memory_of(*arrays):
    return GlobalMemory([Buffer(a.ctypes.data, a.nbytes, f"tensor {k}") for k, a in enumerate(arrays)])


def test_loads_take_bytes_of_every_buffer(word):
    other = np.full(8, 200, np.uint8)
    memory = memory_of(word, other)
    address = numbers(word.ctypes.data + 4, other.ctypes.data, word.ctypes.data + 60)
    got = memory.load(address, 4, numbers(0, 1, 2), numbers(0, 0, 0))
    assert got.tolist() == [word[4:8].tolist(), [200] * 4, word[60:64].tolist()]


@pytest.mark.parametrize("offset", [-4, 61, 64, 1 << 40])
def test_loads_outside_are_trapped(word, offset):
    with pytest.raises(OutOfBounds, match=r"tensor 0|at 0x") as trap:
        memory_of(word).load(numbers(word.ctypes.data, word.ctypes.data + offset), 4, numbers(0, 1), numbers(0, 0))
    assert list(trap.value.lanes) == [1]


def test_the_bytes_behind_a_buffer_are_outside_even_if_memory_goes_on(word):
    memory = memory_of(word[:30])
    memory.load(numbers(word.ctypes.data + 28), 2, numbers(0), numbers(0))
    with pytest.raises(OutOfBounds, match="tensor 0 \\+ 28, which has 30"):
        memory.load(numbers(word.ctypes.data + 28), 4, numbers(0), numbers(0))


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_misaligned_accesses_are_trapped(word, size):
    memory = memory_of(word)
    memory.load(numbers(word.ctypes.data + size), size, numbers(0), numbers(0))
    with pytest.raises(Misaligned, match=f"not a multiple of {size}"):
        memory.load(numbers(word.ctypes.data + size // 2), size, numbers(0), numbers(0))


def test_overlapping_buffers_are_one(word):
    memory = memory_of(word[:40], word[20:], word[:8])
    assert [buffer.size for buffer in memory.buffers] == [64]
    assert memory.load(numbers(word.ctypes.data + 36), 4, numbers(0), numbers(0)).tolist() == [word[36:40].tolist()]


def store(memory, array, *accesses):
    """Stores of four bytes, each an instruction: (offset, thread, barriers passed)."""
    for offset, thread, barriers in accesses:
        data = np.full((1, 4), thread % 256, np.uint8)
        memory.store(numbers(array.ctypes.data + offset), data, numbers(thread), numbers(barriers))


def test_stores_change_their_bytes_alone(word):
    before = word.tolist()
    store(memory_of(word), word, (4, 77, 0))
    assert word[:12].tolist() == [*before[:4], 77, 77, 77, 77, *before[8:12]]


@pytest.mark.parametrize("second", [1, PROGRAM])  # of the same program, and of another
def test_bytes_stored_by_two_threads_are_trapped(word, second):
    memory = memory_of(word)
    store(memory, word, (0, 0, 0), (4, second, 0), (0, 0, 0))  # a thread may store again
    with pytest.raises(StoredTwice, match="tensor 0"):
        store(memory, word, (0, second, 1))


def test_bytes_stored_by_two_lanes_of_one_instruction_are_trapped(word):
    memory, data = memory_of(word), np.zeros((2, 4), np.uint8)
    memory.store(numbers(word.ctypes.data, word.ctypes.data + 4), data, numbers(0, 1), numbers(0, 0))
    with pytest.raises(StoredTwice):
        memory.store(numbers(word.ctypes.data + 8, word.ctypes.data + 8), data, numbers(0, 1), numbers(0, 0))


def test_a_wide_store_over_part_of_another_is_trapped(word):
    memory = memory_of(word)
    store(memory, word, (4, 0, 0))
    with pytest.raises(StoredTwice):
        memory.store(numbers(word.ctypes.data), np.zeros((1, 8), np.uint8), numbers(1), numbers(0))


@pytest.mark.parametrize(
    ("reader", "barriers", "races"),
    [(0, 0, False), (1, 0, True), (1, 1, False), (PROGRAM, 0, True), (PROGRAM, 9, True)],
)
def test_loads_of_what_another_thread_stored_need_a_barrier_of_the_program(word, reader, barriers, races):
    memory = memory_of(word)
    store(memory, word, (0, 0, 0))
    load = lambda offset: memory.load(numbers(word.ctypes.data + offset), 4, numbers(reader), numbers(barriers))  # noqa: E731
    load(4)
    if races:
        with pytest.raises(Race, match="tensor 0"):
            load(0)
    else:
        assert load(0).tolist() == [[0, 0, 0, 0]]


def test_local_memory_is_each_threads_own():
    memory = LocalMemory(3, 24)
    memory.store(numbers(0, 2), numbers(8, 8), np.array([[1, 1, 1, 1], [2, 2, 2, 2]], np.uint8))
    assert memory.load(numbers(0, 1, 2), numbers(8, 8, 8), 4)[:, 0].tolist() == [1, 255, 2]
    with pytest.raises(OutOfBounds):
        memory.load(numbers(0), numbers(24), 4)
    with pytest.raises(Misaligned):
        memory.load(numbers(0), numbers(2), 4)


class Shared:
    """Two programs of 64 threads with 32 bytes; accesses of four bytes, each an instruction of one thread."""

    def __init__(self):
        self.memory = SharedMemory(2, 64, 32)

    def store(self, thread, address, value, program=0):
        self.memory.store(numbers(program), numbers(thread), numbers(address), np.full((1, 4), value, np.uint8))

    def load(self, thread, address, program=0):
        return int(self.memory.load(numbers(program), numbers(thread), numbers(address), 4)[0, 0])


@pytest.fixture
def shared():
    return Shared()


def test_shared_memory_is_each_programs_own_and_not_zero(shared):
    shared.store(0, 4, 5)
    shared.store(0, 4, 6, program=1)
    assert (shared.load(0, 4), shared.load(0, 4, program=1), shared.load(0, 8)) == (5, 6, 255)
    with pytest.raises(OutOfBounds):
        shared.load(0, 32)
    with pytest.raises(Misaligned):
        shared.load(0, 2)


# Threads 0 and 1 are of one warp, 40 is of another.
@pytest.mark.parametrize("other", [1, 40])
@pytest.mark.parametrize("order", ["write, read", "read, write", "write, write"])
def test_races(order, other):
    first, second = order.split(", ")

    def access(shared, kind, thread):
        return shared.load(thread, 0) if kind == "read" else shared.store(thread, 0, thread)

    for between in ("nothing", "warp", "program"):
        shared = Shared()
        access(shared, first, 0)
        if between == "warp":
            shared.memory.warp_barrier(numbers(0, 0), numbers(0, 1))
        if between == "program":
            shared.memory.barrier(numbers(0))
        if between == "program" or (between == "warp" and other == 1):
            access(shared, second, other)
        else:
            with pytest.raises(Race):
                access(shared, second, other)


def test_a_thread_does_not_race_with_itself_nor_readers_with_each_other(shared):
    shared.store(0, 0, 1)
    assert shared.load(0, 0) == 1
    shared.store(0, 0, 2)
    shared.memory.barrier(numbers(0))
    assert [shared.load(thread, 0) for thread in (0, 1, 40)] == [2, 2, 2]
    with pytest.raises(Race):
        shared.store(0, 0, 3)


def test_programs_do_not_race(shared):
    shared.store(0, 0, 1)
    shared.store(40, 0, 2, program=1)
    shared.memory.barrier(numbers(0))
    assert shared.load(5, 0) == 1
    with pytest.raises(Race):  # program 1 has met at no barrier
        shared.load(5, 0, program=1)


def test_readers_before_a_barrier_of_the_warp_do_not_race_with_its_later_writers(shared):
    shared.load(0, 0)
    shared.memory.warp_barrier(numbers(0), numbers(0))
    shared.load(1, 0)
    shared.store(1, 0, 5)  # thread 0 has read before the barrier, thread 1 itself
    with pytest.raises(Race):
        shared.load(40, 0)


def test_a_reader_of_another_warp_is_not_forgotten_at_a_barrier_of_the_warp(shared):
    shared.load(40, 0)
    shared.load(0, 0)
    shared.memory.warp_barrier(numbers(0), numbers(0))
    with pytest.raises(Race):
        shared.store(0, 0, 5)


def test_several_threads_may_store_the_same_value(shared):
    shared.store(0, 0, 9)
    shared.store(1, 0, 9)
    shared.store(40, 0, 9)
    lanes = numbers(0, 1, 40)
    shared.memory.store(0 * lanes, lanes, 0 * lanes + 4, np.full((3, 4), 7, np.uint8))
    with pytest.raises(Race):
        shared.memory.store(0 * lanes, lanes, 0 * lanes + 8, np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize("unordered", [False, True])
def test_lanes_of_one_instruction_may_be_allowed_to_store_different_values(unordered):
    memory = SharedMemory(1, 64, 32, unordered)

    def store(*threads):
        lanes, values = numbers(*threads), np.repeat(np.arange(len(threads), dtype=np.uint8)[:, None], 4, axis=1)
        memory.store(0 * lanes, lanes, 0 * lanes, values)

    if not unordered:
        with pytest.raises(Race, match="two threads write"):
            store(0, 1)
        return
    store(0, 1)
    with pytest.raises(Race):  # another instruction
        store(2)
    memory.barrier(numbers(0))
    assert int(memory.load(numbers(0), numbers(0), numbers(0), 4)[0, 0]) in (0, 1)
    memory.barrier(numbers(0))
    with pytest.raises(Race):  # another warp
        store(0, 40)
