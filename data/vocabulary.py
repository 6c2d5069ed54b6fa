"""The draft vocabulary: the target's most frequent output tokens, as few as the draft's LM head shall have rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..configs.errors import UserError


def count_tokens(answers: Iterable[list[int]], vocab_size: int) -> Tensor:
    """How often each of ``vocab_size`` tokens occurs, int64 ``[V]``."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for ids in answers:
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=vocab_size)
    return counts


def draft_ids(counts: Tensor, size: int) -> Tensor | None:
    """Target ids ``[D]`` of the ``size`` most frequent tokens, ascending; None where that is the whole vocabulary.

    Of equally frequent tokens the lower id is taken.

    Raises:
        UserError: ``size`` is larger than the target's vocabulary.
    """
    vocab_size = len(counts)
    if size > vocab_size:
        raise UserError(
            "draft.vocab_size", size, f"the target has a vocabulary of {vocab_size}", f"give at most {vocab_size}"
        )
    if size == vocab_size:
        return None
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(counts: Tensor, ids: Tensor | None) -> float:
    """The share of the counted tokens that the draft can say."""
    return 1.0 if ids is None else (counts[ids].sum() / counts.sum().clamp_min(1)).item()
