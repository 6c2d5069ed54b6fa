"""The head in the format of every serving engine, and read back as that engine reads it.

    files = write("sglang", draft, torch.bfloat16, origin, "heads/mine")
    check("sglang", files, draft, origin)     # [] where SGLang will compute what was trained

Engines load a wrong head without a word: a missing key takes a default, a key or tensor of unknown name is ignored. So
files are not compared with what we would write. They are read as the engine reads them, defaults and all, and what
comes out is compared with the head that was trained.

What is said here of vLLM 0.32 and speculators 0.9 was read in their code, and tests run both. Of TensorRT-LLM it comes
from its documentation, of SGLang 0.5.23 and SafeAILab's EAGLE from descriptions of their loaders; none of these was run. Ours numbers a captured layer by its output, 0-based; an engine that numbers it by its input
says one more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from transformers import LlamaConfig

from ..configs.errors import UserError
from .checkpoint import ARCHITECTURE, CONFIG, FIELDS, LAYER_IDS, WEIGHTS, config_of, read_config, read_tensors
from .draft import DraftConfig, Eagle3Draft
from .target import location

TRTLLM_OPTIONS = "trtllm.yaml"
OURS, THEIRS = "midlayer.", "layers.0."  # what the one decoder layer is called
PROVENANCE = "eagle3_target"


class Origin(NamedTuple):
    """Where a head comes from: its target (``name``, ``revision``, ``weights_sha256``, ``num_layers``, ``dtype``), its
    training, and the chain that it is served with."""

    target: dict[str, Any]
    training: dict[str, Any]
    chain: int


class Files(NamedTuple):
    """A head on disk: ``config.json``, ``model.safetensors``, and other files by name."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    texts: dict[str, str]


class Engine(NamedTuple):
    """How an engine reads a head.

    ``layers``: the captured layers it will use, by output, where the files name them. ``flat``: its view of
    ``config.json`` as one Llama configuration. ``flags``: whether it knows EAGLE-3.1's. ``architectures``: those it
    takes; empty where it does not look. ``layer``: what it may call the decoder layer.
    """

    title: str
    layers: Callable[[Files], list[int] | None]
    flat: Callable[[dict[str, Any]], dict[str, Any]]
    flags: bool
    architectures: tuple[str, ...] = ()
    layer: tuple[str, ...] = (OURS, THEIRS)


class Format(NamedTuple):
    """What ``write`` makes of the portable files, and the engines that read the result."""

    write: Callable[[Files, Origin, str], Files]
    engines: tuple[str, ...]
    text: str


# --- reading


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
    own = ("draft_vocab_size", "norm_before_residual", "fc_norm", "norm_output")
    flat = dict(config.get("transformer_layer_config", {}))
    return flat | {"norm_before_residual": True} | {key: config[key] for key in own if key in config}


ENGINES = {
    "vllm": Engine(
        "vLLM",
        lambda files: _by_input(files.config.get(LAYER_IDS) or _inner(files.config).get(LAYER_IDS)),
        dict,
        flags=True,
        architectures=(ARCHITECTURE, "Eagle3LlamaForCausalLM"),
    ),
    "sglang": Engine(
        "SGLang", lambda files: _inner(files.config).get(LAYER_IDS), dict, flags=False, architectures=(ARCHITECTURE,)
    ),
    "trtllm": Engine("TensorRT-LLM", _captured_by_trtllm, dict, flags=False),
    "speculators": Engine(
        "speculators in vLLM",
        lambda files: _by_input(files.config.get(LAYER_IDS)),
        _flat_speculators,
        flags=True,
        layer=(THEIRS,),
    ),
    "eagle": Engine("SafeAILab EAGLE", lambda files: None, dict, flags=False, layer=(OURS,)),
}


