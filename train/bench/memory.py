"""Is the memory that ``eagle3 plan`` predicts what training takes: three shapes on this CPU, part by part.

    python -m eagle3.train.bench.memory

Each shape takes real steps of its optimizer on the plain path in float32, twice: in this process, where every storage is counted
from when it is made until it is freed, and in a fresh one, whose resident memory is read. Exit code 3 if a part that
matters, or the whole, is not as predicted.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from ...configs.entry import finish
from ...configs.errors import Incomplete
from ...configs.settings import TrainSettings
from ...data.quantise import encode
from ...data.units import in_bytes
from ...models.draft import DraftConfig, Eagle3Draft
from ...models.memory import Micro, Numbers, memory, states
from ..batches import Collated
from ..module import TrainingTimeTest
from ..optimizer import make_optimizer
from .ledger import Ledger

ID = 4  # bytes of a token's id as it is stored, which stays beside the one that is computed with
LIMIT = 0.15  # of what was predicted
MATTERS = 0.05  # of the peak: a smaller part may be off by more
RESIDENT = "all, resident"
STATUS = Path("/proc/self/status")
#: glibc hands a block of this size back to the system when it is freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MAKERS = {
    "Eagle3Draft.queries": "attention",
    "Eagle3Draft.keys_values": "attention",
    "_past": "attention",
    "_attend": "attention",
    "SwiGLU.forward": "mlp",
    "Eagle3Draft.logits": "logits",
    "RowLosses.forward": "logits",
    "RMSNorm.forward": "rest",
}


class Shape(NamedTuple):
    """A head, its steps, and documents as the tokens of prompt and answer in turn."""

    config: DraftConfig
    steps: int
    documents: tuple[tuple[int, ...], ...]
    stored: str
    optimizer: str = "adamw"


SHAPES = {
    "answers alone": Shape(
        DraftConfig(288, 1152, 9, 3, 32, 7000, 3200, (1, 4, 8), 1e-5, 10_000.0, 4096),
        6, ((1, 280), (3, 270), (2, 240), (1, 200)), "float8_e4m3fn",
    ),
    "long prompts, turns": Shape(
        DraftConfig(160, 896, 4, 4, 64, 6500, 6500, (2, 4, 8, 9), 1e-5, 10_000.0, 4096),
        4, ((380, 90, 130, 50), (520, 90), (410, 140)), "bfloat16",
    ),
    "a large head": Shape(
        DraftConfig(704, 1856, 11, 1, 64, 11_000, 2800, (1, 2, 3), 1e-5, 10_000.0, 4096),
        3, ((40, 80), (35, 50), (15, 65)), "float8_e4m3fn",
    ),
    "a large head by Muon": Shape(
        DraftConfig(704, 1856, 11, 1, 64, 11_000, 2800, (1, 2, 3), 1e-5, 10_000.0, 4096),
        3, ((40, 80), (35, 50), (15, 65)), "float8_e4m3fn", "muon",
    ),
    "tiny": Shape(
        DraftConfig(16, 24, 2, 1, 16, 90, 50, (1, 2, 3), 1e-5, 10_000.0, 512), 2, ((3, 12), (2, 5)), "float8_e4m3fn"
    ),
}  # fmt: skip


class Run:
    """A head of a shape in training, with its batch."""

    def __init__(self, shape: Shape) -> None:
        torch.manual_seed(0)
        config = shape.config
        mapped = config.draft_vocab_size < config.vocab_size
        draft = Eagle3Draft(config, torch.arange(config.draft_vocab_size) if mapped else None)
        self.ends = (
            torch.randn(config.vocab_size, config.hidden_size),
            torch.randn(config.vocab_size, config.hidden_size),
        )
        settings = TrainSettings(ttt_steps=shape.steps, optimizer=shape.optimizer)
        self.module = TrainingTimeTest(draft, *self.ends, settings)
        self.optimizer = make_optimizer(draft, torch.ones(len(config.target_layers)), settings)
        self.batch, self.clip = collated(shape), settings.clip

    def step(self, ledger: Ledger | None = None) -> None:
        """As the loop of ``eagle3 train`` takes it; ``ledger`` is told what is what."""
        parameters = list(self.module.parameters())
        if ledger is not None:
            state = [each for kept in self.optimizer.state.values() for each in kept.values()]
            for name, tensors in (("weights", parameters), ("optimiser", state), ("the target's ends", self.ends)):
                ledger.adopt(name, tensors)
            ledger.adopt("batch", [*self.batch[:3], *self.batch.stored.values()])
        with ledger or nullcontext():
            batch = self.batch.on(torch.device("cpu"))
            if ledger is not None:
                ledger.adopt("batch", batch)
            trained = self.module(batch)
            del batch
            if ledger is not None:
                ledger.keep()
            trained.loss.backward()
            if ledger is not None:
                ledger.adopt("gradients", [each.grad for each in parameters if each.grad is not None])
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()


def collated(shape: Shape) -> Collated:
    """Random documents of the shape, as a store has them."""
    config = shape.config
    turns = [[torch.full((count,), bool(turn % 2)) for turn, count in enumerate(each)] for each in shape.documents]
    masks = [torch.cat(each) for each in turns]
    mask = torch.cat(masks)
    features = torch.randn(len(mask), len(config.target_layers), config.hidden_size)
    last = torch.randn(len(mask), config.hidden_size)
    stored = encode("features", features, shape.stored) | encode("last_hidden", last, shape.stored)
    ids = torch.randint(config.vocab_size, (len(mask),), dtype=torch.int32)
    return Collated(ids, mask, torch.tensor([len(each) for each in masks]), stored)


def predicted(shape: Shape) -> dict[str, int]:
    """What ``eagle3 plan`` would say."""
    config, batch = shape.config, collated(shape)
    micro = Micro.of(batch.loss_mask, batch.lengths, shape.steps)
    decoded = shape.stored == "float8_e4m3fn"
    stored = sum(tensor.nbytes for tensor in batch.stored.values()) // micro.tokens if decoded else 0
    held = states(config, shape.optimizer, None, 1, cpu=True)
    return memory(config, micro, held, Numbers(4, 4, 2, 4), kernels=False, beside=stored + ID)


def counted(shape: Shape) -> dict[str, int]:
    """What a step holds, after one that made the optimiser's state."""
    run, ledger = Run(shape), Ledger(MAKERS, "rest")
    run.step()
    gc.collect()
    run.step(ledger)
    return ledger.peaks()


