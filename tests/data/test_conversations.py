"""Prompt files: every form that is taken, and every mistake told with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eagle3.configs.errors import UserError
from eagle3.data import conversations
from eagle3.data.answers import read_answers, read_finished
from eagle3.data.conversations import SPLITS, load_prompts
from eagle3.data.corpus import RESEMBLES_HELD_OUT, Function, split_of


def write(folder: Path, *rows: object) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_forms(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": "One?"},
        {"id": 7, "source": "bench", "split": "test", "turns": ["Two?", "And then?"]},
        {"id": "m", "split": "train", "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Three?"},
            {"role": "assistant", "content": "3"},
        ]},
        "",
    )  # fmt: skip
    prompts = load_prompts(path)
    by_id = {c.id: c for c in prompts.conversations}
    assert by_id["7"].messages == [{"role": "user", "content": "Two?"}]
    assert (by_id["7"].source, by_id["7"].split) == ("bench", "test")
    assert [m["role"] for m in by_id["m"].messages] == ["system", "user"]
    (unnamed,) = by_id.keys() - {"7", "m"}
    assert by_id[unnamed].source == "mine"
    assert by_id[unnamed].split in SPLITS
    assert prompts.notes == {conversations.FIRST_TURN: 1, conversations.REFERENCE: 1}


def test_ids_and_splits_do_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?"} for i in range(200)]
    forward, backward = load_prompts(write(tmp_path, *rows)), load_prompts(write(tmp_path, *rows[::-1]))
    assert {c.id: c for c in forward.conversations} == {c.id: c for c in backward.conversations}
    shares = [sum(c.split == split for c in forward.conversations) for split in SPLITS]
    assert shares[0] > 130 and min(shares) > 5


def test_of_repeated_messages_the_held_out_copy_stays(tmp_path: Path) -> None:
    rows = [
        {"id": i, "split": split, "prompt": "Same?"} for i, split in enumerate(("train", "test", "validation", "test"))
    ]
    prompts = load_prompts(write(tmp_path, *rows))
    assert [(c.id, c.split) for c in prompts.conversations] == [("1", "test")]
    assert prompts.notes[conversations.REPEATED] == 3


USER, ASSISTANT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ({}, r'it holds none of "messages", "prompt", "turns"; give exactly one'),
        ({"prompt": "a", "turns": ["b"]}, "give exactly one of them"),
        ({"prompt": " "}, 'its "prompt" is empty'),
        ({"prompt": 3}, 'its "prompt" is empty or not a string'),
        ({"turns": []}, 'its "turns" are not a list of questions'),
        ({"turns": ["a", ""]}, "none of them empty"),
        ({"messages": "hello"}, 'its "messages" are not a list'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "a message has no role out of system, user, assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not a string; write text only"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "two assistant messages follow each other; join them"),
        ({"messages": [ASSISTANT]}, "there is no user message to answer"),
        ({"messages": [USER, ASSISTANT, {"role": "system", "content": "x"}]}, "there is no user message to answer"),
        ({"prompt": "a", "id": 1.5}, 'its "id" is 1.5; write a string or an integer'),
        ({"prompt": "a", "id": True}, 'its "id" is true'),
        ({"prompt": "a", "source": 3}, 'its "source" is 3; write a string'),
        ({"prompt": "a", "split": "dev"}, 'its "split" is "dev"; write one of train, validation, test'),
        ({"prompt": "a", "id": "first"}, 'its id "first" is that of line 1; give every line another id'),
        ('{"prompt": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, row: object, complaint: str) -> None:
    path = write(tmp_path, {"id": "first", "prompt": "Fine."}, "", row, {"prompt": "Fine, too."})
    with pytest.raises(UserError, match=complaint) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"prepare.prompts = {path}, line 3: ")
    assert "\n" not in str(caught.value)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        load_prompts(path)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match='it holds no conversation; write lines such as {"prompt": "..."} to it'):
        load_prompts(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it cannot be read \(No such file or directory\); check the path"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"it cannot be read \(Is a directory\)"):
        load_prompts(tmp_path)


def test_a_line_that_this_project_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine.jsonl, line 1: it holds \['id'\] and not"):
        read_answers(write(tmp_path, {"id": "a"}))


def test_an_answer_with_a_token_the_target_lacks(run_dir: Path) -> None:
    path = run_dir / "conversations" / "answers.jsonl"
    row, *rest = path.read_text().splitlines(keepends=True)
    assert len(read_finished(path.parent, 1000)) == 24
    path.write_text("".join([row.replace('"ids": [', '"ids": [1000, '), *rest]))
    with pytest.raises(UserError, match="its token 1000 is beyond the target's vocabulary of 1000; delete"):
        read_finished(path.parent, 1000)


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
    monkeypatch.setattr(conversations, "standard_library", list)
    monkeypatch.setattr(conversations, "functions", lambda files: iter(everything))
    prompts = conversations.library_prompts()
    assert prompts.notes[RESEMBLES_HELD_OUT] == 1
    assert {c.id.split(":")[1] for c in prompts.conversations} == {"b", "c"}
    assert {c.id.split(":")[1] for c in prompts.conversations if c.split == "test"} == {"b"}
