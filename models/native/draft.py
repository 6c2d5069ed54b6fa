"""The EAGLE-3 head as it drafts: products merged, memory taken once, the same arithmetic as the target.

    head = NativeDraft(draft, target.head.embedding, capacity=700, drafted=5)
    head.extend(tokens, features)              # what stands: a row per token, of real features
    y = head.begin()                           # the last of them; its logits say the first drafted token
    y = head.step(head.logits(y).argmax(-1), y)     # a row behind it, and so on

:class:`~..draft.Eagle3Draft` is the plain head; this one is made of its weights and computes the same.

Row t pairs the target's features of token t with the embedding of token t+1, at position t. Rows that were drafted are taken
back when the next ones that stand come in, or when drafting begins again.

Shapes: T rows that stand, k rows of a step, S drafted rows, F features, H hidden, D draft vocabulary, V vocabulary, C half
the width of a head, Q widths of all queries, keys and values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..draft import DraftConfig, Eagle3Draft, rotation_table
from .cache import Cache, cache_bytes
from .config import WHOLE, DecoderConfig, LayerConfig, Share
from .cpu.operations import make_operations
from .operations import Rotation
from .parallel import Group, shard
from .sights import Window
from .weights import Dense

FULL = 0  # the chunk of a layer that sees everything


class DraftWeights(NamedTuple):
    """A share of them; matrices are ``[in, out]``. ``input_norm``: none, or one over all captured layers together, and
    ``fc_norms``: none, or one per captured layer."""

    fc: Tensor
    input_norm: tuple[Tensor, ...]
    fc_norms: tuple[Tensor, ...]
    embedding_norm: Tensor
    hidden_norm: Tensor
    qkv: Tensor
    out: Tensor
    mlp_norm: Tensor
    mlp: Dense
    norm: Tensor
    lm_head: Tensor

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        parts = [(part,) if isinstance(part, Tensor) else part for part in self]
        return sum(tensor.numel() * tensor.element_size() for tensors in parts for tensor in tensors)


class NativeDraft:
    """The head over one sequence.

    Args:
        draft: its weights, which are copied.
        embedding: the target's, ``[V, H]``; the head takes its numerics and its device.
        capacity: tokens of the longest request.
        drafted: rows of a proposal.
        group: the processes that hold it together, each its share of heads, columns and draft tokens; None: it is whole.

    Raises:
        UserError: it cannot be dealt evenly to so many.
    """

    def __init__(
        self, draft: Eagle3Draft, embedding: Tensor, capacity: int, drafted: int, group: Group | None = None
    ) -> None:
        self._shape, self._embedding, self._group = draft.config, embedding, group
        share = WHOLE if group is None else group.share
        self.device = embedding.device
        #: Target ids ``[D]`` of the draft vocabulary.
        self.vocabulary = draft.draft_ids.to(self.device)
        config = dealt_config(draft.config, share)
        self._weights = gathered(draft, embedding, share)
        self._layer = config.layers[0]
        weights = self._weights
        self._operations = make_operations(config, self.device, embedding.dtype)
        self._cache = Cache(config, capacity + drafted, embedding)
        cosines, sines = rotation_table(draft.config, capacity + drafted, embedding.new_empty(0, dtype=torch.float32))
        self._pairs_S1C = torch.complex(cosines, sines)
        # The half of the product that is the embedding's, of the tokens that it can say: a step reads the other half alone.
        own_DH = self._operations.norm(embedding[self.vocabulary], self._weights.embedding_norm)
        of_embedding, self._of_hidden = weights.qkv.split(embedding.shape[1])
        self._own_DQ = self._operations.linear(own_DH, of_embedding)
        matrices = weights.fc, weights.qkv, self._of_hidden, weights.out, weights.mlp, weights.lm_head
        self._operations.prepare(matrices)
        #: Rows that stand.
        self.standing = 0
        self._depth = 0
        self._last_1H = embedding.new_zeros(1, embedding.shape[1])

    def restart(self) -> None:
        """Forget everything."""
        self._cache.rollback(0)
        self.standing, self._depth = 0, 0

    def extend(self, tokens: Tensor, features: Tensor) -> None:
        """Take in rows that stand: ``tokens`` ``[T]``, each with the target's ``features`` ``[T, F, H]`` of the one before."""
        operations, weights, count = self._operations, self._weights, len(tokens)
        self._cache.rollback(self.standing)
        places_T = self._cache.claim(count, tree=False)
        pairs_T1C = self._pairs_S1C.narrow(0, self.standing, count)
        self.standing, self._depth = self.standing + count, 0
        h_TH = self._combined(features)
        normed_TH = operations.norm(h_TH, weights.hidden_norm)
        embedded_TH = operations.norm(self._embedding.index_select(0, tokens), weights.embedding_norm)
        qkv_TQ = operations.linear(torch.cat((embedded_TH, normed_TH), 1), weights.qkv)
        # Of the rows before the last nothing is asked but their keys and values.
        window = Window(0, self.standing, None)
        self._last_1H = self._finished(qkv_TQ, h_TH[-1:], normed_TH[-1:], pairs_T1C, places_T, window)

    def begin(self) -> Tensor:
        """``y`` ``[1, H]`` of the last row that stands; what was drafted behind it is taken back."""
        self._cache.rollback(self.standing)
        self._depth = 0
        return self._last_1H

    def step(self, tokens: Tensor, y_kH: Tensor, seen_kS: Tensor | None = None) -> Tensor:
        """Draft on: rows one position behind those of the last step.

        Args:
            tokens: draft ids ``[k]``.
            y_kH: what their parents came to.
            seen_kS: which drafted rows each sees, in the order in which they came, its own step's included; None: all,
                as in a chain.

        Returns:
            y, ``[k, H]``.
        """
        first, count, position = self._cache.length, len(tokens), self.standing + self._depth
        places_k = self._cache.claim(count, tree=False)
        self._depth += 1
        mask_kS = None
        if seen_kS is not None:
            drafted = torch.zeros_like(seen_kS, dtype=y_kH.dtype).masked_fill_(~seen_kS, -torch.inf)
            mask_kS = torch.cat((drafted.new_zeros(count, self.standing), drafted), 1)
        h_kH = self._operations.norm(y_kH, self._weights.norm) if self._shape.norm_output else y_kH
        normed_kH = self._operations.norm(h_kH, self._weights.hidden_norm)
        qkv_kQ = self._operations.add_linear(self._own_DQ.index_select(0, tokens), normed_kH, self._of_hidden)
        pairs_11C = self._pairs_S1C.narrow(0, position, 1)
        return self._finished(qkv_kQ, h_kH, normed_kH, pairs_11C, places_k, Window(0, first + count, mask_kS))

    def logits(self, y: Tensor) -> Tensor:
        """``[k, H]`` to ``[k, D]``."""
        return self._put_together(
            self._operations.linear(self._operations.norm(y, self._weights.norm), self._weights.lm_head)
        )

    def _combined(self, features: Tensor) -> Tensor:
        for weight in self._weights.input_norm:
            wide = features.flatten(1).to(torch.promote_types(features.dtype, torch.float32))
            normed = F.rms_norm(wide, weight.shape, weight.to(wide.dtype), self._shape.rms_norm_eps)
            features = normed.to(features.dtype).view_as(features)
        norms = self._weights.fc_norms
        if norms:
            features = torch.stack([self._operations.norm(features[:, at], norm) for at, norm in enumerate(norms)], 1)
        return self._put_together(self._operations.linear(features.flatten(1), self._weights.fc))

    def _put_together(self, part: Tensor) -> Tensor:
        return part if self._group is None else self._group.gather(part)

    def _summed(self, summand: Tensor) -> Tensor:
        return summand if self._group is None else self._group.sum_(summand)

    def _finished(
        self, qkv: Tensor, h_kH: Tensor, normed_kH: Tensor, pairs: Tensor, places: Tensor, window: Window
    ) -> Tensor:
        """``y`` ``[k, H]`` of the last k rows of the product ``qkv``; the keys and values of all enter the cache."""
        operations, weights = self._operations, self._weights
        operations.enter(qkv, self._layer, Rotation(pairs, None), places, 0, self._cache)
        attended = operations.look(qkv[-len(h_kH) :], window, 0, self._cache)
        residual_kH = normed_kH if self._shape.norm_before_residual else h_kH
        y_kH = residual_kH + self._summed(operations.linear(attended, weights.out))
        return y_kH + self._summed(operations.mlp(operations.norm(y_kH, weights.mlp_norm), weights.mlp))


