"""The spool: what is read is what an offline store would give, whoever is killed, and it never holds more than its bound."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from eagle3.configs.errors import Interrupted, UserError
from eagle3.data import spool
from eagle3.data.files import remove_temporaries, sha256, write_atomic
from eagle3.data.index import Identity, Index
from eagle3.data.manifest import Manifest
from eagle3.data.shards import StoreSample, shard_path
from eagle3.data.shards import publish as publish_shard
from eagle3.data.spool import SpoolReader, SpoolWriter, consumed
from eagle3.data.store import read_shard

LENGTHS = [[4, 3], [5], [2, 2, 3], [6, 2], [7], [3, 3], [2], [4, 4]]
FIRST = list(accumulate(map(len, LENGTHS), initial=0))
SAMPLES = FIRST[-1]
LIMIT = 3
RECORDING = "ab" * 32
DEADLINE = 20.0  # seconds after which a test that hangs fails

PACKED = ("input_ids", "loss_mask", "features", "last_hidden")
fork = multiprocessing.get_context("fork")


def sample(number: int, length: int) -> StoreSample:
    random = torch.Generator().manual_seed(number)
    shapes = {"features": (length, 3, 8), "last_hidden": (length, 8)}
    stored = {name: torch.randn(shape, generator=random, dtype=torch.bfloat16) for name, shape in shapes.items()}
    ids, mask = torch.full((length,), number, dtype=torch.int32), torch.arange(length) > 0
    return StoreSample(f"sample-{number}", "source", "train", 0.7, ids, mask, stored)


def shard(index: int) -> list[StoreSample]:
    return [sample(FIRST[index] + number, length) for number, length in enumerate(LENGTHS[index])]


def publish(folder: Path, index: int, samples: list[StoreSample]) -> None:
    lengths, said = [len(found.input_ids) for found in samples], [int(found.loss_mask.sum()) for found in samples]
    packed = {name: torch.cat([getattr(found, name) for found in samples]) for name in PACKED}
    of = Index.of([Identity(*found[:4]) for found in samples], lengths, said)
    publish_shard(folder, index, RECORDING, of, packed, 0, 0)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    dtypes = {"input_ids": "int32", "loss_mask": "bool", "features": "bfloat16", "last_hidden": "bfloat16"}
    target = {"layers": [1, 3, 4], "hidden_size": 8}
    return Manifest(1, RECORDING, {}, target, "", "", "after the final norm", dtypes, 0, 0, 0, 0, 0, {}, ())


@pytest.fixture(scope="module")
def offline(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a reader of the finished shards sees."""
    folder = tmp_path_factory.mktemp("offline")
    for index in range(len(LENGTHS)):
        publish(folder, index, shard(index))
    shards = [read_shard(folder, index, manifest) for index in range(len(LENGTHS))]
    return [digest(found[row]) for found in shards for row in range(len(found))]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "FIRST_POLL", 0.001)
    monkeypatch.setattr(spool, "LONGEST_POLL", 0.002)


def digest(found: StoreSample) -> str:
    content = (found.input_ids, found.loss_mask, *found.stored.values())
    tensors = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in content)
    return sha256(repr(found[:4]).encode() + tensors)


def go_on(state: str) -> None:
    """Nobody asks to stop."""


def produce(folder: Path) -> None:
    """What the recorder does."""
    writer = SpoolWriter(folder, RECORDING, LENGTHS, LIMIT)
    for index in writer.missing():
        writer.wait_for_room(index, go_on)
        remove_temporaries(folder, f"{shard_path(folder, index).stem}.*")
        publish(folder, index, shard(index))
        with (folder / "made.log").open("a") as log:
            log.write(f"{index}\n")


def consume(folder: Path, manifest: Manifest, checkpoint: Path, every: int) -> None:
    """What the trainer does: its state is the list of all that it saw, saved every few samples and before it waits."""
    seen = json.loads(checkpoint.read_bytes()) if checkpoint.exists() else []
    reader = SpoolReader(folder, manifest, go_on)
    for number in range(len(seen), len(reader)):
        shard = whole_shards(number)
        if number % every == 0 or not reader.recorded(shard, shard + 1):
            save(checkpoint, seen, reader)
        seen.append(digest(reader[number]))
    save(checkpoint, seen, reader)


def save(checkpoint: Path, seen: list[str], reader: SpoolReader) -> None:
    write_atomic(checkpoint, json.dumps(seen).encode())
    reader.acknowledge(whole_shards(len(seen)))


def whole_shards(samples: int) -> int:
    """How many shards the first samples fill to the end."""
    return bisect_right(FIRST, samples) - 1


def start(work: Callable[..., None], *arguments: object, killed_at: int = 0) -> BaseProcess:
    """Run ``work`` in a process that is killed at that moment: before a file is synced, renamed or deleted."""
    process = fork.Process(target=_doomed, args=(work, arguments, killed_at), daemon=True)
    process.start()
    return process


