"""Which drafted tokens survive, and which token the target adds: greedy, and the sampling that keeps its distribution.

Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): accept a token x drawn from q with probability
min(1, p(x) / q(x)); at the first rejection draw from the residual max(0, p - q), renormalised; after k acceptances draw
from p. A greedily drafted token is a q of 1 at that token: accepted with probability p(x), residual p without x.

Probabilities are float32, as the logits are: each is right to about 1e-6 of itself, also a small one, and the test only
compares two of them. What is emitted follows the target's float32 distribution exactly but for the rounding of p - q. Sums
over a vocabulary are another matter, and float64: those of the one row that a token is drawn from (:func:`draw_one`).

On a CPU compiled functions do each in one call (:mod:`..models.native.cpu`); what follows here is their plain reference.

Shapes: K drafted tokens, R = K + 1 rows, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..models.generate import draw_one
from ..models.native.cpu import sampling as cpu

#: Weight that a rejected token keeps, of its probability: no draw notices it, unless rounding has left nothing else.
REJECTED = 1e-20
#: Temperatures below it count as it: float32 holds no larger quotient of a logit. Both are as good as greedy.
COLDEST = 1e-30
#: Numbers that are drawn at a time.
BLOCK = 1024


class UniformNumbers:
    """Independent numbers in [0, 1) of a seed, in their order, however many are taken at a time.

    They are made and brought to ``device`` in blocks, so that a round takes a view and no more.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart(0)

    def restart(self, seed: int) -> None:
        """Begin with the numbers of ``seed``."""
        self._random = torch.Generator().manual_seed(seed)
        self._rest = torch.empty(0, dtype=torch.float64, device=self._device)

    def take(self, count: int) -> Tensor:
        """The next ``[count]``, float64."""
        if len(self._rest) < count:
            block = torch.rand(max(BLOCK, count), generator=self._random, dtype=torch.float64)
            self._rest = torch.cat((self._rest, block.to(self._device, non_blocking=True)))
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


class Drawn(NamedTuple):
    """How the tokens of a chain were sampled.

    ``ids`` ``[K]`` and ``probabilities`` ``[R, D]`` are over the draft vocabulary, whose target ids are ``vocabulary``
    ``[D]``. Row i is what token i was drawn from; the last row is 0, since nothing was drafted behind the chain.
    """

    ids: Tensor
    probabilities: Tensor
    vocabulary: Tensor


class Proposal(NamedTuple):
    """Drafted token ids ``[K]``, and how they were sampled; None if chosen greedily."""

    tokens: Tensor
    drawn: Drawn | None = None


class Judgement(NamedTuple):
    """What stands of a proposal.

    ``rows``: of the drafted tokens that stand, in order, their places among the rows that the target ran over; row 0 is
    the token before the proposal. ``tokens``: these, and then the target's own.
    """

    rows: list[int]
    tokens: list[int]


def judge_greedy(logits: Tensor, drafted: Tensor) -> Judgement:
    """Accept while the drafted token is the most likely one.

    Args:
        logits: ``[K + 1, V]``; row i is the target's after i drafted tokens.
        drafted: ``[K]`` token ids.
    """
    best = logits.argmax(-1)
    # One transfer for both: on an accelerator each is a wait.
    flat = torch.cat((best, drafted)).tolist()
    choices, tokens = flat[: len(best)], flat[len(best) :]
    accepted = 0
    while accepted < len(tokens) and choices[accepted] == tokens[accepted]:
        accepted += 1
    return _first(accepted, tokens, choices[accepted])


def judge_sampled(logits: Tensor, proposal: Proposal, temperature: float, uniform: Tensor) -> Judgement:
    """Accept by rejection sampling, so that what is emitted is distributed as the target's own samples.

    Args:
        logits: ``[K + 1, V]``; row i is the target's after i drafted tokens.
        proposal: the drafted tokens, with the distributions that they were really drawn from.
        temperature: above 0; ``proposal`` must have been drawn at its own temperature already.
        uniform: ``[K + 1]`` independent numbers in [0, 1): one per drafted token, one for the token that is added.
    """
    tokens_K, drawn = proposal
    if cpu.suits(logits):
        coldest = max(temperature, COLDEST)
        by = None if drawn is None else (drawn.ids, drawn.probabilities, drawn.vocabulary)
        at, added = cpu.accept(logits, tokens_K, coldest, uniform, REJECTED, by)
        return _first(at, tokens_K.tolist(), added)
    p_RV = distribution(logits, temperature)
    if not len(tokens_K):
        return Judgement([], draw_one(p_RV[0], uniform).tolist())
    at_K1, uniform_K1 = tokens_K.unsqueeze(1), uniform[:-1].unsqueeze(1)
    p_K1 = p_RV.gather(1, at_K1)
    if drawn is None:
        accepted_1 = _leading(uniform_K1 < p_K1)
        # The last row has no drafted token to lose.
        left_V = p_RV.scatter_(1, at_K1, p_K1 * REJECTED).index_select(0, accepted_1).squeeze(0)
    else:
        q_K1 = drawn.probabilities.gather(1, drawn.ids.unsqueeze(1))
        accepted_1 = _leading(uniform_K1 < p_K1 / q_K1)
        p_1V, q_1D = (each.index_select(0, accepted_1) for each in (p_RV, drawn.probabilities))
        left_V = residual(p_1V.squeeze(0), q_1D.squeeze(0), drawn.vocabulary)
    added_1 = draw_one(left_V, uniform[-1:])
    accepted, added, *tokens = torch.cat((accepted_1, added_1, tokens_K)).tolist()  # one wait
    return _first(accepted, tokens, added)


def _first(accepted: int, tokens: list[int], added: int) -> Judgement:
    """The first so many tokens of a chain stand."""
    return Judgement(list(range(1, accepted + 1)), [*tokens[:accepted], added])


def _leading(passed_K1: Tensor) -> Tensor:
    """How many there are before the first that failed, ``[1]``."""
    return passed_K1.cumprod(0).sum(0)


def residual(p_V: Tensor, q_D: Tensor, vocabulary_D: Tensor) -> Tensor:
    """``max(0, p - q)`` ``[V]``, not normalised, for q over the draft vocabulary; never 0 everywhere: see ``REJECTED``."""
    return p_V.index_add(0, vocabulary_D, q_D, alpha=-1).clamp_min_(0).add_(p_V, alpha=REJECTED)


def draw_token(logits_D: Tensor, temperature: float, uniform_1: Tensor) -> tuple[Tensor, Tensor]:
    """A token ``[1]`` drawn at ``temperature`` > 0 with a number in [0, 1), and the probabilities ``[D]`` it was drawn from."""
    if cpu.suits(logits_D):
        return cpu.draw(logits_D, max(temperature, COLDEST), uniform_1)
    q_D = distribution(logits_D, temperature)
    return draw_one(q_D, uniform_1), q_D


def distribution(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities ``[..., V]`` at ``temperature`` > 0, float32."""
    if temperature != 1:
        logits = logits.float() / max(temperature, COLDEST)
    return logits.softmax(-1, dtype=torch.float32)
