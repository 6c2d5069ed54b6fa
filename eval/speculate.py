"""Speculative decoding of one request: propose, verify, update.

    verifier = TargetVerifier(target, capacity=700)
    drafter = ChainDrafter(NativeDraft(draft, target.head.embedding, capacity=700, drafted=5), chain=5)
    decode(prompt, verifier, drafter, Limits(128, target.info.eos_ids), Sampling(temperature=0.0))

The loop knows neither models nor tensors, so that tests can put stand-ins in both places. Plain decoding is the same
loop without a drafter; both sides of a speed-up then run the same code.

Positions: row t of the draft pairs the target's features of token t with the embedding of token t+1. Over a prompt of P
tokens the target itself says token P, and row P-1 drafts token P+1. Accepted tokens enter the draft's cache as rows with
real features, all at once; the last of them drafts the next round's first token.

Shapes: B batch, T tokens, H hidden, F features, K drafted tokens, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..models.native.target import NativeTarget
from ..models.target import Target
from .agreement import agreed, decided
from .sampling import Judgement, Proposal, UniformNumbers, judge_greedy, judge_sampled
from .traces import Round
from .trees import Tree, judge_tree, judge_tree_sampled


class Sampling(NamedTuple):
    """``temperature`` 0 is greedy. ``drafting`` at T > 0: "sampled" from the draft's distribution, or "greedy"."""

    temperature: float = 0.0
    drafting: str = "sampled"
    seed: int = 0


class Limits(NamedTuple):
    """Where an answer ends: after ``max_new_tokens``, or with one of ``end_ids``."""

    max_new_tokens: int
    end_ids: Collection[int]


class Verdict(NamedTuple):
    """What the target made of a proposal.

    ``tokens``: those that follow each position it ran over and that stand: accepted ones, then the target's own. For the
    prompt these are its tokens from the second on, then the target's first. ``features``: ``[len(tokens), F, H]``, of
    the positions that these tokens follow.
    """

    tokens: list[int]
    features: Tensor


class Drafter(Protocol):
    """Proposes tokens; told after every verification what stands."""

    def start(self, sampling: Sampling) -> None:
        """Forget the last request."""

    def update(self, verdict: Verdict) -> None:
        """Take in the tokens that stand, in order and without gaps."""

    def propose(self) -> Proposal | Tree:
        """Draft the tokens that may follow."""


class Verifier(Protocol):
    """Runs the target over proposals."""

    def start(self, prompt: Sequence[int], sampling: Sampling) -> Verdict:
        """Forget the last request, run over ``prompt`` and say the first token."""

    def verify(self, proposal: Proposal | Tree | None) -> Verdict:
        """Judge a proposal, None being an empty one; ``len(tokens) - 1`` drafted tokens were accepted."""


class Decoded(NamedTuple):
    """An answer, who proposed each token ("draft" or "target"), the rounds, and seconds from the request's start."""

    ids: list[int]
    authors: list[str]
    rounds: list[Round]
    finished: bool
    ttft_s: float
    total_s: float


@torch.inference_mode()
def decode(
    prompt: Sequence[int], verifier: Verifier, drafter: Drafter | None, limits: Limits, sampling: Sampling
) -> Decoded:
    """Answer ``prompt``. Without a drafter this is plain decoding, and there are no rounds."""
    started = time.perf_counter()
    verdict = verifier.start(prompt, sampling)
    ids = verdict.tokens[-1:]
    ttft = time.perf_counter() - started
    authors, rounds, finished = ["target"], [], ids[0] in limits.end_ids
    if drafter is not None:
        drafter.start(sampling)
    while not finished and len(ids) < limits.max_new_tokens:
        proposal = None
        if drafter is not None:
            drafter.update(verdict)
            proposal = drafter.propose()
        verdict = verifier.verify(proposal)
        emitted, finished = _trim(verdict.tokens, limits, len(ids))
        ids += emitted
        accepted = len(verdict.tokens) - 1
        authors += (["draft"] * accepted + ["target"])[: len(emitted)]
        if proposal is not None:
            rounds.append(Round(len(proposal.tokens), accepted, len(emitted)))
    return Decoded(ids, authors, rounds, finished, ttft, time.perf_counter() - started)


def _trim(tokens: list[int], limits: Limits, before: int) -> tuple[list[int], bool]:
    """The tokens up to the first end token or the limit, and whether the former ended the answer."""
    tokens = tokens[: limits.max_new_tokens - before]
    for index, token in enumerate(tokens):
        if token in limits.end_ids:
            return tokens[: index + 1], True
    return tokens, False


