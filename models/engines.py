"""How each serving engine reads a head: which names it knows, how it numbers layers, what it makes up.

    reading = read(ENGINES["sglang"], read_files(Path("heads/mine")), num_layers=48)
    reading.values["target_layers"], reading.unsaid, reading.strange

Engines load a wrong head without a word: a missing key takes a default, a key or tensor of unknown name is ignored. So
what is here says what an engine makes of files, defaults and all; :mod:`.formats` writes, checks and imports by it.

All of it was read in the engines' own code: vLLM 0.32 and speculators 0.9, which tests also run; SGLang 0.5.23,
TensorRT-LLM's PyTorch backend of 2026 and SafeAILab's EAGLE of 2026, which were not run.
Ours numbers a captured layer by its output, 0-based; an engine that numbers it by its input says one more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor
from transformers import Llama4TextConfig, LlamaConfig

from .checkpoint import (
    ARCHITECTURE,
    CONFIG,
    FIELDS,
    LAYER_IDS,
    PICKLED,
    WEIGHTS,
    load_pickled,
    read_config,
    read_tensors,
)

TRTLLM_OPTIONS = "trtllm.yaml"
OURS, THEIRS = "midlayer.", "layers.0."  # what the one decoder layer is called
FLAGS = ("fc_norm", "norm_output", "norm_before_residual", "norm_before_fc")
#: What a head is here whatever a file says, where it says it; a flag only for engines that may not know it.
PLAIN = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "norm_before_fc": False,
    "use_aux_hidden_state": True,
    "logit_scale": 1.0,
}
KINDS = {"llama": LlamaConfig, "llama4_text": Llama4TextConfig}  # configurations, each with its defaults


class Files(NamedTuple):
    """A head on disk: ``config.json``, ``model.safetensors``, and other files by name."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    texts: dict[str, str]


class Engine(NamedTuple):
    """How an engine reads a head.

    ``layers``: the captured layers it will use, by output, where the files name them. ``flags``: which of FLAGS it
    knows; it ignores the others. ``flat``: its view of ``config.json`` as one configuration. ``architectures``: those
    it takes; empty where it does not look. ``layer``: what it may call the decoder layer. ``kinds``: the types of
    configuration that it takes. ``needs``: keys without which it does not start. ``own_embedding``: whether it takes
    the file's, where there is one, or always the target's. ``lm_head``: what it does where there is none.
    """

    title: str
    layers: Callable[[Files], list[int] | None]
    flags: tuple[str, ...] = ()
    flat: Callable[[dict[str, Any]], dict[str, Any]] = dict
    architectures: tuple[str, ...] = ()
    layer: tuple[str, ...] = (OURS, THEIRS)
    kinds: tuple[str, ...] = ("llama",)
    needs: tuple[str, ...] = ()
    own_embedding: bool = False
    lm_head: str = "which it leaves uninitialised"


class Reading(NamedTuple):
    """A head's configuration as an engine reads it.

    ``values``: those of ``DraftConfig``, by its names. ``unsaid``: names of those that the files do not say, so that
    the engine made them up. ``strange``: what makes it another computation than a head's here, each in a line.
    """

    values: dict[str, Any]
    unsaid: frozenset[str]
    strange: list[str]


