"""The arithmetic of a decoder in plain torch: the reference, and what runs where no faster kernel is chosen.

A decoder calls these few methods and no other arithmetic, so a kernel is chosen by overriding one of them. None of them
waits for an accelerator, except float32 experts over many tokens (:mod:`.experts`).

Shape suffixes: T new tokens, N heads, M key/value heads, G = N / M, W head width, C half of it, H hidden, S keys, I width
of an MLP, K experts of a token, R = T * K.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache
from .config import DecoderConfig, LayerConfig
from .experts import SMALL, everywhere, gated, routed
from .sights import Blocks, Sight, Step, Window
from .weights import Dense, Experts

#: What is multiplied with: a matrix ``[I, O]``, or an MLP of either kind.
Matrix = Tensor | Dense | Experts


class Rotation(NamedTuple):
    """What positions do to queries and keys in one forward.

    ``pairs``: complex ``[T, 1, C]``, multiplies pairs (2i, 2i + 1) of a head. ``temperature``: ``[T, 1]``, multiplies the
    queries of layers that do not rotate; None: 1 for all.
    """

    pairs: Tensor
    temperature: Tensor | None


class Operations:
    """Plain torch.

    Args:
        config: the decoder's.
        device: where it runs.
    """

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self.config = config
        self._frequencies_C = frequencies(config).to(device)
        # As tensors, since a number is made one in every operation.
        self._root_eps = torch.tensor(config.rms_norm_eps**0.5, device=device)
        self._scales = {
            width: torch.tensor(width**-0.5, device=device) for width in (config.hidden_size, config.head_dim)
        }
        self._heads = (config.num_heads, config.num_kv_heads, config.head_dim)

    @property
    def described(self) -> str:
        """For reports: what multiplies few rows."""
        return "products by torch"

    def prepare(self, matrices: Iterable[Matrix]) -> None:
        """Make ready for products of few rows with ``matrices``, which are the very objects that will be given."""

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
        wide_TH = _wide(x_TH)
        return _narrowed((wide_TH / self._mean_square_root(wide_TH)).mul_(weight_H), x_TH)

    def linear(self, x_TI: Tensor, weight_IO: Tensor) -> Tensor:
        """``[T, I]`` to ``[T, O]``."""
        return torch.mm(x_TI, weight_IO)

    def add_linear(self, y_TO: Tensor, x_TI: Tensor, weight_IO: Tensor) -> Tensor:
        """``y + x @ weight``, ``[T, O]``; ``y`` may be overwritten."""
        return torch.addmm(y_TO, x_TI, weight_IO)

    def attend(
        self, qkv: Tensor, layer: LayerConfig, rotation: Rotation, step: Step, index: int, cache: Cache | None
    ) -> Tensor:
        """Attention of layer ``index`` from the product ``[T, (N + 2M) * W]``, which is overwritten, to ``[T, N * W]``.

        New keys and values enter ``cache`` on the way.
        """
        self.enter(qkv, layer, rotation, step.places, index, cache)
        return self.look(qkv, step.sights[layer.chunk], index, cache)

    def enter(
        self,
        qkv: Tensor,
        layer: LayerConfig,
        rotation: Rotation,
        places: Tensor | None,
        index: int,
        cache: Cache | None,
    ) -> None:
        """Give queries and keys their positions, in place, and put keys and values into their ``places`` in ``cache``."""
        heads, stored, width = self._heads
        if layer.rotates:
            self._rotate(qkv, rotation)
        elif rotation.temperature is not None:
            qkv.narrow(1, 0, heads * width).mul_(rotation.temperature)
        if cache is not None and places is not None:
            cache.layers[index].index_copy_(0, places, qkv.narrow(1, heads * width, 2 * stored * width))

    def look(self, qkv: Tensor, sight: Sight, index: int, cache: Cache | None) -> Tensor:
        """What the queries in ``qkv`` attend to, ``[T, N * W]``: each other's keys, or those in ``cache``."""
        heads, stored, width = self._heads
        if isinstance(sight, Blocks):
            return self._attend_blocks(qkv.view(-1, heads + 2 * stored, width), sight)
        assert cache is not None
        reach = sight.start, sight.end - sight.start
        keys_1MSW, values_1MSW = cache.keys[index].narrow(2, *reach), cache.values[index].narrow(2, *reach)
        return self._attend_window(qkv, keys_1MSW, values_1MSW, sight)

    def mlp(self, x_TH: Tensor, weights: Dense) -> Tensor:
        """SwiGLU, ``[T, H]`` to ``[T, H]``."""
        return torch.mm(gated(torch.mm(x_TH, weights.gate_up)), weights.down)

    def experts(self, x_TH: Tensor, weights: Experts) -> Tensor:
        """The shared expert and those that each token is routed to, ``[T, H]`` to ``[T, H]``.

        A token's chosen experts take it scaled by the sigmoid of their router logit.
        """
        count = self.config.top_k
        logit_TK, expert_TK = torch.mm(x_TH, weights.router).topk(count, -1)
        score_TK = _narrowed(_wide(logit_TK).sigmoid_(), x_TH)
        if weights.every is not None and 1 < len(x_TH) <= SMALL // weights.gate_up.numel():
            return everywhere(x_TH, expert_TK, score_TK, weights.every, len(weights.down))
        if count == 1:
            routed_TH = routed(x_TH * score_TK, expert_TK.view(-1), weights)
        else:
            scaled_RH = (x_TH[:, None] * score_TK[..., None]).flatten(0, 1)
            routed_TH = routed(scaled_RH, expert_TK.view(-1), weights).unflatten(0, (-1, count)).sum(1)
        return self.mlp(x_TH, weights.shared).add_(routed_TH)

    def _mean_square_root(self, x: Tensor) -> Tensor:
        """``sqrt(mean(x ** 2) + eps)`` over the last dimension, in three operations where rms_norm takes eight."""
        return torch.linalg.vector_norm(x, 2, -1, True).mul_(self._scales[x.shape[-1]]).hypot_(self._root_eps)

    def _rotate(self, qkv: Tensor, rotation: Rotation) -> None:
        heads, stored, width = self._heads
        pairs_TNC2 = qkv.view(-1, heads + 2 * stored, width // 2, 2).narrow(1, 0, heads + stored)
        wide_TNC2 = _wide(pairs_TNC2)
        torch.view_as_complex(wide_TNC2).mul_(rotation.pairs)
        if self.config.qk_norm:
            wide_TNW = wide_TNC2.view(-1, heads + stored, width)
            wide_TNW.div_(self._mean_square_root(wide_TNW))
        if wide_TNC2 is not pairs_TNC2:
            pairs_TNC2.copy_(wide_TNC2)

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


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32; asking for its type costs less than a conversion that changes nothing."""
    return x if x.dtype == torch.float32 else x.float()


def _narrowed(x: Tensor, like: Tensor) -> Tensor:
    return x if x.dtype == like.dtype else x.to(like.dtype)


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
