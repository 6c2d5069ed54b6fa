"""What computes the states that :mod:`.record` stores: an interface, and the target itself through transformers.

    recorder = TransformersRecorder(target)
    for states in recorder.record([ids, others]):    # int32 [T] each
        states.features, states.last_hidden          # [T, F, H], [T, H]

A recorder decides nothing: which sequences share a batch is planned, and what it yields is checked, by its caller.

Shapes: B batch, T tokens, F captured layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..models.target import Target


class States(NamedTuple):
    """What the target thinks of one sequence."""

    features: Tensor  # [T, F, H], captured layers ascending
    last_hidden: Tensor  # [T, H], after the target's final norm


class Recorder(Protocol):
    """Computes the states of token ids."""

    def record(self, sequences: Sequence[np.ndarray]) -> Iterator[States]:
        """The states of one batch: one ``States`` per sequence, in order, on any device, in the target's dtype.

        A recorder that is told which ids the states belong to compares them with those that it sent.

        Args:
            sequences: token ids, int32 ``[T]`` each, which share nothing but the batch.

        Raises:
            Incomplete: the states are other tokens' or too few.
        """


class TransformersRecorder:
    """Any causal language model of transformers, in this process; rows are padded to the longest of their batch."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def record(self, sequences: Sequence[np.ndarray]) -> Iterator[States]:
        """One forward pass over all of ``sequences``; see :class:`Recorder`."""
        lengths = [len(ids) for ids in sequences]
        input_BT = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
        for row, ids in enumerate(sequences):
            input_BT[row, : len(ids)] = torch.from_numpy(ids)
        output = self.target.forward(input_BT)
        features_BTFH = output.features
        for row, length in enumerate(lengths):
            yield States(features_BTFH[row, :length], output.last_hidden[row, :length])
