"""The checksum of a target's weights: the 800 GB of Maverick take minutes, so they are hashed in parallel, and once.

    weights_sha256("meta-llama/Llama-4-Maverick-17B-128E-Instruct", {"revision": "main"})

What was hashed is noted in the user's cache folder (``$XDG_CACHE_HOME/eagle3`` or ``~/.cache/eagle3``), for each file by
its path, size and times. A file with another size or time is hashed again, and so is one that was written so shortly
before it was hashed that a later change might show in neither.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from transformers.utils.hub import cached_file

from ..configs.status import StatusLine, minutes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
AT_ONCE = 8  # files at most, one a core; disks, those of a network above all, are faster for several
BLOCK = 1 << 18  # it stays in a core's cache
GB = 10**9
WORTH_NOTING = 1 << 28  # bytes; what is smaller is hashed in a moment, and nothing is left in the user's folders
SETTLED_NS = 2_000_000_000  # by which the times of a file may be behind
CHECKSUM = re.compile("[0-9a-f]{64}")


def weights_sha256(path: str, where: dict[str, Any]) -> str:
    """The checksum of model.safetensors; of several shards, that of the lines ``<checksum> <name>`` by name.

    Args:
        path: a folder or a hub name.
        where: the revision, as transformers' readers take it.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    single = cached_file(path, SINGLE, _raise_exceptions_for_missing_entries=False, **where)
    if single is not None:
        return files_sha256([Path(single)])[0]
    index = cached_file(path, INDEX, **where)
    assert index is not None  # it raises instead
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    files = [Path(str(cached_file(path, name, **where))) for name in names]
    lines = [f"{checksum} {name}\n" for checksum, name in zip(files_sha256(files), names, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def files_sha256(paths: Sequence[Path]) -> list[str]:
    """The checksum of each file; says on stderr how far it is where it takes long."""
    hashing = _Hashing(sum(path.stat().st_size for path in paths))
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as threads:
        try:
            found = list(threads.map(hashing.checksum, paths))
        finally:
            hashing.abandoned = True  # after an error or a signal nobody waits for the other files
    hashing.finish()
    return found


class _Hashing:
    """Files of ``total`` bytes, hashed in several threads."""

    def __init__(self, total: int) -> None:
        self.abandoned = False
        self._total, self._done = total, 0
        self._started, self._line, self._said = time.monotonic(), StatusLine(patient=True), False
        self._lock = threading.Lock()

    def checksum(self, path: Path) -> str:
        try:
            return self._checksum(path)
        except BaseException:
            self.abandoned = True  # results are asked for in order, and this file's may be the last
            raise

    def _checksum(self, path: Path) -> str:
        with path.open("rb") as file:
            note, found, began = _note_of(path, file), os.fstat(file.fileno()), time.time_ns()
            if known := _noted(note):
                with self._lock:
                    self._total -= found.st_size
                return known
            digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
            while not self.abandoned and (size := file.readinto(block)):
                digest.update(block[:size])
                self._advance(size)
            settled = began - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED_NS
            if found.st_size >= WORTH_NOTING and settled and not self.abandoned and _note_of(path, file) == note:
                _write(note, digest.hexdigest())
        return digest.hexdigest()

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
        elapsed = max(time.monotonic() - self._started, 1e-9)
        left = (self._total - self._done) * elapsed / max(1, self._done)
        done, total, speed = (amount / GB for amount in (self._done, self._total, self._done / elapsed))
        return f"checksum of the weights {done:,.1f}/{total:,.1f} GB, {speed:.2f} GB/s, {minutes(left)} left"


def _note_of(path: Path, file: BinaryIO) -> str:
    """The name of a note: another one for a file with another path, size or time.

    They are asked of the open file, since network file systems look again when one is opened.
    """
    found = os.fstat(file.fileno())
    times = f" {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    return hashlib.sha256(os.fsencode(path.resolve()) + times.encode()).hexdigest()


def _noted(note: str) -> str | None:
    with suppress(OSError, RuntimeError, ValueError):
        checksum = (_notes() / note).read_text("ascii")
        return checksum if CHECKSUM.fullmatch(checksum) else None
    return None


def _write(note: str, checksum: str) -> None:
    """Note it for the next time, if there is a place to; half a note is none."""
    with suppress(OSError, RuntimeError):
        _notes().mkdir(parents=True, exist_ok=True)
        (_notes() / note).write_text(checksum, "ascii")


def _notes() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eagle3" / "weights"
