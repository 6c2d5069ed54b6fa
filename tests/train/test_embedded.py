"""The embedded target's recipe: its fast forward is the model's, its corpus keeps held-out modules out."""

import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from eagle3.data.corpus import Example
from eagle3.train.embedded import corpus, forward, pretrain
from transformers import Llama4ForCausalLM


def tiny_model() -> Llama4ForCausalLM:
    config = pretrain.configuration(64, 0, 6, 2)
    config.update({"hidden_size": 32, "head_dim": 8, "intermediate_size": 16, "intermediate_size_mlp": 24})
    config.update({"num_hidden_layers": 4, "moe_layers": [1, 3], "attention_chunk_size": 8})
    config.update({"layer_types": config.layer_types[:4], "no_rope_layers": config.no_rope_layers[:4]})
    return pretrain.initialise(config, seed=1)


@pytest.mark.parametrize("length", [5, 8, 32])
def test_the_training_forward_is_the_model(length: int) -> None:
    model = tiny_model()
    ids = torch.randint(0, 64, (3, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        states, balance = forward.hidden_states(model, ids)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert balance.item() >= 2 * 0.9  # two MoE layers, each at least about 1


def test_the_flash_path_is_the_written_out_path() -> None:
    q, k, v = (torch.randn(2, heads, 16, 8) for heads in (4, 2, 2))
    torch.testing.assert_close(forward._long_attention(q, k, v), forward._short_attention(q, k, v))


def test_every_parameter_learns() -> None:
    model = tiny_model()
    loss, balance = pretrain.loss_of(model, torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(0)))
    (loss + balance).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_schedule_warms_up_holds_and_decays_to_nothing() -> None:
    recipe = pretrain.Recipe(cycles=((200, 100), (50, 10)), warmup_steps=10, rewarm_steps=5)
    assert [recipe.scale(step) for step in (0, 9, 150, 200, 250, 299)] == [0.1, 1.0, 1.0, 1.0, 0.5, 0.01]
    assert [recipe.scale(step) for step in (300, 304, 350, 359, recipe.steps)] == [0.2, 1.0, 1.0, 0.1, 0.0]


def test_windows_follow_the_stream_and_wrap(tmp_path: Path) -> None:
    recipe = pretrain.Recipe(((1, 1),), batch=2, length=3)
    ids = np.arange(10, dtype=np.uint16)
    assert pretrain.batch_of(ids, recipe, 0).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert pretrain.batch_of(ids, recipe, 1).tolist() == [[6, 7, 8, 9], [9, 0, 1, 2]]


def test_the_template_renders_what_training_saw() -> None:
    example = Example(
        "id", "explain", "json", "train", "What does `f` do?\n\n```python\ndef f(x):\n```", "It  adds\n  1."
    )
    tokenizer = corpus.train_tokenizer(iter([corpus.render(example)] * 3))
    messages = [{"role": "user", "content": example.question}, {"role": "assistant", "content": example.answer}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == corpus.render(example)
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    answer = [i for i, marked in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if marked]
    assert tokenizer.decode(answer) == example.answer + corpus.EOT
    assert tokenizer.decode(encoded["input_ids"]) == corpus.render(example)


def test_functions_like_held_out_ones_are_dropped(tmp_path: Path) -> None:
    package = tmp_path / "vendoring"
    package.mkdir()
    (package / "copied.py").write_text(Path(fnmatch.__file__).read_text())  # a module of the test split
    own = "\n".join(f"        total = total * {i} + weights[{i}] - {i * 7}" for i in range(9))
    (package / "own.py").write_text(
        f"def mix(weights):\n    total = 0\n    for _ in weights:\n{own}\n    return total\n"
    )
    chosen, counts = corpus.conversations(tmp_path)
    assert counts["vendoring"] == 1
    assert {e.module for e in chosen if e.module.startswith("vendoring")} == {"vendoring.own"}
    assert all(e.split == "train" for e in chosen if not e.module.startswith("vendoring"))
