"""Answers are the target's own, and the same to the byte whoever was killed or interrupted on the way."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from eagle3.configs.errors import Interrupted, UserError
from eagle3.configs.settings import Settings
from eagle3.data.answers import read_answers
from eagle3.data.conversations import read_conversations
from eagle3.data.files import exclusive
from eagle3.data.regenerate import regenerate, regenerated
from eagle3.models.target import Target

ANSWERS, SUMMARY = Path("conversations/answers.jsonl"), Path("conversations/answers.summary.json")

fork = multiprocessing.get_context("fork")


def test_every_prompt_is_answered_once(finished: Path, tiny_target: Target) -> None:
    prompts = {prompt.id: prompt for prompt in read_conversations(finished / "conversations" / "prompts.jsonl")}
    answers = read_answers(finished / ANSWERS)
    assert sorted(answer.id for answer in answers) == sorted(prompts)
    for answer in answers:
        prompt = prompts[answer.id]
        assert (answer.source, answer.split) == (prompt.source, prompt.split)
        rendered = tiny_target.tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, return_dict=False
        )
        ((start, end),) = answer.turns
        assert answer.ids[:start] == rendered
        assert end == len(answer.ids)
        ended = answer.ids[-1] in tiny_target.info.eos_ids
        assert answer.finish == ("stop" if ended else "length")
        assert len(answer.said) == 8 or ended
        assert answer.exact


def test_temperatures_are_dealt_in_turn(finished: Path) -> None:
    answers = read_answers(finished / ANSWERS)
    assert Counter(a.temperature for a in answers if a.split == "train") == {0.0: 6, 0.7: 5, 1.0: 5}
    assert {a.temperature for a in answers if a.split != "train"} == {0.0}


def test_greedy_answers_are_the_targets(finished: Path, tiny_target: Target) -> None:
    greedy = [a for a in read_answers(finished / ANSWERS) if a.temperature == 0.0]
    assert len(greedy) == 14
    for answer in greedy[:5]:
        assert tiny_target.generate([answer.ids[: answer.turns[0][0]]], [0.0], 8)[0].ids == answer.said


def test_the_seed_changes_sampled_answers_only(asked: Path, finished: Path, changed, tiny_target: Target) -> None:
    regenerate(changed("run", seed=4), asked, tiny_target)
    for ours, theirs in zip(read_answers(asked / ANSWERS), read_answers(finished / ANSWERS), strict=True):
        assert (ours.ids == theirs.ids) == (ours.temperature == 0.0)


def test_every_answer_has_draws_of_its_own(
    asked: Path, recipe: Settings, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seeds = tiny_target.generate, []

    def watched(prompts, temperatures, max_new_tokens, given):
        seeds.extend(given)
        return real(prompts, temperatures, max_new_tokens, given)

    monkeypatch.setattr(tiny_target, "generate", watched)
    regenerate(recipe, asked, tiny_target)
    assert len(set(seeds)) == 24


def test_a_crash_at_any_moment_changes_nothing(
    asked: Path, finished: Path, recipe: Settings, tiny_target: Target, tmp_path: Path, crashing
) -> None:
    for moment in itertools.count(1):
        run = Path(shutil.copytree(asked, tmp_path / str(moment)))
        with crashing(moment) as crash:
            regenerate(recipe, run, tiny_target)
        if not crash.happened:
            break
        assert not regenerated(recipe, run) or (run / SUMMARY).exists()
        regenerate(recipe, run, tiny_target)
        assert (run / ANSWERS).read_bytes() == (finished / ANSWERS).read_bytes(), f"crash at moment {moment}"
        assert (run / SUMMARY).read_bytes() == (finished / SUMMARY).read_bytes()
    assert moment > 15


def test_a_file_cut_anywhere_is_completed(asked: Path, finished: Path, recipe: Settings, tiny_target: Target) -> None:
    whole = (finished / ANSWERS).read_bytes()
    regenerate(recipe, asked, tiny_target)
    for share in (0.0, 0.2, 0.5, 0.77, 0.999):
        (asked / ANSWERS).write_bytes(whole[: int(share * len(whole))])
        assert not regenerated(recipe, asked)
        regenerate(recipe, asked, tiny_target)
        assert (asked / ANSWERS).read_bytes() == whole


def test_killed_again_and_again(asked: Path, finished: Path, recipe: Settings, tiny_target: Target) -> None:
    killed = 0
    for milliseconds in (30, 90, 150, 200, 60_000):
        process = fork.Process(target=regenerate, args=(recipe, asked, tiny_target))
        process.start()
        process.join(milliseconds / 1000)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed
    assert (asked / ANSWERS).read_bytes() == (finished / ANSWERS).read_bytes()


def test_a_signal_ends_after_the_current_batch(
    asked: Path, finished: Path, recipe: Settings, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tiny_target.generate

    def signalled(*arguments):
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(tiny_target, "generate", signalled)
    with pytest.raises(Interrupted, match="7 of 24 answers are written; resume with: eagle3 regenerate"):
        regenerate(recipe, asked, tiny_target)
    assert len(read_answers(asked / ANSWERS)) == 7
    regenerate(recipe, asked, tiny_target)
    assert (asked / ANSWERS).read_bytes() == (finished / ANSWERS).read_bytes()


def test_what_is_complete_is_skipped(
    run_dir: Path, recipe: Settings, tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_target, "generate", None)
    monkeypatch.setattr("eagle3.data.regenerate.ask", None)
    regenerate(recipe, run_dir, tiny_target)
    assert regenerated(recipe, run_dir)


def test_two_processes_do_not_answer_at_once(asked: Path, recipe: Settings, tiny_target: Target) -> None:
    with (
        exclusive(asked / "conversations" / ".regenerate.lock"),
        pytest.raises(
            UserError, match="run.name = .*conversations: another process is writing there; wait until it ends"
        ),
    ):
        regenerate(recipe, asked, tiny_target)
    regenerate(recipe, asked, tiny_target)


@pytest.mark.parametrize(
    ("section", "values", "complaint"),
    [
        ("regenerate", {"max_new_tokens": 9}, "regenerate.max_new_tokens = 9: .* was made with 8; set it back"),
        (
            "regenerate",
            {"temperatures": (0.0,)},
            r"regenerate.temperatures = \[0.0\]: .* was made with \[0.0, 0.7, 1.0\]",
        ),
        ("run", {"seed": 4}, "run.seed = 4: .* was made with 3"),
        ("target", {"dtype": "bfloat16"}, 'target.dtype = "bfloat16": .* was made with "float32"'),
    ],
)
def test_a_changed_recipe_is_refused(
    run_dir: Path, changed, tiny_target: Target, section: str, values: dict, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        regenerate(changed(section, **values), run_dir, tiny_target)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"temperatures": ()}, r"regenerate.temperatures = \[\]: not a list of temperatures; give one or more"),
        ({"temperatures": (0.5, -1.0)}, "each 0 or above"),
        ({"temperatures": (float("nan"),)}, "each 0 or above"),
        ({"max_new_tokens": 0}, "regenerate.max_new_tokens = 0"),
        ({"batch_size": 0}, "regenerate.batch_size = 0"),
        (
            {"max_new_tokens": 500},
            r"regenerate.max_new_tokens = 500: a prompt has \d+ tokens and the target 512 positions",
        ),
    ],
)
def test_senseless_settings(asked: Path, changed, tiny_target: Target, values: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        regenerate(changed("regenerate", **values), asked, tiny_target)


def test_no_prompts(tmp_path: Path, recipe: Settings, tiny_target: Target) -> None:
    with pytest.raises(UserError, match="it holds no prompts; run eagle3 prepare first"):
        regenerate(recipe, tmp_path, tiny_target)


def test_a_damaged_line_in_the_middle_is_told(run_dir: Path, recipe: Settings, tiny_target: Target) -> None:
    lines = (run_dir / ANSWERS).read_bytes().splitlines(keepends=True)
    (run_dir / ANSWERS).write_bytes(b"".join([*lines[:4], b'{"id": 3\n', *lines[5:]]))
    with pytest.raises(UserError, match=r"answers.jsonl, line 5: not JSON"):
        regenerate(recipe, run_dir, tiny_target)


def test_the_summary_counts(finished: Path) -> None:
    summary = json.loads((finished / SUMMARY).read_bytes())
    answers = read_answers(finished / ANSWERS)
    assert summary["answers"] == 24
    assert summary["answer_tokens"] == sum(len(answer.said) for answer in answers)
    assert summary["by_split"] == {"test": 4, "train": 16, "validation": 4}
