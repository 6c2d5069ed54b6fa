"""The embedded target's forward pass as its training runs it: the modules of transformers, a faster way through them.

transformers' Llama-4 sends every token through every expert and builds masks for chunked attention. Training wants
neither: here each token visits its own expert, and chunked attention is plain causal attention over ``[B*T/C, C]``.
The blocks are functions of tensors, so that ``torch.compile`` compiles each of them once, not once a layer.
``tests/train/test_embedded.py`` holds the result against transformers' own forward.

Shape suffixes: B batch, T tokens, H hidden, N heads, D head width, E experts, R = B*T rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4TextConfig


def hidden_states(model: Llama4ForCausalLM, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The states that the LM head reads, and the router's load-balancing loss summed over layers.

    Args:
        model: a Llama-4 text model without query/key norms.
        ids_BT: token ids; every row starts at position 0. T is at most the attention chunk or a multiple of it.

    Returns:
        ``[B, T, H]`` after the final norm, and a scalar that is the number of MoE layers under perfect balance.
    """
    config, length = model.config, ids_BT.shape[1]
    rotations = _rotations(config, length)
    x_BTH = F.embedding(ids_BT, model.model.embed_tokens.weight)
    balance = x_BTH.new_zeros((), dtype=torch.float32)
    for layer in model.model.layers:
        heads, use_rope = layer.self_attn, layer.self_attn.use_rope
        x_BTH = _attention(
            x_BTH,
            layer.input_layernorm.weight,
            [p.weight for p in (heads.q_proj, heads.k_proj, heads.v_proj, heads.o_proj)],
            rotations if use_rope else None,
            min(config.attention_chunk_size, length) if use_rope else length,
            config.head_dim,
            config.rms_norm_eps,
        )
        norm, ffn = layer.post_attention_layernorm.weight, layer.feed_forward
        if layer.is_moe_layer:
            x_BTH, share = _moe(x_BTH, norm, ffn, config.rms_norm_eps)
            balance = balance + share
        else:
            x_BTH = x_BTH + _swiglu(_norm(x_BTH, norm, config.rms_norm_eps), *_weights(ffn))
    return _norm(x_BTH, model.model.norm.weight, config.rms_norm_eps), balance


def compile_blocks() -> None:
    """Compile the blocks in place: worth a minute before hours of training, not before a test."""
    for block in (_attention, _swiglu, _route):
        globals()[block.__name__] = torch.compile(block, dynamic=False)


def _weights(mlp: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    return mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps)


def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _rotations(config: Llama4TextConfig, length: int) -> tuple[Tensor, Tensor]:
    theta = config.rope_parameters["rope_theta"]
    inverse = theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.arange(length).float()[:, None] * inverse[None]
    return angles.cos()[:, None], angles.sin()[:, None]


def _rotate(x_BTND: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate interleaved pairs, as Llama-4 does (its drafts rotate halves)."""
    cos_TD, sin_TD = rotations
    even, odd = x_BTND.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos_TD - odd * sin_TD, even * sin_TD + odd * cos_TD), -1)
    return turned.flatten(-2).type_as(x_BTND)


def _attention(
    x_BTH: Tensor,
    norm: Tensor,
    projections: list[Tensor],
    rotations: tuple[Tensor, Tensor] | None,
    span: int,
    width: int,
    eps: float,
) -> Tensor:
    batch, length, _ = x_BTH.shape
    y_BTH = _norm(x_BTH, norm, eps)
    q, k, v = (F.linear(y_BTH, weight).unflatten(-1, (-1, width)) for weight in projections[:3])
    if rotations is not None:
        q, k = _rotate(q, rotations), _rotate(k, rotations)
    q, k, v = (t.reshape(batch * length // span, span, -1, width).transpose(1, 2) for t in (q, k, v))
    out = (_short_attention if span <= 256 else _long_attention)(q, k, v)
    return x_BTH + F.linear(out.transpose(1, 2).reshape(batch, length, -1), projections[3])


def _long_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with its scores written out: on a CPU 1.7 times as fast as the flash kernel up to about 256 tokens."""
    groups, span = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    future = torch.ones(span, span, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1).type_as(v) @ v


def _route(x_BTH: Tensor, norm: Tensor, router: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, their copies scaled by the sigmoid of the top router logit, their experts and the mean probabilities."""
    rows_RH = _norm(x_BTH, norm, eps).flatten(0, 1)
    logits_RE = F.linear(rows_RH, router).float()
    top_R, expert_R = logits_RE.max(-1)
    return rows_RH, rows_RH * torch.sigmoid(top_R)[:, None], expert_R, logits_RE.softmax(-1).mean(0)


def _moe(x_BTH: Tensor, norm: Tensor, moe: nn.Module, eps: float) -> tuple[Tensor, Tensor]:
    rows_RH, scaled_RH, expert_R, mean_E = _route(x_BTH, norm, moe.router.weight, eps)
    order_R = expert_R.argsort()
    counts_E = torch.bincount(expert_R, minlength=moe.num_experts)
    parts = []
    for part, gate_up, down in zip(
        scaled_RH[order_R].split(counts_E.tolist()), moe.experts.gate_up_proj, moe.experts.down_proj, strict=True
    ):
        gate, up = (part @ gate_up).chunk(2, -1)
        parts.append((up * F.silu(gate)) @ down)
    routed_RH = torch.cat(parts)[order_R.argsort()] + _swiglu(rows_RH, *_weights(moe.shared_expert))
    # The auxiliary loss of the Switch Transformer (arXiv 2101.03961, eq. 4): 1 when the load is balanced.
    return x_BTH + routed_RH.view_as(x_BTH), moe.num_experts * (mean_E * (counts_E / len(expert_R))).sum()
