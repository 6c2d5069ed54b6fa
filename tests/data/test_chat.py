"""The chat format is the target's own, and the loss mask is the answer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from eagle3.configs.errors import UserError
from eagle3.configs.settings import TargetSettings
from eagle3.data.answers import Answer
from eagle3.data.chat import continuation, prompt_ids, sequence, tokenizer_hash, tokens_between
from eagle3.data.conversations import Conversation
from eagle3.models.target import load_text
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_folder)


def ask(*messages: tuple[str, str]) -> Conversation:
    return Conversation("it", "s", "train", [{"role": role, "content": content} for role, content in messages])


def test_prompt_ends_with_the_header_of_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt_ids(tokenizer, ask(("user", "Hello")))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(ids) == text
    assert text.index("Hello") < text.index("assistant")


def test_a_template_that_refuses(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system messages here') }}"
    with pytest.raises(UserError, match=r'"it" \(system, user\): .* refuses it: no system messages here; change'):
        prompt_ids(tokenizer, ask(("system", "x"), ("user", "y")))


def test_mask_is_what_the_target_said() -> None:
    made = sequence(Answer("a", "s", "train", 0.0, [5, 6, 7, 8, 9, 5, 9], [[3, 5], [6, 7]], "stop", True))
    assert made.input_ids.tolist() == [5, 6, 7, 8, 9, 5, 9]
    assert made.input_ids.dtype == "int32"
    assert made.loss_mask.tolist() == [False, False, False, True, True, False, True]


def test_hashes_follow_what_they_hash(tokenizer: PreTrainedTokenizerFast, tiny_folder: Path) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)  # leaves its mark in the tokenizer
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_hash(tokenizer) == before == tokenizer_hash(AutoTokenizer.from_pretrained(tiny_folder))
    tokenizer.chat_template += " "
    assert tokenizer_hash(tokenizer).tokenizer == before.tokenizer
    assert tokenizer_hash(tokenizer).chat_template != before.chat_template
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_hash(tokenizer).tokenizer != before.tokenizer


def test_a_tokenizer_without_a_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="its tokenizer has no chat template; take a target that follows a chat"):
        tokenizer_hash(tokenizer)


def test_no_question_has_more_of_the_template_around_it_than_is_said() -> None:
    """With merges: the line break before a question takes the space with which it begins out of its first token."""
    text, draw = load_text(TargetSettings()), random.Random(0)
    signs = [*"abc123é你🙂\n\t' ", "  ", "'s", "the", " Hello", "://", "```"]

    def around(question: str) -> int:
        between = continuation(text.tokenizer, ask(("user", "Hello")), ["Yes"], question)
        own = text.tokenizer(question, add_special_tokens=False).input_ids
        return len(between) - len(own) - (between[0] in text.eos_ids)

    most = tokens_between(text)
    assert (around("Why?"), around(" Hello"), most) == (9, 10, 10)
    assert max(around("".join(draw.choices(signs, k=draw.randrange(1, 12)))) for _ in range(1000)) == most