class TargetVerifier:
    """The target with a cache that it keeps from request to request.

    Args:
        target: the model.
        capacity: positions of the longest request: prompt, answer, and one proposal more.
    """

    def __init__(self, target: Target, capacity: int) -> None:
        self._target = target
        self._cache = target.new_cache(capacity)
        self._sampling, self._uniform = Sampling(), UniformNumbers(target.device)
        self._last = 0

    def start(self, prompt: Sequence[int], sampling: Sampling) -> Verdict:
        """See :class:`Verifier`."""
        self._cache.rollback(0)
        self._sampling = sampling
        # The drafter draws from the even seeds: acceptance must not depend on the numbers that chose the tokens.
        self._uniform.restart(2 * sampling.seed + 1)
        output = self._target.forward(torch.tensor([list(prompt)]), self._cache)
        judged = self._judge(self._target.logits(output.last_hidden[0, -1:]), None)
        self._last = judged.tokens[-1]
        return Verdict([*prompt[1:], self._last], output.features[0])

    def verify(self, proposal: Proposal | Tree | None) -> Verdict:
        """See :class:`Verifier`; of chains."""
        if isinstance(proposal, Tree):
            raise TypeError("the caches of transformers' models hold no trees")
        before = self._cache.length
        row = torch.tensor([self._last], device=self._target.device)
        if proposal is not None:
            row = torch.cat((row, proposal.tokens))
        output = self._target.forward(row[None], self._cache)
        judged = self._judge(self._target.logits(output.last_hidden[0]), proposal)
        self._last = judged.tokens[-1]
        self._cache.rollback(before + len(judged.tokens))
        return Verdict(judged.tokens, output.features[0, : len(judged.tokens)])

    def _judge(self, logits: Tensor, proposal: Proposal | None) -> Judgement:
        if proposal is None:
            proposal = Proposal(torch.empty(0, dtype=torch.long, device=logits.device))
        if self._sampling.temperature == 0:
            return judge_greedy(logits, proposal.tokens)
        return judge_sampled(logits, proposal, self._sampling.temperature, self._uniform.take(len(logits)))


class NativeVerifier:
    """The native target, which judges chains and trees; it keeps its cache from request to request.

    Where several processes hold the target together, each has a verifier and a drafter, and all of them say the same.

    Args:
        target: the model.
        capacity: positions of the longest request: prompt, answer, and one proposal more.
    """

    def __init__(self, target: NativeTarget, capacity: int) -> None:
        self._target, self._cache = target, target.new_cache(capacity)
        self._sampling, self._uniform = Sampling(), UniformNumbers(target.device)
        self._last, self._nothing = 0, Proposal(torch.empty(0, dtype=torch.long, device=target.device))

    def start(self, prompt: Sequence[int], sampling: Sampling) -> Verdict:
        """See :class:`Verifier`."""
        self._cache.rollback(0)
        self._sampling = sampling
        self._uniform.restart(2 * sampling.seed + 1)
        output = self._target.forward(torch.tensor(prompt), self._cache)
        self._last = self._decide(self._target.logits(output.last_hidden[-1:]), self._nothing).tokens[-1]
        return Verdict([*prompt[1:], self._last], output.features)

    def verify(self, proposal: Proposal | Tree | None) -> Verdict:
        """See :class:`Verifier`."""
        drafted = self._nothing if proposal is None else proposal
        if proposal is not None and self._target.group is not None:
            drafted = agreed(self._target.group, proposal)
        before = self._cache.length
        ids = torch.cat((self._there(torch.tensor([self._last])), drafted.tokens))
        output = self._target.forward(ids, self._cache, drafted.ancestors() if isinstance(drafted, Tree) else None)
        judged = self._decide(self._target.logits(output.last_hidden), drafted)
        self._last, count = judged.tokens[-1], len(judged.tokens)
        if not isinstance(drafted, Tree):
            self._cache.rollback(before + count)
            return Verdict(judged.tokens, output.features[:count])
        path = self._there(torch.tensor([0, *judged.rows]))
        self._cache.keep(path)
        return Verdict(judged.tokens, output.features.index_select(0, path))

    def _there(self, x: Tensor) -> Tensor:
        """``x`` on the target's device, without waiting for what that is still to do."""
        return x.to(self._target.device, non_blocking=True)

    def _decide(self, logits: Tensor, proposal: Proposal | Tree) -> Judgement:
        """As :meth:`_judge`; of several processes what the first finds."""
        group = self._target.group
        if group is None:
            return self._judge(logits, proposal)
        return decided(group, len(proposal.tokens), lambda: self._judge(logits, proposal))

    def _judge(self, logits: Tensor, proposal: Proposal | Tree) -> Judgement:
        temperature = self._sampling.temperature
        if temperature == 0:
            return judge_tree(logits, proposal) if isinstance(proposal, Tree) else judge_greedy(logits, proposal.tokens)
        uniform = self._uniform.take(len(logits))
        if isinstance(proposal, Tree):
            return judge_tree_sampled(logits, proposal, temperature, uniform)
        return judge_sampled(logits, proposal, temperature, uniform)
