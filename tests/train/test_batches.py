"""The schedule is a pure function of the recipe, however many ranks share it."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path

import pytest
import torch
from eagle3.data.quantise import encode
from eagle3.data.store import Store
from eagle3.train.batches import Schedule, blank, collate, divide, plan_pass
from eagle3.train.samples import Pass

LENGTHS = [random.Random(0).randint(3, 90) for _ in range(400)]


def test_an_epoch_holds_every_sample_once_within_the_budget() -> None:
    batches = plan_pass(LENGTHS, 256, seed=1, number=0)
    assert sorted(sample for batch in batches for sample in batch) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[sample] for sample in batch) <= 256 for batch in batches)
    assert all(batch == tuple(sorted(batch, key=lambda s: (-LENGTHS[s], s))) for batch in batches)


def test_epochs_and_seeds_differ_and_repeat_exactly() -> None:
    plans = {(seed, epoch): tuple(plan_pass(LENGTHS, 256, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(set(plans.values())) == 4
    assert all(tuple(plan_pass(LENGTHS, 256, *key)) == plan for key, plan in plans.items())


def test_batches_pad_little() -> None:
    lengths = LENGTHS * 5
    batches = plan_pass(lengths, 512, seed=0, number=0)
    padded = sum(len(batch) * lengths[batch[0]] for batch in batches)
    assert padded < 1.15 * sum(lengths)
    assert 512 * len(batches) < 1.2 * sum(lengths)


def test_a_sample_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    batches = plan_pass([5, 1000, 5, 5], 20, seed=0, number=0)
    assert (1,) in batches
    assert sorted(sample for batch in batches for sample in batch) == [0, 1, 2, 3]


@pytest.mark.parametrize("done", [0, 1, 7, 30])
def test_a_schedule_goes_on_where_it_was(done: int) -> None:
    samples = [2 * index for index in range(len(LENGTHS))]
    lengths = [length for each in LENGTHS for length in (each, 0)]
    schedule = Schedule([Pass(0, samples), Pass(1, samples)], lengths, 1024, seed=3)
    everything = list(schedule.from_step(0))
    assert [batch.step for batch in everything] == list(range(1, schedule.steps + 1))
    assert list(schedule.from_step(done)) == everything[done:]
    for epoch in (0, 1):
        assert sorted(s for batch in everything if batch.epoch == epoch for s in batch.samples) == samples


def test_passes_of_one_epoch_follow_each_other() -> None:
    """As those of a spool do: no batch holds samples of two."""
    passes = [Pass(0, range(start, min(start + 150, 400))) for start in range(0, 400, 150)]
    schedule = Schedule(passes, LENGTHS, 256, seed=3)
    batches = list(schedule.from_step(0))
    for number, (_, samples) in enumerate(passes):
        mine = batches[schedule.starts[number] : schedule.starts[number + 1]]
        assert sorted(sample for batch in mine for sample in batch.samples) == list(samples)
    assert {batch.epoch for batch in batches} == {0}
    middle = schedule.starts[1]
    assert [schedule.finished(done) for done in (0, middle - 1, middle, middle + 1, schedule.steps)] == [0, 0, 1, 1, 3]


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 64])
def test_dividing_loses_nothing_and_balances_tokens(parts: int) -> None:
    batch = plan_pass(LENGTHS, 2048, seed=0, number=0)[0]
    divided = divide(batch, dict(enumerate(LENGTHS)), parts)
    assert len(divided) == parts
    assert tuple(sample for part in divided for sample in part) == batch
    tokens = [sum(LENGTHS[sample] for sample in part) for part in divided]
    assert max(tokens) <= sum(tokens) / parts + 2 * max(LENGTHS[sample] for sample in batch)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_collate_packs_samples_as_they_are_stored(finished: Path, dtype: str) -> None:
    store = Store(finished / "store")
    samples = []
    for sample in (store[5], store[0]):
        parts = (encode(name, getattr(sample, name), dtype) for name in ("features", "last_hidden"))
        samples.append(sample._replace(stored=dict(chain.from_iterable(part.items() for part in parts))))
    collated = collate(samples)
    lengths = [len(sample.input_ids) for sample in samples]
    assert collated.lengths.tolist() == lengths
    assert collated.stored.keys() == samples[0].stored.keys()
    assert collated.stored["features"].dtype == samples[0].stored["features"].dtype
    batch = collated.on(torch.device("cpu"))
    assert batch.input_ids.dtype == torch.int64
    for name in ("input_ids", "loss_mask", "features", "last_hidden"):
        for part, sample in zip(getattr(batch, name).split(lengths), samples, strict=True):
            real = getattr(sample, name)
            assert torch.equal(part.to(real.dtype), real), name


def test_a_part_without_samples_is_a_batch_without_rows(finished: Path) -> None:
    batch = collate([blank(Store(finished / "store")[0])]).on(torch.device("cpu"))
    assert batch.input_ids.shape == (2,) and batch.features.shape == (2, 3, 32)
    assert not batch.loss_mask.any()
