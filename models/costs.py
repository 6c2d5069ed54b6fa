"""What a head costs to train, before it exists: parameters and FLOP, both exact. Memory is :mod:`.memory`'s.

    config = draft_config(DraftSettings(), asdict(read_shape(TargetSettings())))
    parameters(config), training_flop(config, steps=7)

Letters: F captured layers, H hidden.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from .draft import DraftConfig, Eagle3Draft


def parameters(config: DraftConfig) -> int:
    """All parameters of the head; the target's embedding is none of them."""
    return sum(_sizes(config))


def largest(config: DraftConfig) -> int:
    """Numbers of the head's largest parameter."""
    return max(_sizes(config))


def stacks(config: DraftConfig) -> list[tuple[int, int, int]]:
    """Rows, columns and count of the matrices that Muon takes at once: those of one shape, ``fc`` apart.

    ``lm_head`` is AdamW's.
    """
    counts = Counter(
        (*matrix.shape, name == "fc.weight")
        for name, matrix in _head(config).named_parameters()
        if matrix.ndim > 1 and name != "lm_head.weight"
    )
    return [(rows, columns, count) for (rows, columns, _), count in counts.items()]


def step_parameters(config: DraftConfig) -> int:
    """Those by which every step multiplies; ``fc`` is applied once a token."""
    hidden, width = config.hidden_size, config.head_dim
    attention = 2 * hidden * (config.num_heads + 2 * config.num_kv_heads) * width + config.num_heads * width * hidden
    return attention + 3 * hidden * config.intermediate_size + hidden * config.draft_vocab_size


def fc_parameters(config: DraftConfig) -> int:
    """``[H, F * H]``."""
    return len(config.target_layers) * config.hidden_size**2


def training_flop(config: DraftConfig, steps: int) -> int:
    """Forward and backward pass of a supervised token through ``steps`` steps: its products with weights alone."""
    return 6 * (steps * step_parameters(config) + fc_parameters(config))


def step_flop(config: DraftConfig, tokens: int, rows: Sequence[int]) -> int:
    """What an optimiser step needs: products with weights, forward and backward, and the teacher's logits.

    Nothing is counted for what a trainer computes without need, attention included, or for the gradient of features.

    Args:
        config: the head.
        tokens: of the batch; each goes through ``fc`` and gives a key and a value.
        rows: supervised rows of every step of the rollout.
    """
    pairs = 4 * config.hidden_size * config.num_kv_heads * config.head_dim
    steps = 6 * (sum(rows) * step_parameters(config) + (tokens - rows[0]) * pairs)
    return steps + 4 * tokens * fc_parameters(config) + rows[0] * teacher_flop(config)


def teacher_flop(config: DraftConfig) -> int:
    """The target's logits of a supervised token."""
    return 2 * config.hidden_size * config.vocab_size


def shapes(config: DraftConfig) -> list[tuple[int, ...]]:
    """Those of the head's weights."""
    return [tuple(parameter.shape) for parameter in _head(config).parameters()]


def _sizes(config: DraftConfig) -> list[int]:
    return [math.prod(shape) for shape in shapes(config)]


def _head(config: DraftConfig) -> Eagle3Draft:
    with torch.device("meta"):
        mapped = config.draft_vocab_size < config.vocab_size
        return Eagle3Draft(config, torch.arange(config.draft_vocab_size) if mapped else None)
