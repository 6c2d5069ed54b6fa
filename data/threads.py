"""How many threads a stage computes with on a CPU: one where its model is small, else as many as are measured to gain.

    with computing("eval", Work.of(shapes(target), rows=6), target.device, unit, folder):
        ...                                    # torch.get_num_threads() threads; those of before are restored afterwards

The threads of a product wait for each other at its end. On an idle machine that takes microseconds. Where another process
has one of the cores it takes until that process is done with its time slice, which is milliseconds, and a small model's
products are shorter than that by orders of magnitude: two threads then take many times as long as one. So a model whose
matrices and products are small computes with one thread, whatever the machine; one whose unit of work is too long to be
measured takes every core, as torch does by itself; in between :func:`calibrate` measures.

The choice is the user's where ``OMP_NUM_THREADS`` is set, as launchers such as torchrun set it. On a GPU nothing is chosen.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..configs import entry
from ..models.native.target import NativeTarget
from ..models.target import Target
from .files import encode_json, make_folder, write_atomic

FLOP_PER_S = 50e9  # of one core, in float32: what it does within a factor of two or three
#: Of an average product, for which two threads are not tried: 4 ms of one core, which is about a time slice.
SMALL_PRODUCT = 4e-3 * FLOP_PER_S
#: Numbers of an average matrix, likewise: 1 MB in float32, which one core has in its own cache.
SMALL_MATRIX = 2**18
#: Of a unit that is measured: 0.1 s of one core, so that a calibration is over in a second or two.
LONGEST_UNIT = 0.1 * FLOP_PER_S
FEWEST_ROWS = 8  # of a unit that was shortened; fewer would be another kind of work, bound by reading the weights
GAIN = 1.25  # how many times as fast twice the threads have to be
REPEATS = 6  # the first of them starts threads and fills caches
PATIENCE = 0.5  # seconds after which two counts of threads are not compared any longer

#: One unit of a stage's work, of at most so many rows.
Unit = Callable[[int], object]


class Work(NamedTuple):
    """One unit of a stage's work: ``rows`` are multiplied by each of ``matrices`` matrices of ``numbers`` in all."""

    matrices: int
    numbers: int
    rows: int

    @classmethod
    def of(cls, shapes: Iterable[Sequence[int]], rows: int) -> Work:
        """That with weights of ``shapes``: vectors do not count, and one of three dimensions holds several matrices."""
        weights = [shape for shape in shapes if len(shape) > 1]
        return cls(sum(math.prod(shape[:-2]) for shape in weights), sum(map(math.prod, weights)), rows)

    @property
    def small(self) -> bool:
        """Whether an average product is too short for threads to be worth their waiting."""
        average = self.numbers / max(1, self.matrices)
        return average <= SMALL_MATRIX and 2 * self.rows * average <= SMALL_PRODUCT

    @property
    def measurable_rows(self) -> int:
        """Rows of a unit that is short enough to be measured; 0 where it would be none of this work."""
        rows = min(self.rows, int(LONGEST_UNIT / (2 * max(1, self.numbers))))
        return rows if rows >= min(self.rows, FEWEST_ROWS) else 0


class Choice(NamedTuple):
    """How many threads, and why."""

    threads: int
    reason: str


@contextmanager
def computing(
    stage: str, work: Work, device: torch.device, unit: Unit | None = None, folder: Path | None = None
) -> Iterator[None]:
    """What a stage computes on a CPU with the threads that suit its work; the first process says how many they are.

    Threads that are started meanwhile, to load or to hash, begin with one each, so that they do not compete for its cores.

    Args:
        stage: its name.
        work: a unit of it.
        device: where it is done; nothing changes for a GPU.
        unit: does one, given its rows; None: nothing is measured.
        folder: the stage's, where what was measured is kept: a stage that is resumed computes as it began, so that its
            sums are rounded alike and its speeds are comparable.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.get_num_threads()
    try:
        chosen = choose(work, unit, None if folder is None else folder / f"{stage}.threads.json")
        if entry.first():
            print(f"{stage}: {_counted(chosen.threads)}: {chosen.reason}", flush=True)
        torch.set_num_threads(chosen.threads)
        with ThreadPoolExecutor(1) as other:
            other.submit(torch.set_num_threads, 1).result()  # its own, and what later threads begin with
        yield
    finally:
        torch.set_num_threads(before)


def choose(work: Work, unit: Unit | None, kept: Path | None = None) -> Choice:
    """How many threads ``work`` is done with; what is measured is written to ``kept``, and taken from there the next time.

    Several processes do not measure, since they would measure each other: each has its share of the cores.
    """
    if entry.REQUESTED_THREADS:
        return Choice(torch.get_num_threads(), "OMP_NUM_THREADS is set")
    if work.small:
        return Choice(1, "the model is small")
    if (cores := entry.own_cores()) == 1:
        return Choice(1, "there is one core for it")
    if unit is None or entry.started() > 1:
        return Choice(cores, "its share of the cores")
    if not (rows := work.measurable_rows):
        return Choice(cores, "the model is large")
    if kept is not None and kept.exists():
        return Choice(min(cores, json.loads(kept.read_bytes())["threads"]), "as was measured when the stage began")
    spent = calibrate(lambda: unit(rows), cores)
    threads = best(spent)
    if kept is not None:
        make_folder(kept.parent)
        write_atomic(kept, encode_json({"threads": threads}))
    measured = ", ".join(f"{1e3 * seconds:.1f} ms with {count}" for count, seconds in spent.items())
    return Choice(threads, f"its unit of work takes {measured}")


def calibrate(
    unit: Callable[[], object], most: int, clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Seconds of ``unit`` with 1, 2, 4, ... threads, ``most`` at most, up to the first count that gains too little.

    Each count takes turns with the one before it, and the least of some repeats counts: so a load that comes and goes
    falls on both. Leaves torch with whatever number of threads was the last.
    """
    spent, count = {1: math.inf}, 1
    while count < most:
        begun, more = clock(), min(2 * count, most)
        spent[more] = math.inf
        for _ in range(REPEATS):
            for threads in (count, more):
                torch.set_num_threads(threads)
                started = clock()
                unit()
                spent[threads] = min(spent[threads], clock() - started)
            if clock() - begun >= PATIENCE:
                break
        if not _gains(spent, count, more):
            break
        count = more
    return spent


def best(spent: dict[int, float]) -> int:
    """The threads that are worth it, of ``spent`` seconds by their count, ascending."""
    count = 1
    for more in list(spent)[1:]:
        if not _gains(spent, count, more):
            break
        count = more
    return count


def shapes(target: Target | NativeTarget) -> Iterator[Sequence[int]]:
    """Those of the weights that a target multiplies by."""
    tensors = target.model.parameters() if isinstance(target, Target) else _tensors(target.decoder.weights)
    return (tensor.shape for tensor in tensors)


def _gains(spent: dict[int, float], count: int, more: int) -> bool:
    return spent[count] >= spent[more] * GAIN ** math.log2(more / count)


def _tensors(weights: Any) -> Iterator[Tensor]:
    if isinstance(weights, Tensor):
        yield weights
    elif isinstance(weights, tuple):
        for part in weights:
            yield from _tensors(part)


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"
