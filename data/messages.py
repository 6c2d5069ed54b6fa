"""The forms in which people keep conversations, and what of one is asked of the target.

============================================  ===================================================================
form                                          what is asked
============================================  ===================================================================
a text                                        it, as the user's message
a list of texts (MT-bench's ``turns``)        the first; the others follow, each after the target's answer
a list of messages, ``role`` and ``content``  the user's messages likewise. Answers between them are the target's
(OpenAI) or ``from`` and ``value`` (ShareGPT)  to give, unless the recipe keeps those that stand there
============================================  ===================================================================

Results of tools cannot be had again: everything up to the last one is asked as it stands, given answers included.

What cannot be asked is :class:`Refused` and goes into the summary under its reason; what is in none of these forms is a
mistake in the file, a ValueError("<problem>; <remedy>").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from .conversations import Message

#: What the roles of other formats are here; what a model says to call a tool is said by the assistant.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bing", "bard", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
REASONING = ("reasoning_content", "reasoning", "thinking")
#: Columns, and keys of a message, that make a conversation more than its text.
BESIDES = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "it is about {}, and not text alone"),
    **dict.fromkeys(("tools", "functions"), 'it offers "{}", whose definitions are not kept'),
    "function_call": 'a message has a "{}", the old form of tool_calls',
}
#: Who may speak after whom; None is the beginning. A tool is heard only after it was called.
FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "user", "tool"),
}


class Refused(Exception):
    """A conversation that cannot be asked; the text is the reason under which it is counted."""


class Asked(NamedTuple):
    """What the target is asked, and the answers that are given to it, as in :class:`.conversations.Conversation`.

    The last of ``follow_ups`` may have no answer.
    """

    messages: list[Message]
    follow_ups: tuple[str, ...]
    given: tuple[Message, ...]


def asked(value: object, column: str, system: str = "") -> Asked:
    """What is asked of the target in ``value``, which stands in ``column``, after the message ``system``.

    Raises:
        Refused: it cannot be asked.
        ValueError: it is in none of the forms.
    """
    questions: list[str] = []
    match value:
        case str():
            said = [_user(value)]
        case [str(), *_]:
            first, *questions = (_user(turn)["content"] for turn in value)
            said = [_user(first)]
        case [Mapping(), *_] | []:
            said = [message for message in map(_message, value) if message["role"] != "system" or message["content"]]
        case _:
            forms = "write a question, a list of questions, or a list of messages"
            raise ValueError(f'its "{column}" is {_shown(value)}; {forms}')
    cut = _cut([{"role": "system", "content": system}, *said] if system else said)
    return cut._replace(follow_ups=(*cut.follow_ups, *questions))


def refuse_besides(values: Mapping[str, Any]) -> None:
    """Refuse a row, or a message, that holds more than text: pictures, sound, definitions of tools."""
    for key, reason in BESIDES.items():
        if values.get(key) not in (None, "", [], {}, "[]"):
            raise Refused(reason.format(key))


def _cut(said: list[Message]) -> Asked:
    """Cut a conversation into what is asked first and what follows."""
    roles = [message["role"] for message in said]
    for before, role in zip([None, *roles], roles, strict=False):
        if role not in FOLLOWS[before]:
            raise Refused(f'"{role}" follows "{before}"' if before else f'"{role}" comes first')
    if "user" not in roles:
        raise Refused("the user asks nothing")
    # Up to the first answer that the target can give itself: the first of all, or the first after the last tool.
    start = max((index for index, role in enumerate(roles) if role == "tool"), default=0)
    first = next((index for index in range(start, len(roles)) if roles[index] == "assistant"), len(roles))
    answers, questions = said[first::2], said[first + 1 :: 2]  # after the last tool they take turns
    return Asked(said[:first], tuple(question["content"] for question in questions), tuple(answers))


def _user(text: object) -> Message:
    if not isinstance(text, str):
        raise ValueError(f"a question is {_shown(text)}; write it as a text")
    if not text.strip():
        raise Refused("a question is empty")
    return {"role": "user", "content": text}


def _message(given: object) -> Message:
    """A message of OpenAI's or of ShareGPT's form as one of ours."""
    if not isinstance(given, Mapping):
        raise ValueError(f"a message is {_shown(given)}; write a list of messages and of nothing else")
    name = given.get("role") or given.get("from")
    if not isinstance(name, str):
        raise ValueError(f'the "role" of a message is {_shown(name)}; give it one out of {", ".join(sorted(ROLES))}')
    if name not in ROLES:
        raise Refused(f'a message has the role "{name[:20]}"')
    refuse_besides(given)
    role, content = ROLES[name], _text(given["content"] if given.get("content") is not None else given.get("value"))
    if role == "user":
        return _user(content)
    message: Message = {"role": role, "content": content}
    message |= {key: given[key] for key in ("name", "tool_call_id") if given.get(key)}
    if thoughts := next((given[key] for key in REASONING if given.get(key)), None):
        message["reasoning_content"] = _text(thoughts)
    if given.get("tool_calls"):
        message["tool_calls"] = [_call(call) for call in given["tool_calls"]]
    return message


def _text(content: object) -> str:
    """The text of a message, which may come in parts; none is there beside the call of a tool."""
    match content:
        case None:
            return ""
        case str():
            return content
        case list():
            return "".join(_part(part) for part in content)
    raise ValueError(f'the "content" of a message is {_shown(content)}; write a text, or a list of text parts')


def _part(part: object) -> str:
    match part:
        case str():
            return part
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)}:
            raise Refused(f'a message has a part of type "{kind[:20]}"')
    raise ValueError(f'a part of a message is {_shown(part)}; write {{"type": "text", "text": ...}}')


def _call(call: object) -> Message:
    """A call of a tool with its arguments as an object, which is what chat templates read, and not as JSON in a text."""
    match call:
        case {"function": {"name": str(name), "arguments": str() | Mapping() as arguments}, **rest}:
            pass
        case _:
            raise ValueError(f'a call of a tool is {_shown(call)}; write {{"function": {{"name", "arguments"}}}}')
    try:
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        json.dumps(arguments, allow_nan=False)
    except (ValueError, TypeError):  # NaN, or what a table has beside JSON's types
        raise Refused("the arguments of a tool's call are not JSON") from None
    if not isinstance(arguments, Mapping):
        raise Refused("the arguments of a tool's call are no object")
    kept = {key: rest[key] for key in ("id", "type") if rest.get(key)}
    return {**kept, "function": {"name": name, "arguments": arguments}}


def _shown(value: object) -> str:
    """A value as JSON would say it, as far as it fits into a message."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
