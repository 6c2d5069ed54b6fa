"""Answers that conversations bring with them: training is on these very texts, and the target is not asked.

    keeper = Keeper(target.text, max_new_tokens=2048)
    keeper.answer(conversation)    # Answer(..., temperature=1.0, finish="given", exact=False)

Preparation asks here whether answers can be kept, and regeneration gets them here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from ..models.target import TargetText
from .answers import GIVEN, Answer, Failure
from .conversations import Conversation, Message
from .mask import Masking
from .messages import Refused

#: As what a text counts of which it is not known how it was sampled: a draw from the distribution of who wrote it.
TEMPERATURE = 1.0
AT_ONCE = 256  # written together: a second's work
EMPTY = "a given answer is empty"
LONG_ANSWER = "a given answer is longer than regenerate.max_new_tokens"
LONG = "with its given answers it is longer than the target's positions"
CHANGED = "the target's chat template does not show all of the last given answer"


class Keeper:
    """Makes answers of those that are given.

    Args:
        text: the target's tokenizer and positions.
        max_new_tokens: the longest turn, end-of-turn included.
    """

    def __init__(self, text: TargetText, max_new_tokens: int) -> None:
        self._most, self._positions, self._masking = max_new_tokens, text.max_positions, Masking(text.tokenizer)

    def answers(self, conversations: Iterator[Conversation]) -> Iterator[list[Answer | Failure]]:
        """The given answers of conversations, some hundred at a time, and which cannot be kept."""
        while some := list(islice(conversations, AT_ONCE)):
            yield [self._answer_or_failure(conversation) for conversation in some]

    def answer(self, conversation: Conversation) -> Answer:
        """The given answers of a conversation, and what the target would have been shown before each.

        Raises:
            Refused: they cannot be kept.
        """
        messages = conversation.whole
        if not all(map(_says_something, messages)):
            raise Refused(EMPTY)
        text, spans = self._masking.turns(messages)
        before = spans[-2].end if len(spans) > 1 else 0
        if not _shows(text[before:], messages[-1]):
            raise Refused(CHANGED)
        ids, loss_mask = self._masking.encoded(text, spans)
        turns = np.flatnonzero(np.diff(loss_mask, prepend=False, append=False)).reshape(-1, 2)
        if np.diff(turns).max() > self._most:
            raise Refused(LONG_ANSWER)
        end = int(turns[-1, 1])
        if end > self._positions:
            raise Refused(LONG)
        return Answer(
            conversation.id,
            conversation.source,
            conversation.split,
            TEMPERATURE,
            ids[:end].tolist(),  # what the template writes behind the last turn is nobody's
            turns.tolist(),
            GIVEN,
            exact=False,
        )

    def _answer_or_failure(self, conversation: Conversation) -> Answer | Failure:
        try:
            return self.answer(conversation)
        except Refused as refusal:
            return Failure(conversation.id, 1, str(refusal))


def _says_something(message: Message) -> bool:
    said = (message["content"], message.get("reasoning_content", ""))
    return message["role"] != "assistant" or "tool_calls" in message or any(text.strip() for text in said)


def _shows(text: str, answer: Message) -> bool:
    """Whether a text shows an answer and its reasoning; what white space there is between words is the template's."""
    shown = "".join(text.split())
    return all("".join(answer.get(key, "").split()) in shown for key in ("content", "reasoning_content"))
