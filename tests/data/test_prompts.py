"""From rows to conversations: what is asked, what is refused by name, and every mistake told with its place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from eagle3.configs.errors import UserError
from eagle3.configs.settings import PrepareSettings
from eagle3.data import prompts
from eagle3.data.conversations import SPLITS, Conversation
from eagle3.data.corpus import RESEMBLES_HELD_OUT, Function, split_of
from eagle3.data.prompts import UNUSED, library_prompts, read_prompts
from eagle3.data.sources import rows

BENCHMARKS = Path(__file__).parents[2].parent / "shared" / "benchmarks"
COUNTS = {"gsm8k": 1319, "humaneval": 164, "math500": 500, "mbpp": 257, "mt-bench": 80, "spec-bench": 480}
TWO_TURNS = {"mt-bench": 80, "spec-bench": 80}


def write(folder: Path, *rows: object) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path | str, **values: object) -> tuple[list[Conversation], Counter[str]]:
    notes: Counter[str] = Counter()
    settings = PrepareSettings(prompts=str(path), **values)
    return [found.conversation for found in read_prompts(settings, rows(settings), notes)], +notes


def test_columns_and_labels(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "One?"},
        {"id": 7, "source": "bench", "split": "test", "turns": ["Two?", "And then?"]},
        {"id": "m", "split": "train", "category": "maths", "system": "Be brief.", "messages": [
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": "3"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]},
        "",
        {"id": "s", "split": "train", "conversations": [
            {"from": "human", "value": "Four?"},
            {"from": "gpt", "value": "4"},
        ]},
    )  # fmt: skip
    found, notes = load(path)
    by_id = {c.id: c for c in found}
    assert by_id["7"].messages == [{"role": "user", "content": "Two?"}]
    assert by_id["7"].follow_ups == ("And then?",)
    assert (by_id["7"].source, by_id["7"].split) == ("bench", "test")
    assert [m["role"] for m in by_id["m"].messages] == ["system", "user"]
    assert (by_id["m"].follow_ups, by_id["m"].source) == (("Sure?",), "maths")
    assert by_id["s"].messages == [{"role": "user", "content": "Four?"}]
    (unnamed,) = by_id.keys() - {"7", "m", "s"}
    assert by_id[unnamed].source == "mine"
    assert by_id[unnamed].split in SPLITS
    assert notes == {UNUSED: 3}


def test_the_column_that_is_asked_for(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"question": "One?", "prompt": "Not this.", "messages": [{"role": "user", "content": "Two?"}]}
    )
    for column, text in (("question", "One?"), ("messages", "Two?")):
        [conversation], _ = load(path, column=column)
        assert conversation.messages == [{"role": "user", "content": text}]
    with pytest.raises(UserError, match="it holds messages and prompt; say with prepare.column which one is asked"):
        load(path)
    with pytest.raises(UserError, match='it holds no "answer" but question, prompt, messages; set prepare.column to'):
        load(path, column="answer")


def test_ids_and_splits_do_not_depend_on_the_order(tmp_path: Path) -> None:
    lines = [{"prompt": f"Question {i}?"} for i in range(200)]
    (forward, _), (backward, _) = load(write(tmp_path, *lines)), load(write(tmp_path, *lines[::-1]))
    assert {c.id: c for c in forward} == {c.id: c for c in backward}
    shares = [sum(c.split == split for c in forward) for split in SPLITS]
    assert shares[0] > 130 and min(shares) > 5


def test_questions_that_follow_make_another_conversation(tmp_path: Path) -> None:
    found, _ = load(write(tmp_path, {"turns": ["One?"]}, {"turns": ["One?", "Two?"]}, {"turns": ["One?", "Three?"]}))
    assert len({c.id for c in found}) == 3


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ({}, "it holds none of messages, conversations, prompt, turns but nothing; say with prepare.column"),
        ({"promt": "a"}, "it holds none of messages, conversations, prompt, turns but promt; say"),
        ({"prompt": "a", "turns": ["b"]}, "it holds prompt and turns; say with prepare.column which one"),
        ({"prompt": 3}, 'its "prompt" is 3; write a question, a list of questions, or a list of messages'),
        ({"turns": ["a", 3]}, "a question is 3; write it as a text"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, 'a message is "b"; write a list of messages'),
        ({"prompt": "a", "id": 1.5}, 'its "id" is 1.5; write a string or an integer'),
        ({"prompt": "a", "id": True}, 'its "id" is true'),
        ({"prompt": "a", "source": 3}, 'its "source" is 3; write a string'),
        ({"prompt": "a", "split": "dev"}, 'its "split" is "dev"; write one of train, validation, test'),
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, row: object, complaint: str) -> None:
    path = write(tmp_path, {"id": "first", "prompt": "Fine."}, "", row, {"prompt": "Fine, too."})
    with pytest.raises(UserError, match=complaint) as caught:
        load(path)
    assert str(caught.value).startswith(f"prepare.prompts = {path}, line 3: ")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_asked_is_counted_by_reason(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    picture = {
        "role": "user",
        "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": "x"}],
    }
    path = write(
        tmp_path,
        {"prompt": "Fine."},
        {"prompt": " "},
        {"turns": []},
        {"turns": ["One?", ""]},
        {"messages": [picture]},
        {"messages": [user], "images": ["x.png"]},
        {"messages": [user], "tools": [{"type": "function"}]},
        {"messages": [user, assistant, assistant]},
        {"messages": [assistant, user]},
        {"conversations": [{"from": "human", "value": "?"}, {"from": "critic", "value": "!"}]},
    )
    found, notes = load(path)
    assert len(found) == 1
    assert notes == {
        "conversations: a question is empty": 2,
        "conversations: the user asks nothing": 1,
        'conversations: a message has a part of type "image_url"': 1,
        "conversations: it is about images, and not text alone": 1,
        'conversations: it offers "tools", whose definitions are not kept': 1,
        'conversations: "assistant" follows "assistant"': 1,
        'conversations: "assistant" comes first': 1,
        'conversations: a message has the role "critic"': 1,
    }


@pytest.mark.parametrize(
    ("lines", "why"), [([], "it is empty"), (["", " "], "it is empty"), ([{"prompt": ""}], "a question is empty: 1")]
)
def test_a_file_without_conversations(tmp_path: Path, lines: list[object], why: str) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(
        UserError, match=f"it holds no conversation that can be asked \\({why}\\); give rows such as"
    ) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", COUNTS)
def test_benchmarks(name: str) -> None:
    path = BENCHMARKS / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("../shared/benchmarks is not there")
    found, notes = load(path)
    assert len(found) == COUNTS[name] and not notes
    assert all([m["role"] for m in c.messages] == ["user"] for c in found)
    assert sum(bool(c.follow_ups) for c in found) == TWO_TURNS.get(name, 0)
    if name == "spec-bench":
        assert {"writing", "translation", "summarization", "qa", "math_reasoning", "rag"} <= {c.source for c in found}
    else:
        assert {c.source for c in found} == {name}


def test_every_benchmark_is_one_of_those() -> None:
    if not BENCHMARKS.exists():
        pytest.skip("../shared/benchmarks is not there")
    assert {path.name for path in BENCHMARKS.iterdir()} == {f"{name}.jsonl" for name in COUNTS}
    found, _ = load(BENCHMARKS)
    assert len(found) == sum(COUNTS.values())


def function(module: str, name: str, words: str) -> Function:
    body = f"def {name}(value):\n" + "".join(f"    value = {word}(value)\n" for word in words.split())
    return Function(module, name, f"def {name}(value):", f"Return what {words} make of it, step by step.", body)


def test_training_functions_that_resemble_held_out_ones_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [f"module{i}" for i in range(60)]
    train = [m for m in modules if split_of(m) == "train"]
    test = [m for m in modules if split_of(m) == "test"]
    steps = "open read parse check scale round store close"
    other = "begin fetch split merge count order print end"
    everything = [function(train[0], "a", steps), function(test[0], "b", steps), function(train[1], "c", other)]
    monkeypatch.setattr(prompts, "standard_library", list)
    monkeypatch.setattr(prompts, "functions", lambda files: iter(everything))
    notes: Counter[str] = Counter()
    found = [one.conversation for one in library_prompts(notes)]
    assert notes == {RESEMBLES_HELD_OUT: 1}
    assert {c.id.split(":")[1] for c in found} == {"b", "c"}
    assert {c.id.split(":")[1] for c in found if c.split == "test"} == {"b"}
