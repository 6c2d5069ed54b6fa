"""Real ranks of the embedded target, killed where they stand; whoever goes on, the store is the same to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from eagle3.configs import loader
from eagle3.configs.settings import RecordSettings, Settings, TargetSettings
from eagle3.data.prepare import prepare
from eagle3.data.record import record
from eagle3.data.regenerate import regenerate
from eagle3.data.shards import PATTERN, Shard, read_entry
from eagle3.data.store import Store
from eagle3.models.target import load_target

PROMPTS = {"train": 120, "validation": 4, "test": 4}
WAIT, LONGEST = 120, 0.3  # seconds: for shards to come, and the longest moment between them and the kill

Launch = Callable[[Path, int], subprocess.Popen[str]]


@pytest.fixture(scope="module")
def embedded(recipe: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A recipe that records some hundred small shards of the target that ships."""
    folder = tmp_path_factory.mktemp("embedded")
    rows = [
        {"source": "sums", "split": split, "prompt": f"What does f{number}({split}) return?"}
        for split, count in PROMPTS.items()
        for number in range(count)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = replace(
        recipe,
        target=TargetSettings(),
        prepare=replace(recipe.prepare, prompts=str(folder / "prompts.jsonl"), **PROMPTS),
        regenerate=replace(recipe.regenerate, max_new_tokens=16, batch_size=64),
        record=RecordSettings(batch_tokens=40, shard_tokens=40),
    )
    (folder / "recipe.yaml").write_text(loader.dump(settings))
    return replace(settings, run=replace(settings.run, root=str(folder), name="whole"))


@pytest.fixture(scope="module")
def whole(embedded: Settings) -> Path:
    """The run as one process records it that nobody disturbs."""
    run, target = Path(embedded.run.root) / embedded.run.name, load_target(embedded.target)
    prepare(embedded, run, target.tokenizer)
    regenerate(embedded, run, target)
    record(embedded, run, target)
    return run


@pytest.fixture
def launch(embedded: Settings) -> Iterator[Launch]:
    """``launch(run, 2)`` starts two ranks that record what is missing."""
    started = []

    def start(run: Path, ranks: int) -> subprocess.Popen[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", ranks, "--master-port", port]
        command = ["-m", "eagle3", "record", Path(embedded.run.root) / "recipe.yaml", f"run.root={run.parent}"]
        process = subprocess.Popen(
            [str(word) for word in (*torchrun, *command, f"run.name={run.name}")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in (*workers(process), process.pid):
            if process.poll() is None:
                os.kill(pid, signal.SIGKILL)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The ranks that a launcher started, in order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = [int(pid) for pid in children.read_text().split()] if process.poll() is None else []
    ranks = {}
    for pid in pids:
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                ranks[int(variable[5:])] = pid
    return [ranks[rank] for rank in sorted(ranks)]


def shards(run: Path) -> list[Path]:
    return sorted((run / "store").glob(PATTERN))


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the store but the ranks' locks, temporaries too, with its content."""
    files = (path for path in (run / "store").rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("course", ["2, its rank 0; 1; 2; 3", "2; 3, its rank 1; 1"])
def test_killed_again_and_again(whole: Path, launch: Launch, tmp_path: Path, course: str) -> None:
    """How many ranks record, start after start; all of them are killed, or the one that is named, but for the last."""
    run, expected, chance = tmp_path / "run", contents(whole), random.Random(course)
    shutil.copytree(whole / "conversations", run / "conversations")
    *starts, (last, _, _) = (start.partition(", its rank ") for start in course.split("; "))
    for ranks, _, alone in starts:
        process, there = launch(run, int(ranks)), len(shards(run))
        deadline = time.monotonic() + WAIT
        while len(shards(run)) < there + 8 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, LONGEST))
        pids = workers(process)
        assert len(pids) == int(ranks)
        for pid in [pids[int(alone)]] if alone else [process.pid, *pids]:
            os.kill(pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=WAIT)
        assert process.returncode != 0, said
        assert there < len(shards(run)) < len(shards(whole)) and not (run / "store" / "manifest.json").exists(), said
        for shard in shards(run):
            Shard.open(shard.parent, read_entry(shard))
            assert shard.read_bytes() == expected[f"store/{shard.name}"]
    process = launch(run, int(last))
    said, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0, said
    assert contents(run) == expected
    assert Store(run / "store").verify() == []
