"""The target without its layers: its shape, its tokenizer and its two ends, read from its files.

    ends = load_ends(TargetSettings(path="meta-llama/Llama-4-Maverick-17B-128E-Instruct", dtype="bfloat16"))
    ends.logits(ends.norm(states))      # [..., H] as layer N-1 leaves them -> [..., V]

Who records with an engine that serves the target needs no more, and no room for its 400 B parameters.

Shapes: H hidden, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from ..configs.errors import UserError
from ..configs.settings import TargetSettings
from .target import DTYPES, opened, weights_sha256
from .target_info import TargetHead, TargetInfo, captured_layers, describe, find_decoder

#: Where a text-only checkpoint has ``model.norm.weight``, a multimodal one has one of the others.
PREFIXES = (("", ""), ("", "language_model."), ("model.", "model.language_model."))


def layers_of(settings: TargetSettings) -> tuple[tuple[int, ...], int]:
    """The captured layers and how many there are in all, from the configuration alone.

    Raises:
        UserError: as :func:`load_ends`.
    """
    with opened(settings) as (path, where):
        count = AutoConfig.from_pretrained(path, **where).get_text_config().num_hidden_layers
    return captured_layers(settings, count), count


class TargetEnds:
    """What ``Target`` is without its decoder layers: equal ``info``, ``head`` and ``tokenizer``.

    ``norm`` is the model's own final norm, ``[..., H]`` to ``[..., H]``, in the target's numerics.
    """

    def __init__(self, info: TargetInfo, head: TargetHead, norm: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.info, self.head, self.norm, self.tokenizer = info, head, norm, tokenizer

    def logits(self, last_hidden: Tensor) -> Tensor:
        """``[..., H]`` after the final norm to ``[..., V]``."""
        return F.linear(last_hidden, self.head.lm_head)


def load_ends(settings: TargetSettings) -> TargetEnds:
    """Read the ends of the target in a folder, of a hub name, or of the model that ships ("embedded").

    Raises:
        UserError: as :func:`load_target`; or the files have no such tensors.
    """
    with opened(settings) as (path, where):
        config = AutoConfig.from_pretrained(path, **where)
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        checksum = weights_sha256(path, where)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[settings.dtype])
        if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False, **where):
            model.generation_config = GenerationConfig.from_pretrained(path, **where)
        decoder = find_decoder(model, settings.path)
        head, norm = _read_ends(settings, model, decoder, path, where)
    info = describe(model, tokenizer, decoder.config, settings, head, checksum)
    return TargetEnds(info, head, norm, tokenizer)


def _read_ends(
    settings: TargetSettings, model: PreTrainedModel, decoder: Any, path: str, where: dict[str, Any]
) -> tuple[TargetHead, nn.Module]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # Two of them are one where they are tied.
    wanted = [decoder.embed_tokens.weight, decoder.norm.weight, model.get_output_embeddings().weight]
    read = _read_tensors(settings, [names[id(parameter)] for parameter in wanted], path, where)
    for parameter in wanted:
        found = read[names[id(parameter)]]
        if found.shape != parameter.shape:
            problem = f"its {names[id(parameter)]} is {tuple(found.shape)} and not {tuple(parameter.shape)}"
            raise UserError("target.path", settings.path, problem, "take files that belong together")
    embedding, weight, lm_head = (read[names[id(parameter)]] for parameter in wanted)
    decoder.norm.load_state_dict({"weight": weight}, assign=True)
    decoder.norm.requires_grad_(False)
    return TargetHead(embedding, weight, decoder.config.rms_norm_eps, lm_head), decoder.norm


def _read_tensors(
    settings: TargetSettings, names: Sequence[str], path: str, where: dict[str, Any]
) -> dict[str, Tensor]:
    """The named tensors, in the target's numerics; only the files that hold them are opened."""
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **where)
    if index is None:
        files = dict.fromkeys(_names(_file(path, "model.safetensors", where)), "model.safetensors")
    else:
        files = json.loads(Path(index).read_text())["weight_map"]
    found = {}
    for name in set(names):
        stored = next((other for other in _spellings(name) if other in files), None)
        if stored is None:
            problem = f"its files have no tensor {name}"
            raise UserError("target.path", settings.path, problem, "give a checkpoint in Hugging Face's layout")
        with safe_open(_file(path, files[stored], where), "pt") as file:
            found[name] = file.get_tensor(stored).to(DTYPES[settings.dtype])
    return found


def _spellings(name: str) -> list[str]:
    return [there + name.removeprefix(here) for here, there in PREFIXES if name.startswith(here)]


def _names(path: str) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _file(path: str, name: str, where: dict[str, Any]) -> str:
    file = cached_file(path, name, **where)
    assert file is not None  # it raises instead
    return file
