"""The head without the native decoder: plain torch modules, as training has them. What drafting was, to measure against."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.draft import Eagle3Draft


class PlainHead:
    """:class:`~eagle3.models.draft.Eagle3Draft` in the place of a :class:`~eagle3.models.native.draft.NativeDraft`; chains alone.

    Args:
        draft: the head, in the embedding's numerics and on its device.
        embedding: the target's, ``[V, H]``.
        capacity: tokens of the longest request, and of a proposal.
    """

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, capacity: int) -> None:
        self._draft, self._embedding = draft, embedding
        self.device, self.vocabulary = embedding.device, draft.draft_ids
        self._own_embedding = embedding[self.vocabulary]
        self._cache = draft.new_cache(1, capacity)
        self._positions = torch.arange(capacity, device=self.device)[None]
        self._standing = 0
        self._last_1H = embedding[:1]

    def restart(self) -> None:
        """Forget everything."""
        self._standing = 0

    def extend(self, tokens: Tensor, features: Tensor) -> None:
        """Take in rows that stand."""
        self._cache.rollback(self._standing)
        y_BTH = self._rows(self._embedding[tokens][None], self._draft.combine(features)[None])
        self._standing += len(tokens)
        self._last_1H = y_BTH[0, -1:]

    def begin(self) -> Tensor:
        """``y`` ``[1, H]`` of the last of them."""
        self._cache.rollback(self._standing)
        return self._last_1H

    def step(self, tokens: Tensor, y_kH: Tensor, seen_kS: Tensor | None = None) -> Tensor:
        """The next row of a chain."""
        if seen_kS is not None:
            raise TypeError("the plain head drafts no trees")
        return self._rows(self._own_embedding[tokens][None], self._draft.feedback(y_kH)[None])[0]

    def logits(self, y: Tensor) -> Tensor:
        """``[k, H]`` to ``[k, D]``."""
        return self._draft.logits(y)

    def _rows(self, embed_BTH: Tensor, h_BTH: Tensor) -> Tensor:
        start, new = self._cache.length, embed_BTH.shape[1]
        return self._draft.decode(embed_BTH, h_BTH, self._positions[:, start : start + new], self._cache)