def _inner(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("eagle_config")
    return inner if isinstance(inner, dict) else {}


def _by_input(ids: list[int] | None) -> list[int] | None:
    return sorted({layer - 1 for layer in ids}) if ids else None


def _captured_by_trtllm(files: Files) -> list[int] | None:
    options = yaml.safe_load(files.texts.get(TRTLLM_OPTIONS, "{}"))
    ids = options.get("speculative_config", {}).get("eagle3_layers_to_capture")
    return sorted(ids) if ids else None


def _flat_speculators(config: dict[str, Any]) -> dict[str, Any]:
    own = ("draft_vocab_size", *FLAGS)
    flat = dict(config.get("transformer_layer_config", {}))
    return flat | {"norm_before_residual": True} | {key: config[key] for key in own if key in config}


def _flat_eagle(config: dict[str, Any]) -> dict[str, Any]:
    """It does not look at head_dim, and divides."""
    shape = config.get("hidden_size", 0), config.get("num_attention_heads", 1)
    return config | {"head_dim": shape[0] // shape[1]}


ENGINES = {
    "vllm": Engine(
        "vLLM",
        lambda files: _by_input(files.config.get(LAYER_IDS) or _inner(files.config).get(LAYER_IDS)),
        FLAGS,
        architectures=(ARCHITECTURE, "Eagle3LlamaForCausalLM"),
        own_embedding=True,
    ),
    "sglang": Engine(
        "SGLang",
        lambda files: _inner(files.config).get(LAYER_IDS),
        ("fc_norm", "norm_output"),
        architectures=(ARCHITECTURE,),
        kinds=tuple(KINDS),
        needs=("draft_vocab_size",),
    ),
    "trtllm": Engine(
        "TensorRT-LLM",
        _captured_by_trtllm,
        ("fc_norm", "norm_output"),
        kinds=tuple(KINDS),
        lm_head="in whose place it takes the target's",
    ),
    "speculators": Engine(
        "speculators in vLLM",
        lambda files: _by_input(files.config.get(LAYER_IDS)),
        FLAGS,
        _flat_speculators,
        layer=(THEIRS,),
        own_embedding=True,
    ),
    "eagle": Engine(
        "SafeAILab EAGLE",
        lambda files: None,
        flat=_flat_eagle,
        layer=(OURS,),
        needs=("draft_vocab_size",),
        own_embedding=True,
    ),
}


def default_layers(count: int) -> list[int]:
    """The layers, by output, that every engine captures from a target of ``count`` where a head names none."""
    return [1, count // 2 - 1, count - 4]


def read_files(folder: Path) -> Files:
    """The head in ``folder``: ``model.safetensors``, or the shards of its index, or ``pytorch_model.bin``.

    Raises:
        UserError: a file is missing or damaged.
    """
    options = folder / TRTLLM_OPTIONS
    texts = {TRTLLM_OPTIONS: options.read_text()} if options.exists() else {}
    return Files(read_config(folder / CONFIG), _weights(folder), texts)


def _weights(folder: Path) -> dict[str, Tensor]:
    shards = sorted(folder.glob("model-*.safetensors"))
    if not shards and not (folder / WEIGHTS).exists() and (folder / PICKLED).exists():
        return load_pickled(folder / PICKLED)
    found: dict[str, Tensor] = {}
    for path in shards or [folder / WEIGHTS]:
        found |= read_tensors(path)
    return found


def read(engine: Engine, files: Files, num_layers: int) -> Reading:
    """What ``engine`` makes of the configuration in ``files`` for a target of ``num_layers``."""
    flat = engine.flat(files.config)
    kind, inner = flat.get("model_type"), _inner(files.config)
    if kind not in engine.kinds:
        return Reading({}, frozenset(), [f"model_type is {kind}, and a head is a {' or a '.join(engine.kinds)}"])
    strange = []
    if engine.architectures and not set(files.config.get("architectures") or ()) & set(engine.architectures):
        strange.append(f"architectures is {files.config.get('architectures')}, and it takes {engine.architectures[0]}")
    # What is not in the file has here the default that it has in the engines: they parse with the same class.
    given = {key: value for key, value in flat.items() if key not in ("model_type", "architectures")}
    parsed = KINDS[kind](**given).to_dict()
    rope = parsed.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        strange.append(f"it reads a RoPE of type {rope['rope_type']}, and a head has the plain one")
    strange += [f"there is no {key}, without which it does not start" for key in engine.needs if key not in flat]
    if "sliding_attention" in (flat.get("layer_types") or ()):
        strange.append("it reads layer_types as sliding_attention, and only full attention is known here")
    for key, wanted in PLAIN.items():
        if key not in engine.flags and (found := inner.get(key, flat.get(key, parsed.get(key, wanted)))) != wanted:
            strange.append(f"it reads {key} as {found}, and only {wanted} is known here")
    said = {theirs: parsed[theirs] for _, theirs, _ in FIELDS if theirs in parsed}
    said |= {key: bool(flat.get(key)) and key in engine.flags for key in FLAGS}
    if "norm_before_fc" in engine.flags:
        said["norm_before_fc"] = bool(inner.get("norm_before_fc", flat.get("norm_before_fc")))
    said |= {"rope_theta": rope.get("rope_theta"), "draft_vocab_size": flat.get("draft_vocab_size")}
    said["draft_vocab_size"] = said["draft_vocab_size"] or parsed["vocab_size"]
    present = (set(flat) - set(FLAGS)) | (set(files.config) & set(FLAGS))
    if kind == "llama4_text":  # its intermediate_size is an expert's width, and a head has no experts
        said["intermediate_size"] = parsed["intermediate_size_mlp"]
        present = (present - {"intermediate_size"}) | ({"intermediate_size"} & {k.removesuffix("_mlp") for k in flat})
    if "rope_theta" in (flat.get("rope_parameters") or ()):
        present.add("rope_theta")
    layers = engine.layers(files)
    values = {ours: said[theirs] for ours, theirs, _ in FIELDS} | {
        "target_layers": layers or default_layers(num_layers)
    }
    unsaid = {ours for ours, theirs, _ in FIELDS if theirs not in present} | (set() if layers else {"target_layers"})
    return Reading(values, frozenset(unsaid), strange)
