"""Prompts on disk.

``conversations/prompts.jsonl``   {"id", "source", "split", "messages", "follow_ups"}

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


def read_conversations(path: Path) -> list[Conversation]:
    """The prompts that :mod:`.prepare` chose, in their order."""
    return [Conversation(**{**row, "follow_ups": tuple(row["follow_ups"])}) for _, row in written(path)]


def written(path: Path, fields: Iterable[str] = Conversation._fields) -> Iterable[tuple[int, dict[str, Any]]]:
    """The lines of a file of this project, which must hold exactly ``fields``."""
    expected = set(fields)
    for number, row in read_lines(path, "conversations"):
        if row.keys() != expected:
            problem = f"it holds {sorted(row)} and not {sorted(expected)}"
            raise UserError("conversations", f"{path}, line {number}", problem, f"delete {path.parent}")
        yield number, row
