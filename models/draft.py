"""The EAGLE-3 draft head: one Llama-style decoder layer over the target's features.

    h        = fc(concat(features))                            # once per verified token, captured layers ascending
    x        = concat(input_layernorm(embed), hidden_norm(h))
    y        = h + attention(x);  y = y + mlp(post_attention_layernorm(y))
    logits   = lm_head(norm(y));  the next step's h is y

Source: Li et al., arXiv 2503.01840. Row t pairs the features of token t with the embedding of token t+1, at RoPE
position t; it predicts token t+2. Rotation is NeoX's (halves), whatever the target's own is. The embedding is the
target's and not part of this module: callers pass embedded tokens. Parameter names are those that engines load.

Shape suffixes: B batch, T new rows, S cached and new rows, N heads, M key/value heads, H hidden, F features, D draft
vocabulary, V vocabulary, W head width, C half of it, X = 2H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DraftConfig:
    """Everything that determines the shapes and the arithmetic of a head.

    ``target_layers`` are the captured decoder layers, 0-based and ascending. ``fc_norm`` and ``norm_output`` are
    EAGLE-3.1's: an RMSNorm per captured layer before ``fc``, and feeding ``norm(y)`` back instead of ``y``.
    ``norm_before_residual`` and ``norm_before_fc`` are the speculators package's: the attention is added to
    ``hidden_norm(h)`` instead of ``h``, and one RMSNorm over all captured layers together precedes ``fc``.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    target_layers: tuple[int, ...]
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, x.shape[-1:], self.weight.to(wide.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    """The projections; what attends to what is :mod:`.rollout`'s affair when training, ``decode``'s when serving."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        width = config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, config.num_heads * width, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, config.num_kv_heads * width, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, config.num_kv_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_heads * width, config.hidden_size, bias=False)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class MidLayer(nn.Module):
    """The decoder layer's parts, under the names of the checkpoint."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def rotation_table(config: DraftConfig, length: int, like: Tensor) -> Tensor:
    """Cosines and sines of RoPE positions 0..length-1, ``[2, length, 1, C]``, in ``like``'s dtype.

    Angles are taken in float64, as positions grow large. Nothing of this is a buffer of the head, because casting a
    module to bfloat16 casts its buffers.
    """
    half = config.head_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=like.device) / half
    positions = torch.arange(length, dtype=torch.float64, device=like.device)
    angles = positions[:, None, None] * config.rope_theta**-exponents
    return torch.stack((angles.cos(), angles.sin())).to(like.dtype)


