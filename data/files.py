"""Files that are either there or not: atomic writes, checksums, JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..configs.errors import UserError

TEMPORARY = ".{name}.{process}.tmp"


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` so that a crash leaves either the whole file under ``path`` or what was there before."""
    temporary = path.with_name(TEMPORARY.format(name=path.name, process=os.getpid()))
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: without it a renamed file can be gone after a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path) -> None:
    """Delete what writers that were killed left behind in ``folder``."""
    for path in folder.glob(TEMPORARY.format(name="*", process="*")):
        path.unlink()


def sha256(content: bytes) -> str:
    """The checksum of ``content``, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """The checksum of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_json(value: object) -> bytes:
    """``value`` as the one JSON text this project writes for it, so that equal values give equal bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def encode_line(value: object) -> bytes:
    """``value`` as one line of a JSONL file."""
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_lines(path: Path, setting: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)`` of a JSONL file, blank lines left out.

    Args:
        path: the file.
        setting: what the user calls it, for the error message.

    Raises:
        UserError: the file is missing, or a line is not a JSON object in UTF-8.
    """
    if not path.is_file():
        raise UserError(setting, path, "there is no such file", "check the path")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError and JSONDecodeError both
                raise UserError(
                    setting, f"{path}, line {number}", f"not JSON ({error})", "write one JSON object per line, in UTF-8"
                ) from None
            if not isinstance(value, dict):
                raise UserError(
                    setting, f"{path}, line {number}", "not a JSON object", 'write {"prompt": ...} or the like per line'
                )
            yield number, value
