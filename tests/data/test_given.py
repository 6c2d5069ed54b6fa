"""Given answers are kept to the letter: what the assistant said is supervised, all else is not, and nothing is asked."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eagle3.configs.errors import Incomplete, UserError
from eagle3.configs.settings import PrepareSettings, Settings
from eagle3.data import given
from eagle3.data.answers import GIVEN, Answer, read_answers, read_failures, read_finished
from eagle3.data.conversations import Conversation, read_conversations
from eagle3.data.given import CHANGED, EMPTY, LONG, LONG_ANSWER, Keeper
from eagle3.data.messages import Refused
from eagle3.data.plan import Speeds, make_plan
from eagle3.data.prepare import LEFT_OUT, prepare, prepared
from eagle3.data.prompts import UNANSWERED, UNUSED
from eagle3.data.record import record
from eagle3.data.regenerate import regenerate, regenerated
from eagle3.data.store import Store
from eagle3.models.target import Target, TargetText
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ANSWERS, PROMPTS = Path("conversations/answers.jsonl"), Path("conversations/prompts.jsonl")
HEADER = "<|header_start|>{}<|header_end|>\n\n"
TURN = "<|header_start|>{{ m.role }}<|header_end|>\n\n"
ASK = "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
#: Reasoning is shown before the last answer alone, calls of tools as they are.
REASONING = (
    "{% for m in messages %}" + TURN + "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}"
    "</think>\n{% endif %}{{ m.content | trim }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "<|eot|>{% endfor %}" + ASK
)
#: Reasoning is never shown, be it told apart or not.
SILENT = "{% for m in messages %}" + TURN + "{{ m.content.split('</think>')[-1] }}<|eot|>{% endfor %}" + ASK
CALL = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}

fork = multiprocessing.get_context("fork")


def say(*turns: str) -> list[dict[str, object]]:
    return [{"role": role, "content": content} for role, _, content in (turn.partition(" ") for turn in turns)]


SHAREGPT = [
    {"from": "human", "value": "One?"},
    {"from": "gpt", "value": "It is 1, or \n\n 2."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": " Yes."},
]
OPENAI = say("system Be brief.", "user Two?", "assistant 2", "user And?", "assistant 3", "user Then?", "assistant 4")
REASONED = [*say("user Three?"), {"role": "assistant", "content": "3", "reasoning_content": "Easy."}]
CALLED = [
    *say("user Add."),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    *say("tool 3", "assistant It is 3."),
]
#: What is said in each, as the template above shows it.
SAID = {
    "sharegpt": ["It is 1, or \n\n 2.<|eot|>", "Yes.<|eot|>"],
    "openai": ["2<|eot|>", "3<|eot|>", "4<|eot|>"],
    "reasoned": ["<think>Easy.</think>\n3<|eot|>"],
    "called": ['{"name": "add", "arguments": {"a": 1, "b": 2}}<|eot|>', "It is 3.<|eot|>"],
}


@pytest.fixture
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def reasoning(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The tiny target with a template that shows reasoning and calls."""
    monkeypatch.setattr(tiny_target.tokenizer, "chat_template", REASONING)
    return tiny_target


@pytest.fixture
def write(recipe: Settings, tmp_path: Path) -> Callable[..., Settings]:
    """``write(row, row, ...)`` is a recipe whose conversations are these and six of which none has an answer."""

    def write(*rows: dict, **values: object) -> Settings:
        plain = [
            {"id": f"{split}-{number}", "split": split, "prompt": f"{split} {number}?"}
            for split, count in (("train", 2), ("validation", 2), ("test", 2))
            for number in range(count)
        ]
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in [*plain, *rows]))
        chosen = PrepareSettings(prompts=str(path), train=20, validation=4, test=4, keep_answers=True)
        limits = replace(recipe.regenerate, max_new_tokens=60)
        return replace(recipe, prepare=replace(chosen, **values), regenerate=limits)

    return write


@pytest.fixture
def mine(write: Callable[..., Settings]) -> Settings:
    """A recipe with the conversations above."""
    return write(
        {"id": "sharegpt", "split": "train", "source": "words", "conversations": SHAREGPT},
        {"id": "openai", "split": "train", "messages": OPENAI},
        {"id": "reasoned", "split": "train", "messages": REASONED},
        {"id": "called", "split": "train", "messages": CALLED},
        {"id": "held", "split": "test", "messages": OPENAI[1:]},
    )


