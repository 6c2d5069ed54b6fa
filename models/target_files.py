"""What a target's files say without its layers: its shape, its tokenizer, and its two ends.

    files = TargetFiles(TargetSettings(path="meta-llama/Llama-4-Maverick-17B-128E-Instruct"))
    files.shape().parameters            # from the configuration and the index of the weights alone
    files.lm_head                       # [V, H]; nothing else is read
    ends = load_ends(TargetSettings(path="meta-llama/Llama-4-Maverick-17B-128E-Instruct", dtype="bfloat16"))
    ends.logits(ends.norm(states))      # [..., H] as layer N-1 leaves them -> [..., V]

Who plans a run, imports a head, or records with an engine that serves the target, needs no more, and no room for its
400 B parameters. The multimodal layout is read too: its language model is under ``text_config``, its weights behind a
longer name.

Shapes: H hidden, V vocabulary.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from ..configs.errors import UserError
from ..configs.settings import TargetSettings
from .shapes import TargetShape
from .target import DTYPES, located, opened, reader, refusing
from .target_info import TargetHead, TargetInfo, captured_layers, configured, describe, find_decoder
from .weights import INDEX, SINGLE, weights_sha256

EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"  # what their names end with in every layout
#: Where a text-only checkpoint has ``model.norm.weight``, a multimodal one has one of the others, whatever the model that
#: reads it calls the weight.
PREFIXES = (
    ("", ""),
    ("", "language_model."),
    ("model.", "model.language_model."),
    ("model.language_model.", "language_model.model."),
)


class TargetFiles:
    """The files of a folder or of a hub name; weights are read when they are asked for, in the numerics of the file.

    Raises:
        UserError: there is no configuration of a causal language model; or, when asked, no such weight.
    """

    def __init__(self, settings: TargetSettings) -> None:
        self.name, self.revision, self._settings = settings.path, settings.revision, settings
        self._path, self._where = located(settings)
        with refusing(settings):
            self._config = AutoConfig.from_pretrained(self._path, **self._where)
        config = self._config.get_text_config()
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size

    def shape(self) -> TargetShape:
        """What the target is without its weights; of a multimodal one, its language model."""
        with refusing(self._settings):
            parameters, counted = self._parameters()
        fields = configured(self._config.get_text_config(), self._settings)
        return TargetShape(**fields, vocab_size=self.vocab_size, parameters=parameters, counted=counted)

    @cached_property
    def embedding(self) -> Tensor:
        """The input embedding, ``[V, H]``."""
        return self._read(self._ending(EMBEDDING), EMBEDDING)

    @cached_property
    def lm_head(self) -> Tensor:
        """The LM head, ``[V, H]``; the embedding where both are one."""
        stored = self._ending(LM_HEAD)
        return self.embedding if stored is None else self._read(stored, LM_HEAD)

    def weight(self, name: str) -> Tensor:
        """The weight that transformers' model calls ``name``."""
        return self._read(self._spelling(name), name)

    def find(self, name: str) -> tuple[str, str]:
        """Where the weight that transformers' model calls ``name`` is: in which file, and what it is called there."""
        stored = self._spelling(name)
        if stored is None:
            raise self._missing(name)
        return self._file(self._files[stored]), stored

    @cached_property
    def _index(self) -> dict[str, Any]:
        """The index of the weights; empty where they are in one file."""
        index = cached_file(self._path, INDEX, _raise_exceptions_for_missing_entries=False, **self._where)
        found: dict[str, Any] = json.loads(Path(index).read_text()) if index else {}
        return found

    @cached_property
    def _files(self) -> dict[str, str]:
        """The file of every tensor."""
        with refusing(self._settings):
            if self._index:
                return dict(self._index["weight_map"])
            with safe_open(self._file(SINGLE), "pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)

    def _parameters(self) -> tuple[int, str]:
        """How many parameters the target has, and from what that is known; never downloads weights."""
        single = Path(self._path) / SINGLE
        if single.is_file():
            with safe_open(single, "pt") as file:
                names = file.keys()
                return sum(math.prod(file.get_slice(name).get_shape()) for name in names), "its weights"
        metadata = self._index.get("metadata", {})
        if "total_parameters" in metadata:
            return metadata["total_parameters"], "the index of its weights"
        with torch.device("meta"):
            model = reader(self._config).from_config(self._config)
        return sum(parameter.numel() for parameter in model.parameters()), "its configuration"

    def _spelling(self, name: str) -> str | None:
        spellings = (there + name.removeprefix(here) for here, there in PREFIXES if name.startswith(here))
        return next((stored for stored in spellings if stored in self._files), None)

    def _ending(self, ending: str) -> str | None:
        return next((name for name in self._files if name.endswith(ending)), None)

    def _read(self, stored: str | None, name: str) -> Tensor:
        if stored is None:
            raise self._missing(name)
        with refusing(self._settings), safe_open(self._file(self._files[stored]), "pt") as file:
            found: Tensor = file.get_tensor(stored)
            return found

    def _missing(self, name: str) -> UserError:
        problem = f"its files have no tensor {name}"
        return UserError("target.path", self.name, problem, "give a checkpoint in Hugging Face's layout")

    def _file(self, name: str) -> str:
        file = cached_file(self._path, name, **self._where)
        assert file is not None  # it raises instead
        return file


def read_shape(settings: TargetSettings) -> TargetShape:
    """The shape of the target in a folder, of a hub name, or of the model that ships ("embedded").

    Raises:
        UserError: no such folder, a hub that cannot be reached, no causal language model, or layers that it has not.
    """
    with opened(settings):
        return TargetFiles(settings).shape()


def layers_of(settings: TargetSettings) -> tuple[tuple[int, ...], int]:
    """The captured layers and how many there are in all, from the configuration alone.

    Raises:
        UserError: as :func:`load_ends`.
    """
    with opened(settings):
        count = TargetFiles(settings).num_layers
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
            model = reader(config).from_config(config, dtype=DTYPES[settings.dtype])
        if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False, **where):
            model.generation_config = GenerationConfig.from_pretrained(path, **where)
        decoder = find_decoder(model, settings.path)
        head, norm = _read_ends(settings, model, decoder)
    info = describe(model, tokenizer, decoder.config, settings, head, checksum)
    return TargetEnds(info, head, norm, tokenizer)


def _read_ends(settings: TargetSettings, model: PreTrainedModel, decoder: Any) -> tuple[TargetHead, nn.Module]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    # Two of them are one where they are tied.
    wanted = [decoder.embed_tokens.weight, decoder.norm.weight, model.get_output_embeddings().weight]
    files, read = TargetFiles(settings), dict[int, Tensor]()
    for key, parameter in {id(parameter): parameter for parameter in wanted}.items():
        read[key] = files.weight(names[key]).to(DTYPES[settings.dtype])
        if read[key].shape != parameter.shape:
            problem = f"its {names[key]} is {tuple(read[key].shape)} and not {tuple(parameter.shape)}"
            raise UserError("target.path", settings.path, problem, "take files that belong together")
    embedding, weight, lm_head = (read[id(parameter)] for parameter in wanted)
    decoder.norm.load_state_dict({"weight": weight}, assign=True)
    decoder.norm.requires_grad_(False)
    return TargetHead(embedding, weight, decoder.config.rms_norm_eps, lm_head), decoder.norm
