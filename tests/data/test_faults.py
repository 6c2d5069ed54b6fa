"""A recorder that is gone at any moment, by a kill or by a power cut, and what its successor makes of it.

Every call by which a recording changes the disk is counted in a forked process, which ends before one of them, or in
the middle of a write, as SIGKILL would end it. Of what it had not synced by then a power cut may take anything.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from eagle3.configs.settings import Settings
from eagle3.data import recording
from eagle3.data.record import record
from eagle3.data.shards import PATTERN, Shard, read_entry
from eagle3.models.target import Target, TargetOutput

GONE, BROKEN = 9, 1  # exit codes of a process that ended where it was told to, and of one that failed
MOST = 2_000  # moments that no recording of these tests has


@dataclass
class Traces:
    """What a process leaves; names are relative to the folder that was watched.

    Attributes:
        moments, syncs: how many there were.
        made: names that came to be.
        unsynced: files with more content than was synced, and how many bytes were.
        pending: names that were changed since their folder was synced, and a copy of what was there before, if anything.
        broken: promises that were not kept.
    """

    moments: int = 0
    syncs: int = 0
    made: list[str] = field(default_factory=list)
    unsynced: dict[str, int] = field(default_factory=dict)
    pending: dict[str, str | None] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


class Disk:
    """Stands between this process and the files below ``root``, to the end of the process.

    Args:
        root: what is watched.
        notes: a folder for what is remembered.
        at: the moment at which the process ends; one lies before every call, and one in the middle of every write.
        deaf: the number of the sync that does nothing, if one is to.
    """

    def __init__(self, root: Path, notes: Path, at: int, deaf: int | None) -> None:
        self.root, self.notes, self.at, self.deaf, self.traces = root, notes, at, deaf, Traces()
        self.handles: dict[int, str] = {}  # files and folders that are open
        self.written: dict[int, int] = {}  # inodes whose content is not synced, and how much of it is
        self.threads: dict[str, threading.Thread] = {}  # which changed a name last
        self.lock = threading.RLock()
        counted = ("open", "close", "write", "fsync", "replace", "unlink", "mkdir")
        self.real = {name: getattr(os, name) for name in counted}
        for name in counted:
            setattr(os, name, getattr(self, name))
        os.rename, os.remove = self.replace, self.unlink
        for name in ("rmdir", "link", "symlink", "truncate", "ftruncate", "pwrite", "writev"):
            setattr(os, name, self._unforeseen(getattr(os, name)))
        sys.addaudithook(self._uncounted)

    def open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        name = self._name(path)
        if name is None:
            return self.real["open"](path, flags, mode, **options)
        with self.lock:
            if flags & (os.O_WRONLY | os.O_RDWR):
                self._moment()
                if not os.path.exists(path):
                    self._leave_behind()
                    self._change(name)
            handle = self.real["open"](path, flags, mode, **options)
            if flags & os.O_TRUNC:
                self.written[os.fstat(handle).st_ino] = 0
            self.handles[handle] = name
        return handle

    def close(self, handle: int) -> None:
        with self.lock:
            self.handles.pop(handle, None)
            self.real["close"](handle)

    def write(self, handle: int, content: Any) -> int:
        if handle not in self.handles:
            return self.real["write"](handle, content)
        with self.lock:
            self._moment()
            half = len(content) // 2
            done = self.real["write"](handle, content[:half])
            self.written.setdefault(os.fstat(handle).st_ino, 0)
            self._moment()
            return done + self.real["write"](handle, content[half:])

    def fsync(self, handle: int) -> None:
        """In truth nothing is synced: the machine that runs the tests stays on."""
        if handle not in self.handles:
            return
        with self.lock:
            self._moment()
            self.traces.syncs += 1
            if self.traces.syncs != self.deaf:
                self.written.pop(os.fstat(handle).st_ino, None)
                pending, folder = self.traces.pending, Path(self.handles[handle])
                self.traces.pending = {name: old for name, old in pending.items() if Path(name).parent != folder}

    def replace(self, source: Any, target: Any) -> None:
        name = self._name(target)
        if name is None:
            self.real["replace"](source, target)
            return
        with self.lock:
            self._moment()
            if os.stat(source).st_ino in self.written:
                self.traces.broken.append(f"{name} was published before it was synced")
            self._change(str(self._name(source)))
            self._change(name)
            self.real["replace"](source, target)

    def unlink(self, path: Any, **options: Any) -> None:
        name = self._name(path)
        if name is None or not os.path.exists(path):
            self.real["unlink"](path, **options)
            return
        with self.lock:
            self._moment()
            self._change(name)
            self.written.pop(os.stat(path).st_ino, None)
            self.real["unlink"](path)

    def mkdir(self, path: Any, mode: int = 0o777, **options: Any) -> None:
        name = self._name(path)
        with self.lock:
            if name is not None and not os.path.exists(path):
                self._moment()
                self._change(name)
            self.real["mkdir"](path, mode, **options)

    def leave(self) -> None:
        """Write down what there is to say at the end."""
        for path in self.root.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.written:
                self.traces.unsynced[str(self._name(path))] = self.written[path.stat().st_ino]
        (self.notes / "traces.json").write_text(json.dumps(asdict(self.traces)))

    def _moment(self) -> None:
        self.traces.moments += 1
        if self.traces.moments == self.at:
            self.leave()
            os._exit(GONE)

    def _leave_behind(self) -> None:
        """This thread begins another file: it must have made sure of those that it published, and so must who ended."""
        for name in filter(visible, self.traces.pending):
            done = self.threads[name] == threading.current_thread() or not self.threads[name].is_alive()
            if done and (self.root / name).is_file():
                self.traces.broken.append(f"{name} was left before its name was synced")

    def _change(self, name: str) -> None:
        """``name`` is about to mean something else, or nothing."""
        self.threads[name] = threading.current_thread()
        path, copy = self.root / name, self.notes / str(len(self.traces.made))
        if name not in self.traces.pending:
            if path.exists():
                shutil.copy(path, copy)
            self.traces.pending[name] = str(copy) if path.exists() else None
        self.traces.made.append(name)

    def _name(self, path: Any) -> str | None:
        """What ``path`` is called below the root; None for what lies elsewhere."""
        absolute = Path(os.path.abspath(path)) if isinstance(path, str | Path) else Path("/")
        return str(absolute.relative_to(self.root)) if absolute.is_relative_to(self.root) else None

    def _unforeseen(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """``real``, which no recording calls on its files, or these tests would have to count it."""

        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            assert target not in self.handles and self._name(target) is None, (
                f"{real.__name__}({target}) is not counted"
            )
            return real(target, *arguments, **options)

        return call

    def _uncounted(self, event: str, arguments: tuple[Any, ...]) -> None:
        """What writes by other means than ``os.open`` shows here."""
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            assert self._name(arguments[0]) is None, f"{arguments[0]} is written uncounted"


def visible(name: str) -> bool:
    return not Path(name).name.startswith(".")


def fallen(root: Path, notes: Path, at: int, action: Callable[[], None], deaf: int | None = None) -> tuple[int, Traces]:
    """Run ``action`` in a process that is gone at moment ``at``; returns its exit code and what it left."""
    notes.mkdir()
    child = os.fork()
    if child == 0:
        try:
            disk = Disk(root, notes, at, deaf)
            action()
            disk.leave()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(BROKEN)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (GONE, 0)
    return code, Traces(**json.loads((notes / "traces.json").read_text()))


def worlds(run: Path, traces: Traces) -> Iterator[tuple[str, dict[str, bytes]]]:
    """What the store may hold after the process was killed, or the power was cut, and which of these it is."""
    there, names = contents(run), list(traces.pending)
    for unsynced in ({}, traces.unsynced) if traces.unsynced else ({},):
        for lost in ([], *([name] for name in names), names):
            left = there | {name: there[name][:size] for name, size in unsynced.items()}
            for name in lost:
                old = traces.pending[name]
                left = {path: content for path, content in left.items() if not Path(path).is_relative_to(name)}
                left |= {} if old is None else {name: Path(old).read_bytes()}
            yield f"content lost of {[*unsynced]}, names lost {lost}", left


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run's store but the ranks' locks, temporaries too, with its content."""
    files = (path for path in (run / "store").rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def restore(run: Path, files: dict[str, bytes]) -> None:
    """Let ``run`` hold ``files`` and no others in its store."""
    shutil.rmtree(run / "store", ignore_errors=True)
    for name, content in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)


