"""Which samples make up which optimiser step, and the tensors that a rank makes of its part.

    schedule = Schedule(samples, lengths, batch_tokens=4096, epochs=4, seed=0)
    for batch in schedule.from_step(0):                      # Batch(step=1, epoch=0, samples=(17, 3, ...)), ...
        parts = divide(batch.samples, lengths, ranks * accumulation)
        collate(load(store, parts[rank]))                    # RolloutBatch

The batches of an epoch are a pure function of seed, epoch, lengths and ``batch_tokens``. How many ranks and accumulation
steps share one only decides how it is divided, so a run may go on with another number of them.

Shapes: B batch, T tokens, F captured layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.shards import StoreSample
from ..data.store import Store
from ..models.rollout import RolloutBatch

SOME_TOKENS = 16384
POOL = 16  # batches among whose samples neighbours in length are sought: more pad less, and mix less


class Batch(NamedTuple):
    """One optimiser step, counted from 1, in an epoch, counted from 0: the store's indices of its samples."""

    step: int
    epoch: int
    samples: tuple[int, ...]


def plan_epoch(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Deal all samples into batches of similar length, in random order.

    Samples are shuffled, sorted by length within pools of ``POOL`` batches, and cut into batches. Pools run upwards and
    downwards in turn, so that batches across their ends are of similar length too.

    Args:
        lengths: tokens of each sample.
        batch_tokens: most tokens of a batch; a longer sample is a batch of its own.
        seed: the run's seed.
        epoch: counted from 0.

    Returns:
        the positions in ``lengths`` that make up each batch, longest first.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    pools = np.cumsum(np.asarray(lengths)[order]) // (POOL * batch_tokens)
    upwards = np.asarray(lengths)[order] * np.where(pools % 2, -1, 1)
    batches: list[list[int]] = []
    tokens = batch_tokens
    for sample in order[np.lexsort((upwards, pools))].tolist():
        if tokens + lengths[sample] > batch_tokens:
            batches.append([])
            tokens = 0
        batches[-1].append(sample)
        tokens += lengths[sample]
    return [
        tuple(sorted(batches[i], key=lambda sample: (-lengths[sample], sample)))
        for i in random.permutation(len(batches))
    ]


class Schedule:
    """Every optimiser step of a run.

    Args:
        samples: the store's indices of the samples to train on.
        lengths: tokens of each, in the same order.
        batch_tokens: most tokens of a batch.
        epochs: passes over the samples.
        seed: the run's seed.
    """

    def __init__(
        self, samples: Sequence[int], lengths: Sequence[int], batch_tokens: int, epochs: int, seed: int
    ) -> None:
        self.samples, self.lengths = tuple(samples), tuple(lengths)
        self.batch_tokens, self.epochs, self.seed = batch_tokens, epochs, seed

    @cached_property
    def steps_per_epoch(self) -> tuple[int, ...]:
        return tuple(len(self._plan(epoch)) for epoch in range(self.epochs))

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(self.steps_per_epoch)

    def from_step(self, done: int) -> Iterator[Batch]:
        """Yield the batches that are left after ``done`` steps."""
        step = 0
        for epoch, count in enumerate(self.steps_per_epoch):
            if done < step + count:
                for number, batch in enumerate(self._plan(epoch), step + 1):
                    if number > done:
                        yield Batch(number, epoch, tuple(self.samples[i] for i in batch))
            step += count

    def _plan(self, epoch: int) -> list[tuple[int, ...]]:
        return plan_epoch(self.lengths, self.batch_tokens, self.seed, epoch)


def divide(samples: Sequence[int], lengths: Mapping[int, int] | Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """Split a batch, longest sample first, into ``parts`` of about as many tokens each; small batches leave some empty.

    Args:
        samples: the store's indices.
        lengths: tokens of every sample of the store, by its index.
        parts: ranks times accumulation steps.
    """
    total = sum(lengths[sample] for sample in samples)
    divided: list[list[int]] = [[] for _ in range(parts)]
    before = 0
    for sample in samples:
        middle = before + lengths[sample] / 2
        divided[int(middle * parts / total)].append(sample)
        before += lengths[sample]
    return [tuple(part) for part in divided]


def load(store: Store, indices: Sequence[int]) -> list[StoreSample]:
    """The samples at ``indices``. Where there are none, two tokens from which nothing is learnt: a rank without work

    still takes part in what all ranks compute together, and adds zeros to it.
    """
    if indices:
        return [store[index] for index in indices]
    first = store[0]
    blank = first._replace(loss_mask=torch.zeros_like(first.loss_mask))
    return [blank._replace(**{name: blank._asdict()[name][:2] for name in StoreSample._fields[4:]})]


def some_states(store: Store) -> tuple[Tensor, Tensor]:
    """Features ``[N, F, H]`` and ids ``[N]`` of the first few thousand training tokens."""
    states, tokens = [], []
    for index in store.indices("train"):
        sample = store[index]
        states.append(sample.features)
        tokens.append(sample.input_ids.long())
        if sum(map(len, tokens)) >= SOME_TOKENS:
            break
    return torch.cat(states), torch.cat(tokens)


def collate(samples: Sequence[StoreSample]) -> RolloutBatch:
    """Pad samples on the right to the longest, in the store's own numerics.

    Returns:
        input_ids int64 and loss_mask bool ``[B, T]``, features ``[B, T, F, H]``, last_hidden ``[B, T, H]``, lengths ``[B]``.
    """
    return RolloutBatch(
        input_ids=pad_sequence([sample.input_ids.long() for sample in samples], batch_first=True),
        loss_mask=pad_sequence([sample.loss_mask for sample in samples], batch_first=True),
        features=pad_sequence([sample.features for sample in samples], batch_first=True),
        last_hidden=pad_sequence([sample.last_hidden for sample in samples], batch_first=True),
        lengths=torch.tensor([len(sample.input_ids) for sample in samples]),
    )