def draft_bytes(
    config: DraftConfig, capacity: int, drafted: int, dtype: torch.dtype, group: Group | None = None
) -> int:
    """What a :class:`NativeDraft` of these arguments will take in this process; raises as that does."""
    share = WHOLE if group is None else group.share
    dealt = dealt_config(config, share)
    with torch.device("meta"):
        draft = Eagle3Draft(replace(config, vocab_size=config.draft_vocab_size))
    weights = gathered(draft, torch.empty(0, dtype=dtype, device="meta"), share)
    own = config.draft_vocab_size * weights.qkv.shape[1] * dtype.itemsize
    return weights.nbytes + own + cache_bytes(dealt, capacity + drafted, dtype.itemsize)


def dealt_config(config: DraftConfig, share: Share) -> DecoderConfig:
    """One share of :func:`decoder_config`'s; raises where it cannot be dealt evenly."""
    return shard(decoder_config(config), share, "draft", [(config.hidden_size, "columns of fc")])


def decoder_config(config: DraftConfig) -> DecoderConfig:
    """The head's one layer, as the decoder says it."""
    return DecoderConfig(
        vocab_size=config.draft_vocab_size,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        layers=(LayerConfig(rotates=True, chunk=FULL, experts=0, width=config.intermediate_size),),
    )


