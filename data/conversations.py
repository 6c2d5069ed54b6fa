"""Prompts on disk.

``conversations/prompts.jsonl``   {"id", "source", "split", "messages", "follow_ups"}, the last message is the user's

Prompts come from a JSONL file of the user's or are made from the standard library's source (:mod:`.corpus`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..configs.errors import UserError
from .corpus import Screen, digest, examples, functions, split_of, standard_library
from .files import read_lines

SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant")

REPEATED = "conversations: same messages as another"
FIRST_TURN = "conversations: only the first of several turns is asked"
REFERENCE = "conversations: their last, given answer is not used"


class Conversation(NamedTuple):
    """A prompt: ``messages`` of {"role", "content"}, which the target is to answer. ``split`` is one of SPLITS.

    ``follow_ups`` are the user's later turns, each asked once the target has answered what came before.
    """

    id: str
    source: str
    split: str
    messages: list[dict[str, str]]
    follow_ups: Sequence[str] = ()


class Prompts(NamedTuple):
    """Conversations to choose from, and what was dropped or cut on the way, counted by reason."""

    conversations: list[Conversation]
    notes: Counter[str]


def library_prompts() -> Prompts:
    """Questions about the standard library's functions; their kind is their source.

    A function belongs to the split of its top-level module. Training functions that resemble held-out ones are dropped,
    so that no function of the test is learnt by heart from a copy of it.
    """
    library = list(functions(standard_library()))
    screen = Screen(library)
    notes: Counter[str] = Counter()
    found: list[Conversation] = []
    for function in library:
        if split_of(function.module) == "train" and (refusal := screen.refusal(function)):
            notes[refusal] += 1
            continue
        for example in examples(function):
            messages = [{"role": "user", "content": example.question}]
            found.append(Conversation(example.id, example.kind, example.split, messages))
    return _without_repeats(found, notes)


def load_prompts(path: Path, setting: str = "prepare.prompts") -> Prompts:
    """The conversations of a JSONL file.

    A line holds ``"messages"``, ``"prompt"`` or ``"turns"``, and optionally ``"id"``, ``"source"`` (default: the file's
    name) and ``"split"`` (default: by a hash of the id, 80 / 8 / 12 percent). Of several turns the first is asked; a
    last message that already is an answer is left out, since the target shall give its own.

    Raises:
        UserError: no such file, nothing in it, or a malformed line, whose number is given.
    """
    notes: Counter[str] = Counter()
    found: list[Conversation] = []
    lines: dict[str, int] = {}
    for number, row in read_lines(path, setting):
        try:
            conversation = _conversation(row, path.stem, notes)
        except ValueError as error:
            problem, _, remedy = str(error).partition("; ")
            raise UserError(setting, f"{path}, line {number}", problem, remedy) from None
        if lines.setdefault(conversation.id, number) != number and row.get("id") is not None:
            problem = f'its id "{conversation.id}" is that of line {lines[conversation.id]}'
            raise UserError(setting, f"{path}, line {number}", problem, "give every line another id, or none")
        found.append(conversation)
    if not found:
        raise UserError(setting, path, "it holds no conversation", 'write lines such as {"prompt": "..."} to it')
    return _without_repeats(found, notes)


def read_conversations(path: Path) -> list[Conversation]:
    """The prompts that :mod:`.prepare` chose, in their order."""
    return [Conversation(**row) for _, row in written(path)]


def written(path: Path, fields: Iterable[str] = Conversation._fields) -> Iterable[tuple[int, dict[str, Any]]]:
    """The lines of a file of this project, which must hold exactly ``fields``."""
    expected = set(fields)
    for number, row in read_lines(path, "conversations"):
        if row.keys() != expected:
            problem = f"it holds {sorted(row)} and not {sorted(expected)}"
            raise UserError("conversations", f"{path}, line {number}", problem, f"delete {path.parent}")
        yield number, row


def _conversation(row: dict[str, Any], stem: str, notes: Counter[str]) -> Conversation:
    """One line of a user's file; ValueError("<problem>; <remedy>") where it is malformed."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is no text; repair what wrote the file") from None
    forms = [form for form in ("messages", "prompt", "turns") if row.get(form) is not None]
    if len(forms) != 1:
        raise ValueError(f'it holds {forms or "none"} of "messages", "prompt", "turns"; give exactly one of them')
    messages = _FORMS[forms[0]](row[forms[0]], notes)
    identity = row.get("id")
    if identity is None:
        identity = f"{digest(json.dumps(messages, ensure_ascii=False)):016x}"
    if not isinstance(identity, str | int) or isinstance(identity, bool):
        raise ValueError(f'its "id" is {json.dumps(identity)}; write a string or an integer')
    source = stem if row.get("source") is None else row["source"]
    if not isinstance(source, str):
        raise ValueError(f'its "source" is {json.dumps(source)}; write a string')
    split = _hashed_split(str(identity)) if row.get("split") is None else row["split"]
    if split not in SPLITS:
        raise ValueError(f'its "split" is {json.dumps(split)}; write one of {", ".join(SPLITS)}')
    return Conversation(str(identity), source, split, messages)


def _from_prompt(prompt: object, notes: Counter[str]) -> list[dict[str, str]]:
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError('its "prompt" is empty or not a string; write the question as a string')
    return [{"role": "user", "content": prompt}]


def _from_turns(turns: object, notes: Counter[str]) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError('its "turns" are not a list of questions; write a list of strings, none of them empty')
    notes[FIRST_TURN] += len(turns) > 1
    return [{"role": "user", "content": turns[0]}]


def _from_messages(messages: object, notes: Counter[str]) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError('its "messages" are not a list; write a list of {"role", "content"}')
    kept: list[dict[str, str]] = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"a message has no role out of {', '.join(ROLES)}; give it one")
        if not isinstance(message.get("content"), str):
            raise ValueError('the "content" of a message is not a string; write text only')
        if kept and kept[-1]["role"] == message["role"] == "assistant":
            raise ValueError("two assistant messages follow each other; join them")
        kept.append({"role": message["role"], "content": message["content"]})
    if kept[-1]["role"] == "assistant":
        kept.pop()
        notes[REFERENCE] += 1
    if not kept or kept[-1]["role"] != "user":
        raise ValueError("there is no user message to answer; end with the user's question")
    return kept


_FORMS: dict[str, Callable[[object, Counter[str]], list[dict[str, str]]]] = {
    "prompt": _from_prompt,
    "turns": _from_turns,
    "messages": _from_messages,
}


def _hashed_split(identity: str) -> str:
    """The split of a conversation that names none: a function of its id alone."""
    share = digest(f"split:{identity}") % 100
    return "train" if share < 80 else "validation" if share < 88 else "test"


def _without_repeats(found: list[Conversation], notes: Counter[str]) -> Prompts:
    """Drop conversations with the messages of another one; the test's copy stays, then validation's, then the first."""
    kept: dict[str, Conversation] = {}
    for conversation in sorted(found, key=lambda c: SPLITS.index(c.split), reverse=True):
        kept.setdefault(json.dumps(conversation.messages), conversation)
    notes[REPEATED] += len(found) - len(kept)
    return Prompts(list(kept.values()), +notes)
