"""The draft vocabulary: the target's most frequent output tokens, as few as the draft's LM head shall have rows.

Shapes: S sources, V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from ..configs.errors import UserError
from .files import read_tensors


class TokenCounts(NamedTuple):
    """How often the target said each token in training answers: ``counts`` int64 ``[S, V]``, a row per source."""

    sources: tuple[str, ...]
    counts: Tensor

    @classmethod
    def read(cls, path: Path) -> TokenCounts:
        """The counts in the file at ``path``."""
        tensors, metadata = read_tensors(path)
        return cls(tuple(json.loads(metadata["sources"])), tensors["counts"])

    def content(self) -> bytes:
        """These counts as a safetensors file."""
        return save({"counts": self.counts}, metadata={"sources": json.dumps(self.sources)})

    @property
    def total(self) -> Tensor:
        """Counts over all sources, int64 ``[V]``."""
        return self.counts.sum(0)


class DraftVocabulary(NamedTuple):
    """Target ids int64 ``[D]``, ascending (None: all of them), and the share of each source's tokens they cover."""

    ids: Tensor | None
    coverage: dict[str, float]


def count_tokens(answers: Iterable[tuple[str, Sequence[int]]], vocab_size: int) -> TokenCounts:
    """Count the tokens of ``(source, ids)``; sources are sorted."""
    by_source: dict[str, Tensor] = {}
    for source, ids in answers:
        counts = by_source.setdefault(source, torch.zeros(vocab_size, dtype=torch.int64))
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab_size)
    sources = tuple(sorted(by_source))
    rows = [by_source[source] for source in sources]
    return TokenCounts(sources, torch.stack(rows) if rows else torch.zeros(0, vocab_size, dtype=torch.int64))


def draft_ids(counts: Tensor, size: int) -> Tensor | None:
    """Target ids int64 ``[D]`` of the ``size`` most frequent tokens, ascending; None where ``size`` is V.

    Of equally frequent tokens the lower id is taken. ``d2t`` is ``ids - arange(D)``.

    Args:
        counts: how often each token was said, ``[V]``.
        size: D.

    Raises:
        UserError: ``size`` is larger than the target's vocabulary, or not positive.
    """
    vocab_size = len(counts)
    if not 1 <= size <= vocab_size:
        problem = f"the target has a vocabulary of {vocab_size}"
        raise UserError("draft.vocab_size", size, problem, f"give 1 to {vocab_size}")
    if size == vocab_size:
        return None
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def choose_vocabulary(said: TokenCounts, size: int) -> DraftVocabulary:
    """The draft vocabulary of ``size`` tokens, and what it covers; raises as :func:`draft_ids` does."""
    ids = draft_ids(said.total, size)
    covered = said.counts.sum(1) if ids is None else said.counts[:, ids].sum(1)
    shares = covered / said.counts.sum(1).clamp_min(1)
    return DraftVocabulary(ids, dict(zip(said.sources, shares.tolist(), strict=True)))
