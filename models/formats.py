"""The head in the format of every serving engine, and whether the engine will understand it.

    files = write("sglang", draft, torch.bfloat16, origin, "heads/mine")
    check("sglang", files, draft, origin)     # [] where SGLang will compute what was trained

Files are not compared with what we would write. They are read as the engine reads them (:mod:`.engines`), and what comes
out is compared with the head that was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from ..configs.errors import UserError
from .checkpoint import FIELDS, LAYER_IDS, config_of
from .draft import DraftConfig, Eagle3Draft
from .engines import ENGINES, FLAGS, OURS, THEIRS, TRTLLM_OPTIONS, Engine, Files, Reading, read
from .target import location

PROVENANCE = "eagle3_target"


class Origin(NamedTuple):
    """Where a head comes from: its target (``name``, ``revision``, ``weights_sha256``, ``num_layers``, ``dtype``), its
    training, and the chain that it is served with."""

    target: dict[str, Any]
    training: dict[str, Any]
    chain: int


class Format(NamedTuple):
    """What ``write`` makes of the portable files, and the engines that read the result."""

    write: Callable[[Files, Origin, str], Files]
    engines: tuple[str, ...]
    text: str


# --- checking


def check(name: str, files: Files, draft: Eagle3Draft, origin: Origin) -> list[str]:
    """What the engines of format ``name`` would make of ``files`` other than ``draft``, each in a line; [] if nothing."""
    found: list[str] = []
    for engine in engines_of(name, draft.config):
        reading = read(engine, files, origin.target["num_layers"])
        faults = [
            *reading.strange,
            *_check_values(reading, draft.config),
            *_check_tensors(engine, files.tensors, draft),
        ]
        found += [f"{engine.title}: {fault}" for fault in faults]
    return found + _check_origin(files.config, origin)


def engines_of(name: str, config: DraftConfig) -> list[Engine]:
    """The engines of format ``name`` that can run a head of this shape."""
    used = {flag for flag in FLAGS if getattr(config, flag)}
    return [ENGINES[key] for key in FORMATS[name].engines if used <= set(ENGINES[key].flags)]


def _check_values(reading: Reading, trained: DraftConfig) -> list[str]:
    faults = []
    for ours, theirs, _ in FIELDS:
        if ours in reading.values and reading.values[ours] != (wanted := getattr(trained, ours)):
            absent = ", which the file does not say," if ours in reading.unsaid else ""
            faults.append(
                f"it reads {theirs}{absent} as {reading.values[ours]}, and the head was trained with {wanted}"
            )
    layers, wanted_layers = reading.values.get("target_layers"), list(trained.target_layers)
    if layers not in (None, wanted_layers):
        shift = {theirs - ours for theirs, ours in zip(layers, wanted_layers, strict=False)}
        hint = " (numbered by input where it takes outputs, or the reverse)" if shift in ({1}, {-1}) else ""
        faults.append(
            f"it will capture the outputs of layers {layers}, and the head was trained on {wanted_layers}{hint}"
        )
    return faults


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
            fate = engine.lm_head if name == "lm_head.weight" else "which it leaves uninitialised"
            faults.append(f"there is no {spellings[-1]}, {fate}")
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
    moved = {"draft_vocab_size", *FLAGS, LAYER_IDS}
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
        "eagle3_layers_to_capture": files.config["eagle_config"][LAYER_IDS],
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
    engines = engines_of(name, draft.config)
    if not engines:
        title = ENGINES[FORMATS[name].engines[0]].title
        used = ", ".join(flag for flag in FLAGS if getattr(draft.config, flag))
        problem = f"{title} is not known to run {used}, with which the head was trained"
        raise UserError("--format", name, problem, f"choose one of {', '.join(_forms_for(draft.config))}")
    files = FORMATS[name].write(portable, origin, folder)
    for engine in engines:
        reading = read(engine, files, origin.target["num_layers"])
        for fault in (*reading.strange, *_check_values(reading, draft.config)):
            raise UserError("--format", name, f"{engine.title} cannot run this head: {fault}", "choose another format")
    return files


def _forms_for(config: DraftConfig) -> list[str]:
    return [name for name in FORMATS if engines_of(name, config)]
