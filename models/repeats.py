"""Which tokens of an answer merely repeat it: small models loop under greedy decoding, and a loop flatters its draft."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 8


def repeated(ids: Sequence[int], n: int = NGRAM) -> list[bool]:
    """For every token of an answer, whether the n-gram that ends in it stands earlier in the same answer.

    >>> repeated([1, 2, 1, 2, 1], n=2)
    [False, False, False, True, True]
    """
    seen: set[tuple[int, ...]] = set()
    marks = [False] * len(ids)
    for end in range(n, len(ids) + 1):
        gram = tuple(ids[end - n : end])
        marks[end - 1] = gram in seen
        seen.add(gram)
    return marks


def repeated_rate(answers: Sequence[Sequence[int]], n: int = NGRAM) -> float:
    """The share of the n-grams of ``answers`` that repeat an earlier one of the same answer, over all answers together."""
    grams = sum(max(0, len(ids) - n + 1) for ids in answers)
    return sum(sum(repeated(ids, n)) for ids in answers) / grams if grams else 0.0
