"""The target's states are the model's own, its cache rolls back exactly, and batching changes no answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.configs.settings import TargetSettings
from eagle3.models.generate import draw, draw_one
from eagle3.models.target import Target, check_head, load_target
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHUNK = 16
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def random_ids(target: Target, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(7, target.info.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def dense_target(kind: str, folder: Path) -> Target:
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
        model = Qwen3ForCausalLM(Qwen3Config(**shape, **(window if kind == "sliding" else {})))
    return Target(model, AutoTokenizer.from_pretrained(folder), TargetSettings(path=kind))


def test_info(tiny_target: Target, tiny_folder: Path) -> None:
    info = tiny_target.info
    assert (info.num_layers, info.hidden_size, info.layers, info.dtype) == (8, 32, (1, 3, 4), "float32")
    assert info.eos_ids == (tiny_target.tokenizer.eos_token_id,)
    assert len(info.weights_sha256) == 64
    again = load_target(TargetSettings(path=str(tiny_folder), dtype="bfloat16"))
    assert again.info == dataclasses.replace(info, dtype="bfloat16")


def test_states_are_the_models_own(tiny_target: Target) -> None:
    ids = random_ids(tiny_target, 2, 40)
    ours = tiny_target.forward(ids)
    theirs = tiny_target.model(input_ids=ids, output_hidden_states=True)
    assert ours.features.shape == (2, 40, 3, 32)
    for index, layer in enumerate(tiny_target.info.layers):
        torch.testing.assert_close(ours.features[:, :, index], theirs.hidden_states[layer + 1], **CLOSE)
    torch.testing.assert_close(tiny_target.logits(ours.last_hidden), theirs.logits, **CLOSE)


def test_head_gives_the_logits_from_the_last_layer(tiny_target: Target, tiny_folder: Path) -> None:
    last = load_target(TargetSettings(path=str(tiny_folder), layers=(7,)))
    ids = random_ids(last, 1, 20)
    output = last.forward(ids)
    normed = torch.nn.functional.rms_norm(output.features[:, :, 0], (32,), last.head.norm_weight, last.head.norm_eps)
    torch.testing.assert_close(normed, output.last_hidden, **CLOSE)
    assert last.head.embedding.shape == last.head.lm_head.shape == (last.info.vocab_size, 32)


def test_padding_on_the_right_changes_nothing(tiny_target: Target) -> None:
    ids = random_ids(tiny_target, 2, 40)
    alone = tiny_target.forward(ids[:1, :23])
    together = tiny_target.forward(ids)
    torch.testing.assert_close(together.features[:1, :23], alone.features, **CLOSE)
    torch.testing.assert_close(together.last_hidden[:1, :23], alone.last_hidden, **CLOSE)


@pytest.mark.parametrize("kind", ["llama4", "llama", "qwen3", "sliding"])
def test_rollback_is_exact(kind: str, tiny_target: Target, tiny_folder: Path) -> None:
    """Drafts that cross a chunk boundary, are rejected and replaced leave no trace, wherever they begin."""
    target = tiny_target if kind == "llama4" else dense_target(kind, tiny_folder)
    text = random_ids(target, 1, 60)
    fresh = target.forward(text)
    cache = target.new_cache(70)
    for start in range(1, 50, 3):
        cache.rollback(0)
        target.forward(text[:, :start], cache)
        target.forward(random_ids(target, 1, 6, seed=start), cache)
        cache.rollback(start)
        one = target.forward(text[:, start : start + 1], cache)
        several = target.forward(text[:, start + 1 : start + 8], cache)
        states = torch.cat((one.last_hidden, several.last_hidden), 1)
        torch.testing.assert_close(states, fresh.last_hidden[:, start : start + 8], **CLOSE)
        torch.testing.assert_close(several.features, fresh.features[:, start + 1 : start + 8], **CLOSE)


def test_rollback_as_far_as_one_likes(tiny_target: Target) -> None:
    text = random_ids(tiny_target, 1, 60)
    cache = tiny_target.new_cache(60)
    tiny_target.forward(text, cache)
    cache.rollback(CHUNK - 3)
    again = tiny_target.forward(text[:, CHUNK - 3 :], cache)
    torch.testing.assert_close(again.last_hidden, tiny_target.forward(text).last_hidden[:, CHUNK - 3 :], **CLOSE)


def test_cache_refuses_what_it_cannot_hold(tiny_target: Target) -> None:
    cache = tiny_target.new_cache(8)
    with pytest.raises(ValueError, match="do not fit"):
        tiny_target.forward(random_ids(tiny_target, 1, 9), cache)
    with pytest.raises(ValueError, match="roll"):
        cache.rollback(3)


def test_batch_answers_as_one_by_one(tiny_target: Target) -> None:
    """Greedy and sampled, unequal prompts, answers that end early; each is the same as alone."""
    lengths = [3, 30, 17, 16, 5, 48]
    prompts = [random_ids(tiny_target, n, seed=n).tolist() for n in lengths]
    temperatures = [0.0, 0.0, 1.0, 0.0, 1.5, 1.0]
    seeds = [5, 6, 7, 8, 9, 10]
    alone = [
        tiny_target.generate([prompt], [temperature], 40, [seed])[0]
        for prompt, temperature, seed in zip(prompts, temperatures, seeds, strict=True)
    ]
    assert tiny_target.generate(prompts, temperatures, 40, seeds) == alone
    order = [4, 1, 5]
    some = tiny_target.generate(
        *([x[i] for i in order] for x in (prompts, temperatures)), 40, [seeds[i] for i in order]
    )
    assert some == [alone[i] for i in order]


def test_finished_rows_leave_the_batch(tiny_folder: Path) -> None:
    """With many end tokens most answers are short; the rest must not notice."""
    target = load_target(TargetSettings(path=str(tiny_folder)))
    ends = tuple(range(7, target.info.vocab_size, 9))
    target.info = dataclasses.replace(target.info, eos_ids=ends)
    prompts = [random_ids(target, 4 + n, seed=n).tolist() for n in range(8)]
    together = target.generate(prompts, [1.0] * 8, 24)
    assert together == [target.generate([p], [1.0], 24, [n])[0] for n, p in enumerate(prompts)]
    assert len({len(answer.ids) for answer in together}) > 2
    for answer in together:
        assert answer.finished == (answer.ids[-1] in ends)
        assert not set(answer.ids[:-1]) & set(ends)
        assert answer.finished or len(answer.ids) == 24


def test_greedy_answers_follow_the_models_argmax(tiny_target: Target) -> None:
    prompt = random_ids(tiny_target, 20).tolist()
    answer = tiny_target.generate([prompt], [0.0], 30)[0].ids
    logits = tiny_target.logits(tiny_target.forward(torch.tensor([prompt + answer])).last_hidden)[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    drawn = draw(p.expand(10_000, -1), uniform.double()).bincount(minlength=6)
    assert drawn.tolist() == [0, 5000, 0, 2000, 3000, 0]
    assert torch.cat([draw_one(p, number) for number in uniform[:, None].double()]).bincount(minlength=6).equal(drawn)
    for number, token in ((0.0, 1), (1 - 2**-53, 4)):
        edge = torch.tensor([number], dtype=torch.float64)
        assert draw(p[None], edge).tolist() == draw_one(p, edge).tolist() == [token]


def test_draws_reach_what_is_too_unlikely_for_sums_in_float32() -> None:
    """Behind a token of nearly all probability, the others of a large vocabulary are nearer than floats below 1."""
    count = 202_048
    weights = torch.full((count,), 5e-9)
    weights[0] = 1.0
    one, rest = weights[:2].double()
    expected = torch.arange(1, count, 997)
    uniform = (one + (expected.double() - 0.5) * rest) / (one + (count - 1) * rest)
    assert draw(weights.expand(9, -1), uniform[-9:]).equal(expected[-9:])
    assert torch.cat([draw_one(weights, number) for number in uniform[:, None]]).equal(expected)


@pytest.mark.parametrize("layers", [(1, 1, 2), (3, 1), (0, 8), (-1,), ()])
def test_layers_that_are_not_there(layers: tuple[int, ...], tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=r"target\.layers = .*choose different layers from 0 to 7"):
        load_target(TargetSettings(path=str(tiny_folder), layers=layers))


def test_wrong_names(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"target\.path = .*no config\.json"):
        load_target(TargetSettings(path=str(tmp_path)))
    with pytest.raises(UserError, match=r"target\.dtype = float16"):
        load_target(TargetSettings(path=str(tiny_folder), dtype="float16"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"target\.path = nobody/no-such-model.*check the name"):
        load_target(TargetSettings(path="nobody/no-such-model"))


def test_a_head_that_is_more_than_a_product(tiny_folder: Path, tmp_path: Path) -> None:
    """Logits that a bias shifts could not be recomputed from what is recorded."""
    target = load_target(TargetSettings(path=str(tiny_folder)))
    target.model.lm_head.bias = torch.nn.Parameter(torch.linspace(0, 9, target.info.vocab_size))
    target.model.lm_head.weight = torch.nn.Parameter(target.model.lm_head.weight.detach().clone())
    with pytest.raises(UserError, match="its logits are not"):
        check_head(target)