def resident(name: str) -> int | None:
    """Bytes by which a fresh process grows that takes the same steps; None where the system does not tell."""
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", __spec__.name, "--alone", name]
    said = subprocess.run(command, env=os.environ | MALLOC, check=True, capture_output=True, text=True).stdout
    return int(said)


def grown(shape: Shape) -> int:
    """Bytes by which this process's memory grows at most while a run is made and takes two steps."""
    Run(SHAPES["tiny"]).step()  # libraries' own memory
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far is forgotten
    run = Run(shape)
    run.step()
    run.step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    (found,) = re.findall(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return 1024 * int(found)


def compare(name: str) -> list[str]:
    """Print a shape's table; returns what is not as predicted."""
    wanted, found = predicted(SHAPES[name]), counted(SHAPES[name])
    wanted[RESIDENT], total = wanted["all"], found["all"]
    if (taken := resident(name)) is not None:
        found[RESIDENT] = taken
    print(f"{name}\n  {'':17}  predicted   measured  ratio")
    off = []
    for part, size in wanted.items():
        if part not in found:
            continue
        ratio = size / max(1, found[part])
        print(f"  {part:17} {in_bytes(size):>10} {in_bytes(found[part]):>10} {ratio:>6.2f}", flush=True)
        if abs(ratio - 1) > LIMIT and max(size, found[part]) > MATTERS * total:
            off.append(f"{name}: {part} {ratio:.2f}")
    return off


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare all shapes, or those asked for."""
    parser = argparse.ArgumentParser(prog="memory", description=__doc__.partition("\n")[0])
    usual = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=usual, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--alone", choices=SHAPES, metavar="SHAPE", help="print how far this process grows, in bytes")
    asked = parser.parse_args(arguments)
    if asked.alone:
        print(grown(SHAPES[asked.alone]))
        return
    off = [line for name in asked.shapes for line in compare(name)]
    if off:
        raise Incomplete(f"predicted over measured is off by more than {LIMIT:.0%}: {'; '.join(off)}")


if __name__ == "__main__":
    sys.exit(finish(main))
