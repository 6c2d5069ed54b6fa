"""Choosing conversations out of more than fit into memory, in one pass.

Those of a split are dealt evenly over their sources, and those of a source in the order of a hash of their ids. Which ones
are the first N to be dealt can be told as they come by: with N in hand, the last in the order of dealing is let go, and
whoever comes after it is never looked at. A repeated conversation is chosen once.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple, Protocol, TypeVar

from ..configs.errors import UserError
from .conversations import SPLITS, Conversation, Found
from .corpus import digest
from .spill import Spill

REPEATED = "conversations: same messages as another"
NOT_NEEDED = "conversations: more than were asked for"


class Placed(Protocol):
    """What can be dealt: it has a source, and a place among those of its source."""

    @property
    def source(self) -> str: ...
    @property
    def order(self) -> int: ...


P = TypeVar("P", bound=Placed)


def deal(conversations: Iterable[P]) -> Iterator[P]:
    """Yield conversations of each source in turn, those of a source in their order."""
    by_source: dict[str, list[P]] = {}
    for conversation in conversations:
        by_source.setdefault(conversation.source, []).append(conversation)
    hands = deque(iter(sorted(by_source[source], key=_order)) for source in sorted(by_source))
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
        spill: where those in hand are set aside; some 400 bytes of each are held.
    """

    def __init__(
        self,
        asked: Mapping[str, int],
        refusal: Callable[[Conversation], str | None],
        notes: Counter[str],
        spill: Spill,
    ) -> None:
        self._asked, self._refusal, self._notes, self._spill = asked, refusal, notes, spill
        # A few more than are asked for: a training copy of a test's conversation is thrown out when that comes by.
        self._hands = {split: _Hand(asked[split] and asked[split] * 9 // 8 + 64) for split in SPLITS}
        self._by_content: dict[bytes, _Held] = {}
        self._by_key: dict[int, _Held] = {}

    def offer(self, found: Found) -> None:
        """Look at one more.

        Raises:
            UserError: it has the id of another one.
        """
        new = found.conversation
        hand, key, content = self._hands[new.split], _key(new), _content(new)
        twin = self._by_content.get(content)
        if twin and _rank(twin.split, twin.key) <= _rank(new.split, key):
            self._notes[REPEATED] += 1
        elif not hand.has_room(new.source, key):
            self._notes[REPEATED if twin else NOT_NEEDED] += 1
        elif reason := self._refusal(new):
            self._notes[reason] += 1
        else:
            if twin:
                self._notes[REPEATED] += 1
                self._hands[twin.split].drop(twin)
                self._forget(twin)
            if other := self._by_key.get(key):
                problem = f'its id "{new.id}" is that of {self._spill.where(other.place)}'
                raise UserError("prepare.prompts", found.where, problem, "give every row another id, or none")
            held = _Held(key, self._spill.put(found), sys.intern(new.split), sys.intern(new.source), content)
            self._by_content[content] = self._by_key[key] = held
            if last := hand.take(held):
                self._notes[NOT_NEEDED] += 1
                self._forget(last)

    def chosen(self) -> dict[str, list[int]]:
        """The places in the spill of those of each split, in their order."""
        chosen: dict[str, list[int]] = {}
        for split, hand in self._hands.items():
            held = list(hand)
            dealt = list(islice(deal(held), self._asked[split]))
            self._notes[NOT_NEEDED] += len(held) - len(dealt)
            chosen[split] = [held.place for held in sorted(dealt, key=_order)]
        return chosen

    def _forget(self, held: _Held) -> None:
        del self._by_content[held.content], self._by_key[held.key]


class _Held(NamedTuple):
    """What is held of a conversation: enough to deal it, and to know it again."""

    key: int
    place: int
    split: str
    source: str
    content: bytes

    @property
    def order(self) -> int:
        return -self.key


class _Hand:
    """At most ``size`` conversations: those that :func:`deal` would yield first of all that were taken."""

    def __init__(self, size: int) -> None:
        self.size, self._held = size, 0
        self._sources: dict[str, list[_Held]] = {}  # heaps, the last in order on top
        self._lengths: Counter[str] = Counter()  # of them, without those that were dropped
        self._dropped: set[int] = set()  # the places of those that are in a heap still, though never on top
        self._longest: list[tuple[int, _Last]] = []  # heap of (-conversations, source); what no longer holds is skipped

    def __iter__(self) -> Iterator[_Held]:
        return (held for heap in self._sources.values() for held in heap if held.place not in self._dropped)

    def has_room(self, source: str, key: int) -> bool:
        """Whether a conversation of ``source`` would be kept if it were taken."""
        if self._held < self.size:
            return True
        if self.size == 0:
            return False
        longest, last = self._last_source()
        if (longest, last) > (self._lengths[source] + 1, source):
            return True
        return source in self._sources and key > self._sources[source][0].key

    def take(self, new: _Held) -> _Held | None:
        """Keep ``new``; returns the one that had to go for it, or None."""
        heapq.heappush(self._sources.setdefault(new.source, []), new)
        self._count(new.source, 1)
        if self._held <= self.size:
            return None
        _, source = self._last_source()
        last = self._sources[source][0]
        self.drop(last)
        return last

    def drop(self, held: _Held) -> None:
        """Let one go that was taken."""
        self._dropped.add(held.place)
        heap = self._sources[held.source]
        while heap and heap[0].place in self._dropped:
            self._dropped.remove(heapq.heappop(heap).place)
        self._count(held.source, -1)

    def _count(self, source: str, more: int) -> None:
        self._held += more
        self._lengths[source] += more
        if length := self._lengths[source]:
            heapq.heappush(self._longest, (-length, _Last(source)))
        else:
            del self._sources[source], self._lengths[source]

    def _last_source(self) -> tuple[int, str]:
        """The source whose last conversation is dealt last of all, and how many it has."""
        while self._lengths[self._longest[0][1]] != -self._longest[0][0]:
            heapq.heappop(self._longest)
        length, source = self._longest[0]
        return -length, str(source)


class _Last(str):
    """A text that sorts the other way round, so that a heap has the last one on top."""

    __slots__ = ()

    def __lt__(self, other: str) -> bool:
        return str.__gt__(self, other)


def _order(placed: Placed) -> int:
    return placed.order


def _key(conversation: Conversation) -> int:
    """Its order and another hash of its id, 128 bits that no two ids share; negative, so that a heap has the last on top."""
    return -(conversation.order << 64 | digest(f"id:{conversation.id}"))


def _content(conversation: Conversation) -> bytes:
    content = json.dumps([conversation.messages, conversation.follow_ups])
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def _rank(split: str, key: int) -> tuple[int, int]:
    """Of two copies the lower is kept: the test's, then validation's, then the first in order."""
    return -SPLITS.index(split), -key
