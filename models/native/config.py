"""What a decoder computes, whatever its family: everything that determines its shapes and its arithmetic.

:mod:`.families` reads it off a checkpoint's own configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Share(NamedTuple):
    """The part of every layer that one of ``size`` processes computes, the one of this ``rank``; by default all of it."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> slice:
        """Which of ``count`` things, dealt evenly and in order, are in this share."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


WHOLE = Share()


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer.

    ``rotates``: whether queries and keys carry their position (RoPE). ``chunk``: a token sees those before it in its
    chunk of so many positions; 0: all before it. ``experts``: 0 where the MLP is dense; else so many, of which a token
    visits a few, beside one that all tokens share. ``width``: of the MLP, or of each expert.
    """

    rotates: bool
    chunk: int
    experts: int
    width: int


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's: frequencies whose wave is longer than ``original / low`` positions are divided by ``factor``.

    Those shorter than ``original / high`` stay, and between the two it is interpolated.
    """

    factor: float
    low: float
    high: float
    original: int


@dataclass(frozen=True)
class Temperature:
    """Queries of layers without RoPE are scaled by ``1 + scale * log(1 + floor((position + 1) / floor))``."""

    floor: float
    scale: float


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder of Llama's kind.

    ``qk_norm``: rotated queries and keys are divided by their root mean square, in layers that rotate. ``top_k``:
    experts that a token visits; each takes the token scaled by the sigmoid of its router logit. ``tied``: the LM head is
    the embedding. ``share``: heads and the layers' widths are those of this share; all else is the whole decoder's.
    ``whole_head``: the LM head is whole in every share.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    layers: tuple[LayerConfig, ...]
    rope_scaling: RopeScaling | None = None
    temperature: Temperature | None = None
    qk_norm: bool = False
    top_k: int = 1
    tied: bool = False
    share: Share = WHOLE
    whole_head: bool = False

    @property
    def query_width(self) -> int:
        """All queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def stored_width(self) -> int:
        """The keys and values of a token, in one layer."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def chunks(self) -> frozenset[int]:
        """The kinds of layers by what they see."""
        return frozenset(layer.chunk for layer in self.layers)
