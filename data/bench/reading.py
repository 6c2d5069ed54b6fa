"""How fast random samples of a store are read beside a plain sequential read of the same bytes.

    python -m eagle3.data.bench.reading                       # 2.5 GB as Maverick's, 300 tokens a sample
    python -m eagle3.data.bench.reading --hidden 4096 --tokens 2000

The store is written first. In every round each of these runs once: a read of all its shards from end to end, in blocks
of ``BLOCK`` into one buffer, with the system told that it is sequential; and all samples in random order through
``Store``, some at a time as a trainer's batch, every byte copied once into memory that is used again.

Cold: the files were synced and the system dropped them from its memory, which is asked whether it did; what the disk
itself, or the host of a virtual machine, still holds is beyond its knowledge. Warm: all is in memory, and the store
newly opened. Again: the same store once more, its pages mapped. One thread copies. States in FP8 are copied as they are
stored, as a trainer on a GPU does; what a CPU needs to decode them is said apart.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...configs.entry import finish
from ...configs.errors import UserError
from ..files import tensor_file, write_listed
from ..index import Identity, Index
from ..manifest import INDEX, SCHEMA, Manifest, write_manifest
from ..mapped import resident
from ..quantise import E4M3, codes, dtype_name
from ..shards import PATTERN, publish
from ..store import Store
from ..units import in_bytes
from .sides import Compared, Spent, add_options, check_rounds, compare, in_turn, measure, result, write

LIMIT = 0.8  # performance.md's: the least of the sequential read's speed
BLOCK = 1 << 20
SHARD_TOKENS = 8192
COLD = 0.01  # most of a cold file that may be in memory
PATIENCE_S = 5.0  # until threads that still read have let go of it
STATES = ("features", "last_hidden")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; print a table, and write it where it is asked for."""
    asked = _parse(arguments)
    check_rounds(asked.rounds)
    torch.set_num_threads(1)
    results = list[dict[str, object]]()
    for dtype in asked.dtypes:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            make_store(Path(folder), asked, dtype)
            results += _measure(Path(folder), asked, dtype)
    if asked.out:
        write(asked.out, results)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reading", description=__doc__.partition("\n")[0])
    for name, default, said in (
        ("hidden", 5120, "width of a state"),
        ("features", 3, "captured layers"),
        ("tokens", 300, "of a sample"),
        ("samples", 200, "of the store"),
        ("together", 8, "samples of a batch"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{said}; default %(default)s")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float8_e4m3fn"), default=["bfloat16"])
    add_options(parser)
    return parser.parse_args(arguments)


