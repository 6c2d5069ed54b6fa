"""The frozen target: hidden states for recording, answers for training, verification for decoding.

    target = load_target(TargetSettings())
    ids = target.tokenizer("def f(x):", return_tensors="pt").input_ids
    states = target.forward(ids)              # .features [B, T, F, H], .last_hidden [B, T, H]
    target.logits(states.last_hidden[:, -1])  # [B, V]

Any causal language model of transformers serves, also one inside a multimodal model. Captured layer i is the residual stream at the output of decoder
layer i, taken by a forward hook: the last of transformers' own ``hidden_states`` is after the final norm.

Shapes: B batch, T tokens, F captured layers, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from ..configs.errors import UserError
from ..configs.settings import TargetSettings
from .generate import Answer, generate
from .kv_cache import KVCache
from .parallel import from_first, here, join, whole
from .target_info import TargetHead, TargetInfo, TargetText, attention_layout, describe, end_ids, find_decoder
from .weights import weights_sha256

__all__ = ["Answer", "Target", "TargetHead", "TargetInfo", "TargetOutput", "TargetText", "load_target", "load_text"]

EMBEDDED = Path(__file__).parent / "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD_TOLERANCE = 1e-2  # of the largest logit, between the model's logits and those of its head: bfloat16 rounds at 4e-3


class TargetOutput(NamedTuple):
    """``last_hidden`` ``[B, T, H]`` after the final norm, and the captured layers' outputs, each ``[B, T, H]``."""

    last_hidden: Tensor
    captured: tuple[Tensor, ...]

    @property
    def features(self) -> Tensor:
        """The captured layers' outputs as ``[B, T, F, H]``."""
        return torch.stack([layer.to(self.last_hidden.device) for layer in self.captured], -2)


class Target:
    """A causal language model with its tokenizer, frozen.

    Args:
        model: any causal language model of transformers, in the numerics that it shall run in.
        tokenizer: its tokenizer.
        settings: which layers to capture; ``path`` and ``revision`` are names here.
        weights_sha256: the checksum of the files it came from.

    Raises:
        UserError: a captured layer that the target does not have, or a kind of attention that is not supported.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: TargetSettings,
        weights_sha256: str = "",
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self._decoder = find_decoder(model, settings.path)
        config = self._decoder.config
        self._layer_types, self._span, self._mask_per_type = attention_layout(config, settings.path)
        # transformers 5.24 gave the argument another name.
        accepted = inspect.signature(self._decoder.forward).parameters
        self._cache_argument = "cache" if "cache" in accepted else "past_key_values"
        inner, outer = self._decoder.embed_tokens.weight, model.get_output_embeddings().weight
        embedding = whole(inner.detach())
        lm_head = embedding if outer is inner else whole(outer.detach())
        self.head = TargetHead(embedding, whole(self._decoder.norm.weight.detach()), config.rms_norm_eps, lm_head)
        self.info = describe(model, tokenizer, config, settings, self.head, weights_sha256)
        self.text = TargetText(tokenizer, self.info.eos_ids, self.info.max_positions)
        self.device = self.head.embedding.device
        # Llama-4 scales the queries of its position-free layers by a function of the position in the batch's longest
        # row, constant below this position; beyond it, rows of unequal length have to run alone.
        fields = config.to_dict()
        self.uniform_positions = fields["floor_scale"] - 1 if fields.get("attn_temperature_tuning") else 1 << 62
        self._captured: dict[int, Tensor] = {}
        for layer in self.info.layers:
            self._decoder.layers[layer].register_forward_hook(self._capture(layer))

    def _capture(self, layer: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            self._captured[layer] = output if isinstance(output, Tensor) else output[0]

        return hook

    @torch.no_grad()
    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> TargetOutput:
        """Run the target over ``input_ids`` ``[B, T]``, which continue what is in ``cache`` and are added to it.

        Without a cache every row starts at position 0. Rows padded on the right are exact for their real tokens, since
        no token sees one that comes after it.
        """
        arguments: dict[str, Any] = {}
        if cache is not None:
            positions, masks = cache.prepare(input_ids.shape[1], self._decoder.dtype, self.device)
            arguments = {
                "position_ids": positions,
                "attention_mask": masks if self._mask_per_type else masks[self._layer_types[0]],
                self._cache_argument: cache,
            }
        states = self._decoder(input_ids=input_ids.to(self.device), use_cache=cache is not None, **arguments)[0]
        if cache is not None:
            cache.advance()
        output = TargetOutput(states, tuple(self._captured[layer] for layer in self.info.layers))
        self._captured.clear()
        return output

    def logits(self, last_hidden: Tensor) -> Tensor:
        """``[..., H]`` after the final norm to ``[..., V]``."""
        return F.linear(last_hidden, self.head.lm_head)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``capacity`` positions; memory is taken at first use."""
        return KVCache(self._layer_types, self._span, batch, capacity, always_mask=not self._mask_per_type)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        max_new_tokens: int,
        seeds: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Answer ``prompts`` together, each at its own temperature (0: greedy), until its end token or the limit.

        An answer depends on its prompt, temperature and seed alone: whatever shares the batch, its random draws are the
        same, and its logits up to the rounding of their numerics. Seeds default to 0, 1, 2, ...
        """
        return generate(self, prompts, temperatures, max_new_tokens, seeds)


def location(path: str) -> str:
    """Where a target's files are: ``path``, or the folder of the model that ships if it is "embedded"."""
    return str(EMBEDDED) if path == "embedded" else path


