"""The target's own chat format, and which tokens the assistant wrote.

Whatever the template does (dates, tools, trimming), a sample is the ids that the target was given followed by the ids
that it said, turn after turn. What was said is never tokenised again, and the loss mask needs no marks in the template.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..configs.errors import UserError
from ..models.target import TargetText
from .answers import Answer
from .conversations import Conversation, Message
from .files import sha256

#: Stands for an answer where only what follows it matters; a word that no template changes.
PLACEHOLDER = "answer"
#: What a question may begin or end with, as far as tokenizers make a difference.
EDGES = ("", " ", "  ", "\n", "1", "'", "é")


class TemplateRefusal(UserError):
    """The target's chat template does not take these messages; ``reason`` is what it says."""

    def __init__(self, name: str, messages: list[Message], reason: str) -> None:
        roles = ", ".join(message["role"] for message in messages)
        super().__init__(
            "prepare.prompts",
            f'conversation "{name}" ({roles})',
            f"the target's chat template refuses it: {reason}",
            "change its messages or leave it out",
        )
        self.reason = reason


class TokenizerHash(NamedTuple):
    """Hashes of what turns messages into ids."""

    tokenizer: str
    chat_template: str


class Sequence(NamedTuple):
    """Token ids of a whole conversation, int32 ``[T]``, and whether the assistant wrote each, bool ``[T]``."""

    input_ids: np.ndarray
    loss_mask: np.ndarray


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """The ids the target is given: ``messages`` and the header of the answer.

    Raises:
        TemplateRefusal: the chat template does not take these messages.
    """
    text = _render(tokenizer, conversation.id, conversation.messages)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def left_out(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str | None:
    """What of a conversation the chat template does not show to the target, such as calls of tools; None if it shows all.

    Reasoning does not count: templates leave it out of earlier answers on purpose.

    Raises:
        TemplateRefusal: the chat template does not take these messages.
    """
    words: dict[str, str] = {}

    def word(what: str) -> str:
        """A word to look for in the place of ``what``."""
        new = f"word{len(words)}of"
        words[new] = what
        return new

    messages: list[Message] = []
    for message in conversation.whole:
        shown = {**message, "content": message["content"] and word(f'the content of "{message["role"]}"')}
        if calls := message.get("tool_calls"):
            shown["tool_calls"] = [
                {**call, "function": {**call["function"], "name": word("calls of tools")}} for call in calls
            ]
        messages.append(shown)
    text = _render(tokenizer, conversation.id, messages)
    return next((what for new, what in words.items() if new not in text), None)


def _render(tokenizer: PreTrainedTokenizerBase, name: str, messages: list[Message]) -> str:
    """``messages``, and unless they end with one the header of the answer, as the template writes them."""
    asks = messages[-1]["role"] != "assistant"
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False))
    except TemplateError as error:
        raise TemplateRefusal(name, messages, str(error)) from None


def continuation(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, said: list[str], question: str
) -> list[int] | None:
    """The ids between what the target ``said`` last and its next turn: its end of turn, the ``question``, a header.

    They are what the template puts after a placeholder in the place of the last answer, so that no answer is tokenised
    again. None where the template would not leave the conversation so far as it is, as those do that drop reasoning
    from earlier turns: the target would then be asked something else than what stands in the record. White space at
    the ends of an answer does not count.

    Args:
        tokenizer: the target's, with its chat template.
        conversation: its ``messages`` come first, and its ``follow_ups`` between the answers.
        said: the texts of all answers so far.
        question: the user's next turn.

    Raises:
        TemplateRefusal: the chat template does not take these messages.
    """
    history = list(conversation.messages)
    for text, follow_up in zip(said[:-1], conversation.follow_ups, strict=False):
        history += [{"role": "assistant", "content": text}, {"role": "user", "content": follow_up}]

    def asked(answer: str) -> str:
        turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return _render(tokenizer, conversation.id, history + turns)

    before = _render(tokenizer, conversation.id, history)
    pattern, whole = asked(PLACEHOLDER), asked(said[-1])
    if not pattern.startswith(before + PLACEHOLDER):
        return None
    after = pattern.removeprefix(before + PLACEHOLDER)
    if not (whole.startswith(before) and whole.endswith(after)):
        return None
    if whole.removeprefix(before).removesuffix(after).strip() != said[-1].strip():
        return None
    return list(tokenizer(after, add_special_tokens=False).input_ids)


def tokens_between(text: TargetText) -> int:
    """Tokens that the template puts at most between two turns of the target, the question and the target's own end apart.

    What a question begins and ends with may share tokens with the template, or split them: the most of all ``EDGES``.

    Raises:
        TemplateRefusal: the chat template does not take a second turn.
    """
    answer = "word0of"  # a word that no template has
    asked: list[Message] = [{"role": "user", "content": PLACEHOLDER}, {"role": "assistant", "content": answer}]
    most = 0
    for first, last in itertools.product(EDGES, EDGES):
        question = f"{first}{PLACEHOLDER}{last}"
        after = _render(text.tokenizer, "", [*asked, {"role": "user", "content": question}]).rpartition(answer)[2]
        ids, own = (text.tokenizer(part, add_special_tokens=False).input_ids for part in (after, question))
        most = max(most, len(ids) - len(own) - (ids[0] in text.eos_ids))
    return most


def end_of_turn(tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...]) -> int:
    """The one of the target's ``ends`` that its template writes after an answer; else the tokenizer's own."""
    asked = Conversation("", "", "train", [{"role": "user", "content": PLACEHOLDER}])
    after = continuation(tokenizer, asked, [PLACEHOLDER], PLACEHOLDER)
    return after[0] if after and after[0] in ends else int(tokenizer.eos_token_id)


def sequence(answer: Answer) -> Sequence:
    """A conversation as one document whose assistant turns are what the target said, ends of turns included."""
    loss_mask = np.zeros(len(answer.ids), dtype=bool)
    for start, end in answer.turns:
        loss_mask[start:end] = True
    return Sequence(np.array(answer.ids, dtype=np.int32), loss_mask)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> TokenizerHash:
    """Hashes by which two runs know that they use the same tokenizer and chat template.

    Raises:
        UserError: the tokenizer has no chat template, or is not one of the ``tokenizers`` library.
    """
    name = tokenizer.name_or_path
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError("target.path", name, "its tokenizer is not a fast one", "convert it to a tokenizer.json")
    if not tokenizer.chat_template:
        raise UserError("target.path", name, "its tokenizer has no chat template", "take a target that follows a chat")
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None or backend.truncation is not None:  # how it was called last, not what it is
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_padding()
        backend.no_truncation()
    return TokenizerHash(sha256(backend.to_str().encode()), sha256(tokenizer.get_chat_template().encode()))
