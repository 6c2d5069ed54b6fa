"""Which drafted tokens survive, and which token the target adds: greedy, and the sampling that keeps its distribution.

Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): accept a token x drawn from q with probability
min(1, p(x) / q(x)); at the first rejection draw from the residual max(0, p - q), renormalised; after k acceptances draw
from p. A greedily drafted token is a q of 1 at that token: accepted with probability p(x), residual p without x.

Shapes: K drafted tokens, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..models.generate import draw


class Proposal(NamedTuple):
    """Drafted token ids ``[K]`` and the distributions ``[K, V]`` they were drawn from; None if chosen greedily."""

    tokens: Tensor
    probabilities: Tensor | None = None


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
    p_KV = distribution(logits, temperature)
    if not len(proposal.tokens):
        return Judgement([], [int(draw(p_KV, uniform))])
    at_K1 = proposal.tokens[:, None]
    p_K = p_KV[:-1].gather(1, at_K1)[:, 0]
    q_K = 1.0 if proposal.probabilities is None else proposal.probabilities.gather(1, at_K1)[:, 0]
    accepted_1 = (uniform[:-1] * q_K < p_K).cumprod(0).sum(0, keepdim=True)
    added_1 = draw(residual(p_KV.index_select(0, accepted_1), proposal, accepted_1), uniform[-1:])
    accepted, added, *tokens = torch.cat((accepted_1, added_1, proposal.tokens)).tolist()  # one wait
    return _first(accepted, tokens, added)


def _first(accepted: int, tokens: list[int], added: int) -> Judgement:
    """The first so many tokens of a chain stand."""
    return Judgement(list(range(1, accepted + 1)), [*tokens[:accepted], added])


def residual(p_1V: Tensor, proposal: Proposal, accepted_1: Tensor) -> Tensor:
    """``max(0, p - q)`` ``[1, V]``, not normalised, of the token at which so many stood; q is 0 where all did.

    Where rounding leaves nothing it is ``p`` itself.
    """
    count = len(proposal.tokens)
    rejects_1 = (accepted_1 < count).double()
    row_1 = accepted_1.clamp_max(count - 1)
    if proposal.probabilities is None:
        q_1V = torch.zeros_like(p_1V).scatter_(1, proposal.tokens[row_1][None], 1.0)
    else:
        q_1V = proposal.probabilities.index_select(0, row_1)
    left_1V = (p_1V - rejects_1 * q_1V).clamp_min(0)
    return torch.where(left_1V.any(), left_1V, p_1V)


def distribution(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities ``[..., V]`` at ``temperature`` > 0, in float64 so that ratios of small ones mean something."""
    return (logits.double() / temperature).softmax(-1)


def spread(q_KD: Tensor, vocabulary_D: Tensor, size: int) -> Tensor:
    """Draft probabilities ``[K, D]`` over the target's vocabulary ``[K, V]``: 0 for tokens the draft cannot say."""
    return q_KD.new_zeros(len(q_KD), size).index_copy_(1, vocabulary_D, q_KD)
