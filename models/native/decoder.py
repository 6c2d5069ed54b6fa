"""The decoder: embedding, layers, final norm. It holds weights, and leaves the arithmetic to :mod:`.operations`.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .cache import Cache
from .config import DecoderConfig
from .operations import Operations
from .parallel import Group
from .sights import Step
from .weights import DecoderWeights, Dense


class Decoder:
    """A decoder over tokens of one forward.

    Args:
        config: what it computes.
        weights: with what.
        operations: by which arithmetic.
        captured: layers whose outputs are given out, ascending.
        group: the processes that have the other shares; None: there are none.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        operations: Operations,
        captured: tuple[int, ...],
        group: Group | None = None,
    ) -> None:
        self.config, self.weights, self.operations, self.group = config, weights, operations, group
        self._captured = frozenset(captured)
        self._layers = list(zip(config.layers, weights.layers, strict=True))
        operations.prepare(matrix for layer in weights.layers for matrix in (layer.qkv, layer.out, layer.mlp))

    def forward(self, ids_T: Tensor, step: Step, cache: Cache | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The states after the final norm, ``[T, H]``, and the outputs of the captured layers, ``[T, H]`` each."""
        operations, group, captured = self.operations, self.group, []
        x_TH = F.embedding(ids_T, self.weights.embedding)
        rotation = operations.rotation(step)
        for index, (layer, weights) in enumerate(self._layers):
            qkv = operations.linear(operations.norm(x_TH, weights.input_norm), weights.qkv)
            attended = operations.attend(qkv, layer, rotation, step, index, cache)
            more_TH = operations.linear(attended, weights.out)
            if group is not None:
                group.sum_(more_TH)
            x_TH = x_TH + more_TH
            normed_TH = operations.norm(x_TH, weights.mlp_norm)
            mlp = weights.mlp
            more_TH = operations.mlp(normed_TH, mlp) if isinstance(mlp, Dense) else operations.experts(normed_TH, mlp)
            if group is not None:
                group.sum_(more_TH)
            x_TH = x_TH + more_TH
            if index in self._captured:
                captured.append(x_TH)
        return operations.norm(x_TH, self.weights.norm), tuple(captured)
