"""What a target's files say, without loading the model: its shape, and single weights.

    files = TargetFiles(TargetSettings(path="meta-llama/Llama-4-Maverick-17B-128E-Instruct"))
    files.num_layers, files.weight("norm.weight")

The multimodal layout is read too: its language model is under ``text_config``, its weights behind a longer name.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from ..configs.errors import UserError
from ..configs.settings import TargetSettings
from .target import location

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ENDINGS = {"embedding": "embed_tokens.weight", "lm_head": "lm_head.weight"}


class TargetFiles:
    """The files of a folder or of a hub name.

    Raises:
        UserError: there is no configuration of a causal language model.
    """

    def __init__(self, settings: TargetSettings) -> None:
        self.name, self.revision = settings.path, settings.revision
        self._path = location(settings.path)
        folder = Path(self._path).is_dir()
        self._where: dict[str, Any] = {"revision": settings.revision} if settings.revision and not folder else {}
        try:
            config = AutoConfig.from_pretrained(self._path, **self._where).get_text_config()
        except (OSError, ValueError) as error:
            raise self._refusal(error) from error
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size

    @cached_property
    def embedding(self) -> Tensor:
        """The input embedding, ``[V, H]``."""
        return self._weight(ENDINGS["embedding"])

    @cached_property
    def lm_head(self) -> Tensor:
        """The LM head, ``[V, H]``; the embedding where both are one."""
        ending = ENDINGS["lm_head"]
        return self._weight(ending) if any(name.endswith(ending) for name in self._files) else self.embedding

    @cached_property
    def _files(self) -> dict[str, str]:
        """The file of every tensor."""
        try:
            index = cached_file(self._path, INDEX, _raise_exceptions_for_missing_entries=False, **self._where)
            if index is not None:
                found: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
                return found
            single = cached_file(self._path, SINGLE, **self._where)
        except (OSError, ValueError) as error:
            raise self._refusal(error) from error
        assert single is not None  # it raises instead
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)

    def _weight(self, ending: str) -> Tensor:
        name = next((name for name in self._files if name.endswith(ending)), None)
        if name is None:
            raise self._refusal(f"there is no {ending} in its weights")
        path = cached_file(self._path, self._files[name], **self._where)
        assert path is not None  # it raises instead
        with safe_open(path, "pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    def _refusal(self, problem: object) -> UserError:
        text = str(problem).partition("\n")[0].rstrip(".")
        return UserError("target.path", self.name, text, "check the name, or the connection to the hub")