@pytest.fixture
def resume(recipe: Settings, tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """``resume(run, 3)`` records what is missing with three ranks, one after the other, the first rank last."""
    real, known = tiny_target.forward, {}

    def remembered(input_ids: torch.Tensor) -> TargetOutput:  # some hundred runs compute the same few batches
        key = str(input_ids.tolist())
        known[key] = known.get(key) or real(input_ids)
        return known[key]

    monkeypatch.setattr(tiny_target, "forward", remembered)
    PartialState(cpu=True)

    def resume(run: Path, ranks: int) -> None:
        for rank in reversed(range(ranks)):
            with monkeypatch.context() as patch:
                patch.setitem(PartialState._shared_state, "num_processes", ranks)
                patch.setitem(PartialState._shared_state, "process_index", rank)
                patch.setattr(os, "fsync", lambda handle: None)  # nobody pulls the plug on the tests
                record(recipe, run, tiny_target)

    return resume


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_gone_at_any_moment(
    answered: Path,
    finished: Path,
    recipe: Settings,
    tiny_target: Target,
    tmp_path: Path,
    resume: Callable[[Path, int], None],
    step: int,
) -> None:
    expected, seen = contents(finished), set()
    again = Path(shutil.copytree(answered, tmp_path / "again"))
    resume(again, 1)
    for moment in range(1, MOST, step):
        run = Path(shutil.copytree(answered, tmp_path / str(moment)))
        code, traces = fallen(run, tmp_path / f"notes-{moment}", moment, partial(record, recipe, run, tiny_target))
        assert traces.broken == []
        for harm, found in worlds(run, traces):
            where = f"moment {moment}, {harm}"
            published = {name: content for name, content in found.items() if visible(name)}
            assert published.items() <= expected.items(), where
            assert code or found == expected, where
            state = frozenset(found.items())
            if state not in seen:
                seen.add(state)
                restore(again, found)
                for shard in (again / "store").glob(PATTERN):
                    Shard.open(again / "store", read_entry(shard))
                resume(again, 1 + len(seen) % 3)
                assert contents(again) == expected, where
        shutil.rmtree(run)
        if code == 0:
            break
    assert expected.keys() <= set(traces.made)
    assert moment > 200 and len(seen) > 100 // step


def test_every_sync_is_needed(
    answered: Path,
    recipe: Settings,
    tiny_target: Target,
    tmp_path: Path,
    resume: Callable[[Path, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "WRITERS", 1)  # two might sync a folder for each other
    resume(Path(shutil.copytree(answered, tmp_path / "whole")), 1)
    deaf = syncs = 0
    while deaf <= syncs:
        run = Path(shutil.copytree(answered, tmp_path / str(deaf)))
        _, traces = fallen(
            run, tmp_path / f"notes-{deaf}", MOST, partial(record, recipe, run, tiny_target), deaf or None
        )
        syncs = traces.syncs
        assert bool(traces.broken or traces.unsynced or traces.pending) == bool(deaf), f"sync {deaf}"
        deaf += 1
    assert deaf > 20
