"""Muon for many small matrices: momentum, orthogonalised (Jordan et al., 2024, kellerjordan.github.io/posts/muon).

``torch.optim.Muon`` takes the matrices one by one and in bfloat16, which a CPU without bfloat16 units only emulates: here
that took as long as the gradients. This one stacks matrices of one shape, works in float32, and deals them out over the
processes. ``tests/train/test_embedded.py`` holds its steps against torch's.

Shapes: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is replaced by the nearest orthogonal matrix, with decoupled weight decay.

    Updates are scaled to the root mean square that AdamW's have, 0.2 (Liu et al., arXiv 2502.16982), so ``lr`` means the
    same as there. A parameter of three dimensions is a stack of matrices. Gradients must be equal on all processes.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape[-2], parameter.shape[-1]), []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                wanted = [self._momentum(p, group["momentum"]).reshape(-1, rows, columns) for p in parameters]
                updates_NRC = _shared(torch.cat(wanted))
                rate = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                for parameter, update in zip(parameters, updates_NRC.split([len(w) for w in wanted]), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * update.view_as(parameter))

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        buffer: Tensor = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)


def orthogonalise(matrices_NRC: Tensor) -> Tensor:
    """Each matrix with its singular values pushed towards 1 by a quintic Newton-Schulz iteration."""
    tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def _shared(matrices_NRC: Tensor) -> Tensor:
    """:func:`orthogonalise`, each process doing its part."""
    if not dist.is_initialized():
        return orthogonalise(matrices_NRC)
    rank, world = dist.get_rank(), dist.get_world_size()
    out = torch.zeros_like(matrices_NRC)
    out[rank::world] = orthogonalise(matrices_NRC[rank::world])
    dist.all_reduce(out)
    return out
