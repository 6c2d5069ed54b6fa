"""Choosing conversations out of more than fit into memory, in one pass.

Those of a split are dealt evenly over their sources, and those of a source in the order of a hash of their ids. Which ones
are the first N to be dealt can be told as they come by: with N in hand, the last in the order of dealing is let go, and
whoever comes after it is never looked at. A repeated conversation is chosen once.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

from ..configs.errors import UserError
from .conversations import SPLITS, Conversation, Found
from .corpus import digest
from .files import sha256

REPEATED = "conversations: same messages as another"
NOT_NEEDED = "conversations: more than were asked for"


def order(conversation: Conversation) -> int:
    """The place of a conversation among those of its source."""
    return digest(f"order:{conversation.id}")


def deal(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    """Yield conversations of each source in turn, those of a source in the order of a hash of their ids."""
    by_source: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        by_source.setdefault(conversation.source, []).append(conversation)
    hands = deque(iter(sorted(by_source[source], key=order)) for source in sorted(by_source))
    while hands:
        hand = hands.popleft()
        if (dealt := next(hand, None)) is not None:
            hands.append(hand)
            yield dealt


class Choice:
    """The first ``asked[split]`` conversations of each split that would be dealt.

    Args:
        asked: how many of each split.
        refusal: why a conversation may not be chosen, or None; only asked about those that otherwise would be.
        notes: counts what is left out, by reason.
    """

    def __init__(
        self, asked: Mapping[str, int], refusal: Callable[[Conversation], str | None], notes: Counter[str]
    ) -> None:
        self._asked, self._refusal, self._notes = asked, refusal, notes
        # A few more than are asked for: a training copy of a test's conversation is thrown out when that comes by.
        self._hands = {split: _Hand(asked[split] and asked[split] * 9 // 8 + 64) for split in SPLITS}
        self._by_content: dict[str, Conversation] = {}
        self._where: dict[str, str] = {}

    def offer(self, found: Found) -> None:
        """Look at one more.

        Raises:
            UserError: it has the id of another one.
        """
        new = found.conversation
        hand, content = self._hands[new.split], _content(new)
        twin = self._by_content.get(content)
        if twin and _rank(twin) <= _rank(new):
            self._notes[REPEATED] += 1
        elif not hand.has_room(new):
            self._notes[REPEATED if twin else NOT_NEEDED] += 1
        elif reason := self._refusal(new):
            self._notes[reason] += 1
        else:
            if twin:
                self._notes[REPEATED] += 1
                self._hands[twin.split].drop(twin)
                self._forget(twin)
            if new.id in self._where:
                problem = f'its id "{new.id}" is that of {self._where[new.id]}'
                raise UserError("prepare.prompts", found.where, problem, "give every row another id, or none")
            self._by_content[content], self._where[new.id] = new, found.where
            if last := hand.take(new):
                self._notes[NOT_NEEDED] += 1
                self._forget(last)

    def chosen(self) -> list[Conversation]:
        """Split after split, each in the order of a hash of the ids."""
        chosen: list[Conversation] = []
        for split, hand in self._hands.items():
            held = list(hand)
            dealt = list(islice(deal(held), self._asked[split]))
            self._notes[NOT_NEEDED] += len(held) - len(dealt)
            chosen += sorted(dealt, key=order)
        return chosen

    def _forget(self, conversation: Conversation) -> None:
        del self._by_content[_content(conversation)], self._where[conversation.id]


class _Hand:
    """At most ``size`` conversations: those that :func:`deal` would yield first of all that were taken."""

    def __init__(self, size: int) -> None:
        self.size, self._held = size, 0
        self._sources: dict[str, list[tuple[int, str, Conversation]]] = {}  # heaps, the last in order on top
        self._longest: list[tuple[int, _Last]] = []  # heap of (-conversations, source); what no longer holds is skipped

    def __iter__(self) -> Iterator[Conversation]:
        return (entry[-1] for heap in self._sources.values() for entry in heap)

    def has_room(self, new: Conversation) -> bool:
        """Whether ``new`` would be kept if it were taken."""
        if self._held < self.size:
            return True
        if self.size == 0:
            return False
        heap = self._sources.get(new.source, [])
        longest, source = self._last_source()
        if (longest, source) > (len(heap) + 1, new.source):
            return True
        return bool(heap) and order(new) < -heap[0][0]

    def take(self, new: Conversation) -> Conversation | None:
        """Keep ``new``; returns the one that had to go for it, or None."""
        heapq.heappush(self._sources.setdefault(new.source, []), (-order(new), new.id, new))
        self._held += 1
        self._note_length(new.source)
        if self._held <= self.size:
            return None
        _, source = self._last_source()
        *_, last = heapq.heappop(self._sources[source])
        self._held -= 1
        self._note_length(source)
        return last

    def drop(self, conversation: Conversation) -> None:
        """Let one go that was taken."""
        heap = self._sources[conversation.source]
        heap.remove((-order(conversation), conversation.id, conversation))
        heapq.heapify(heap)
        self._held -= 1
        self._note_length(conversation.source)

    def _note_length(self, source: str) -> None:
        if length := len(self._sources[source]):
            heapq.heappush(self._longest, (-length, _Last(source)))
        else:
            del self._sources[source]

    def _last_source(self) -> tuple[int, str]:
        """The source whose last conversation is dealt last of all, and how many it has."""
        while len(self._sources.get(self._longest[0][1], ())) != -self._longest[0][0]:
            heapq.heappop(self._longest)
        length, source = self._longest[0]
        return -length, str(source)


class _Last(str):
    """A text that sorts the other way round, so that a heap has the last one on top."""

    __slots__ = ()

    def __lt__(self, other: str) -> bool:
        return str.__gt__(self, other)


def _content(conversation: Conversation) -> str:
    return sha256(json.dumps([conversation.messages, conversation.follow_ups]).encode())


def _rank(conversation: Conversation) -> tuple[int, int]:
    """Of two copies the lower is kept: the test's, then validation's, then the first in order."""
    return -SPLITS.index(conversation.split), order(conversation)