def notes(run: Path) -> dict[str, int]:
    return json.loads((run / "conversations" / "summary.json").read_bytes())["notes"]


def turns(tokenizer: PreTrainedTokenizerFast, answer: Answer) -> list[str]:
    return [tokenizer.decode(answer.ids[start:end]) for start, end in answer.turns]


def test_from_files_to_the_store(mine: Settings, reasoning: Target, tmp_path: Path) -> None:
    run, tokenizer = tmp_path / "run", reasoning.tokenizer
    prepare(mine, run, reasoning.text)
    assert notes(run) == {UNUSED: 3}
    regenerate(mine, run, reasoning)
    record(mine, run, reasoning)
    answers = {answer.id: answer for answer in read_answers(run / ANSWERS)}
    assert answers.keys() == {
        *SAID,
        "held",
        *(f"{split}-{i}" for split in ("train", "validation", "test") for i in (0, 1)),
    }
    whole = {"sharegpt": None, "openai": OPENAI, "reasoned": REASONED, "called": CALLED}
    whole["sharegpt"] = [
        {"role": {"human": "user", "gpt": "assistant"}[message["from"]], "content": message["value"]}
        for message in SHAREGPT
    ]
    for name, said in SAID.items():
        answer = answers[name]
        assert turns(tokenizer, answer) == said
        assert tokenizer.decode(answer.ids) == tokenizer.apply_chat_template(whole[name], tokenize=False)
        assert (answer.temperature, answer.finish, answer.exact) == (1.0, "given", False)
    assert (answers["sharegpt"].source, answers["openai"].source) == ("words", "mine")
    others = [answer for answer in answers.values() if answer.id not in SAID]
    assert all(answer.finish in ("stop", "length") and answer.exact for answer in others)
    assert answers["held"].temperature == 0.0

    store = Store(run / "store")
    assert len(store) == len(answers) and store.verify() == []
    for sample in store:
        answer = answers[sample.id]
        assert sample.input_ids.tolist() == answer.ids
        assert sample.input_ids[sample.loss_mask].tolist() == answer.said
        alone = reasoning.forward(sample.input_ids[None].long())
        assert (sample.last_hidden.float() - alone.last_hidden[0]).abs().max() < 0.05
    assert store.manifest.greedy_tokens == sum(len(a.said) for a in others if a.temperature == 0.0)
    assert store.manifest.disagreeing == 0
    trained = [answer for answer in answers.values() if answer.split == "train"]
    assert store.token_counts().sum() == sum(len(answer.said) for answer in trained)


