"""Rollout and losses made of the kernels: what :mod:`..rollout` and ``train/objective.py`` say, for GPUs.

Products stay with the vendor's library. Weights are cast once a batch, to the type that products are taken in: the
head's own, or autocast's; projections of one input are laid side by side. A batch waits for the device once, for how
many rows each step has.

Shape suffixes: those of :mod:`..rollout`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..draft import Eagle3Draft, rotation_table
from ..rollout import RolloutBatch, StepOutput, layout, ordered_rows, supervised
from .attention import attend
from .losses import TeacherLogits, losses, teach
from .norms import AttentionInputs, NormWithResidual, rms_norm
from .places import place
from .pointwise import rotate, swiglu


class Weights(NamedTuple):
    """The head's matrices, in the type that products are taken in."""

    qkv: Tensor  # [(N + 2M) W, 2H]
    out: Tensor  # [H, N W]
    gate_up: Tensor  # [2I, H]
    down: Tensor  # [H, I]
    fc: Tensor  # [H, F H]


def compute_dtype(draft: Eagle3Draft) -> torch.dtype:
    """What products are taken in: autocast's type where it is on, the head's elsewhere."""
    device = draft.fc.weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else draft.fc.weight.dtype


def _weights(draft: Eagle3Draft, dtype: torch.dtype) -> Weights:
    attention, mlp = draft.midlayer.self_attn, draft.midlayer.mlp
    joint = torch.cat([layer.weight.to(dtype) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)])
    gate_up = torch.cat([layer.weight.to(dtype) for layer in (mlp.gate_proj, mlp.up_proj)])
    rest = (attention.o_proj, mlp.down_proj, draft.fc)
    out, down, fc = (layer.weight.to(dtype) for layer in rest)
    return Weights(joint, out, gate_up, down, fc)


class Take(torch.autograd.Function):
    """Rows of a matrix, none of them twice: what comes back is copied, not added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        """``x [m, H]`` at ``[n]`` to ``[n, H]``."""
        ctx.save_for_backward(at)
        ctx.length = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of x."""
        (at,) = ctx.saved_tensors
        whole = gradients[0].new_zeros(ctx.length, gradients[0].shape[1])
        return whole.index_copy_(0, at, gradients[0]), None


def rollout(draft: Eagle3Draft, embedding: Tensor, batch: RolloutBatch, steps: int) -> list[StepOutput]:
    """:func:`..rollout.rollout`, of a frozen embedding."""
    dtype, config, device = compute_dtype(draft), draft.config, draft.fc.weight.device.type
    with torch.autocast(device, enabled=False):
        weights = _weights(draft, dtype)
        heads, eps = config.num_heads, config.rms_norm_eps
        norms = (draft.midlayer.input_layernorm.weight, draft.midlayer.hidden_norm.weight, eps)
        tokens, where = len(batch.input_ids), layout(batch.lengths, len(batch.input_ids))
        rows, counts = ordered_rows(supervised(batch.loss_mask, batch.lengths, steps))
        places = place(rows, where, batch.lengths)
        # As long as if all were one document: how long the longest is, the device would have to be asked.
        table = rotation_table(config, tokens + steps, embedding.new_empty(0, dtype=torch.float32))[:, :, 0]

        combined = _combine(draft, weights.fc, batch.features.to(dtype))
        x, h = AttentionInputs.apply(embedding, batch.input_ids.roll(-1), combined, *norms)
        split = heads * config.head_dim
        _, past = rotate(F.linear(x, weights.qkv[split:]), where.position, table, 0)

        h, x, position = Take.apply(h, rows), Take.apply(x, rows), where.position[rows]
        query, _ = rotate(F.linear(x, weights.qkv[:split]), position, table, heads)
        own: list[Tensor] = []
        outputs: list[StepOutput] = []
        for step, count in enumerate(counts):
            if step:
                ids = batch.input_ids[rows[:count] + 1 + step]
                y = outputs[-1].y
                fed_back = rms_norm(y, draft.norm.weight, eps) if config.norm_output else y
                x, h = AttentionInputs.apply(embedding, ids, fed_back, *norms)
                query, keys_values = rotate(F.linear(x, weights.qkv), position[:count] + step, table, heads)
                own.append(keys_values)
            residual = x[:, config.hidden_size :] if config.norm_before_residual else h
            attended = attend(query, past, own, places)
            outputs.append(StepOutput(rows[:count], _finish(draft, weights, residual, attended)))
        return outputs


def _combine(draft: Eagle3Draft, fc: Tensor, features: Tensor) -> Tensor:
    eps = draft.config.rms_norm_eps
    if draft.config.norm_before_fc:
        features = rms_norm(features.flatten(1), draft.input_norm.weight, eps).view_as(features)
    if draft.config.fc_norm:
        parts = zip(draft.fc_norm.parameters(), features.unbind(1), strict=True)
        features = torch.stack([rms_norm(part, weight, eps) for weight, part in parts], 1)
    return F.linear(features.flatten(1), fc)


def _finish(draft: Eagle3Draft, weights: Weights, residual: Tensor, attended: Tensor) -> Tensor:
    """The layer behind the attention."""
    y = torch.addmm(residual, attended.flatten(1), weights.out.t())
    normed, y = NormWithResidual.apply(y, draft.midlayer.post_attention_layernorm.weight, draft.config.rms_norm_eps)
    return torch.addmm(y, swiglu(F.linear(normed, weights.gate_up)), weights.down.t())


def teacher_of(last_hidden: Tensor, lm_head: Tensor, draft: Eagle3Draft) -> TeacherLogits:
    """The target behind ``last_hidden [n, H]``."""
    return teach(last_hidden, lm_head.to(compute_dtype(draft)), draft.draft_ids)


def step_losses(
    draft: Eagle3Draft, outputs: list[Tensor], teacher: TeacherLogits, at: list[Tensor], sharpness: float | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Summed loss and alpha, and hits ``[n]``, of every step.

    Args:
        draft: the head.
        outputs: y ``[n, H]`` of every step.
        teacher: from :func:`teacher_of`.
        at: the teachers ``[n]`` of every step's rows.
        sharpness: LK's; None means KL.
    """
    dtype, ids, eps = compute_dtype(draft), draft.draft_ids, draft.config.rms_norm_eps
    with torch.autocast(ids.device.type, enabled=False):
        weight = draft.lm_head.weight.to(dtype)
        return [
            losses(rms_norm(y, draft.norm.weight, eps), weight, teacher, each, ids, sharpness)
            for y, each in zip(outputs, at, strict=True)
        ]
