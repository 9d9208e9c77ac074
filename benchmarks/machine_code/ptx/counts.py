# mypy: disable-error-code="no-any-return"
"""What only execution counts: divergence, sectors of global memory, bank conflicts, and bytes behind ideal caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Counts", "Traffic"]

Array = NDArray[Any]

WARP = 32
SECTOR = 32
"""Bytes that a cache and memory exchange at least."""
_BANKS, _BANK = 32, 4
_KEY = 1 << 48  # above every address


@dataclass
class Traffic:
    """Loads, or stores. A request is one instruction of one warp; lanes that do not execute it are not part of it."""

    requests: int = 0
    sectors: int = 0
    """Distinct sectors of each request, summed over requests."""
    least: int = 0
    """Sectors that the bytes of each request fill at least, likewise."""
    touched: list[Array] = field(default_factory=list)
    """Numbers of the sectors that each instruction touched."""

    @property
    def distinct(self) -> int:
        """Sectors that the launch touched: what ideal caches leave."""
        return len(np.unique(np.concatenate(self.touched))) if self.touched else 0


@dataclass
class Counts:
    """Of one launch."""

    warp_instructions: int = 0
    """One counts once, however many of the warp's lanes execute it; both sides of a branch where a warp diverges."""
    thread_instructions: int = 0
    """Instructions times the lanes that executed their block."""
    loads: Traffic = field(default_factory=Traffic)
    """Of global memory."""
    stores: Traffic = field(default_factory=Traffic)
    shared_requests: int = 0
    shared_passes: int = 0
    """Passes through shared memory, each of which serves one word in each bank."""
    bank_conflicts: int = 0
    """Passes beyond the fewest that the requests need."""

    @property
    def lanes(self) -> float:
        """Share of a warp's lanes that execute, on average over its instructions. 1 without divergence."""
        return self.thread_instructions / (WARP * self.warp_instructions) if self.warp_instructions else 1.0

    @property
    def memory_bytes(self) -> int:
        """Bytes that memory reads and writes if caches are ideal: every sector that is touched, once for each."""
        return SECTOR * (self.loads.distinct + self.stores.distinct)

    def global_access(self, kind: str, address: Array, size: int, lanes: Array) -> None:
        """Count an instruction.

        Args:
            kind: "load" or "store".
            address: of each lane that executes, a multiple of `size`.
            size: bytes of a lane, at most a sector.
            lanes: their numbers among all lanes, ascending.
        """
        traffic = self.loads if kind == "load" else self.stores
        warp, sector = lanes // WARP, address // SECTOR
        per_warp = np.unique(warp * _KEY + sector) // _KEY
        _, places = np.unique(np.unique(warp * _KEY + address) // _KEY, return_counts=True)
        traffic.requests += len(places)
        traffic.sectors += len(per_warp)
        traffic.least += int((-(-places * size // SECTOR)).sum())
        traffic.touched.append(np.unique(sector))

    def shared_access(self, address: Array, size: int, lanes: Array) -> None:
        """Count an instruction on shared memory; arguments as for `global_access`.

        A pass serves one word of four bytes in each of 32 banks, to any number of lanes. Lanes of 8 or 16 bytes are
        served by halves or quarters of a warp ("Shared Memory" in the CUDA programming guide).
        """
        together = max(1, size // _BANK)
        words = (address[:, None] + np.arange(0, max(size, _BANK), _BANK)) // _BANK
        group = lanes // (WARP // together)
        distinct = np.unique(group[:, None] * _KEY + words)
        in_bank = distinct // _KEY * _BANKS + distinct % _KEY % _BANKS
        banks, passes = np.unique(in_bank, return_counts=True)
        slowest = np.zeros(int(banks.max()) // _BANKS + 1, np.int64)
        np.maximum.at(slowest, banks // _BANKS, passes)
        self.shared_requests += len(np.unique(lanes // WARP))
        self.shared_passes += int(slowest.sum())
        self.bank_conflicts += int((slowest[slowest > 0] - 1).sum())
