"""Whether files are what was written: many are read at once, and a line says how far it is where that takes long.

    differing(folder, {"head.safetensors": entry}, hashed=["head.safetensors"])    # {name: what is wrong with it}

A file that cannot be read is one that differs: what is wrong with the others is still told.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from ..models.hashing import Hashing
from .files import FileEntry
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
    reading = Hashing(sum(files[name].bytes for name in read), _describe)
    found = reading.each(lambda name: _compared(folder / name, files[name], reading), read, READERS)
    problems |= {name: problem for name, problem in zip(read, found, strict=True) if problem}
    return {name: problems[name] for name in files if name in problems}


def _seen(path: Path, entry: FileEntry) -> str | None:
    if not path.is_file():
        return "it is missing"
    size = path.stat().st_size
    return None if size == entry.bytes else f"it has {size:,} bytes and not {entry.bytes:,}"


def _compared(path: Path, entry: FileEntry, reading: Hashing) -> str | None:
    """What is wrong with the content of a file, if anything is."""
    try:
        with path.open("rb", buffering=0) as file:
            checksum = reading.checksum(file)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return None if checksum == entry.sha256 else "its checksum is not that of what was recorded"


def _describe(done: float, total: float, speed: float) -> str:
    return f"verify {in_bytes(done)} of {in_bytes(total)}, {in_bytes(speed)}/s"