@contextmanager
def opened(settings: TargetSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where the target's files are, as :func:`located`, and inside it one line for what cannot be read there.

    Raises:
        UserError: its numerics are unknown, there is no such folder, or as :func:`refusing`.
    """
    if settings.dtype not in DTYPES:
        raise UserError("target.dtype", settings.dtype, "not supported", f"choose one of {', '.join(DTYPES)}")
    if not sys.stderr.isatty():
        disable_progress_bar()
    path, where = located(settings)
    is_path = Path(path).is_absolute() or path.startswith(".")
    if is_path and not (Path(path) / "config.json").is_file():
        raise UserError("target.path", settings.path, f"no config.json in {path}", "give a model's folder or hub name")
    with refusing(settings):
        yield path, where


def located(settings: TargetSettings) -> tuple[str, dict[str, Any]]:
    """The folder or hub name of the target's files, and the revision as transformers' readers take it."""
    path = location(settings.path)
    return path, {"revision": settings.revision} if settings.revision and not Path(path).is_dir() else {}


@contextmanager
def refusing(settings: TargetSettings) -> Iterator[None]:
    """Tell in one line what transformers raises for missing files, refused downloads and unknown types."""
    try:
        yield
    except (OSError, ValueError) as error:
        problem = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            "target.path", settings.path, problem, "check the name, or the connection to the hub"
        ) from error


def load_target(settings: TargetSettings, members: int = 1) -> Target:
    """Load weights, configuration and tokenizer of a folder, of a hub name, or of the model that ships ("embedded").

    Args:
        settings: which.
        members: processes that hold it together (:mod:`.parallel`); all of them have to load it, and to call it alike.

    Raises:
        UserError: no such folder, a hub that cannot be reached, files that are no causal language model, or a setting
            that does not suit it.
    """
    with opened(settings) as (path, where):
        config = AutoConfig.from_pretrained(path, **where)
        if members > 1:
            placement = join(members, config)
            checksum = from_first(weights_sha256(path, where) if here(members).writes else "")
        else:
            placement = {"device_map": "auto"} if torch.cuda.is_available() else {}
            checksum = weights_sha256(path, where)
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        model = reader(config).from_pretrained(path, config=config, dtype=DTYPES[settings.dtype], **placement, **where)
    model.requires_grad_(False)
    target = Target(model, tokenizer, settings, checksum)
    check_head(target)
    return target


def reader(config: PretrainedConfig) -> Any:
    """The class of transformers that reads a causal language model, alone or inside a model that sees."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def load_text(settings: TargetSettings) -> TargetText:
    """Tokenizer and configuration of the target that :func:`load_target` would load; its weights are not touched.

    Raises:
        UserError: no such folder, a hub that cannot be reached, or files that are no causal language model.
    """
    with opened(settings) as (path, where):
        whole = AutoConfig.from_pretrained(path, **where)
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        try:
            generation = GenerationConfig.from_pretrained(path, **where)
        except OSError:  # it is optional
            generation = GenerationConfig.from_model_config(whole)
    config = whole.get_text_config()
    return TargetText(tokenizer, end_ids(generation, config, tokenizer), config.max_position_embeddings)


def check_head(target: Target) -> None:
    """Refuse a target whose logits are more than ``lm_head(last_hidden)`` (biases, soft caps): records hold no more."""
    ids = torch.arange(4, device=target.device)[None] % target.info.vocab_size
    with torch.no_grad():
        real = target.model(input_ids=ids, use_cache=False).logits.float()
    ours = target.logits(target.forward(ids).last_hidden).float()
    if (real - ours).abs().max() > HEAD_TOLERANCE * real.abs().max():
        problem = "its logits are not lm_head(norm(x))"
        raise UserError(
            "target.path", target.info.name, problem, "take a target without bias, scale or cap on its logits"
        )
