"""Rows of hidden states through the expert that each was routed to; no other is computed for it.

Four ways, one result: which is fastest depends on how many rows there are and on who may wait for whom. A fifth computes
all experts, where a CPU has that done before it has sorted.

Shape suffixes: R rows, T tokens, K experts of a token, H hidden, I width of an expert (2I: gate and up), E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import Dense, Experts

SMALL = 1 << 21  # numbers in the experts' first matrices, times tokens, up to which a CPU computes all of them
FEW = 8  # rows for which an accelerator copies their experts' weights instead of sorting them by expert


def routed(x_RH: Tensor, expert_R: Tensor, weights: Experts) -> Tensor:
    """Each row through its expert, ``[R, H]`` to ``[R, H]``, by the way that suits device and number of rows."""
    rows = x_RH.shape[0]
    if x_RH.device.type == "cpu":
        if rows == 1:
            return alone(x_RH, expert_R, weights)
        return looped(x_RH, expert_R, weights)
    if rows <= FEW:
        return gathered(x_RH, expert_R, weights)
    return (grouped if x_RH.dtype == torch.bfloat16 else looped)(x_RH, expert_R, weights)


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[R, 2I]`` to ``[R, I]``."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def alone(x_1H: Tensor, expert_1: Tensor, weights: Experts) -> Tensor:
    """One row on a CPU, where asking for its expert's number costs nothing."""
    expert = int(expert_1)
    return torch.mm(gated(torch.mm(x_1H, weights.gate_up[expert])), weights.down[expert])


def everywhere(x_TH: Tensor, expert_TK: Tensor, score_TK: Tensor, every: Dense, count: int) -> Tensor:
    """A few tokens through what is shared and all of ``count`` small experts, as zeros but through their own.

    Nothing is sorted or counted, and there are two products in all.
    """
    share_TE = score_TK.new_zeros(len(x_TH), 1 + count).scatter_(1, expert_TK + 1, score_TK)
    share_TE.select(1, 0).fill_(1.0)
    gate_up_TEI = torch.mm(x_TH, every.gate_up).view(len(x_TH), 1 + count, -1).mul_(share_TE[..., None])
    return torch.mm(gated(gate_up_TEI).flatten(1), every.down)


def gathered(x_RH: Tensor, expert_R: Tensor, weights: Experts) -> Tensor:
    """A few rows, each with a copy of its expert's weights: nothing is asked of the device."""
    inner_RI = gated(torch.bmm(x_RH[:, None], weights.gate_up[expert_R])[:, 0])
    return torch.bmm(inner_RI[:, None], weights.down[expert_R])[:, 0]


def grouped(x_RH: Tensor, expert_R: Tensor, weights: Experts) -> Tensor:
    """Rows sorted by expert, and one call for all experts: nothing is asked of the device."""
    sorted_R, order_R = expert_R.sort()
    every_E = torch.arange(len(weights.down), device=x_RH.device)
    ends_E = torch.searchsorted(sorted_R, every_E, right=True, out_int32=True)
    inner_RI = gated(F.grouped_mm(x_RH.index_select(0, order_R), weights.gate_up, offs=ends_E))
    return torch.empty_like(x_RH).index_copy_(0, order_R, F.grouped_mm(inner_RI, weights.down, offs=ends_E))


def looped(x_RH: Tensor, expert_R: Tensor, weights: Experts) -> Tensor:
    """Rows sorted by expert, and expert after expert; it asks for their numbers of rows, so an accelerator waits."""
    counts = {expert: count for expert, count in enumerate(expert_R.bincount().tolist()) if count}

    def product(x: Tensor, weight: Tensor) -> Tensor:
        parts = zip(counts, x.split(list(counts.values())), strict=True)
        return torch.cat([torch.mm(part, weight[expert]) for expert, part in parts])

    order_R = expert_R.argsort()
    inner_RI = gated(product(x_RH.index_select(0, order_R), weights.gate_up))
    return torch.empty_like(x_RH).index_copy_(0, order_R, product(inner_RI, weights.down))