def default_layers(count: int) -> list[int]:
    """The layers, by output, that every engine captures from a target of ``count`` where a head names none."""
    return [1, count // 2 - 1, count - 4]


def read_files(folder: Path) -> Files:
    """The head in ``folder``.

    Raises:
        UserError: a file is missing or damaged.
    """
    options = folder / TRTLLM_OPTIONS
    texts = {TRTLLM_OPTIONS: options.read_text()} if options.exists() else {}
    return Files(read_config(folder / CONFIG), read_tensors(folder / WEIGHTS), texts)


def check(name: str, files: Files, draft: Eagle3Draft, origin: Origin) -> list[str]:
    """What the engines of format ``name`` would make of ``files`` other than ``draft``, each in a line; [] if nothing."""
    found: list[str] = []
    for engine in engines_of(name, draft.config):
        faults = [*_check_config(engine, files, draft.config, origin), *_check_tensors(engine, files.tensors, draft)]
        found += [f"{engine.title}: {fault}" for fault in faults]
    return found + _check_origin(files.config, origin)


def engines_of(name: str, config: DraftConfig) -> list[Engine]:
    """The engines of format ``name`` that can run a head of this shape."""
    plain = not (config.fc_norm or config.norm_output)
    return [ENGINES[key] for key in FORMATS[name].engines if plain or ENGINES[key].flags]


def _check_config(engine: Engine, files: Files, trained: DraftConfig, origin: Origin) -> list[str]:
    flat, faults = engine.flat(files.config), []
    if flat.get("model_type") != "llama":
        return [f"model_type is {flat.get('model_type')}, and a head is a llama"]
    if engine.architectures and not set(files.config.get("architectures") or ()) & set(engine.architectures):
        faults.append(f"architectures is {files.config.get('architectures')}, and it takes {engine.architectures[0]}")
    # What is not in the file has here the default that it has in the engines: they parse with the same class.
    parsed = LlamaConfig(**{key: value for key, value in flat.items() if key not in ("model_type", "architectures")})
    flags = {key: bool(flat.get(key)) and engine.flags for key in ("fc_norm", "norm_output")}
    rope = parsed.rope_parameters or {}
    read = parsed.to_dict() | flags | {"rope_theta": rope.get("rope_theta")}
    read["draft_vocab_size"] = flat.get("draft_vocab_size") or parsed.vocab_size
    for ours, theirs, _ in FIELDS:
        if read[theirs] != (wanted := getattr(trained, ours)):
            absent = "" if theirs in flat else ", which the file does not say,"
            faults.append(f"it reads {theirs}{absent} as {read[theirs]}, and the head was trained with {wanted}")
    if rope.get("rope_type", "default") != "default":
        faults.append(f"it reads a RoPE of type {rope['rope_type']}, and the head was trained with the plain one")
    if flat.get("norm_before_residual"):
        absent = "" if "norm_before_residual" in files.config else ", which the file does not say,"
        faults.append(f"it reads norm_before_residual{absent} as True, and the head was trained with False")
    return [*faults, *_check_layers(engine, files, trained, origin)]


def _check_layers(engine: Engine, files: Files, trained: DraftConfig, origin: Origin) -> list[str]:
    wanted = list(trained.target_layers)
    layers = engine.layers(files) or default_layers(origin.target["num_layers"])
    if layers == wanted:
        return []
    shift = {theirs - ours for theirs, ours in zip(layers, wanted, strict=False)}
    hint = " (numbered by input where it takes outputs, or the reverse)" if shift in ({1}, {-1}) else ""
    return [f"it will capture the outputs of layers {layers}, and the head was trained on {wanted}{hint}"]


def _check_tensors(engine: Engine, tensors: dict[str, Tensor], draft: Eagle3Draft) -> list[str]:
    expected, faults, known = draft.state_dict(), [], {"t2d"}
    for name, wanted in expected.items():
        spellings = [name.replace(OURS, layer) for layer in engine.layer]
        known.update(spellings)
        found = next((tensors[spelling] for spelling in spellings if spelling in tensors), None)
        if name == "t2d":  # only ever the reverse of d2t, which is what engines go by
            continue
        if found is None and name == "d2t":
            faults.append("there is no d2t, so it takes draft ids for target ids")
        elif found is None:
            faults.append(f"there is no {spellings[-1]}, which it leaves uninitialised")
        elif found.shape != wanted.shape:
            faults.append(f"{name} has shape {list(found.shape)}, and the head's is {list(wanted.shape)}")
        elif found.is_floating_point() != wanted.is_floating_point():
            faults.append(f"{name} has type {found.dtype}, and the head's is {wanted.dtype}")
        elif name == "d2t" and torch.equal(found, draft.draft_ids) and not torch.equal(found, wanted):
            faults.append("d2t holds target ids, and it adds the draft id to each: write target id - draft id")
        elif not torch.equal(found.to(wanted.dtype), wanted):
            faults.append(f"{name} is not the head's")
    unknown = sorted(set(tensors) - known)
    return faults + [f"it drops {name} without a word, as it knows no such tensor" for name in unknown]


def _check_origin(config: dict[str, Any], origin: Origin) -> list[str]:
    noted = config.get(PROVENANCE)
    if not isinstance(noted, dict):
        return [f"there is no {PROVENANCE}: which target it was trained on cannot be checked"]
    return [
        f"{PROVENANCE}.{key} is {noted.get(key)}, and the target of this run has {wanted}"
        for key, wanted in origin.target.items()
        if noted.get(key) != wanted
    ]


# --- writing


def _portable(files: Files, origin: Origin, folder: str) -> Files:
    return files._replace(texts={TRTLLM_OPTIONS: _trtllm_options(files, origin, folder)})


def _for_vllm(files: Files, origin: Origin, folder: str) -> Files:
    config = files.config | {"eagle_config": {"use_aux_hidden_state": True}}
    return files._replace(config=config, tensors=_renamed(files.tensors))


def _for_sglang(files: Files, origin: Origin, folder: str) -> Files:
    return files._replace(config=_without(files.config, LAYER_IDS))


def _for_trtllm(files: Files, origin: Origin, folder: str) -> Files:
    config = _without(files.config, LAYER_IDS, "eagle_config")
    return files._replace(config=config, texts={TRTLLM_OPTIONS: _trtllm_options(files, origin, folder)})


def _for_speculators(files: Files, origin: Origin, folder: str) -> Files:
    moved = {"draft_vocab_size", "norm_before_residual", "fc_norm", "norm_output", LAYER_IDS}
    ours = {key: files.config[key] for key in (PROVENANCE, "eagle3_training")}
    dropped = {*moved, *ours, "eagle_config", "architectures", "dtype", "torch_dtype"}
    greedy = {"proposal_type": "greedy", "speculative_tokens": origin.chain}
    config = ours | {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "dtype": files.config["dtype"],
        "transformer_layer_config": _without(files.config, *dropped),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": {"name_or_path": location(origin.target["name"]), "architectures": []},
        },
        "tie_word_embeddings": False,
        **{key: files.config[key] for key in sorted(moved)},
    }
    return Files(config, _renamed(files.tensors), {})


