"""The recording plan: every sample once, within the limits, and little padding."""

from __future__ import annotations

import numpy as np
import pytest
from eagle3.configs.settings import RecordSettings
from eagle3.data.planning import Batch, plan


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


def test_shards_hold_short_and_long_samples() -> None:
    lengths = drawn(5000)
    means = [
        np.mean([lengths[sample] for batch in shard for sample in batch])
        for shard in plan(lengths, RecordSettings())[:-1]
    ]
    assert np.std(means) < 0.5 * np.std(lengths)


def test_nothing_to_plan() -> None:
    assert plan([], RecordSettings()) == []