def _doomed(work: Callable[..., None], arguments: tuple[object, ...], killed_at: int) -> None:
    moments = iter(range(1, 1 << 30))

    def dying(operation: Callable[..., object]) -> Callable[..., object]:
        def counted(*given: object, **named: object) -> object:
            if next(moments) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*given, **named)

        return counted

    os.fsync, os.replace, os.unlink = dying(os.fsync), dying(os.replace), dying(os.unlink)
    work(*arguments)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[list[int]]:
    """How many shards, those being written included, were seen in the spool, looked at all the time."""
    counts = [0]
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.0005):
            names = os.listdir(tmp_path)
            counts.append(len({name.strip(".").split(".")[0] for name in names if ".safetensors" in name}))

    watcher = threading.Thread(target=look)
    watcher.start()
    yield counts
    over.set()
    watcher.join()


def both(folder: Path, manifest: Manifest, killed_at: tuple[int, int]) -> list[int | None]:
    """Run producer and consumer to the end, each started again once if it was killed; returns how each ended first."""
    sides: tuple[tuple[object, ...], ...] = ((produce, folder), (consume, folder, manifest, folder / "checkpoint", 2))
    first = [start(*side, killed_at=moment) for side, moment in zip(sides, killed_at, strict=True)]
    running = dict(enumerate(first))
    give_up = time.monotonic() + DEADLINE
    while running and time.monotonic() < give_up:
        for number, process in list(running.items()):
            if process.exitcode is not None:
                del running[number]
                if process is first[number] and process.exitcode == -signal.SIGKILL:
                    running[number] = start(*sides[number])
        time.sleep(0.001)
    for process in running.values():
        process.kill()
    assert not running, "they wait for each other"
    return [process.exitcode for process in first]


@pytest.mark.parametrize("moment", [0, *range(1, 52, 2)])
def test_either_side_is_killed_and_comes_back(
    tmp_path: Path, manifest: Manifest, offline: list[str], held: list[int], moment: int
) -> None:
    ends = both(tmp_path, manifest, (moment, 7 * moment % 52))
    assert moment == 0 or -signal.SIGKILL in ends
    assert json.loads((tmp_path / "checkpoint").read_bytes()) == offline
    assert 0 < max(held) <= LIMIT
    assert consumed(tmp_path) == len(LENGTHS)
    assert not list(tmp_path.glob("shard-*.safetensors"))
    assert len(list(tmp_path.glob("shard-*.json"))) == len(LENGTHS)
    # A producer that dies between a shard and its line in the log does not make the shard again.
    assert sorted(set(made(tmp_path))) == made(tmp_path)


def made(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "made.log").read_text().split()]


def published(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("shard-*.safetensors"))


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def test_a_slow_consumer_stops_the_producer(tmp_path: Path, manifest: Manifest, held: list[int]) -> None:
    producer = start(produce, tmp_path)
    reader = SpoolReader(tmp_path, manifest, go_on)
    for read in range(len(LENGTHS) - LIMIT + 1):
        until(lambda: len(published(tmp_path)) == LIMIT)
        time.sleep(0.05)
        assert producer.exitcode is None or read == len(LENGTHS) - LIMIT
        assert published(tmp_path) == [shard_path(tmp_path, index).name for index in range(read, read + LIMIT)]
        reader.acknowledge(read + 1)
    producer.join(DEADLINE)
    assert producer.exitcode == 0
    assert max(held) == LIMIT


def test_ranks_that_record_out_of_order_never_take_the_room_of_the_shard_that_is_waited_for(tmp_path: Path) -> None:
    ranks = [SpoolWriter(tmp_path, RECORDING, LENGTHS, LIMIT) for _ in range(2)]
    fast = [index for index in ranks[1].missing() if index % 2]
    for index in fast[:1]:
        ranks[1].wait_for_room(index, go_on)
        publish(tmp_path, index, shard(index))
    with pytest.raises(Interrupted, match="shard 3 of 8 has no room in .* before the trainer's next checkpoint"):
        ranks[1].wait_for_room(fast[1], stopping)
    ranks[0].wait_for_room(0, stopping)
    ranks[0].wait_for_room(2, stopping)


def stopping(state: str) -> None:
    raise Interrupted(state)


