"""A round from inside: the target's verify, the draft's own forwards, and all else.

spent = inside(target, head, lambda head: ChainDrafter(head, 5), prompts, limits, capacity=700)
spent.other                 # the share of a round that is neither
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ...models.native.target import NativeTarget
from ..drafters import Head
from ..speculate import Drafter, Limits, NativeVerifier, Sampling, decode


def now() -> float:
    """Seconds, once a GPU has done what it was asked for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Timed:
    """Anything, with the seconds of each call of its ``methods`` kept."""

    def __init__(self, inner: Any, *methods: str) -> None:
        self._inner = inner
        self.seconds: dict[str, list[float]] = {name: [] for name in methods}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in self.seconds:
            return found

        def timed(*arguments: Any) -> Any:
            started = now()
            returned = found(*arguments)
            self.seconds[name].append(now() - started)
            return returned

        return timed


class Inside(NamedTuple):
    """Seconds of rounds: of the target's verify, of the draft's forwards, of all, and how many there were."""

    verify: float
    draft: float
    whole: float
    rounds: int

    @property
    def other(self) -> float:
        """The share that is neither."""
        return 1 - (self.verify + self.draft) / self.whole


def inside(
    target: NativeTarget,
    head: Head,
    drafter_of: Callable[[Head], Drafter],
    prompts: Sequence[list[int]],
    limits: Limits,
    capacity: int,
) -> Inside:
    """Where the time of greedy rounds goes, over all of ``prompts``; to ask a GPU for the time makes it wait."""
    found = list[Inside]()
    for prompt in prompts:
        timed_target: Any = Timed(target, "forward", "logits")
        timed_head: Any = Timed(head, "extend", "step", "logits")
        verifier = NativeVerifier(timed_target, capacity)
        answer = decode(prompt, verifier, drafter_of(timed_head), limits, Sampling())
        verify = sum(sum(calls[1:]) for calls in timed_target.seconds.values())  # the first ones ran over the prompt
        draft = sum(map(sum, timed_head.seconds.values()))
        found.append(Inside(verify, draft, answer.total_s - answer.ttft_s, len(answer.rounds)))
    return Inside(*(sum(each) for each in zip(*found, strict=True)))
