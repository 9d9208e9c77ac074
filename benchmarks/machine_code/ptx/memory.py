# mypy: disable-error-code="no-any-return"
"""The memories of a launch: tensors in global memory, the programs' shared memory, the threads' local memory.

All accesses of one instruction come at once: arrays with an element per lane. Each is checked before it is made.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from denim.benchmarks.machine_code.ptx.traps import Misaligned, OutOfBounds, Race, StoredTwice

__all__ = ["PROGRAM", "Buffer", "GlobalMemory", "LocalMemory", "SharedMemory"]

Array = NDArray[Any]

# The widest access: 32 bytes on compute capability 10.0.
_WIDEST = 32
# What memory holds before it is written: NaN in every floating-point type.
_UNWRITTEN = 0xFF
_NO_RESERVE = 0x4000  # MAP_NORESERVE on Linux, which the module `mmap` names from Python 3.13 on
# Threads of a launch are numbered in steps of this from program to program: the most threads that a program can have.
PROGRAM = 1024
# Who stored a byte: number of the thread plus one, and above these bits the barriers that its program had passed.
_THREAD_BITS = 44
_THREAD = (1 << _THREAD_BITS) - 1


def _check_alignment(address: Array, size: int, memory: str) -> None:
    wrong = address % size != 0
    if wrong.any():
        first = int(address[wrong.argmax()])
        raise Misaligned(
            f"{size} bytes of {memory} memory at {first:#x}, not a multiple of {size}", np.flatnonzero(wrong)
        )


class Buffer:
    """A range of this process's memory that the launch may access.

    Args:
        start: address.
        size: bytes.
        name: for messages.
    """

    def __init__(self, start: int, size: int, name: str) -> None:
        self.start, self.size, self.name = start, size, name
        # Rows of aligned accesses: the range begins at a multiple of the widest, and elements outside of the buffer are
        # never touched.
        self.base = start - start % _WIDEST
        self._length = -(-(start + size - self.base) // _WIDEST) * _WIDEST
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self._length).from_address(self.base))
        self._owners: Array | None = None

    def rows(self, size: int) -> Array:
        """The memory as rows of `size` bytes, from `base` on."""
        return self._bytes.reshape(-1, size)

    def owners(self, size: int, create: bool) -> Array | None:
        """For each byte who stored it (see `_THREAD_BITS`), zero for nobody, in rows of `size`; None if nobody stored.

        Untouched pages take no memory, however large the tensor.
        """
        if self._owners is None and create:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
            self._owners = np.frombuffer(mmap.mmap(-1, 8 * self._length, flags=flags), np.int64)
        return None if self._owners is None else self._owners.reshape(-1, size)

    def __repr__(self) -> str:
        return f"{self.name} ({self.size} bytes)"


class GlobalMemory:
    """The tensors of a launch.

    Traps: addresses outside of every buffer, misaligned accesses, a byte stored by two threads, and loads of a byte
    that a thread of another program has stored, or another thread of the same program without a barrier since.

    Args:
        buffers: those that overlap (views of one tensor) become one.
    """

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self.buffers: list[Buffer] = []
        for buffer in sorted(buffers, key=lambda buffer: (buffer.start, -buffer.size)):
            last = self.buffers[-1] if self.buffers else None
            if last is not None and buffer.start < last.start + last.size:
                size = max(last.size, buffer.start + buffer.size - last.start)
                name = last.name if buffer.name == last.name else f"{last.name} and {buffer.name}"
                self.buffers[-1] = Buffer(last.start, size, name)
            else:
                self.buffers.append(buffer)
        self._starts = np.array([buffer.start for buffer in self.buffers], np.int64)
        self._ends = np.array([buffer.start + buffer.size for buffer in self.buffers], np.int64)

    def find(self, address: Array, size: int) -> list[tuple[Buffer, Array | slice]]:
        """The buffers that an instruction accesses, each with the positions of its lanes; everything checked.

        Raises:
            OutOfBounds: some lane reaches outside.
            Misaligned: some address is not a multiple of `size`.
        """
        index = np.searchsorted(self._starts, address, "right") - 1
        outside = index < 0
        if self.buffers:
            outside |= address + size > self._ends[np.maximum(index, 0)]
        if not self.buffers or outside.any():
            lane = int(outside.argmax()) if self.buffers else 0
            place = f"at {int(address[lane]):#x}"
            if index[lane] >= 0:
                near = self.buffers[int(index[lane])]
                place = f"at {near.name} + {int(address[lane]) - near.start}, which has {near.size} bytes"
            raise OutOfBounds(f"{size} bytes {place}", np.flatnonzero(outside))
        _check_alignment(address, size, "global")
        if (index == index[0]).all():
            return [(self.buffers[int(index[0])], slice(None))]
        return [(self.buffers[int(k)], np.flatnonzero(index == k)) for k in np.unique(index)]

    def load(self, address: Array, size: int, thread: Array, barriers: Array) -> Array:
        """Bytes (lanes, size).

        Args:
            address: of each lane.
            size: bytes that a lane loads, a power of two.
            thread: of the launch, counted through all programs.
            barriers: that the lane's program has passed.
        """
        data = np.empty((len(address), size), np.uint8)
        for buffer, lanes in self.find(address, size):
            row = (address[lanes] - buffer.base) // size
            data[lanes] = buffer.rows(size)[row]
            owners = buffer.owners(size, create=False)
            if owners is not None:
                self._check_order(owners[row], buffer, lanes, thread[lanes], barriers[lanes])
        return data

    @staticmethod
    def _check_order(owner: Array, buffer: Buffer, lanes: Array | slice, thread: Array, barriers: Array) -> None:
        writer, mine = (owner & _THREAD) - 1, thread[:, None]
        same_program = writer // PROGRAM == mine // PROGRAM
        ordered = same_program & ((owner >> _THREAD_BITS) < barriers[:, None])
        wrong = ((writer >= 0) & (writer != mine) & ~ordered).any(1)
        if wrong.any():
            raise Race(f"a load of {buffer.name} where another thread has stored", _positions(wrong, lanes))

    def store(self, address: Array, data: Array, thread: Array, barriers: Array) -> None:
        """Store bytes (lanes, size); arguments as for `load`."""
        size = data.shape[1]
        for buffer, lanes in self.find(address, size):
            row, me = (address[lanes] - buffer.base) // size, thread[lanes] + 1
            owners = buffer.owners(size, create=True)
            assert owners is not None
            before = owners[row] & _THREAD
            wrong = ((before != 0) & (before != me[:, None])).any(1)
            owners[row] = (me | (barriers[lanes] << _THREAD_BITS))[:, None]
            # Of lanes that share a byte in this very instruction, one finds the other in its place.
            wrong |= (owners[row] & _THREAD != me[:, None]).any(1)
            if wrong.any():
                raise StoredTwice(f"a byte of {buffer.name} is stored by two threads", _positions(wrong, lanes))
            buffer.rows(size)[row] = data[lanes]


def _positions(wrong: Array, lanes: Array | slice) -> Array:
    found = np.flatnonzero(wrong)
    return found if isinstance(lanes, slice) else lanes[found]


class LocalMemory:
    """Memory of each thread's own, at addresses from zero on."""

    def __init__(self, threads: int, size: int) -> None:
        self.size = size
        self._stride = -(-size // _WIDEST) * _WIDEST
        self._bytes = np.full(threads * self._stride, _UNWRITTEN, np.uint8)

    def _row(self, lane: Array, address: Array, size: int) -> Array:
        outside = (address < 0) | (address + size > self.size)
        if outside.any():
            raise OutOfBounds(f"outside of {self.size} bytes of local memory", np.flatnonzero(outside))
        _check_alignment(address, size, "local")
        return (lane * self._stride + address) // size

    def load(self, lane: Array, address: Array, size: int) -> Array:
        return self._bytes.reshape(-1, size)[self._row(lane, address, size)]

    def store(self, lane: Array, address: Array, data: Array) -> None:
        size = data.shape[1]
        self._bytes.reshape(-1, size)[self._row(lane, address, size)] = data


class SharedMemory:
    """The shared memory of several programs, and for each byte what is needed to see a race.

    A barrier of the program orders everything before it with everything after it; a barrier of a warp does so among
    the threads of that warp. Of each byte is kept, since the last barrier of its program: the thread that wrote it,
    the lowest and the highest thread that read it, and how many barriers of its own the warp of each had passed.

    Args:
        programs: how many run at once.
        threads: of a program.
        size: bytes of a program.
        unordered: whether lanes that store different values to one place by one instruction of their warp are no race;
            the value of one of them stays.
    """

    _NOBODY = np.iinfo(np.int32).max

    def __init__(self, programs: int, threads: int, size: int, unordered: bool = False) -> None:
        self.size, self.unordered = size, unordered
        self._stride = -(-size // _WIDEST) * _WIDEST
        shape = (programs, self._stride)
        self._bytes = np.full(shape, _UNWRITTEN, np.uint8)
        self._writer = np.full(shape, -1, np.int32)
        self._write_epoch = np.zeros(shape, np.int32)
        self._lowest = np.full(shape, self._NOBODY, np.int32)
        self._highest = np.full(shape, -1, np.int32)
        self._read_epoch = np.zeros(shape, np.int32)
        self._epoch = np.zeros((programs, -(-threads // 32)), np.int32)

    def _spots(self, program: Array, address: Array, size: int) -> Array:
        outside = (address < 0) | (address + size > self.size)
        if outside.any():
            raise OutOfBounds(f"outside of the {self.size} bytes of shared memory", np.flatnonzero(outside))
        _check_alignment(address, size, "shared")
        return (program * self._stride + address)[:, None] + np.arange(size)

    def _raced(self, wrong: Array, what: str) -> None:
        if wrong.any():
            raise Race(f"{what} shared memory without a barrier between", np.flatnonzero(wrong.any(1)))

    def _unordered_writer(self, spots: Array, thread: Array, epoch: Array) -> Array:
        """Where another thread has written, not ordered before this access."""
        writer = self._writer.reshape(-1)[spots]
        ordered = (writer >> 5 == thread >> 5) & (self._write_epoch.reshape(-1)[spots] < epoch)
        return (writer >= 0) & (writer != thread) & ~ordered

    def load(self, program: Array, thread: Array, address: Array, size: int) -> Array:
        """Bytes (lanes, size), from each lane's program; `thread` counts within it."""
        spots = self._spots(program, address, size)
        epoch, thread = self._epoch[program, thread >> 5][:, None], thread[:, None].astype(np.int32)
        self._raced(self._unordered_writer(spots, thread, epoch), "one thread writes and another reads")
        lowest, highest, seen = (array.reshape(-1) for array in (self._lowest, self._highest, self._read_epoch))
        # Readers of this warp before its last barrier need not be told apart any more: this reader stands for them.
        warp = thread >> 5
        past = (lowest[spots] >> 5 == warp) & (highest[spots] >> 5 == warp) & (seen[spots] < epoch)
        lowest[spots[past]], highest[spots[past]] = self._NOBODY, -1
        threads, epochs = np.broadcast_to(thread, spots.shape), np.broadcast_to(epoch, spots.shape)
        np.minimum.at(lowest, spots, threads)
        np.maximum.at(highest, spots, threads)
        np.maximum.at(seen, spots, epochs)
        return self._bytes.reshape(-1)[spots]

    def store(self, program: Array, thread: Array, address: Array, data: Array) -> None:
        """Store bytes (lanes, size). Several threads may store the same value to the same place.

        (Triton's reductions do: warps that hold the same partial sums all store them.)
        """
        spots = self._spots(program, address, data.shape[1])
        epoch, thread = self._epoch[program, thread >> 5][:, None], thread[:, None].astype(np.int32)
        changes = self._bytes.reshape(-1)[spots] != data
        self._raced(self._unordered_writer(spots, thread, epoch) & changes, "two threads write")
        lowest, highest = self._lowest.reshape(-1)[spots], self._highest.reshape(-1)[spots]
        mine = (lowest == thread) & (highest == thread)
        warp = thread >> 5
        ordered = (lowest >> 5 == warp) & (highest >> 5 == warp) & (self._read_epoch.reshape(-1)[spots] < epoch)
        self._raced((highest >= 0) & ~mine & ~ordered, "one thread reads and another writes")
        self._bytes.reshape(-1)[spots] = data
        self._writer.reshape(-1)[spots] = thread
        # Of threads that share a byte in this very instruction, one finds the other in its place.
        lost = self._bytes.reshape(-1)[spots] != data
        if self.unordered:
            lost &= self._writer.reshape(-1)[spots] >> 5 != thread >> 5
        self._raced(lost, "two threads write")
        self._write_epoch.reshape(-1)[spots] = epoch

    def barrier(self, programs: Array) -> None:
        """Threads of these programs (indices) have met."""
        self._writer[programs] = -1
        self._lowest[programs], self._highest[programs] = self._NOBODY, -1
        self._read_epoch[programs] = 0

    def warp_barrier(self, programs: Array, warps: Array) -> None:
        """Threads of these warps have met."""
        self._epoch[programs, warps] += 1
