"""Attention of supervised rows to step-0 keys and to their own keys of later steps, as one softmax.

    places = place(rows, layout, lengths)                      # of :mod:`.places`, once a batch
    attended = attend(q, past, own, places)                    # [n, N, W]

A program has a tile of rows of one document. Keys a row sees are those of its document up to its own; beside them each
row has one key a later step. The log-sum-exp over all of them is kept; with P the probabilities, O the output and
delta = rowsum(dO O), dS = P (dO V^T - delta) for every key.

Source of the tiling: Dao et al., arXiv 2205.14135 and 2307.08691.

Shape suffixes: T tokens, n rows of a step, N heads, M key/value heads, G = N/M, W head width, J
own keys of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import TritonError

from .places import TILE, Places

__all__ = ["LAUNCHES", "Launch", "TritonError", "attend"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows_of_tile(slots_ptr, ends_ptr, tile, count, BLOCK_ROWS: tl.constexpr):
    """Places in the flat list, whether there is a row of this step, and its end."""
    slot = tl.load(slots_ptr + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))
    valid = (slot >= 0) & (slot < count)
    slot = tl.where(valid, slot, 0)
    end = tl.load(ends_ptr + slot, mask=valid, other=0)
    return slot.to(tl.int64), valid, end


@triton.jit
def _softmax_block(q, kv_block, kv_head_at, inside, limit, m, total, out, scale, M: tl.constexpr, W: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One block of keys of the running softmax; ``limit`` is True where a row sees a key."""
    if MASK:
        k = tl.load(kv_block + kv_head_at, mask=inside[:, None], other=0.0)
        v = tl.load(kv_block + kv_head_at + M * W, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(kv_block + kv_head_at)
        v = tl.load(kv_block + kv_head_at + M * W)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASK:
        s = tl.where(limit, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    out = out * shrink[:, None]
    out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
    return m_new, total, out


@triton.jit(do_not_specialize=["count", "own"])
def _forward(
    q_ptr, past_ptr, own_ptr, out_ptr, lse_ptr, ends_ptr, slots_ptr, start_ptr, tile_end_ptr, count, own_stride, own, scale,
    N: tl.constexpr, M: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(1), tl.program_id(0)
    kv_head = head // (N // M)
    slot, valid, end = _rows_of_tile(slots_ptr, ends_ptr, tile, count, ROWS)
    last = tl.max(end, 0)
    if last > 0:
        at = tl.arange(0, W)
        q_at = (slot * N + head)[:, None] * W + at[None, :]
        q = tl.load(q_ptr + q_at, mask=valid[:, None], other=0.0)
        scale2 = scale * LOG2E
        m = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        out = tl.zeros([ROWS, W], tl.float32)
        for i in range(own):
            own_at = i * own_stride + slot[:, None] * (2 * M * W) + kv_head * W + at[None, :]
            k = tl.load(own_ptr + own_at, mask=valid[:, None], other=0.0).to(tl.float32)
            v = tl.load(own_ptr + own_at + M * W, mask=valid[:, None], other=0.0).to(tl.float32)
            s = tl.sum(q.to(tl.float32) * k, 1) * scale2
            m_new = tl.maximum(m, s)
            p = tl.exp2(s - m_new)
            shrink = tl.exp2(m - m_new)
            total = total * shrink + p
            out = out * shrink[:, None] + p[:, None] * v
            m = m_new
        whole = (tl.min(tl.where(valid, end, last), 0) // KEYS) * KEYS  # every row sees these
        begin = tl.load(start_ptr + tile).to(tl.int64)
        key = tl.arange(0, KEYS)
        kv_at = key[:, None] * (2 * M * W) + kv_head * W + at[None, :]
        base = past_ptr + begin * (2 * M * W)
        for first in range(0, whole, KEYS):
            m, total, out = _softmax_block(q, base + first * (2 * M * W), kv_at, key < KEYS, valid[:, None], m, total, out, scale2, M, W, False, PRECISION)  # fmt: skip
        for first in range(whole, last, KEYS):
            limit = first + key[None, :] < end[:, None]
            m, total, out = _softmax_block(q, base + first * (2 * M * W), kv_at, first + key < last, limit, m, total, out, scale2, M, W, True, PRECISION)  # fmt: skip
        tl.store(out_ptr + q_at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])
        tl.store(lse_ptr + slot * N + head, m + tl.log2(total), mask=valid)  # in bits


@triton.jit(do_not_specialize=["count", "own"])
def _own_backward(
    q_ptr, own_ptr, out_ptr, lse_ptr, d_out_ptr, delta_ptr, d_own_ptr, count, own_stride, own, scale,
    N: tl.constexpr, M: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta of every row and head, and the gradients of own keys and values."""
    kv_head, groups = tl.program_id(1), N // M
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = slot < count
    some = valid[:, None]
    at = tl.arange(0, W)[None, :]
    for g in range(groups):
        head = kv_head * groups + g
        q_at = (slot * N + head)[:, None] * W + at
        out = tl.load(out_ptr + q_at, mask=some, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + q_at, mask=some, other=0.0).to(tl.float32)
        tl.store(delta_ptr + slot * N + head, tl.sum(out * d_out, 1), mask=valid)
    for i in range(own):
        own_at = i * own_stride + slot[:, None] * (2 * M * W) + kv_head * W + at
        k = tl.load(own_ptr + own_at, mask=some, other=0.0).to(tl.float32)
        v = tl.load(own_ptr + own_at + M * W, mask=some, other=0.0).to(tl.float32)
        d_k = tl.zeros([ROWS, W], tl.float32)
        d_v = tl.zeros([ROWS, W], tl.float32)
        for g in range(groups):
            head = kv_head * groups + g
            q_at = (slot * N + head)[:, None] * W + at
            q = tl.load(q_ptr + q_at, mask=some, other=0.0).to(tl.float32)
            out = tl.load(out_ptr + q_at, mask=some, other=0.0).to(tl.float32)
            d_out = tl.load(d_out_ptr + q_at, mask=some, other=0.0).to(tl.float32)
            lse = tl.load(lse_ptr + slot * N + head, mask=valid, other=0.0)
            p = tl.exp2(tl.sum(q * k, 1) * (scale * LOG2E) - lse)
            d_s = p * tl.sum(d_out * (v - out), 1)
            d_v += p[:, None] * d_out
            d_k += d_s[:, None] * q
        tl.store(d_own_ptr + own_at, (d_k * scale).to(d_own_ptr.dtype.element_ty), mask=some)
        tl.store(d_own_ptr + own_at + M * W, d_v.to(d_own_ptr.dtype.element_ty), mask=some)


@triton.jit
def _query_block(q, d_out, lse, delta, kv_block, kv_at, inside, limit, d_q, scale, M: tl.constexpr, W: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What one block of keys adds to the gradient of queries."""
    if MASK:
        k = tl.load(kv_block + kv_at, mask=inside[:, None], other=0.0)
        v = tl.load(kv_block + kv_at + M * W, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(kv_block + kv_at)
        v = tl.load(kv_block + kv_at + M * W)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
    if MASK:
        p = tl.where(limit, p, 0.0)
    d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    d_s = p * (d_p - delta[:, None])
    return tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)


@triton.jit(do_not_specialize=["count", "own"])
def _query_backward(
    q_ptr, past_ptr, own_ptr, lse_ptr, d_out_ptr, delta_ptr, d_q_ptr, ends_ptr, slots_ptr, start_ptr, count, own_stride,
    own, scale, N: tl.constexpr, M: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(1), tl.program_id(0)
    kv_head = head // (N // M)
    slot, valid, end = _rows_of_tile(slots_ptr, ends_ptr, tile, count, ROWS)
    last = tl.max(end, 0)
    if last > 0:
        at = tl.arange(0, W)
        some = valid[:, None]
        q_at = (slot * N + head)[:, None] * W + at[None, :]
        q = tl.load(q_ptr + q_at, mask=some, other=0.0)
        d_out = tl.load(d_out_ptr + q_at, mask=some, other=0.0)
        lse = tl.load(lse_ptr + slot * N + head, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + slot * N + head, mask=valid, other=0.0)
        d_q = tl.zeros([ROWS, W], tl.float32)
        scale2 = scale * LOG2E
        for i in range(own):
            own_at = i * own_stride + slot[:, None] * (2 * M * W) + kv_head * W + at[None, :]
            k = tl.load(own_ptr + own_at, mask=some, other=0.0).to(tl.float32)
            v = tl.load(own_ptr + own_at + M * W, mask=some, other=0.0).to(tl.float32)
            p = tl.exp2(tl.sum(q.to(tl.float32) * k, 1) * scale2 - lse)
            d_s = p * (tl.sum(d_out.to(tl.float32) * v, 1) - delta)
            d_q += d_s[:, None] * k
        whole = (tl.min(tl.where(valid, end, last), 0) // KEYS) * KEYS
        begin = tl.load(start_ptr + tile).to(tl.int64)
        key = tl.arange(0, KEYS)
        kv_at = key[:, None] * (2 * M * W) + kv_head * W + at[None, :]
        base = past_ptr + begin * (2 * M * W)
        for first in range(0, whole, KEYS):
            d_q = _query_block(q, d_out, lse, delta, base + first * (2 * M * W), kv_at, key < KEYS, some, d_q, scale2, M, W, False, PRECISION)  # fmt: skip
        for first in range(whole, last, KEYS):
            limit = first + key[None, :] < end[:, None]
            d_q = _query_block(q, d_out, lse, delta, base + first * (2 * M * W), kv_at, first + key < last, limit, d_q, scale2, M, W, True, PRECISION)  # fmt: skip
        tl.store(d_q_ptr + q_at, (d_q * scale).to(d_q_ptr.dtype.element_ty), mask=some)


@triton.jit(do_not_specialize=["count"])
def _key_backward(
    q_ptr, past_ptr, lse_ptr, d_out_ptr, delta_ptr, d_past_ptr, ends_ptr, slots_ptr, blocks_ptr, count, scale,
    N: tl.constexpr, M: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of step-0 keys and values: KEYS of them in one document, from all rows that see them, SPAN at a time."""
    kv_head, block = tl.program_id(0), blocks_ptr + tl.program_id(1) * 5
    groups = N // M
    token = tl.load(block).to(tl.int64) + tl.arange(0, KEYS)
    key = token - tl.load(block + 1)
    inside = token < tl.load(block + 2)
    at = tl.arange(0, W)
    kv_at = token[:, None] * (2 * M * W) + kv_head * W + at[None, :]
    k = tl.load(past_ptr + kv_at, mask=inside[:, None], other=0.0)
    v = tl.load(past_ptr + kv_at + M * W, mask=inside[:, None], other=0.0)
    d_k = tl.zeros([KEYS, W], tl.float32)
    d_v = tl.zeros([KEYS, W], tl.float32)
    scale2 = scale * LOG2E
    parts = ROWS // SPAN
    first = tl.load(block + 3) * parts
    last = tl.load(block + 4) * parts
    for turn in range(first * groups, last * groups):
        span = turn // groups
        head = kv_head * groups + turn % groups
        slot, valid, end = _rows_of_tile(slots_ptr, ends_ptr, span, count, SPAN)
        q_at = (slot * N + head)[:, None] * W + at[None, :]
        q = tl.load(q_ptr + q_at, mask=valid[:, None], other=0.0)
        d_out = tl.load(d_out_ptr + q_at, mask=valid[:, None], other=0.0)
        lse = tl.load(lse_ptr + slot * N + head, mask=valid, other=0.0)
        delta = tl.load(delta_ptr + slot * N + head, mask=valid, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2 - lse[None, :])
        p = tl.where(key[:, None] < end[None, :], p, 0.0)
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        d_s = p * (d_p - delta[None, :])
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
    tl.store(d_past_ptr + kv_at, (d_k * scale).to(d_past_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(d_past_ptr + kv_at + M * W, d_v.to(d_past_ptr.dtype.element_ty), mask=inside[:, None])


class Launch(NamedTuple):
    """Blocks of keys or rows at once, warps and stages of a kernel."""

    block: int
    warps: int
    stages: int


#: Of the forward pass, of queries backwards, of keys backwards. Measured by train/bench/head.py.
LAUNCHES = {"forward": Launch(64, 8, 3), "queries": Launch(64, 8, 2), "keys": Launch(64, 8, 2)}
#: float32 is for checks alone: what fits into a multiprocessor.
FLOAT32_LAUNCH = Launch(16, 8, 1)


def _launch(kernel: str, like: Tensor) -> Launch:
    return FLOAT32_LAUNCH if like.dtype == torch.float32 else LAUNCHES[kernel]


class Attend(torch.autograd.Function):
    """Attention of rows to the past and to their own later keys."""

    @staticmethod
    def forward(ctx: Any, q_nNW: Tensor, past: Tensor, places: Places, *own: Tensor) -> Tensor:
        """Queries ``[n, N, W]``, past ``[T, 2, M, W]``, own ``[at least n, 2, M, W]`` a later step, to ``[n, N, W]``."""
        count, heads, width = q_nNW.shape
        kv_heads = past.shape[2]
        out_nNW, lse_nN = torch.empty_like(q_nNW), q_nNW.new_empty(count, heads, dtype=torch.float32)
        own_J = _stacked(own, q_nNW, kv_heads)
        if count:
            block, warps, stages = _launch("forward", q_nNW)
            _forward[(heads, len(places.tile_end))](
                q_nNW, past, own_J, out_nNW, lse_nN, places.ends, places.slots, places.tile_start, places.tile_end, count,
                own_J.stride(0), len(own), width**-0.5, N=heads, M=kv_heads, W=width, ROWS=TILE, KEYS=block,
                PRECISION=_precision(q_nNW), num_warps=warps, num_stages=stages,
            )  # fmt: skip
        ctx.places = places
        ctx.save_for_backward(q_nNW, past, out_nNW, lse_nN, *own)
        return out_nNW

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, past and own keys and values."""
        q_nNW, past, out_nNW, lse_nN, *own = ctx.saved_tensors
        places: Places = ctx.places
        (count, heads, width), kv_heads, d_out_nNW = q_nNW.shape, past.shape[2], gradients[0].contiguous()
        d_q_nNW, d_past, delta_nN = torch.empty_like(q_nNW), torch.zeros_like(past), torch.empty_like(lse_nN)
        own_J = _stacked(own, q_nNW, kv_heads)
        d_own_J = torch.empty_like(own_J)
        if count:
            scale, stride = width**-0.5, own_J.stride(0)
            shape = {"N": heads, "M": kv_heads, "W": width}
            _own_backward[(triton.cdiv(count, 32), kv_heads)](
                q_nNW, own_J, out_nNW, lse_nN, d_out_nNW, delta_nN, d_own_J, count, stride, len(own), scale,
                ROWS=32, num_warps=4, **shape,
            )  # fmt: skip
            shape |= {"ROWS": TILE, "PRECISION": _precision(q_nNW)}
            block, warps, stages = _launch("queries", q_nNW)
            _query_backward[(heads, len(places.tile_end))](
                q_nNW, past, own_J, lse_nN, d_out_nNW, delta_nN, d_q_nNW, places.ends, places.slots, places.tile_start,
                count, stride, len(own), scale, KEYS=block, num_warps=warps, num_stages=stages, **shape,
            )  # fmt: skip
            block, warps, stages = _launch("keys", q_nNW)
            _key_backward[(kv_heads, len(places.blocks))](
                q_nNW, past, lse_nN, d_out_nNW, delta_nN, d_past, places.ends, places.slots, places.blocks, count, scale,
                SPAN=block, KEYS=TILE, num_warps=warps, num_stages=stages, **shape,
            )  # fmt: skip
        d_own = [_padded(gradient, len(each)) for gradient, each in zip(d_own_J, own, strict=True)]
        return d_q_nNW, d_past, None, *d_own


def _stacked(own: tuple[Tensor, ...] | list[Tensor], like_nNW: Tensor, kv_heads: int) -> Tensor:
    """Own keys and values ``[J, n, 2, M, W]`` of the rows that take part."""
    count, _, width = like_nNW.shape
    stacked = like_nNW.new_empty(len(own), count, 2, kv_heads, width)
    for target, source in zip(stacked, own, strict=True):
        target.copy_(source[:count])
    return stacked


def _padded(gradient: Tensor, length: int) -> Tensor:
    missing = length - len(gradient)
    return torch.cat((gradient, gradient.new_zeros(missing, *gradient.shape[1:]))) if missing else gradient


def _precision(like: Tensor) -> str:
    """float32 is multiplied as such, not in the tensor cores' short form."""
    return "ieee" if like.dtype == torch.float32 else "tf32"


def attend(q_nNW: Tensor, past: Tensor, own: list[Tensor], places: Places) -> Tensor:
    """Queries ``[n, N, W]``, the first of the flat list, to ``[n, N, W]``.

    Args:
        q_nNW: unscaled.
        past: step-0 keys and values of all tokens, ``[T, 2, M, W]``.
        own: keys and values of steps 1..j, ``[at least n, 2, M, W]`` each.
        places: from :func:`place`.
    """
    out: Tensor = Attend.apply(q_nNW, past, places, *own)
    return out
