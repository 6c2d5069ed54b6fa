"""The training-time test as EAGLE-3 trainers write it down: what ours is measured against.

    losses, hits = zip(*step_sums(draft, embedding, lm_head, documents, steps=7, kind="kl"))     # one scalar a step

Every step computes every position, and what is not supervised is masked out of the loss. Scores are a ``[T, T + j]``
tensor: those of step-0 keys under a causal mask, and behind them one for each later step's own key. The teacher's logits
are ``[B, T, V]``. Gradients are autograd's. Source: arXiv 2503.01840, section 3.2, and its authors' trainer, but for the
conventions that are this project's: which rows are supervised, and a teacher normalised over V.

It is given no cost that it need not have: shifted teachers are views, and the sums over V are taken once, not every step.

Shape suffixes: B documents, T tokens, F features, H hidden, N heads, M key/value heads, W head width, D draft vocabulary,
V vocabulary, K steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.draft import Eagle3Draft, rotation_table
from ..objective import LK_SHARPNESS


class Documents(NamedTuple):
    """Documents of T tokens each."""

    input_ids: Tensor  # [B, T] int64
    loss_mask: Tensor  # [B, T] bool
    features: Tensor  # [B, T, F, H]
    last_hidden: Tensor  # [B, T, H]


class Teacher(NamedTuple):
    """The target's distribution at some positions."""

    p: Tensor  # [..., D], normalised over V
    p_log_p: Tensor  # [...], sum over D
    top: Tensor  # [...], the most likely token over V


class StepSums(NamedTuple):
    """Over a step's supervised rows: the loss, and how often the head's top token is the target's."""

    loss: Tensor
    hits: Tensor


def shifted(x_BT: Tensor, by: int) -> Tensor:
    """At t what stands at ``t + by``; zeros where that is behind the end."""
    return F.pad(x_BT[:, by:], (0, by))


def supervised(loss_mask_BT: Tensor, steps: int) -> Tensor:
    """Rows t that step j learns from, ``[K, B, T]``: the assistant wrote all of t+1 … t+2+j."""
    found = [shifted(loss_mask_BT, 1)]
    for step in range(steps):
        found.append(found[-1] & shifted(loss_mask_BT, step + 2))
    return torch.stack(found[1:])


def rollout(draft: Eagle3Draft, embedding: Tensor, documents: Documents, steps: int) -> list[Tensor]:
    """Outputs ``[B, T, H]`` of every step."""
    length = documents.input_ids.shape[1]
    h = draft.combine(documents.features)
    table = rotation_table(draft.config, length + steps, h)
    causal_TT = torch.full((length, length), -torch.inf, dtype=h.dtype).triu(1)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    for step in range(steps):
        rotation = table[:, step : step + length]
        x = draft.inputs(embedding[shifted(documents.input_ids, step + 1)], h)
        query = draft.queries(x, rotation)
        for kept, new in zip((keys, values), draft.keys_values(x, rotation), strict=True):
            kept.append(new.repeat_interleave(query.shape[2] // new.shape[2], 2).transpose(1, 2))
        attended = attend(query.transpose(1, 2), keys, values, causal_TT)
        outputs.append(draft.finish(h, attended.transpose(1, 2)))
        h = draft.feedback(outputs[-1])
    return outputs


def attend(query_BNTW: Tensor, keys: list[Tensor], values: list[Tensor], causal_TT: Tensor) -> Tensor:
    """Attention to the keys and values ``[B, N, T, W]`` of all steps so far: to step 0's up to t, to later ones at t."""
    query_BNTW = query_BNTW * query_BNTW.shape[-1] ** -0.5
    scores = [query_BNTW @ keys[0].transpose(-1, -2) + causal_TT]
    scores += [(query_BNTW * own).sum(-1, keepdim=True) for own in keys[1:]]
    weights = torch.cat(scores, -1).softmax(-1)
    length = query_BNTW.shape[2]
    attended = weights[..., :length] @ values[0]
    for place, own in enumerate(values[1:], length):
        attended = attended + weights[..., place, None] * own
    return attended


def restricted(logits: Tensor, logsumexp: Tensor, top: Tensor, draft_ids: Tensor) -> Teacher:
    """The teacher over the draft vocabulary, from its ``logits [..., V]`` and what was found of them, ``[...]`` each."""
    log_p = logits[..., draft_ids] - logsumexp[..., None]
    p = log_p.exp()
    return Teacher(p, (p * log_p).sum(-1), top)


def row_results(draft: Eagle3Draft, y: Tensor, teacher: Teacher, kind: str) -> tuple[Tensor, Tensor]:
    """Losses and hits ``[...]`` of outputs ``y [..., H]``."""
    logits = draft.logits(y)
    log_q = logits.log_softmax(-1)
    losses = teacher.p_log_p - (teacher.p * log_q).sum(-1)
    if kind == "lk":
        alpha = torch.minimum(teacher.p, log_q.exp()).sum(-1)
        weight = torch.exp(-LK_SHARPNESS * alpha.detach())
        losses = weight * losses + (1 - weight) * (1 - alpha)
    return losses, draft.draft_ids[logits.detach().argmax(-1)] == teacher.top


def step_sums(
    draft: Eagle3Draft,
    embedding: Tensor,
    lm_head: Tensor,
    documents: Documents,
    steps: int,
    kind: str,
    once: bool = False,
) -> list[StepSums]:
    """Every step's sums over its supervised rows.

    Args:
        draft: the head.
        embedding: the target's, ``[V, H]``.
        lm_head: the target's, ``[V, H]``.
        documents: of more tokens than there are steps.
        steps: K.
        kind: "kl" or "lk".
        once: take the teacher's probabilities before the first step, and not in each.
    """
    logits_BTV = F.linear(documents.last_hidden, lm_head)
    logsumexp_BT, top_BT = logits_BTV.logsumexp(-1), logits_BTV.argmax(-1)
    whole = restricted(logits_BTV, logsumexp_BT, top_BT, draft.draft_ids) if once else None
    if whole:
        del logits_BTV
    masks_KBT = supervised(documents.loss_mask, steps)
    found = []
    for step, y in enumerate(rollout(draft, embedding, documents, steps)):
        behind = slice(step + 1, None)  # row t is taught at t+1+j
        if whole:
            teacher = Teacher(*(each[:, behind] for each in whole))
        else:
            teacher = restricted(logits_BTV[:, behind], logsumexp_BT[:, behind], top_BT[:, behind], draft.draft_ids)
        taught = teacher.top.shape[1]
        mask_BT = masks_KBT[step, :, :taught]
        losses, hits = row_results(draft, y[:, :taught], teacher, kind)
        found.append(StepSums((losses * mask_BT).sum(), (hits & mask_BT).sum()))
    return found
