"""The teacher's sums over V and the losses over D, each row in one program.

    teacher = teach(last_hidden, lm_head, draft_ids)             # of every step-0 row
    loss, alpha, hits = losses(y, weight, teacher, at, draft_ids, "lk")

Formulas: train/objective.py. Logits are worked on where they lie: their gradient takes their place. Teachers are kept
as logits over D with the log-sum-exp over V, since that is exact in bfloat16, and probabilities would not be.

Shape suffixes: n rows of a step, m teachers, c rows of a chunk, H hidden, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

CHUNK_BYTES = 2**30  # of the target's logits at once


class TeacherLogits(NamedTuple):
    """The target at m positions; :class:`eagle3.train.objective.Teacher` without the exponentials."""

    reach: Tensor  # [m, D] logits
    logsumexp: Tensor  # [m] over V
    mass: Tensor  # [m]
    p_log_p: Tensor  # [m]
    top: Tensor  # [m] int32, a target id


@triton.jit
def _peaks(z_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp of a row, and where its largest entry is first."""
    m = -float("inf")
    top = 0
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + at, mask=at < WIDTH, other=-float("inf")).to(tl.float32)
        here = tl.max(z, 0)
        if here > m:
            top = tl.min(tl.where(z == here, at, WIDTH), 0)
            total *= tl.exp(m - here)
            m = here
        total += tl.exp(z - m)
    return m + tl.log(tl.sum(total, 0)), top


