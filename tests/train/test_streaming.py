"""Recorder and trainer side by side: whoever is killed, the trainer sees what an offline one sees, and ends with its head."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eagle3.configs import loader
from eagle3.configs.errors import UserError
from eagle3.configs.settings import Settings
from eagle3.data.files import sha256
from eagle3.data.record import record, recorded
from eagle3.data.shards import StoreSample
from eagle3.data.spool import SPOOL, SpoolReader, consumed
from eagle3.data.store import Store
from eagle3.models.checkpoint import load_draft
from eagle3.models.target import Target
from eagle3.train import loop
from eagle3.train.batches import Collated
from eagle3.train.feed import Planned
from eagle3.train.samples import Streamed
from eagle3.train.stage import train

LIMIT = 4
TIMING = {"seconds", "tokens_per_s", "tflop_per_s", "waited"}
DEADLINE = 120.0  # seconds after which a test that hangs fails


def of_spool(settings: Settings, limit: int) -> Settings:
    """The recipe over a spool: about ten shards, of which ``limit`` may stand."""
    streamed = replace(settings.record, shard_tokens=80, batch_tokens=80, spool_shards=limit)
    return replace(settings, record=streamed, train=replace(settings.train, epochs=1, validate_every=3))


@pytest.fixture(scope="module")
def streamed(short: Settings) -> Settings:
    return of_spool(short, LIMIT)


def answers_alone(finished: Path, folder: Path) -> Path:
    """A run of which nothing is recorded."""
    shutil.copytree(finished / "conversations", folder / "conversations")
    return folder


@pytest.fixture(scope="module")
def offline(short: Settings, finished: Path, tiny_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose spool has room for everything, recorded before anything is read."""
    run_dir = answers_alone(finished, tmp_path_factory.mktemp("offline"))
    record(of_spool(short, 100), run_dir, tiny_target)
    return run_dir


@pytest.fixture(scope="module")
def expected(streamed: Settings, offline: Path) -> list[str]:
    """What a trainer sees that finds everything recorded: the digest of every sample, in the order of the steps."""
    store = Store(offline / "store")
    samples = Streamed(SpoolReader(offline / SPOOL, store.manifest, lambda state: pytest.fail(state)), LIMIT)
    chosen = streamed.train
    schedule = loop.Schedule(samples.passes, samples.lengths, chosen.batch_tokens, streamed.run.seed)
    return [digest(samples[index]) for batch in schedule.from_step(0) for index in batch.samples]


def digest(sample: StoreSample) -> str:
    content = (sample.input_ids, sample.loss_mask, *sample.stored.values())
    tensors = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in content)
    return sha256(repr(sample[:4]).encode() + tensors)


