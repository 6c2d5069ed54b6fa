"""How fast one user is answered: the native engine beside transformers, with a draft and without, chains and trees.

    make demo && python -m eagle3.eval.bench.decoding

A run's head answers its test prompts greedily. In every round each prompt is answered by all sides, one right after the
other; speeds are TPS/user (tokens after the first / time after the first), and a ratio is the median over the rounds.
Last, the rounds of a side are timed from inside: the target's verify, the draft's own forwards, and all else.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig
from transformers.generation.streamers import BaseStreamer

from ...configs.drafting import parse
from ...configs.entry import finish
from ...configs.errors import UserError
from ...configs.loader import load
from ...configs.settings import Settings
from ...data.bench.sides import LEAST, check_rounds, result, write
from ...data.chat import prompt_ids
from ...data.choice import deal
from ...data.conversations import read_conversations
from ...data.stage import at_least
from ...models.checkpoint import CONFIG, load_draft
from ...models.native.draft import NativeDraft
from ...models.native.loading import load_native
from ...models.native.target import NativeTarget
from ...models.target import DTYPES, Target, load_target, located, reader
from ..drafters import ChainDrafter, Head, TreeDrafter
from ..speculate import Drafter, Limits, NativeVerifier, Sampling, TargetVerifier, Verifier, decode
from ..trees import TreeShape
from .former import PlainHead
from .inside import inside

GENERATE = "transformers' generate"
FORMER_PLAIN, FORMER = "transformers' model", "transformers' model, chain"
PLAIN, CHAIN = "native", "native, chain"
#: What is compared with what, and the least that the ratio is to be.
LIMITS = ((PLAIN, GENERATE, 1.5), (CHAIN, FORMER, 1.5), (CHAIN, PLAIN, 2.0))
OTHER_LIMIT = 0.15  # most of a round that is neither the target's verify nor the draft's forwards


class Answered(NamedTuple):
    """One answer: seconds after its first token, and the rounds it took with the tokens they accepted."""

    ids: list[int]
    seconds: float
    accepted: list[int]
    drafted: list[int]


Side = Callable[[list[int]], Answered]


class Subject(NamedTuple):
    """A run's target twice, its head, its test prompts, and where answers end."""

    settings: Settings
    model: Any
    former: Target
    native: NativeTarget
    prompts: list[list[int]]
    limits: Limits
    capacity: int
    heads: Callable[[int], Head]
    plain_head: Head


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; print a table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(prog="decoding", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="a trained run; default %(default)s")
    parser.add_argument("--prompts", type=int, default=8, help="test prompts that are answered; default %(default)s")
    parser.add_argument("--longer", type=int, default=7, help="a second chain's tokens; default %(default)s")
    parser.add_argument("--tree", type=int, nargs=3, default=(60, 7, 10), metavar=("TOTAL", "DEPTH", "TOP_K"))
    parser.add_argument("--rounds", type=int, default=LEAST, help=f"at least {LEAST}; default %(default)s")
    parser.add_argument("--hardware", default="", help="the machine's name, for the results file")
    parser.add_argument("--commit", default="", help="the commit that is measured, for the results file")
    parser.add_argument("--out", type=Path, help="where to write the results")
    asked = parser.parse_args(arguments)
    check_rounds(asked.rounds)
    for option in ("prompts", "longer"):
        at_least(f"--{option}", getattr(asked, option), 1)
    try:
        parse(f"tree {'/'.join(map(str, asked.tree))}")
    except ValueError as error:
        remedy = "give nodes, levels and children of a node, such as 60 7 10"
        raise UserError("--tree", " ".join(map(str, asked.tree)), str(error), remedy) from None
    subject = read_subject(
        asked.run, asked.prompts, max(asked.longer, 1 + asked.tree[0], asked.tree[1] * asked.tree[2])
    )
    results = measure(subject, asked.longer, TreeShape(*asked.tree), asked)
    if asked.out:
        write(asked.out, results)


