"""Whether files are what was written: many are read at once, and a line says how far it is where that takes long.

    differing(folder, {"head.safetensors": entry}, hashed=["head.safetensors"])    # {name: what is wrong with it}

A file that cannot be read is one that differs: what is wrong with the others is still told.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..configs.status import StatusLine, minutes
from .files import BLOCK, FileEntry
from .units import in_bytes

READERS = min(32, max(4, os.cpu_count() or 1))  # hashing takes a core each, a network's disks take several readers


def differing(folder: Path, files: Mapping[str, FileEntry], hashed: Collection[str]) -> dict[str, str]:
    """Compare files with what they were when they were written.

    Args:
        folder: where they are.
        files: what they were, by name.
        hashed: those of which every byte is read; of the others only the size is compared.

    Returns:
        those that differ, in the order of ``files``, and how: "it is missing".
    """
    problems = {name: problem for name, entry in files.items() if (problem := _seen(folder / name, entry))}
    read = [name for name in files if name in hashed and name not in problems]
    reading = _Reading(sum(files[name].bytes for name in read))
    with ThreadPoolExecutor(READERS) as pool:
        try:
            found = list(pool.map(lambda name: reading.compare(folder / name, files[name]), read))
        finally:
            reading.abandoned = True  # after a signal nobody waits for the other files
    reading.finish()
    problems |= {name: problem for name, problem in zip(read, found, strict=True) if problem}
    return {name: problems[name] for name in files if name in problems}


def _seen(path: Path, entry: FileEntry) -> str | None:
    if not path.is_file():
        return "it is missing"
    size = path.stat().st_size
    return None if size == entry.bytes else f"it has {size:,} bytes and not {entry.bytes:,}"


class _Reading:
    """Files of ``total`` bytes that several threads read: ``verify 1.20 TB of 4.10 TB, 5.31 GB/s, 9:06 left``."""

    def __init__(self, total: int) -> None:
        self.abandoned = False
        self._total, self._done, self._said = total, 0, False
        self._started, self._line, self._lock = time.monotonic(), StatusLine(patient=True), threading.Lock()

    def compare(self, path: Path, entry: FileEntry) -> str | None:
        """What is wrong with the content of a file, if anything is."""
        digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
        try:
            with path.open("rb", buffering=0) as file:
                while not self.abandoned and (size := file.readinto(block)):
                    digest.update(block[:size])
                    self._advance(size)
        except OSError as error:
            return f"it cannot be read ({error.strerror})"
        return None if digest.hexdigest() == entry.sha256 else "its checksum is not that of what was recorded"

    def _advance(self, size: int) -> None:
        with self._lock:
            self._done += size
            if self._line.due:
                self._said = True
                self._line.show(str(self))

    def finish(self) -> None:
        if self._said:
            self._line.show(str(self), last=True)

    def __str__(self) -> str:
        speed = self._done / max(time.monotonic() - self._started, 1e-9)
        left = minutes((self._total - self._done) / max(1.0, speed))
        return f"verify {in_bytes(self._done)} of {in_bytes(self._total)}, {in_bytes(speed)}/s, {left} left"
