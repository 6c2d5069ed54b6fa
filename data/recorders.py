"""What records: the target run here, or an engine that serves it elsewhere; both give the same states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


class States(NamedTuple):
    """The target's hidden states over one sequence, in the target's dtype.

    ``features`` ``[T, F, H]``: outputs of the captured layers, ascending. ``last_hidden`` ``[T, H]``: after the target's
    final norm.
    """

    features: Tensor
    last_hidden: Tensor


class Recorder(Protocol):
    """Gives the states of token sequences."""

    def record(self, sequences: Sequence[np.ndarray]) -> Iterator[States]:
        """One :class:`States` per sequence of token ids ``[T]``, in order."""
        ...
