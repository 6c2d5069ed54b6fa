"""Which samples make up which recording batch, and which batches which shard: a pure function of their lengths.

It is made before anything is recorded and knows nothing of ranks, so that any of them can record any shard.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..configs.settings import RecordSettings

POOL = 32  # shards among whose samples neighbours in length are sought: more pad less, and put alike ones together
PADDING = 0.04  # most of a batch that may be padding
GOLDEN = (5**0.5 - 1) / 2

Batch = tuple[int, ...]


def plan(lengths: Sequence[int], settings: RecordSettings) -> list[list[Batch]]:
    """Shards of batches of samples.

    Samples are sorted by length within pools of consecutive ones and cut into batches, which are dealt to shards so
    that each shard has short and long ones.

    Args:
        lengths: tokens of every sample.
        settings: a batch, padding included, has at most ``batch_tokens``, a shard at most ``shard_tokens``; a sample
            that is longer is a batch, and a shard, of its own.

    Returns:
        for each shard its batches, each the positions in ``lengths`` of its samples. Its samples are stored in this order.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    pools = (tokens.cumsum() - tokens) // (POOL * settings.shard_tokens)
    order = np.lexsort((tokens, pools))
    shards: list[list[Batch]] = []
    for pool in np.split(order, np.flatnonzero(np.diff(pools[order])) + 1):
        batches = _batches(pool.tolist(), lengths, min(settings.batch_tokens, settings.shard_tokens))
        shards += _shards(batches, lengths, settings.shard_tokens)
    return shards


def _batches(samples: Sequence[int], lengths: Sequence[int], limit: int) -> list[Batch]:
    """Cut ``samples``, shortest first, into batches."""
    batches: list[list[int]] = []
    tokens = computed = 0
    for sample in samples:
        length = lengths[sample]
        tokens, computed = tokens + length, (len(batches[-1]) + 1) * length if batches else 0
        if not batches or computed > limit or tokens < (1 - PADDING) * computed:
            batches.append([])
            tokens = length
        batches[-1].append(sample)
    return [tuple(batch) for batch in batches]


def _shards(batches: Sequence[Batch], lengths: Sequence[int], limit: int) -> list[list[Batch]]:
    """Deal batches, shortest first, to shards; multiples of the golden ratio visit all lengths evenly."""
    shards: list[list[Batch]] = []
    held = 0
    for place in sorted(range(len(batches)), key=lambda number: number * GOLDEN % 1):
        tokens = sum(lengths[sample] for sample in batches[place])
        if not shards or held + tokens > limit:
            shards.append([])
            held = 0
        shards[-1].append(batches[place])
        held += tokens
    return shards
