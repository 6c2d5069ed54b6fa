"""The shapes of a target and of a head for it, known before any weights are loaded.

    shape = read_shape(TargetSettings())                       # from config.json alone
    config = draft_config(DraftSettings(), asdict(shape))      # the head that a recipe asks for

:mod:`.target_files` reads the target's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..configs.errors import UserError
from ..configs.settings import DraftSettings
from .draft import DraftConfig


@dataclass(frozen=True)
class TargetShape:
    """A target without its weights.

    ``parameters`` are all of them, experts that a token does not visit included, and ``counted`` says from what;
    ``layers`` are the captured ones.
    """

    name: str
    parameters: int
    counted: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_positions: int


def draft_config(chosen: DraftSettings, target: Mapping[str, Any]) -> DraftConfig:
    """The head's shape: the recipe's, and the target's where the recipe says nothing.

    Args:
        chosen: the recipe's.
        target: fields of :class:`TargetShape` or of a :class:`TargetInfo`.

    Raises:
        UserError: key/value heads that do not divide the heads.
    """
    config = DraftConfig(
        hidden_size=target["hidden_size"],
        intermediate_size=chosen.intermediate_size,
        num_heads=chosen.num_heads or target["num_heads"],
        num_kv_heads=chosen.num_kv_heads or target["num_kv_heads"],
        head_dim=chosen.head_dim or target["head_dim"],
        vocab_size=target["vocab_size"],
        draft_vocab_size=chosen.vocab_size,
        target_layers=tuple(target["layers"]),
        rms_norm_eps=target["rms_norm_eps"],
        rope_theta=chosen.rope_theta or target["rope_theta"],
        max_positions=target["max_positions"],
        fc_norm=chosen.fc_norm,
        norm_output=chosen.norm_output,
    )
    if config.num_heads % config.num_kv_heads:
        problem = f"it does not divide the {config.num_heads} heads"
        raise UserError("draft.num_kv_heads", config.num_kv_heads, problem, "give a divisor of draft.num_heads")
    return config
