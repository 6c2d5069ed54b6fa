"""How fast one user is answered: the native engine beside transformers, with a draft and without, chains and trees.

    make demo && python -m eagle3.eval.bench.decoding

A run's head answers its test prompts greedily. In every round each prompt is answered by all sides, one right after the
other; speeds are TPS/user (tokens after the first / time after the first), and a ratio is the median over the rounds.
Then the rounds of a side are timed from inside: the target's verify, the draft's own forwards, and all else.

Last come the timings (``--only timings``; :mod:`.timings`): a token, verifies, the draft and rounds, by thread count, on
an idle machine and beside busy cores. ``--isa avx2`` measures as on a CPU without AVX-512, in a new process with the
variables of :data:`.machine.RESTRICTIONS` set; ``--against before.json`` prints earlier results beside the new ones.
"""

from __future__ import annotations

import argparse
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
from ...data.bench.sides import LEAST, check_rounds, result, write
from ...data.stage import at_least
from ...models.native.draft import NativeDraft
from ...models.native.target import NativeTarget
from ...models.target import DTYPES, Target, load_target, located, reader
from ..drafters import ChainDrafter, Head, TreeDrafter
from ..speculate import Drafter, NativeVerifier, Sampling, TargetVerifier, Verifier, decode
from ..trees import TreeShape
from .comparison import compared, read_results
from .former import PlainHead
from .inside import inside
from .machine import RESTRICTIONS, commit, hardware, restrict
from .timings import thread_counts, timings
from .workload import Workload, load_checked, read_workload

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
    """A workload, its target thrice, and its head in two forms."""

    workload: Workload
    model: Any
    former: Target
    native: NativeTarget
    capacity: int
    heads: Callable[[int], Head]
    plain_head: Head


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; print tables, and write the results where they are asked for."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    asked = _options().parse_args(given)
    check_rounds(asked.rounds)
    for option in ("prompts", "chain", "longer"):
        at_least(f"--{option}", getattr(asked, option), 1)
    thread_counts(asked.threads)
    try:
        parse(f"tree {'/'.join(map(str, asked.tree))}")
    except ValueError as error:
        remedy = "give nodes, levels and children of a node, such as 60 7 10"
        raise UserError("--tree", " ".join(map(str, asked.tree)), str(error), remedy) from None
    before = None if asked.against is None else read_results(asked.against, "--against")
    restrict(asked.isa, "eagle3.eval.bench.decoding", given)
    asked.hardware, asked.commit = hardware(asked.hardware), commit(asked.commit)
    workload = read_workload(asked.run, asked.target, asked.prompts)
    print(f"{asked.hardware}; commit {asked.commit or '-'}", flush=True)
    results = list[dict[str, object]]()
    if asked.only != "timings":
        shape = TreeShape(*asked.tree)
        proposal = max(asked.chain, asked.longer, 1 + shape.total, shape.depth * shape.top_k)
        results += measure(load_subject(workload, proposal), asked.longer, shape, asked)
    if asked.only != "decoding":
        results += timings(workload, asked)
    if asked.out:
        write(asked.out, results)
    if before is not None:
        for line in compared(before, results):
            print(line)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="decoding", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="a trained run; default %(default)s")
    parser.add_argument("--target", help='a folder, a hub name or "embedded"; default the one of the run\'s recipe')
    parser.add_argument("--only", choices=("decoding", "timings"), help="measure one of the two; default both")
    parser.add_argument("--prompts", type=int, default=8, help="test prompts that are answered; default %(default)s")
    parser.add_argument("--chain", type=int, default=5, help="tokens of a chain; default %(default)s")
    parser.add_argument("--longer", type=int, default=7, help="a second chain's tokens; default %(default)s")
    parser.add_argument("--tree", type=int, nargs=3, default=(60, 7, 10), metavar=("TOTAL", "DEPTH", "TOP_K"))
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        help="thread counts of the timings; default 1, 2, 4, ... and that of the cores",
    )
    parser.add_argument("--rounds", type=int, default=LEAST, help=f"at least {LEAST}; default %(default)s")
    parser.add_argument("--isa", choices=RESTRICTIONS, help="compute with these instructions and no later ones")
    parser.add_argument("--hardware", default="", help="the machine's name; default processor, cores and instructions")
    parser.add_argument("--commit", default="", help="the commit that is measured; default the repository's")
    parser.add_argument("--out", type=Path, help="where to write the results")
    parser.add_argument("--against", type=Path, help="earlier results, to print beside the new ones")
    return parser


