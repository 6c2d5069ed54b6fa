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
    """How many drafted tokens stand, 0..K, and the target's own token after them."""

    accepted: int
    token: int


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
    return Judgement(accepted, choices[accepted])


def judge_sampled(logits: Tensor, proposal: Proposal, temperature: float, uniform: Tensor) -> Judgement:
    """Accept by rejection sampling, so that what is emitted is distributed as the target's own samples.

    Args:
        logits: ``[K + 1, V]``; row i is the target's after i drafted tokens.
        proposal: the drafted tokens, with the distributions that they were really drawn from.
        temperature: above 0; ``proposal`` must have been drawn at its own temperature already.
        uniform: ``[K + 1]`` independent numbers in [0, 1): one per drafted token, one for the token that is added.
    """
    p_KV = distribution(logits, temperature)
    count = len(proposal.tokens)
    accepted = 0
    if count:
        at_K1 = proposal.tokens[:, None]
        p_K = p_KV[:-1].gather(1, at_K1)[:, 0]
        q_K = 1.0 if proposal.probabilities is None else proposal.probabilities.gather(1, at_K1)[:, 0]
        accepted = int((uniform[:-1] * q_K < p_K).cumprod(0).sum())
    left_V = p_KV[accepted]
    if accepted < count:
        left_V = residual(left_V, proposal, accepted)
    return Judgement(accepted, int(draw(left_V[None], uniform[-1:])))


def residual(p_V: Tensor, proposal: Proposal, row: int) -> Tensor:
    """``max(0, p - q)``, not normalised, for the drafted token ``row``; ``p`` itself where rounding leaves nothing."""
    if proposal.probabilities is None:
        left_V = p_V.clone()
        left_V[proposal.tokens[row]] = 0
    else:
        left_V = (p_V - proposal.probabilities[row]).clamp_min(0)
    return left_V if bool(left_V.any()) else p_V


def distribution(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities ``[..., V]`` at ``temperature`` > 0, in float64 so that ratios of small ones mean something."""
    return (logits.double() / temperature).softmax(-1)


def spread(q_KD: Tensor, vocabulary_D: Tensor, size: int) -> Tensor:
    """Draft probabilities ``[K, D]`` over the target's vocabulary ``[K, V]``: 0 for tokens the draft cannot say."""
    return q_KD.new_zeros(len(q_KD), size).index_copy_(1, vocabulary_D, q_KD)
