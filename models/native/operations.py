"""The arithmetic of a decoder in plain torch: the reference, and what runs where no faster kernel is chosen.

A decoder calls these few methods and no other arithmetic, so a kernel is chosen by overriding one of them. None of them
waits for an accelerator, except float32 experts over many tokens (:mod:`.experts`).

Shape suffixes: T new tokens, N heads, M key/value heads, G = N / M, W head width, C half of it, H hidden, S keys, I width
of an MLP, K experts of a token, R = T * K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache
from .config import DecoderConfig, LayerConfig
from .experts import gated, routed
from .sights import Blocks, Step, Window
from .weights import Dense, Experts


class Rotation:
    """What positions do to queries and keys in one forward.

    ``pairs``: complex ``[T, 1, C]``, multiplies pairs (2i, 2i + 1) of a head. ``temperature``: ``[T, 1]``, multiplies the
    queries of layers that do not rotate; None: 1 for all.
    """

    __slots__ = ("pairs", "temperature")

    def __init__(self, pairs: Tensor, temperature: Tensor | None) -> None:
        self.pairs, self.temperature = pairs, temperature


class Operations:
    """Plain torch.

    Args:
        config: the decoder's.
        device: where it runs.
    """

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self.config = config
        self._frequencies_C = frequencies(config).to(device)
        self._root_eps = torch.tensor(config.rms_norm_eps**0.5, device=device)
        self._heads = (config.num_heads, config.num_kv_heads, config.head_dim)

    def rotation(self, step: Step) -> Rotation:
        """Angles are taken in float32, as the models were trained."""
        angles_TC = step.positions.float()[:, None] * self._frequencies_C
        pairs_T1C = torch.polar(torch.ones_like(angles_TC), angles_TC)[:, None]
        tuning, temperature_T1 = self.config.temperature, None
        if tuning is not None and step.last + 1 >= tuning.floor:
            floors_T1 = ((step.positions.float() + 1.0) / tuning.floor).floor_()[:, None]
            temperature_T1 = floors_T1.log1p_().mul_(tuning.scale).add_(1.0)
        return Rotation(pairs_T1C, temperature_T1)

    def norm(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        """RMSNorm, computed in float32. ``[T, H]`` to ``[T, H]``."""
        if x_TH.device.type != "cpu":
            return F.rms_norm(x_TH, weight_H.shape, weight_H, self.config.rms_norm_eps)
        wide_TH = x_TH.float()
        return (wide_TH / self._mean_square_root(wide_TH)).mul_(weight_H).to(x_TH.dtype)

    def linear(self, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        """``[T, I]`` to ``[T, O]``."""
        return F.linear(x_TI, weight_OI)

    def attend(
        self, qkv: Tensor, layer: LayerConfig, rotation: Rotation, step: Step, index: int, cache: Cache | None
    ) -> Tensor:
        """Attention of layer ``index`` from the product ``[T, (N + 2M) * W]``, which is overwritten, to ``[T, N * W]``.

        New keys and values enter ``cache`` on the way.
        """
        heads, stored, width = self._heads
        qkv_TNW = qkv.view(-1, heads + 2 * stored, width)
        if layer.rotates:
            self._rotate(qkv_TNW[:, : heads + stored], rotation)
        elif rotation.temperature is not None:
            qkv[:, : heads * width] *= rotation.temperature
        if cache is not None and step.places is not None:
            cache.layers[index].index_copy_(0, step.places, qkv[:, heads * width :])
        sight = step.sights[layer.chunk]
        if isinstance(sight, Blocks):
            return self._attend_blocks(qkv_TNW, sight)
        assert cache is not None
        reach = sight.start, sight.end - sight.start
        keys_1MSW, values_1MSW = cache.keys[index].narrow(2, *reach), cache.values[index].narrow(2, *reach)
        return self._attend_window(qkv, keys_1MSW, values_1MSW, sight)

    def mlp(self, x_TH: Tensor, weights: Dense) -> Tensor:
        """SwiGLU, ``[T, H]`` to ``[T, H]``."""
        return F.linear(gated(F.linear(x_TH, weights.gate_up)), weights.down)

    def experts(self, x_TH: Tensor, weights: Experts) -> Tensor:
        """The shared expert and those that each token is routed to, ``[T, H]`` to ``[T, H]``.

        A token's chosen experts take it scaled by the sigmoid of their router logit.
        """
        top = F.linear(x_TH, weights.router).topk(self.config.top_k, -1)
        score_TK = top.values.float().sigmoid_().to(x_TH.dtype)
        scaled_RH = x_TH if self.config.top_k == 1 else x_TH.repeat_interleave(self.config.top_k, 0)
        routed_RH = routed(scaled_RH * score_TK.view(-1, 1), top.indices.view(-1), weights)
        if self.config.top_k > 1:
            routed_RH = routed_RH.unflatten(0, (-1, self.config.top_k)).sum(1)
        return self.mlp(x_TH, weights.shared).add_(routed_RH)

    def _mean_square_root(self, x: Tensor) -> Tensor:
        """``sqrt(mean(x ** 2) + eps)`` over the last dimension, in three operations where rms_norm takes eight."""
        norm = torch.linalg.vector_norm(x, 2, -1, True)
        return norm.mul_(x.shape[-1] ** -0.5).hypot_(self._root_eps)

    def _rotate(self, x_TNW: Tensor, rotation: Rotation) -> None:
        wide_TNW = x_TNW if x_TNW.dtype == torch.float32 else x_TNW.float()
        torch.view_as_complex(wide_TNW.unflatten(-1, (-1, 2))).mul_(rotation.pairs)
        if self.config.qk_norm:
            wide_TNW.div_(self._mean_square_root(wide_TNW))
        if wide_TNW is not x_TNW:
            x_TNW.copy_(wide_TNW)

    def _attend_blocks(self, qkv_TNW: Tensor, sight: Blocks) -> Tensor:
        heads, stored, _ = self._heads
        query_1NTW, key_1MTW, value_1MTW = qkv_TNW.transpose(0, 1)[None].split([heads, stored, stored], 1)
        attended = [
            F.scaled_dot_product_attention(
                query_1NTW[:, :, start:end],
                key_1MTW[:, :, start:end],
                value_1MTW[:, :, start:end],
                is_causal=True,
                enable_gqa=True,
            )
            for start, end in sight.bounds
        ]
        return (attended[0] if len(attended) == 1 else torch.cat(attended, 2))[0].transpose(0, 1).flatten(1)

    def _attend_window(self, qkv: Tensor, keys_1MSW: Tensor, values_1MSW: Tensor, sight: Window) -> Tensor:
        heads, stored, width = self._heads
        query_TQ = qkv.narrow(1, 0, heads * width)
        if sight.mask is None and len(qkv) == 1:
            # The heads that share a key are to it what several tokens are: no key is repeated.
            query_1MGW = query_TQ.view(1, stored, -1, width)
            return F.scaled_dot_product_attention(query_1MGW, keys_1MSW, values_1MSW).reshape(1, -1)
        query_1NTW = query_TQ.view(-1, heads, width).transpose(0, 1)[None]
        attended_1NTW = F.scaled_dot_product_attention(
            query_1NTW, keys_1MSW, values_1MSW, attn_mask=sight.mask, enable_gqa=True
        )
        return attended_1NTW[0].transpose(0, 1).flatten(1)


def frequencies(config: DecoderConfig) -> Tensor:
    """The angle per position of each pair, float32 ``[C]``; long waves stretched as Llama-3.1 does."""
    exponents_C = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    plain_C = 1.0 / config.rope_theta**exponents_C
    scaling = config.rope_scaling
    if scaling is None:
        return plain_C
    waves_C = scaling.original * plain_C / (2 * torch.pi)  # that fit into the original context
    kept_C = ((waves_C - scaling.low) / (scaling.high - scaling.low)).clamp(0.0, 1.0)
    return plain_C * (kept_C + (1.0 - kept_C) / scaling.factor)
