"""Which training recipe gives the better head: acceptance length on validation prompts, over seeds, and what it costs.

    python -m eagle3.eval.bench.recipes configs/tiny.yaml --run runs/tiny --seeds 5

Every variant of the recipe is trained with every seed on the recorded store of a finished run, and its head decodes the
validation prompts with the native engine; test prompts are not touched. Differences to the first variant are paired by
seed, with 95% intervals of Student's t. What is trained or decoded already is taken as it is, so that a run that was
interrupted goes on; to begin anew, delete ``--root``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...configs.drafting import chain
from ...configs.entry import finish
from ...configs.errors import Incomplete, UserError
from ...configs.loader import load
from ...data.bench.sides import result, write
from ...data.chat import prompt_ids
from ...data.choice import deal
from ...data.conversations import read_conversations
from ...data.corpus import digest
from ...data.files import encode_json, file_sha256, write_atomic
from ...data.manifest import MANIFEST
from ...data.stage import at_least
from ...models.checkpoint import CONFIG, WEIGHTS, load_draft
from ...models.target import load_text
from ..engines import AnyTarget, load_engine, make_drafters, make_verifier
from ..speculate import Limits, Sampling, decode

MUON = ("train.optimizer=muon", "train.clip=1.0", "train.schedule=linear")
NORMS = ("draft.fc_norm=true", "draft.norm_output=true")
#: Overrides by the name of a variant. The first that is asked for is what the others are compared with.
VARIANTS: dict[str, tuple[str, ...]] = {
    "adamw (former)": (),
    "norms": NORMS,
    "muon": MUON,
    "muon + norms": (*MUON, *NORMS),
}
TEMPERATURES = (0.0, 1.0)
#: Student's t, two-sided 95%, by seeds.
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Head(NamedTuple):
    """A trained head: acceptance length by temperature, seconds of processor time of its training, and its size."""

    lengths: tuple[float, ...]
    cpu_s: float
    parameters: int


class Difference(NamedTuple):
    """The mean difference to the first variant, paired by seed, and half its 95% interval (None for one seed)."""

    mean: float
    half: float | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and decode what is missing; print a table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(prog="recipes", description=__doc__.partition("\n")[0])
    parser.add_argument("config", help="a recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.name=value", help="for all variants")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="whose store is trained on; %(default)s")
    parser.add_argument("--root", type=Path, default=Path("runs/recipes"), help="folder of the heads; %(default)s")
    known = ", ".join(VARIANTS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help=f'{known}, or "NAME: section.name=value"')
    parser.add_argument("--seeds", type=int, default=5, help="1 to 10; default %(default)s")
    parser.add_argument("--chain", type=int, default=5, help="drafted tokens a round; default %(default)s")
    parser.add_argument("--prompts", type=int, default=48, help="validation prompts at most; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of a training; default %(default)s")
    parser.add_argument("--hardware", default="", help="the machine's name, for the results file")
    parser.add_argument("--commit", default="", help="the commit that is measured, for the results file")
    parser.add_argument("--out", type=Path, help="where to write the results")
    asked = parser.parse_args(arguments)
    if not 1 <= asked.seeds <= max(T_975):
        raise UserError("--seeds", asked.seeds, "the interval needs a few, and a few will do", "give 1 to 10")
    for option in ("chain", "prompts", "threads"):
        at_least(f"--{option}", getattr(asked, option), 1)
    variants = dict(map(variant, asked.variants))
    heads = measure(asked, variants)
    print("\n".join(table(heads)), flush=True)
    if asked.out:
        write(asked.out, results(asked, variants, heads))


def variant(said: str) -> tuple[str, tuple[str, ...]]:
    """The name of a variant, and its overrides, which follow a colon where it is none of VARIANTS."""
    name, colon, overrides = said.partition(":")
    if not colon and name not in VARIANTS:
        remedy = f'give {", ".join(VARIANTS)}, or "NAME: section.name=value ..."'
        raise UserError("--variants", said, "there is no such variant", remedy)
    return name.strip(), tuple(overrides.split()) if colon else VARIANTS[name]


def measure(asked: argparse.Namespace, variants: dict[str, tuple[str, ...]]) -> dict[str, list[Head]]:
    """Every variant's heads, by seed."""
    run = asked.run.resolve()
    for path in (run / "store" / MANIFEST, run / "conversations" / "prompts.jsonl"):
        if not path.is_file():
            raise UserError("--run", asked.run, f"there is no {path}", "give a run whose states are recorded")
    for overrides in variants.values():
        load(
            asked.config, [*asked.overrides, *overrides]
        )  # report a mistake in any variant before the first is trained
    bench = Bench(asked, run)
    heads: dict[str, list[Head]] = {name: [] for name in variants}
    total = asked.seeds * len(variants)
    for seed in range(asked.seeds):
        for name, overrides in variants.items():
            folder = asked.root / f"{_slug(name)}-{seed}"
            cpu_s = train(asked, run, folder, (*overrides, f"run.seed={seed}"))
            lengths, parameters = bench.decoded(folder)
            heads[name].append(Head(lengths, cpu_s, parameters))
            shown = ", ".join(f"{each:.3f} at T={t:g}" for each, t in zip(lengths, TEMPERATURES, strict=True))
            number = sum(map(len, heads.values()))
            print(f"{number} of {total}: {name}, seed {seed}: AL {shown}; {cpu_s:.0f} s of CPU", flush=True)
    return heads


