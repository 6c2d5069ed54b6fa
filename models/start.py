"""A head before its first step: it reads out as the target does, attends to itself, and copies what was said before.

    begin(draft, head, features_NFH, tokens_N)     # a few thousand recorded tokens

Half of what a target says repeats something in its context, and it says so with certainty. Finding the place is what
attention is for, but a head of one layer learns it late, or never in a short training. So the last key/value head begins
as an induction head (Olsson et al., arXiv 2209.11895), which one layer can be here because a row holds two tokens: the
features of token t, from which its identity can be read linearly, and the embedding of token t+1, which is given.

    query of row t    what token t+1 is, from its embedding
    key of row p      what token p is, from its features
    value of row p    the embedding of token p+1

Scores are high where token p is token t+1 again, and what followed it there is proposed. Position should not matter, so
queries and keys lie in pairs that RoPE hardly turns: a head needs some such pairs, that is width and a large theta.

Shape suffixes: N tokens, F captured layers, H hidden, V vocabulary, W head width, C half of it, M key/value heads, G
query heads of each, n pairs that hardly turn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .draft import Eagle3Draft
from .target_info import TargetHead

SELF_SCORE = 6.0  # attention score of a row with itself: e ** 6 is the weight of some 400 others
MATCH_SCORE = 20.0  # of an earlier place of the same token; the features tell tokens apart with some error
COPY_GAIN = 4.0  # how loudly what followed is said: the state it is added to has variance 1
STEADY_ANGLE = 0.03  # radians per position that still count as hardly turning: half a turn in 100 positions
RIDGE = 1e-2  # share of the inputs' variance


@torch.no_grad()
def begin(draft: Eagle3Draft, head: TargetHead, features: Tensor, tokens: Tensor) -> None:
    """Set the weights of a new ``draft``; those not named here stay random.

    A head with a single key/value head attends to itself only.

    Args:
        draft: fresh from its constructor.
        head: the target's ends.
        features: recorded states of some tokens, ``[N, F, H]``.
        tokens: which tokens they are, ``[N]``.
    """
    features = features.to(draft.fc.weight.dtype)
    draft.lm_head.weight.copy_(head.lm_head[draft.draft_ids])
    _attend_to_self(draft)
    columns_HFH = draft.fc.weight.view(draft.config.hidden_size, -1, draft.config.hidden_size)
    columns_HFH.mul_(3**0.5 / feature_scale(draft, features)[:, None])  # nn.Linear starts with a variance of 1/3
    if draft.config.num_kv_heads > 1:
        _copy_what_followed(draft, head.embedding, features, tokens)


@torch.no_grad()
def feature_scale(draft: Eagle3Draft, features: Tensor) -> Tensor:
    """How large the states ``[N, F, H]`` are as ``fc`` sees them, by captured layer ``[F]``.

    The median over tokens of their root mean square, because the first token of a text is often a thousand times as
    large as the others.
    """
    if draft.config.norm_before_fc:
        features = draft.input_norm(features.to(draft.fc.weight.dtype).flatten(1)).view_as(features)
    scale_F = features.float().pow(2).mean(-1).sqrt().median(0).values
    return torch.ones_like(scale_F) if draft.config.fc_norm else scale_F


def _attend_to_self(draft: Eagle3Draft) -> None:
    """Make queries equal keys: a row scores ``SELF_SCORE`` with itself, and about 0 with others.

    The next token's embedding comes in through attention alone, where random queries and keys would average it away.
    """
    attention, config = draft.midlayer.self_attn, draft.config
    variance = SELF_SCORE / (config.head_dim**0.5 * attention.k_proj.in_features)  # of inputs of variance 1
    keys_MWX = nn.init.normal_(attention.k_proj.weight, std=variance**0.5).unflatten(0, (-1, config.head_dim))
    queries = keys_MWX.repeat_interleave(config.num_heads // config.num_kv_heads, 0)
    attention.q_proj.weight.copy_(queries.flatten(0, 1))


def _copy_what_followed(draft: Eagle3Draft, embedding: Tensor, features: Tensor, tokens: Tensor) -> None:
    """Make the last key/value head, with its query heads, an induction head."""
    config, attention = draft.config, draft.midlayer.self_attn
    hidden, width, heads = config.hidden_size, config.head_dim, config.num_kv_heads
    identity_HH = _read_identity(draft, embedding, features, tokens)

    half = width // 2
    steady_C = config.rope_theta ** -(torch.arange(half) / half) < STEADY_ANGLE
    steady_W = (steady_C if steady_C.any() else ~steady_C).repeat(2)
    match_WH = torch.randn(width, hidden) * steady_W[:, None] / (steady_W.sum() * hidden) ** 0.5
    match_WH = (match_WH * (MATCH_SCORE * width**0.5) ** 0.5).to(identity_HH)
    say_WH = nn.init.orthogonal_(torch.empty(width, hidden)).to(identity_HH)

    queries_MGWX = attention.q_proj.weight.view(heads, -1, width, 2 * hidden)
    keys_MWX = attention.k_proj.weight.view(heads, width, 2 * hidden)
    values_MWX = attention.v_proj.weight.view(heads, width, 2 * hidden)
    outputs_HMGW = attention.o_proj.weight.view(hidden, heads, -1, width)
    for part in (queries_MGWX[-1], keys_MWX[-1], values_MWX[-1]):
        part.zero_()
    queries_MGWX[-1, :, :, :hidden] = match_WH  # from the embedding, which comes first
    keys_MWX[-1, :, hidden:] = match_WH @ identity_HH
    values_MWX[-1, :, :hidden] = say_WH
    gain = COPY_GAIN * max(1.0, hidden / width) ** 0.5 / outputs_HMGW.shape[2]
    outputs_HMGW[:, -1] = gain * say_WH.T[:, None]


def _read_identity(draft: Eagle3Draft, embedding: Tensor, features: Tensor, tokens: Tensor) -> Tensor:
    """The ridge regression ``[H, H]`` of tokens' normed embeddings on their normed combined features."""
    seen_NH = draft.midlayer.hidden_norm(draft.combine(features)).double()
    meant_NH = draft.midlayer.input_layernorm(embedding[tokens].to(features.dtype)).double()
    covariance_HH = seen_NH.T @ seen_NH + RIDGE * len(seen_NH) * torch.eye(seen_NH.shape[1], device=seen_NH.device)
    return torch.linalg.solve(covariance_HH, seen_NH.T @ meant_NH).T.to(features.dtype)
