"""Files that are either there or not: atomic writes, checksums, JSON lines, mapped tensors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configs.errors import UserError

TEMPORARY = ".{name}.{process}.tmp"
BLOCK = 1 << 20
ALIGNMENT = 8
STORED_AS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True)
class FileEntry:
    """A file as it was when it was written."""

    sha256: str
    bytes: int


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Write ``parts``, one after the other, so that a crash leaves either the whole file under ``path`` or what was there.

    Raises:
        UserError: as :func:`write_each` does.
    """
    write_each(path, parts)


def write_each(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """The same with parts that are made while they are written.

    Raises:
        UserError: the disk is full, or the folder cannot be written; what was written of the file is removed.
    """
    temporary = path.with_name(TEMPORARY.format(name=path.name, process=os.getpid()))
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # nor may it be deleted, where nothing may be written
            temporary.unlink()
        raise unwritable(path, error) from error


def make_folder(folder: Path) -> None:
    """Make ``folder`` where it is missing, so that a power cut does not take it; UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise unwritable(folder, error) from error


def write_folder(folder: Path, contents: Mapping[str, bytes], setting: str) -> None:
    """Write a new folder of files, which is there whole or not at all.

    Args:
        folder: where; nothing may stand there but an empty folder.
        contents: its files, by name.
        setting: what the user calls it, for the error message.

    Raises:
        UserError: something stands there, or it cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(setting, folder, "something stands there", "choose a new folder")
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, content in contents.items():
            write_atomic(part / name, content)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        problem = f"it cannot be written ({error.strerror})"
        raise UserError(setting, folder, problem, "choose a folder with free space that you may write to") from error


def write_listed(path: Path, *parts: bytes | memoryview) -> FileEntry:
    """Write ``parts`` as :func:`write_atomic` does; the checksum is that of the bytes in memory."""
    entry = FileEntry(sha256(*parts), sum(len(part) for part in parts))
    write_atomic(path, *parts)
    return entry


def check_size(path: Path, entry: FileEntry) -> None:
    """Refuse a file that is missing or has not the size it was written with."""
    if not path.is_file():
        raise UserError("store", path, "it is missing", "run eagle3 record again")
    size = path.stat().st_size
    if size != entry.bytes:
        raise damaged(path, f"it has {size:,} bytes and not {entry.bytes:,}")


def damaged(path: Path, problem: str) -> UserError:
    """What the user is told of a file that is not what was written."""
    return UserError("store", path, problem, "delete it and run eagle3 record again")


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """A safetensors file in parts: the header, then the tensors' own memory, which is neither copied nor held up by
    Python's lock while it is hashed and written.

    Widest values first, so that each tensor is aligned in the mapped file.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": STORED_AS[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    flat = (tensors[name].contiguous().reshape(-1).view(torch.uint8) for name in order)
    return [len(text).to_bytes(8, "little") + text, *(values.numpy().data for values in flat)]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a safetensors file into memory: its tensors, which copy nothing, and its metadata.

    Raises:
        UserError: it is not such a file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise damaged(path, f"it is damaged ({error})") from None


def unwritable(path: Path, error: OSError) -> UserError:
    """What the user is told when ``path`` cannot be written."""
    problem = f"it cannot be written ({error.strerror})"
    remedy = (
        "free some space or choose a folder that you may write to, and run the command again: what is finished is kept"
    )
    return UserError("run.root", path, problem, remedy)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, so that two processes never write the same outputs.

    The system lets go of it when the process ends, however it ends. File systems without locks are taken at their word.

    Raises:
        UserError: another process holds it.
    """
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            os.close(handle)
            problem = "another process is writing there"
            raise UserError("run.name", path.parent, problem, "wait until it ends, or stop it") from None
    try:
        yield
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: without it a renamed file can be gone after a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(folder: Path, name: str = "*") -> None:
    """Delete what writers of ``name`` that were killed left behind in ``folder``."""
    for path in folder.glob(TEMPORARY.format(name=name, process="*")):
        path.unlink()


def drop_torn_line(path: Path) -> None:
    """Cut off the last line of ``path`` if a killed writer did not finish it; reads no more than that line."""
    with path.open("r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def sha256(*parts: bytes | memoryview) -> str:
    """The checksum of ``parts``, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The checksum of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines_sha256(path: Path) -> str:
    """A checksum of the lines of a file whatever their order, in hexadecimal: the sum of those of its lines."""
    with path.open("rb") as file:
        total = sum(int.from_bytes(hashlib.sha256(line).digest()) for line in file)
    return f"{total % (1 << 256):064x}"


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
        UserError: the file cannot be read, or a line is not a JSON object in UTF-8.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(setting, path, f"it cannot be read ({error.strerror})", "check the path") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
                remedy = "write one JSON object per line, in UTF-8"
                raise UserError(setting, where, f"not JSON ({error})", remedy) from None
            if not isinstance(value, dict):
                raise UserError(setting, where, "not a JSON object", 'write {"prompt": ...} or the like per line')
            yield number, value
