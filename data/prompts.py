"""The conversations of a recipe, one after another: from rows of the user's, or made from the standard library's source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ..configs.errors import UserError
from ..configs.settings import PrepareSettings
from .conversations import SPLITS, Conversation, Found
from .corpus import Screen, digest, examples, functions, split_of, standard_library
from .messages import Asked, Refused, asked, refuse_besides
from .sources import SETTING, Row

COLUMNS = ("messages", "conversations", "prompt", "turns")
UNUSED = "answers: given ones, which the target replaces by its own"
UNANSWERED = "questions: the last one, where answers are kept and it has none"


def library_prompts(notes: Counter[str]) -> Iterator[Found]:
    """Questions about the standard library's functions; their kind is their source.

    A function belongs to the split of its top-level module. Training functions that resemble held-out ones are dropped,
    so that no function of the test is learnt by heart from a copy of it. ``notes`` counts them.
    """
    library = list(functions(standard_library()))
    screen = Screen(library)
    for function in library:
        if split_of(function.module) == "train" and (refusal := screen.refusal(function)):
            notes[refusal] += 1
            continue
        for example in examples(function):
            messages = [{"role": "user", "content": example.question}]
            yield Found(Conversation(example.id, example.kind, example.split, messages), function.module)


def read_prompts(settings: PrepareSettings, rows: Iterable[Row], notes: Counter[str]) -> Iterator[Found]:
    """The conversations of ``rows``, which :func:`.sources.rows` yields.

    ``notes`` counts by reason those that cannot be asked, and the given answers and last questions that are not used.

    Raises:
        UserError: a malformed row, or none that can be asked.
    """
    found, refused = 0, Counter[str]()
    for row in rows:
        try:
            conversation, left_out = _conversation(row, settings)
        except Refused as refusal:
            refused[str(refusal)] += 1
            notes[f"conversations: {refusal}"] += 1
        except ValueError as error:
            problem, _, remedy = str(error).partition("; ")
            raise UserError(SETTING, row.where, problem, remedy) from None
        else:
            found += 1
            notes.update(left_out)
            yield Found(conversation, row.where)
    if not found:
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in refused.items()) or "it is empty"
        remedy = 'give rows such as {"prompt": "..."}'
        raise UserError(SETTING, settings.prompts, f"it holds no conversation that can be asked ({reasons})", remedy)


def _conversation(row: Row, settings: PrepareSettings) -> tuple[Conversation, dict[str, int]]:
    """One row, and what of it is not used.

    Raises:
        Refused: it cannot be asked.
        ValueError: "<problem>; <remedy>" where it is malformed.
    """
    values = row.values
    refuse_besides(values)
    chosen = settings.column or _column(values)
    if values.get(chosen) is None:
        raise ValueError(
            f'it holds no "{chosen}" but {", ".join(values) or "nothing"}; set prepare.column to what it has'
        )
    question = asked(values[chosen], chosen, _label(values, "system") or "")
    source = _label(values, "source") or _label(values, "category") or row.source
    try:
        read = question if settings.keep_answers else question[:2]
        json.dumps([read, source, values.get("id")], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is no text; repair what wrote the file") from None
    identity = _identity(values.get("id"), question)
    split = _hashed_split(identity) if values.get("split") is None else values["split"]
    if split not in SPLITS:
        raise ValueError(f'its "split" is {json.dumps(split)}; write one of {", ".join(SPLITS)}')
    messages, follow_ups, given = question
    if not settings.keep_answers or split != "train" or not given:
        return Conversation(identity, source, split, messages, follow_ups), {UNUSED: len(given)}
    answered = follow_ups[: len(given) - 1]
    return (
        Conversation(identity, source, split, messages, answered, given),
        {UNANSWERED: len(follow_ups) - len(answered)},
    )


def _column(values: dict[str, Any]) -> str:
    there = [name for name in COLUMNS if values.get(name) is not None]
    if len(there) != 1:
        held = (
            f"{' and '.join(there)}" if there else f"none of {', '.join(COLUMNS)} but {', '.join(values) or 'nothing'}"
        )
        raise ValueError(f"it holds {held}; say with prepare.column which one is asked")
    return there[0]


def _label(values: dict[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f'its "{name}" is {json.dumps(value, default=str)}; write a string')
    return value


def _identity(given: object, question: Asked) -> str:
    """The id that a row gives, or a hash of what is asked."""
    if given is None:
        content = [question.messages, question.follow_ups] if question.follow_ups else question.messages
        return f"{digest(json.dumps(content, ensure_ascii=False)):016x}"
    if not isinstance(given, str | int) or isinstance(given, bool):
        raise ValueError(f'its "id" is {json.dumps(given, default=str)}; write a string or an integer')
    return str(given)


def _hashed_split(identity: str) -> str:
    """The split of a conversation that names none: a function of its id alone."""
    share = digest(f"split:{identity}") % 100
    return "train" if share < 80 else "validation" if share < 88 else "test"
