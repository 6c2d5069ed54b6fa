"""The target's own chat format, and which tokens the assistant wrote.

Whatever the template does (dates, tools, trimming), a sample is the ids that the target was given followed by the ids
that it said. So nothing is rendered twice, and the loss mask needs no marks in the template.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..configs.errors import UserError
from .conversations import Conversation
from .files import sha256


class TemplateRefusal(UserError):
    """The target's chat template does not take these messages; ``reason`` is what it says."""

    def __init__(self, conversation: Conversation, reason: str) -> None:
        roles = ", ".join(message["role"] for message in conversation.messages)
        super().__init__(
            "prepare.prompts",
            f'conversation "{conversation.id}" ({roles})',
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
    try:
        ids = tokenizer.apply_chat_template(conversation.messages, add_generation_prompt=True, return_dict=False)
    except TemplateError as error:
        raise TemplateRefusal(conversation, str(error)) from None
    return list(ids)


def sequence(prompt: list[int], answer: list[int]) -> Sequence:
    """Prompt and answer as one document whose only assistant turn is the answer, end-of-turn included."""
    input_ids = np.array(prompt + answer, dtype=np.int32)
    loss_mask = np.arange(len(input_ids)) >= len(prompt)
    return Sequence(input_ids, loss_mask)


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
