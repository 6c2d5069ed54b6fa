"""The target without its layers is the target: shape, head, norm, whatever layout its files have."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.configs.settings import TargetSettings
from eagle3.models.target import Target, load_target
from eagle3.models.target_files import INDEX, TargetFiles, layers_of, load_ends, read_shape
from eagle3.models.target_info import find_decoder
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def nested(folder: Path, **values: int) -> Path:
    """A multimodal Llama-4's configuration without any weights."""
    text = Llama4TextConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=32, intermediate_size_mlp=64, num_local_experts=4, **values,
    )  # fmt: skip
    Llama4Config(text_config=text.to_dict()).save_pretrained(folder)
    return folder


def same(settings: TargetSettings, target: Target) -> None:
    ends = load_ends(settings)
    assert ends.info == target.info
    assert ends.head.norm_eps == target.head.norm_eps
    for ours, theirs in zip(ends.head, target.head, strict=True):
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    states = 5 * torch.randn(7, target.info.hidden_size, generator=torch.Generator().manual_seed(0))
    states = states.to(target.head.norm_weight.dtype)
    assert torch.equal(ends.norm(states), find_decoder(target.model, "").norm(states))
    assert torch.equal(ends.logits(states), target.logits(states))
    assert ends.tokenizer.get_vocab() == target.tokenizer.get_vocab()
    assert layers_of(settings) == (target.info.layers, target.info.num_layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_the_model_that_ships(dtype: str) -> None:
    settings = TargetSettings(dtype=dtype)
    same(settings, load_target(settings))


@pytest.mark.parametrize(("config", "model"), [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_of_an_untied_model_in_several_files(
    config: type[LlamaConfig], model: type[LlamaForCausalLM], tiny_target: Target, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    made = model(config(vocab_size=tiny_target.info.vocab_size, tie_word_embeddings=False, **sizes))
    with torch.no_grad():
        made.model.norm.weight.normal_()
    made.save_pretrained(tmp_path, max_shard_size="20KB")
    tiny_target.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    settings = TargetSettings(path=str(tmp_path), layers=(0, 2, 4))
    same(settings, load_target(settings))


@pytest.mark.parametrize("prefix", ["language_model.", ""])
def test_of_a_multimodal_checkpoint(prefix: str, tiny_target: Target, tiny_folder: Path, tmp_path: Path) -> None:
    """Llama-4's own layout, and the one that transformers 5 writes."""
    text = Llama4TextConfig.from_pretrained(tiny_folder)
    Llama4Config(text_config=text.to_dict(), tie_word_embeddings=True).save_pretrained(tmp_path)
    tiny_target.tokenizer.save_pretrained(tmp_path)
    weights = load_file(tiny_folder / "model.safetensors")
    renamed = {
        prefix + name if prefix else name.replace("model.", "model.language_model.", 1): w.clone()
        for name, w in weights.items()
    }
    save_file(renamed | {"vision_model.layernorm_post.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    settings = TargetSettings(path=str(tmp_path))
    ends, files = load_ends(settings), TargetFiles(settings)
    assert torch.equal(files.embedding, ends.head.embedding)
    assert torch.equal(files.lm_head, ends.head.lm_head)
    assert (files.num_layers, files.hidden_size, files.vocab_size) == (8, 32, ends.info.vocab_size)
    assert ends.info.num_layers == tiny_target.info.num_layers
    assert torch.equal(ends.head.norm_weight, tiny_target.head.norm_weight)
    assert torch.equal(ends.head.embedding, tiny_target.head.embedding)
    assert torch.equal(ends.head.lm_head, tiny_target.head.lm_head)


def test_files_without_the_tensor_or_with_another_shape_are_told(
    tiny_target: Target, tiny_folder: Path, tmp_path: Path
) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    settings = TargetSettings(path=str(tmp_path))
    with pytest.raises(UserError, match=f"target.path = {tmp_path}: .*model.safetensors"):
        load_ends(settings)
    save_file(weights | {"model.norm.weight": torch.ones(31)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"its model.norm.weight is \(31,\) and not \(32,\); take files that belong"):
        load_ends(settings)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match="its files have no tensor model.norm.weight; give a checkpoint in Hugging Face"
    ):
        load_ends(settings)


def test_layers_that_the_target_has_not_are_told(tiny_folder: Path) -> None:
    assert json.loads((tiny_folder / "config.json").read_text())["num_hidden_layers"] == 8
    with pytest.raises(UserError, match=r"target.layers = \[1, 8\]: the target has 8 layers"):
        layers_of(TargetSettings(path=str(tiny_folder), layers=(1, 8)))


# The shape.


def test_the_shape_is_that_of_the_loaded_target(tiny_folder: Path, tiny_target: Target) -> None:
    shape = read_shape(TargetSettings(path=str(tiny_folder)))
    said, loaded = asdict(shape), asdict(tiny_target.info)
    common = said.keys() & loaded.keys()
    assert len(common) == 11
    assert {key: said[key] for key in common} == {key: loaded[key] for key in common}
    assert (shape.num_layers, shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (
        8,
        32,
        4,
        2,
        8,
    )
    assert (shape.layers, shape.rope_theta, shape.rms_norm_eps, shape.max_positions) == ((1, 3, 4), 1e4, 1e-5, 512)
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
    assert torch.get_default_device() == torch.device("cpu")


def test_an_index_of_the_weights_is_believed(tmp_path: Path) -> None:
    nested(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_parameters": 123}, "weight_map": {}}))
    shape = read_shape(TargetSettings(path=str(tmp_path)))
    assert (shape.parameters, shape.counted) == (123, "the index of its weights")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 246}, "weight_map": {}}))
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
