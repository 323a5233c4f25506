"""Freed memory of a worker: kept while a block is at work, given back to the system after it.

A block allocates the same large arrays again and again. Left alone, glibc returns each to the system as soon
as it is freed (Dask tells it to hurry) and gets it back page by page, filled with zeros: a quarter of a run's
time. How glibc shall behave is decided when a process starts, by its environment.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),  # larger arrays are the system's at once
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_ARENA_MAX": "1",  # one heap for all threads, and its gaps
}
"""For workers: memory that is freed stays with the process, up to 1 GiB. Deployments set the same."""

_SOON_S = 0.05  # what a shorter task leaves is not worth the milliseconds that looking for it takes


@contextmanager
def giving_back_memory() -> Iterator[None]:
    """Return freed memory to the system at the end; does nothing where the C library is not glibc."""
    library = glibc()
    began = time.monotonic()
    try:
        yield
    finally:
        if library is not None and time.monotonic() - began > _SOON_S:
            library.malloc_trim(0)


@cache
def glibc() -> ctypes.CDLL | None:
    """Return the C library, if it is one that can be told to give memory back."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None