def test_samples_in_any_order_within_the_bound(tmp_path: Path, manifest: Manifest, offline: list[str]) -> None:
    writer = SpoolWriter(tmp_path, RECORDING, LENGTHS, LIMIT)
    for index in range(LIMIT):
        publish(tmp_path, index, shard(index))
    reader = SpoolReader(tmp_path, manifest, stopping)
    assert (len(reader), reader.lengths()) == (SAMPLES, [length for lengths in LENGTHS for length in lengths])
    for number in (5, 0, 3, 1, 5, 2, 4):
        assert digest(reader[number]) == offline[number]
        assert reader.loss_mask(number).equal(reader[number].loss_mask)
    assert (reader.recorded(1, 3), reader.recorded(2, 4)) == (True, False)
    assert (reader.shards, reader.samples_of(1, 3), reader.samples_of(6, 9)) == (8, range(2, 6), range(11, 14))
    with pytest.raises(Interrupted, match="shard 3 of 8 is not recorded yet"):
        reader[6]
    for outside in (-1, SAMPLES):
        with pytest.raises(IndexError):
            reader[outside]
    reader.acknowledge(2)
    assert consumed(tmp_path) == 2
    assert writer.missing() == [3, 4, 5, 6, 7]
    assert writer.done(0) and writer.done(2) and not writer.done(3)
    reader.acknowledge(1)  # as a trainer does that went on from an older checkpoint, and comes by again
    assert consumed(tmp_path) == 2


def test_a_checkpoint_older_than_the_spool_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    SpoolWriter(tmp_path, RECORDING, LENGTHS, LIMIT)
    SpoolReader(tmp_path, manifest, stopping).acknowledge(2)
    complaint = (
        "spool = .*: shard 1 was consumed, as were all before shard 2: .*; go on from that checkpoint, or record"
    )
    with pytest.raises(UserError, match=complaint):
        SpoolReader(tmp_path, manifest, stopping)[2]


def test_what_a_killed_reader_left_is_deleted_before_its_place_is_taken(tmp_path: Path, manifest: Manifest) -> None:
    writer = SpoolWriter(tmp_path, RECORDING, LENGTHS, LIMIT)
    for index in range(LIMIT):
        publish(tmp_path, index, shard(index))
    write_atomic(tmp_path / spool.CONSUMED, b'{"shards": 1}')
    writer.wait_for_room(3, stopping)
    assert published(tmp_path) == [shard_path(tmp_path, index).name for index in (1, 2)]
    write_atomic(tmp_path / spool.CONSUMED, b'{"shards": 2}')
    SpoolReader(tmp_path, manifest, stopping)
    assert published(tmp_path) == [shard_path(tmp_path, 2).name]


def test_another_plan_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    SpoolWriter(tmp_path, RECORDING, LENGTHS, LIMIT)
    SpoolWriter(tmp_path, RECORDING, LENGTHS, LIMIT + 1)
    with pytest.raises(UserError, match="spool = .*: it was planned for another recording; delete"):
        SpoolWriter(tmp_path, RECORDING, LENGTHS[1:], LIMIT)
    with pytest.raises(UserError, match="spool = .*: it was planned for another recording; delete"):
        SpoolWriter(tmp_path, "cd" * 32, LENGTHS, LIMIT)
    with pytest.raises(UserError, match="spool = .*: it belongs to another recording than the held-out store; delete"):
        SpoolReader(tmp_path, replace(manifest, recording="cd" * 32), stopping)
    publish(tmp_path, 0, shard(1))
    with pytest.raises(UserError, match=r"its samples are not those of plan.json"):
        SpoolReader(tmp_path, manifest, stopping)[0]


def test_a_reader_may_come_first(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(Interrupted, match="holds no plan yet"):
        SpoolReader(tmp_path, manifest, stopping)


def test_a_long_wait_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spool, "PATIENCE", 0.0)
    writer = SpoolWriter(tmp_path, RECORDING, LENGTHS, LIMIT)
    states: list[str] = []

    def check(state: str) -> None:
        states.append(state)
        if len(states) == 3:
            write_atomic(tmp_path / spool.CONSUMED, b'{"shards": 1}')

    writer.wait_for_room(LIMIT, check)
    assert len(states) == 3
    assert capsys.readouterr().err.startswith("waiting for 0 s: shard 3 of 8 has no room")


def test_a_shard_is_marked_before_it_is_deleted(tmp_path: Path, manifest: Manifest, crashing) -> None:
    writer = SpoolWriter(tmp_path, RECORDING, LENGTHS, LIMIT)
    for moment in range(1, 100):
        publish(tmp_path, 0, shard(0))
        with crashing(moment) as crash:
            SpoolReader(tmp_path, manifest, stopping).acknowledge(1)
        assert writer.done(0)
        if not crash.happened:
            break
        (tmp_path / spool.CONSUMED).unlink(missing_ok=True)
    assert moment > 5 and published(tmp_path) == []


def test_what_another_rank_acknowledged_is_let_go(tmp_path: Path, manifest: Manifest) -> None:
    SpoolWriter(tmp_path, RECORDING, LENGTHS, LIMIT)
    for index in range(LIMIT):
        publish(tmp_path, index, shard(index))
    main, other = (SpoolReader(tmp_path, manifest, stopping) for _ in range(2))
    for reader in (main, other):
        assert reader[0].id == "sample-0"
    main.acknowledge(1)
    assert other[2].id == "sample-2"
    with pytest.raises(UserError, match="shard 0 was consumed"):
        other[0]