def gathered(draft: Eagle3Draft, like: Tensor, share: Share) -> DraftWeights:
    """One share of the head's weights, in the numerics and on the device of ``like``."""

    def norm(module: nn.Module) -> Tensor:
        return module.get_parameter("weight").detach().to(like)

    def part(weight: Tensor, dimension: int = 0) -> Tensor:
        return weight.detach().chunk(share.size, dimension)[share.rank]

    def matrix(*parts: Tensor) -> Tensor:
        merged = torch.cat([part.to(like) for part in parts])
        return merged.t().contiguous() if like.device.type == "cpu" else merged.t()

    layer, width = draft.midlayer, draft.config.head_dim
    attention, mlp = layer.self_attn, layer.mlp
    query, key = (_in_pairs(part(module.weight), width) for module in (attention.q_proj, attention.k_proj))
    return DraftWeights(
        fc=matrix(part(draft.fc.weight)),
        input_norm=(norm(draft.input_norm),) if draft.config.norm_before_fc else (),
        fc_norms=tuple(norm(module) for module in draft.fc_norm) if draft.config.fc_norm else (),
        embedding_norm=norm(layer.input_layernorm),
        hidden_norm=norm(layer.hidden_norm),
        qkv=matrix(query, key, part(attention.v_proj.weight)),
        out=matrix(part(attention.o_proj.weight, 1)),
        mlp_norm=norm(layer.post_attention_layernorm),
        mlp=Dense(matrix(part(mlp.gate_proj.weight), part(mlp.up_proj.weight)), matrix(part(mlp.down_proj.weight, 1))),
        norm=norm(draft.norm),
        lm_head=matrix(part(draft.lm_head.weight)),
    )


def _in_pairs(weight: Tensor, width: int) -> Tensor:
    """Row i of a head's first half goes beside row i of its second: the decoder rotates pairs (2i, 2i + 1)."""
    return weight.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
