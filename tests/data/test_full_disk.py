"""A disk that is full: one line, exit code 2, nothing lost; and with room again the command goes on."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from eagle3 import cli
from eagle3.configs import loader
from eagle3.configs.errors import UserError
from eagle3.configs.settings import Settings
from eagle3.data.record import record
from eagle3.data.shards import PATTERN, Shard, read_entry
from eagle3.models.target import Target

PAGE, INODES, MOST = 4096, 1000, 300
ANSWERS = ("answers.*", "regenerate.stage.json", ".regenerate.lock")
AFTER = {"prepare": ("store", *ANSWERS), "regenerate": ("store",), "record": ()}  # what later stages make
BEFORE = {"prepare": ("store", "conversations"), "regenerate": ("store", *ANSWERS), "record": ("store",)}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB and some hundred files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=8m,nr_inodes={INODES}", "eagle3-test", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def leave_bytes(disk: Path, pages: int) -> None:
    """Let there be room for so many pages more."""
    with (disk / "ballast" / "bytes").open("wb", buffering=0) as file:
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        file.write(bytes(room - pages * PAGE))


def leave_inodes(disk: Path, files: int) -> None:
    """Let there be room for so many files more."""
    for number in range(os.statvfs(disk).f_favail - files):
        (disk / "ballast" / str(number)).touch()


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file but locks and recipes, temporaries too, with its content."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".yaml"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check_what_is_left(run: Path, expected: dict[str, bytes]) -> None:
    """What is there is as it is in the end; of the answers, as many as there are; no temporaries, no half of a shard."""
    for name, content in files_below(run).items():
        whole = expected[name]
        assert content == (whole[: len(content)] if name.endswith("answers.jsonl") else whole), name
    for shard in (run / "store").glob(PATTERN):
        Shard.open(run / "store", read_entry(shard))


@pytest.mark.parametrize(
    ("stage", "leave", "step"),
    [
        ("prepare", leave_bytes, 1),
        ("prepare", leave_inodes, 1),
        ("regenerate", leave_bytes, 1),
        ("regenerate", leave_inodes, 1),
        ("record", leave_bytes, 14),
        ("record", leave_inodes, 4),
        pytest.param("record", leave_bytes, 2, marks=pytest.mark.slow),
        pytest.param("record", leave_inodes, 1, marks=pytest.mark.slow),
    ],
)
def test_a_stage_on_a_disk_that_is_full(
    disk: Path,
    finished: Path,
    recipe: Settings,
    tiny_target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    leave: Callable[[Path, int], None],
    step: int,
) -> None:
    monkeypatch.setattr(cli.Run, "target", tiny_target)
    monkeypatch.setattr(cli.Run, "text", tiny_target.text)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    (tmp_path / "recipe.yaml").write_text(loader.dump(recipe))
    overrides = [f"run.root={disk}", "run.name=run"]
    arguments, run = [stage, str(tmp_path / "recipe.yaml"), *overrides], disk / "run"
    shutil.copytree(finished, tmp_path / "expected", ignore=shutil.ignore_patterns(*AFTER[stage]))
    expected = files_below(tmp_path / "expected")
    for room in range(0, MOST, step):
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns(*BEFORE[stage]))
        loader.save(loader.load(tmp_path / "recipe.yaml", overrides), run / "config.yaml")
        (disk / "ballast").mkdir()
        leave(disk, room)
        capsys.readouterr()
        code, lines = cli.main(arguments), capsys.readouterr().err.splitlines()
        check_what_is_left(run, expected)
        assert loader.load(run / "config.yaml") == loader.load(tmp_path / "recipe.yaml", overrides)
        if code == 0:
            break
        assert code == 2
        assert lines[-1].startswith("error: ") and "(No space left on device); free some space" in lines[-1]
        assert sum(line.startswith("error: ") for line in lines) == 1
        if (run / "store" / "record.stage.json").exists():
            assert cli.main(["inspect", "--verify", str(run)]) == 0
        shutil.rmtree(disk / "ballast")
        assert cli.main(arguments) == 0
        assert files_below(run) == expected
        shutil.rmtree(run)
    assert files_below(run) == expected
    assert 2 < room < MOST - step


def test_a_disk_that_may_only_be_read(
    disk: Path, finished: Path, recipe: Settings, tiny_target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, disk / "run", ignore=shutil.ignore_patterns("shard-00001*"))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(
        UserError, match=r"run.root = .*cannot be written \(Read-only file system\); free some space or"
    ):
        record(recipe, disk / "run", tiny_target)
    assert cli.main(["inspect", str(disk / "run")]) == 2
    assert "3 of 4 shards are whole, but not shard-00001.safetensors: it is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_command_on_a_disk_that_is_full(disk: Path, embedded: Path) -> None:
    run, ballast = disk / "run", disk / "ballast"
    shutil.copytree(embedded / "conversations", run / "conversations")
    ballast.mkdir()
    leave_bytes(disk, 150)
    command = [sys.executable, "-m", "eagle3", "record", embedded / "recipe.yaml", f"run.root={disk}", "run.name=run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    *progress, line = ended.stderr.splitlines()
    assert line.startswith("error: run.root = ") and "(No space left on device); free some space" in line
    assert all(line.startswith("record ") for line in progress)
    expected = files_below(embedded)
    check_what_is_left(run, expected)
    assert len(list((run / "store").glob(PATTERN))) > 10
    shutil.rmtree(ballast)
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert files_below(run) == expected


def with_small_files(limit: int, arguments: list[str], said: Path) -> int:
    """The exit code of a command in a process of which no file may grow beyond ``limit`` bytes."""
    child = os.fork()
    if child == 0:
        try:
            sys.stderr = said.open("w")
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = cli.main(arguments)
            sys.stderr.flush()
            os._exit(code)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("stage", "limit"), [("prepare", 3_000), ("regenerate", 3_000), ("regenerate", 7_000), ("record", 70_000)]
)
def test_a_file_that_may_not_grow(
    finished: Path,
    recipe: Settings,
    tiny_target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    limit: int,
) -> None:
    """The same without the right to mount anything."""
    monkeypatch.setattr(cli.Run, "target", tiny_target)
    monkeypatch.setattr(cli.Run, "text", tiny_target.text)
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns(*BEFORE[stage]))
    shutil.copytree(finished, tmp_path / "expected", ignore=shutil.ignore_patterns(*AFTER[stage]))
    (tmp_path / "recipe.yaml").write_text(loader.dump(recipe))
    arguments = [stage, str(tmp_path / "recipe.yaml"), f"run.root={tmp_path}", "run.name=run"]
    assert with_small_files(limit, arguments, tmp_path / "said") == 2
    lines = (tmp_path / "said").read_text().splitlines()
    assert lines[-1].startswith("error: run.root = ") and "(File too large)" in lines[-1]
    assert sum(line.startswith("error: ") for line in lines) == 1
    expected = files_below(tmp_path / "expected")
    check_what_is_left(run, expected)
    assert cli.main(arguments) == 0
    assert files_below(run) == expected
