"""What a head costs to train, before it exists: parameters, FLOP and memory.

    config = draft_config(DraftSettings(), asdict(read_shape(TargetSettings())))
    parameters(config), training_flop(config, steps=7)
    activation_bytes(config, Micro(tokens=16384, rows=12000, length=2048), steps=7, width=2)

Parameters and FLOP are exact. Memory is an estimate: it adds up what :mod:`.rollout` and ``train/objective.py`` keep for
the backward pass, term by term; a test counts what they really hold.

Letters: n rows, T tokens, K steps, N heads, M key/value heads, W head width, H hidden, F captured layers, I MLP, D draft
vocabulary, V vocabulary, S tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .draft import DraftConfig, Eagle3Draft

FLOAT32 = 4
#: Bytes a parameter of weights, gradients, and what the optimiser holds (AdamW's two moments; under DeepSpeed's bf16 also
#: float32 weights and gradients). ZeRO's stage s shards the last s of them over the GPUs.
PLAIN = (4, 4, 8)
DEEPSPEED = (2, 2, 16)


class Micro(NamedTuple):
    """What one GPU computes at once: ``tokens``, of which ``rows`` are supervised, in samples of ``length`` tokens."""

    tokens: int
    rows: int
    length: int


class Activations(NamedTuple):
    """Bytes that a forward and backward pass holds beside the weights, by what they are for."""

    attention: int
    mlp: int
    logits: int
    rest: int
    transient: int  # the largest of what does not outlive one part of the forward pass


def parameters(config: DraftConfig) -> int:
    """All parameters of the head; the target's embedding is none of them."""
    with torch.device("meta"):
        head = Eagle3Draft(config, torch.arange(config.draft_vocab_size) if _mapped(config) else None)
    return sum(parameter.numel() for parameter in head.parameters())


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


def state_bytes(count: int, stage: int | None, gpus: int) -> int:
    """Weights, gradients and optimiser of ``count`` parameters on each GPU, under DeepSpeed's ZeRO or (None) without."""
    held = PLAIN if stage is None else DEEPSPEED
    sharded = stage or 0
    return sum(-(-size * count // (gpus if len(held) - part <= sharded else 1)) for part, size in enumerate(held))


def constant_bytes(config: DraftConfig) -> int:
    """The target's embedding and LM head, in float32 on every GPU."""
    return 2 * config.vocab_size * config.hidden_size * FLOAT32


def batch_bytes(config: DraftConfig, micro: Micro, stored: int) -> int:
    """Ids, mask and states of a micro-batch, whose tokens' states take ``stored`` bytes each."""
    return micro.tokens * (stored + 9)


def activation_bytes(config: DraftConfig, micro: Micro, steps: int, width: int) -> Activations:
    """What a micro-batch needs.

    Args:
        config: the head.
        micro: the micro-batch.
        steps: K.
        width: bytes of a number of the head's: 2 under DeepSpeed's bf16, 4 without.
    """
    tokens, n, length = micro
    hidden, draft_vocabulary = config.hidden_size, config.draft_vocab_size
    queries, pairs = config.num_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    scores = n * config.num_heads * length
    norm = 2 * FLOAT32 * hidden  # what goes in and what is normalised, as float32
    inputs = 2 * norm + 2 * hidden * width  # of embedding and hidden state, and both side by side
    once = tokens * (inputs + (3 + len(config.target_layers)) * hidden * width + 2 * pairs * width)
    first = n * (2 * norm + 4 * hidden * width + 4 * queries * width)
    later = n * (2 * norm + 2 * hidden * width + 4 * queries * width + inputs + pairs * width)
    return Activations(
        attention=steps * scores * width + n * length * width,
        mlp=steps * n * 4 * config.intermediate_size * width,
        logits=steps * n * draft_vocabulary * width,
        rest=once + first + (steps - 1) * later,
        transient=max(
            scores * (FLOAT32 + width), n * draft_vocabulary * (2 * FLOAT32 + width)
        ),  # the teacher's among them
    )


def _mapped(config: DraftConfig) -> bool:
    return config.draft_vocab_size < config.vocab_size
