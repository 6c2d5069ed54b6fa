"""What half the disk costs: acceptance of heads trained on FP8 recordings beside those trained on bfloat16 ones.

    python -m eagle3.train.bench.store_dtypes tiny --seeds 5 --workers 8 --out train/bench/results/<hardware>/store_dtypes.json

Every choice is recorded once and trained on with every seed. All heads are then measured on the same bfloat16 recordings
of greedy held-out answers, since in serving the states come fresh from the target. Differences are paired by seed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ...configs.entry import finish
from ...configs.errors import UserError
from ...configs.loader import load
from ...configs.settings import Settings
from ...data.files import encode_json, write_atomic
from ...data.store import Store
from ...models.checkpoint import load_draft
from ..batches import collate
from ..module import TrainingTimeTest
from ..validate import Tally, validation_parts

REFERENCE = "bfloat16"
CHOICES = {
    REFERENCE: ("record.features_dtype=bfloat16", "record.last_hidden_dtype=bfloat16"),
    "features in FP8": ("record.features_dtype=float8_e4m3fn", "record.last_hidden_dtype=bfloat16"),
    "all in FP8": ("record.features_dtype=float8_e4m3fn", "record.last_hidden_dtype=float8_e4m3fn"),
}
LIMIT = -0.02  # performance.md's: the largest loss of acceptance length that a default may have, with 95% confidence
T_975 = {5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's t, two-sided 95%, by seeds


def main(arguments: Sequence[str] | None = None) -> None:
    """Record, train and measure; print a table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(prog="store_dtypes", description=__doc__.partition("\n")[0])
    parser.add_argument("config", help="a recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.name=value")
    parser.add_argument("--root", type=Path, default=Path("runs/store_dtypes"), help="folder of the runs")
    said = "a run's conversations/ with answers; without it they are made anew"
    parser.add_argument("--conversations", type=Path, help=said)
    parser.add_argument("--seeds", type=int, default=5, help="5 to 10; default %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="trainings at once; default %(default)s")
    parser.add_argument("--hardware", default="", help="the machine's name, for the results file")
    parser.add_argument("--commit", default="", help="the commit that is measured, for the results file")
    parser.add_argument("--out", type=Path, help="where to write the results")
    asked = parser.parse_args(arguments)
    if asked.seeds not in T_975:
        raise UserError("--seeds", asked.seeds, "the interval needs a few, and a few will do", "give 5 to 10")
    lengths = measure(asked)
    found = [compared(name, lengths) for name in CHOICES]
    for line in found:
        change = f"{line.change:+.2%}, 95% lower bound {line.bound:+.2%}"
        print(f"{line.name:<16} AL {line.length:.3f}  {change}", flush=True)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(asked.out, encode_json([_result(asked, line, lengths) for line in found[1:]]))


class Compared(NamedTuple):
    """A choice's mean acceptance length, and its mean change against bfloat16's with the lower bound of its interval."""

    name: str
    length: float
    change: float
    bound: float


def compared(name: str, lengths: dict[str, list[float]]) -> Compared:
    """``name`` against the reference, paired by seed."""
    changes = [theirs / ours - 1 for theirs, ours in zip(lengths[name], lengths[REFERENCE], strict=True)]
    half = T_975[len(changes)] * statistics.stdev(changes) / len(changes) ** 0.5
    mean = statistics.mean(changes)
    return Compared(name, statistics.mean(lengths[name]), mean, mean - half)


def measure(asked: argparse.Namespace) -> dict[str, list[float]]:
    """Simulated acceptance length on held-out answers, by choice and seed."""
    if asked.conversations is None:
        stage("prepare", asked, "source")
        stage("regenerate", asked, "source")
    for name, chosen in CHOICES.items():
        folder = asked.root / _slug(name)
        answered = asked.conversations or asked.root / "source" / "conversations"
        shutil.copytree(answered, folder / "conversations", dirs_exist_ok=True)
        stage("record", asked, folder.name, *chosen)
    jobs = [(name, seed) for seed in range(asked.seeds) for name in CHOICES]
    for name, seed in jobs:
        run = asked.root / f"{_slug(name)}-{seed}"
        run.mkdir(exist_ok=True)
        if not (run / "store").exists():
            (run / "store").symlink_to(Path("..") / _slug(name) / "store")
    with ThreadPoolExecutor(asked.workers) as pool:
        trainings = [
            pool.submit(stage, "train", asked, f"{_slug(name)}-{seed}", f"run.seed={seed}", *CHOICES[name])
            for name, seed in jobs
        ]
        for number, training in enumerate(trainings, 1):
            training.result()
            print(f"{number} of {len(jobs)} heads are trained", flush=True)
    store, settings = Store(asked.root / _slug(REFERENCE) / "store"), load(asked.config, asked.overrides)
    return {
        name: [
            simulated(asked.root / f"{_slug(name)}-{seed}" / "draft", store, settings) for seed in range(asked.seeds)
        ]
        for name in CHOICES
    }


def stage(name: str, asked: argparse.Namespace, run: str, *overrides: str) -> None:
    """Run one stage in a process of its own, which is skipped if it is done."""
    threads = max(1, (os.cpu_count() or 1) // (asked.workers if name == "train" else 1))
    command = [sys.executable, "-m", "eagle3", name, asked.config, *asked.overrides]
    command += [f"run.root={asked.root}", f"run.name={run}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


@torch.no_grad()
def simulated(draft: Path, store: Store, settings: Settings) -> float:
    """Acceptance length of the head in ``draft`` along the held-out answers in ``store``, by a chain of evaluation's."""
    head, chain = store.head(), settings.eval.fixed_chain
    rolled = replace(settings.train, ttt_steps=chain)
    module = TrainingTimeTest(load_draft(draft), head.embedding.float(), head.lm_head.float(), rolled).eval()
    tally, lengths = Tally(chain, chain), store.lengths()
    for split in ("validation", "test"):
        for part in validation_parts(store.indices(split), lengths, 0, 1):
            batch = collate([store[index] for index in part]).on(head.embedding.device)
            tally.add(batch, module(batch))
    return tally.result().acceptance_length


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def _result(asked: argparse.Namespace, line: Compared, lengths: dict[str, list[float]]) -> dict[str, object]:
    recipe = " ".join([asked.config, *asked.overrides])
    by_seed = {name: [round(value, 4) for value in lengths[name]] for name in (REFERENCE, line.name)}
    return {
        "benchmark": "store dtypes",
        "hardware": asked.hardware,
        "commit": asked.commit,
        "versions": {"torch": torch.__version__},
        "shape": f"{recipe}, {asked.seeds} seeds, {line.name}",
        "unit": "simulated acceptance length",
        "value": round(line.length, 4),
        "reference": {"name": REFERENCE, "value": round(statistics.mean(lengths[REFERENCE]), 4)},
        "ratio": round(1 + line.change, 4),
        "limit": 1 + LIMIT,
        "notes": f"paired by seed: 95% lower bound of the ratio {1 + line.bound:.4f}; {by_seed}",
    }


if __name__ == "__main__":
    sys.exit(finish(main))
