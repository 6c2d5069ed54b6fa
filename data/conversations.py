"""Prompts on disk.

``conversations/prompts.jsonl``   {"id", "source", "split", "messages", "follow_ups", "given"}

Where prompts come from: :mod:`.prompts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..configs.errors import UserError
from .corpus import digest
from .files import read_lines

PROMPTS = "prompts.jsonl"
SPLITS = ("train", "validation", "test")

#: What a chat template reads: "role" and "content", and where there are such "reasoning_content", "tool_calls", ...
Message: TypeAlias = dict[str, Any]


class Conversation(NamedTuple):
    """What the target is asked.

    ``messages`` come first, as they are given; the last is the user's, or the result of a tool. When the target has
    answered them, ``follow_ups`` are asked in turn, each after the answer to the one before. ``split`` is one of SPLITS.

    Where the answers are ``given``, one to ``messages`` and one to each of ``follow_ups``, the target is asked nothing.
    """

    id: str
    source: str
    split: str
    messages: list[Message]
    follow_ups: tuple[str, ...] = ()
    given: tuple[Message, ...] = ()

    @property
    def order(self) -> int:
        """Its place among those of its source: a hash of its id."""
        return digest(f"order:{self.id}")

    @property
    def whole(self) -> list[Message]:
        """``messages``, and after them the given answers with the questions between."""
        whole = list(self.messages)
        for answer, question in zip(self.given, [*self.follow_ups, None], strict=False):
            whole.append(answer)
            if question is not None:
                whole.append({"role": "user", "content": question})
        return whole


class Found(NamedTuple):
    """A conversation to choose from, and where it stands: "file, line 3"."""

    conversation: Conversation
    where: str


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The prompts that :mod:`.prepare` chose, in their order, one after another: a million do not fit into memory."""
    return (from_row(row) for _, row in written(path))


def from_row(row: dict[str, Any]) -> Conversation:
    """The conversation of a line of ``prompts.jsonl``."""
    return Conversation(**{**row, "follow_ups": tuple(row["follow_ups"]), "given": tuple(row["given"])})


def written(path: Path, fields: Iterable[str] = Conversation._fields) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a file of this project, which must hold exactly ``fields``."""
    expected = set(fields)
    for number, row in read_lines(path, "conversations"):
        if row.keys() != expected:
            problem = f"it holds {sorted(row)} and not {sorted(expected)}"
            raise UserError("conversations", f"{path}, line {number}", problem, f"delete {path.parent}")
        yield number, row


def places(path: Path) -> Iterator[tuple[int, int]]:
    """The first byte, and the number of bytes, of each line that :func:`written` yields."""
    with path.open("rb") as file:
        start = 0
        for line in file:
            if line.strip():
                yield start, len(line)
            start += len(line)
