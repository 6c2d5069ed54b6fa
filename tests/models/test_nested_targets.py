"""A language model inside a model that sees is recorded as it would be alone, in every layout of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagle3.configs.settings import TargetSettings
from eagle3.data.recorders import TransformersRecorder
from eagle3.models.target import load_target, load_text
from eagle3.models.target_files import load_ends, read_shape
from safetensors import safe_open
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def llama4(text: dict[str, Any]) -> PreTrainedModel:
    """Maverick's kind: a mixture of experts in every second layer, and chunks of 16 tokens."""
    mixture = {"intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1, "use_qk_norm": False}
    mixture |= {"interleave_moe_layer_step": 2, "attention_chunk_size": 16, "rope_parameters": ROPE}
    widths = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
    config = Llama4Config(text_config=text | mixture, vision_config=VISION | widths)
    return Llama4ForConditionalGeneration(config)


def gemma3(text: dict[str, Any]) -> PreTrainedModel:
    """Two kinds of layers, each with a base of rotary embeddings of its own."""
    windows = {"sliding_window": 8, "query_pre_attn_scalar": 8}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text | windows, vision_config=VISION, mm_tokens_per_image=4)
    )


def mistral3(text: dict[str, Any]) -> PreTrainedModel:
    parts = {"text_config": text | {"model_type": "mistral"}, "vision_config": VISION | {"model_type": "pixtral"}}
    return Mistral3ForConditionalGeneration(Mistral3Config(**parts))


def llava(text: dict[str, Any]) -> PreTrainedModel:
    parts = {
        "text_config": text | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    }
    return LlavaForConditionalGeneration(LlavaConfig(**parts))


def qwen3_vl(text: dict[str, Any]) -> PreTrainedModel:
    """Positions of three axes, which for a text are one."""
    rope = {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text | rope, vision_config=vision))


@pytest.fixture(params=[llama4, gemma3, mistral3, llava, qwen3_vl], ids=lambda kind: kind.__name__)
def saved(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> tuple[PreTrainedModel, TargetSettings]:
    """A random model that sees, and its folder."""
    build: Callable[[dict[str, Any]], PreTrainedModel] = request.param
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    torch.manual_seed(1)
    whole = build(TEXT | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}).eval()
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    whole.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return whole, TargetSettings(path=str(tmp_path))


def text_states(whole: PreTrainedModel, ids: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What the language model alone makes of ``ids``: outputs of all layers, the last normed, and logits."""
    language = whole.language_model if isinstance(whole, Llama4ForConditionalGeneration) else whole.model.language_model
    decoder = getattr(language, "model", language)
    with torch.no_grad():
        states = decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        return states, whole.get_output_embeddings()(states[-1])


def test_features_are_those_of_the_language_model(saved: tuple[PreTrainedModel, TargetSettings]) -> None:
    whole, settings = saved
    target = load_target(settings)
    assert target.info.layers == (1, 3, 4)
    ids = torch.randint(7, target.info.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    states, logits = text_states(whole, ids)
    # Shorter than the other, so that it is padded: alone and together a row has the same states.
    rows = [ids[0].numpy().astype(np.int32), ids[1, :27].numpy().astype(np.int32)]
    for row, found in enumerate(TransformersRecorder(target).record([rows])):
        length = len(rows[row])
        for index, layer in enumerate(target.info.layers):
            torch.testing.assert_close(found.features[:, index], states[layer + 1][row, :length], **CLOSE)
        torch.testing.assert_close(found.last_hidden, states[-1][row, :length], **CLOSE)
        torch.testing.assert_close(target.logits(found.last_hidden), logits[row, :length], rtol=1e-4, atol=1e-4)


def test_the_cache_continues_where_it_was(saved: tuple[PreTrainedModel, TargetSettings]) -> None:
    _, settings = saved
    target = load_target(settings)
    ids = torch.randint(7, target.info.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    fresh, cache = target.forward(ids).last_hidden, target.new_cache(40)
    for start, end in ((0, 17), (17, 18), (18, 40)):
        states = target.forward(ids[:, start:end], cache).last_hidden
        torch.testing.assert_close(states, fresh[:, start:end], rtol=1e-4, atol=1e-4)


def test_what_is_read_without_the_layers_agrees(saved: tuple[PreTrainedModel, TargetSettings]) -> None:
    _, settings = saved
    target, ends, shape = load_target(settings), load_ends(settings), read_shape(settings)
    assert ends.info == target.info
    for ours, theirs in zip(ends.head, target.head, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert load_text(settings)[1:] == (target.info.eos_ids, target.info.max_positions)
    fields = asdict(target.info)
    assert {name: value for name, value in asdict(shape).items() if name in fields} == {
        name: fields[name] for name in asdict(shape) if name in fields
    }


def test_llama4_is_saved_under_mavericks_names(tmp_path: Path) -> None:
    """All of the language model stands behind one prefix, its LM head included."""
    llama4(TEXT | {"vocab_size": 64, "eos_token_id": 1}).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} <= set(file.keys())
