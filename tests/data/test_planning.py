"""The recording plan: every sample once, within the limits, and little padding."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from eagle3.configs.settings import RecordSettings
from eagle3.data.chat import PLACEHOLDER, continuation, prompt_ids
from eagle3.data.conversations import Conversation
from eagle3.data.planning import Batch, plan
from transformers import AutoTokenizer

SHARED = Path(__file__).parents[2].parent / "shared"


def drawn(count: int) -> list[int]:
    """Lengths like those of MT-bench's questions with answers: log-normal prompts, answers up to a limit."""
    random = np.random.default_rng(0)
    prompts, answers = random.lognormal(4.2, 0.8, count), random.lognormal(5.5, 0.7, count)
    return [int(prompt) + 1 + int(min(answer, 1024)) for prompt, answer in zip(prompts, answers, strict=True)]


def padding(shards: list[list[Batch]], lengths: list[int]) -> float:
    """The share of padding in all that a recorder computes."""
    batches = [batch for shard in shards for batch in shard]
    computed = sum(len(batch) * max(lengths[sample] for sample in batch) for batch in batches)
    return 1 - sum(lengths) / computed


@pytest.mark.parametrize(
    ("count", "batch_tokens", "shard_tokens"), [(40, 50, 120), (500, 8192, 32768), (3000, 2048, 9000)]
)
def test_a_partition_within_the_limits(count: int, batch_tokens: int, shard_tokens: int) -> None:
    lengths = drawn(count)
    shards = plan(lengths, RecordSettings(batch_tokens=batch_tokens, shard_tokens=shard_tokens))
    assert sorted(sample for shard in shards for batch in shard for sample in batch) == list(range(count))
    for batch in (batch for shard in shards for batch in shard):
        assert len(batch) == 1 or len(batch) * max(lengths[sample] for sample in batch) <= batch_tokens
    for shard in shards:
        samples = [sample for batch in shard for sample in batch]
        assert len(samples) == 1 or sum(lengths[sample] for sample in samples) <= shard_tokens
    assert shards == plan(lengths, RecordSettings(batch_tokens=batch_tokens, shard_tokens=shard_tokens))


def test_a_long_sample_is_a_shard_of_its_own() -> None:
    shards = plan([4, 1000, 4], RecordSettings(batch_tokens=64, shard_tokens=64))
    assert sorted(shards) == [[(0, 2)], [(1,)]]


@pytest.mark.parametrize("count", [160, 2000, 20000])
def test_less_than_a_twentieth_of_what_is_computed_is_padding(count: int) -> None:
    lengths = drawn(count)
    for settings in (RecordSettings(), RecordSettings(batch_tokens=16384)):
        assert 0 < padding(plan(lengths, settings), lengths) < 0.05


@pytest.fixture(scope="module")
def mt_bench() -> list[list[int]]:
    """Tokens of MT-bench's questions in Llama-4's format: of the first turns, and with the second ones."""
    file, tokenizer = SHARED / "benchmarks" / "mt-bench.jsonl", SHARED / "llama4-tokenizer"
    if not (file.exists() and tokenizer.exists()):
        pytest.skip("../shared/benchmarks and ../shared/llama4-tokenizer are not there")
    reader = AutoTokenizer.from_pretrained(tokenizer)
    lengths = []
    for turns in (json.loads(line)["turns"] for line in file.open(encoding="utf-8")):
        talk = Conversation("", "", "test", [{"role": "user", "content": turns[0]}], tuple(turns[1:]))
        more = continuation(reader, talk, [PLACEHOLDER], turns[1])
        lengths.append([len(prompt_ids(reader, talk)), len(more)])
    return lengths


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("answers", [False, True])
def test_mt_bench_pads_less_than_a_twentieth(mt_bench: list[list[int]], turns: int, answers: bool) -> None:
    random = np.random.default_rng(0)
    said = np.minimum(random.lognormal(5.5, 0.7, (len(mt_bench), turns)), 1024).astype(int).sum(1) * answers
    lengths = [sum(asked[:turns]) + more for asked, more in zip(mt_bench, said.tolist(), strict=True)]
    assert len(lengths) == 80 and max(lengths) > 5 * min(lengths)
    shards = plan(lengths, RecordSettings(batch_tokens=8192))
    assert 0 < padding(shards, lengths) < 0.05
    batches = [batch for shard in shards for batch in shard]
    assert len(batches) < len(lengths) / (1 if answers else 2)  # not by giving each sample a batch


def test_shards_hold_short_and_long_samples() -> None:
    lengths = drawn(5000)
    means = [
        np.mean([lengths[sample] for batch in shard for sample in batch])
        for shard in plan(lengths, RecordSettings())[:-1]
    ]
    assert np.std(means) < 0.5 * np.std(lengths)


def test_nothing_to_plan() -> None:
    assert plan([], RecordSettings()) == []
