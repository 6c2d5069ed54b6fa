"""What the mask lets through is, character for character, what the assistant says in the target's own template.

The templates are ours, each with the habits of a family: how it trims, what it makes of reasoning, whom it tells the date.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import itertools
import json
import string
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import eagle3.models
import numpy as np
import pytest
from eagle3.data import mask
from eagle3.data.mask import Masking
from eagle3.data.messages import Refused
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[2].parent / "shared"
EMBEDDED = Path(eagle3.models.__path__[0]) / "embedded"
SPECIAL = ["<|start|>", "<|sep|>", "<|end|>", "<|call|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "</s>"]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}

#: Answers are trimmed, the first message tells the date, tools answer as "ipython", a tool's call is JSON.
LLAMA3 = """{{ bos_token }}<|start|>system<|sep|>

Today is {{ strftime_now("%d %B %Y") }}.<|end|>{% for m in messages %}
{%- if m.role == "assistant" and m.tool_calls %}<|start|>assistant<|sep|>

{{ {"name": m.tool_calls[0].function.name, "parameters": m.tool_calls[0].function.arguments} | tojson }}<|call|>
{%- else %}<|start|>{{ "ipython" if m.role == "tool" else m.role }}<|sep|>

{{ m.content | trim }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant<|sep|>

{% endif %}"""

#: Reasoning is shown behind the last question and stripped before it; every turn ends with a line break of nobody's.
QWEN = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% if m.role == "assistant" %}
{%- set thought = m.reasoning_content or "" %}{% set said = m.content %}
{%- if "</think>" in said %}{% set thought = said.split("</think>")[0].split("<think>")[-1] %}{% set said = said.split("</think>")[-1] %}{% endif %}
{{- "<|im_start|>assistant\\n" }}{% if loop.index0 > ns.last %}{{ "<think>\\n" + thought.strip() + "\\n</think>\\n\\n" }}{% endif %}{{ said.lstrip("\\n") }}
{%- for c in m.tool_calls or [] %}{{ "\\n<tool_call>\\n" + (c.function | tojson) + "\\n</tool_call>" }}{% endfor %}{{ "<|im_end|>\\n" }}
{%- else %}{{ "<|im_start|>" + m.role + "\\n" + m.content + "<|im_end|>\\n" }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""

#: The same, but the prompt opens the reasoning, so that the target does not.
QWEN_OPENED = QWEN.replace('assistant\\n" }}{% endif %}', 'assistant\\n<think>\\n" }}{% endif %}')
assert QWEN_OPENED != QWEN

#: Answers are shown in a channel that the prompt does not name.
CHANNELS = """{% for m in messages %}<|start|>{{ m.role }}{{ "<|sep|>final" if m.role == "assistant" }}: {{ m.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

#: The system's message goes into the user's, and the answer begins and ends with a space.
INST = """{{ bos_token }}{% set ns = namespace(system="") %}{% for m in messages %}
{%- if m.role == "system" %}{% set ns.system = m.content + "\\n\\n" %}
{%- elif m.role == "user" %}[INST] {{ ns.system + m.content.strip() }} [/INST]{% set ns.system = "" %}
{%- else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"""

#: Marks around the answer, which leave out the token that ends it.
MARKS = """{% for m in messages %}<|start|>{{ m.role }}<|sep|>
{% if m.role == "assistant" %}{% generation %}{{ m.content }}{% endgeneration %}<|end|>
{% else %}{{ m.content }}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|sep|>
{% endif %}"""

#: Marks around the answer, its end and the line break behind.
WIDE_MARKS = MARKS.replace("{% endgeneration %}<|end|>\n", "<|end|>\n{% endgeneration %}")
assert WIDE_MARKS != MARKS


def thinking(opened: str) -> Callable[[str, bool], str]:
    def said(answer: str, last: bool) -> str:
        return ("<think>\n\n</think>\n\n".removeprefix(opened) if last else "") + answer.lstrip("\n") + "<|im_end|>"

    return said


class Family(NamedTuple):
    """A template, and what the assistant says in it, given its answer and whether it is the last one."""

    template: str
    said: Callable[[str, bool], str]


FAMILIES = {
    "llama3": Family(LLAMA3, lambda answer, last: answer.strip() + "<|end|>"),
    "qwen": Family(QWEN, thinking("")),
    "qwen, opened": Family(QWEN_OPENED, thinking("<think>\n")),
    "channels": Family(CHANNELS, lambda answer, last: f"<|sep|>final: {answer}<|end|>"),
    "inst": Family(INST, lambda answer, last: f" {answer.strip()} </s>"),
    "marks": Family(MARKS, lambda answer, last: answer + "<|end|>"),
    "wide marks": Family(WIDE_MARKS, lambda answer, last: answer + "<|end|>"),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The embedded target's, with the special tokens of the templates above."""
    found = AutoTokenizer.from_pretrained(EMBEDDED)
    found.add_special_tokens({"additional_special_tokens": SPECIAL})
    return found


@pytest.fixture(scope="module")
def llama4() -> PreTrainedTokenizerFast:
    if not SHARED.exists():
        pytest.skip("../shared/llama4-tokenizer is not there")
    return AutoTokenizer.from_pretrained(SHARED / "llama4-tokenizer")


@pytest.fixture(scope="module")
def conversations() -> list[list[dict]]:
    """MT-bench's questions of several turns, answered with documentation of the standard library."""
    if not SHARED.exists():
        pytest.skip("../shared/benchmarks is not there")
    members = [
        getattr(module, name) for module in (argparse, collections, inspect, string, textwrap) for name in dir(module)
    ]
    texts = itertools.cycle(text for member in members if callable(member) and (text := member.__doc__))
    lines = (SHARED / "benchmarks" / "mt-bench.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        [message for turn in json.loads(line)["turns"] for message in say(f"user {turn}", f"assistant {next(texts)}")]
        for line in lines
    ]


def say(*turns: str) -> list[dict]:
    return [{"role": role, "content": content} for role, _, content in (turn.partition(" ") for turn in turns)]


def supervised(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> str:
    """The masked-in tokens, decoded; all of them are the template's text."""
    ids, loss_mask = Masking(tokenizer).masked(messages)
    assert (ids.dtype, loss_mask.dtype) == (np.int32, np.bool_)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer.decode(ids[loss_mask])


def expected(said: Callable[[str, bool], str], messages: list[dict]) -> str:
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return "".join(said(answer, index == len(answers)) for index, answer in enumerate(answers, 1))


def test_mt_bench_in_llama4(llama4: PreTrainedTokenizerFast, conversations: list[list[dict]]) -> None:
    assert len(conversations) == 80 and all(len(messages) == 4 for messages in conversations)
    for messages in conversations:
        assert supervised(llama4, messages) == expected(lambda answer, last: answer + "<|eot|>", messages)
        if all(message["content"] == message["content"].lstrip() for message in messages):
            assert Masking(llama4).masked(messages).input_ids.tolist() == llama4.apply_chat_template(
                messages, return_dict=False
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_mt_bench_in_other_templates(
    name: str, llama4: PreTrainedTokenizerFast, conversations: list[list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES[name]
    llama4.add_special_tokens({"additional_special_tokens": SPECIAL})
    monkeypatch.setattr(llama4, "chat_template", family.template)
    for messages in conversations[:20]:
        assert supervised(llama4, messages) == expected(family.said, messages)


ODD = [
    say("user Hi.", "assistant Hello."),
    say(
        "system Be brief.",
        "user One?",
        "assistant \n <b>1</b> ",
        "user Two?",
        "assistant 2\n\n",
        "user Three?",
        "assistant <t",
    ),
    say("user Say it.", "assistant Say it.", "user Say it.", "assistant Say it."),
    say("user q0q a0a", "assistant a0a q0q"),
    say("user Grüße, 你好 👋🏽", "assistant 👋🏽 你好, Grüße", "user assistant", "assistant user"),
    say("user Quote me.", "assistant user\n\nQuote me.", "user assistant\n", "assistant assistant\n"),
]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("messages", ODD, ids=lambda messages: messages[-1]["content"].strip())
def test_odd_conversations(
    name: str, messages: list[dict], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", FAMILIES[name].template)
    assert supervised(tokenizer, messages) == expected(FAMILIES[name].said, messages)


def test_the_embedded_targets_own_marks(tiny_folder: Path) -> None:
    messages = say("user One?", "assistant 1", "user Two?", "assistant 2")
    assert supervised(AutoTokenizer.from_pretrained(tiny_folder), messages) == "1<|eot|>2<|eot|>"


@pytest.mark.parametrize(("opens", "shown"), [(False, "<think>\n"), (True, "")])
def test_reasoning_is_supervised_where_it_is_shown(
    opens: bool, shown: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", QWEN_OPENED if opens else QWEN)
    messages = say("user One?", "assistant <think>\nEasy.\n</think>\n\n1", "user Two?", "assistant 2")
    messages[3]["reasoning_content"] = "One more."
    said = f"1<|im_end|>{shown}One more.\n</think>\n\n2<|im_end|>"
    assert supervised(tokenizer, messages) == said
    messages[3] = say("assistant <think>\nOne more.\n</think>\n\n2")[0]
    assert supervised(tokenizer, messages) == said


def test_what_the_prompt_opens_is_not_supervised(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = """{% for m in messages %}<|start|>{{ m.role }}<|sep|>{{ m.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant<|sep|><think>{% endif %}"""
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = say("user One?", "assistant 1", "user Two?", "assistant <think>Easy.</think>2")
    assert supervised(tokenizer, messages) == "1<|end|>Easy.</think>2<|end|>"


def test_calls_of_tools_are_supervised_and_results_are_not(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = [*say("user One and two?"), called, *say("tool 3", "assistant It is 3.")]
    monkeypatch.setattr(tokenizer, "chat_template", LLAMA3)
    said = '{"name": "add", "parameters": {"a": 1, "b": 2}}<|call|>It is 3.<|end|>'
    assert supervised(tokenizer, messages) == said
    monkeypatch.setattr(tokenizer, "chat_template", QWEN)
    think, call = "<think>\n\n</think>\n\n", '{"name": "add", "arguments": {"a": 1, "b": 2}}'
    said = f"{think}\n<tool_call>\n{call}\n</tool_call><|im_end|>{think}It is 3.<|im_end|>"
    assert supervised(tokenizer, messages) == said


def test_no_token_reaches_over_an_edge(llama4: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    template = """{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ "assistant: " }}{% endif %}"""
    monkeypatch.setattr(llama4, "chat_template", template)
    messages = say("user One?", "assistant the answer is one", "user Two?", "assistant two")
    ids, loss_mask = Masking(llama4).masked(messages)
    merged = [llama4.decode(token) for token in llama4.apply_chat_template(messages, return_dict=False)]
    assert " the" in merged  # of which the target is given the space
    pieces = [llama4.decode(token) for token in ids[loss_mask]]
    assert pieces == ["the", " answer", " is", " one", "<|eot|>", "two", "<|eot|>"]
    given = llama4.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(given)].tolist() == given


def test_offsets_without_the_space_before_a_word(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's and Llama-3's tokenizers leave it out of their offsets, so that a token seems to begin after it."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    trimming = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)), eos_token="<|eot|>"
    )
    template = """{% for m in messages %}{{ m.role }}:{{ space }}{{ m.content }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ "assistant:" }}{{ space }}{% endif %}"""
    text = "the value  of the list"
    for space, said in (('" "', None), ('""', text + "<|eot|>")):
        template_of = template.replace("{{ space }}", "{{ " + space + " }}")
        monkeypatch.setattr(tokenizer, "chat_template", template_of)
        monkeypatch.setattr(trimming, "chat_template", template_of, raising=False)
        messages = say("user One?", f"assistant {text}")
        first, second = Masking(tokenizer).masked(messages), Masking(trimming).masked(messages)
        assert first.input_ids.tolist() == second.input_ids.tolist()
        assert first.loss_mask.tolist() == second.loss_mask.tolist()
        assert said is None or tokenizer.decode(first.input_ids[first.loss_mask]) == said


def test_a_template_that_tells_the_time(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on between two renderings does not spoil the mask."""
    real, ticks = mask.render_jinja_template, itertools.count()
    monkeypatch.setattr(
        mask,
        "render_jinja_template",
        lambda *args, **given: real(*args, **given, now=f"12:00:0{min(1, next(ticks))}"),
    )
    template = "It is {{ now }}. " + LLAMA3.replace('{{ strftime_now("%d %B %Y") }}', "a day")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    text, spans = Masking(tokenizer).turns(say("user One?", "assistant 1"))
    assert text.startswith("It is 12:00:01.")
    assert [text[start:end] for start, end in spans] == ["1<|end|>"]


NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
ENDLESS_MARKS = NO_END.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
TWICE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ m.content }}{{ eos_token }}{% endfor %}"
COUNTED = "{{ messages | map(attribute='content') | join | length }} characters. " + LLAMA3
ANOTHER_PROMPT = (
    "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>answer: {% endif %}"
)


@pytest.mark.parametrize("template", [NO_END, ENDLESS_MARKS, TWICE, COUNTED, ANOTHER_PROMPT])
def test_templates_of_which_it_cannot_be_made_out(
    template: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(Refused, match="it cannot be made out which part of them the assistant wrote"):
        Masking(tokenizer).masked(say("user One?", "assistant first"))


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (say("user One?", "assistant 1", "assistant 2"), '"assistant" follows "assistant"'),
        (say("user One?", "assistant 1", "user Two?"), "the last message is no answer"),
        ([], "the last message is no answer"),
    ],
)
def test_conversations_that_are_not_finished(
    messages: list[dict], complaint: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(Refused, match=complaint):
        Masking(tokenizer).masked(messages)


def test_a_template_that_refuses(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no tools here') }}")
    with pytest.raises(Refused, match=r"the target's chat template refuses them \(no tools here\)"):
        Masking(tokenizer).masked(say("user One?", "assistant 1"))
