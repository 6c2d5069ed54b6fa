"""Prompts and answers on disk.

``conversations/prompts.jsonl``   {"id", "source", "split", "messages", "follow_ups"}
``conversations/answers.jsonl``   {"id", "source", "split", "temperature", "prompt_ids", "answer_ids", "finish"}

Where prompts come from: :mod:`.prompts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..configs.errors import UserError
from .files import read_lines

SPLITS = ("train", "validation", "test")

#: What a chat template reads: "role" and "content", and where there are such "reasoning_content", "tool_calls", ...
Message: TypeAlias = dict[str, Any]


class Conversation(NamedTuple):
    """What the target is asked.

    ``messages`` come first, as they are given; the last is the user's, or the result of a tool. When the target has
    answered them, ``follow_ups`` are asked in turn, each after the answer to the one before. ``split`` is one of SPLITS.
    """

    id: str
    source: str
    split: str
    messages: list[Message]
    follow_ups: tuple[str, ...] = ()


class Found(NamedTuple):
    """A conversation to choose from, and where it stands: "file, line 3"."""

    conversation: Conversation
    where: str


class Answer(NamedTuple):
    """What the target said: token ids, end-of-turn included where ``finish`` is "stop" and not "length"."""

    id: str
    source: str
    split: str
    temperature: float
    prompt_ids: list[int]
    answer_ids: list[int]
    finish: str


def read_conversations(path: Path) -> list[Conversation]:
    """The prompts that :mod:`.prepare` chose, in their order."""
    return [Conversation(**{**row, "follow_ups": tuple(row["follow_ups"])}) for _, row in _written(path)]


def read_answers(path: Path) -> list[Answer]:
    """The answers so far, in the order of the file; a line that was not written to its end is an error here."""
    return [Answer(**row) for _, row in _written(path, Answer._fields)]


def read_finished(folder: Path, vocab_size: int) -> list[Answer]:
    """The answers in the order of the prompts.

    Raises:
        UserError: some are missing, or hold tokens that the target does not have.
    """
    if not (folder / "answers.jsonl").exists():
        raise UserError("conversations", folder, "it holds no answers", "run eagle3 regenerate first")
    answers = {answer.id: answer for answer in read_answers(folder / "answers.jsonl")}
    prompts = read_conversations(folder / "prompts.jsonl")
    missing = sum(prompt.id not in answers for prompt in prompts)
    if missing:
        problem = f"{missing} of {len(prompts)} answers are missing"
        raise UserError("conversations", folder, problem, "run eagle3 regenerate")
    for answer in answers.values():
        largest = max(*answer.prompt_ids, *answer.answer_ids)
        if largest >= vocab_size:
            problem = f"its token {largest} is beyond the target's vocabulary of {vocab_size}"
            raise UserError("conversations", answer.id, problem, f"delete {folder / 'answers.jsonl'} and answer again")
    return [answers[prompt.id] for prompt in prompts]


def _written(path: Path, fields: Iterable[str] = Conversation._fields) -> Iterable[tuple[int, dict[str, Any]]]:
    """The lines of a file of this project, which must hold exactly ``fields``."""
    expected = set(fields)
    for number, row in read_lines(path, "conversations"):
        if row.keys() != expected:
            problem = f"it holds {sorted(row)} and not {sorted(expected)}"
            raise UserError("conversations", f"{path}, line {number}", problem, f"delete {path.parent}")
        yield number, row
