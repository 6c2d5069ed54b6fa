"""One conversation on its way through its turns, whoever answers them.

dialogue = Dialogue(question, target.text, max_new_tokens=128)
while not dialogue.finish:
    dialogue.say(ids, ended=True)     # what the target said to dialogue.ids
dialogue.answer()
"""

from __future__ import annotations

from typing import NamedTuple

from ..models.target import TargetText
from .answers import Answer
from .chat import continuation
from .conversations import Conversation
from .corpus import digest


class Question(NamedTuple):
    """A conversation to be answered: its ids up to the first answer, and the temperature and seed of its answers."""

    conversation: Conversation
    prompt_ids: list[int]
    temperature: float
    run_seed: int

    def seed(self, turn: int) -> int:
        """The seed of a turn's random draws, of 63 bits; turns are counted from 0."""
        later = f":turn {turn}" if turn else ""
        return digest(f"answer:{self.run_seed}:{self.conversation.id}{later}") >> 1


class Dialogue:
    """What was said so far.

    Args:
        question: the conversation.
        text: the target's tokenizer, ends and positions.
        max_new_tokens: the longest turn of the target.

    Attributes:
        ids: the prompt of the next turn, or the whole conversation once it has a ``finish``.
        turns: ``[start, end)`` of each turn of the target.
        finish: why there is no further turn (see :class:`.answers.Answer`); empty while there is one.
        exact: whether all ids are the target's own.
    """

    def __init__(self, question: Question, text: TargetText, max_new_tokens: int) -> None:
        self.question, self._text, self._most = question, text, max_new_tokens
        self.ids, self.turns = list(question.prompt_ids), list[list[int]]()
        self.finish, self.exact = "", True
        self._said: list[str] = []

    @property
    def seed(self) -> int:
        """The seed of the next turn."""
        return self.question.seed(len(self.turns))

    def say(self, ids: list[int], ended: bool, exact: bool = True) -> None:
        """Take in the target's turn, its last token the end of turn if it ``ended``, and ask on."""
        self.turns.append([len(self.ids), len(self.ids) + len(ids)])
        self.ids += ids
        self.exact &= exact
        self.finish = self._ask_on(ids) if ended else "length"

    def answer(self) -> Answer:
        """The finished conversation."""
        conversation = self.question.conversation
        return Answer(
            conversation.id,
            conversation.source,
            conversation.split,
            self.question.temperature,
            self.ids,
            self.turns,
            self.finish,
            self.exact,
        )

    def _ask_on(self, ids: list[int]) -> str:
        """Append the user's next turn; returns why it is not asked if it is not."""
        conversation, tokenizer = self.question.conversation, self._text.tokenizer
        if len(self.turns) > len(conversation.follow_ups):
            return "stop"
        self._said.append(str(tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)))
        follow_up = conversation.follow_ups[len(self.turns) - 1]
        between = continuation(tokenizer, conversation, self._said, follow_up)
        if between is None:
            return "rewritten"
        if between[0] in self._text.eos_ids:
            between = between[1:]  # the target's own end stands there already
        if len(self.ids) + len(between) + self._most > self._text.max_positions:
            return "full"
        self.ids += between
        return ""
