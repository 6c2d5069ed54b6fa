"""A Llama-4 small enough for tests: 8 layers, every second one a mixture of 4 experts, chunks of 16 tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eagle3.configs.settings import TargetSettings
from eagle3.models.target import Target, load_target
from eagle3.train.embedded.corpus import train_tokenizer
from transformers import Llama4ForCausalLM, Llama4TextConfig

CHUNK = 16


@pytest.fixture(autouse=True, scope="session")
def single_threaded() -> None:
    """Models this small only lose by threads, and every run adds in the same order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights and a byte-level tokenizer with Llama-4's chat format."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer(iter([]))
    config = Llama4TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        intermediate_size_mlp=64,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        use_qk_norm=False,
        attention_chunk_size=CHUNK,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    Llama4ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_target(tiny_folder: Path) -> Target:
    """The saved model in float32; captured layers 1, 3 and 4."""
    return load_target(TargetSettings(path=str(tiny_folder)))
