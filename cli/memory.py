"""Freed memory stays with the process: by default glibc gives it back to the system after every pass without gradients.

The next pass then gets new pages, which the system clears as they are first touched: a sixth of the time of a
certification on a CPU.
"""

from __future__ import annotations

import ctypes
import os

# Variables by which a user says how glibc's malloc keeps memory.
CHOSEN = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
# Parameters of mallopt(3), as glibc's malloc.h numbers them.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = 2**31 - 1  # mallopt takes a C int


def keep_freed_memory() -> bool:
    """Let glibc keep up to 2 GB of freed memory, and take blocks below 2 GB from it; return whether it does.

    Does nothing where the user has chosen, and under another C library.
    """
    names = getattr(os, "confstr_names", {})
    if CHOSEN & os.environ.keys() or "CS_GNU_LIBC_VERSION" not in names:
        return False
    if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, LARGEST) and mallopt(TRIM_THRESHOLD, LARGEST))
