"""Traces are read as they were written, cut where a crash left them, and their pieces join to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from eagle3.eval.traces import (
    BASELINE,
    SPECULATIVE,
    TIE,
    Lossless,
    Round,
    Trace,
    pieces,
    read_traces,
    resume,
)
from eagle3.models.target import Target

HOSTILE = ("\u2028", "\r", 'é"\\', "\x00", "😀", "\ufffd")


PLAIN, CHAIN, TREE = None, "chain 3", "tree 9/3/3"


def trace(drafting: str | None, number: int = 0, lossless: Lossless | None = None) -> Trace:
    return Trace(
        prompt_id=f"id {number}", source="ünï", prompt="a\nb", temperature=0.7,
        mode=SPECULATIVE if drafting else BASELINE, drafting=drafting, seed=1 << 30, input_tokens=7,
        ids=(5, 1, 300, 2, 9, 4), pieces=HOSTILE, authors=("target", "draft", "draft") * 2, repeated=(False, True) * 3,
        finish="stop", rounds=(Round(3, 2, 3), Round(3, 3, 2)), ttft_s=0.1, total_s=1 / 3, lossless=lossless,
    )  # fmt: skip


def written(count: int, draftings: Sequence[str | None]) -> list[Trace]:
    return [trace(drafting, number) for number in range(count) for drafting in draftings]


@pytest.mark.parametrize("lossless", [None, Lossless(True), Lossless(False, 4, 0.1 + 0.2), Lossless(False, 0, None)])
def test_what_is_read_is_what_was_written(tmp_path: Path, lossless: Lossless | None) -> None:
    traces = [trace(PLAIN), trace(CHAIN, lossless=lossless)]
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b"".join(entry.to_line() for entry in traces))
    assert read_traces(path) == traces
    assert path.read_bytes().count(b"\n") == len(traces)


def test_keys_tell_answers_apart() -> None:
    assert len({entry.key for entry in written(3, (PLAIN, CHAIN, TREE))}) == 9


@pytest.mark.parametrize(
    ("lossless", "diverged"),
    [
        (Lossless(True), False),
        (Lossless(False, 3, TIE / 2), False),
        (Lossless(False, 3, TIE), True),
        (Lossless(False, 3, None), True),
    ],
)
def test_a_difference_after_a_tie_is_none(lossless: Lossless, diverged: bool) -> None:
    assert lossless.diverged == diverged


@pytest.mark.parametrize("draftings", [(PLAIN, CHAIN), (PLAIN, CHAIN, TREE)])
def test_resume_cuts_wherever_a_crash_cut(tmp_path: Path, draftings: Sequence[str | None]) -> None:
    size = len(draftings)
    lines = [entry.to_line() for entry in written(2, draftings)]
    whole, path = b"".join(lines), tmp_path / "traces.jsonl"
    group = len(b"".join(lines[:size]))
    edges = {len(b"".join(lines[:count])) for count in range(2 * size + 1)}
    for cut in sorted({*range(0, len(whole), 9), *(edge + by for edge in edges for by in (-1, 0, 1))}):
        path.write_bytes(whole[: max(cut, 0)])
        groups = max(cut, 0) // group if cut < len(whole) else 2
        assert resume(path, [size] * 2) == groups
        assert path.read_bytes() == whole[: group * groups]
        assert read_traces(path) == written(groups, draftings)


def test_resume_starts_where_there_is_nothing(tmp_path: Path) -> None:
    assert resume(tmp_path / "traces.jsonl", [2, 2]) == 0
    assert not list(tmp_path.iterdir())


TEXTS = ("", "plain", "é", "a€b", "😀😀", "one\r\ntwo \u2028 three", "a\ufffdb\ufffd", "นี่ 日本語", "e\u0301")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_answer(tiny_target: Target, text: str) -> None:
    tokenizer = tiny_target.tokenizer
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text + tokenizer.eos_token


def test_characters_stand_with_the_token_that_completes_them(tiny_target: Target) -> None:
    """The tiny target's tokens are bytes."""
    tokenizer = tiny_target.tokenizer
    ids = tokenizer.encode("aé😀z", add_special_tokens=False)
    assert pieces(tokenizer, ids) == ["a", "", "é", "", "", "", "😀", "z"]
    for end in range(len(ids)):  # cut in the middle of a character, the last token shows what is there
        assert "".join(pieces(tokenizer, ids[:end])) == tokenizer.decode(ids[:end])


def test_bytes_that_are_no_text_are_not_lost(tiny_target: Target) -> None:
    tokenizer = tiny_target.tokenizer
    (first, *rest), (letter,) = (tokenizer.encode(text, add_special_tokens=False) for text in ("é", "z"))
    for ids in (
        [first, letter],
        [first, first, letter, first],
        [*rest, *rest],
        [letter, *rest, tokenizer.eos_token_id],
    ):
        found = pieces(tokenizer, ids)
        assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)
