"""Answers on disk: what the target said, token by token, and which conversations have no answer.

``conversations/answers.jsonl``   {"id", "source", "split", "temperature", "ids", "turns", "finish", "exact"}
``conversations/failed.jsonl``    {"id", "turn", "reason"}, where servers left conversations unanswered

The lines of either stand in the order in which they came; the order of the prompts is what readers are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..configs.errors import UserError
from .conversations import PROMPTS, read_conversations, written

ANSWERS, SUMMARY, FAILED = "answers.jsonl", "answers.summary.json", "failed.jsonl"
GIVEN = "given"  # a finish


class Answer(NamedTuple):
    """A whole conversation as token ids, and which of them the target said.

    Attributes:
        id: of the conversation; ``source`` and ``split`` are its own too.
        temperature: of all its turns; 0 is greedy. Given answers are taken as sampled at 1: none of their tokens need be
            the likeliest.
        ids: everything from the first prompt to the end of the last turn.
        turns: ``[start, end)`` of each turn of the target in ``ids``, the token with which it ended included; of given
            answers, of each turn of the assistant.
        finish: why there is no further turn. ``stop``: all were asked; ``length``: the last was cut at the limit;
            ``full``: the target's positions do not suffice for another; ``rewritten``: the chat template would change
            what the target said before it asks on; ``given``: the target was not asked (:mod:`.given`).
        exact: whether ``ids`` are the target's own; a text that was tokenised again may have other ids, a given one, too.
    """

    id: str
    source: str
    split: str
    temperature: float
    ids: list[int]
    turns: list[list[int]]
    finish: str
    exact: bool

    @property
    def said(self) -> list[int]:
        """The ids of all the target's turns."""
        return [token for start, end in self.turns for token in self.ids[start:end]]


class Failure(NamedTuple):
    """A conversation without an answer: the turn at which it failed, from 1, and the words of who refused it."""

    id: str
    turn: int
    reason: str


def each_answer(path: Path) -> Iterator[Answer]:
    """The answers so far, in the order of the file; a line that was not written to its end is an error here."""
    return (Answer(**row) for _, row in written(path, Answer._fields))


def read_answers(path: Path) -> list[Answer]:
    """All of them at once."""
    return list(each_answer(path))


def read_failures(path: Path) -> list[Failure]:
    """The conversations that were given up, in the order of the file."""
    return [Failure(**row) for _, row in written(path, Failure._fields)]


def read_finished(folder: Path, vocab_size: int) -> list[Answer]:
    """The answers in the order of the prompts, without the failures that the recipe allowed.

    Raises:
        UserError: some are missing, or hold tokens that the target does not have.
    """
    if not (folder / ANSWERS).exists():
        raise UserError("conversations", folder, "it holds no answers", "run eagle3 regenerate first")
    answers = {answer.id: answer for answer in read_answers(folder / ANSWERS)}
    prompts = read_conversations(folder / PROMPTS)
    allowed = (folder / SUMMARY).exists() and (folder / FAILED).exists()
    left_out = {failure.id for failure in read_failures(folder / FAILED)} if allowed else set()
    missing = sum(prompt.id not in answers and prompt.id not in left_out for prompt in prompts)
    if missing:
        problem = f"{missing} of {len(prompts)} answers are missing"
        raise UserError("conversations", folder, problem, "run eagle3 regenerate")
    for answer in answers.values():
        if (largest := max(answer.ids)) >= vocab_size:
            problem = f"its token {largest} is beyond the target's vocabulary of {vocab_size}"
            raise UserError("conversations", answer.id, problem, f"delete {folder / ANSWERS} and answer again")
    return [answers[prompt.id] for prompt in prompts if prompt.id in answers]
