"""The training-time test: the draft unrolled over its own outputs, exactly as it will be served.

Row t holds the features of token t. Step j of it embeds token t+1+j at RoPE position t+j and predicts token t+2+j. It
attends to the step-0 keys of rows <= t and to its own keys of steps 1..j: what the draft's cache holds when it drafts from
row t. Source: arXiv 2503.01840, section 3.2.

Only supervised rows are computed; the others give step-0 keys and values. So prompts cost next to nothing.

Shape suffixes: B batch, T tokens, R supervised rows of a sample (padded), K steps, J steps so far, N heads, M key/value
heads, G = N/M, F features, H hidden, W head width, n supervised rows of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .draft import Eagle3Draft


class RolloutBatch(NamedTuple):
    """Documents, right-padded, each from position 0. Padding has ``loss_mask`` False."""

    input_ids: Tensor  # [B, T] int64
    loss_mask: Tensor  # [B, T] bool: the assistant wrote this token
    features: Tensor  # [B, T, F, H]
    last_hidden: Tensor  # [B, T, H], after the target's final norm


class StepOutput(NamedTuple):
    """One step's supervised rows ``[n, 2]`` (sample, row), sorted, and their outputs ``y [n, H]``."""

    rows: Tensor
    y: Tensor


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
        batch: documents.
        steps: K.

    Returns:
        one :class:`StepOutput` a step; rows only get fewer.
    """
    sets_KBT = supervised(batch.loss_mask, steps)
    rows_BR, held_BR = _gather_rows(sets_KBT[0])
    batch_index = torch.arange(len(rows_BR), device=rows_BR.device)[:, None]

    combined_BTH = draft.combine(batch.features[:, :-1])
    positions_T = torch.arange(combined_BTH.shape[1], device=rows_BR.device)
    x_BTX = draft.inputs(embedding[batch.input_ids[:, 1:]], combined_BTH)
    keys_BMTW, values_BMTW = draft.keys_values(x_BTX, positions_T)
    unseen_BRT = positions_T > rows_BR[..., None]

    h_BRH, x_BRX = combined_BTH[batch_index, rows_BR], x_BTX[batch_index, rows_BR]
    own: list[tuple[Tensor, Tensor]] = []  # keys and values of steps 1..j, [B, M, R, W] each
    outputs = []
    for step in range(steps):
        if step:
            tokens_BR = batch.input_ids[batch_index, (rows_BR + step + 1).clamp_max(batch.input_ids.shape[1] - 1)]
            x_BRX = draft.inputs(embedding[tokens_BR], h_BRH)
            own.append(draft.keys_values(x_BRX, rows_BR + step))
        query_BNRW = draft.queries(x_BRX, rows_BR + step)
        attended = _attend(query_BNRW, keys_BMTW, values_BMTW, unseen_BRT, own)
        y_BRH = draft.finish(h_BRH, attended)
        learnt_BR = sets_KBT[step][batch_index, rows_BR] & held_BR
        sample, column = learnt_BR.nonzero(as_tuple=True)
        outputs.append(StepOutput(torch.stack((sample, rows_BR[sample, column]), 1), y_BRH[sample, column]))
        h_BRH = draft.feedback(y_BRH)
    return outputs


def _gather_rows(chosen_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``[B, R]`` of the chosen rows, ascending and padded with 0, and which of them are real."""
    counts_B = chosen_BT.sum(1)
    width = max(1, int(counts_B.max()))
    order_BT = chosen_BT.int().argsort(dim=1, descending=True, stable=True)
    held_BR = torch.arange(width, device=chosen_BT.device) < counts_B[:, None]
    return order_BT[:, :width] * held_BR, held_BR


def _attend(
    query_BNRW: Tensor, keys_BMTW: Tensor, values_BMTW: Tensor, unseen_BRT: Tensor, own: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Attention of every row to the visible step-0 keys and to its own later ones, one softmax over both: ``[B, N, R, W]``."""
    heads, width = query_BNRW.shape[1], query_BNRW.shape[3]
    query_BMGRW = query_BNRW.unflatten(1, (keys_BMTW.shape[1], -1)) * width**-0.5
    group = query_BMGRW.shape[2]
    query_BMSW = query_BMGRW.flatten(2, 3)
    scores_BMGRT = (query_BMSW @ keys_BMTW.transpose(-1, -2)).unflatten(2, (group, -1))
    scores_BMGRT = scores_BMGRT.masked_fill(unseen_BRT[:, None, None], -torch.inf)
    diagonal = [(query_BMGRW * keys[:, :, None]).sum(-1, keepdim=True) for keys, _ in own]
    weights = torch.cat([scores_BMGRT, *diagonal], -1).softmax(-1)
    length = keys_BMTW.shape[2]
    attended = (weights[..., :length].flatten(2, 3) @ values_BMTW).unflatten(2, (group, -1))
    for step, (_, values) in enumerate(own):
        attended = attended + weights[..., length + step, None] * values[:, :, None]
    return attended.reshape(len(attended), heads, -1, width)
