"""Muon for matrices and AdamW for the rest, in one optimizer (Jordan et al., 2024, kellerjordan.github.io/posts/muon).

    Muon([{"params": matrices}, {"params": norms, "kind": "adamw"}], lr=2e-3)

``torch.optim.Muon`` takes the matrices one by one and in bfloat16, which a CPU without bfloat16 units only emulates: here
that took as long as the gradients. This one stacks matrices of one shape, works in float32 on a CPU, and deals out a
stack that is large enough over the processes. ``tests/train/test_muon.py`` holds its steps against those of torch's
Muon and AdamW.

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

    A group of ``kind`` "adamw" is updated as ``torch.optim.AdamW`` does, by its ``betas``. ``input_scale [C]`` is for
    matrices whose input has columns of that scale: they are updated as if the input were divided by it and the matrix
    multiplied, which computes the same.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        chosen = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas}
        super().__init__(params, chosen | {"kind": "muon", "input_scale": None, "eps": 1e-8})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill in options that a saved state is too old to have."""
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape[-2:]), []).append(parameter)
            for parameters in by_shape.values():
                if group["kind"] == "muon":
                    self._update_matrices(parameters, group)
                else:
                    for parameter in parameters:
                        self._update_by_adamw(parameter, group)

    def _update_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        rows, columns = parameters[0].shape[-2:]
        scale_C = group["input_scale"]
        counts = [parameter.numel() // (rows * columns) for parameter in parameters]
        stack_NRC = torch.cat([self._momentum(p, group["momentum"]).reshape(-1, rows, columns) for p in parameters])
        if scale_C is not None:
            stack_NRC.div_(scale_C)
        updates_NRC = _dealt_out(stack_NRC)
        if scale_C is not None:
            updates_NRC = updates_NRC / scale_C
        rate = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
        for parameter, update in zip(parameters, updates_NRC.split(counts), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(rate * update.view_as(parameter))

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        assert parameter.grad is not None
        buffer: Tensor = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)

    def _update_by_adamw(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (first, second) = state["step"].item(), group["betas"]
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        spread = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - second**step)).add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], spread, value=-group["lr"] / (1 - first**step))


def orthogonalise(matrices_NRC: Tensor) -> Tensor:
    """Each matrix with its singular values pushed towards 1 by a quintic Newton-Schulz iteration.

    In bfloat16 on a GPU, as is usual; in float32 elsewhere.
    """
    tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    x = x.bfloat16() if x.is_cuda else x
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices_NRC.dtype)


def _dealt_out(matrices_NRC: Tensor) -> Tensor:
    """:func:`orthogonalise`, each process doing its part where there is one for each."""
    if not dist.is_initialized() or len(matrices_NRC) < dist.get_world_size():
        return orthogonalise(matrices_NRC)
    rank, world = dist.get_rank(), dist.get_world_size()
    out = torch.zeros_like(matrices_NRC)
    out[rank::world] = orthogonalise(matrices_NRC[rank::world])
    dist.all_reduce(out)
    return out