@triton.jit
def _teach(
    z_ptr, ids_ptr, reach_ptr, lse_ptr, mass_ptr, p_log_p_ptr, top_ptr,
    V: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * V
    lse, top = _peaks(z_ptr, V, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    p_log_p = tl.zeros([BLOCK], tl.float32)
    for first in range(0, D, BLOCK):
        at = first + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + at, mask=at < D, other=0)
        z = tl.load(z_ptr + ids, mask=at < D, other=0.0)
        tl.store(reach_ptr + row * D + at, z, mask=at < D)
        log_p = z.to(tl.float32) - lse
        p = tl.where(at < D, tl.exp(log_p), 0.0)
        mass += p
        p_log_p += p * log_p
    tl.store(lse_ptr + row, lse)
    tl.store(mass_ptr + row, tl.sum(mass, 0))
    tl.store(p_log_p_ptr + row, tl.sum(p_log_p, 0))
    tl.store(top_ptr + row, top)


@triton.jit
def _loss(
    z_ptr, reach_ptr, teacher_lse_ptr, mass_ptr, p_log_p_ptr, top_ptr, at_ptr, ids_ptr, loss_ptr, alpha_ptr, hit_ptr,
    sharpness, D: tl.constexpr, BLOCK: tl.constexpr, LK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    teacher = tl.load(at_ptr + row).to(tl.int64)
    z_ptr += row * D
    reach_ptr += teacher * D
    p_lse = tl.load(teacher_lse_ptr + teacher)
    mass = tl.load(mass_ptr + teacher)
    lse, top = _peaks(z_ptr, D, BLOCK)
    cross = tl.zeros([BLOCK], tl.float32)  # p log q
    least = tl.zeros([BLOCK], tl.float32)
    under = tl.zeros([BLOCK], tl.float32)  # q where q < p
    for first in range(0, D, BLOCK):
        at = first + tl.arange(0, BLOCK)
        log_q = tl.load(z_ptr + at, mask=at < D, other=0.0).to(tl.float32) - lse
        p = tl.exp(tl.load(reach_ptr + at, mask=at < D, other=-float("inf")).to(tl.float32) - p_lse)
        q = tl.where(at < D, tl.exp(log_q), 0.0)
        cross += p * log_q
        least += tl.minimum(p, q)
        under += tl.where(q < p, q, 0.0)
    kl = tl.load(p_log_p_ptr + teacher) - tl.sum(cross, 0)
    alpha = tl.sum(least, 0)
    weight = 1.0
    if LK:
        weight = tl.exp(-sharpness * alpha)
    scale = weight * mass + (1.0 - weight) * tl.sum(under, 0)
    tl.store(loss_ptr + row, weight * kl + (1.0 - weight) * (1.0 - alpha))
    tl.store(alpha_ptr + row, alpha)
    tl.store(hit_ptr + row, tl.load(ids_ptr + top).to(tl.int32) == tl.load(top_ptr + teacher))
    if GRADIENT:
        for first in range(0, D, BLOCK):
            at = first + tl.arange(0, BLOCK)
            q = tl.exp(tl.load(z_ptr + at, mask=at < D, other=0.0).to(tl.float32) - lse)
            p = tl.exp(tl.load(reach_ptr + at, mask=at < D, other=0.0).to(tl.float32) - p_lse)
            gradient = q * scale - weight * p - tl.where(q < p, (1.0 - weight) * q, 0.0)
            tl.store(z_ptr + at, gradient.to(z_ptr.dtype.element_ty), mask=at < D)


@torch.no_grad()
def teach(last_hidden_mH: Tensor, lm_head: Tensor, draft_ids: Tensor) -> TeacherLogits:
    """The target behind ``last_hidden [m, H]``, some rows of ``[m, V]`` logits at a time."""
    m, vocabulary, size = len(last_hidden_mH), len(lm_head), len(draft_ids)
    sums = torch.empty(3, m, dtype=torch.float32, device=lm_head.device)
    top = torch.empty(m, dtype=torch.int32, device=lm_head.device)
    reach = torch.empty(m, size, dtype=lm_head.dtype, device=lm_head.device)
    chunk = max(256, CHUNK_BYTES // (vocabulary * lm_head.element_size()) // 256 * 256)
    for first in range(0, m, chunk):
        part = slice(first, first + chunk)
        logits_cV = F.linear(last_hidden_mH[part].to(lm_head.dtype), lm_head)
        _teach[(len(logits_cV),)](
            logits_cV, draft_ids, reach[part], sums[0, part], sums[1, part], sums[2, part], top[part],
            V=vocabulary, D=size, BLOCK=_block(vocabulary), num_warps=8,
        )  # fmt: skip
        del logits_cV
    logsumexp, mass, p_log_p = sums
    return TeacherLogits(reach, logsumexp, mass, p_log_p, top)


class Losses(torch.autograd.Function):
    """Summed loss and alpha of a step behind its last product, ``logits = y weight^T``."""

    @staticmethod
    def forward(
        ctx: Any,
        y_nH: Tensor,
        weight: Tensor,
        teacher: TeacherLogits,
        at: Tensor,
        draft_ids: Tensor,
        sharpness: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed ``y [n, H]``, ``weight [D, H]`` and teachers ``at [n]`` to loss, alpha and hits ``[n]``; KL without sharpness."""
        wanted = any(ctx.needs_input_grad[:2])
        logits_nD = F.linear(y_nH, weight)
        n, size = logits_nD.shape
        found = torch.empty(2, n, dtype=torch.float32, device=y_nH.device)
        hits = torch.empty(n, dtype=torch.bool, device=y_nH.device)
        if n:
            _loss[(n,)](
                logits_nD, *teacher, at, draft_ids, *found, hits, sharpness or 0.0,
                D=size, BLOCK=_block(size), LK=sharpness is not None, GRADIENT=wanted, num_warps=8,
            )  # fmt: skip
        if wanted:
            ctx.save_for_backward(y_nH, weight, logits_nD)
        loss, alpha = found.sum(1)
        ctx.mark_non_differentiable(alpha, hits)
        return loss, alpha, hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y and weight."""
        y_nH, weight, d_logits_nD = ctx.saved_tensors
        scale = gradients[0].to(y_nH.dtype)
        return (d_logits_nD @ weight) * scale, d_logits_nD.t() @ (y_nH * scale), None, None, None, None


def _block(width: int) -> int:
    return min(4096, triton.next_power_of_2(width))


def losses(
    y_nH: Tensor, weight: Tensor, teacher: TeacherLogits, at: Tensor, draft_ids: Tensor, sharpness: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss (with gradient) and alpha, and which of ``n`` rows the target agrees with."""
    found: tuple[Tensor, Tensor, Tensor] = Losses.apply(y_nH, weight, teacher, at, draft_ids, sharpness)
    return found
