"""What the draft is asked for: the target's distribution (KL), or what serving will accept of it (LK).

    results = objective(draft, outputs, batch, head.lm_head, "lk")       # one StepResult a step
    weighted(results, decay=0.8).backward()

Step j of row t predicts token t+2+j; its teacher is the target at token t+1+j. Teacher probabilities p are normalised
over the full vocabulary and then restricted to the draft's, so mass outside it stays a loss the head cannot win back.

    kl:  KL = sum over D of p (log p - log q)
    lk:  w KL + (1 - w)(1 - alpha),  alpha = sum over D of min(p, q),  w = exp(-3 alpha) held constant

LK-hybrid is arXiv 2602.23881's; alpha is the expected acceptance of a token sampled from the draft. Step j weighs
step_decay ** j. A batch's loss is the sum over its supervised rows and steps; the caller divides by the number of
step-0 rows of the global batch.

Shape suffixes: N tokens, H hidden, D draft vocabulary, V vocabulary, n rows of a step, c rows of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import kernels
from ..models.draft import Eagle3Draft
from ..models.rollout import RolloutBatch, StepOutput

LK_SHARPNESS = 3.0
CHUNK_ELEMENTS = 2**17  # logits worked on at once: they and what is made of them stay in a core's cache


class Teacher(NamedTuple):
    """The target at n positions: its probabilities over the draft vocabulary, and what losses need of them."""

    p: Tensor  # [n, D], normalised over V
    mass: Tensor  # [n], sum of p: 1 - mass is out of the draft's reach
    p_log_p: Tensor  # [n], sum over D of p log p
    top: Tensor  # [n], the most likely token over V, a target id


class StepResult(NamedTuple):
    """One step: summed loss (with gradient), summed alpha, and whether each row's top token is the target's."""

    loss: Tensor
    alpha: Tensor
    hits: Tensor  # [n] bool


def teacher_of(last_hidden: Tensor, lm_head: Tensor, draft_ids: Tensor | None) -> Teacher:
    """The target's distribution behind ``last_hidden [n, H]``; at no time are all ``[n, V]`` logits there.

    Args:
        last_hidden: after the target's final norm.
        lm_head: the target's, ``[V, H]``.
        draft_ids: the draft vocabulary ``[D]``; None where D = V.
    """
    chunk = max(1, 4 * CHUNK_ELEMENTS // len(lm_head))
    with torch.no_grad(), torch.autocast(lm_head.device.type, enabled=False):
        parts = [_teacher(rows.to(lm_head.dtype), lm_head, draft_ids) for rows in last_hidden.split(chunk)]
        return Teacher(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _teacher(last_hidden_cH: Tensor, lm_head: Tensor, draft_ids: Tensor | None) -> Teacher:
    logits_cV = _at_least_float32(F.linear(last_hidden_cH, lm_head))
    reach_cD = logits_cV if draft_ids is None else logits_cV.index_select(1, draft_ids)
    log_p_cD = reach_cD - logits_cV.logsumexp(-1, keepdim=True)
    p_cD = log_p_cD.exp()
    return Teacher(p_cD, p_cD.sum(-1), (p_cD * log_p_cD).sum(-1), logits_cV.argmax(-1))


class RowLosses(torch.autograd.Function):
    """Loss of every row, with the gradient of the logits taken on the way.

    Written out because autograd would keep half a dozen ``[n, D]`` tensors a step and walk over each again. With m = 1
    where q < p, and s = sum of m q:

        dKL/dz = mass q - p,    dalpha/dz = q (m - s)
        dLK/dz = q (w mass + (1 - w) s) - (1 - w) m q - w p
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Teacher, at: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Loss and alpha ``[n]`` each, for draft ``logits [n, D]`` whose teachers are ``at [n]`` in ``teacher``."""
        gradient = torch.empty_like(logits)
        size = max(1, CHUNK_ELEMENTS // logits.shape[1])
        chunks = zip(logits.split(size), at.split(size), gradient.split(size), strict=True)
        losses, alphas = zip(*[_chunk_losses(*chunk, teacher, kind) for chunk in chunks], strict=True)
        ctx.save_for_backward(gradient)
        alpha = torch.cat(alphas)
        ctx.mark_non_differentiable(alpha)
        return torch.cat(losses), alpha

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None].to(gradient.dtype), None, None, None


def _chunk_losses(
    logits_cD: Tensor, at_c: Tensor, gradient_cD: Tensor, teacher: Teacher, kind: str
) -> tuple[Tensor, Tensor]:
    """Loss and alpha of some rows; their gradient goes to ``gradient_cD``."""
    p_cD, mass_c1 = teacher.p.index_select(0, at_c), teacher.mass[at_c, None]
    log_q_cD = _at_least_float32(logits_cD).log_softmax(-1)
    kl_c = teacher.p_log_p[at_c] - torch.linalg.vecdot(p_cD, log_q_cD)
    q_cD = log_q_cD.exp_()
    alpha_c = torch.minimum(p_cD, q_cD).sum(-1)
    if kind == "kl":
        gradient_cD.copy_((q_cD * mass_c1).sub_(p_cD))
        return kl_c, alpha_c
    won_cD = q_cD * (q_cD < p_cD)
    weight_c1 = torch.exp(-LK_SHARPNESS * alpha_c)[:, None]
    scale_c1 = weight_c1 * mass_c1 + (1 - weight_c1) * won_cD.sum(-1, keepdim=True)
    gradient_cD.copy_(q_cD.mul_(scale_c1).sub_(won_cD.mul_(1 - weight_c1)).sub_(p_cD.mul_(weight_c1)))
    weight_c = weight_c1[:, 0]
    return weight_c * kl_c + (1 - weight_c) * (1 - alpha_c), alpha_c


def objective(
    draft: Eagle3Draft, steps: list[StepOutput], batch: RolloutBatch, lm_head: Tensor, kind: str
) -> list[StepResult]:
    """Loss of every step of a rollout, unweighted and summed over its rows.

    If step j of row t is supervised, so is step 0 of row t+j, and both have the same teacher: it is computed once.

    Args:
        draft: the head that was rolled out.
        steps: :func:`~eagle3.models.rollout.rollout`'s outputs.
        batch: the documents.
        lm_head: the target's, ``[V, H]``.
        kind: "kl" or "lk".
    """
    rows = steps[0].rows
    index_N = torch.full_like(batch.input_ids, -1)
    index_N[rows] = torch.arange(len(rows), device=rows.device)
    at = [index_N[output.rows + step] for step, output in enumerate(steps)]
    states = batch.last_hidden[rows + 1]
    if fused := kernels.chosen(draft):
        teacher = fused.teacher_of(states, lm_head, draft)
        sharpness = LK_SHARPNESS if kind == "lk" else None
        return [StepResult(*each) for each in fused.step_losses(draft, [y for _, y in steps], teacher, at, sharpness)]
    return _plain(draft, steps, teacher_of(states, lm_head, draft.draft_ids if draft.mapped else None), at, kind)


def _plain(
    draft: Eagle3Draft, steps: list[StepOutput], teacher: Teacher, at: list[Tensor], kind: str
) -> list[StepResult]:
    """Without kernels: what they are checked against, and what a CPU computes."""
    draft_ids, results = draft.draft_ids, []
    for (_, y), at_n in zip(steps, at, strict=True):
        logits = draft.logits(y)
        losses, alpha = RowLosses.apply(logits, teacher, at_n, kind)
        hits = draft_ids[_at_least_float32(logits.detach()).argmax(-1)] == teacher.top[at_n]
        results.append(StepResult(losses.sum(), alpha.sum(), hits))
    return results


def weighted(results: list[StepResult], decay: float) -> Tensor:
    """The scalar to differentiate: the sum over steps j of ``decay ** j`` times the step's loss."""
    return torch.stack([decay**step * result.loss for step, result in enumerate(results)]).sum()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
