"""How the threads of an operation wait for one another: spinning where the cores are free, asleep where they are not.

Spinning threads wake up at once, which makes small models about a quarter faster. But a thread that spins keeps its
core from whatever else runs there, also from the thread that it waits for. OpenMP reads the policy when torch is
imported.

The number of threads does not follow the load: sums are split among them, and a run that is resumed with another number
has other weights in their last bits.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

# Variables by which a user says how OpenMP's threads wait.
CHOSEN = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"}
# The kernel counts in ticks of 10 ms on each core: over a shorter time a few ticks look like a busy core.
SECONDS = 0.1
# Cores in use by other processes from which a machine counts as busy: above what a desktop does by itself.
BUSY = 0.5
STAT = Path("/proc/stat")


class Others:
    """Watches how many cores other processes use, from when it is made."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._before = _seconds_of_others()

    def cores(self) -> float | None:
        """The mean number of cores in use by others, after at least `SECONDS`; None where the system does not say."""
        time.sleep(max(0.0, self._started + SECONDS - time.monotonic()))
        after = _seconds_of_others()
        if self._before is None or after is None:
            return None
        return (after - self._before) / (time.monotonic() - self._started)


def choose_waiting(others: Others) -> None:
    """Let OpenMP's threads sleep while they wait if they and the other processes need more cores than there are.

    Sets `OMP_WAIT_POLICY`; does nothing where the user has chosen, where the cores are free, or where torch has read
    the policy already.
    """
    if "torch" in sys.modules or CHOSEN & os.environ.keys():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    wanted = int(threads) if threads.isdecimal() else cores
    used = others.cores() if wanted > 1 else None
    if used is not None and used >= BUSY and used + wanted > cores:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _seconds_of_others() -> float | None:
    """Seconds of CPU that all processes but this one have used since the machine started."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:9]]
        idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
        own = os.times()
        return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - own.user - own.system
    return None