def make_store(folder: Path, asked: argparse.Namespace, dtype: str) -> None:
    """Write a store of random states."""
    recording, each = hashlib.sha256(b"reading").hexdigest(), max(1, SHARD_TOKENS // asked.tokens)
    starts = range(0, asked.samples, each)
    packed = _packed(min(each, asked.samples) * asked.tokens, asked, dtype)
    entries = []
    for number, start in enumerate(starts):
        index = _index(start, min(start + each, asked.samples), asked.tokens)
        tokens = int(index.offsets[-1])
        entries.append(publish(folder, number, recording, index, {k: v[:tokens] for k, v in packed.items()}, 0, 0))
    whole = _index(0, asked.samples, asked.tokens)
    parts = tensor_file(whole.tensors(), {**whole.metadata(), "recording": recording})
    manifest = Manifest(
        schema=SCHEMA,
        recording=recording,
        recipe={},
        target={"layers": list(range(asked.features)), "hidden_size": asked.hidden},
        tokenizer_sha256="",
        chat_template_sha256="",
        last_hidden="",
        dtypes={name: dtype_name(tensor) for name, tensor in packed.items()},
        samples=len(whole),
        tokens=int(whole.offsets[-1]),
        supervised_tokens=0,
        greedy_tokens=0,
        disagreeing=0,
        files={INDEX: write_listed(folder / INDEX, *parts)},
        shards=tuple(entries),
    )
    write_manifest(folder, manifest)


def _packed(tokens: int, asked: argparse.Namespace, dtype: str) -> dict[str, Tensor]:
    """Tensors of one shard; states of random bytes, none of them NaN."""
    width, shapes = {"bfloat16": 2, "float8_e4m3fn": 1}[dtype], ((tokens, asked.features), (tokens,))
    packed = {
        "input_ids": torch.randint(1000, (tokens,), dtype=torch.int32),
        "loss_mask": torch.ones(tokens, dtype=torch.bool),
    }
    for name, shape in zip(STATES, shapes, strict=True):
        content = torch.randint(126, (*shape, asked.hidden * width), dtype=torch.uint8)
        packed[name] = content.view(E4M3 if dtype == "float8_e4m3fn" else torch.bfloat16)
        if dtype == "float8_e4m3fn":
            packed[f"{name}_scale"] = torch.ones(shape)
    return packed


def _index(start: int, end: int, tokens: int) -> Index:
    identities = [Identity(str(number), "random", "train", 1.0) for number in range(start, end)]
    return Index.of(identities, [tokens] * len(identities), [tokens] * len(identities))


def _measure(folder: Path, asked: argparse.Namespace, dtype: str) -> list[dict[str, object]]:
    paths = sorted(folder.glob(PATTERN))
    size = sum(path.stat().st_size for path in paths)
    reader = Reader(folder, asked.together)
    runs: dict[str, Callable[[], Spent]] = {
        "sequential, cold": partial(_after, partial(drop, paths), partial(sequential, paths)),
        "random, cold": partial(_after, partial(drop, paths), reader.read),
        "sequential, warm": partial(measure, partial(sequential, paths)),
        "random, warm": partial(measure, reader.read),
        "random, again": partial(_after, reader.open, partial(reader.read, anew=False)),
    }
    spent = in_turn(runs, asked.rounds)
    shape = f"{asked.hidden} wide, {asked.features} features, {asked.tokens} tokens a sample, {dtype}"
    print(f"{shape}: {in_bytes(size)} in {asked.samples} samples and {len(paths)} shards", flush=True)
    results = []
    for name, reference in (("cold", "cold"), ("warm", "warm"), ("again", "warm")):
        ours, theirs = spent[f"random, {name}"], spent[f"sequential, {reference}"]
        found = compare(ours, theirs)
        ratios = [round(plain.wall / read.wall, 3) for read, plain in zip(ours, theirs, strict=True)]
        print(f"  {name:<6} {_line(found, size)}", flush=True)
        notes = f"rounds: {ratios}; of processor time {found.cpu:.3f}; {asked.together} samples at a time"
        at = (f"sequential read, {reference}", round(size / found.reference / 1e9, 3))
        value = round(size / found.value / 1e9, 3)
        results.append(result(asked, f"random reads, {name}", shape, "GB/s", value, at, LIMIT, notes, found.ratio))
    if dtype == "float8_e4m3fn":
        decoding = measure(reader.decode).wall
        print(f"  to decode them takes one core {decoding / size * 1e9:.2f} s a GB", flush=True)
    return results


def _line(found: Compared, size: int) -> str:
    speeds = f"{in_bytes(size / found.value)}/s of {in_bytes(size / found.reference)}/s"
    return f"{speeds}: {found.ratio:.1%} [at least {LIMIT:.0%}], of processor time {found.cpu:.1%}"


def _after(prepare: Callable[[], object], run: Callable[[], object]) -> Spent:
    prepare()
    return measure(run)


class Reader:
    """All samples of the store in ``folder`` in random order, ``together`` at a time."""

    def __init__(self, folder: Path, together: int) -> None:
        self._folder, self._together = folder, together
        self._room: dict[str, Tensor] = {}
        self._store: Store | None = None

    def open(self) -> None:
        """A store all of whose pages are mapped."""
        self._store = Store(self._folder)
        self._read(self._store)

    def read(self, anew: bool = True) -> None:
        """Copy every byte once; of a store that was opened for it, or of the one that is open."""
        store = Store(self._folder) if anew or self._store is None else self._store
        self._store = None
        self._read(store)

    def decode(self) -> None:
        """All states to bfloat16."""
        store = Store(self._folder)
        for index in range(len(store)):
            _ = store[index].features, store[index].last_hidden

    def _read(self, store: Store) -> None:
        order = list(range(len(store)))
        random.Random(0).shuffle(order)
        for start in range(0, len(order), self._together):
            for sample in [store[index] for index in order[start : start + self._together]]:
                for name, tensor in {"ids": sample.input_ids, "mask": sample.loss_mask, **sample.stored}.items():
                    if name not in self._room:
                        self._room[name] = torch.zeros_like(codes(tensor))
                    self._room[name].copy_(codes(tensor))


def sequential(paths: Sequence[Path]) -> None:
    """Read every file from end to end."""
    buffer = bytearray(BLOCK)
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while os.readv(file, [buffer]):
            pass
        os.close(file)


def drop(paths: Sequence[Path]) -> None:
    """Make the system forget what it holds of files, once nobody maps them any more.

    Raises:
        UserError: it does not, as of files that it has nowhere else.
    """
    for path in paths:
        end = time.monotonic() + PATIENCE_S
        while (held := _forget(path)) > COLD:
            if time.monotonic() > end:
                problem = f"{held:.0%} of a file there stays in memory"
                raise UserError("--folder", path.parent, problem, "choose a folder on a disk")
            gc.collect()
            time.sleep(0.01)


def _forget(path: Path) -> float:
    """Drop what is in memory of a file; returns the share of it that is there nevertheless."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    return resident(torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8))


if __name__ == "__main__":
    sys.exit(finish(main))
