"""A key/value cache that keeps every position of every layer, so that rolling back is moving a number.

The caches of transformers drop the keys that a chunked or sliding layer no longer sees, and a rejected draft that
crossed a chunk boundary may need them again. Here a layer stores all of them and is shown a view of those in reach.
The masks that belong to such a view are made here too.

Shapes: B batch, T new tokens, S stored positions, N key/value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FULL, CHUNKED, SLIDING = "full_attention", "chunked_attention", "sliding_attention"


class KVCache:
    """Keys and values ``[B, N, S, D]`` per layer. A token stands at the index of its position, in every row.

    Rows have the same length, or, after :meth:`set_lengths`, each its own; they then grow by one token at a time.
    It has the part of transformers' ``Cache`` that its attention layers call: ``update`` and ``get_seq_length``.

    Args:
        layer_types: what each layer sees: FULL, CHUNKED or SLIDING.
        span: tokens of a chunk or of the sliding window; not used by full attention.
        batch: rows.
        capacity: positions per row.
        always_mask: never leave a mask out, for models that would then make one themselves.
    """

    def __init__(
        self, layer_types: Sequence[str], span: int, batch: int, capacity: int, *, always_mask: bool = False
    ) -> None:
        self.always_mask = always_mask
        self.layer_types, self.span = tuple(layer_types), span
        self.batch, self.capacity = batch, capacity
        self.length = 0
        """Positions that are filled: of the longest row, where rows differ."""
        self._lengths_B: Tensor | None = None
        self._shortest = 0
        self._new = 0
        self._start = dict.fromkeys(self.layer_types, 0)
        self._keys: list[Tensor | None] = [None] * len(self.layer_types)
        self._values: list[Tensor | None] = [None] * len(self.layer_types)

    def rollback(self, length: int) -> None:
        """Forget everything from position ``length`` on; 0 makes the cache ready for another text."""
        if not 0 <= length <= self.length or (self._lengths_B is not None and length):
            raise ValueError(f"cannot roll a cache of {self.length} positions back to {length}")
        self.length, self._lengths_B = length, None

    def set_lengths(self, lengths: Sequence[int], device: torch.device) -> None:
        """Declare how many positions of each row are real, after a forward of right-padded rows."""
        self._lengths_B = torch.tensor(lengths, device=device)
        self.length, self._shortest = max(lengths), min(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; needs :meth:`set_lengths`."""
        assert self._lengths_B is not None
        index = torch.tensor(rows, device=self._lengths_B.device)
        self.batch = len(rows)
        self._lengths_B = self._lengths_B[index]
        self.length, self._shortest = int(self._lengths_B.max()), int(self._lengths_B.min())
        for kept in (self._keys, self._values):
            for layer, stored in enumerate(kept):
                if stored is not None:
                    kept[layer] = stored[index.to(stored.device)]

    def advance(self) -> None:
        """Take in the tokens of the forward that has just ended."""
        self.length += self._new
        if self._lengths_B is not None:
            self._shortest += self._new
            self._lengths_B += self._new

    def prepare(self, new: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Make room for a forward of ``new`` tokens per row.

        Returns:
            positions of the new tokens, ``[1 or B, new]``; and per layer type what is added to its attention scores,
            ``[1 or B, 1, new, keys]``, or None where every query sees all keys, or all that do not come after it.
        """
        if self.length + new > self.capacity:
            raise ValueError(f"{self.length} + {new} positions do not fit a cache of {self.capacity}")
        if self._lengths_B is not None and new > 1:
            raise ValueError("rows of unequal length grow by one token at a time")
        self._new = new
        places_S = torch.arange(self.length + new, device=device)
        ragged = self._lengths_B is not None
        positions_BT = self._lengths_B[:, None] if self._lengths_B is not None else places_S[None, self.length :]
        first, last = (self._shortest if ragged else self.length), self.length + new - 1
        masks: dict[str, Tensor | None] = {}
        for kind in self._start:
            start = self._start[kind] = self._reach(kind, first)
            alone = new == 1 or (start == self.length and start == self._reach(kind, last))
            masks[kind] = None
            if ragged or self.always_mask or not alone:
                seen = self._seen(kind, positions_BT[:, :, None], places_S[start:])
                masks[kind] = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)[
                    :, None
                ]
        return positions_BT, masks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before those of the forward under way."""
        return self.length

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values ``[B, N, T, D]``; return those that its queries may see."""
        stored_keys, stored_values = self._keys[layer_idx], self._values[layer_idx]
        if stored_keys is None or stored_values is None:
            shape = (self.batch, keys.shape[1], self.capacity)
            stored_keys = self._keys[layer_idx] = keys.new_zeros(*shape, keys.shape[3])
            stored_values = self._values[layer_idx] = values.new_zeros(*shape, values.shape[3])
        end = self.length + self._new
        if self._lengths_B is None:
            stored_keys[:, :, self.length : end] = keys
            stored_values[:, :, self.length : end] = values
        else:
            at = self._lengths_B.to(keys.device)[:, None, None, None].expand_as(keys)
            stored_keys.scatter_(2, at, keys)
            stored_values.scatter_(2, at[..., : values.shape[3]], values)
        start = self._start[self.layer_types[layer_idx]]
        return stored_keys[:, :, start:end], stored_values[:, :, start:end]

    def _reach(self, kind: str, position: int) -> int:
        """The first position that a query at ``position`` sees."""
        if kind == CHUNKED:
            return position - position % self.span
        return max(0, position - self.span + 1) if kind == SLIDING else 0

    def _seen(self, kind: str, queries: Tensor, keys: Tensor) -> Tensor:
        seen = keys <= queries
        if kind == CHUNKED:
            seen &= keys >= queries - queries % self.span
        elif kind == SLIDING:
            seen &= keys > queries - self.span
        return seen