def start(settings: Settings, run_dir: Path, stage: str) -> subprocess.Popen[str]:
    """Start a stage as a user does."""
    recipe = run_dir.parent / "recipe.yaml"
    recipe.write_text(loader.dump(settings))
    where = [f"run.root={run_dir.parent}", f"run.name={run_dir.name}"]
    command = [sys.executable, "-m", "eagle3", stage, str(recipe), *where]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def side(streamed: Settings, finished: Path, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """``side("record")`` starts that stage of the run in ``tmp_path / "run"``."""
    run_dir, started = answers_alone(finished, tmp_path / "run"), list[subprocess.Popen[str]]()

    def begin(stage: str) -> subprocess.Popen[str]:
        started.append(start(streamed, run_dir, stage))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def undisturbed(streamed: Settings, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was recorded and trained side by side, to the end."""
    run_dir = answers_alone(finished, tmp_path_factory.mktemp("undisturbed") / "run")
    finish(*(start(streamed, run_dir, stage) for stage in ("train", "record")))
    return run_dir


def finish(*sides: subprocess.Popen[str]) -> None:
    for process in sides:
        assert process.wait(DEADLINE) == 0, process.stderr and process.stderr.read()


def until(condition: Callable[[], bool], *sides: subprocess.Popen[str]) -> None:
    """Wait for ``condition``, while the sides go on."""
    give_up = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up, "they wait for each other"
        ended = [process for process in sides if process.poll() not in (None, 0)]
        assert not ended, ended[0].stderr.read() if ended[0].stderr else ""
        time.sleep(0.01)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait(DEADLINE) == -signal.SIGKILL


def recorded_shards(run_dir: Path) -> int:
    """Shards of the spool that were ever recorded; the facts of a shard stay when it goes."""
    return len(list((run_dir / SPOOL).glob("shard-*.json")))


@pytest.mark.slow
def test_a_trainer_sees_what_an_offline_one_sees(
    streamed: Settings,
    expected: list[str],
    side: Callable[[str], subprocess.Popen[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recorder is killed once its spool is full, the trainer (this process) in its fifth step."""
    run_dir, seen = tmp_path / "run", dict[int, list[str]]()
    take = loop.Trainer._step

    def stepping(trainer: loop.Trainer, planned: Planned, parts: Iterable[Collated]) -> dict:
        step, _, samples = planned.batch
        seen[step] = [digest(trainer.samples[index]) for index in samples]
        if step == 5 and not killed:
            killed.append(step)
            raise KeyboardInterrupt
        return take(trainer, planned, parts)

    killed: list[int] = []
    monkeypatch.setattr(loop.Trainer, "_step", stepping)
    recorder = side("record")
    until(lambda: recorded_shards(run_dir) == LIMIT, recorder)
    kill(recorder)
    side("record")
    with pytest.raises(KeyboardInterrupt):
        train(streamed, run_dir)
    assert not (run_dir / "train" / "done.json").exists()
    train(streamed, run_dir)
    assert [found for step in sorted(seen) for found in seen[step]] == expected
    until(lambda: recorded(streamed, run_dir))
    assert consumed(run_dir / SPOOL) == recorded_shards(run_dir) > 2 * LIMIT
    assert not list((run_dir / SPOOL).glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("order", [("record", "train"), ("train", "record")])
def test_both_are_killed_and_end_with_the_same_head(
    undisturbed: Path, side: Callable[[str], subprocess.Popen[str]], tmp_path: Path, order: tuple[str, str]
) -> None:
    run_dir = tmp_path / "run"
    log = run_dir / "train" / "metrics.jsonl"
    moments = {
        "record": lambda: recorded_shards(run_dir) > LIMIT,
        "train": lambda: log.exists() and '"step": 4,' in log.read_text(),
    }
    sides = {name: side(name) for name in order}
    for name in order:
        until(moments[name], *sides.values())
        kill(sides[name])
        sides[name] = side(name)
    finish(*sides.values())
    finish(side("record"))  # nothing is left to do
    assert lines_of(run_dir) == lines_of(undisturbed)
    ours, theirs = (load_draft(folder / "draft").state_dict() for folder in (run_dir, undisturbed))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def lines_of(run_dir: Path) -> list[dict]:
    lines = map(json.loads, (run_dir / "train" / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def test_what_is_recorded_for_training_is_not_in_the_store(offline: Path, finished: Path) -> None:
    held, everything = Store(offline / "store"), Store(finished / "store")
    assert held.index.splits == ("test", "validation")
    assert held.token_counts().equal(everything.token_counts())
    spool = SpoolReader(offline / SPOOL, held.manifest, lambda state: pytest.fail(state))
    ids = sorted([spool[index].id for index in range(len(spool))] + [held[index].id for index in range(len(held))])
    assert ids == sorted(everything[index].id for index in range(len(everything)))


def test_an_offline_spool_trains(short: Settings, offline: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(offline, tmp_path / "run"))
    train(of_spool(short, 100), run_dir)
    assert (run_dir / "draft" / "config.json").exists()
    assert not list((run_dir / SPOOL).glob("*.safetensors"))


def test_a_store_of_the_other_kind_is_refused(short: Settings, offline: Path, finished: Path) -> None:
    with pytest.raises(UserError, match="record.spool_shards = None: .*was recorded with 100"):
        train(replace(short, record=replace(of_spool(short, 100).record, spool_shards=None)), offline)
