"""What the stages read of each other: prompts and answers on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from eagle3.configs.errors import UserError
from eagle3.data.answers import read_answers, read_finished
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
    assert read_conversations(path) == asked


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
