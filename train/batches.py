"""Which samples an optimiser step sees, and how they become tensors.

The plan of an epoch depends on the seed, the epoch and the samples' lengths only: not on how many ranks there are, nor on
how often gradients are accumulated. Batches are cut from samples of similar length, so little of them is padding.
"""

from __future__ import annotations

import random

import torch

from ..data.store import Store, StoreSample
from ..models.rollout import RolloutBatch

POOL = 16  # batches that are sorted by length together: enough to pad little, few enough to mix


def plan_epoch(indices: list[int], lengths: list[int], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Global batches of an epoch, every sample in exactly one.

    Args:
        indices: the store's training samples.
        lengths: tokens of every sample of the store.
        batch_tokens: most tokens of a batch, padding counted; a longer sample is a batch of its own.
        seed, epoch: decide the order.
    """
    shuffled = sorted(indices)
    generator = random.Random(f"{seed}:{epoch}")
    generator.shuffle(shuffled)
    batches: list[list[int]] = []
    for pool in _cut(shuffled, lengths, POOL * batch_tokens, padded=False):
        batches += _cut(sorted(pool, key=lambda i: (lengths[i], i)), lengths, batch_tokens, padded=True)
    generator.shuffle(batches)
    return batches


def _cut(indices: list[int], lengths: list[int], limit: int, padded: bool) -> list[list[int]]:
    """Runs of at most ``limit`` tokens; if ``padded``, every sample counts as its run's longest."""
    runs: list[list[int]] = []
    tokens = 0
    for index in indices:
        tokens = (len(runs[-1]) + 1) * lengths[index] if runs and padded else tokens + lengths[index]
        if not runs or tokens > limit:
            runs.append([])
            tokens = lengths[index]
        runs[-1].append(index)
    return runs


def share(batch: list[int], rank: int, world: int, accumulation: int) -> list[list[int]]:
    """The micro-batches of one rank: ``accumulation`` of them, some empty where samples are few."""
    parts = world * accumulation
    return [batch[rank * accumulation + micro :: parts] for micro in range(accumulation)]


def collate(store: Store, indices: list[int], device: torch.device) -> RolloutBatch:
    """Samples as one right-padded batch in float32.

    Without samples it is a short batch that nothing is learnt from, so that a rank without work still takes part in the
    collectives of the others.
    """
    samples = [store[index] for index in indices] or [_nothing(store[0])]
    length = max(len(sample.input_ids) for sample in samples)
    count, (captured, hidden) = len(samples), samples[0].features.shape[1:]
    batch = RolloutBatch(
        input_ids=torch.zeros(count, length, dtype=torch.long),
        loss_mask=torch.zeros(count, length, dtype=torch.bool),
        features=torch.zeros(count, length, captured, hidden),
        last_hidden=torch.zeros(count, length, hidden),
    )
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        batch.input_ids[row, :end] = sample.input_ids
        batch.loss_mask[row, :end] = sample.loss_mask
        batch.features[row, :end] = sample.features
        batch.last_hidden[row, :end] = sample.last_hidden
    return RolloutBatch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def _nothing(sample: StoreSample) -> StoreSample:
    short = slice(0, 4)
    return sample._replace(
        input_ids=sample.input_ids[short],
        loss_mask=torch.zeros(4, dtype=torch.bool),
        features=sample.features[short],
        last_hidden=sample.last_hidden[short],
    )
