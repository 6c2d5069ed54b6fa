"""What the stages read of each other: prompts and answers on disk."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from eagle3.configs.errors import UserError
from eagle3.data.answers import Answer, read_answers, read_finished
from eagle3.data.conversations import Conversation, read_conversations
from eagle3.data.files import encode_line


def write(folder: Path, *rows: object) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_conversations_come_back_as_they_were_written(tmp_path: Path) -> None:
    asked = [
        Conversation("a", "s", "train", [{"role": "user", "content": "One?"}]),
        Conversation("b", "s", "test", [{"role": "user", "content": "One?"}], ("And two?", "And three?")),
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"".join(encode_line(conversation._asdict()) for conversation in asked))
    assert list(read_conversations(path)) == asked


def test_a_line_that_this_project_did_not_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mine.jsonl, line 1: it holds \['id'\] and not"):
        read_answers(write(tmp_path, {"id": "a"}))


def test_answers_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    """In the order of the prompts, wherever their lines stand; of two to one prompt the later counts."""
    names = [f"{number}{number * '你'}" for number in range(9)]
    prompts = [Conversation(name, "s", "train", [{"role": "user", "content": name}]) for name in names]
    (tmp_path / "prompts.jsonl").write_bytes(b"".join(encode_line(prompt._asdict()) for prompt in prompts))
    made = [Answer(name, "ß", "train", 0.7, [*range(len(name), 30)], [[1, 2]], "stop", True) for name in names]
    lines = [encode_line(answer._asdict()) for answer in [made[3]._replace(ids=[1]), *made[::-1]]]
    (tmp_path / "answers.jsonl").write_bytes(b"\n \n".join(lines))
    found = read_finished(tmp_path, 1000)
    assert list(found) == made == [found[number] for number in range(-9, 0)]
    assert list(found[2:7:3]) == made[2:7:3]
    assert found.lengths.tolist() == [len(answer.ids) for answer in made]
    by_id = {answer.id: answer for answer in read_answers(tmp_path / "answers.jsonl")}
    assert [by_id[name] for name in names] == list(found)
    with pytest.raises(IndexError):
        found[9]


def test_answers_that_are_not_looked_at_take_no_memory(tmp_path: Path) -> None:
    count, ids = 500, [*range(1000, 1500)]
    with (tmp_path / "prompts.jsonl").open("wb") as prompts, (tmp_path / "answers.jsonl").open("wb") as answers:
        for number in range(count):
            asked = Conversation(f"{number:016x}", "s", "train", [{"role": "user", "content": "word " * 200}])
            prompts.write(encode_line(asked._asdict()))
            answers.write(encode_line(Answer(*asked[:3], 0.7, ids, [[200, 500]], "stop", True)._asdict()))
    tracemalloc.start()
    found = read_finished(tmp_path, 2000)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == count
    assert held < 30 * count + 20_000  # 20 bytes each; as objects an answer of 500 tokens takes 22,000
    assert peak < 400 * count + 200_000


def test_the_file_is_closed_with_the_answers(run_dir: Path) -> None:
    def files() -> set[str]:
        return {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}

    path = run_dir / "conversations" / "answers.jsonl"
    found = read_finished(path.parent, 1000)
    some = found[:3]
    del found
    assert str(path) in files() and len(some) == 3
    del some
    assert str(path) not in files()


def test_an_answer_with_a_token_the_target_lacks(run_dir: Path) -> None:
    path = run_dir / "conversations" / "answers.jsonl"
    row, *rest = path.read_text().splitlines(keepends=True)
    assert len(read_finished(path.parent, 1000)) == 24
    path.write_text("".join([row.replace('"ids": [', '"ids": [1000, '), *rest]))
    with pytest.raises(UserError, match="its token 1000 is beyond the target's vocabulary of 1000; delete"):
        read_finished(path.parent, 1000)
