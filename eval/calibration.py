"""The chain that pays: chosen at each temperature, by measurement, before the test prompts are answered (``eval.chain: auto``).

    clock = clock_of(target.device, alone=True)
    calibrate({0.0: requests}, verifier, drafters, limits, clock)    # what calibration.json holds
    best_chain([1.3, 1.5, 1.4])                                      # 2; 0: plain decoding is the fastest

A round of a chain of k tokens emits E(k) = 1 + sum over i <= k of P(accepted >= i) tokens on average, so that it is
E(k) * (time of a plain token) / (time of the round) times as fast as plain decoding. P does not depend on k, as the same
tokens are drafted first: one pass with the longest chain says all of it. Times are those of whole rounds, with everything
that belongs to one: drafting, verification, what is decided, and the accepted tokens' rows in the head. Chains of all
lengths and plain tokens take turns of a few rounds along the same answers, in an order that is drawn anew each time, so that
whatever else the machine does falls on all, and of each the median counts; where one thread computes, its own time is taken, which
does not pass while another process has the core. Since no longer chain takes less, times that say so are averaged (isotonic
regression).

Validation prompts are answered and never test prompts. ``eval/calibration.json`` holds what was found, and is written before
the first answer to a test prompt; an evaluation that is resumed reads it:

    {"schema": 1, "measured": true, "prompts": 8, "tokens": 48, "temperatures": [{"temperature": 0.0, "chain": 3, "rounds":
    120, "acceptance_by_position": [...], "token_ms": 1.1, "round_ms": [...], "expected_speedup": [...]}]}

``chain`` is the choice. Lists have an item for each chain of 1, 2, ... tokens. Where nothing could be measured, ``measured``
is false, ``chain`` the fixed one, and there are no figures.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..configs.drafting import FIXED, LONGEST
from ..configs.errors import UserError
from .speculate import Drafter, Limits, Sampling, Verdict, Verifier, decode

Json = dict[str, Any]
Clock = Callable[[], float]
FILE = "calibration.json"
PROMPTS, TOKENS = 8, 96  # how many validation prompts are answered, and how far
TURNS = 8  # that each chain has
IN_A_ROW = 5  # rounds of a turn; the first is not counted, since caches hold what the turn before it needed
MARGIN = 0.02  # by which a longer chain must be faster to be chosen


class Request(NamedTuple):
    """A validation prompt and how it is answered."""

    prompt: list[int]
    sampling: Sampling


class Counted(NamedTuple):
    """``rounds`` of the longest chain, and the share of them that accepted at least i tokens: ``by_position[i - 1]``."""

    rounds: int
    by_position: list[float]


class Timed(NamedTuple):
    """Seconds of a plain token, and of a round of each chain: ``rounds[k - 1]``."""

    token: float
    rounds: list[float]


def calibrate(
    requests: Mapping[float, Sequence[Request]],
    verifier: Verifier,
    drafters: Sequence[Drafter],
    limits: Limits,
    clock: Clock,
) -> Json:
    """What calibration.json holds.

    Args:
        requests: by temperature.
        verifier: the target's, which all processes that hold it have.
        drafters: chains of 1, 2, ... tokens that share one head, so that each goes on where another was.
        limits: of the answers to the test prompts.
        clock: of :func:`clock_of`.
    """
    limits = limits._replace(max_new_tokens=min(TOKENS, limits.max_new_tokens))
    entries = []
    for temperature, asked in requests.items():
        counted = acceptance(asked, verifier, drafters[-1], limits)
        if not counted.rounds:
            unmeasured = [{"temperature": each, "chain": FIXED} for each in requests]
            return {"schema": 1, "measured": False, "prompts": 0, "tokens": 0, "temperatures": unmeasured}
        timed = costs(asked, verifier, drafters, limits.max_new_tokens, clock)
        entries.append(described(temperature, counted, timed))
    prompts = max(map(len, requests.values()))
    tokens = limits.max_new_tokens
    return {"schema": 1, "measured": True, "prompts": prompts, "tokens": tokens, "temperatures": entries}


def acceptance(requests: Sequence[Request], verifier: Verifier, longest: Drafter, limits: Limits) -> Counted:
    """How far the longest chain is accepted."""
    accepted = [
        entry.accepted
        for request in requests
        for entry in decode(request.prompt, verifier, longest, limits, request.sampling).rounds
    ]
    shares = [sum(count >= i for count in accepted) / max(len(accepted), 1) for i in range(1, LONGEST + 1)]
    return Counted(len(accepted), shares)


@torch.inference_mode()
def costs(
    requests: Sequence[Request],
    verifier: Verifier,
    drafters: Sequence[Drafter],
    tokens: int,
    clock: Clock,
    turns: int = TURNS,
) -> Timed:
    """What a plain token and a round of each chain take.

    Args:
        requests: answered one after the other, and anew, until there are enough rounds; end tokens do not end them.
        verifier: the target's.
        drafters: as for :func:`calibrate`.
        tokens: of an answer, 2 or more.
        clock: as for :func:`calibrate`.
        turns: of each chain that count; one more is taken first, to warm up.
    """
    drawn = random.Random(0)
    sizes = range(len(drafters) + 1)
    order = itertools.chain.from_iterable(drawn.sample(sizes, len(sizes)) for _ in range(turns + 1))
    lengths = (length for length in order for _ in range(IN_A_ROW))
    seconds: list[list[float]] = [[] for _ in sizes]
    head = drafters[0]
    for request in itertools.cycle(requests):
        verdict = verifier.start(request.prompt, request.sampling)
        for drafter in drafters:
            drafter.start(request.sampling)
        head.update(verdict)
        left, plain = tokens - 1, list[Verdict]()
        while left > 0:
            if (length := next(lengths, None)) is None:
                token, *rounds = rising([statistics.median(_settled(found)) for found in seconds])
                return Timed(token, rounds)
            if length:  # plain decoding needed no head, but this round does
                for missed in plain:
                    head.update(missed)
                plain.clear()
            started = clock()
            verdict = verifier.verify(drafters[length - 1].propose() if length else None)
            if length:
                head.update(verdict)
            else:
                plain.append(verdict)
            seconds[length].append(clock() - started)
            left -= len(verdict.tokens)
    raise ValueError("there are no requests")


def _settled(seconds: Sequence[float]) -> list[float]:
    """Without the first turn, and the first round of every other."""
    return [found for index, found in enumerate(seconds) if index >= IN_A_ROW and index % IN_A_ROW]


def rising(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls, by least squares: neighbours that fall are averaged (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and statistics.mean(pools[-2]) > statistics.mean(pools[-1]):
            last = pools.pop()
            pools[-1].extend(last)
    return [statistics.mean(pool) for pool in pools for _ in pool]


def clock_of(device: torch.device, alone: bool) -> Clock:
    """Seconds in which a device computes: a GPU's work is waited for, and of one thread only its own time counts.

    ``alone``: no other process computes with this one, for which it would wait without its time passing.
    """
    if device.type == "cuda":

        def waited() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return waited
    return time.thread_time if alone and torch.get_num_threads() == 1 else time.perf_counter


def expected_speedups(by_position: Sequence[float], timed: Timed) -> list[float]:
    """Of chains of 1, 2, ... tokens over plain decoding."""
    emitted = itertools.accumulate(by_position, initial=1.0)
    next(emitted)
    return [tokens * timed.token / seconds for tokens, seconds in zip(emitted, timed.rounds, strict=True)]


def best_chain(speedups: Sequence[float]) -> int:
    """The chain with the best speed-up, 0 for plain decoding; of those within :data:`MARGIN` the shortest."""
    every = [1.0, *speedups]
    return next(length for length, speedup in enumerate(every) if speedup >= max(every) * (1 - MARGIN))


def described(temperature: float, counted: Counted, timed: Timed) -> Json:
    """A temperature's entry of calibration.json, with the choice."""
    speedups = expected_speedups(counted.by_position, timed)
    return {
        "temperature": temperature,
        "chain": best_chain(speedups),
        "rounds": counted.rounds,
        "acceptance_by_position": list(counted.by_position),
        "token_ms": 1000 * timed.token,
        "round_ms": [1000 * seconds for seconds in timed.rounds],
        "expected_speedup": list(speedups),
    }


def read(folder: Path) -> Json | None:
    """The calibration of an evaluation; None where there is none yet.

    Raises:
        UserError: it is damaged, or lost while there are answers, whose draftings it chose.
    """
    path, traces = folder / FILE, folder / "traces.jsonl"
    remedy = f"delete {folder}, and run `eagle3 eval` again"
    if not path.exists():
        if traces.exists() and traces.stat().st_size:
            raise UserError("eval.chain", "auto", f"there are answers in {folder}, and no {FILE} any more", remedy)
        return None
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict) or "temperatures" not in found:
        raise UserError("eval.chain", "auto", f"{path} is damaged", remedy)
    return found


def words(calibration: Json) -> str:
    """The choice in a line."""
    if not calibration["measured"]:
        return f"eval: no round could be measured on validation prompts; eval.chain = auto is taken as {FIXED}"
    chosen = [f"{_name(entry['chain'])} at T={entry['temperature']:g}" for entry in calibration["temperatures"]]
    return f"eval: {', '.join(chosen)}, chosen on {calibration['prompts']} validation prompts"


def _name(length: int) -> str:
    return f"chain {length}" if length else "plain decoding"