def load_subject(workload: Workload, proposal: int) -> Subject:
    """The target in each engine, with room for a ``proposal`` of so many tokens."""
    capacity = workload.longest + 1 + proposal
    former, native = load_target(workload.target), load_checked(workload, capacity)
    draft = workload.draft.to(native.device, native.dtype)
    path, where = located(workload.target)
    config = AutoConfig.from_pretrained(path, **where)
    model = reader(config).from_pretrained(path, config=config, dtype=DTYPES[workload.target.dtype], **where).eval()
    return Subject(
        workload,
        model.to(native.device),
        former,
        native,
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


def sides_of(subject: Subject, chain: int, longer: int, shape: TreeShape) -> dict[str, Side]:
    """All that answers."""
    limits = subject.workload.limits
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
            max_new_tokens=limits.max_new_tokens,
            eos_token_id=list(limits.end_ids),
            pad_token_id=0,
        )
        return Answered(said[0, len(prompt) :].tolist(), clock.times[-1] - clock.times[1], [], [])

    def decoded(verifier: Verifier, drafter: Drafter | None) -> Side:
        def answer(prompt: list[int]) -> Answered:
            found = decode(prompt, verifier, drafter, limits, Sampling())
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
    info, chain, prompts = subject.native.info, asked.chain, subject.workload.prompts
    sides = sides_of(subject, chain, longer, shape)
    print(f"{info.name}, {info.dtype}, {subject.native.device}, {torch.get_num_threads()} threads", end="; ")
    print(f"{len(prompts)} test prompts of {asked.run}, T=0, batch 1; chain of {chain}", flush=True)
    for side in sides.values():
        side(prompts[0])
    rounds = []
    for number in range(asked.rounds):
        print(f"decoding: round {number + 1} of {asked.rounds}", file=sys.stderr, flush=True)
        rounds.append(_round(prompts, sides))
    speeds = {name: [_speed(found[name]) for found in rounds] for name in sides}
    answers, plain = rounds[0], rounds[0][PLAIN]
    print(f"  {'':<28} {'TPS/user':>8} {'ms a round':>11} {'AL':>6} {'drafted':>8} {'accepted':>9}  as plain")
    for name in sides:
        speed = statistics.median(speeds[name])
        print(f"  {name:<28} {speed:8.1f} {_described(answers[name], plain, speed)}", flush=True)
    shown = f"{info.name}, {info.dtype}, {len(prompts)} prompts, chain {chain}, T=0, batch 1, {asked.run}"
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


def _round(prompts: Sequence[list[int]], sides: dict[str, Side]) -> dict[str, list[Answered]]:
    found: dict[str, list[Answered]] = {name: [] for name in sides}
    for number, prompt in enumerate(prompts):
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
    chain, results = asked.chain, list[dict[str, object]]()
    workload = subject.workload
    drafters: dict[str, tuple[Callable[[Head], Drafter], int]] = {
        CHAIN: (lambda head: ChainDrafter(head, chain), chain),
        f"native, chain {longer}": (lambda head: ChainDrafter(head, longer), longer),
        "native, tree": (lambda head: TreeDrafter(head, shape), shape.depth * shape.top_k),
    }
    for name, (drafter_of, drafted) in drafters.items():
        head = subject.heads(drafted)
        turns = [
            inside(subject.native, head, drafter_of, workload.prompts, workload.limits, subject.capacity)
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
