"""Bytes that decoding reads at batch 1, by arithmetic alone: what a round costs where nothing but memory limits it.

    gain([0.7, 0.5, 0.35], MAVERICK, maverick_head())       # (chain, how many times as fast as plain decoding at most)

A token reads all weights that it passes through once. A verify of m tokens reads the same, and of every layer of experts
those that any of the m tokens is routed to: of n experts, one a token, n (1 - (1 - 1/n) ** m) where routers choose evenly.
A round of a chain of k tokens verifies k + 1, reads the head's layer and LM head k times and its fc once. Norms, routers, the
KV cache, communication and latencies are left out, so that this bounds what a machine can do and foretells nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ..configs.loader import load
from .costs import fc_parameters, step_parameters
from .shapes import draft_config

FP8, BF16 = 1, 2  # bytes of a number


@dataclass(frozen=True)
class MoeShape:
    """A mixture of experts in which a token goes through one routed expert and the shared one, with dense layers between.

    ``layers`` are the captured ones; the LM head is in bfloat16, all else in FP8.
    """

    name: str
    dense_layers: int
    expert_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dense_width: int
    expert_width: int
    experts: int
    layers: tuple[int, ...]
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    max_positions: int = 1_048_576

    def bytes(self, tokens: int) -> float:
        """That a verify of so many tokens reads."""
        attention = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim
        dense, expert = (3 * self.hidden_size * width for width in (self.dense_width, self.expert_width))
        touched = self.experts * (1 - (1 - 1 / self.experts) ** tokens)
        both = (self.dense_layers + self.expert_layers) * attention
        layers = both + self.dense_layers * dense + self.expert_layers * (1 + touched) * expert
        return FP8 * layers + BF16 * self.vocab_size * self.hidden_size


#: The configuration that its model card publishes.
MAVERICK = MoeShape(
    name="Llama-4 Maverick",
    dense_layers=24,
    expert_layers=24,
    hidden_size=5120,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=202_048,
    dense_width=16_384,
    expert_width=8192,
    experts=128,
    layers=(1, 23, 44),
)


class HeadBytes(NamedTuple):
    """That a head reads: in a draft step, and once in a round."""

    step: int
    round: int


class Gain(NamedTuple):
    """The best chain, 0 for plain decoding, and its speed-up over that."""

    chain: int
    speedup: float


def maverick_head() -> HeadBytes:
    """The head of the recipe that ships for Maverick, in bfloat16."""
    config = draft_config(load("maverick").draft, asdict(MAVERICK))
    return HeadBytes(BF16 * step_parameters(config), BF16 * fc_parameters(config))


def round_cost(chain: int, target: MoeShape, head: HeadBytes) -> float:
    """Bytes of a round of a chain / bytes of a token."""
    return (target.bytes(chain + 1) + chain * head.step + head.round) / target.bytes(1)


def gain(by_position: Sequence[float], target: MoeShape, head: HeadBytes) -> Gain:
    """What chains up to the length of ``by_position``, the shares of rounds that accept at least 1, 2, ..., gain at most."""
    emitted = itertools.accumulate(by_position, initial=1.0)
    next(emitted)
    gains = [Gain(k, tokens / round_cost(k, target, head)) for k, tokens in enumerate(emitted, 1)]
    return max([Gain(0, 1.0), *gains], key=lambda found: found.speedup)
