"""A live engine beside our own decoder: the same tokens, and as many drafted ones accepted at every position.

    served = ask(connect("http://127.0.0.1:8000"), prompts, max_new_tokens=128)
    differences(target, prompts, ours, served)     # [] if the engine runs the head that was trained

Counters are those of all the engine's users, so nobody else may ask it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, NamedTuple

from ..configs.drafting import chain as chain_of
from ..models.draft import Eagle3Draft
from .engines import AnyTarget, make_drafters, make_verifier
from .live import Counters, LiveEngine
from .speculate import Limits, Sampling, decode
from .stage import compare
from .traces import Round

TOLERANCE = 0.01  # by which accepted counts may differ, of ours
AT_ONCE = 8  # requests in flight


class Served(NamedTuple):
    """Greedy answers, token ids each, and what was counted while they were made."""

    answers: list[list[int]]
    counters: Counters


def ask(engine: LiveEngine, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Served:
    """Let ``engine`` answer ``prompts`` (token ids) greedily."""
    before = engine.counters()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = list(threads.map(lambda prompt: engine.greedy(prompt, max_new_tokens), prompts))
    return Served(answers, engine.counters().since(before))


def decode_all(
    target: AnyTarget,
    draft: Eagle3Draft | None,
    prompts: Sequence[Sequence[int]],
    chain: int,
    max_new_tokens: int,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> Served:
    """The same with our own decoder; plain decoding without a ``draft``. ``advance`` is told of every answer's tokens."""
    capacity = room(prompts, chain, max_new_tokens)
    verifier = make_verifier(target, capacity)
    drafter = None
    if draft is not None:
        (drafter,) = make_drafters([chain_of(chain)], target, draft, capacity).values()
    answers, rounds = [], list[Round]()
    for prompt in prompts:
        decoded = decode(prompt, verifier, drafter, Limits(max_new_tokens, target.info.eos_ids), Sampling(0.0))
        answers.append(decoded.ids)
        rounds += decoded.rounds
        advance(len(decoded.ids))
    return Served(
        answers,
        Counters.of_positions(len(rounds), [sum(entry.accepted > at for entry in rounds) for at in range(chain)]),
    )


def room(prompts: Sequence[Sequence[int]], chain: int, max_new_tokens: int) -> int:
    """What the caches of :func:`decode_all` hold."""
    return max(map(len, prompts)) + max_new_tokens + chain + 1


def differences(target: AnyTarget, prompts: Sequence[Sequence[int]], ours: Served, theirs: Served) -> list[str]:
    """Where the engine says or accepts something else, each in a line; [] if nowhere.

    An answer may differ after a tie of the target's two best logits, and lack its end token. Accepted counts may differ
    by a hundredth; an engine that does not count by position is compared over all of them.
    """
    found = []
    for number, (prompt, mine, other) in enumerate(zip(prompts, ours.answers, theirs.answers, strict=True), 1):
        if mine[-1] in target.info.eos_ids and other == mine[:-1]:
            continue
        if (lossless := compare(target, list(prompt), mine, other)).diverged:
            problem = f"it says something else from token {lossless.position} on, where the two best logits are"
            found.append(f"prompt {number}: {problem} {lossless.gap:.2g} apart")
    kept, counted = ours.counters, theirs.counters
    if counted.rounds == 0:
        return [*found, "it has drafted nothing: it was started without the head, or counts under other names"]
    if len(counted.by_position) > len(kept.by_position):
        drafted = len(counted.by_position)
        return [*found, f"it drafts {drafted} tokens a round, and {len(kept.by_position)} were compared"]
    places = [("in all", kept.accepted, counted.accepted)]
    if counted.by_position:  # as far as it ever accepted one
        pairs = zip_longest(kept.by_position, counted.by_position, fillvalue=0)
        places = [
            (f"position {at}", ours_there, theirs_there) for at, (ours_there, theirs_there) in enumerate(pairs, 1)
        ]
    for place, wanted, accepted in places:
        if abs(accepted - wanted) > TOLERANCE * wanted:
            found.append(f"{place}: it accepted {accepted:,} drafted tokens, and our decoder {wanted:,}")
    if abs(counted.rounds - kept.rounds) > TOLERANCE * kept.rounds:
        found.append(f"it took {counted.rounds:,} rounds, and our decoder {kept.rounds:,}")
    return found