def test_the_summaries_tell_them_apart(
    mine: Settings, reasoning: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    short = replace(mine.prepare, max_prompt_tokens=300)  # of 512 positions
    settings = replace(mine, run=replace(mine.run, root=str(tmp_path), name="run"), prepare=short)
    prepare(settings, run, reasoning.text)
    assert "  7 answers are kept as they were given, 9 are the target's to give\n" in capsys.readouterr().out
    speeds = Speeds(1.0, None, None)
    before = make_plan(settings, speeds, gpus=1)
    assert (before.tokens["answer"], before.tokens["given"]) == (17 * 60, 8 * 60)  # the call of a tool is a turn, too
    assert before.hours["regenerate"] == 9 * 60 / 3600
    regenerate(settings, run, reasoning)
    summary = json.loads((run / "conversations" / "answers.summary.json").read_bytes())
    assert summary["by_finish"]["given"] == summary["tokenised_again"] == 4
    assert sum(summary["by_temperature"].values()) == summary["answers"] - 4
    assert make_plan(settings, speeds, gpus=1).tokens["answer"] == summary["answer_tokens"]


def test_the_others_stay_as_they_are(mine: Settings, reasoning: Target, tmp_path: Path) -> None:
    """Keeping answers changes neither ids nor splits nor what the target is asked in held-out conversations."""
    other = replace(mine, prepare=replace(mine.prepare, keep_answers=False))
    prepare(mine, tmp_path / "kept", reasoning.text)
    prepare(other, tmp_path / "anew", reasoning.text)
    assert notes(tmp_path / "anew") == {UNUSED: 10}
    kept, anew = (list(read_conversations(tmp_path / name / PROMPTS)) for name in ("kept", "anew"))
    assert [conversation._replace(given=()) for conversation in kept] == anew
    assert {conversation.id for conversation in kept if conversation.given} == SAID.keys()
    assert prepared(mine, tmp_path / "kept")
    with pytest.raises(UserError, match="prepare.keep_answers = false: .* was made with true; set it back"):
        prepare(other, tmp_path / "kept", reasoning.text)
    with pytest.raises(UserError, match="regenerate.max_new_tokens = 61: .* was made with 60"):
        prepare(
            replace(mine, regenerate=replace(mine.regenerate, max_new_tokens=61)), tmp_path / "kept", reasoning.text
        )


def test_a_question_that_nobody_answered(write: Callable[..., Settings], tiny_target: Target, tmp_path: Path) -> None:
    asked = say("user One?", "assistant 1", "user Two?")
    settings = write(
        {"id": "open", "split": "train", "messages": asked}, {"id": "none", "split": "train", "messages": asked[2:]}
    )
    prepare(settings, tmp_path / "run", tiny_target.text)
    assert notes(tmp_path / "run") == {UNANSWERED: 1}
    found = {conversation.id: conversation for conversation in read_conversations(tmp_path / "run" / PROMPTS)}
    assert found["open"].whole == asked[:2]
    assert not found["none"].given


def test_a_copy_of_a_held_out_conversation_is_not_kept(
    write: Callable[..., Settings], tiny_target: Target, tmp_path: Path
) -> None:
    settings = write(
        {"id": "a", "split": "train", "messages": say("user One?", "assistant 1")},
        {"id": "b", "split": "test", "messages": say("user One?", "assistant one")},
        {"id": "c", "split": "train", "messages": say("user Two?", "assistant 2")},
        {"id": "d", "split": "train", "messages": say("user Two?", "assistant two")},
    )
    prepare(settings, tmp_path / "run", tiny_target.text)
    ids = {conversation.id for conversation in read_conversations(tmp_path / "run" / PROMPTS)}
    assert "b" in ids and "a" not in ids and len(ids & {"c", "d"}) == 1


def test_what_cannot_be_kept_is_counted_by_reason(
    write: Callable[..., Settings], tiny_target: Target, tmp_path: Path
) -> None:
    """The tiny target's own template shows no reasoning and no calls."""
    long = say("user Say it.", f"assistant {'so ' * 60}")
    turn = ["user Why?", f"assistant {'so ' * 15}"]
    rows = [long, say("user One?", "assistant  "), REASONED, CALLED, [{"role": "user", "content": "So?"}, CALLED[1]]]
    rows += [say(*turn * 10), say("user Two?", "assistant 2")]
    settings = write(*({"id": str(number), "split": "train", "messages": row} for number, row in enumerate(rows)))
    prepare(settings, tmp_path / "run", tiny_target.text)
    assert notes(tmp_path / "run") == {
        f"conversations: {LONG_ANSWER}": 1,
        f"conversations: {EMPTY}": 1,
        f"conversations: {CHANGED}": 1,
        f"{LEFT_OUT} calls of tools": 2,
        f"conversations: {LONG}": 1,
    }
    kept = [c.id for c in read_conversations(tmp_path / "run" / PROMPTS) if c.given]
    assert kept == ["6"]


def keep(tokenizer: PreTrainedTokenizerFast, *answers: str, most: int = 60, positions: int = 512) -> Answer:
    """The answer made of ``answers`` to as many questions."""
    follow_ups = ("And?",) * (len(answers) - 1)
    asked = Conversation(
        "it", "s", "train", say("user One?"), follow_ups, tuple(say(*(f"assistant {a}" for a in answers)))
    )
    return Keeper(TargetText(tokenizer, (), positions), most).answer(asked)


def test_limits_are_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = keep(tokenizer, "first", "second")
    [(_, first), (start, end)] = answer.turns
    assert end == len(answer.ids) and end - start == len("second") + 1  # bytes, and the end of the turn
    assert tokenizer.decode(answer.ids[first:start]) == HEADER.format("user") + "And?<|eot|>" + HEADER.format(
        "assistant"
    )
    assert keep(tokenizer, "first", "second", most=end - start, positions=end) == answer
    with pytest.raises(Refused, match=LONG_ANSWER):
        keep(tokenizer, "first", "second", most=end - start - 1)
    with pytest.raises(Refused, match=LONG):
        keep(tokenizer, "first", "second", positions=end - 1)


def test_reasoning_that_is_left_out_of_the_last_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = SILENT
    assert turns(tokenizer, keep(tokenizer, "<think>hm</think>1", "2")) == ["1<|eot|>", "2<|eot|>"]
    with pytest.raises(Refused, match=CHANGED):
        keep(tokenizer, "1", "<think>hm</think>2")
    assert keep(tokenizer, "1", " 2\n")  # white space at the ends is nobody's


def test_what_stands_behind_the_last_turn_is_left_off(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot|>", "<|eot|>\n")
    answer = keep(tokenizer, "1", "2")
    assert turns(tokenizer, answer) == ["1<|eot|>", "2<|eot|>"]
    assert tokenizer.decode(answer.ids).count("<|eot|>\n") == 3


@pytest.fixture
def few(mine: Settings, reasoning: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run before it was answered; two given answers are written at once."""
    monkeypatch.setattr(given, "AT_ONCE", 2)
    prepare(mine, tmp_path / "few", reasoning.text)
    return tmp_path / "few"


def test_a_crash_at_any_moment_changes_nothing(
    few: Path, mine: Settings, reasoning: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashing
) -> None:
    real, known = reasoning.generate, {}

    def remembered(*asked: object) -> object:  # some thirty runs ask the same few batches
        key = str(asked)
        known[key] = known.get(key) or real(*asked)
        return known[key]

    monkeypatch.setattr(reasoning, "generate", remembered)
    whole = Path(shutil.copytree(few, tmp_path / "whole"))
    regenerate(mine, whole, reasoning)
    for moment in itertools.count(1):
        run = Path(shutil.copytree(few, tmp_path / str(moment)))
        with crashing(moment) as crash:
            regenerate(mine, run, reasoning)
        if not crash.happened:
            break
        regenerate(mine, run, reasoning)
        assert (run / ANSWERS).read_bytes() == (whole / ANSWERS).read_bytes(), f"crash at moment {moment}"
    assert moment > 12


def _killed_between(settings: Settings, run: Path, target: Target) -> None:
    """Regenerate until the first given answers are written, and be killed."""
    real = Keeper.answers

    def first(self: Keeper, conversations: Iterator[Conversation]) -> Iterator[list[Answer]]:
        yield next(real(self, conversations))
        signal.raise_signal(signal.SIGKILL)

    Keeper.answers = first  # type: ignore[method-assign]
    regenerate(settings, run, target)


def test_killed_between_given_answers(few: Path, mine: Settings, reasoning: Target, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(few, tmp_path / "whole"))
    regenerate(mine, whole, reasoning)
    process = fork.Process(target=_killed_between, args=(mine, few, reasoning))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(read_answers(few / ANSWERS)) == 2
    regenerate(mine, few, reasoning)
    assert (few / ANSWERS).read_bytes() == (whole / ANSWERS).read_bytes()


def test_servers_are_not_asked_either(few: Path, mine: Settings, reasoning: Target, serve: Callable[..., Any]) -> None:
    stub = serve()
    chosen = replace(mine, regenerate=replace(mine.regenerate, endpoints=(stub.url,)))
    regenerate(chosen, few, reasoning.text)
    asked = [conversation for conversation in read_conversations(few / PROMPTS) if not conversation.given]
    assert len(stub.answered) >= len(asked) == 7
    kept = [answer for answer in read_answers(few / ANSWERS) if answer.finish == GIVEN]
    assert {answer.id for answer in kept} == SAID.keys()
    assert {tuple(prompt) for prompt in stub.answered}.isdisjoint(tuple(a.ids[: a.turns[0][0]]) for a in kept)


def test_another_tool_s_conversations(few: Path, mine: Settings, reasoning: Target) -> None:
    """What preparation would have refused fails by name, and may be allowed."""
    rows = [json.loads(line) for line in (few / PROMPTS).open()]
    row = next(row for row in rows if row["id"] == "openai")
    row["given"][2]["content"] = " "
    (few / PROMPTS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        Incomplete, match=r"1 of 11 conversations have no answer, the first openai \(a given answer is empty"
    ):
        regenerate(mine, few, reasoning)
    assert not regenerated(mine, few)
    allowed = replace(mine, regenerate=replace(mine.regenerate, allowed_failures=0.1))
    regenerate(allowed, few, reasoning)
    assert [failure[:2] for failure in read_failures(few / "conversations" / "failed.jsonl")] == [("openai", 1)]
    assert len(read_finished(few / "conversations", reasoning.info.vocab_size)) == 10
