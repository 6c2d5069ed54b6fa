"""What is asked of a conversation: its questions in turn, given answers aside, tools as they answered."""

from __future__ import annotations

import datetime
import math

import pytest
from eagle3.data.messages import Asked, Refused, asked, refuse_besides


def say(*turns: str) -> list[dict[str, str]]:
    """``say("user One?", "assistant 1")`` as messages."""
    return [{"role": role, "content": content} for role, _, content in (turn.partition(" ") for turn in turns)]


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


def test_one_question_in_every_form() -> None:
    expected = Asked(say("user One?"), (), ())
    assert asked("One?", "prompt") == expected
    assert asked(["One?"], "turns") == expected
    assert asked(say("user One?"), "messages") == expected
    assert asked([{"from": "human", "value": "One?"}], "conversations") == expected
    parts = [{"type": "text", "text": "One"}, "?"]
    assert asked([{"role": "user", "content": parts, "tool_calls": None, "name": None}], "messages") == expected


def test_given_answers_are_the_targets_to_give() -> None:
    given = say("system Be brief.", "user One?", "assistant 1", "user Two?", "assistant 2", "user Three?")
    assert asked(given, "messages") == Asked(given[:2], ("Two?", "Three?"), (given[2], given[4]))
    assert asked(given[:-1], "messages") == Asked(given[:2], ("Two?",), (given[2], given[4]))
    given[2]["reasoning_content"] = "Easy."
    assert asked(given, "messages") == Asked(given[:2], ("Two?", "Three?"), (given[2], given[4]))
    assert asked(["One?", "Two?"], "turns", "Be brief.") == Asked(given[:2], ("Two?",), ())


def test_sharegpt() -> None:
    names = {"system": "system", "human": "user", "gpt": "assistant"}
    given = [{"from": name, "value": name} for name in ("system", "human", "gpt", "human", "gpt")]
    assert asked(given, "conversations") == Asked(
        [{"role": names[name], "content": name} for name in ("system", "human")],
        ("human",),
        tuple(say("assistant gpt") * 2),
    )
    given = [{"from": name, "value": name} for name in ("human", "function_call", "observation", "gpt", "human")]
    first, follow_ups, answers = asked(given, "conversations")
    assert [message["role"] for message in first] == ["user", "assistant", "tool"]
    assert (follow_ups, answers) == (("human",), tuple(say("assistant gpt")))


def test_up_to_the_last_result_of_a_tool_all_is_given() -> None:
    given = [
        *say("user One?", "assistant 1", "user Two?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "I shall add."},
        {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"},
        *say("assistant It is 3.", "user Sure?"),
    ]
    first, follow_ups, answers = asked(given, "messages")
    assert first[:3] == given[:3]
    assert first[3] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I shall add.",
        "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {"a": 1}}}],
    }
    assert first[4] == {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "add"}
    assert (len(first), follow_ups, answers) == (5, ("Sure?",), tuple(say("assistant It is 3.")))
    first, follow_ups, answers = asked([*given[:5], *say("user So?", "assistant So.", "user Sure?")], "messages")
    assert (first[-1], follow_ups, answers) == (say("user So?")[0], ("Sure?",), tuple(say("assistant So.")))


def test_an_answer_that_only_calls_a_tool_is_the_targets_to_give() -> None:
    given = [*say("user One?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    [called] = asked(given, "messages").given
    assert asked(given, "messages") == Asked(say("user One?"), (), (called,))
    assert called["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_an_empty_system_message_is_none() -> None:
    assert asked(say("system ", "user One?"), "messages", "Be brief.").messages == say("system Be brief.", "user One?")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (say("user One?", "user Two?"), '"user" follows "user"'),
        (say("user One?", "assistant 1", "assistant 2"), '"assistant" follows "assistant"'),
        (say("user One?", "assistant 1", "system Be brief."), '"system" follows "assistant"'),
        (say("user One?", "tool 3"), '"tool" follows "user"'),
        (say("assistant 1", "user One?"), '"assistant" comes first'),
        (say("system Be brief."), "the user asks nothing"),
        ([], "the user asks nothing"),
        ("", "a question is empty"),
        (["One?", " "], "a question is empty"),
        (say("critic Bad."), 'a message has the role "critic"'),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], 'a message has a part of type "input_audio"'),
        ([{"role": "user", "content": "?", "images": ["x"]}], "it is about images, and not text alone"),
        (
            [*say("user One?"), {"role": "assistant", "function_call": {}, "content": ""}, *say("user ")],
            "a question is empty",
        ),
        (
            [*say("user One?"), {"role": "assistant", "function_call": {"name": "f"}}],
            'a message has a "function_call", the old',
        ),
        (
            [*say("user One?"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "the arguments of a tool's call are not JSON",
        ),
        (
            [*say("user One?"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}],
            "the arguments of a tool's call are no object",
        ),
    ],
)
def test_refused_by_name(value: object, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        asked(value, "messages")


@pytest.mark.parametrize("value", ['{"a": NaN}', {"a": math.inf}, {"a": [datetime.date(2025, 1, 1)]}])
def test_arguments_that_no_json_holds_are_refused(value: object) -> None:
    call = {"function": {"name": "f", "arguments": value}}
    with pytest.raises(Refused, match="the arguments of a tool's call are not JSON"):
        asked([*say("user One?"), {"role": "assistant", "tool_calls": [call]}, *say("tool 1")], "messages")


def test_a_second_system_message_is_refused() -> None:
    with pytest.raises(Refused, match='"system" follows "system"'):
        asked(say("system Be brief.", "user One?"), "messages", "Be long.")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (3, 'its "messages" is 3; write a question'),
        ([3], r'its "messages" is \[3\]; write'),
        ([{"content": "?"}], 'the "role" of a message is null; give it one out of assistant'),
        ([{"role": "user", "content": 3}], 'the "content" of a message is 3; write a text, or a list of text parts'),
        ([{"role": "user", "content": [{"text": "?"}]}], 'a part of a message is {"text": "\\?"}; write'),
        ([{"role": "assistant", "tool_calls": ["add"]}], 'a call of a tool is "add"; write {"function"'),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": 3}}]}],
            'a call of a tool is {"function": .*; write {"function"',
        ),
        ([{"role": "assistant", "content": "", "thinking": 3}], 'the "content" of a message is 3; write'),
        (["x" * 1000, 3], "a question is 3; write"),
    ],
)
def test_malformed(value: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        asked(value, "messages")


def test_nothing_beside_the_text() -> None:
    refuse_besides({"images": [], "image": None, "tools": "[]", "score": 3})
    with pytest.raises(Refused, match="it is about audio, and not text alone"):
        refuse_besides({"audio": {"bytes": b"x"}})