def train(asked: argparse.Namespace, run: Path, folder: Path, overrides: Sequence[str]) -> float:
    """Train in a process of its own, unless it is done; returns the processor seconds of all its starts that ended.

    Raises:
        Incomplete: it did not end well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("store", "conversations"):
        if not (folder / name).exists():
            (folder / name).symlink_to(run / name)
    spent = folder / "cpu.json"
    before = json.loads(spent.read_bytes())["cpu_s"] if spent.exists() else 0.0
    command = [sys.executable, "-m", "eagle3", "train", asked.config, *asked.overrides, *overrides]
    command += [f"run.root={asked.root}", f"run.name={folder.name}"]
    with (folder / "train.log").open("ab") as log:
        started = os.times()
        environment = os.environ | {"OMP_NUM_THREADS": str(asked.threads)}
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False)
        ended = os.times()
    seconds = ended.children_user - started.children_user + ended.children_system - started.children_system
    if not (folder / "draft" / CONFIG).exists() or done.returncode:
        write_atomic(spent, encode_json({"cpu_s": before + seconds, "done": False}))
        raise Incomplete(f"training {folder} ended with {done.returncode}: see {folder / 'train.log'}")
    if before and json.loads(spent.read_bytes())["done"]:
        return float(before)  # this start found nothing to do
    write_atomic(spent, encode_json({"cpu_s": before + seconds, "done": True}))
    return float(before + seconds)


class Bench:
    """What decodes: the target, loaded when the first head is there, and the validation prompts."""

    def __init__(self, asked: argparse.Namespace, run: Path) -> None:
        settings = load(asked.config, asked.overrides)
        self._target_settings = replace(settings.target, dtype=settings.eval.dtype)
        text = load_text(self._target_settings)
        found = [c for c in read_conversations(run / "conversations" / "prompts.jsonl") if c.split == "validation"]
        chosen = list(islice(deal(found), asked.prompts))
        if not chosen:
            raise UserError("--run", asked.run, "it has no validation prompts", "give one that has")
        self._prompts = [(c.id, prompt_ids(text.tokenizer, c)) for c in chosen]
        self._chain, self._drafting = asked.chain, settings.eval.sampling
        self._max_new_tokens = settings.eval.max_new_tokens
        longest = max(len(ids) for _, ids in self._prompts)
        self._capacity = longest + settings.eval.max_new_tokens + 1 + asked.chain
        self._target: AnyTarget | None = None

    def decoded(self, folder: Path) -> tuple[tuple[float, ...], int]:
        """The acceptance length at each temperature of the head in ``folder / "draft"``, and its parameters."""
        kept, key = folder / "decoded.json", self._key(folder / "draft")
        found: dict[str, Any] = json.loads(kept.read_bytes()) if kept.exists() else {}
        if found.get("key") != key:
            found = {"key": key} | self._decode(folder / "draft")
            write_atomic(kept, encode_json(found))
        return tuple(found["lengths"]), found["parameters"]

    def _key(self, draft: Path) -> list[object]:
        """All that the answers follow from, but for the target."""
        prompts = [prompt for prompt, _ in self._prompts]
        return [file_sha256(draft / WEIGHTS), self._chain, self._drafting, self._max_new_tokens, prompts]

    def _decode(self, path: Path) -> dict[str, Any]:
        if self._target is None:
            self._target = load_engine(self._target_settings, "native", self._capacity)
        draft = load_draft(path).eval()
        drafting = chain(self._chain)
        verifier = make_verifier(self._target, self._capacity)
        drafter = make_drafters([drafting], self._target, draft, self._capacity)[drafting.name]
        limits, lengths = Limits(self._max_new_tokens, self._target.info.eos_ids), []
        for temperature in TEMPERATURES:
            accepted = list[int]()
            for name, prompt in self._prompts:  # every head answers a prompt with the same seed
                sampling = Sampling(temperature, self._drafting, digest(f"recipes:{name}") % (1 << 31))
                answer = decode(prompt, verifier, drafter, limits, sampling)
                accepted += [each.accepted for each in answer.rounds if each.drafted]
            lengths.append(1 + sum(accepted) / max(1, len(accepted)))
        return {"lengths": lengths, "parameters": sum(p.numel() for p in draft.parameters())}


def difference(heads: dict[str, list[Head]], name: str, index: int) -> Difference:
    """That of the acceptance lengths at the temperature of ``index``."""
    first = next(iter(heads.values()))
    pairs = [ours.lengths[index] - base.lengths[index] for ours, base in zip(heads[name], first, strict=True)]
    mean = statistics.mean(pairs)
    if len(pairs) == 1:
        return Difference(mean, None)
    return Difference(mean, T_975[len(pairs)] * statistics.stdev(pairs) / len(pairs) ** 0.5)


def table(heads: dict[str, list[Head]]) -> list[str]:
    """One line a variant: acceptance length and difference at every temperature, processor seconds, parameters."""
    width = max(map(len, heads))
    shown = "".join(f"  {f'AL at T={t:g}':>10}  {'difference':<23}" for t in TEMPERATURES)
    lines = [f"{'':<{width}}{shown}  {'CPU s':>6}  parameters"]
    for number, (name, found) in enumerate(heads.items()):
        line = f"{name:<{width}}"
        for index in range(len(TEMPERATURES)):
            mean = statistics.mean(head.lengths[index] for head in found)
            line += f"  {mean:>10.3f}  {_shown(difference(heads, name, index)) if number else '':<23}"
        cpu = statistics.mean(head.cpu_s for head in found)
        lines.append(f"{line}  {cpu:>6.0f}  {found[0].parameters:,}")
    return lines


def _shown(found: Difference) -> str:
    if found.half is None:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} [{found.mean - found.half:+.3f}, {found.mean + found.half:+.3f}]"


def results(
    asked: argparse.Namespace, variants: dict[str, tuple[str, ...]], heads: dict[str, list[Head]]
) -> list[dict[str, object]]:
    """Lines of a results file: each variant but the first, at each temperature."""
    first, *others = heads
    recipe, lines = " ".join([asked.config, *asked.overrides]), list[dict[str, object]]()
    for name in others:
        for index, temperature in enumerate(TEMPERATURES):
            means = [statistics.mean(head.lengths[index] for head in heads[each]) for each in (name, first)]
            cpu = [statistics.mean(head.cpu_s for head in heads[each]) for each in (name, first)]
            by_seed = {each: [round(head.lengths[index], 4) for head in heads[each]] for each in (first, name)}
            shape = f"{recipe}, validation, chain {asked.chain}, T={temperature:g}, {asked.seeds} seeds, {name}"
            notes = f"{' '.join(variants[name]) or 'as it is'}; difference paired by seed, with its 95% interval: "
            notes += f"{_shown(difference(heads, name, index))}; {cpu[0]:.0f} against {cpu[1]:.0f} s of CPU; "
            notes += f"{heads[name][0].parameters:,} parameters; {by_seed}"
            value, base = (round(mean, 4) for mean in means)
            ratio = means[0] / means[1]
            lines.append(result(asked, "recipes", shape, "acceptance length", value, (first, base), 1.0, notes, ratio))
    return lines


def _slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(finish(main))
