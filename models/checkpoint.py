"""The draft head on disk, in the layout that serving engines read: ``config.json`` and ``model.safetensors``.

    save_draft(draft, Path("runs/demo/draft"), torch.bfloat16, {"eagle3_target": {...}})
    draft = load_draft(Path("runs/demo/draft"))

vLLM reads the captured layers from the top level, numbered by the layer whose input they are (ours + 1); SGLang reads
``eagle_config``, numbered by the layer whose output they are (ours). Both are written on purpose.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..configs.errors import UserError
from .draft import DraftConfig, Eagle3Draft

CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
ARCHITECTURE = "LlamaForCausalLMEagle3"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
REMEDY = "take the folder of a trained head, such as runs/<name>/draft"

# Fields of DraftConfig that the file holds as they are: ours, the file's name, and what the value must be.
FIELDS: tuple[tuple[str, str, type], ...] = (
    ("hidden_size", "hidden_size", int),
    ("intermediate_size", "intermediate_size", int),
    ("num_heads", "num_attention_heads", int),
    ("num_kv_heads", "num_key_value_heads", int),
    ("head_dim", "head_dim", int),
    ("vocab_size", "vocab_size", int),
    ("draft_vocab_size", "draft_vocab_size", int),
    ("rms_norm_eps", "rms_norm_eps", float),
    ("rope_theta", "rope_theta", float),
    ("max_positions", "max_position_embeddings", int),
    ("norm_output", "norm_output", bool),
    ("fc_norm", "fc_norm", bool),
    ("norm_before_residual", "norm_before_residual", bool),
    ("norm_before_fc", "norm_before_fc", bool),
)
#: What files that are older than the field do not say.
DEFAULTS = {"norm_before_fc": False}
# What every head of ours is. A file that says otherwise describes another computation.
CONSTANTS: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def save_draft(draft: Eagle3Draft, folder: Path, dtype: torch.dtype, extra: dict[str, Any] | None = None) -> None:
    """Write ``draft`` to ``folder`` with its weights as ``dtype``; ``extra`` goes to the configuration (provenance)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: _stored(tensor, dtype) for name, tensor in draft.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = (extra or {}) | config_of(draft.config, dtype)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_draft(folder: Path) -> Eagle3Draft:
    """Read a head as float32.

    Raises:
        UserError: a file is missing or damaged; the configuration lacks a setting, contradicts itself or describes
            another kind of head; a tensor is missing, unknown, not finite, or has another shape or type than the
            configuration says; or the draft vocabulary is no part of the target's.
    """
    config = _from_json(folder / CONFIG, read_config(folder / CONFIG))
    path = folder / WEIGHTS
    tensors = read_tensors(path)
    mapped = config.draft_vocab_size < config.vocab_size
    placeholder = torch.arange(config.draft_vocab_size) if mapped else None
    draft = Eagle3Draft(config, placeholder)
    expected = draft.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise UserError("draft", path, f"it has no tensor {name}, which its {CONFIG} asks for", REMEDY)
        if name not in expected:
            raise UserError("draft", path, f"its tensor {name} has no place in the head of its {CONFIG}", REMEDY)
        check_tensor(path, name, tensors[name], expected[name])
    if mapped:
        _check_vocabulary(path, tensors["d2t"], tensors["t2d"])
    draft.load_state_dict(tensors)
    return draft


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def config_of(config: DraftConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The portable ``config.json`` of a head whose weights are stored as ``dtype``."""
    name, values = str(dtype).removeprefix("torch."), asdict(config)
    return (
        CONSTANTS
        | {theirs: values[ours] for ours, theirs, _ in FIELDS}
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "dtype": name,
            "torch_dtype": name,
            LAYER_IDS: [layer + 1 for layer in config.target_layers],
            "eagle_config": {LAYER_IDS: list(config.target_layers), "use_aux_hidden_state": True},
        }
    )


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; UserError where there is none."""
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("draft", path, "there is no such file", REMEDY) from None
    except ValueError as error:
        raise UserError("draft", path, f"it is not JSON ({error})", REMEDY) from None
    if not isinstance(config, dict):
        raise UserError("draft", path, "it is not a JSON object", REMEDY)
    return config


def _from_json(path: Path, config: dict[str, Any]) -> DraftConfig:
    """The head's shape, where the file says all of it and nothing against it."""
    for key, wanted in CONSTANTS.items():
        if config.get(key) != wanted:
            raise UserError("draft", path, f"{key} is {config.get(key)}, and only {wanted} is supported", REMEDY)
    values: dict[str, Any] = {}
    for ours, theirs, kind in FIELDS:
        value = config.get(theirs, DEFAULTS.get(theirs))
        if not _is_a(kind, value):
            wanted = "a bool" if kind is bool else f"a positive {kind.__name__}"
            raise UserError("draft", path, f"{theirs} is {value}, and it must be {wanted}", REMEDY)
        values[ours] = kind(value)
    inner = config["eagle_config"] if isinstance(config.get("eagle_config"), dict) else {}
    inputs, outputs = config.get(LAYER_IDS), inner.get(LAYER_IDS)
    if not outputs or not _is_ascending(outputs) or inputs != [layer + 1 for layer in outputs]:
        problem = f"its two lists of captured layers, {inputs} by input and {outputs} by output, do not agree"
        raise UserError("draft", path, problem, f"let {LAYER_IDS} be ascending, and eagle_config's list plus one")
    if (used := inner.get("use_aux_hidden_state")) is not True:
        problem = f"use_aux_hidden_state of eagle_config is {used}, and only True is supported"
        raise UserError("draft", path, problem, REMEDY)
    rope = config.get("rope_parameters")
    if rope != {"rope_type": "default", "rope_theta": config["rope_theta"]}:
        problem = f"rope_parameters is {rope}, and it must be plain and agree with rope_theta {config['rope_theta']}"
        raise UserError("draft", path, problem, REMEDY)
    if (scaling := config.get("rope_scaling")) is not None:
        raise UserError("draft", path, f"rope_scaling is {scaling}, and only plain RoPE is supported", REMEDY)
    read = DraftConfig(target_layers=tuple(outputs), **values)
    if read.num_heads % read.num_kv_heads or read.head_dim % 2:
        problem = f"it has {read.num_heads} heads over {read.num_kv_heads} key/value heads of width {read.head_dim}"
        raise UserError("draft", path, problem, REMEDY)
    if read.draft_vocab_size > read.vocab_size:
        problem = f"draft_vocab_size is {read.draft_vocab_size} out of a vocabulary of {read.vocab_size}"
        raise UserError("draft", path, problem, REMEDY)
    return read


def _is_a(kind: type, value: Any) -> bool:
    """Whether ``value`` is a bool or a positive, finite number, as ``kind`` says; a whole number will do for a float."""
    if kind is bool or isinstance(value, bool):
        return kind is type(value)
    return isinstance(value, int if kind is int else int | float) and 0 < value < math.inf


def _is_ascending(layers: Any) -> bool:
    whole = isinstance(layers, list) and all(type(layer) is int and layer >= 0 for layer in layers)
    return whole and layers == sorted(set(layers))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in ``path``; UserError where it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError("draft", path, "there is no such file", REMEDY) from None
    except SafetensorError as error:
        raise UserError("draft", path, f"it is damaged ({error})", REMEDY) from None


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch's own, in which nothing but tensors is allowed; UserError where it is damaged."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        problem = f"it is damaged, or holds more than tensors ({str(error).partition(chr(10))[0]})"
        raise UserError("draft", path, problem, REMEDY) from None
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def check_tensor(path: Path, name: str, found: Tensor, wanted: Tensor) -> None:
    """Refuse a tensor of another shape or type than ``wanted``, or with values that are not finite."""
    if found.shape != wanted.shape:
        problem = f"{name} has shape {list(found.shape)}, and its {CONFIG} says {list(wanted.shape)}"
        raise UserError("draft", path, problem, REMEDY)
    fits = found.is_floating_point() if wanted.is_floating_point() else found.dtype == wanted.dtype
    if not fits:
        kind = "a floating-point type" if wanted.is_floating_point() else str(wanted.dtype)
        raise UserError("draft", path, f"{name} has type {found.dtype}, and it must have {kind}", REMEDY)
    if wanted.is_floating_point() and not found.isfinite().all():
        raise UserError("draft", path, f"{name} holds values that are not finite", REMEDY)


def _check_vocabulary(path: Path, d2t: Tensor, t2d: Tensor) -> None:
    """``d2t`` (offsets) and ``t2d`` must name the same ids, ascending."""
    ids = d2t + torch.arange(len(d2t))
    if ids.min() < 0 or ids.max() >= len(t2d):
        problem = f"d2t leads to target ids {int(ids.min())}..{int(ids.max())}, out of 0..{len(t2d) - 1}"
        raise UserError("draft", path, problem, "write d2t as offsets: target id - draft id")
    if not torch.equal(ids, t2d.nonzero()[:, 0]):
        problem = "d2t and t2d do not name the same part of the target's vocabulary, in ascending order"
        raise UserError("draft", path, problem, "write d2t as offsets: target id - draft id")
