"""Answers on disk: what the target said, token by token, and which conversations have no answer.

``conversations/answers.jsonl``   {"id", "source", "split", "temperature", "ids", "turns", "finish", "exact"}
``conversations/failed.jsonl``    {"id", "turn", "reason"}, where servers left conversations unanswered

The lines of either stand in the order in which they came; the order of the prompts is what readers are given.
"""

from __future__ import annotations

import json
import os
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

from ..configs.errors import UserError
from .conversations import PROMPTS, places, read_conversations, written

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
    """All of them at once, in memory."""
    return list(each_answer(path))


def each_failure(path: Path) -> Iterator[Failure]:
    """The conversations that were given up, in the order of the file."""
    return (Failure(**row) for _, row in written(path, Failure._fields))


def read_failures(path: Path) -> list[Failure]:
    """All of them at once, in memory."""
    return list(each_failure(path))


class Answers(Sequence[Answer]):
    """The answers of a finished run, each read from its file when it is asked for: of millions, few fit into memory.

    Args:
        path: ``answers.jsonl``.
        places: of each answer the place of its line, int64 ``[S, 2]``: its first byte, and how many it has.
        lengths: of each answer its tokens, int32 ``[S]``.
    """

    def __init__(self, path: Path, places: np.ndarray, lengths: np.ndarray) -> None:
        self._path, self._places, self.lengths = path, places, lengths
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._places)

    def chosen(self, rows: slice | Sequence[int]) -> Answers:
        """Some of them, in the order of ``rows``."""
        return Answers(self._path, self._places[rows], self.lengths[rows])

    def of_split(self, wanted: Callable[[str], bool]) -> Answers:
        """Those of the splits that are wanted; every answer is looked at."""
        return self.chosen([row for row, answer in enumerate(self) if wanted(answer.split)])

    @overload
    def __getitem__(self, index: int) -> Answer: ...
    @overload
    def __getitem__(self, index: slice) -> Answers: ...
    def __getitem__(self, index: int | slice) -> Answer | Answers:
        if isinstance(index, slice):
            return self.chosen(index)
        start, size = self._places[index].tolist()
        return Answer(**json.loads(os.pread(self._file, size, start)))  # no seeking: threads and forks share the file


def read_finished(folder: Path, vocab_size: int) -> Answers:
    """The answers in the order of the prompts, without the failures that the recipe allowed.

    Every line is looked at here; held are 20 bytes an answer, and while the order is made its id.

    Raises:
        UserError: some are missing, or hold tokens that the target does not have.
    """
    path = folder / ANSWERS
    if not path.exists():
        raise UserError("conversations", folder, "it holds no answers", "run eagle3 regenerate first")
    found = array("q")  # first byte, bytes and tokens of each line
    lines: dict[str, int] = {}
    for number, (answer, place) in enumerate(zip(each_answer(path), places(path), strict=True)):
        if (largest := max(answer.ids)) >= vocab_size:
            problem = f"its token {largest} is beyond the target's vocabulary of {vocab_size}"
            raise UserError("conversations", answer.id, problem, f"delete {path} and answer again")
        found.extend((*place, len(answer.ids)))
        lines[answer.id] = number
    allowed = (folder / SUMMARY).exists() and (folder / FAILED).exists()
    left_out = {failure.id for failure in each_failure(folder / FAILED)} if allowed else set()
    order, prompts, missing = array("q"), 0, 0
    for prompt in read_conversations(folder / PROMPTS):
        prompts += 1
        if prompt.id in lines:
            order.append(lines[prompt.id])
        else:
            missing += prompt.id not in left_out
    if missing:
        problem = f"{missing} of {prompts} answers are missing"
        raise UserError("conversations", folder, problem, "run eagle3 regenerate")
    table = np.array(found, dtype=np.int64).reshape(-1, 3)[np.array(order, dtype=np.int64)]
    return Answers(path, table[:, :2].copy(), table[:, 2].astype(np.int32))