class DraftCache:
    """Keys and values of the rows so far; rejected rows are taken back by moving ``length``.

    Args:
        config: the head's shape.
        batch: rows of the batch.
        capacity: positions of the longest request.
        like: a tensor of the head's dtype and device.
    """

    def __init__(self, config: DraftConfig, batch: int, capacity: int, like: Tensor) -> None:
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self._keys, self._values = like.new_empty(shape), like.new_empty(shape)
        self.rotation = rotation_table(config, capacity, like)
        self.length = 0

    def append(self, keys_BMTW: Tensor, values_BMTW: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows; returns all keys and values, ``[B, M, S, W]`` each."""
        start, end = self.length, self.length + keys_BMTW.shape[2]
        self._keys[:, :, start:end] = keys_BMTW
        self._values[:, :, start:end] = values_BMTW
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def rollback(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        self.length = min(self.length, length)


class Eagle3Draft(nn.Module):
    """The head.

    Args:
        config: its shape.
        draft_ids: target ids ``[D]`` of the draft vocabulary, ascending; None where D = V and ids are shared.

    Raises:
        ValueError: ``draft_ids`` are not as many as ``config`` says.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: DraftConfig, draft_ids: Tensor | None = None) -> None:
        super().__init__()
        if (config.vocab_size if draft_ids is None else len(draft_ids)) != config.draft_vocab_size:
            raise ValueError(f"a draft vocabulary of {config.draft_vocab_size} needs as many draft_ids")
        self.config = config
        hidden, captured = config.hidden_size, len(config.target_layers)
        self.fc = nn.Linear(captured * hidden, hidden, bias=False)
        if config.norm_before_fc:
            self.input_norm = RMSNorm(captured * hidden, config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(hidden, config.rms_norm_eps) for _ in range(captured))
        self.midlayer = MidLayer(config)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        if draft_ids is not None:
            chosen = torch.zeros(config.vocab_size, dtype=torch.bool)
            chosen[draft_ids] = True
            self.register_buffer("d2t", draft_ids - torch.arange(len(draft_ids)))
            self.register_buffer("t2d", chosen)

    @property
    def mapped(self) -> bool:
        """Whether the draft vocabulary is a part of the target's (D < V)."""
        return "d2t" in self._buffers

    @property
    def draft_ids(self) -> Tensor:
        """The target ids ``[D]`` that the draft can propose."""
        ids = torch.arange(self.config.draft_vocab_size, device=self.fc.weight.device)
        return ids + self.d2t if self.mapped else ids

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Draft ids to target ids; ``d2t`` holds offsets."""
        return draft_ids + self.d2t[draft_ids] if self.mapped else draft_ids

    def combine(self, features: Tensor) -> Tensor:
        """Captured states ``[..., F, H]``, of any dtype, to the draft's hidden state ``[..., H]``."""
        features = features.to(self.fc.weight.dtype)
        if self.config.norm_before_fc:
            features = self.input_norm(features.flatten(-2)).view_as(features)
        if self.config.fc_norm:
            parts = features.unbind(-2)
            features = torch.stack([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -2)
        out: Tensor = self.fc(features.flatten(-2))
        return out

    def logits(self, y: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., D]``."""
        out: Tensor = self.lm_head(self.norm(y))
        return out

    def feedback(self, y: Tensor) -> Tensor:
        """What the next step takes as its hidden state, ``[..., H]``."""
        return self.norm(y) if self.config.norm_output else y

    def inputs(self, embed: Tensor, h: Tensor) -> Tensor:
        """``[..., H]`` and ``[..., H]`` to the attention's input ``[..., 2H]``; embedding first."""
        return torch.cat((self.midlayer.input_layernorm(embed.to(h.dtype)), self.midlayer.hidden_norm(h)), -1)

    def queries(self, x: Tensor, rotation: Tensor) -> Tensor:
        """``[..., 2H]``, rotated by ``rotation [2, ..., 1, C]``, to ``[..., N, W]``."""
        return self._rotated(self.midlayer.self_attn.q_proj(x), rotation)

    def keys_values(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., 2H]`` to keys, rotated by ``rotation [2, ..., 1, C]``, and values, ``[..., M, W]`` each."""
        attention = self.midlayer.self_attn
        return self._rotated(attention.k_proj(x), rotation), self._heads(attention.v_proj(x))

    def finish(self, h: Tensor, attended: Tensor) -> Tensor:
        """The layer behind the attention: ``h [..., H]`` and ``attended [..., N, W]`` to ``y [..., H]``."""
        residual = self.midlayer.hidden_norm(h) if self.config.norm_before_residual else h
        y = residual + self.midlayer.self_attn.o_proj(attended.flatten(-2))
        out: Tensor = y + self.midlayer.mlp(self.midlayer.post_attention_layernorm(y))
        return out

    def new_cache(self, batch: int, capacity: int) -> DraftCache:
        """An empty cache for serving."""
        return DraftCache(self.config, batch, capacity, self.fc.weight)

    def decode(self, embed: Tensor, h: Tensor, positions: Tensor, cache: DraftCache) -> Tensor:
        """Serve T rows behind those in ``cache``, and add them to it: the plain way, which :mod:`.native.draft` is held to.

        Args:
            embed: embedded next tokens, ``[B, T, H]``.
            h: combined features, or fed-back outputs, ``[B, T, H]``.
            positions: RoPE positions, ``[B, T]``, below the cache's capacity.

        Returns:
            y, ``[B, T, H]``.
        """
        x = self.inputs(embed, h)
        rotation = cache.rotation[:, positions]
        query_BNTW = self.queries(x, rotation).transpose(1, 2)
        keys_BTMW, values_BTMW = self.keys_values(x, rotation)
        keys_BMSW, values_BMSW = cache.append(keys_BTMW.transpose(1, 2), values_BTMW.transpose(1, 2))
        new, total = query_BNTW.shape[2], keys_BMSW.shape[2]
        mask = None
        if new > 1:
            mask = torch.ones(new, total, dtype=torch.bool, device=x.device).tril(total - new)
        attended = F.scaled_dot_product_attention(query_BNTW, keys_BMSW, values_BMSW, attn_mask=mask, enable_gqa=True)
        return self.finish(h, attended.transpose(1, 2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))

    def _rotated(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Split into heads and rotate halves (NeoX): pair i is (x[i], x[i + C])."""
        low, high = self._heads(x).chunk(2, dim=-1)
        cos, sin = rotation
        return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
