"""What computes the states that :mod:`.record` stores: an interface, and the target itself, in this process.

    recorder = TransformersRecorder(target)
    for states in recorder.record([[ids, others], [more]]):    # int32 [T] each, in batches
        states.features, states.last_hidden                    # [T, F, H], [T, H]

A recorder decides nothing: which sequences share a batch is planned, and what it yields is checked, by its caller.

Shapes: B batch, T tokens, F captured layers, H hidden.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..models.native.target import NativeTarget
from ..models.parallel import ALONE, Place, announce
from ..models.target import Target
from ..models.target_files import TargetEnds

#: Whose states are recorded: it, or its ends alone where servers have the rest.
RecordedTarget = Target | NativeTarget | TargetEnds


class States(NamedTuple):
    """What the target thinks of one sequence."""

    features: Tensor  # [T, F, H], captured layers ascending
    last_hidden: Tensor  # [T, H], after the target's final norm


class Recorder(Protocol):
    """Computes the states of token ids."""

    def record(self, batches: Iterable[Sequence[np.ndarray]]) -> Generator[States, None, None]:
        """One ``States`` per sequence, in order, on any device, in the target's dtype.

        Batches are asked for as they can be worked on, which may be some before the one whose states are yielded. Who
        closes the generator before its end drops what was begun. A recorder that is told which ids the states belong to
        compares them with those that it sent.

        Args:
            batches: token ids, int32 ``[T]`` each; those of a batch are as many as the target takes at once.

        Raises:
            Incomplete: the states are other tokens' or too few.
        """


class TransformersRecorder:
    """Any causal language model of transformers, in this process; rows are padded to the longest of their batch.

    Args:
        target: the model.
        ours: this process among those that hold the target together, who are told of every batch; none: it is alone.
    """

    def __init__(self, target: Target, ours: Place = ALONE) -> None:
        self.target, self._ours = target, ours

    def record(self, batches: Iterable[Sequence[np.ndarray]]) -> Generator[States, None, None]:
        """One forward pass a batch, when its first states are asked for; see :class:`Recorder`."""
        for sequences in batches:
            yield from self._states(sequences)

    def _states(self, sequences: Sequence[np.ndarray]) -> list[States]:
        lengths, device = [len(ids) for ids in sequences], self.target.device
        # From pinned memory, since a copy from any other waits for all that the GPU was given before.
        input_BT = torch.zeros(len(sequences), max(lengths), dtype=torch.long, pin_memory=device.type == "cuda")
        for row, ids in enumerate(sequences):
            input_BT[row, : len(ids)] = torch.from_numpy(ids)
        announce(self._ours, input_BT)
        output = self.target.forward(input_BT.to(device, non_blocking=True))
        features_BTFH = output.features
        return [
            States(features_BTFH[row, :length], output.last_hidden[row, :length]) for row, length in enumerate(lengths)
        ]


class NativeRecorder:
    """The native target, whose batches are packed: nothing is padded.

    Args:
        target: the model.
        ours: as of :class:`TransformersRecorder`; the others are told lengths, then tokens.
    """

    def __init__(self, target: NativeTarget, ours: Place = ALONE) -> None:
        self.target, self._ours = target, ours

    def record(self, batches: Iterable[Sequence[np.ndarray]]) -> Generator[States, None, None]:
        """One forward pass a batch, when its first states are asked for; see :class:`Recorder`."""
        for sequences in batches:
            lengths, cuda = [len(ids) for ids in sequences], self.target.device.type == "cuda"
            packed_N = torch.from_numpy(np.concatenate(sequences)).long()
            announce(self._ours, torch.tensor([lengths]))
            announce(self._ours, packed_N[None])
            output = self.target.prefill(packed_N.pin_memory() if cuda else packed_N, lengths)
            parts = output.features.split(lengths), output.last_hidden.split(lengths)
            yield from (States(*states) for states in zip(*parts, strict=True))
