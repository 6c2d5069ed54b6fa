"""The questions of a run, each made when it is its turn: a million conversations and their token ids do not fit into memory.

    questions = ask(settings, folder / PROMPTS, target.text)
    questions[0]                   # Question(conversation, prompt_ids, temperature, run_seed)
    for batch in plan(questions, 64):    # Questions that are answered together in process
        ...

Shapes: S questions.
"""

from __future__ import annotations

import json
import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from ..configs.errors import UserError
from ..configs.settings import Settings
from ..models.target import TargetText
from .chat import PLACEHOLDER, continuation, prompt_ids
from .conversations import Conversation, from_row, places, read_conversations
from .dialogue import Question


class Questions(Sequence[Question]):
    """What the target is asked, in the order of the prompts, each read and tokenised when it is asked for.

    Args:
        path: ``prompts.jsonl``.
        text: the target's tokenizer.
        seed: the run's.
        lines: of each the place of its line, int64 ``[S, 2]``: its first byte, and how many it has.
        lengths: tokens of each prompt, int32 ``[S]``.
        temperatures: of each one's answers, float64 ``[S]``.
    """

    def __init__(
        self,
        path: Path,
        text: TargetText,
        seed: int,
        lines: np.ndarray,
        lengths: np.ndarray,
        temperatures: np.ndarray,
    ) -> None:
        self._path, self._text, self._seed = path, text, seed
        self._lines, self.lengths, self._temperatures = lines, lengths, temperatures
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._lines)

    def chosen(self, rows: slice | Sequence[int] | np.ndarray) -> Questions:
        """Some of them, in the order of ``rows``."""
        columns = (column[rows] for column in (self._lines, self.lengths, self._temperatures))
        return Questions(self._path, self._text, self._seed, *columns)

    def ids(self) -> Iterator[str]:
        """Of their conversations; every one is read, and none is tokenised."""
        return (self._conversation(row).id for row in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Questions: ...
    def __getitem__(self, index: int | slice) -> Question | Questions:
        if isinstance(index, slice):
            return self.chosen(index)
        conversation = self._conversation(index)
        ids = prompt_ids(self._text.tokenizer, conversation)
        return Question(conversation, ids, float(self._temperatures[index]), self._seed)

    def _conversation(self, row: int) -> Conversation:
        start, size = self._lines[row].tolist()
        return from_row(json.loads(os.pread(self._file, size, start)))  # no seeking: threads share the file


def ask(settings: Settings, prompts: Path, text: TargetText) -> Questions:
    """The questions in the order of the prompts; temperatures are dealt to training questions in turn.

    Every prompt is rendered here, so that hours later there are no surprises. Conversations with given answers are none.

    Args:
        settings: the recipe.
        prompts: ``prompts.jsonl``.
        text: the target's tokenizer and positions.

    Raises:
        UserError: an answer may grow beyond the target's positions, or the chat template refuses a later turn.
    """
    heats, room = settings.regenerate.temperatures, text.max_positions - settings.regenerate.max_new_tokens
    lines, lengths, temperatures, training = array("q"), array("i"), array("d"), 0
    for conversation, place in zip(read_conversations(prompts), places(prompts), strict=True):
        if conversation.given:
            continue
        temperature = 0.0
        if conversation.split == "train":
            temperature = heats[training % len(heats)]
            training += 1
        ids = prompt_ids(text.tokenizer, conversation)
        if len(ids) > room:
            problem = f"a prompt has {len(ids)} tokens and the target {text.max_positions} positions"
            remedy = f"give at most {max(0, text.max_positions - len(ids))}, or lower prepare.max_prompt_tokens"
            raise UserError("regenerate.max_new_tokens", settings.regenerate.max_new_tokens, problem, remedy)
        if conversation.follow_ups:
            said = [PLACEHOLDER] * len(conversation.follow_ups)
            continuation(text.tokenizer, conversation, said, conversation.follow_ups[-1])
        lines.extend(place)
        lengths.append(len(ids))
        temperatures.append(temperature)
    columns = np.array(lines, dtype=np.int64).reshape(-1, 2), np.array(lengths, dtype=np.int32), np.array(temperatures)
    return Questions(prompts, text, settings.run.seed, *columns)


def plan(questions: Questions, batch_size: int) -> Iterator[Questions]:
    """Batches of prompts of similar length, the same whatever was answered before."""
    rows = _by_length(questions)
    for start in range(0, len(rows), batch_size):
        yield questions.chosen(rows[start : start + batch_size])


def _by_length(questions: Questions) -> np.ndarray:
    """The rows in the order of their prompts' lengths, those of one length in that of their ids."""
    ids = list(questions.ids())
    by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    return by_id[np.argsort(questions.lengths[by_id], kind="stable")]
