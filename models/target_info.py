"""What a target is: its shape, its layers and its head, read off the model itself.

Shapes: H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..configs.errors import UserError
from ..configs.settings import TargetSettings
from .kv_cache import CHUNKED, FULL, SLIDING

if TYPE_CHECKING:  # whoever reads a store needs these types and none of transformers' memory
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TargetInfo:
    """What a target is; written into every contract.

    ``weights_sha256``: of model.safetensors, or of the list of its shards' checksums; "" for a model that did not
    come from files. ``layers``: captured layers, 0-based, ascending. ``dtype``: the numerics it runs in.
    """

    name: str
    revision: str | None
    weights_sha256: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    layers: tuple[int, ...]
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_positions: int


class TargetText(NamedTuple):
    """What is known of a target without its weights: how it reads, where it stops, and how long a text may be."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    max_positions: int


class TargetHead(NamedTuple):
    """The target's ends: ``embedding`` ``[V, H]``, ``norm_weight`` ``[H]``, ``norm_eps``, ``lm_head`` ``[V, H]``."""

    embedding: Tensor
    norm_weight: Tensor
    norm_eps: float
    lm_head: Tensor


def find_decoder(model: PreTrainedModel, name: str) -> Any:
    """The module that embeds, runs the decoder layers and norms; models disagree on what they call it."""
    for module in model.modules():
        if {"embed_tokens", "layers", "norm"} <= {child for child, _ in module.named_children()}:
            return module
    raise UserError(
        "target.path", name, f"{type(model).__name__} has no decoder layers", "take a causal language model"
    )


def attention_layout(config: PretrainedConfig, name: str) -> tuple[tuple[str, ...], int, bool]:
    """What each layer sees, the span of its chunks or windows, and whether the model takes one mask per kind."""
    fields = config.to_dict()
    window = fields.get("sliding_window")
    uniform = SLIDING if window else FULL
    types = tuple(fields.get("layer_types") or [uniform] * config.num_hidden_layers)
    if unknown := set(types) - {FULL, CHUNKED, SLIDING}:
        problem = f"its layers use {', '.join(sorted(unknown))}"
        raise UserError("target.path", name, problem, f"take a target with {FULL}, {CHUNKED} or {SLIDING} only")
    span = fields["attention_chunk_size"] if CHUNKED in types else window
    return types, span or 0, len(set(types)) > 1


def describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    settings: TargetSettings,
    head: TargetHead,
    weights_sha256: str,
) -> TargetInfo:
    return TargetInfo(
        **configured(config, settings),
        revision=model.config.to_dict().get("_commit_hash") or settings.revision,
        weights_sha256=weights_sha256,
        vocab_size=head.lm_head.shape[0],
        eos_ids=end_ids(model.generation_config, config, tokenizer),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def configured(config: PretrainedConfig, settings: TargetSettings) -> dict[str, Any]:
    """The fields of a :class:`TargetInfo` that the configuration of a language model says."""
    fields, count = config.to_dict(), config.num_hidden_layers
    return {
        "name": settings.path,
        "num_layers": count,
        "hidden_size": config.hidden_size,
        "layers": captured_layers(settings, count),
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": fields.get("head_dim") or config.hidden_size // config.num_attention_heads,
        "rope_theta": rope_theta(config),
        "rms_norm_eps": config.rms_norm_eps,
        "max_positions": config.max_position_embeddings,
    }


def rope_theta(config: PretrainedConfig) -> float:
    """The base of the rotary embedding; of the layers that see everything where kinds of layers differ."""
    rope = config.rope_parameters
    return float((rope if "rope_theta" in rope else rope[FULL])["rope_theta"])


def end_ids(
    generation: GenerationConfig, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The tokens with which a target ends its turn; its files name one or several, each for itself."""
    ends: set[int | None] = set()
    for given in (generation.eos_token_id, config.to_dict().get("eos_token_id"), tokenizer.eos_token_id):
        ends |= set(given) if isinstance(given, list) else {given}
    return tuple(sorted(end for end in ends if end is not None))


def captured_layers(settings: TargetSettings, count: int) -> tuple[int, ...]:
    """The captured layers: low, middle and high, as the EAGLE-3 paper has them, unless the recipe says otherwise."""
    layers = (1, count // 2 - 1, count - 4) if settings.layers is None else tuple(settings.layers)
    problem = ""
    if not layers or list(layers) != sorted(set(layers)):
        problem = "layers are named once each, ascending"
    elif layers[0] < 0 or layers[-1] >= count:
        problem = f"the target has {count} layers"
    if problem:
        remedy = f"choose different layers from 0 to {count - 1}, ascending"
        raise UserError("target.layers", list(layers), problem, remedy)
    return layers
