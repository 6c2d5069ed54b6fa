"""The training-time test: the draft unrolled over its own outputs, exactly as it will be served.

    outputs = rollout(draft, head.embedding, batch, steps=7)      # outputs[j].y [n, H] at outputs[j].rows [n, 2]

Row t holds the features of token t. Step j of it embeds token t+1+j at RoPE position t+j and predicts token t+2+j. It
attends to the step-0 keys of rows <= t and to its own keys of steps 1..j: what the draft's cache holds when it drafts
from row t. Source: arXiv 2503.01840, section 3.2.

Only supervised rows are computed; the others give step-0 keys and values. So prompts cost next to nothing. Supervised
rows lie in one flat list, those that take part in most steps first: the rows of a step are the head of the list, and
padding enters the attention alone.

Shape suffixes: B batch, T tokens, S step-0 keys (T-1), R supervised rows of a sample (padded), K steps, N heads, M
key/value heads, G = N/M, Q = G*R, F features, H hidden, W head width, n supervised rows of the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .draft import Eagle3Draft, rotation_table


class RolloutBatch(NamedTuple):
    """Documents, right-padded, each from position 0. Padding has ``loss_mask`` False."""

    input_ids: Tensor  # [B, T] int64
    loss_mask: Tensor  # [B, T] bool: the assistant wrote this token
    features: Tensor  # [B, T, F, H]
    last_hidden: Tensor  # [B, T, H], after the target's final norm
    lengths: Tensor  # [B] tokens of each document


class StepOutput(NamedTuple):
    """One step's supervised rows ``[n, 2]`` (sample, row) and their outputs ``y [n, H]``.

    Rows are in an order of their own; those of the next step are the first of them.
    """

    rows: Tensor
    y: Tensor


class Past(NamedTuple):
    """Step-0 keys and values ``[B, M, S, W]``, and where the supervised rows stand before them.

    ``place [n]`` is a row's place in ``[B * R]``; ``bias [B, R, S]`` is 0 for what it sees and -inf for what is later.
    """

    keys: Tensor
    values: Tensor
    place: Tensor
    bias: Tensor


def supervised(loss_mask: Tensor, steps: int) -> Tensor:
    """Which rows each step learns from, bool ``[K, B, T]``.

    Step j of row t is supervised if and only if tokens t+1 … t+2+j all lie in one assistant turn, a maximal run of
    ``loss_mask [B, T]``. The first token of an answer is the target's own, so row t = (first token) - 1 is the first
    that serving drafts from.
    """
    length = loss_mask.shape[1]
    padded = torch.nn.functional.pad(loss_mask, (0, steps + 2))
    run = padded[:, 1 : length + 1]
    found = []
    for step in range(steps):
        run = run & padded[:, step + 2 : step + 2 + length]
        found.append(run)
    return torch.stack(found)


def rollout(draft: Eagle3Draft, embedding: Tensor, batch: RolloutBatch, steps: int) -> list[StepOutput]:
    """Unroll ``draft`` for ``steps`` steps on every supervised row.

    Args:
        draft: the head.
        embedding: the target's, frozen, ``[V, H]``.
        batch: documents of 2 tokens or more.
        steps: K.

    Returns:
        one :class:`StepOutput` a step; rows only get fewer.
    """
    if fused := kernels.chosen(draft):
        found: list[StepOutput] = fused.rollout(draft, embedding, batch, steps)
        return found
    return plain_rollout(draft, embedding, batch, steps)


def plain_rollout(draft: Eagle3Draft, embedding: Tensor, batch: RolloutBatch, steps: int) -> list[StepOutput]:
    """:func:`rollout` without kernels: what they are checked against, and what a CPU computes."""
    ids, length = batch.input_ids, batch.input_ids.shape[1]
    sets_KBT = supervised(batch.loss_mask, steps)
    rows, counts = ordered_rows(sets_KBT)
    sample, row = rows.unbind(1)

    combined_BSH = draft.combine(batch.features[:, :-1])
    x_BSX = draft.inputs(embedding[ids[:, 1:]], combined_BSH)
    table = rotation_table(draft.config, length + steps, combined_BSH)
    keys, values = draft.keys_values(x_BSX, table[:, : length - 1])
    past = _past(keys, values, sets_KBT[0], rows)

    flat = sample * (length - 1) + row
    h, x = combined_BSH.flatten(0, 1).index_select(0, flat), x_BSX.flatten(0, 1).index_select(0, flat)
    own: list[tuple[Tensor, Tensor]] = []  # keys and values of steps 1..j, [n, M, W] each
    outputs: list[StepOutput] = []
    for step, count in enumerate(counts):
        rotation = table[:, row[:count] + step]
        if step:
            h = draft.feedback(outputs[-1].y[:count])
            x = draft.inputs(embedding[ids[sample[:count], row[:count] + 1 + step]], h)
            own.append(draft.keys_values(x, rotation))
        attended = _attend(draft.queries(x, rotation), past, own)
        outputs.append(StepOutput(rows[:count], draft.finish(h, attended)))
    return outputs


def ordered_rows(sets_KBT: Tensor) -> tuple[Tensor, list[int]]:
    """All supervised rows ``[n, 2]``, those of most steps first, and how many of them take part in each step.

    Args:
        sets_KBT: from :func:`supervised`.
    """
    depth_BT = sets_KBT.sum(0)
    rows = depth_BT.nonzero()
    order = depth_BT[rows[:, 0], rows[:, 1]].argsort(descending=True, stable=True)
    return rows[order], sets_KBT.sum((1, 2)).tolist()


def _past(keys_BSMW: Tensor, values_BSMW: Tensor, chosen_BT: Tensor, rows: Tensor) -> Past:
    sample, row = rows.unbind(1)
    width = max(1, int(chosen_BT.sum(1).max()))
    place = sample * width + (chosen_BT.cumsum(1) - 1)[sample, row]
    row_BR = row.new_zeros(len(chosen_BT) * width)  # padding stands at row 0, which sees one key: no NaN can arise
    row_BR[place] = row
    later_BRS = torch.arange(keys_BSMW.shape[1], device=rows.device) > row_BR.view(-1, width, 1)
    bias_BRS = torch.zeros_like(later_BRS, dtype=values_BSMW.dtype).masked_fill_(later_BRS, -torch.inf)
    # Rotation may have widened the keys' dtype under autocast.
    keys_BMSW, values_BMSW = keys_BSMW.to(values_BSMW.dtype).transpose(1, 2), values_BSMW.transpose(1, 2)
    return Past(keys_BMSW.contiguous(), values_BMSW.contiguous(), place, bias_BRS)


def _attend(query_nNW: Tensor, past: Past, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of every row to the step-0 keys it sees and to its own of later steps, ``[n, N, W]``.

    Both parts are merged through the log-sum-exp of the first, which is exact.
    """
    heads = past.keys.shape[1]
    query_nNW = query_nNW.to(past.values.dtype) * query_nNW.shape[-1] ** -0.5
    attended, logsumexp = AttendPast.apply(query_nNW, past.keys, past.values, past.place[: len(query_nNW)], past.bias)
    if not own:
        return attended
    count = len(query_nNW)
    query_nMGW = query_nNW.unflatten(1, (heads, -1))
    scores = [(query_nMGW * keys[:count, :, None]).sum(-1).flatten(1) for keys, _ in own]
    weights = torch.stack([logsumexp, *scores], -1).softmax(-1).unflatten(1, (heads, -1)).unbind(-1)
    merged = attended.unflatten(1, (heads, -1)) * weights[0][..., None]
    for weight, (_, values) in zip(weights[1:], own, strict=True):
        merged = merged + weight[..., None] * values[:count, :, None]
    return merged.flatten(1, 2).to(attended.dtype)  # the log-sum-exp has widened it


