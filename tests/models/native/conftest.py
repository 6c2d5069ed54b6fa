"""Small random models of every variant that the native decoder computes, as transformers saves and computes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from eagle3.configs.settings import TargetSettings
from eagle3.models.native.loading import load_native
from eagle3.models.native.target import NativeTarget
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK, LAYERS = 8, 4
CAPTURED = tuple(range(LAYERS - 1))  # the last of transformers' hidden states is after the final norm
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SCALED_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
COMMON = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
    "rope_parameters": PLAIN_ROPE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA4 = COMMON | {
    "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
    "use_qk_norm": False, "attention_chunk_size": CHUNK, "attn_temperature_tuning": True, "floor_scale": 16,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "maverick": LLAMA4,
    "scout": LLAMA4 | {"interleave_moe_layer_step": 1, "use_qk_norm": True, "rope_parameters": SCALED_ROPE},
    "position-free in turn": LLAMA4 | {"no_rope_layer_interval": 2, "use_qk_norm": True, "num_key_value_heads": 1},
    "chunk of five, tied": LLAMA4 | {"attention_chunk_size": 5, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "without chunks": LLAMA4 | {"attention_chunk_size": None, "attn_temperature_tuning": False},
    "two experts a token": LLAMA4 | {"num_experts_per_tok": 2},
    "llama": COMMON,
    "llama scaled": COMMON | {"rope_parameters": SCALED_ROPE, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama wide heads": COMMON | {"head_dim": 16, "num_key_value_heads": 1},
}


class Pair(NamedTuple):
    """A model of transformers, and the native target that was loaded from its files."""

    theirs: PreTrainedModel
    ours: NativeTarget

    @torch.no_grad()
    def states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What transformers says of ``ids`` ``[T]``: features ``[T, F, H]`` and logits ``[T, V]``."""
        output = self.theirs(input_ids=ids[None], output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[1:]
        return torch.stack([hidden[layer][0] for layer in self.ours.info.layers], 1), output.logits[0]


def built(fields: dict[str, Any]) -> PreTrainedModel:
    """A model with random weights, those of the norms too."""
    torch.manual_seed(0)
    four = "num_local_experts" in fields
    model = Llama4ForCausalLM(Llama4TextConfig(**fields)) if four else LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, COMMON["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor, limit: float = 1e-4) -> None:
    """Equal up to rounding, relative to the largest value."""
    ours, theirs = ours.cpu(), theirs.cpu()
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= limit * theirs.abs().max()


@pytest.fixture(scope="session")
def saved(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``saved(model)`` is its folder, with a tokenizer."""

    def save(model: PreTrainedModel, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        model.save_pretrained(folder, **options)
        AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def pairs(saved: Callable[..., Path]) -> Callable[[str], Pair]:
    known: dict[str, Pair] = {}

    def pair(variant: str) -> Pair:
        if variant not in known:
            model = built(VARIANTS[variant])
            settings = TargetSettings(path=str(saved(model)), layers=CAPTURED)
            known[variant] = Pair(model, load_native(settings, capacity=128))
        return known[variant]

    return pair


@pytest.fixture(params=VARIANTS)
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    """Each variant in turn."""
    return pairs(request.param)
