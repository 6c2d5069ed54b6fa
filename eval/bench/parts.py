"""The parts of a round, each of which can be timed alone: the target's verifies, the draft head's forwards, whole rounds.

    operations = load_operations(workload, context=128, chain=5)
    operations[TOKEN].prepare()
    operations[TOKEN].run()

Shapes: T tokens, F features, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...models.native.cache import Cache
from ...models.native.draft import NativeDraft
from ...models.native.target import NativeTarget
from ..drafters import ChainDrafter
from ..speculate import Limits, NativeVerifier, Sampling
from .workload import Workload, load_checked

VERIFIED = (1, 2, 4, 6, 8, 16, 61)
EXTENDED = 3  # rows that a round of a good head adds
TOKEN, GREEDY, SAMPLED = "token", "round at T=0", "round at T=1"


class Operation(Protocol):
    """What is timed. ``prepare`` is called before each ``run``, and is not."""

    def prepare(self) -> None: ...

    def run(self) -> None: ...


class Verify:
    """The target over ``ids`` ``[T]`` behind ``context`` tokens of ``cache``, up to the most likely token of each row."""

    def __init__(self, target: NativeTarget, cache: Cache, context: int, ids: Tensor) -> None:
        self._target, self._cache, self._context, self._ids = target, cache, context, ids

    def prepare(self) -> None:
        """Take the tokens of the last call back."""
        self._cache.rollback(self._context)

    def run(self) -> None:
        """Forward, logits, choice."""
        output = self._target.forward(self._ids, self._cache)
        self._target.logits(output.last_hidden).argmax(-1).tolist()


class Extend:
    """The draft head takes in :data:`EXTENDED` rows."""

    MOST = 32  # calls until it starts at its context again

    def __init__(self, head: NativeDraft, tokens: Tensor, features: Tensor) -> None:
        self._head, self._tokens, self._features, self._calls = head, tokens, features, self.MOST
        self._rows = tokens[-EXTENDED:], features[-EXTENDED:]

    def prepare(self) -> None:
        """See :data:`MOST`."""
        if self._calls == self.MOST:
            self._head.restart()
            self._head.extend(self._tokens, self._features)
            self._calls = 0
        self._calls += 1

    def run(self) -> None:
        """One extension."""
        self._head.extend(*self._rows)


class Step:
    """The draft head drafts one token more: the choice of the last one, and the row behind it."""

    def __init__(self, head: NativeDraft, tokens: Tensor, features: Tensor, chain: int) -> None:
        head.extend(tokens, features)
        self._head, self._steps, self._taken, self._y_1H = head, max(1, chain - 1), 0, head.begin()

    def prepare(self) -> None:
        """Begin a chain where the last one is complete."""
        if self._taken % self._steps == 0:
            self._y_1H = self._head.begin()
        self._taken += 1

    def run(self) -> None:
        """One step."""
        self._y_1H = self._head.step(self._head.logits(self._y_1H).argmax(-1), self._y_1H)


class Round:
    """Rounds of answers to the prompts in turn; what runs over a prompt is not timed.

    ``answers`` have begun; the last of them is ``finished`` once it met its limits.
    """

    def __init__(
        self,
        verifier: NativeVerifier,
        drafter: ChainDrafter,
        prompts: Sequence[list[int]],
        limits: Limits,
        sampling: Sampling,
    ) -> None:
        self._verifier, self._drafter, self._limits, self._sampling = verifier, drafter, limits, sampling
        self._prompts, self.answers, self.finished, self._emitted = itertools.cycle(prompts), 0, True, 0

    def prepare(self) -> None:
        """Begin the next answer where the last one has ended."""
        if self.finished:
            sampling = self._sampling._replace(seed=self.answers)
            verdict = self._verifier.start(next(self._prompts), sampling)
            self._drafter.start(sampling)
            self._drafter.update(verdict)
            self.answers, self._emitted, self.finished = self.answers + 1, 1, False

    def run(self) -> None:
        """Propose, verify, update."""
        verdict = self._verifier.verify(self._drafter.propose())
        self._drafter.update(verdict)
        self._emitted += len(verdict.tokens)
        ended = any(token in self._limits.end_ids for token in verdict.tokens)
        self.finished = ended or self._emitted >= self._limits.max_new_tokens


def load_operations(workload: Workload, context: int, chain: int) -> dict[str, Operation]:
    """What is timed, by name; :data:`TOKEN` is the first."""
    longest, behind = workload.longest + 1 + chain, max(VERIFIED)
    target = load_checked(workload, context + behind + 2 * longest)
    draft = workload.draft.to(target.device, target.dtype)
    text = itertools.islice(itertools.cycle(itertools.chain(*workload.prompts)), context + behind)
    ids, cache = torch.tensor(list(text)), target.new_cache(context + behind)
    operations = dict[str, Operation]()
    for count in VERIFIED:
        name = TOKEN if count == 1 else f"verify of {count}"
        operations[name] = Verify(target, cache, context, ids[context : context + count])

    def head(capacity: int) -> NativeDraft:
        return NativeDraft(draft, target.head.embedding, capacity, chain)

    with torch.inference_mode():
        features = target.forward(ids[:context], cache).features
        tokens = ids[1 : context + 1].to(target.device)
        room = context + EXTENDED * Extend.MOST
        operations[f"draft extension by {EXTENDED}"] = Extend(head(room), tokens, features)
        operations["draft step"] = Step(head(context), tokens, features, chain)
    for name, temperature in ((GREEDY, 0.0), (SAMPLED, 1.0)):
        drafter, sampling = ChainDrafter(head(longest), chain), Sampling(temperature, workload.eval.sampling)
        verifier = NativeVerifier(target, longest)
        operations[name] = Round(verifier, drafter, workload.prompts, workload.limits, sampling)
    return operations
