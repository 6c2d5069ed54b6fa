"""Which tokens of a finished conversation the assistant wrote, by the target's own chat template.

The conversation is rendered once, as text, and tokenised once. Where the assistant's turns lie in that text the template
says itself if it has ``{% generation %}`` marks. If it has none, every turn is rendered again with another answer in its
place: what stays the same before and after it is the template's, what lies between is the turn. So it does not matter what
the template makes of an answer, be it trimmed, stripped of its reasoning or followed by calls of tools: what it renders is
what is supervised.

A turn begins where the target would go on, behind the template's own generation prompt, and ends with its end-of-turn
mark. No token reaches over an edge: where the tokenizer would merge the end of what the target is given with the beginning
of what it says, the text is cut, since nothing that the target says can change a token that it was given.

The target's own answers need none of this (:func:`.chat.sequence`); it is for those that are kept as they were given
(:mod:`.given`).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .chat import Sequence
from .conversations import Message
from .messages import Refused

REFUSING = "the target's chat template refuses them"
UNKNOWN = "of the target's chat template it cannot be made out which part of them the assistant wrote"
ATTEMPTS = 3  # a template that tells the time may tell another one when it is rendered again


class Span(NamedTuple):
    """Characters ``start <= i < end`` of the rendered text."""

    start: int
    end: int


class Masking:
    """What the assistant wrote in conversations, by the chat template of ``tokenizer``, a fast one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._template = tokenizer, _Template(tokenizer)

    def masked(self, messages: list[Message]) -> Sequence:
        """The ids of ``messages`` as the template renders them, and which the assistant wrote, end-of-turn included.

        Args:
            messages: a whole conversation, which ends with an answer. What user, system and tools say is not
                supervised.

        Raises:
            Refused: assistant messages follow each other, the last message is none, the template refuses the messages,
                or it cannot be made out where a turn begins or ends, as where no special token ends it.
        """
        return self.encoded(*self.turns(messages))

    def turns(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """The rendered conversation, and where in it the assistant's turns lie; raises as :meth:`masked` does."""
        roles = [message["role"] for message in messages]
        if ("assistant", "assistant") in itertools.pairwise(roles):
            raise Refused('"assistant" follows "assistant"')
        if roles[-1:] != ["assistant"]:
            raise Refused("the last message is no answer")
        template, answers = self._template, [index for index, role in enumerate(roles) if role == "assistant"]
        for _ in range(ATTEMPTS):
            text, spans = template.marked(messages) if template.has_marks else template.compared(messages, answers)
            if None not in spans and len(spans) == len(answers):
                return text, [span for span in spans if span]
        raise Refused(UNKNOWN)

    def encoded(self, text: str, spans: list[Span]) -> Sequence:
        """What :meth:`turns` found, in tokens."""
        ids, starts = _encode(self._tokenizer, text, [edge for span in spans for edge in span])
        loss_mask = np.zeros(len(ids), dtype=bool)
        for span in spans:
            loss_mask |= (starts >= span.start) & (starts < span.end)
        return Sequence(ids, loss_mask)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, edges: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of ``text``, int32 ``[T]``, of which none reaches over an edge, and where each begins in it, ``[T]``."""
    cuts = {0, len(text)}
    while True:
        pieces = [
            (start, tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True))
            for start, end in itertools.pairwise(sorted(cuts))
        ]
        ids = np.array([token for _, piece in pieces for token in piece["input_ids"]], dtype=np.int32)
        starts, ends = np.concatenate([np.array(piece["offset_mapping"]) + start for start, piece in pieces]).T
        # Some tokenizers leave the space before a word out of its offsets; it belongs to the token all the same.
        starts = np.minimum(starts, np.concatenate([[0], np.maximum.accumulate(ends)[:-1]]))
        across = {edge for edge in edges if np.any((starts < edge) & (edge < ends))}
        if not across:
            return ids, starts
        cuts |= across


class _Template:
    """The chat template of a tokenizer, and the special tokens, of which one ends a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._source = tokenizer.get_chat_template()
        self._variables: dict[str, Any] = tokenizer.special_tokens_map
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._ends = tuple({*special, *tokenizer.all_special_tokens})
        self.has_marks = "endgeneration" in self._source

    def marked(self, messages: list[Message]) -> tuple[str, list[Span | None]]:
        """The text, and what lies between the template's marks, each up to its end-of-turn token."""
        text, [marks] = self._render(messages, marks=True)
        ends = [self._end_of_turn(text, end) for _, end in marks]
        spans = [None if end is None else Span(start, end) for (start, _), end in zip(marks, ends, strict=True)]
        return text, spans

    def compared(self, messages: list[Message], answers: list[int]) -> tuple[str, list[Span | None]]:
        """The text, and what of it changes with each of the ``answers``; None for one that cannot be told."""
        text, _ = self._render(messages)
        return text, [self._turn(messages, index, text) for index in answers]

    def _turn(self, messages: list[Message], index: int, text: str) -> Span | None:
        """Where the answer at ``index`` lies in ``text``, by rendering a word in its place."""
        question, answer = _unused_words(text)
        if index == 0:
            return None
        replaced = {"role": "assistant", "content": answer}
        before, *others = self._render([*messages[:index], replaced, *messages[index + 1 :]])[0].split(answer)
        asked = [*messages[: index - 1], {**messages[index - 1], "content": question}]
        # Between question and answer: as it is shown to the target that has to answer, and as it stands afterwards.
        _, *prompt = self._render(asked, prompt=True)[0].split(question)
        _, *shown = self._render([*asked, replaced, *messages[index + 1 :]])[0].split(question)
        if not len(others) == len(prompt) == len(shown) == 1:
            return None
        (after,), (prompt_text,), header = others, prompt, shown[0].partition(answer)[0]
        given = min(prompt_text, header, key=len)
        if not prompt_text.startswith(given) or not header.startswith(given):
            return None
        start = len(before) - len(header) + len(given)
        end = self._end_of_turn(after, 0)
        if end is None or not text.startswith(before[:start]) or not text.endswith(after[end:]):
            return None
        # What the prompt opens and the template shows only beside some answers, such as "<think>", was given, too.
        opened = prompt_text[len(given) :]
        span = Span(start + len(opened) * text.startswith(opened, start), len(text) - len(after) + end)
        return span if span.start < span.end and text.endswith(self._ends, 0, span.end) else None

    def _end_of_turn(self, text: str, end: int) -> int | None:
        """The end of the special token with which ``text[:end]`` ends, or which follows, white space apart."""
        written = text[:end].rstrip()
        if written.endswith(self._ends):
            return len(written)
        rest = text[end:].lstrip()
        mark = max((mark for mark in self._ends if rest.startswith(mark)), key=len, default=None)
        return None if mark is None else len(text) - len(rest) + len(mark)

    def _render(
        self, messages: list[Message], *, prompt: bool = False, marks: bool = False
    ) -> tuple[str, list[list[tuple[int, int]]]]:
        """The text of ``messages`` and, if asked for, its marks."""
        try:
            rendered: Any = render_jinja_template(  # which declares a text
                [messages],
                chat_template=self._source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=prompt,
                **self._variables,
            )
        except TemplateError as error:
            raise Refused(f"{REFUSING} ({error})") from None
        [text], found = rendered
        return text, found


def _unused_words(text: str) -> tuple[str, str]:
    """Two words that do not occur in ``text``, nor in each other."""
    number = next(number for number in itertools.count() if f"q{number}q" not in text and f"a{number}a" not in text)
    return f"q{number}q", f"a{number}a"
