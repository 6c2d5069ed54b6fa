"""The draft vocabulary: the target's most frequent output tokens, as few as the draft's LM head shall have rows.

Shapes: S sources, V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ..configs.errors import UserError
from .files import read_tensors

MOST_SOURCES, OTHERS = 64, "(other sources)"
COUNTED_TOGETHER = 1 << 20  # tokens


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
    """A draft vocabulary and what it covers.

    ``ids``: target ids int64 ``[D]``, ascending; None: all of them. ``covered``: the share of the tokens of all training
    answers that it can say. ``coverage``: the same for each source.
    """

    ids: Tensor | None
    covered: float
    coverage: dict[str, float]

    def __str__(self) -> str:
        size = "all" if self.ids is None else f"{len(self.ids):,}"
        by_source = ", ".join(f"{source} {share:.1%}" for source, share in self.coverage.items())
        return f"draft vocabulary: {size} tokens cover {self.covered:.1%} of the training answers ({by_source})"


def count_tokens(answers: Iterable[tuple[str, Sequence[int]]], vocab_size: int) -> TokenCounts:
    """Count the tokens of ``(source, ids)``; sources are sorted.

    The first ``MOST_SOURCES`` sources are counted by themselves, all later ones together as ``OTHERS``: a corpus that
    calls every page a source shall not need a row of V counts for each. Prompts come in random order, so a frequent
    source is met early.
    """
    counts: dict[str, np.ndarray] = {}
    waiting: dict[str, list[np.ndarray]] = {}
    held = 0
    for source, ids in answers:
        name = source if source in counts or len(counts) < MOST_SOURCES else OTHERS
        if name not in counts:
            counts[name] = np.zeros(vocab_size, dtype=np.int64)
        waiting.setdefault(name, []).append(np.asarray(ids, dtype=np.int32))
        held += len(ids)
        if held >= COUNTED_TOGETHER:
            _count(waiting, counts)
            held = 0
    _count(waiting, counts)
    sources = tuple(sorted(counts))
    rows = np.stack([counts[source] for source in sources]) if sources else np.zeros((0, vocab_size), dtype=np.int64)
    return TokenCounts(sources, torch.from_numpy(rows))


def _count(waiting: dict[str, list[np.ndarray]], counts: dict[str, np.ndarray]) -> None:
    """Add what is ``waiting`` to ``counts``, and forget it: bincount walks over all V counts, so not once an answer."""
    for name, parts in waiting.items():
        counts[name] += np.bincount(np.concatenate(parts), minlength=len(counts[name]))
    waiting.clear()


def draft_ids(counts: Tensor, size: int) -> Tensor | None:
    """Target ids int64 ``[D]`` of the ``size`` most frequent tokens, ascending; None where ``size`` is V.

    Of equally frequent tokens the lower id is taken. ``d2t`` is ``ids - arange(D)``.

    Args:
        counts: how often each token was said, ``[V]``.
        size: D.

    Raises:
        UserError: ``size`` is larger than the target's vocabulary, or not positive.
    """
    check_draft_size(size, len(counts))
    if size == len(counts):
        return None
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def check_draft_size(size: int, vocab_size: int) -> None:
    """Refuse a draft vocabulary that a target of ``vocab_size`` tokens cannot have."""
    if not 1 <= size <= vocab_size:
        problem = f"the target has a vocabulary of {vocab_size}"
        raise UserError("draft.vocab_size", size, problem, f"give 1 to {vocab_size}")


def choose_vocabulary(said: TokenCounts, size: int) -> DraftVocabulary:
    """The draft vocabulary of ``size`` tokens, and what it covers; raises as :func:`draft_ids` does."""
    ids = draft_ids(said.total, size)
    said_S = said.counts.sum(1)
    covered_S = said_S if ids is None else said.counts[:, ids].sum(1)
    shares = covered_S / said_S.clamp_min(1)
    covered = float(covered_S.sum() / said_S.sum().clamp_min(1))
    return DraftVocabulary(ids, covered, dict(zip(said.sources, shares.tolist(), strict=True)))
