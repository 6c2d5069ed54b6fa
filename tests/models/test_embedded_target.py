"""The target that ships is the one every figure was measured on, and has the shape that the engines accept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import eagle3
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

FOLDER = Path(eagle3.__path__[0]) / "models" / "embedded"
WEIGHTS_SHA256 = "6e5745061fbb61ae228a20e6abe65efd122096e56c1c3dc029904b85784ec339"


def test_frozen() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == WEIGHTS_SHA256


def test_every_weight_is_bfloat16() -> None:
    tensors = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_shape_suits_the_engines() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Llama4ForCausalLM"]
    assert 12 <= config["num_hidden_layers"] <= 20
    assert config["max_position_embeddings"] >= 4096
    assert config["attention_chunk_size"] % 128 == 0
    assert config["num_attention_heads"] % 2 == config["num_key_value_heads"] % 2 == 0
    for width in ("hidden_size", "intermediate_size", "intermediate_size_mlp"):
        assert config[width] % 64 == 0
    assert config["moe_layers"] and config["num_local_experts"] > 1
    assert {"chunked_attention", "full_attention"} == set(config["layer_types"])
    assert 0 in config["no_rope_layers"]


def test_chat_format_is_llama_4s() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nWhat?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nThat.<|eot|>"
    )
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|eot|><|header_start|>assistant<|header_end|>\n\n")
    text = "naïve\tü 漢字 🦅 1234567\n    indented\r\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
