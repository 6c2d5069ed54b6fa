"""Crashes between any two steps of a writer, and what a folder holds."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest


class Crash(BaseException):
    """The process would be gone here: nothing may catch this."""


class CrashPlan:
    """Counts the moments before and after operations on files, and ends the process, as it were, at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.moments = at, 0
        self._synced: set[int] = set()
        self._replace = os.replace

    @property
    def happened(self) -> bool:
        return self.moments >= self.at

    def fsync(self, handle: int) -> None:
        """A crash before it loses half of what was written, as a power cut does."""
        try:
            self._moment()
        except Crash:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
            raise
        self._synced.add(os.fstat(handle).st_ino)  # in truth nothing is: the machine that runs the tests stays on
        self._moment()

    def replace(self, source: Path, target: Path) -> None:
        """What is published before it was synced is lost by half."""
        self._moment()
        if os.stat(source).st_ino not in self._synced:
            os.truncate(source, os.stat(source).st_size // 2)
        self._replace(source, target)
        self._moment()

    def _moment(self) -> None:
        self.moments += 1
        if self.moments == self.at:
            raise Crash


@contextmanager
def crashing(at: int) -> Iterator[CrashPlan]:
    plan = CrashPlan(at)
    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        patch.setattr(os, "fsync", plan.fsync)
        patch.setattr(os, "replace", plan.replace)
        yield plan


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` that is not hidden, with its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(name="crashing", scope="session")
def crashing_fixture() -> Callable[[int], AbstractContextManager[CrashPlan]]:
    """``with crashing(7) as crash:`` ends the block at the 7th moment; ``crash.happened`` says if it came to that."""
    return crashing


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder that is not hidden, with its content."""
    return snapshot


@pytest.fixture
def answered(run_dir: Path) -> Path:
    """The same run before it was recorded."""
    shutil.rmtree(run_dir / "store")
    return run_dir
