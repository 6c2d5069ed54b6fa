"""Measuring several things side by side: in turn, in one process, so that a busy machine is as busy for each of them."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from ...configs.errors import UserError
from ..files import encode_json, write_atomic

LEAST = 5  # rounds of which a median is taken


class Spent(NamedTuple):
    """Seconds of the clock, and of all this process's threads on the processor."""

    wall: float
    cpu: float


def measure(run: Callable[[], object]) -> Spent:
    """What one call of ``run`` takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(runs: Mapping[str, Callable[[], Spent]], rounds: int) -> dict[str, list[Spent]]:
    """Every one of ``runs`` once to warm up, then all of them one after the other, ``rounds`` times."""
    for run in runs.values():
        run()
    spent: dict[str, list[Spent]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            spent[name].append(run())
    return spent


class Compared(NamedTuple):
    """Medians over the rounds: seconds of ``value`` and ``reference``, and how fast the one is in terms of the other.

    ``cpu`` is the same ratio of processor seconds: what would be left of the speed if nothing ran beside anything.
    """

    value: float
    reference: float
    ratio: float
    cpu: float


def compare(value: Sequence[Spent], reference: Sequence[Spent]) -> Compared:
    """``value`` against ``reference``, round by round."""
    pairs = list(zip(value, reference, strict=True))
    return Compared(
        statistics.median(ours.wall for ours in value),
        statistics.median(theirs.wall for theirs in reference),
        statistics.median(theirs.wall / ours.wall for ours, theirs in pairs),
        statistics.median(theirs.cpu / ours.cpu for ours, theirs in pairs),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--rounds", type=int, default=LEAST, help=f"at least {LEAST}; default %(default)s")
    parser.add_argument("--folder", type=Path, help="where temporary stores are written; default the system's choice")
    parser.add_argument("--hardware", default=platform.processor(), help="the machine's name, for the results file")
    parser.add_argument("--commit", default="", help="the commit that is measured, for the results file")
    parser.add_argument("--out", type=Path, help="where to write the results")


def check_rounds(rounds: int) -> None:
    """Refuse too few rounds."""
    if rounds < LEAST:
        raise UserError("--rounds", rounds, "a median of so few says little", f"give {LEAST} or more")


def result(
    asked: argparse.Namespace,
    benchmark: str,
    shape: str,
    unit: str,
    value: float,
    reference: tuple[str, float],
    limit: float,
    notes: str,
    ratio: float,
) -> dict[str, object]:
    """One line of a results file."""
    return {
        "benchmark": benchmark,
        "hardware": asked.hardware,
        "commit": asked.commit,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": shape,
        "unit": unit,
        "value": value,
        "reference": {"name": reference[0], "value": reference[1]},
        "ratio": round(ratio, 4),
        "limit": limit,
        "notes": notes,
    }


def write(path: Path, results: Sequence[dict[str, object]]) -> None:
    """Write a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encode_json(list(results)))
