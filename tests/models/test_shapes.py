"""What a configuration alone says of a target, nested ones included."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.configs.settings import DraftSettings, TargetSettings
from eagle3.models import shapes
from eagle3.models.shapes import draft_config, read_shape
from eagle3.models.target import Target
from transformers import AutoModelForCausalLM, Llama4Config, Llama4TextConfig


def nested(folder: Path, **values: int) -> Path:
    """A multimodal Llama-4's configuration without any weights."""
    text = Llama4TextConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, intermediate_size_mlp=64, num_local_experts=4, **values,
    )  # fmt: skip
    Llama4Config(text_config=text.to_dict()).save_pretrained(folder)
    return folder


def test_the_shape_is_that_of_the_loaded_target(tiny_folder: Path, tiny_target: Target) -> None:
    shape = read_shape(TargetSettings(path=str(tiny_folder)))
    said, loaded = asdict(shape), asdict(tiny_target.info)
    common = said.keys() & loaded.keys()
    assert len(common) == 11
    assert {key: said[key] for key in common} == {key: loaded[key] for key in common}
    assert shape.parameters == sum(parameter.numel() for parameter in tiny_target.model.parameters())
    assert shape.counted == "its weights"


def test_of_a_multimodal_model_the_language_model_counts(tmp_path: Path) -> None:
    shape = read_shape(TargetSettings(path=str(nested(tmp_path))))
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (8, 32, 500)
    assert (shape.layers, shape.head_dim, shape.rope_theta) == ((1, 3, 4), 8, 500000.0)
    config = Llama4TextConfig(**json.loads((tmp_path / "config.json").read_text())["text_config"])
    model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.counted == "its configuration"


def test_an_index_of_the_weights_is_believed(tmp_path: Path) -> None:
    nested(tmp_path)
    (tmp_path / shapes.INDEX).write_text(json.dumps({"metadata": {"total_parameters": 123}, "weight_map": {}}))
    shape = read_shape(TargetSettings(path=str(tmp_path)))
    assert (shape.parameters, shape.counted) == (123, "the index of its weights")
    (tmp_path / shapes.INDEX).write_text(json.dumps({"metadata": {"total_size": 246}, "weight_map": {}}))
    assert read_shape(TargetSettings(path=str(tmp_path))).counted == "its configuration"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"path": "./nowhere"}, "target.path = ./nowhere: "),
        ({"layers": (1, 9)}, r"target.layers = \[1, 9\]: the target has 8 layers"),
    ],
)
def test_a_target_that_is_not_there_or_not_so_deep(tmp_path: Path, settings: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_shape(TargetSettings(**{"path": str(nested(tmp_path))} | settings))


def test_the_head_follows_the_target_where_the_recipe_is_silent(tmp_path: Path) -> None:
    target = asdict(read_shape(TargetSettings(path=str(nested(tmp_path)))))
    config = draft_config(DraftSettings(vocab_size=100, num_heads=8), target)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 2, 8)
    assert (config.vocab_size, config.draft_vocab_size, config.target_layers) == (500, 100, (1, 3, 4))
    with pytest.raises(UserError, match="draft.num_kv_heads = 2: it does not divide the 3 heads"):
        draft_config(DraftSettings(num_heads=3), target)
    assert torch.get_default_device() == torch.device("cpu")
