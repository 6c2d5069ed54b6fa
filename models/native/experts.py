"""Rows of hidden states through the expert that each was routed to; no other is computed for it.

Three ways, one result: which is fastest depends on how many rows there are and on who may wait for whom.

Shape suffixes: R rows, H hidden, I width of an expert (2I: gate and up), E experts, O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import Experts

FEW = 8  # rows for which an accelerator copies their experts' weights instead of sorting them by expert

#: Rows ``[R, I]`` sorted by expert, weights ``[E, O, I]`` and where each expert's rows end ``[E]``, to ``[R, O]``.
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def routed(x_RH: Tensor, expert_R: Tensor, weights: Experts) -> Tensor:
    """Each row through its expert, ``[R, H]`` to ``[R, H]``, by the way that suits device and number of rows."""
    if x_RH.device.type == "cpu":
        return alone(x_RH, expert_R, weights) if len(x_RH) == 1 else by_expert(x_RH, expert_R, weights, looped)
    if len(x_RH) <= FEW:
        return gathered(x_RH, expert_R, weights)
    return by_expert(x_RH, expert_R, weights, grouped if x_RH.dtype == torch.bfloat16 else looped)


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, ``[R, 2I]`` to ``[R, I]``."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def alone(x_1H: Tensor, expert_1: Tensor, weights: Experts) -> Tensor:
    """One row on a CPU, where asking for its expert's number costs nothing."""
    expert = int(expert_1)
    return F.linear(gated(F.linear(x_1H, weights.gate_up[expert])), weights.down[expert])


def gathered(x_RH: Tensor, expert_R: Tensor, weights: Experts) -> Tensor:
    """A few rows, each with a copy of its expert's weights: nothing is asked of the device."""
    inner_RI = gated(torch.bmm(weights.gate_up[expert_R], x_RH[:, :, None])[..., 0])
    return torch.bmm(weights.down[expert_R], inner_RI[:, :, None])[..., 0]


def by_expert(x_RH: Tensor, expert_R: Tensor, weights: Experts, product: Product) -> Tensor:
    """Rows sorted by expert, so that those of one are one product."""
    sorted_R, order_R = expert_R.sort()
    ends_E = torch.searchsorted(sorted_R, torch.arange(len(weights.router), device=x_RH.device), right=True)
    out_RH = torch.empty_like(x_RH)
    out_RH[order_R] = product(gated(product(x_RH[order_R], weights.gate_up, ends_E)), weights.down, ends_E)
    return out_RH


def grouped(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """One call for all experts; nothing is asked of the device."""
    return F.grouped_mm(x_RI, weight_EOI.mT, offs=ends_E.int())


def looped(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Expert after expert, those without rows left out; it asks for their numbers, so an accelerator waits."""
    out_RO = x_RI.new_empty(len(x_RI), weight_EOI.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(x_RI[start:end], weight_EOI[expert].t(), out=out_RO[start:end])
        start = end
    return out_RO
