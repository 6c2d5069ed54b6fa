"""The thread that runs the target does nothing else, the others keep up or hold it up, and what goes wrong there is told."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from eagle3.configs import entry
from eagle3.configs.errors import Incomplete, Interrupted, UserError
from eagle3.configs.settings import Settings
from eagle3.data import recording
from eagle3.data.answers import read_finished
from eagle3.data.planning import plan
from eagle3.data.record import record
from eagle3.data.recorders import States, TransformersRecorder
from eagle3.data.shards import ShardEntry
from eagle3.models.target import Target
from eagle3.models.target_files import load_ends


class Watched(TransformersRecorder):
    """The target itself; ``run`` counts the batches that it ran, in ``threads``, and ``closed`` what was left of it."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.run, self.closed = 0, False
        self.threads: set[threading.Thread] = set()
        self.each: Callable[[int], None] = lambda run: None

    def record(self, batches: Iterable[Sequence[np.ndarray]]) -> Generator[States, None, None]:
        try:
            for batch in batches:
                self.run += 1
                self.threads.add(threading.current_thread())
                self.each(self.run)
                yield from super().record([batch])
        finally:
            self.closed = True


@pytest.fixture
def watched(tiny_target: Target) -> Watched:
    return Watched(tiny_target)


def planned(run_dir: Path, recipe: Settings, target: Target) -> list[int]:
    """Batches of each shard."""
    answers = read_finished(run_dir / "conversations", target.info.vocab_size)
    return [len(shard) for shard in plan([len(answer.ids) for answer in answers], recipe.record)]


def shards(run_dir: Path) -> list[str]:
    return sorted(path.stem for path in (run_dir / "store").glob("shard-*.safetensors"))


def test_only_the_target_runs_in_the_callers_thread(
    answered: Path, recipe: Settings, tiny_target: Target, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set[threading.Thread]()
    for name in ("check_states", "encode", "sequence", "index_of", "check_agreement", "publish"):
        real = getattr(recording, name)

        def noted(*arguments: object, real: Callable = real) -> object:
            others.add(threading.current_thread())
            return real(*arguments)

        monkeypatch.setattr(recording, name, noted)
    record(recipe, answered, tiny_target, watched)
    assert watched.threads == {threading.current_thread()}
    assert len(others) > 1 and threading.current_thread() not in others


@pytest.mark.parametrize("slow", ["check_states", "publish"])
def test_the_target_runs_ahead_no_further_than_it_may(
    answered: Path,
    recipe: Settings,
    tiny_target: Target,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    slow: str,
) -> None:
    sizes = planned(answered, recipe, tiny_target)
    held = recording.WRITERS + 1  # shards: those that are written, and one that is whole
    most = {"check_states": recording.BATCHES + 1, "publish": sum(sizes[:held])}[slow]
    assert most < sum(sizes)
    real, reached, let = getattr(recording, slow), threading.Event(), threading.Event()
    watched.each = lambda run: reached.set() if run == most else None

    def held_up(*arguments: object) -> object:
        assert let.wait(30)
        return real(*arguments)

    seen = list[int]()

    def look() -> None:
        assert reached.wait(30)  # it runs ahead that far
        let.wait(0.2)  # and no further, however long it waits
        seen.append(watched.run)
        let.set()

    monkeypatch.setattr(recording, slow, held_up)
    looking = threading.Thread(target=look)
    looking.start()
    record(recipe, answered, tiny_target, watched)
    looking.join()
    assert seen == [most]
    assert watched.run == sum(sizes)


def test_the_recorder_is_given_the_batches_of_all_shards_at_once(
    answered: Path, finished: Path, recipe: Settings, tiny_target: Target, files_of
) -> None:
    class Eager(TransformersRecorder):
        def record(self, batches: Iterable[Sequence[np.ndarray]]) -> Generator[States, None, None]:
            yield from super().record(list(batches))

    record(recipe, answered, tiny_target, Eager(tiny_target))
    assert files_of(answered / "store") == files_of(finished / "store")


def test_finished_shards_are_kept_when_a_later_one_is_wrong(
    answered: Path, recipe: Settings, tiny_target: Target, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = planned(answered, recipe, tiny_target)
    real = tiny_target.forward

    def spoilt(ids: object) -> object:
        output = real(ids)
        return output._replace(last_hidden=output.last_hidden * 0) if watched.run > first else output

    monkeypatch.setattr(tiny_target, "forward", spoilt)
    with pytest.raises(Incomplete, match="last_hidden of conversation .* are zero"):
        record(recipe, answered, tiny_target, watched)
    assert shards(answered) == ["shard-00000"]
    assert watched.closed and watched.run <= first + second + recording.BATCHES + 1


def test_a_writers_troubles_are_told(
    answered: Path, recipe: Settings, tiny_target: Target, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = recording.publish

    def full(folder: Path, number: int, *arguments: object) -> ShardEntry:
        if number == 1:
            raise UserError("run.root", folder, "it cannot be written (No space left on device)", "free some space")
        return real(folder, number, *arguments)

    monkeypatch.setattr(recording, "publish", full)
    with pytest.raises(UserError, match="run.root = .*No space left on device"):
        record(recipe, answered, tiny_target, watched)
    assert "shard-00000" in shards(answered) and "shard-00001" not in shards(answered)
    assert watched.closed


def test_a_signal_finishes_the_shard_that_is_being_recorded_and_no_other(
    answered: Path, finished: Path, recipe: Settings, tiny_target: Target, watched: Watched, files_of
) -> None:
    first, second, *_ = planned(answered, recipe, tiny_target)
    watched.each = lambda run: os.kill(os.getpid(), signal.SIGTERM) if run == first + 1 else None
    with pytest.raises(Interrupted, match=r"2 of \d+ shards are recorded"):
        record(recipe, answered, tiny_target, watched)
    assert shards(answered) == ["shard-00000", "shard-00001"]
    assert watched.closed and watched.run == first + second
    record(recipe, answered, tiny_target)
    assert files_of(answered / "store") == files_of(finished / "store")


def test_a_recorder_that_ends_early_is_told(answered: Path, recipe: Settings, tiny_target: Target) -> None:
    class Short(TransformersRecorder):
        def record(self, batches: Iterable[Sequence[np.ndarray]]) -> Generator[States, None, None]:
            yield next(super().record(batches))

    with pytest.raises(Incomplete, match=r"gave the states of 1 sequences for \d+; it is at fault"):
        record(recipe, answered, tiny_target, Short(tiny_target))
    assert shards(answered) == []


def test_the_others_leave_the_targets_cores_alone(
    answered: Path, recipe: Settings, tiny_target: Target, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = dict[str, set[int]]()
    for name in ("check_states", "publish"):
        real = getattr(recording, name)

        def noted(*arguments: object, name: str = name, real: Callable = real) -> object:
            cores.setdefault(name, set()).add(torch.get_num_threads())
            return real(*arguments)

        monkeypatch.setattr(recording, name, noted)
    watched.each = lambda run: cores.setdefault("target", set()).add(torch.get_num_threads())
    later = list[int]()
    monkeypatch.setattr(entry, "REQUESTED_THREADS", "3")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        record(recipe, answered, tiny_target, watched)
        asking = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        asking.start()
        asking.join()
        assert cores == {"target": {3}, "check_states": {1}, "publish": {1}}
        assert later == [3] and torch.get_num_threads() == 3
        cores.clear()
        shutil.rmtree(answered / "store")
        record(recipe, answered, load_ends(recipe.target), watched)  # elsewhere than on these cores
        assert cores["check_states"] == {3}
    finally:
        torch.set_num_threads(before)
