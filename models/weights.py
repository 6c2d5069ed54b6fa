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
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from transformers.utils.hub import cached_file

from .hashing import Hashing

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
AT_ONCE = 8  # files at most, one a core; disks, those of a network above all, are faster for several
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
    hashing = Hashing(sum(path.stat().st_size for path in paths), _describe)
    return hashing.each(lambda path: _checksum(path, hashing), paths, min(AT_ONCE, os.cpu_count() or 1))


def _describe(done: float, total: float, speed: float) -> str:
    return f"checksum of the weights {done / GB:,.1f}/{total / GB:,.1f} GB, {speed / GB:.2f} GB/s"


def _checksum(path: Path, hashing: Hashing) -> str:
    """What is noted of a file, or else its checksum, which is noted."""
    with path.open("rb") as file:
        note, found, began = _note_of(path, file), os.fstat(file.fileno()), time.time_ns()
        if known := _noted(note):
            hashing.leave_out(found.st_size)
            return known
        checksum = hashing.checksum(file)
        settled = began - max(found.st_mtime_ns, found.st_ctime_ns) > SETTLED_NS
        if found.st_size >= WORTH_NOTING and settled and not hashing.abandoned and _note_of(path, file) == note:
            _write(note, checksum)
    return checksum


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
