"""One pass with bounded memory chooses what sorting everything would."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import pytest
from eagle3.configs.errors import UserError
from eagle3.data.choice import NOT_NEEDED, REPEATED, Choice, deal
from eagle3.data.conversations import SPLITS, Conversation, Found, from_row
from eagle3.data.files import encode_line
from eagle3.data.spill import Spill

ASKED = {"train": 40, "validation": 3, "test": 5}
BORING = "boring"


order_of = attrgetter("order")


def place_of(name: str) -> int:
    return Conversation(name, "", "", []).order


def rank(conversation: Conversation) -> tuple[int, int]:
    """Of two copies the lower is kept."""
    return -SPLITS.index(conversation.split), conversation.order


def make(number: int, split: str, source: str, text: str = "") -> Conversation:
    return Conversation(f"id {number}", source, split, [{"role": "user", "content": text or f"Question {number}?"}])


def refusal(conversation: Conversation) -> str | None:
    return BORING if conversation.order % 5 == 0 else None


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[Spill]:
    with Spill(tmp_path) as spill:
        yield spill


def chosen_of(choice: Choice, spill: Spill) -> list[Conversation]:
    return [from_row(json.loads(spill.line(place))) for places in choice.chosen().values() for place in places]


def choose(
    spill: Spill, conversations: list[Conversation], asked: dict[str, int] = ASKED
) -> tuple[list[Conversation], Counter[str]]:
    notes: Counter[str] = Counter()
    choice = Choice(asked, refusal, notes, spill)
    for conversation in conversations:
        choice.offer(Found(conversation, f"row {conversation.id}"))
    return chosen_of(choice, spill), +notes


def plainly(conversations: list[Conversation], asked: dict[str, int] = ASKED) -> list[Conversation]:
    """The same, from a list of everything."""
    chosen: list[Conversation] = []
    for split in SPLITS:
        found = [c for c in conversations if c.split == split and refusal(c) is None]
        chosen += sorted(itertools.islice(deal(found), asked[split]), key=order_of)
    return chosen


@pytest.mark.parametrize("sources", [1, 3, 30, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_chooses_what_sorting_everything_would(spill: Spill, sources: int, seed: int) -> None:
    draw = random.Random(seed)
    found = [
        make(
            number,
            draw.choices(SPLITS, (8, 1, 1))[0],
            f"source {min(draw.randrange(sources), draw.randrange(sources))}",
        )
        for number in range(1500)
    ]
    chosen, notes = choose(spill, found)
    assert chosen == plainly(found)
    assert Counter(c.split for c in chosen) == ASKED
    assert set(notes) == {BORING, NOT_NEEDED}
    assert notes.total() + len(chosen) == len(found)
    draw.shuffle(found)
    assert choose(spill, found)[0] == chosen


@pytest.mark.parametrize("seed", range(4))
def test_with_repeated_ones_it_chooses_what_sorting_the_others_would(spill: Spill, seed: int) -> None:
    draw = random.Random(seed)
    found = [
        make(number, draw.choices(SPLITS, (8, 1, 1))[0], f"source {draw.randrange(3)}", f"{draw.randrange(900)}?")
        for number in range(1000)
    ]
    asked = {"train": 400, "validation": 30, "test": 30}
    kept: dict[str, Conversation] = {}
    for new in found:
        kept[text] = min(kept.get(text := new.messages[0]["content"], new), new, key=rank)
    notes: Counter[str] = Counter()
    choice = Choice(asked, lambda conversation: None, notes, spill)
    for conversation in found:
        choice.offer(Found(conversation, ""))
    expected: list[Conversation] = []
    for split in SPLITS:
        expected += sorted(
            itertools.islice(deal(c for c in kept.values() if c.split == split), asked[split]), key=order_of
        )
    assert chosen_of(choice, spill) == expected
    assert notes.total() + len(expected) == len(found) and notes[REPEATED] > 300


def test_no_more_is_held_or_looked_at_than_is_needed(spill: Spill) -> None:
    looked_at: list[str] = []
    notes: Counter[str] = Counter()
    choice = Choice({"train": 100, "validation": 0, "test": 0}, lambda c: looked_at.append(c.id), notes, spill)
    for number in range(20_000):
        choice.offer(Found(make(number, "train", f"source {number}"), ""))
        assert len(choice._by_key) <= 200
    assert len(chosen_of(choice, spill)) == 100
    assert len(looked_at) < 4_000
    assert notes == {NOT_NEEDED: 19_900}


def test_what_is_in_hand_is_set_aside(tmp_path: Path) -> None:
    """A conversation of 20,000 characters takes no more memory than one of 20, and no file has a name."""
    count = 1_000
    with Spill(tmp_path / "run" / "conversations") as spill:
        choice = Choice({"train": count, "validation": 0, "test": 0}, lambda conversation: None, Counter(), spill)
        tracemalloc.start()
        for number in range(count):
            choice.offer(Found(make(number, "train", "s", f"{number} " * 5_000), f"mine.jsonl, line {number}"))
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 600 * count
        assert list(tmp_path.iterdir()) == []
        assert [c.id for c in chosen_of(choice, spill)] == sorted((f"id {n}" for n in range(count)), key=place_of)


def test_a_place_says_where_the_conversation_stood(spill: Spill) -> None:
    whole = Conversation("a", "ß", "train", [{"role": "user", "content": "\n你\u2028\r"}], ("b",))
    places = [spill.put(Found(whole._replace(id=name), f"{name}\udcff, line 3")) for name in "abc"]
    assert [spill.where(place) for place in places] == [f"{name}\udcff, line 3" for name in "abc"]
    assert spill.line(places[1]) == encode_line(whole._replace(id="b")._asdict())
    assert spill.where(spill.put(Found(whole, "d"))) == "d"


def test_of_repeated_messages_the_held_out_copy_stays(spill: Spill) -> None:
    names = ("train", "test", "validation", "test")
    copies = [make(number, split, "s", "Same?") for number, split in enumerate(names)]
    expected = min((c for c in copies if c.split == "test"), key=order_of)
    notes: Counter[str] = Counter()
    for copies_in_order in itertools.permutations(copies):
        notes.clear()
        choice = Choice(ASKED, lambda conversation: None, notes, spill)
        for copy in copies_in_order:
            choice.offer(Found(copy, ""))
        assert chosen_of(choice, spill) == [expected]
        assert +notes == {REPEATED: 3}


def test_a_training_copy_that_is_thrown_out_is_replaced(spill: Spill) -> None:
    notes: Counter[str] = Counter()
    choice = Choice(ASKED, lambda conversation: None, notes, spill)
    train = [make(number, "train", "s") for number in range(500)]
    for conversation in train:
        choice.offer(Found(conversation, ""))
    copied = min(train, key=order_of)
    choice.offer(Found(make(1000, "test", "s", copied.messages[0]["content"]), ""))
    chosen = chosen_of(choice, spill)
    assert Counter(c.split for c in chosen) == {"train": 40, "test": 1}
    assert chosen[:40] == sorted(train, key=order_of)[1:41]


def test_follow_ups_make_a_conversation_another_one(spill: Spill) -> None:
    chosen, notes = choose(spill, [make(n, "train", "s", "Same?")._replace(follow_ups=(f"{n}?",)) for n in (1, 2, 3)])
    assert len(chosen) + notes[BORING] == 3 and REPEATED not in notes


def test_an_id_that_is_anothers(spill: Spill) -> None:
    choice = Choice(ASKED, lambda conversation: None, Counter(), spill)
    choice.offer(Found(make(1, "train", "s", "One?"), "mine.jsonl, line 1"))
    with pytest.raises(
        UserError, match='prepare.prompts = mine.jsonl, line 3: its id "id 1" is that of mine.jsonl, line 1'
    ):
        choice.offer(Found(make(1, "test", "s", "Two?"), "mine.jsonl, line 3"))


def test_deal_ends_when_all_are_dealt() -> None:
    hands = [Conversation(f"{source}{i}", source, "train", []) for source in "ab" for i in range(3)]
    assert sorted(c.id for c in deal(hands)) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert [c.source for c in deal(hands)] == ["a", "b"] * 3
