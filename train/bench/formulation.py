"""How fast, and in how much memory, the head trains beside the reference formulation of the training-time test.

    python -m eagle3.train.bench.formulation                     # 2 documents of 512 tokens, V = 32,768, on this CPU
    python -m eagle3.train.bench.formulation --objective lk      # the default is the one that published trainers have

First all rungs of :mod:`.ladder`, from the reference to ours, must compute the same losses and gradients. Then each takes
whole optimiser steps in turn: same weights, documents, float32, threads and micro-batch, no compilation. Memory is what a
step takes at most above what is resident once model, optimiser and documents exist, in a process and thread of its own.

Time and memory depend on how much of the documents is prompt, so there are two tables. Weights and states are random:
neither depends on them.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from ...configs.entry import finish
from ...configs.errors import Incomplete
from ...data.bench.sides import LEAST, Spent, check_rounds, compare, in_turn, measure, result, write
from .head import Preset
from .ladder import CAUSES, PRESETS, Ladder, Rung, memory_of

TOLERANCE = 1e-5  # performance.md's, as are the limits
LEAST_SPEED, MOST_MEMORY = 2.0, 0.5
PROMPTS = {"half of the tokens prompt": 0.5, "no prompt": 0.0}  # share of every document


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, measure, print, and write where it is asked for."""
    asked = _parse(arguments)
    check_rounds(asked.rounds)
    preset = PRESETS[asked.preset]
    print(f"{_shape(asked, preset)}, {torch.get_num_threads()} threads, {asked.rounds} rounds", flush=True)
    print("every line keeps the gains of those above it", flush=True)
    results = list[dict[str, object]]()
    for name, share in PROMPTS.items():
        results += _measure(asked, preset, name, int(share * preset.length))
    if asked.out:
        write(asked.out, results)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="formulation", description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="cpu", help="shapes; default %(default)s")
    parser.add_argument("--objective", choices=("kl", "lk"), default="kl", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=LEAST, help=f"at least {LEAST}; default %(default)s")
    parser.add_argument("--hardware", default=platform.processor(), help="the machine's name, for the results file")
    parser.add_argument("--commit", default="", help="the commit that is measured, for the results file")
    parser.add_argument("--out", type=Path, help="where to write the results")
    return parser.parse_args(arguments)


def _shape(asked: argparse.Namespace, preset: Preset) -> str:
    config = preset.config
    sizes = f"H {config.hidden_size}, I {config.intermediate_size}, D {config.draft_vocab_size}, V {config.vocab_size}"
    return f"{preset.documents} documents of {preset.length} tokens, {sizes}, {asked.objective}, float32"


def _measure(asked: argparse.Namespace, preset: Preset, name: str, prompt: int) -> list[dict[str, object]]:
    ladder = Ladder(preset, prompt, asked.objective)
    agreed = check(ladder)
    print(f"{name}; {agreed}", flush=True)
    spent = in_turn({rung.name: partial(measure, partial(ladder.step, rung)) for rung in Rung}, asked.rounds)
    memory = peaks(preset, prompt, asked.objective)
    if memory is None:
        print(
            "  memory: not measured; what was resident at most is reset by /proc/self/clear_refs, which is not to be had"
        )
    for rung in Rung:
        print(f"  {CAUSES[rung]:<48} {_line(spent, memory, preset.documents * preset.length, rung)}", flush=True)
    return _results(asked, preset, f"{name}; {agreed}", spent, memory)


def check(ladder: Ladder) -> str:
    """Compare every rung with ours; returns what was found.

    Raises:
        Incomplete: one of them computes something else.
    """
    wanted = ladder.losses_and_gradients(Rung.OURS)
    found = {rung: ladder.errors(rung, wanted) for rung in Rung if rung is not Rung.OURS}
    failed = {rung: errors for rung, errors in found.items() if not all(error <= TOLERANCE for error in errors)}
    if failed:
        said = (
            f"'{CAUSES[rung]}', losses {losses:.1e}, gradients {more:.1e}" for rung, (losses, more) in failed.items()
        )
        raise Incomplete(f"not equal to ours, relative [at most {TOLERANCE:.0e}]: {'; '.join(said)}")
    losses, gradients = (max(column) for column in zip(*found.values(), strict=True))
    return f"equal losses to {losses:.0e} and gradients to {gradients:.0e}, relative [at most {TOLERANCE:.0e}]"


def peaks(preset: Preset, prompt: int, kind: str) -> dict[str, int] | None:
    """Bytes that a step of each rung takes, above what is resident before it; None where the system cannot tell."""
    context = get_context("forkserver")  # whose processes begin without this one's memory
    # The last is what the first optimiser imports, which takes longer than all the rest.
    context.set_forkserver_preload([memory_of.__module__, measure.__module__, "torch._dynamo"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        found = list(pool.map(partial(memory_of, preset, prompt, kind), Rung))
    known = {rung.name: size for rung, size in zip(Rung, found, strict=True) if size is not None}
    return known if len(known) == len(Rung) else None


def _line(spent: Mapping[str, Sequence[Spent]], memory: Mapping[str, int] | None, tokens: int, rung: Rung) -> str:
    found, ours = compare(spent[rung.name], spent[Rung.REFERENCE.name]), rung is Rung.OURS
    said = f"{tokens / found.value:>7,.0f} tokens/s {found.ratio:5.2f} x"
    said += f" [at least {LEAST_SPEED:g}]" if ours else ""
    if memory:
        ratio = memory[rung.name] / memory[Rung.REFERENCE.name]
        said += f", {memory[rung.name] / 2**20:>5,.0f} MiB {ratio:.2f} x" + (
            f" [at most {MOST_MEMORY:g}]" if ours else ""
        )
    return said


def _results(
    asked: argparse.Namespace,
    preset: Preset,
    name: str,
    spent: Mapping[str, Sequence[Spent]],
    memory: Mapping[str, int] | None,
) -> list[dict[str, object]]:
    tokens, (reference, ours) = preset.documents * preset.length, (Rung.REFERENCE, Rung.OURS)
    found = compare(spent[ours.name], spent[reference.name])
    shape = f"{name.partition(';')[0]}, {_shape(asked, preset)}, {torch.get_num_threads()} threads"
    speeds = {CAUSES[rung]: round(tokens / compare(spent[rung.name], spent[reference.name]).value, 1) for rung in Rung}
    first, last = speeds[CAUSES[reference]], speeds[CAUSES[ours]]
    notes = f"{name}; medians of {asked.rounds} rounds; of processor time {found.cpu:.3f}; tokens/s by cause: {speeds}"
    written = partial(result, asked)
    lines = [
        written("training, speed", shape, "tokens/s", last, (CAUSES[reference], first), LEAST_SPEED, notes, found.ratio)
    ]
    if memory:
        sizes = {CAUSES[rung]: round(memory[rung.name] / 2**20, 1) for rung in Rung}
        first, last = sizes[CAUSES[reference]], sizes[CAUSES[ours]]
        notes = f"above what is resident before a step; by cause: {sizes}"
        lines.append(
            written(
                "training, memory", shape, "MiB", last, (CAUSES[reference], first), MOST_MEMORY, notes, last / first
            )
        )
    return lines


if __name__ == "__main__":
    sys.exit(finish(main))
