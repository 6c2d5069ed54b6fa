"""Checksums of files of many gigabytes: several are read at once, and a line says how far it is where that takes long.

    reading = Hashing(total_bytes, lambda done, total, speed: f"read {done:.0f} of {total:.0f} B, {speed:.0f} B/s")
    reading.each(lambda path: checksum_of(path, reading), paths, threads=8)

What is done with a file, with an error, and with the checksum is the caller's.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader, FileIO
from typing import TypeVar

from ..configs.status import StatusLine, minutes

BLOCK = 1 << 18  # it stays in a core's cache

Item = TypeVar("Item")
Found = TypeVar("Found")


class Hashing:
    """Files of ``total`` bytes, hashed in several threads.

    Args:
        total: bytes of all files.
        describe: the line's beginning, of the bytes that are done, of all, and of those in a second.

    Attributes:
        abandoned: whether nobody waits for the checksums any more: those that come now are not of whole files.
    """

    def __init__(self, total: int, describe: Callable[[float, float, float], str]) -> None:
        self.abandoned = False
        self._total, self._done, self._describe = total, 0, describe
        self._started, self._line, self._said = time.monotonic(), StatusLine(patient=True), False
        self._lock = threading.Lock()

    def each(self, work: Callable[[Item], Found], items: Iterable[Item], threads: int) -> list[Found]:
        """What ``work`` makes of each item, so many at once; after its first error nobody waits for the others."""

        def attempt(item: Item) -> Found:
            try:
                return work(item)
            except BaseException:
                self.abandoned = True  # results are asked for in order, and this one may be the last
                raise

        with ThreadPoolExecutor(threads) as pool:
            try:
                found = list(pool.map(attempt, items))
            finally:
                self.abandoned = True  # after a signal, too
        if self._said:
            self._line.show(str(self), last=True)
        return found

    def checksum(self, file: BufferedReader | FileIO) -> str:
        """The SHA-256 of an open file from where it stands, in hexadecimal."""
        digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
        while not self.abandoned and (size := file.readinto(block)):
            digest.update(block[:size])
            self._advance(size)
        return digest.hexdigest()

    def leave_out(self, size: int) -> None:
        """So many of the bytes need not be read."""
        with self._lock:
            self._total -= size

    def _advance(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._line.due:
                self._said = True
                self._line.show(str(self))

    def __str__(self) -> str:
        elapsed = max(time.monotonic() - self._started, 1e-9)
        left = (self._total - self._done) * elapsed / max(1, self._done)
        return f"{self._describe(self._done, self._total, self._done / elapsed)}, {minutes(left)} left"
