"""Questions are made when it is their turn, and are the same as if all had been made at once."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from eagle3.configs.settings import Settings
from eagle3.data.chat import prompt_ids
from eagle3.data.conversations import Conversation, read_conversations
from eagle3.data.dialogue import Question
from eagle3.data.files import encode_line
from eagle3.data.questions import ask, plan
from eagle3.models.target import Target, TargetText

PROMPTS = Path("conversations/prompts.jsonl")


def plainly(settings: Settings, prompts: Path, text: TargetText) -> list[Question]:
    """The same, all in memory."""
    made, training = list[Question](), 0
    for conversation in read_conversations(prompts):
        if conversation.given:
            continue
        trains, heats = conversation.split == "train", settings.regenerate.temperatures
        heat = heats[training % len(heats)] if trains else 0.0
        training += trains
        made.append(Question(conversation, prompt_ids(text.tokenizer, conversation), heat, settings.run.seed))
    return made


def write(path: Path, conversations: list[Conversation]) -> Path:
    path.write_bytes(b"\n".join(encode_line(conversation._asdict()) for conversation in conversations))
    return path


def make(number: int, **values: object) -> Conversation:
    asked = [{"role": "user", "content": f"{number % 7 * 'why '}{number}? \u4f60"}]
    return Conversation(f"{number:016x}", "s", "train" if number % 3 else "test", asked)._replace(**values)


def test_they_are_those_that_would_be_made_at_once(recipe: Settings, tiny_target: Target, tmp_path: Path) -> None:
    given = {"follow_ups": ("And?",), "given": ({"role": "assistant", "content": "So."},) * 2}
    made = [
        make(number, **(given if number % 5 == 4 else {"follow_ups": ("And?",) * (number % 2)})) for number in range(40)
    ]
    path = write(tmp_path / "prompts.jsonl", made)
    found, expected = ask(recipe, path, tiny_target.text), plainly(recipe, path, tiny_target.text)
    assert len(found) == len(expected) == 32
    assert list(found) == expected == [found[row] for row in range(-32, 0)]
    assert list(found[3:20:5]) == expected[3:20:5]
    assert list(found.chosen([7, 2])) == [expected[7], expected[2]]
    assert list(found.ids()) == [question.conversation.id for question in expected]
    assert found.lengths.tolist() == [len(question.prompt_ids) for question in expected]
    with pytest.raises(IndexError):
        found[32]


def test_batches_are_a_partition_by_length(finished: Path, recipe: Settings, tiny_target: Target) -> None:
    questions = ask(recipe, finished / PROMPTS, tiny_target.text)
    batches = [list(batch) for batch in plan(questions, 7)]
    assert [len(batch) for batch in batches] == [7, 7, 7, 3]
    expected = sorted(questions, key=lambda question: (len(question.prompt_ids), question.conversation.id))
    assert [question for batch in batches for question in batch] == expected
    assert [list(batch) for batch in plan(questions[::-1], 7)] == batches


def test_questions_that_are_not_looked_at_take_no_memory(recipe: Settings, tiny_target: Target, tmp_path: Path) -> None:
    count, long = 500, [{"role": "user", "content": "word " * 60}]
    path = write(tmp_path / "prompts.jsonl", [make(number, messages=long) for number in range(count)])
    list(ask(recipe, write(tmp_path / "one.jsonl", [make(0)]), tiny_target.text))  # what is made once for all
    tracemalloc.start()
    found = ask(recipe, path, tiny_target.text)
    held, peak = tracemalloc.get_traced_memory()
    for batch in plan(found, 50):
        assert len(batch) == 50
    planned = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == count
    assert held < 40 * count + 20_000  # 28 bytes each; as objects a question of 300 tokens takes some 10,000
    assert peak < 60 * count + 200_000
    assert planned < 300 * count + 200_000


def test_the_file_is_closed_with_the_questions(finished: Path, recipe: Settings, tiny_target: Target) -> None:
    def open_files() -> int:
        return sum(os.path.realpath(link) == str(finished / PROMPTS) for link in Path("/proc/self/fd").iterdir())

    questions = ask(recipe, finished / PROMPTS, tiny_target.text)
    for batch in plan(questions, 7):
        assert len(batch) and open_files() <= 3
    del batch, questions
    assert open_files() == 0


def test_no_questions(recipe: Settings, tiny_target: Target, tmp_path: Path) -> None:
    questions = ask(recipe, write(tmp_path / "prompts.jsonl", []), tiny_target.text)
    assert len(questions) == 0 and list(plan(questions, 7)) == []
    assert questions.lengths.dtype == np.int32
