"""The families that the decoder computes: how each says what it is, and what its checkpoints call the weights.

    family = family_of(AutoConfig.from_pretrained(folder), folder)
    config = family.read(fields)

A dense family of Llama's kind is one more :class:`Family`. What a configuration asks for that is not computed here is
refused: a decoder that ignores it would answer, and wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from ...configs.errors import UserError
from ..kv_cache import CHUNKED, FULL
from .config import DecoderConfig, LayerConfig, RopeScaling, Temperature

SETTING = "target.path"  # whose value it is that does not suit
#: What is computed here of settings that could say something else.
PLAIN = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


class Family(NamedTuple):
    """``read``: fields of its configuration to what it computes. ``mlp``: what its checkpoints call a layer's MLP.

    ``halves``: whether their queries and keys are stored for a rotation of pairs (i, i + C), C being half the width of a
    head; the decoder rotates pairs (2i, 2i + 1).
    """

    read: Callable[[Mapping[str, Any]], DecoderConfig]
    mlp: str
    halves: bool


def _common(fields: Mapping[str, Any]) -> dict[str, Any]:
    rope = fields["rope_parameters"]
    scaling = None
    if rope.get("rope_type", "default") == "llama3":
        original = rope.get("original_max_position_embeddings") or fields["max_position_embeddings"]
        scaling = RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    return {
        "vocab_size": fields["vocab_size"],
        "hidden_size": fields["hidden_size"],
        "num_heads": fields["num_attention_heads"],
        "num_kv_heads": fields["num_key_value_heads"],
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
        "rms_norm_eps": fields["rms_norm_eps"],
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": scaling,
        "tied": bool(fields["tie_word_embeddings"]),
    }


def _llama(fields: Mapping[str, Any]) -> DecoderConfig:
    layer = LayerConfig(rotates=True, chunk=0, experts=0, width=fields["intermediate_size"])
    return DecoderConfig(**_common(fields), layers=(layer,) * fields["num_hidden_layers"])


def _llama4(fields: Mapping[str, Any]) -> DecoderConfig:
    routed = set(fields["moe_layers"])
    layers = tuple(
        LayerConfig(
            rotates=bool(fields["no_rope_layers"][index]),
            chunk=fields["attention_chunk_size"] if kind == CHUNKED else 0,
            experts=fields["num_local_experts"] if index in routed else 0,
            width=fields["intermediate_size" if index in routed else "intermediate_size_mlp"],
        )
        for index, kind in enumerate(fields["layer_types"])
    )
    tuned = fields["attn_temperature_tuning"]
    return DecoderConfig(
        **_common(fields),
        layers=layers,
        temperature=Temperature(fields["floor_scale"], fields["attn_scale"]) if tuned else None,
        qk_norm=fields["use_qk_norm"],
        top_k=fields["num_experts_per_tok"],
    )


FAMILIES = {"llama": Family(_llama, "mlp", halves=True), "llama4_text": Family(_llama4, "feed_forward", halves=False)}


def family_of(config: PretrainedConfig, name: str) -> tuple[Family, DecoderConfig]:
    """The family of the language model in ``config``, and what the model computes.

    Args:
        config: of a language model, alone or inside one that sees.
        name: of the target, for the error.

    Raises:
        UserError: another family, a quantised checkpoint, or something asked for that is not computed here.
    """
    text = config.get_text_config()
    fields = text.to_dict()
    family = FAMILIES.get(text.model_type)
    if family is None:
        raise _refusal(name, f"its type is {text.model_type}", f"take a target of type {' or '.join(FAMILIES)}")
    if quantised := config.to_dict().get("quantization_config") or fields.get("quantization_config"):
        method = quantised.get("quant_method", "unknown")
        raise _refusal(name, f"its weights are quantised ({method})", "take its checkpoint in bfloat16")
    for key, wanted in PLAIN.items():
        if (found := fields.get(key, wanted)) != wanted:
            raise _refusal(name, f"its {key} is {found}", f"take a target whose {key} is {wanted}")
    if unknown := set(fields.get("layer_types") or ()) - {FULL, CHUNKED}:
        raise _refusal(name, f"its layers use {', '.join(sorted(unknown))}", f"take one with {FULL} or {CHUNKED} only")
    rope = fields.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(name, f"its RoPE is {kind} over a part or all of a head", "take one of type default or llama3")
    read = family.read(fields)
    if read.head_dim % 2 or read.num_heads % read.num_kv_heads:
        problem = f"it has {read.num_heads} heads of {read.head_dim}, and {read.num_kv_heads} for keys and values"
        raise _refusal(name, problem, "take a target of even head_dim whose heads are a multiple of those")
    return family, read


def _refusal(name: str, problem: str, remedy: str) -> UserError:
    return UserError(SETTING, name, problem, f"{remedy}, or set eval.engine or record.engine to transformers")
