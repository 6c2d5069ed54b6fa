"""RMSNorms in one pass each, forwards and backwards.

    x, h = attention_inputs(embedding, ids, h, embed_weight, hidden_weight, eps)   # [n, 2H], and h for the residual
    y = rms_norm(x, weight, eps)

With r = 1 / sqrt(mean(x^2) + eps) and u = x r, the norm is w u, and dx = r (w dy - u mean(w dy u)), dw = sum of dy u.

Shape suffixes: n rows, H hidden, V vocabulary, X = 2H.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # four for each multiprocessor of a Hopper: enough to hide latency, few enough partial sums


@triton.jit
def _forward(
    x_ptr, ids_ptr, weight_ptr, y_ptr, r_ptr, y_stride, eps,
    H: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = row
    if GATHER:
        source = tl.load(ids_ptr + row).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < H
    x = tl.load(x_ptr + source * H + at, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / H + eps)
    tl.store(r_ptr + row, r)
    tl.store(y_ptr + row * y_stride + at, (x * r * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _backward(
    x_ptr, ids_ptr, weight_ptr, r_ptr, d_y_ptr, d_residual_ptr, d_x_ptr, d_weight_ptr, d_y_stride, n,
    H: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < H
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    start, stride = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    for turn in range(tl.cdiv(n - tl.program_id(0), stride)):
        here = start + turn * stride
        source = here
        if GATHER:
            source = tl.load(ids_ptr + here).to(tl.int64)
        r = tl.load(r_ptr + here)
        u = tl.load(x_ptr + source * H + at, mask=inside, other=0.0).to(tl.float32) * r
        d_y = tl.load(d_y_ptr + here * d_y_stride + at, mask=inside, other=0.0).to(tl.float32)
        d_weight += d_y * u
        if not GATHER:
            d_u = d_y * weight
            d_x = r * (d_u - u * (tl.sum(d_u * u, 0) / H))
            if RESIDUAL:
                d_x += tl.load(d_residual_ptr + here * H + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_x_ptr + here * H + at, d_x.to(d_x_ptr.dtype.element_ty), mask=inside)
    tl.store(d_weight_ptr + tl.program_id(0) * H + at, d_weight, mask=inside)


def _normed(x: Tensor, ids: Tensor | None, weight: Tensor, out_nH: Tensor, eps: float) -> Tensor:
    """Write the norms of ``x``, or of its rows ``ids``, to ``out [n, H]``; returns r ``[n]``."""
    n, hidden = out_nH.shape
    r_n = torch.empty(n, dtype=torch.float32, device=out_nH.device)
    if n:
        _forward[(n,)](
            x, ids, weight, out_nH, r_n, out_nH.stride(0), eps,
            H=hidden, BLOCK=triton.next_power_of_2(hidden), GATHER=ids is not None, num_warps=_warps(hidden),
        )  # fmt: skip
    return r_n


def _gradients(
    x: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    r_n: Tensor,
    d_y_nH: Tensor,
    d_residual_nH: Tensor | None,
    d_x: Tensor,
) -> Tensor:
    """Write the gradient of ``x`` to ``d_x``, unless rows were gathered; returns that of ``weight``."""
    n, hidden = d_y_nH.shape
    programs = max(1, min(n, PROGRAMS))
    partial = torch.empty(programs, hidden, dtype=torch.float32, device=d_y_nH.device)
    _backward[(programs,)](
        x, ids, weight, r_n, d_y_nH, d_residual_nH, d_x, partial, d_y_nH.stride(0), n,
        H=hidden, BLOCK=triton.next_power_of_2(hidden), GATHER=ids is not None, RESIDUAL=d_residual_nH is not None,
        num_warps=_warps(hidden),
    )  # fmt: skip
    return partial.sum(0).to(weight.dtype)


def _warps(width: int) -> int:
    return min(max(triton.next_power_of_2(width) // 1024, 1), 8)


class NormWithResidual(torch.autograd.Function):
    """``norm(x)`` and ``x`` itself, so that the gradients of both are added where they are made."""

    @staticmethod
    def forward(ctx: Any, x_nH: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``x [n, H]`` to ``[n, H]`` and ``x``."""
        x_nH = x_nH.contiguous()
        y_nH = torch.empty_like(x_nH)
        r_n = _normed(x_nH, None, weight, y_nH, eps)
        ctx.save_for_backward(x_nH, weight, r_n)
        return y_nH, x_nH.view_as(x_nH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and weight."""
        x_nH, weight, r_n = ctx.saved_tensors
        d_x_nH = torch.empty_like(x_nH)
        d_y_nH, d_residual_nH = _rows(gradients[0]), gradients[1].contiguous()
        d_weight = _gradients(x_nH, None, weight, r_n, d_y_nH, d_residual_nH, d_x_nH)
        return d_x_nH, d_weight, None


class RMSNormed(torch.autograd.Function):
    """``norm(x)``."""

    @staticmethod
    def forward(ctx: Any, x_nH: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``[n, H]`` to ``[n, H]``."""
        x_nH = x_nH.contiguous()
        y_nH = torch.empty_like(x_nH)
        ctx.save_for_backward(x_nH, weight, _normed(x_nH, None, weight, y_nH, eps))
        return y_nH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and weight."""
        x_nH, weight, r_n = ctx.saved_tensors
        d_x_nH = torch.empty_like(x_nH)
        return d_x_nH, _gradients(x_nH, None, weight, r_n, _rows(gradients[0]), None, d_x_nH), None


class AttentionInputs(torch.autograd.Function):
    """Norms of embedding and hidden state side by side, and the hidden state itself for the residual.

    The first ``len(ids)`` rows of h take part; the others get no gradient. The embedding is frozen and gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, embedding_VH: Tensor, ids_n: Tensor, h_mH: Tensor, embed_weight: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``ids [n]`` and the first n of ``h [m, H]`` to ``x [n, 2H]`` and ``h [n, H]``."""
        n, hidden, h_mH = len(ids_n), h_mH.shape[1], h_mH.contiguous()
        h_nH, x_nX = h_mH[:n], h_mH.new_empty(n, 2 * hidden)
        r_embed_n = _normed(embedding_VH, ids_n, embed_weight, x_nX[:, :hidden], eps)
        r_n = _normed(h_nH, None, weight, x_nX[:, hidden:], eps)
        ctx.save_for_backward(embedding_VH, ids_n, h_mH, embed_weight, weight, r_embed_n, r_n)
        return x_nX, h_nH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of h and of both weights."""
        embedding_VH, ids_n, h_mH, embed_weight, weight, r_embed_n, r_n = ctx.saved_tensors
        hidden, n, d_h_mH = h_mH.shape[1], len(ids_n), torch.empty_like(h_mH)
        d_h_mH[n:] = 0
        d_x_nX, d_residual_nH = _rows(gradients[0]), gradients[1].contiguous()
        d_embed = _gradients(embedding_VH, ids_n, embed_weight, r_embed_n, d_x_nX[:, :hidden], None, d_h_mH)
        d_weight = _gradients(h_mH, None, weight, r_n, d_x_nX[:, hidden:], d_residual_nH, d_h_mH)
        return None, None, d_h_mH, d_embed, d_weight, None


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rms_norm(x_nH: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``[n, H]`` to ``[n, H]``."""
    out: Tensor = RMSNormed.apply(x_nH, weight, eps)
    return out
