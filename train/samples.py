"""What is trained on: a finished store, epoch after epoch, or a spool, once, while it is still being recorded.

Either says in which passes its samples are taken. Within a pass they are shuffled; a pass begins once all of its states
are there, and those of a spool go once a checkpoint covers all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..data.shards import StoreSample
from ..data.spool import SpoolReader
from ..data.store import Store


class Pass(NamedTuple):
    """Samples that are shuffled together, by their index, in an epoch, counted from 0."""

    epoch: int
    samples: Sequence[int]


class Samples(Protocol):
    """Samples by their index, the tokens of each, and the passes over them."""

    lengths: Sequence[int]
    passes: Sequence[Pass]

    def __getitem__(self, index: int) -> StoreSample:
        """One sample with its states."""

    def loss_mask(self, index: int) -> Tensor:
        """Its tokens that the assistant wrote, bool ``[T]``, without its states."""

    def ready(self, number: int) -> bool:
        """Whether every sample of a pass is there; one that is not is waited for."""

    def covered(self, passes: int) -> None:
        """Note that nothing can take back a checkpoint behind the first ``passes`` passes."""


class Recorded:
    """The training samples of a finished store; each epoch is a pass."""

    def __init__(self, store: Store, epochs: int) -> None:
        indices = store.indices("train")
        self._store = store
        self.lengths: Sequence[int] = store.lengths()
        self.passes: Sequence[Pass] = [Pass(epoch, indices) for epoch in range(epochs)]

    def __getitem__(self, index: int) -> StoreSample:
        return self._store[index]

    def loss_mask(self, index: int) -> Tensor:
        """See :class:`Samples`."""
        return self._store.loss_mask(index)

    def ready(self, number: int) -> bool:
        """They are."""
        return True

    def covered(self, passes: int) -> None:
        """A store keeps what it has."""


class Streamed:
    """The samples of a spool; half of the shards that it may hold are a pass, so that the next is recorded meanwhile.

    Args:
        reader: the spool.
        limit: most shards that it holds.
    """

    def __init__(self, reader: SpoolReader, limit: int) -> None:
        self._reader, self._window = reader, max(1, limit // 2)
        self.lengths: Sequence[int] = reader.lengths()
        starts = range(0, reader.shards, self._window)
        self.passes: Sequence[Pass] = [Pass(0, reader.samples_of(start, start + self._window)) for start in starts]

    def __getitem__(self, index: int) -> StoreSample:
        return self._reader[index]

    def loss_mask(self, index: int) -> Tensor:
        """See :class:`Samples`."""
        return self._reader.loss_mask(index)

    def ready(self, number: int) -> bool:
        """Whether every shard of the pass is recorded."""
        start = number * self._window
        return self._reader.recorded(start, start + self._window)

    def covered(self, passes: int) -> None:
        """Delete the shards of these passes."""
        self._reader.acknowledge(min(passes * self._window, self._reader.shards))
