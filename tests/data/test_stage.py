"""A stage never mixes two recipes; files are whole or absent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from eagle3.configs.errors import UserError
from eagle3.data import files
from eagle3.data.files import drop_torn_line, encode_json, exclusive, remove_temporaries, write_atomic
from eagle3.data.progress import Progress
from eagle3.data.stage import Stage, at_least


def stage(folder: Path, **inputs: object) -> Stage:
    return Stage("bake", folder, folder / "out", inputs)


def test_begin_and_go_on(tmp_path: Path) -> None:
    first = stage(tmp_path, sugar=1, flour=[2, 3])
    assert not first.begun()
    first.begin()
    assert first.begun()
    stage(tmp_path, sugar=1, flour=[2, 3]).begin()
    assert stage(tmp_path, sugar=1).begun()  # who knows less may still ask
    assert first.resume == f"eagle3 bake {tmp_path}/config.yaml"


def test_another_value_is_refused(tmp_path: Path) -> None:
    stage(tmp_path, sugar=1).begin()
    complaint = r"sugar = 2: .*out was made with 1; set it back, choose another run.name, or delete .*out"
    for call in (Stage.begun, Stage.begin):
        with pytest.raises(UserError, match=complaint):
            call(stage(tmp_path, sugar=2))
    with pytest.raises(UserError, match="salt = 0: .*out was made with null"):
        stage(tmp_path, salt=0).begun()
    assert json.loads((tmp_path / "out" / "bake.stage.json").read_bytes()) == {"sugar": 1}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"sugar"'])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    stage(tmp_path, sugar=1).begin()
    (tmp_path / "out" / "bake.stage.json").write_bytes(content)
    with pytest.raises(UserError, match="bake.stage.json: it is damaged; delete"):
        stage(tmp_path, sugar=1).begun()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(UserError, match=r"run.root = .*out: it cannot be written \(File exists\)"):
        stage(tmp_path, sugar=1).begin()


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"file: it cannot be written \(No space left on device\); free some space or choose"
    ):
        write_atomic(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing keeps filling the disk


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/inner: it cannot be written \(Not a directory\)"):
        write_atomic(tmp_path / "file" / "inner", b"")


def test_only_the_temporaries_that_are_asked_for(tmp_path: Path) -> None:
    for name in (".a-1.json.17.tmp", ".a-2.json.17.tmp", "a-1.json", ".lock"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path, "a-1.*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a-2.json.17.tmp", ".lock", "a-1.json"]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    "content", [b"", b"a\n", b"ab\ncd\n", b"ab\ncd", b"abcdefgh", b"\n\n", b"\nabcdefg", b"ab\n\0\0\0\0"]
)
def test_drop_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, block: int) -> None:
    monkeypatch.setattr(files, "BLOCK", block)
    (tmp_path / "lines").write_bytes(content)
    drop_torn_line(tmp_path / "lines")
    assert (tmp_path / "lines").read_bytes() == content[: content.rfind(b"\n") + 1]


def test_exclusive(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with exclusive(lock), pytest.raises(UserError, match="another process is writing there"), exclusive(lock):
        pass
    with exclusive(lock):
        pass
    with pytest.raises(UserError, match="cannot be written"), exclusive(tmp_path / "absent" / "lock"):
        pass


def test_equal_values_give_equal_json() -> None:
    assert encode_json({"a": [1, 0.5, None, "é"]}) == encode_json(json.loads(encode_json({"a": [1, 0.5, None, "é"]})))
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_json(float("nan"))


def test_at_least() -> None:
    at_least("a.b", 1, 1)
    with pytest.raises(UserError, match="a.b = 0: it is too small; give at least 1"):
        at_least("a.b", 0, 1)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("bake", "loaves", 4, done=1)
    for _ in range(3):
        progress.advance(1, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("bake 2/4 loaves, ")
    assert lines[-1].startswith("bake 4/4 loaves, ") and lines[-1].endswith("0:00 left")
    assert len(lines) == 2  # a log is not flooded
