"""A store of a million samples opens at once, in little memory, and gives any of them at once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
from eagle3.data.files import tensor_file, write_listed
from eagle3.data.index import Index
from eagle3.data.manifest import INDEX, SCHEMA, Manifest, write_manifest
from eagle3.data.shards import publish

SHARDS, EACH, DIGITS = 20, 50_000, 8

READ = """
import json, random, sys, time
from pathlib import Path
from eagle3.data.store import Store
start = time.perf_counter()
store = Store(Path(sys.argv[1]))
opened, samples, random = time.perf_counter() - start, len(store), random.Random(0)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
memory, slowest = int(status["VmHWM"].split()[0]) / 1000, []  # getrusage would count the parent's too
for index in [random.randrange(samples) for _ in range(300)]:
    start = time.perf_counter()
    sample = store[index]
    slowest.append(time.perf_counter() - start)
    assert sample.id == f"{index:08d}" and sample.input_ids.tolist() == [index], sample
median = sorted(slowest)[150]
print(json.dumps({"samples": samples, "opened_s": opened, "memory_mb": memory, "sample_s": median}))
"""


def index_of(first: int, count: int) -> Index:
    """Samples of one token each, called by their number."""
    names = "".join(f"{number:0{DIGITS}d}" for number in range(first, first + count)).encode()
    return Index(
        ("words",),
        ("train",),
        torch.arange(count + 1),
        torch.zeros(count, dtype=torch.int32),
        torch.zeros(count, dtype=torch.int32),
        torch.zeros(count, dtype=torch.float64),
        torch.ones(count, dtype=torch.int64),
        torch.arange(count + 1) * DIGITS,
        torch.frombuffer(bytearray(names), dtype=torch.uint8),
    )


def test_a_million_samples(tmp_path: Path) -> None:
    recording = hashlib.sha256(b"many").hexdigest()
    entries = []
    for shard in range(SHARDS):
        packed = {
            "input_ids": torch.arange(shard * EACH, (shard + 1) * EACH, dtype=torch.int32),
            "loss_mask": torch.ones(EACH, dtype=torch.bool),
            "features": torch.ones(EACH, 1, 1, dtype=torch.bfloat16),
            "last_hidden": torch.ones(EACH, 1, dtype=torch.bfloat16),
        }
        entries.append(publish(tmp_path, shard, recording, index_of(shard * EACH, EACH), packed, 0, 0))
    index = index_of(0, SHARDS * EACH)
    parts = tensor_file(index.tensors(), {**index.metadata(), "recording": recording})
    manifest = Manifest(
        schema=SCHEMA,
        recording=recording,
        recipe={},
        target={"layers": [0], "hidden_size": 1},
        tokenizer_sha256="",
        chat_template_sha256="",
        last_hidden="after the final norm",
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in packed.items()},
        samples=len(index),
        tokens=len(index),
        supervised_tokens=len(index),
        greedy_tokens=0,
        disagreeing=0,
        files={INDEX: write_listed(tmp_path / INDEX, *parts)},
        shards=tuple(entries),
    )
    write_manifest(tmp_path, manifest)
    read = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(read.stdout)
    assert found["samples"] == 1_000_000
    assert found["opened_s"] < 2 and found["memory_mb"] < 300 and found["sample_s"] < 0.005, found
