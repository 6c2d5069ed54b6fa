"""The draft vocabulary holds the most frequent tokens, the lower id first among equals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from eagle3.configs.errors import UserError
from eagle3.data import vocabulary
from eagle3.data.vocabulary import TokenCounts, choose_vocabulary, count_tokens, draft_ids

ANSWERS = [("b", [1, 1, 5]), ("a", [5, 5, 5, 2]), ("b", [0])]


def test_counts_by_source(tmp_path: Path) -> None:
    said = count_tokens(ANSWERS, 7)
    assert said.sources == ("a", "b")
    assert said.counts.tolist() == [[0, 0, 1, 0, 0, 3, 0], [1, 2, 0, 0, 0, 1, 0]]
    assert said.total.tolist() == [1, 2, 1, 0, 0, 4, 0]
    (tmp_path / "counts").write_bytes(said.content())
    read = TokenCounts.read(tmp_path / "counts")
    assert read.sources == said.sources and read.counts.equal(said.counts)


def test_counts_do_not_depend_on_how_many_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    together = count_tokens(ANSWERS, 7)
    for size in range(1, 9):
        monkeypatch.setattr(vocabulary, "COUNTED_TOGETHER", size)
        assert count_tokens(ANSWERS, 7).counts.equal(together.counts)


def test_later_ones_of_many_sources_are_counted_together() -> None:
    many = [(f"s{i:03d}", [i % 7]) for i in range(200)] + [("s000", [1]), ("s199", [2])]
    said = count_tokens(many, 7)
    assert said.sources == ("(other sources)", *(f"s{i:03d}" for i in range(64)))
    assert said.counts[1].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert said.counts[0].sum() == 200 - 64 + 1
    assert said.total.sum() == 202


def test_nothing_said() -> None:
    said = count_tokens([], 7)
    assert said.total.tolist() == [0] * 7
    assert choose_vocabulary(said, 3).coverage == {}


@pytest.mark.parametrize(
    ("size", "ids"), [(1, [5]), (2, [1, 5]), (3, [0, 1, 5]), (4, [0, 1, 2, 5]), (6, [0, 1, 2, 3, 4, 5])]
)
def test_most_frequent_first_and_ascending(size: int, ids: list[int]) -> None:
    chosen = draft_ids(count_tokens(ANSWERS, 7).total, size)
    assert chosen is not None and chosen.tolist() == ids and chosen.dtype == torch.int64


def test_of_equals_the_lower_ids() -> None:
    chosen = draft_ids(torch.ones(5000, dtype=torch.int64), 2500)
    assert chosen is not None and chosen.equal(torch.arange(2500))


def test_the_whole_vocabulary_needs_no_mapping() -> None:
    said = count_tokens(ANSWERS, 7)
    assert draft_ids(said.total, 7) is None
    assert choose_vocabulary(said, 7) == (None, 1.0, {"a": 1.0, "b": 1.0})


def test_coverage_by_source() -> None:
    two, one = (choose_vocabulary(count_tokens(ANSWERS, 7), size) for size in (2, 1))
    assert two.coverage == {"a": 0.75, "b": 0.75}
    assert one.coverage == {"a": 0.75, "b": 0.25}
    assert (two.covered, one.covered) == (0.75, 0.5)
    assert str(one) == "draft vocabulary: 1 tokens cover 50.0% of the training answers (a 75.0%, b 25.0%)"


@pytest.mark.parametrize("size", [0, -1, 8])
def test_a_size_the_target_cannot_have(size: int) -> None:
    with pytest.raises(UserError, match=f"draft.vocab_size = {size}: the target has a vocabulary of 7; give 1 to 7"):
        draft_ids(torch.ones(7), size)