def read_subject(run: Path, count: int, proposal: int) -> Subject:
    """What is measured of a run; ``proposal`` is the room that the largest takes which it is asked for beside its own.

    Raises:
        UserError: it has no head.
    """
    if not (run / "draft" / CONFIG).is_file():
        raise UserError("--run", run, "it has no head", "give a trained run, such as that of `make demo`")
    settings = load(run / "config.yaml", [])
    target = dataclasses.replace(settings.target, dtype=settings.eval.dtype)
    former = load_target(target)
    chosen = [c for c in read_conversations(run / "conversations" / "prompts.jsonl") if c.split == "test"]
    prompts = [prompt_ids(former.tokenizer, conversation) for conversation in itertools.islice(deal(chosen), count)]
    capacity = max(map(len, prompts)) + settings.eval.max_new_tokens + 1 + max(settings.eval.fixed_chain, proposal)
    native = load_native(target, capacity)
    draft = load_draft(run / "draft").to(native.device, native.dtype).eval()
    path, where = located(target)
    config = AutoConfig.from_pretrained(path, **where)
    model = reader(config).from_pretrained(path, config=config, dtype=DTYPES[target.dtype], **where).eval()
    return Subject(
        settings,
        model.to(native.device),
        former,
        native,
        prompts,
        Limits(settings.eval.max_new_tokens, former.info.eos_ids),
        capacity,
        lambda drafted: NativeDraft(draft, native.head.embedding, capacity, drafted),
        PlainHead(draft, native.head.embedding, capacity),
    )


class _Clock(BaseStreamer):
    """When ``generate`` came to its first token; what it is given first is the prompt."""

    def __init__(self) -> None:
        self.times = list[float]()

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.times.append(time.perf_counter())


def sides_of(subject: Subject, longer: int, shape: TreeShape) -> dict[str, Side]:
    """All that answers."""
    chain = subject.settings.eval.fixed_chain
    former = TargetVerifier(subject.former, subject.capacity)
    native = NativeVerifier(subject.native, subject.capacity)

    def generated(prompt: list[int]) -> Answered:
        clock = _Clock()
        ids = torch.tensor([prompt], device=subject.native.device)
        said = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=clock,
            do_sample=False,
            max_new_tokens=subject.limits.max_new_tokens,
            eos_token_id=list(subject.limits.end_ids),
            pad_token_id=0,
        )
        return Answered(said[0, len(prompt) :].tolist(), clock.times[-1] - clock.times[1], [], [])

    def decoded(verifier: Verifier, drafter: Drafter | None) -> Side:
        def answer(prompt: list[int]) -> Answered:
            found = decode(prompt, verifier, drafter, subject.limits, Sampling())
            accepted, drafted = ([getattr(entry, name) for entry in found.rounds] for name in ("accepted", "drafted"))
            return Answered(found.ids, found.total_s - found.ttft_s, accepted, drafted)

        return answer

    return {
        GENERATE: generated,
        FORMER_PLAIN: decoded(former, None),
        FORMER: decoded(former, ChainDrafter(subject.plain_head, chain)),
        PLAIN: decoded(native, None),
        CHAIN: decoded(native, ChainDrafter(subject.heads(chain), chain)),
        f"native, chain {longer}": decoded(native, ChainDrafter(subject.heads(longer), longer)),
        f"native, tree {'/'.join(map(str, shape))}": decoded(
            native, TreeDrafter(subject.heads(shape.depth * shape.top_k), shape)
        ),
    }


