"""The draft head on disk, in the layout that serving engines read: ``config.json`` and ``model.safetensors``.

vLLM reads the captured layers from the top level, numbered by the layer whose input they are (ours + 1); SGLang reads
``eagle_config``, numbered by the layer whose output they are (ours). Both are written on purpose.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..configs.errors import UserError
from .draft import DraftConfig, Eagle3Draft

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ARCHITECTURE = "LlamaForCausalLMEagle3"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
REMEDY = "take the folder of a trained head, such as runs/<name>/draft"


def save_draft(draft: Eagle3Draft, folder: Path, dtype: torch.dtype, extra: dict[str, Any] | None = None) -> None:
    """Write ``draft`` to ``folder`` with its weights as ``dtype``; ``extra`` goes to the configuration (provenance)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: _stored(tensor, dtype) for name, tensor in draft.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = _to_json(draft.config, dtype) | (extra or {})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_draft(folder: Path) -> Eagle3Draft:
    """Read a head as float32.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unknown or has another shape than the
            configuration says, or the draft vocabulary does not fit the target's.
    """
    config = _from_json(folder, _read_config(folder))
    tensors = _read_tensors(folder)
    mapped = config.draft_vocab_size < config.vocab_size
    draft_ids = _draft_ids(folder, config, tensors) if mapped else None
    draft = Eagle3Draft(config, draft_ids)
    expected = draft.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise UserError("draft", folder / WEIGHTS, f"it has no tensor {name}", REMEDY)
        if name not in expected:
            raise UserError("draft", folder / WEIGHTS, f"its tensor {name} has no place in the head", REMEDY)
        found, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
        if found != wanted:
            problem = f"{name} has shape {list(found)}, and {CONFIG} says {list(wanted)}"
            raise UserError("draft", folder / WEIGHTS, problem, REMEDY)
    draft.load_state_dict(tensors)
    return draft


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _to_json(config: DraftConfig, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": name,
        "torch_dtype": name,
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in config.target_layers],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(config.target_layers),
            "use_aux_hidden_state": True,
        },
        "norm_before_residual": False,
        "norm_output": config.norm_output,
        "fc_norm": config.fc_norm,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError("draft", path, "there is no such file", REMEDY) from None
    except ValueError as error:
        raise UserError("draft", path, f"it is not JSON ({error})", REMEDY) from None
    if not isinstance(config, dict) or config.get("architectures") != [ARCHITECTURE]:
        raise UserError("draft", path, f"its architecture is not {ARCHITECTURE}", REMEDY)
    return config


def _from_json(folder: Path, config: dict[str, Any]) -> DraftConfig:
    try:
        ours = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        theirs = config["eagle_aux_hidden_state_layer_ids"]
        read = DraftConfig(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            vocab_size=config["vocab_size"],
            draft_vocab_size=config["draft_vocab_size"],
            target_layers=tuple(ours),
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
            max_positions=config["max_position_embeddings"],
            fc_norm=config["fc_norm"],
            norm_output=config["norm_output"],
        )
    except KeyError as error:
        raise UserError("draft", folder / CONFIG, f"it has no setting {error}", REMEDY) from None
    if theirs != [layer + 1 for layer in ours]:
        problem = f"its two lists of captured layers, {theirs} by input and {ours} by output, name different layers"
        raise UserError("draft", folder / CONFIG, problem, "let the first be the second plus one")
    return read


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError("draft", path, "there is no such file", REMEDY)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise UserError("draft", path, f"it is damaged ({error})", REMEDY) from None


def _draft_ids(folder: Path, config: DraftConfig, tensors: dict[str, Tensor]) -> Tensor:
    """The draft vocabulary ``[D]`` out of ``d2t`` offsets, checked against ``t2d``."""
    if "d2t" not in tensors or "t2d" not in tensors:
        raise UserError("draft", folder / WEIGHTS, "its draft vocabulary is smaller and it has no d2t and t2d", REMEDY)
    offsets, chosen = tensors["d2t"], tensors["t2d"]
    ids = offsets + torch.arange(len(offsets))
    fits = len(ids) == config.draft_vocab_size and len(chosen) == config.vocab_size
    if not fits or not torch.equal(ids, chosen.nonzero()[:, 0]):
        problem = "d2t (offsets) and t2d do not describe the same part of the target's vocabulary"
        raise UserError("draft", folder / WEIGHTS, problem, REMEDY)
    return ids
