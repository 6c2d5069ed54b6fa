"""Views of mapped files, brought into memory by large reads before they are touched.

Whoever touches a mapped page that is not in memory waits for it and for a few of its neighbours, a hundred kilobytes at a
time. A file that is read in large blocks keeps its disk busy (``python -m eagle3.data.bench.reading``).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch import Tensor

BLOCK = 1 << 20
_LIBC = ctypes.CDLL(None)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_scratch = memoryview(bytearray(BLOCK))  # what is read is in memory then, and is not looked at here


def resident(view: Tensor) -> float:
    """The share of the pages of ``view``, contiguous and of a mapped file, that are in memory."""
    start = view.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = view.data_ptr() + view.nbytes - start
    pages = np.empty(-(-length // mmap.PAGESIZE), dtype=np.uint8)
    if _LIBC.mincore(start, length, pages.ctypes.data):
        return 1.0  # it is not known, as of a file that belongs to another user
    return float((pages & 1).mean()) if len(pages) else 1.0


def fetch(view: Tensor, path: Path, offset: int) -> None:
    """Read into memory what of ``view`` is not there; it is mapped from ``path``, ``offset`` bytes from its beginning.

    A file that can no longer be opened is left to whoever touches the view.
    """
    if resident(view) == 1.0:
        return
    end = offset + view.nbytes
    with suppress(OSError):
        file = os.open(path, os.O_RDONLY)
        try:
            while offset < end and (read := os.preadv(file, [_scratch[: end - offset]], offset)):
                offset += read
        finally:
            os.close(file)