def measure(subject: Subject, longer: int, shape: TreeShape, asked: argparse.Namespace) -> list[dict[str, object]]:
    """Print what there is to say, line by line; returns the lines of a results file."""
    sides = sides_of(subject, longer, shape)
    info, chain = subject.native.info, subject.settings.eval.fixed_chain
    print(f"{info.name}, {info.dtype}, {subject.native.device}, {torch.get_num_threads()} threads", end="; ")
    print(f"{len(subject.prompts)} test prompts of {asked.run}, T=0, batch 1; chain of {chain}", flush=True)
    for side in sides.values():
        side(subject.prompts[0])
    rounds = [_round(subject, sides) for _ in range(asked.rounds)]
    speeds = {name: [_speed(found[name]) for found in rounds] for name in sides}
    answers, plain = rounds[0], rounds[0][PLAIN]
    print(f"  {'':<28} {'TPS/user':>8} {'ms a round':>11} {'AL':>6} {'drafted':>8} {'accepted':>9}  as plain")
    for name in sides:
        speed = statistics.median(speeds[name])
        print(f"  {name:<28} {speed:8.1f} {_described(answers[name], plain, speed)}", flush=True)
    shown = f"{info.name}, {info.dtype}, {len(subject.prompts)} prompts, chain {chain}, T=0, batch 1, {asked.run}"
    results = list[dict[str, object]]()
    for name, reference, limit in LIMITS:
        ratios = [ours / theirs for ours, theirs in zip(speeds[name], speeds[reference], strict=True)]
        ratio = statistics.median(ratios)
        print(f"  {name} is {ratio:.2f} times as fast as {reference} [wanted: {limit:g}]", flush=True)
        value, beside = (round(statistics.median(speeds[each]), 1) for each in (name, reference))
        notes = f"{name}; rounds: {[round(each, 3) for each in ratios]}"
        results.append(result(asked, "decoding", shown, "TPS/user", value, (reference, beside), limit, notes, ratio))
    results += _insides(subject, longer, shape, asked, shown)
    return results


def _round(subject: Subject, sides: dict[str, Side]) -> dict[str, list[Answered]]:
    found: dict[str, list[Answered]] = {name: [] for name in sides}
    for number, prompt in enumerate(subject.prompts):
        names = list(sides)
        start = number % len(names)  # so that no side is always the first behind another
        for name in names[start:] + names[:start]:
            found[name].append(sides[name](prompt))
    return found


def _speed(answers: Sequence[Answered]) -> float:
    return sum(len(answer.ids) - 1 for answer in answers) / sum(answer.seconds for answer in answers)


def _described(answers: Sequence[Answered], plain: Sequence[Answered], speed: float) -> str:
    same = sum(ours.ids == theirs.ids for ours, theirs in zip(answers, plain, strict=True))
    accepted = [count for answer in answers for count in answer.accepted]
    drafted = [count for answer in answers for count in answer.drafted]
    tokens = sum(len(answer.ids) - 1 for answer in answers)
    steps = len(accepted) or tokens
    spent = 1e3 * tokens / speed / steps
    figures = f"{'-':>6} {'-':>8} {'-':>9}"
    if accepted:
        rate = sum(accepted) / sum(drafted)
        figures = f"{1 + sum(accepted) / steps:6.2f} {sum(drafted) / steps:8.1f} {rate:9.0%}"
    return f"{spent:11.2f} {figures}  {same} of {len(answers)}"


def _insides(
    subject: Subject, longer: int, shape: TreeShape, asked: argparse.Namespace, shown: str
) -> list[dict[str, object]]:
    chain, results = subject.settings.eval.fixed_chain, list[dict[str, object]]()
    drafters: dict[str, tuple[Callable[[Head], Drafter], int]] = {
        CHAIN: (lambda head: ChainDrafter(head, chain), chain),
        f"native, chain {longer}": (lambda head: ChainDrafter(head, longer), longer),
        "native, tree": (lambda head: TreeDrafter(head, shape), shape.depth * shape.top_k),
    }
    for name, (drafter_of, drafted) in drafters.items():
        head = subject.heads(drafted)
        turns = [
            inside(subject.native, head, drafter_of, subject.prompts, subject.limits, subject.capacity)
            for _ in range(asked.rounds)
        ]
        other = statistics.median(turn.other for turn in turns)
        verify, draft, whole = (
            statistics.median(1e3 * part(turn) / turn.rounds for turn in turns)
            for part in (lambda turn: turn.verify, lambda turn: turn.draft, lambda turn: turn.whole)
        )
        parts = f"verify {verify:.2f} ms, draft {draft:.2f} ms of {whole:.2f} ms"
        print(f"  {name}: a round is {parts}; other {other:.1%} [at most {OTHER_LIMIT:.0%}]", flush=True)
        reference = ("the whole round", round(whole, 3))
        notes = f"{name}; neither verify nor draft; {parts}"
        value = round(other * whole, 3)
        results.append(result(asked, "round", shown, "ms", value, reference, OTHER_LIMIT, notes, other))
    return results


if __name__ == "__main__":
    sys.exit(finish(main))
