"""The shapes of a target and of a head for it, known before any weights are loaded.

shape = read_shape(TargetSettings())                       # from config.json alone
config = draft_config(DraftSettings(), asdict(shape))      # the head that a recipe asks for
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from ..configs.errors import UserError
from ..configs.settings import DraftSettings, TargetSettings
from .draft import DraftConfig
from .target import location, reader
from .target_info import captured_layers, rope_theta

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


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


def read_shape(settings: TargetSettings) -> TargetShape:
    """What the configuration of a folder or hub name says; of a multimodal model, of its language model.

    Raises:
        UserError: no such folder, a hub that cannot be reached, no causal language model, or layers that it has not.
    """
    path = location(settings.path)
    where = {"revision": settings.revision} if settings.revision and not Path(path).is_dir() else {}
    try:
        whole = AutoConfig.from_pretrained(path, **where)
        parameters, counted = _parameters(path, where, whole)
    except (
        OSError,
        ValueError,
    ) as error:  # what transformers raises for missing files, refused downloads, unknown types
        problem, remedy = str(error).partition("\n")[0].rstrip("."), "check the name, or the connection to the hub"
        raise UserError("target.path", settings.path, problem, remedy) from error
    config = whole.get_text_config()
    fields = config.to_dict()
    return TargetShape(
        name=settings.path,
        parameters=parameters,
        counted=counted,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        layers=captured_layers(settings, config.num_hidden_layers),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=fields.get("head_dim") or config.hidden_size // config.num_attention_heads,
        rope_theta=rope_theta(config),
        rms_norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
    )


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


def _parameters(path: str, where: dict[str, Any], config: PretrainedConfig) -> tuple[int, str]:
    """How many parameters the target has, and from what that is known; never downloads weights."""
    single = Path(path) / WEIGHTS
    if single.is_file():
        with safe_open(single, "pt") as file:
            names = file.keys()
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names), "its weights"
    index = cached_file(path, INDEX, _raise_exceptions_for_missing_entries=False, **where)
    metadata = json.loads(Path(index).read_text()).get("metadata", {}) if index else {}
    if "total_parameters" in metadata:
        return metadata["total_parameters"], "the index of its weights"
    with torch.device("meta"):
        model = reader(config).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()), "its configuration"
