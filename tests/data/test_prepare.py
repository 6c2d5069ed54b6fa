"""Choosing prompts: as many as asked for, even over sources, the same every time, and nothing scanned twice."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from eagle3.configs.errors import Interrupted, UserError
from eagle3.configs.settings import PrepareSettings, Settings
from eagle3.data import prepare as stage
from eagle3.data.choice import NOT_NEEDED
from eagle3.data.conversations import Conversation, read_conversations
from eagle3.data.prepare import prepare, prepared
from eagle3.data.sources import Row
from eagle3.models.target import TargetText
from transformers import AutoTokenizer, PreTrainedTokenizerFast

PROMPTS = Path("conversations/prompts.jsonl")


@pytest.fixture(scope="module")
def text(tiny_folder: Path) -> TargetText:
    return read(AutoTokenizer.from_pretrained(tiny_folder))


def read(tokenizer: PreTrainedTokenizerFast) -> TargetText:
    return TargetText(tokenizer, (tokenizer.eos_token_id,), 512)


@pytest.fixture
def write(tmp_path: Path):
    """Write lines to a prompt file; returns a recipe that reads it."""

    def write(rows: list[dict], **values: object) -> Settings:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts = {"train": 6, "validation": 1, "test": 1} | values
        return Settings(prepare=PrepareSettings(prompts=str(path), **counts))

    return write


def rows(**counts: int) -> list[dict]:
    """``train_a=3`` gives three prompts of source a in the training split."""
    named = [(*name.split("_"), i) for name, count in counts.items() for i in range(count)]
    return [{"split": split, "source": source, "prompt": f"{split} {source} {i}"} for split, source, i in named]


def chosen(run_dir: Path) -> list[Conversation]:
    return list(read_conversations(run_dir / PROMPTS))


def test_counts_are_dealt_evenly_over_sources(tmp_path: Path, write, text: TargetText) -> None:
    settings = write(rows(train_a=50, train_b=1, train_c=9, validation_a=3, test_a=3), train=9)
    prepare(settings, tmp_path / "run", text)
    kept = chosen(tmp_path / "run")
    assert Counter(c.source for c in kept if c.split == "train") == {"a": 4, "b": 1, "c": 4}
    assert Counter(c.split for c in kept) == {"train": 9, "validation": 1, "test": 1}
    assert [c.split for c in kept] == ["train"] * 9 + ["validation", "test"]


def test_order_of_the_file_does_not_matter(tmp_path: Path, write, text: TargetText) -> None:
    lines = rows(train_a=20, train_b=20, validation_a=3, test_a=3)
    prepare(write(lines), tmp_path / "one", text)
    prepare(write(lines[::-1]), tmp_path / "two", text)
    assert (tmp_path / "one" / PROMPTS).read_bytes() == (tmp_path / "two" / PROMPTS).read_bytes()


def test_a_longer_run_keeps_what_a_shorter_one_has(tmp_path: Path, write, text: TargetText) -> None:
    lines = rows(train_a=20, train_b=20, validation_a=3, test_a=3)
    prepare(write(lines, train=6), tmp_path / "short", text)
    prepare(write(lines, train=20), tmp_path / "long", text)
    assert {c.id for c in chosen(tmp_path / "short")} < {c.id for c in chosen(tmp_path / "long")}


def test_long_prompts_are_left_out_and_counted(
    tmp_path: Path, write, text: TargetText, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [*rows(train_a=5, validation_a=1, test_a=1), {"split": "train", "source": "a", "prompt": "long " * 60}]
    prepare(write(lines, max_prompt_tokens=100), tmp_path / "run", text)
    assert len(chosen(tmp_path / "run")) == 7
    summary = json.loads((tmp_path / "run" / "conversations" / "summary.json").read_bytes())
    assert summary["kept"] == {"train": {"a": 5}, "validation": {"a": 1}, "test": {"a": 1}}
    assert summary["notes"] == {stage.TOO_LONG: 1}
    printed = capsys.readouterr().out
    assert "train            5 of 6 asked for (a 5)" in printed
    assert "prompt longer than prepare.max_prompt_tokens: 1" in printed


def test_a_split_without_prompts(tmp_path: Path, write, text: TargetText) -> None:
    with pytest.raises(UserError, match="prepare.test = 1: .* has no short enough prompt in this split .*; add rows"):
        prepare(write(rows(train_a=5, validation_a=2)), tmp_path / "run", text)
    prepare(write(rows(train_a=5, validation_a=2), test=0), tmp_path / "run", text)


def test_a_repaired_prompt_file_is_not_held_against_the_run(tmp_path: Path, write, text: TargetText) -> None:
    with pytest.raises(UserError, match="line 1: "):
        prepare(write([{"promt": "oops"}]), tmp_path / "run", text)
    prepare(write(rows(train_a=5, validation_a=2, test_a=2)), tmp_path / "run", text)


def test_a_complete_stage_reads_no_prompts(
    tmp_path: Path, write, text: TargetText, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = write(rows(train_a=5, validation_a=2, test_a=2))
    library = Settings(prepare=PrepareSettings(train=5, validation=2, test=2))
    found = list(stage.read_prompts(settings.prepare, stage.rows(settings.prepare), Counter()))
    monkeypatch.setattr(stage, "library_prompts", lambda notes: iter(found))
    prepare(settings, tmp_path / "file", text)
    prepare(library, tmp_path / "library", text)
    before = (tmp_path / "library" / PROMPTS).stat().st_ino
    monkeypatch.setattr(stage, "library_prompts", None)
    monkeypatch.setattr(stage, "rows", None)
    started = time.monotonic()
    prepare(settings, tmp_path / "file", text)
    prepare(library, tmp_path / "library", text)
    assert prepared(settings, tmp_path / "file") and prepared(library, tmp_path / "library")
    assert time.monotonic() - started < 1.0
    assert (tmp_path / "library" / PROMPTS).stat().st_ino == before


def test_a_changed_recipe_is_refused(tmp_path: Path, write, text: TargetText) -> None:
    lines = rows(train_a=9, validation_a=2, test_a=2)
    prepare(write(lines), tmp_path / "run", text)
    with pytest.raises(
        UserError, match="prepare.train = 7: .*conversations was made with 6; set it back, choose another"
    ):
        prepare(write(lines, train=7), tmp_path / "run", text)
    with pytest.raises(UserError, match='prepare.prompts = "[0-9a-f]{64}": .* was made with "[0-9a-f]{64}"'):
        prepare(write(lines[1:]), tmp_path / "run", text)
    other = AutoTokenizer.from_pretrained(text.tokenizer.name_or_path)
    other.chat_template += " "
    with pytest.raises(UserError, match="chat template of the target = "):
        prepare(write(lines), tmp_path / "run", read(other))


@pytest.mark.parametrize(("split", "count"), [("train", 0), ("validation", 0), ("test", -1)])
def test_senseless_counts(tmp_path: Path, write, text: TargetText, split: str, count: int) -> None:
    with pytest.raises(UserError, match=f"prepare.{split} = {count}: it is too small"):
        prepare(write(rows(train_a=1), **{split: count}), tmp_path / "run", text)


def test_no_such_file(tmp_path: Path, text: TargetText) -> None:
    settings = Settings(prepare=PrepareSettings(prompts=str(tmp_path / "absent.jsonl")))
    with pytest.raises(
        UserError, match=r'prepare.prompts = .*absent.jsonl: there is no such file; give .* or "stdlib"'
    ):
        prepare(settings, tmp_path / "run", text)


def test_what_a_template_refuses_is_counted(tmp_path: Path, write, tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    lines = [*rows(train_a=5, validation_a=1, test_a=1), {"split": "train", "prompt": "?", "system": "Be brief."}]
    prepare(write(lines), tmp_path / "run", read(tokenizer))
    notes = json.loads((tmp_path / "run" / "conversations" / "summary.json").read_bytes())["notes"]
    assert notes == {f"{stage.TEMPLATE} (no system messages)": 1}
    with pytest.raises(
        UserError, match=r"prepare.train = 6: .* split \(.* refuses them \(no system messages\): 1\); add"
    ):
        prepare(write(lines[5:]), tmp_path / "other", read(tokenizer))


def test_what_a_template_leaves_out_is_counted(tmp_path: Path, write, tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)  # whose template knows nothing of calls
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    called = {"role": "assistant", "content": "I add.", "tool_calls": [call]}
    tools = [{"role": "user", "content": "One and two?"}, called, {"role": "tool", "content": "3"}]
    lines = [*rows(train_a=5, validation_a=1, test_a=1), {"split": "train", "messages": tools}]

    def notes(name: str) -> dict[str, int]:
        prepare(write(lines), tmp_path / name, read(tokenizer))
        return json.loads((tmp_path / name / "conversations" / "summary.json").read_bytes())["notes"]

    assert notes("calls") == {f"{stage.LEFT_OUT} calls of tools": 1}
    own = tokenizer.chat_template
    tokenizer.chat_template = own + "{% for m in messages %}{{ m.tool_calls }}{% endfor %}"
    assert notes("whole") == {}
    tokenizer.chat_template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    assert notes("results") == {f'{stage.LEFT_OUT} the content of "tool"': 1}


def test_follow_ups_count_for_the_length(tmp_path: Path, write, text: TargetText) -> None:
    lines = [
        *rows(train_a=3, validation_a=1, test_a=1),
        {"split": "train", "turns": ["Short?", "And then?"]},
        {"split": "train", "turns": ["Short?", "long " * 60]},
    ]
    prepare(write(lines, max_prompt_tokens=100), tmp_path / "run", text)
    kept = {c.follow_ups for c in chosen(tmp_path / "run")}
    assert kept == {(), ("And then?",)}


def test_a_run_directory_that_cannot_be_written(tmp_path: Path, write, text: TargetText) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=r"run.root = .*: it cannot be written \(Not a directory\); free some space or choose a folder"
    ):
        prepare(write(rows(train_a=5, validation_a=2, test_a=2)), tmp_path / "file" / "run", text)


def test_a_crash_at_any_moment_changes_nothing(tmp_path: Path, write, text: TargetText, crashing) -> None:
    settings = write(rows(train_a=9, validation_a=2, test_a=2))
    prepare(settings, tmp_path / "whole", text)
    for moment in itertools.count(1):
        with crashing(moment) as crash:
            prepare(settings, tmp_path / "run", text)
        if not crash.happened:
            break
        prepare(settings, tmp_path / "run", text)
        files = sorted(path.name for path in (tmp_path / "run" / "conversations").iterdir())
        assert files == ["prepare.stage.json", "prompts.jsonl", "summary.json"]
        assert (tmp_path / "run" / PROMPTS).read_bytes() == (tmp_path / "whole" / PROMPTS).read_bytes()
        shutil.rmtree(tmp_path / "run")
    assert moment == 21


def test_a_signal(tmp_path: Path, write, text: TargetText, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, real = write(rows(train_a=9, validation_a=2, test_a=2)), stage.rows

    def signalled(settings: PrepareSettings) -> Iterator[Row]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from itertools.cycle(real(settings))  # a long source: it ends at the first row after the signal

    monkeypatch.setattr(stage, "rows", signalled)
    with pytest.raises(Interrupted, match="prompts are not chosen yet; resume with: eagle3 prepare .*run/config.yaml"):
        prepare(settings, tmp_path / "run", text)
    assert not (tmp_path / "run").exists()


def test_a_long_source_is_read_once_and_says_so(
    tmp_path: Path, write, text: TargetText, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(write(rows(train_a=300, validation_a=2, test_a=2)), tmp_path / "run", text)
    assert re.search(r"^prepare 304 rows, [\d,]+ rows/s$", capsys.readouterr().err, re.MULTILINE)
    summary = json.loads((tmp_path / "run" / "conversations" / "summary.json").read_bytes())
    assert summary["notes"] == {NOT_NEEDED: 304 - 6 - 1 - 1}