def _for_eagle(files: Files, origin: Origin, folder: str) -> Files:
    return files._replace(config=_without(files.config, LAYER_IDS, "eagle_config"))


def _trtllm_options(files: Files, origin: Origin, folder: str) -> str:
    chosen = {
        "decoding_type": "Eagle3",
        "max_draft_len": origin.chain,
        "speculative_model": folder,
        "eagle3_layers_to_capture": _inner(files.config)[LAYER_IDS],
    }
    return yaml.safe_dump({"speculative_config": chosen}, sort_keys=False, default_flow_style=None)


def _without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(OURS, THEIRS): tensor for name, tensor in tensors.items()}


FORMATS = {
    "hf": Format(_portable, ("vllm", "sglang", "trtllm"), "portable: vLLM, SGLang and TensorRT-LLM read it as it is"),
    "vllm": Format(_for_vllm, ("vllm",), "vLLM"),
    "sglang": Format(_for_sglang, ("sglang",), "SGLang"),
    "trtllm": Format(_for_trtllm, ("trtllm",), f"TensorRT-LLM, with its options in {TRTLLM_OPTIONS}"),
    "speculators": Format(_for_speculators, ("speculators",), "the speculators package, which vLLM reads"),
    "eagle": Format(_for_eagle, ("eagle",), "SafeAILab's EAGLE"),
}


def write(name: str, draft: Eagle3Draft, dtype: torch.dtype, origin: Origin, folder: str) -> Files:
    """The files of ``draft`` in format ``name``, its weights as ``dtype``, to be served from ``folder``.

    Raises:
        UserError: an engine of the format cannot serve such a head; the error says which and why.
    """
    provenance = {PROVENANCE: origin.target, "eagle3_training": origin.training}
    tensors = {
        key: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in draft.state_dict().items()
    }
    portable = Files(provenance | config_of(draft.config, dtype), tensors, {})
    if not engines_of(name, draft.config):
        title = ENGINES[FORMATS[name].engines[0]].title
        problem = f"{title} is not known to run EAGLE-3.1's flags, with which the head was trained"
        raise UserError("--format", name, problem, "choose hf, vllm or speculators")
    if name == "eagle" and list(draft.config.target_layers) != default_layers(origin.target["num_layers"]):
        problem = f"it always captures layers {default_layers(origin.target['num_layers'])}"
        remedy = f"choose another format: the head was trained on {list(draft.config.target_layers)}"
        raise UserError("--format", name, problem, remedy)
    return FORMATS[name].write(portable, origin, folder)