class AttendPast(torch.autograd.Function):
    """Softmax attention to the step-0 keys, and its log-sum-exp, both with gradients.

    Written out because autograd would keep and walk over several tensors as large as the scores, where one is needed:
    with P the probabilities and O the output, dS = P (dO V^T - rowsum(dO O) + dLSE).
    """

    @staticmethod
    def forward(
        ctx: Any, query_nNW: Tensor, keys_BMSW: Tensor, values_BMSW: Tensor, place: Tensor, bias_BRS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scaled queries ``[n, N, W]`` at ``place [n]`` to outputs ``[n, N, W]`` and log-sum-exps ``[n, N]``."""
        query_BMQW = _spread(query_nNW, place, bias_BRS, keys_BMSW.shape[1])
        scores_BMQS = query_BMQW @ keys_BMSW.transpose(-1, -2)
        scores_BMQS.unflatten(2, (-1, bias_BRS.shape[1])).add_(bias_BRS[:, None, None])
        wide = torch.promote_types(scores_BMQS.dtype, torch.float32)
        weights_BMQS = scores_BMQS.softmax(-1, dtype=wide)
        # The largest weight is exp(largest score - log-sum-exp), and not below 1/S: no need to add up again.
        logsumexp_BMQ = scores_BMQS.amax(-1).to(wide) - weights_BMQS.amax(-1).log()
        weights_BMQS = weights_BMQS.to(values_BMSW.dtype)
        out_BMQW = weights_BMQS @ values_BMSW
        ctx.save_for_backward(query_BMQW, keys_BMSW, values_BMSW, place, bias_BRS, weights_BMQS, out_BMQW)
        return _collect(out_BMQW, place, bias_BRS), _collect(logsumexp_BMQ[..., None], place, bias_BRS)[..., 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query_BMQW, keys_BMSW, values_BMSW, place, bias_BRS, weights_BMQS, out_BMQW = ctx.saved_tensors
        heads = keys_BMSW.shape[1]
        d_out_BMQW = _spread(gradients[0], place, bias_BRS, heads)
        d_logsumexp_BMQ1 = _spread(gradients[1][..., None], place, bias_BRS, heads)
        shift_BMQ1 = d_logsumexp_BMQ1 - (d_out_BMQW * out_BMQW).sum(-1, keepdim=True)
        d_values_BMSW = weights_BMQS.transpose(-1, -2) @ d_out_BMQW
        d_scores_BMQS = d_out_BMQW @ values_BMSW.transpose(-1, -2)
        d_scores_BMQS.add_(shift_BMQ1).mul_(weights_BMQS)
        d_query_nNW = _collect(d_scores_BMQS @ keys_BMSW, place, bias_BRS)
        return d_query_nNW, d_scores_BMQS.transpose(-1, -2) @ query_BMQW, d_values_BMSW, None, None


def _spread(x_nNW: Tensor, place: Tensor, bias_BRS: Tensor, heads: int) -> Tensor:
    """Rows of the flat list to their samples, ``[B, M, Q, W]``; zero elsewhere."""
    samples, width, _ = bias_BRS.shape
    padded = x_nNW.new_zeros(samples * width, x_nNW.shape[1] * x_nNW.shape[2]).index_copy_(0, place, x_nNW.flatten(1))
    return padded.view(samples, width, heads, -1, x_nNW.shape[2]).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _collect(x_BMQW: Tensor, place: Tensor, bias_BRS: Tensor) -> Tensor:
    """The inverse of ``_spread``: ``[n, N, W]``."""
    x_BRMGW = x_BMQW.unflatten(2, (-1, bias_BRS.shape[1])).permute(0, 3, 1, 2, 4)
    return x_BRMGW.reshape(-1, *x_BRMGW.shape[2:]).index_select(0, place).flatten(1, 2)
