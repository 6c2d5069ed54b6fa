"""The training-time test: the draft unrolled over its own outputs, exactly as it will be served.

    outputs = rollout(draft, head.embedding, batch, steps=7)      # outputs[j].y [n, H] at outputs[j].rows [n]

Row t holds the features of token t. Step j of it embeds token t+1+j at RoPE position t+j and predicts token t+2+j. It
attends to the step-0 keys of rows <= t and to its own keys of steps 1..j: what the draft's cache holds when it drafts
from row t. Source: arXiv 2503.01840, section 3.2.

Documents lie back to back, without padding. Only supervised rows are computed; the others give step-0 keys and values.
So prompts cost next to nothing. Supervised rows lie in one flat list, those that take part in most steps first: the rows
of a step are the head of the list. Padding enters the attention alone.

Shape suffixes: B documents, N tokens of all of them, S keys and R supervised rows of a document (padded), K steps, A
heads, M key/value heads, G = A/M, Q = G*R, F features, H hidden, W head width, n supervised rows of the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .draft import Eagle3Draft, rotation_table


class RolloutBatch(NamedTuple):
    """Documents one behind the other, each from position 0."""

    input_ids: Tensor  # [N] int64
    loss_mask: Tensor  # [N] bool: the assistant wrote this token
    features: Tensor  # [N, F, H]
    last_hidden: Tensor  # [N, H], after the target's final norm
    lengths: Tensor  # [B] tokens of each document, 1 or more


class StepOutput(NamedTuple):
    """One step's supervised rows ``[n]``, as places among the batch's tokens, and their outputs ``y [n, H]``.

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


class Layout(NamedTuple):
    """Where tokens are: their document ``[N]`` and their position in it ``[N]``; where documents begin ``[B]``."""

    document: Tensor
    position: Tensor
    starts: Tensor


def layout(lengths: Tensor, tokens: int) -> Layout:
    """Of documents of ``lengths [B]``, ``tokens`` in all; nothing waits for the device."""
    starts = lengths.cumsum(0) - lengths
    document = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=tokens)
    return Layout(document, torch.arange(tokens, device=lengths.device) - starts[document], starts)


def supervised(loss_mask: Tensor, lengths: Tensor, steps: int) -> Tensor:
    """Which rows each step learns from, bool ``[K, N]``.

    Step j of row t is supervised if and only if tokens t+1 … t+2+j all lie in one assistant turn, a maximal run of
    ``loss_mask [N]`` within a document of ``lengths [B]``. The first token of an answer is the target's own, so row t =
    (first token) - 1 is the first that serving drafts from.
    """
    # No row stands before a document's first token, so that token belongs to nobody's turn, and ends one before it.
    inner = loss_mask.index_fill(0, lengths.cumsum(0) - lengths, False)
    padded = torch.nn.functional.pad(inner, (0, steps + 2))
    run = padded[1 : len(loss_mask) + 1]
    found = []
    for step in range(steps):
        run = run & padded[step + 2 : step + 2 + len(loss_mask)]
        found.append(run)
    return torch.stack(found)


