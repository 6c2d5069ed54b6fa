"""Views of mapped files, brought into memory by other threads while somebody reads the first of them.

Whoever touches a page that is not in memory waits for it and its neighbours, and the disk then waits until the next one
is touched: `python -m eagle3.data.bench.reading` measures it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

LEAST = 1 << 18  # bytes for which another thread is worth its while
THREADS = 4  # disks want several reads at a time
POPULATE_READ = 22  # MADV_POPULATE_READ, of Linux 5.14 and later

_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_threads = ThreadPoolExecutor(THREADS)


def bring(view: Tensor) -> None:
    """Begin to read a contiguous view of a mapped file, and to map what was read, and return.

    What cannot be had in advance, as on other systems, is read when it is touched.
    """
    if view.nbytes >= LEAST:
        _threads.submit(_bring, view)


def resident(view: Tensor) -> float:
    """The share of the pages of a contiguous view of a mapped file that are in memory; 0 where the system does not say."""
    start, length = _pages(view)
    found = np.zeros(-(-length // mmap.PAGESIZE), dtype=np.uint8)
    _LIBC.mincore(start, length, found.ctypes.data)
    return float((found & 1).mean())


def _bring(view: Tensor) -> None:
    _LIBC.madvise(*_pages(view), POPULATE_READ)


def _pages(view: Tensor) -> tuple[int, int]:
    """Where its first page begins, and the bytes from there to its end."""
    start = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    return start, view.data_ptr() + view.nbytes - start


def _renew() -> None:
    global _threads
    _threads = ThreadPoolExecutor(THREADS)


os.register_at_fork(after_in_child=_renew)  # threads stay behind
