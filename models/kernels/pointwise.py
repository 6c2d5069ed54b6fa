"""Rotation into heads, and SwiGLU, forwards and backwards in one pass each.

    q, kv = rotate(qkv, positions, table, heads=40)      # [n, N, W] and [n, 2, M, W], keys first; values as they are
    hidden = swiglu(gate_up)                             # [n, 2I] to [n, I]

Rotation is NeoX's: pair i of a head is (x[i], x[i + C]). Shape suffixes: n rows, N heads, M key/value heads, W head
width, C half of it, I MLP, L positions, Z = N + 2M.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["length"])
def _rotate(
    joint_ptr, q_ptr, kv_ptr, positions_ptr, table_ptr, length, joint_stride,
    N: tl.constexpr, M: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, C)[None, :]
    position = tl.load(positions_ptr + row)
    cos = tl.load(table_ptr + position * C + at)
    sin = tl.load(table_ptr + (length + position) * C + at)
    turned = head < N + M
    cos, sin = tl.where(turned, cos, 1.0), tl.where(turned, sin, 0.0)
    joint = joint_ptr + row * joint_stride + head * (2 * C) + at
    q = q_ptr + row * (N * 2 * C) + head * (2 * C) + at
    kv = kv_ptr + row * (4 * M * C) + (head - N) * (2 * C) + at
    is_q = (head < N) & (at >= 0)
    is_kv = (head >= N) & (head < N + 2 * M) & (at >= 0)
    if BACK:
        low = tl.load(q, mask=is_q, other=0.0).to(tl.float32) + tl.load(kv, mask=is_kv, other=0.0).to(tl.float32)
        high = tl.load(q + C, mask=is_q, other=0.0).to(tl.float32)
        high += tl.load(kv + C, mask=is_kv, other=0.0).to(tl.float32)
        tl.store(joint, (low * cos + high * sin).to(joint_ptr.dtype.element_ty), mask=is_q | is_kv)
        tl.store(joint + C, (high * cos - low * sin).to(joint_ptr.dtype.element_ty), mask=is_q | is_kv)
    else:
        low = tl.load(joint, mask=is_q | is_kv, other=0.0).to(tl.float32)
        high = tl.load(joint + C, mask=is_q | is_kv, other=0.0).to(tl.float32)
        first = (low * cos - high * sin).to(joint_ptr.dtype.element_ty)
        second = (high * cos + low * sin).to(joint_ptr.dtype.element_ty)
        tl.store(q, first, mask=is_q)
        tl.store(q + C, second, mask=is_q)
        tl.store(kv, first, mask=is_kv)
        tl.store(kv + C, second, mask=is_kv)


class Rotated(torch.autograd.Function):
    """Projections to heads, queries and keys rotated."""

    @staticmethod
    def forward(ctx: Any, joint_nZW: Tensor, positions_n: Tensor, table: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """``[n, N + 2M, W]`` at ``positions [n]`` of ``table [2, L, C]`` to queries and keys with values."""
        n, total, width = joint_nZW.shape
        q_nNW = joint_nZW.new_empty(n, heads, width)
        kv_n2MW = joint_nZW.new_empty(n, 2, (total - heads) // 2, width)
        _launch(joint_nZW, q_nNW, kv_n2MW, positions_n, table, False)
        ctx.save_for_backward(positions_n, table)
        return q_nNW, kv_n2MW

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the projections."""
        positions_n, table = ctx.saved_tensors
        d_q_nNW, d_kv_n2MW = (gradient.contiguous() for gradient in gradients)
        n, heads, width = d_q_nNW.shape
        d_joint_nZW = d_q_nNW.new_empty(n, heads + 2 * d_kv_n2MW.shape[2], width)
        _launch(d_joint_nZW, d_q_nNW, d_kv_n2MW, positions_n, table, True)
        return d_joint_nZW, None, None, None


def _launch(joint_nZW: Tensor, q_nNW: Tensor, kv_n2MW: Tensor, positions_n: Tensor, table: Tensor, back: bool) -> None:
    n, total, width = joint_nZW.shape
    if n:
        _rotate[(n,)](
            joint_nZW, q_nNW, kv_n2MW, positions_n, table, table.shape[1], joint_nZW.stride(0),
            N=q_nNW.shape[1], M=kv_n2MW.shape[2], C=width // 2, HEADS=triton.next_power_of_2(total), BACK=back,
            num_warps=4,
        )  # fmt: skip


@triton.jit
def _swiglu(x_ptr, y_ptr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * (2 * WIDE) + at, mask=at < WIDE, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * WIDE) + WIDE + at, mask=at < WIDE, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * WIDE + at, y.to(y_ptr.dtype.element_ty), mask=at < WIDE)


@triton.jit
def _swiglu_backward(x_ptr, d_y_ptr, d_x_ptr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * (2 * WIDE) + at, mask=at < WIDE, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * WIDE) + WIDE + at, mask=at < WIDE, other=0.0).to(tl.float32)
    d_y = tl.load(d_y_ptr + row * WIDE + at, mask=at < WIDE, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    d_gate = d_y * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    d_up = d_y * gate * sigmoid
    tl.store(d_x_ptr + row * (2 * WIDE) + at, d_gate.to(d_x_ptr.dtype.element_ty), mask=at < WIDE)
    tl.store(d_x_ptr + row * (2 * WIDE) + WIDE + at, d_up.to(d_x_ptr.dtype.element_ty), mask=at < WIDE)


class SwiGLUed(torch.autograd.Function):
    """``silu(gate) * up`` of both side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """``[n, 2I]`` to ``[n, I]``."""
        n, width = len(x), x.shape[1] // 2
        y = x.new_empty(n, width)
        if n:
            _swiglu[(n, triton.cdiv(width, 4096))](x, y, WIDE=width, BLOCK=min(4096, triton.next_power_of_2(width)))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Gradient of both."""
        (x,) = ctx.saved_tensors
        n, width, d_x = len(x), x.shape[1] // 2, torch.empty_like(x)
        if n:
            _swiglu_backward[(n, triton.cdiv(width, 4096))](
                x, gradients[0].contiguous(), d_x, WIDE=width, BLOCK=min(4096, triton.next_power_of_2(width))
            )
        return d_x


def rotate(joint: Tensor, positions_n: Tensor, table: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Projections ``[n, Z * W]``, queries first, to queries ``[n, N, W]`` and keys with values ``[n, 2, M, W]``."""
    found: tuple[Tensor, Tensor] = Rotated.apply(
        joint.unflatten(-1, (-1, 2 * table.shape[2])), positions_n.contiguous(), table, heads
    )
    return found


def swiglu(x: Tensor) -> Tensor:
    """``[n, 2I]``, gate first, to ``[n, I]``."""
    out: Tensor = SwiGLUed.apply(x)
    return out
