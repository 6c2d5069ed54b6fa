"""What is trained on: a finished store, epoch after epoch, or a spool, once, while it is still being recorded.

Either says in which passes its samples are taken. Within a pass they are shuffled; a pass begins once all of its states
are there, and those of a spool go once a checkpoint covers all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from torch import Tensor

from ..configs.errors import Incomplete, UserError
from ..data.shards import StoreSample
from ..data.spool import SpoolReader
from ..data.store import Store


class Pass(NamedTuple):
    """Samples that are shuffled together, by their index, in an epoch, counted from 0."""

    epoch: int
    samples: Sequence[int]


class Batch(NamedTuple):
    """One optimiser step, counted from 1, in an epoch, counted from 0: the indices of its samples."""

    step: int
    epoch: int
    samples: tuple[int, ...]


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


def check_finite(sample: StoreSample) -> None:
    """Refuse a sample whose states no target can have computed."""
    if not (sample.features.isfinite().all() and sample.last_hidden.isfinite().all()):
        remedy = "find its shard with eagle3 inspect --verify, delete that, and run eagle3 record again"
        raise UserError("store", f"sample {sample.id}", "it has states that are not finite", remedy)


def refuse(source: Samples | Store, indices: Sequence[int], loss: str, checkpoints: Sequence[Path]) -> NoReturn:
    """Say why a loss is not finite.

    Args:
        source: that holds the samples.
        indices: whose loss it is.
        loss: which, and what it is.
        checkpoints: the newest, if there is one.

    Raises:
        UserError: one of the samples is damaged.
        Incomplete: none is.
    """
    for index in indices:
        check_finite(source[index])
    names = ", ".join(source[index].id for index in indices[:8])
    kept = f"the last good checkpoint is {checkpoints[0]}" if checkpoints else "there is no checkpoint yet"
    count = f"its {len(indices)} samples begin with" if len(indices) > 8 else "its samples are"
    raise Incomplete(f"{loss}; {count} {names}; {kept}; lower train.learning_rate")
