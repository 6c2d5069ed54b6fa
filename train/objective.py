"""What the draft is asked for: the target's distribution (KL), or what serving will accept of it (LK).

Step j of row t predicts token t+2+j; its teacher is the target at token t+1+j. Teacher probabilities p are normalised over
the full vocabulary and then restricted to the draft's, so mass outside it stays a loss the head cannot win back.

    kl:  KL = sum over D of p (log p - log q)
    lk:  w KL + (1 - w)(1 - alpha),  alpha = sum over D of min(p, q),  w = exp(-3 alpha) held constant     (arXiv 2602.23881)

alpha is the expected acceptance of a token sampled from the draft. Step j weighs step_decay ** j. A batch's loss is the sum
over its supervised rows and steps; the caller divides by the number of step-0 rows of the global batch.

Shape suffixes: B batch, T tokens, H hidden, D draft vocabulary, V vocabulary, n rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.draft import Eagle3Draft
from ..models.rollout import RolloutBatch, StepOutput

OBJECTIVES = ("kl", "lk")
LK_SHARPNESS = 3.0


class Teacher(NamedTuple):
    """The target at n positions: log-probabilities over the draft vocabulary, its top token, and where a position is."""

    log_p: Tensor  # [n, D]
    top: Tensor  # [n], target ids
    index: Tensor  # [B, T]: row t (whose first prediction this is) to n, -1 where there is none


class StepResult(NamedTuple):
    """One step: summed loss (with gradient), summed alpha, and whether each row's top token is the target's."""

    loss: Tensor
    alpha: Tensor
    hits: Tensor  # [n] bool


def teacher_of(batch: RolloutBatch, rows: Tensor, lm_head: Tensor, draft_ids: Tensor) -> Teacher:
    """The target's distribution behind step-0 ``rows [n, 2]``; later steps find theirs among these.

    If step j of row t is supervised, so is step 0 of row t+j, and both have the same teacher.
    """
    sample, row = rows.unbind(1)
    with torch.no_grad():
        logits = F.linear(batch.last_hidden[sample, row + 1], lm_head)
        log_p = logits[:, draft_ids] - logits.logsumexp(-1, keepdim=True)
        index = torch.full(batch.input_ids.shape, -1, device=rows.device)
        index[sample, row] = torch.arange(len(rows), device=rows.device)
        return Teacher(log_p, logits.argmax(-1), index)


def row_losses(logits: Tensor, log_p: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Loss and alpha of every row, ``[n]`` each, for draft ``logits [n, D]`` and teacher ``log_p [n, D]``."""
    log_q, p = logits.log_softmax(-1), log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    if kind == "kl":
        with torch.no_grad():
            return kl, torch.minimum(p, log_q.exp()).sum(-1)
    alpha = torch.minimum(p, log_q.exp()).sum(-1)
    weight = torch.exp(-LK_SHARPNESS * alpha.detach())
    return weight * kl + (1 - weight) * (1 - alpha), alpha.detach()


def objective(
    draft: Eagle3Draft, steps: list[StepOutput], batch: RolloutBatch, lm_head: Tensor, kind: str
) -> list[StepResult]:
    """Loss of every step of a rollout, unweighted and summed over its rows.

    Args:
        draft: the head that was rolled out.
        steps: :func:`~eagle3.models.rollout.rollout`'s outputs.
        batch: the documents.
        lm_head: the target's, ``[V, H]``.
        kind: one of OBJECTIVES.
    """
    draft_ids = draft.draft_ids
    teacher = teacher_of(batch, steps[0].rows, lm_head, draft_ids)
    results = []
    for step, (rows, y) in enumerate(steps):
        sample, row = rows.unbind(1)
        at = teacher.index[sample, row + step]
        logits = draft.logits(y)
        losses, alpha = row_losses(logits, teacher.log_p[at], kind)
        hits = draft_ids[logits.argmax(-1)] == teacher.top[at]
        results.append(StepResult(losses.sum(), alpha.sum(), hits))
    return results


def weighted(results: list[StepResult], decay: float) -> Tensor:
    """The scalar to differentiate: the sum over steps j of ``decay ** j`` times the step's loss."""
    return torch.stack([decay**step * result.loss for step, result in enumerate(results)]).sum()
