"""The checksum of a target's weights is that of the files as they are, whatever was noted before."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from eagle3.configs import status
from eagle3.models import hashing, weights
from eagle3.models.hashing import Hashing
from eagle3.models.weights import files_sha256, weights_sha256


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, in which every file is noted, be it small and new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "WORTH_NOTING", 1)
    monkeypatch.setattr(weights, "SETTLED_NS", -1)
    return tmp_path / "cache" / "eagle3" / "weights"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the blocks that are hashed."""
    blocks: list[int] = []
    advance = Hashing._advance
    monkeypatch.setattr(Hashing, "_advance", lambda self, size: blocks.append(size) or advance(self, size))
    return blocks


def made(folder: Path, *contents: bytes) -> list[Path]:
    files = [folder / f"model-{number}.safetensors" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    return files


def plain(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_of_one_file_and_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "BLOCK", 1000)
    files = made(tmp_path, *(os.urandom(size) for size in (0, 1, 999, 1000, 1001, 5000, 12_345, 3, 4, 5)))
    assert files_sha256(files) == [plain(file) for file in files]
    names = {"b": files[1].name, "a": files[2].name, "c": files[1].name}
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": names}))
    lines = "".join(f"{plain(file)} {file.name}\n" for file in files[1:3])
    assert weights_sha256(str(tmp_path), {}) == hashlib.sha256(lines.encode()).hexdigest()
    (tmp_path / weights.SINGLE).write_bytes(b"all of them")
    assert weights_sha256(str(tmp_path), {}) == hashlib.sha256(b"all of them").hexdigest()


def test_files_are_hashed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    together = threading.Barrier(4, timeout=20)
    monkeypatch.setattr(Hashing, "_advance", lambda self, size: together.wait())
    files = made(tmp_path, b"a", b"b", b"c", b"d")
    assert files_sha256(files) == [plain(file) for file in files]


def test_what_was_hashed_is_noted(tmp_path: Path, notes: Path, read: list[int]) -> None:
    files = made(tmp_path, b"one", b"other")
    first = files_sha256(files)
    assert sorted(read) == [3, 5] and len(list(notes.iterdir())) == 2
    assert files_sha256(files) == first == [plain(file) for file in files]
    assert len(read) == 2
    link = tmp_path / "link"
    link.symlink_to(files[0])
    assert files_sha256([link]) == first[:1]
    assert len(read) == 2


def test_a_file_that_changed_is_hashed_again(tmp_path: Path, notes: Path, read: list[int]) -> None:
    (file,) = made(tmp_path, b"before")
    files_sha256([file])
    times = file.stat()
    for change, size in ((b"longer than it", 14), (b"after!", 6), (b"again!", 6)):
        time.sleep(0.02)  # the system's clock moves in steps
        file.write_bytes(change)
        if size == 6:  # as large and as old as before
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            assert file.stat().st_mtime_ns == times.st_mtime_ns
        assert files_sha256([file]) == [hashlib.sha256(change).hexdigest()]
        assert read[-1] == size
    assert len(read) == 4
    os.utime(file, ns=(0, 0))
    files_sha256([file])
    assert len(read) == 5


def test_size_and_either_time_tell_a_change_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = made(tmp_path, b"one")
    states = {"st_size": 3, "st_mtime_ns": 10**18, "st_ctime_ns": 10**18}
    names = set()
    with file.open("rb") as opened:
        for changed in ({}, {"st_size": 4}, {"st_mtime_ns": 10**18 + 1}, {"st_ctime_ns": 10**18 + 1}):
            monkeypatch.setattr(os, "fstat", lambda handle, found=states | changed: SimpleNamespace(**found))
            names.add(weights._note_of(file, opened))
    assert len(names) == 4


def test_a_file_that_changes_while_it_is_hashed_is_not_noted(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = made(tmp_path, b"before")
    monkeypatch.setattr(Hashing, "_advance", lambda self, size: os.utime(file, ns=(0, 0)))
    assert files_sha256([file]) == [plain(file)]
    assert not notes.exists()


@pytest.mark.parametrize("limit", ["WORTH_NOTING", "SETTLED_NS"])
def test_what_is_small_or_new_is_not_noted(
    limit: str, tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, limit, 1 << 40)
    files_sha256(made(tmp_path, b"one"))
    assert not notes.exists()


@pytest.mark.parametrize("damage", [b"", b"beef", b"x" * 64, b"\xff" * 64, b"0" * 65])
def test_a_damaged_note_is_none(damage: bytes, tmp_path: Path, notes: Path, read: list[int]) -> None:
    files = made(tmp_path, b"one")
    files_sha256(files)
    (note,) = notes.iterdir()
    note.write_bytes(damage)
    assert files_sha256(files) == [plain(files[0])]
    assert len(read) == 2
    assert note.read_text() == plain(files[0])


def test_where_nothing_can_be_noted(tmp_path: Path, notes: Path, read: list[int]) -> None:
    (tmp_path / "cache").touch()
    files = made(tmp_path, b"one")
    for _ in range(2):
        assert files_sha256(files) == [plain(files[0])]
    assert len(read) == 2


def test_it_says_how_far_it_is_where_it_takes_long(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = made(tmp_path, b"x" * 5000, b"y" * 3000)
    files_sha256(files[:1])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(status, "INTERVAL_LOG", 0.0)
    monkeypatch.setattr(hashing, "BLOCK", 1000)
    monkeypatch.setattr(weights, "GB", 1000)
    files_sha256(files)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("checksum of the weights 3.0/3.0 GB, ")  # of the one that was not noted
    assert lines[-1].endswith(" GB/s, 0:00 left")


def test_nobody_waits_for_the_others_after_an_error(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for those that were asked for before the one that failed."""
    monkeypatch.setattr(hashing, "BLOCK", 1)
    monkeypatch.setattr(weights.os, "cpu_count", lambda: 4)
    blocks: list[int] = []

    def advance(self: Hashing, size: int) -> None:
        blocks.append(size)
        if len(blocks) == 20:
            raise KeyboardInterrupt
        time.sleep(0.001)

    monkeypatch.setattr(Hashing, "_advance", advance)
    with pytest.raises(KeyboardInterrupt):
        files_sha256(made(tmp_path, *[b"x" * 50_000] * 20))
    assert len(blocks) < 20_000
    assert not notes.exists()