def rollout(draft: Eagle3Draft, embedding: Tensor, batch: RolloutBatch, steps: int) -> list[StepOutput]:
    """Unroll ``draft`` for ``steps`` steps on every supervised row.

    Args:
        draft: the head.
        embedding: the target's, frozen, ``[V, H]``.
        batch: documents.
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
    ids = batch.input_ids
    where = layout(batch.lengths, len(ids))
    rows, counts = ordered_rows(supervised(batch.loss_mask, batch.lengths, steps))

    combined_NH = draft.combine(batch.features)
    x_NX = draft.inputs(embedding[ids.roll(-1)], combined_NH)  # nobody sees the key of a document's last token
    table = rotation_table(draft.config, int(batch.lengths.max()) + steps, combined_NH)
    past = _past(*draft.keys_values(x_NX, table[:, where.position]), where, int(batch.lengths.max()), rows)

    h, x, position = (each.index_select(0, rows) for each in (combined_NH, x_NX, where.position))
    own: list[tuple[Tensor, Tensor]] = []  # keys and values of steps 1..j, [n, M, W] each
    outputs: list[StepOutput] = []
    for step, count in enumerate(counts):
        rotation = table[:, position[:count] + step]
        if step:
            h = draft.feedback(outputs[-1].y[:count])
            x = draft.inputs(embedding[ids[rows[:count] + 1 + step]], h)
            own.append(draft.keys_values(x, rotation))
        attended = _attend(draft.queries(x, rotation), past, own)
        outputs.append(StepOutput(rows[:count], draft.finish(h, attended)))
    return outputs


def ordered_rows(sets_KN: Tensor) -> tuple[Tensor, list[int]]:
    """All supervised rows ``[n]``, those of most steps first, and how many of them take part in each step.

    Args:
        sets_KN: from :func:`supervised`.
    """
    depth_N = sets_KN.sum(0)
    rows = depth_N.nonzero()[:, 0]
    return rows[depth_N[rows].argsort(descending=True, stable=True)], sets_KN.sum(1).tolist()


def _past(keys_NMW: Tensor, values_NMW: Tensor, where: Layout, length: int, rows: Tensor) -> Past:
    documents, dtype = len(where.starts), values_NMW.dtype
    chosen_N = torch.zeros_like(where.document).index_fill_(0, rows, 1)
    number_N = chosen_N.cumsum(0) - chosen_N  # of supervised rows before each
    number_N -= number_N[where.starts][where.document]
    width = int(number_N[rows].max()) + 1 if len(rows) else 1
    place = where.document[rows] * width + number_N[rows]
    row_BR = rows.new_zeros(documents * width)  # padding stands at row 0, which sees one key: no NaN can arise
    row_BR[place] = where.position[rows]
    later_BRS = torch.arange(length, device=rows.device) > row_BR.view(-1, width, 1)
    bias_BRS = torch.zeros_like(later_BRS, dtype=dtype).masked_fill_(later_BRS, -torch.inf)
    slot_N = where.document * length + where.position
    # Rotation may have widened the keys' dtype under autocast.
    keys_BMSW, values_BMSW = (
        each.new_zeros(documents * length, *each.shape[1:])
        .index_copy(0, slot_N, each)
        .unflatten(0, (documents, length))
        .transpose(1, 2)
        .contiguous()
        for each in (keys_NMW.to(dtype), values_NMW)
    )
    return Past(keys_BMSW, values_BMSW, place, bias_BRS)


def _attend(query_nAW: Tensor, past: Past, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of every row to the step-0 keys it sees and to its own of later steps, ``[n, A, W]``.

    Both parts are merged through the log-sum-exp of the first, which is exact.
    """
    heads = past.keys.shape[1]
    query_nAW = query_nAW.to(past.values.dtype) * query_nAW.shape[-1] ** -0.5
    attended, logsumexp = AttendPast.apply(query_nAW, past.keys, past.values, past.place[: len(query_nAW)], past.bias)
    if not own:
        return attended
    count = len(query_nAW)
    query_nMGW = query_nAW.unflatten(1, (heads, -1))
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
        ctx: Any, query_nAW: Tensor, keys_BMSW: Tensor, values_BMSW: Tensor, place: Tensor, bias_BRS: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scaled queries ``[n, A, W]`` at ``place [n]`` to outputs ``[n, A, W]`` and log-sum-exps ``[n, A]``."""
        query_BMQW = _spread(query_nAW, place, bias_BRS, keys_BMSW.shape[1])
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
        d_query_nAW = _collect(d_scores_BMQS @ keys_BMSW, place, bias_BRS)
        return d_query_nAW, d_scores_BMQS.transpose(-1, -2) @ query_BMQW, d_values_BMSW, None, None


def _spread(x_nAW: Tensor, place: Tensor, bias_BRS: Tensor, heads: int) -> Tensor:
    """Rows of the flat list to their samples, ``[B, M, Q, W]``; zero elsewhere."""
    samples, width, _ = bias_BRS.shape
    padded = x_nAW.new_zeros(samples * width, x_nAW.shape[1] * x_nAW.shape[2]).index_copy_(0, place, x_nAW.flatten(1))
    return padded.view(samples, width, heads, -1, x_nAW.shape[2]).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _collect(x_BMQW: Tensor, place: Tensor, bias_BRS: Tensor) -> Tensor:
    """The inverse of ``_spread``: ``[n, A, W]``."""
    x_BRMGW = x_BMQW.unflatten(2, (-1, bias_BRS.shape[1])).permute(0, 3, 1, 2, 4)
    return x_BRMGW.reshape(-1, *x_BRMGW.shape[2:]).index_select(0, place).flatten(1, 2)
