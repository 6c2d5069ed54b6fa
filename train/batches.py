"""Which samples make up which optimiser step, and the tensors that a rank makes of its part.

    schedule = Schedule(samples.passes, samples.lengths, batch_tokens=4096, seed=0)
    for batch in schedule.from_step(0):                      # Batch(step=1, epoch=0, samples=(17, 3, ...)), ...
        parts = divide(batch.samples, rows, ranks * accumulation)    # supervised rows of each sample
        collate([samples[index] for index in parts[rank]]).on(device)    # RolloutBatch

The batches of a pass are a pure function of seed, pass, lengths and ``batch_tokens``. How many ranks and accumulation
steps share one only decides how it is divided, so a run may go on with another number of them.

Shapes: B samples, N tokens of all of them, F captured layers, H hidden.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.quantise import codes, decode
from ..data.shards import StoreSample
from ..data.store import Store
from ..models.rollout import RolloutBatch
from .samples import Batch, Pass, check_finite

SOME_TOKENS = 16384
POOL = 16  # batches among whose samples neighbours in length are sought: a CPU's attention pads to the longest


def plan_pass(lengths: Sequence[int], batch_tokens: int, seed: int, number: int) -> list[tuple[int, ...]]:
    """Deal all samples into batches of similar length, in random order.

    Samples are shuffled, sorted by length within pools of ``POOL`` batches, and cut into batches. Pools run upwards and
    downwards in turn, so that batches across their ends are of similar length too.

    Args:
        lengths: tokens of each sample.
        batch_tokens: most tokens of a batch; a longer sample is a batch of its own.
        seed: the run's seed.
        number: the pass, counted from 0.

    Returns:
        the positions in ``lengths`` that make up each batch, longest first.
    """
    random = np.random.default_rng([seed, number])
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
        passes: the samples of each.
        lengths: tokens of every sample, by its index.
        batch_tokens: most tokens of a batch.
        seed: the run's seed.
    """

    def __init__(self, passes: Sequence[Pass], lengths: Sequence[int], batch_tokens: int, seed: int) -> None:
        self.passes, self.lengths = passes, lengths
        self.batch_tokens, self.seed = batch_tokens, seed

    @cached_property
    def starts(self) -> list[int]:
        """How many steps are behind the start of each pass, and last how many there are."""
        return list(accumulate((len(self._plan(number)) for number in range(len(self.passes))), initial=0))

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.starts[-1]

    def finished(self, done: int) -> int:
        """How many passes are behind ``done`` steps; where it is one of ``starts``, also the pass that begins then."""
        return bisect_right(self.starts, done) - 1

    def from_step(self, done: int) -> Iterator[Batch]:
        """Yield the batches that are left after ``done`` steps."""
        for number in range(self.finished(done), len(self.passes)):
            epoch, samples = self.passes[number]
            for step, batch in enumerate(self._plan(number), self.starts[number] + 1):
                if step > done:
                    yield Batch(step, epoch, tuple(samples[place] for place in batch))

    def _plan(self, number: int) -> list[tuple[int, ...]]:
        lengths = [self.lengths[index] for index in self.passes[number].samples]
        return plan_pass(lengths, self.batch_tokens, self.seed, number)


def divide(samples: Sequence[int], weights: Mapping[int, int], parts: int) -> list[tuple[int, ...]]:
    """Split a batch, in order, into ``parts`` of about the same weight each; small batches leave some empty.

    Args:
        samples: their indices.
        weights: of each, by its index: 0 or more.
        parts: ranks times accumulation steps.
    """
    total = sum(weights[sample] for sample in samples) + len(samples)
    divided: list[list[int]] = [[] for _ in range(parts)]
    before = 0
    for sample in samples:
        weight = weights[sample] + 1  # so that those of no weight are dealt out, too
        divided[int((before + weight / 2) * parts / total)].append(sample)
        before += weight
    return [tuple(part) for part in divided]


def blank(like: StoreSample) -> StoreSample:
    """Two tokens from which nothing is learnt, for a rank without work: it takes part in what all ranks compute together,
    and adds zeros to it.
    """
    nothing = torch.zeros(2, dtype=torch.bool)
    return like._replace(
        input_ids=like.input_ids[:2],
        loss_mask=nothing,
        stored={name: tensor[:2] for name, tensor in like.stored.items()},
    )


def some_states(store: Store) -> tuple[Tensor, Tensor]:
    """Features ``[N, F, H]`` and ids ``[N]`` of the first few thousand tokens: training ones, or where they are streamed
    those on which the head is validated, which stay.
    """
    states, tokens = [], []
    for index in store.indices("train") or store.indices("validation"):
        sample = store[index]
        check_finite(sample)
        states.append(sample.features)
        tokens.append(sample.input_ids.long())
        if sum(map(len, tokens)) >= SOME_TOKENS:
            break
    return torch.cat(states), torch.cat(tokens)


class Collated(NamedTuple):
    """Samples one behind the other, their states as they are stored."""

    input_ids: Tensor  # [N] int32
    loss_mask: Tensor  # [N] bool
    lengths: Tensor  # [B]
    stored: dict[str, Tensor]  # of shards.STATES, and where they are in FP8 their scales

    def on(self, device: torch.device) -> RolloutBatch:
        """The batch there: states in FP8 travel as such, and are decoded where they are used."""
        ids, mask, lengths = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        stored = {name: tensor.to(device, non_blocking=True) for name, tensor in self.stored.items()}
        return RolloutBatch(ids.long(), mask, decode("features", stored), decode("last_hidden", stored), lengths)


def collate(samples: Sequence[StoreSample], pin: bool = False) -> Collated:
    """Copy samples out of their shards.

    Args:
        samples: one or more.
        pin: whether to copy them into memory that a GPU reads without waiting.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    together = partial(_together, pin=pin)
    return Collated(
        together([sample.input_ids for sample in samples]),
        together([sample.loss_mask for sample in samples]),
        together([torch.tensor(lengths)]),
        {name: together([sample.stored[name] for sample in samples]) for name in samples[0].stored},
    )


def _together(parts: Sequence[Tensor], pin: bool) -> Tensor:
    shape = (sum(map(len, parts)), *parts[0].shape[1:])
    whole = torch.empty(shape, dtype=parts[0].dtype, pin_memory=pin)
    torch.cat([codes(part) for part in parts], out=codes(whole))
    return whole
