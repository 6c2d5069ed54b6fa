"""Conversations of several turns: what the target said stays as it said it, and the template writes all else."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from eagle3.configs.errors import UserError
from eagle3.configs.settings import Settings
from eagle3.data.answers import Answer, read_answers
from eagle3.data.chat import continuation, end_of_turn, prompt_ids, sequence
from eagle3.data.conversations import Conversation, read_conversations
from eagle3.data.dialogue import Dialogue, Question
from eagle3.data.files import encode_line
from eagle3.data.questions import ask
from eagle3.data.record import record
from eagle3.data.regenerate import regenerate
from eagle3.data.store import Store
from eagle3.models.target import Target, TargetText
from transformers import AutoTokenizer, PreTrainedTokenizerFast

ANSWERS = Path("conversations/answers.jsonl")

SHARED = Path(__file__).parents[2].parent / "shared"

fork = multiprocessing.get_context("fork")

TRIMMING = (
    "{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
#: Reasoning of earlier turns is dropped.
THINKING = TRIMMING.replace("m.content | trim", "m.content.split('</think>')[-1] | trim")
#: The header of the answer opens a thought that is not there later.
OPENED = TRIMMING.replace("assistant<|header_end|>\n\n{% endif", "assistant<|header_end|>\n\n<think>\n{% endif")
REFUSING = TRIMMING + "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"


@pytest.fixture
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_folder)


def hello(*follow_ups: str) -> Conversation:
    return Conversation("it", "s", "test", [{"role": "user", "content": "Hello"}], list(follow_ups))


def text(tokenizer: PreTrainedTokenizerFast, conversation: Conversation, said: list[str]) -> str:
    """All of it, as the template writes it before the next answer."""
    messages = list(conversation.messages)
    for answer, question in zip(said, conversation.follow_ups, strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", [None, TRIMMING, THINKING])
def test_what_follows_an_answer_is_what_the_template_writes(
    tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    conversation, said = hello("More?", "And?"), ["Yes <|eot|> or\n\nno", "answer"]
    ids = prompt_ids(tokenizer, conversation)
    for turn in (1, 2):
        ids += tokenizer(said[turn - 1], add_special_tokens=False).input_ids
        ids += continuation(tokenizer, conversation, said[:turn], conversation.follow_ups[turn - 1])
        assert tokenizer.decode(ids) == text(tokenizer, conversation, said[:turn])


def test_white_space_that_a_template_trims_is_no_other_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TRIMMING
    trimmed = continuation(tokenizer, hello("More?"), ["Yes"], "More?")
    assert trimmed is not None
    assert continuation(tokenizer, hello("More?"), ["\n Yes \n"], "More?") == trimmed


def test_a_template_that_would_rewrite_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = THINKING
    assert continuation(tokenizer, hello("More?"), ["hm</think>Yes"], "More?") is None
    assert continuation(tokenizer, hello("More?"), ["Yes"], "More?") is not None
    tokenizer.chat_template = OPENED
    assert continuation(tokenizer, hello("More?"), ["Yes"], "More?") is None


def test_a_template_without_later_turns_is_told_before_anything_is_answered(
    tokenizer: PreTrainedTokenizerFast, tiny_target: Target, recipe: Settings, tmp_path: Path
) -> None:
    tokenizer.chat_template = REFUSING
    given, path = tiny_target.text._replace(tokenizer=tokenizer), tmp_path / "prompts.jsonl"
    path.write_bytes(encode_line(hello()._asdict()))
    assert len(ask(recipe, path, given)) == 1
    path.write_bytes(encode_line(hello("More?")._asdict()))
    with pytest.raises(UserError, match='"it" .user, assistant, user.: .* refuses it: one turn only; change'):
        ask(recipe, path, given)


def test_the_end_of_a_turn_is_the_templates(tokenizer: PreTrainedTokenizerFast) -> None:
    end, other = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert end_of_turn(tokenizer, (other, end)) == end
    tokenizer.chat_template = TRIMMING.replace("<|eot|>", tokenizer.pad_token)
    assert end_of_turn(tokenizer, (other, end)) == other
    assert end_of_turn(tokenizer, (end,)) == end


def dialogue(target: Target, conversation: Conversation, most: int = 8, **changes: object) -> Dialogue:
    given = target.text._replace(**changes)
    return Dialogue(Question(conversation, prompt_ids(given.tokenizer, conversation), 0.0, 3), given, most)


def test_a_turn_is_kept_to_the_token_and_ended_once(tiny_target: Target) -> None:
    end, tokenizer = tiny_target.tokenizer.eos_token_id, tiny_target.tokenizer
    going = dialogue(tiny_target, hello("More?"))
    prompt, seeds = list(going.ids), [going.seed]
    going.say([104, 105, end], ended=True)
    seeds.append(going.seed)
    assert going.finish == ""
    between = continuation(tokenizer, hello(), [tokenizer.decode([104, 105])], "More?")
    assert between[0] == end
    assert going.ids == [*prompt, 104, 105, *between]
    going.say([106, end], ended=True, exact=False)
    start = len(prompt)
    second = start + 2 + len(between)
    ids = [*prompt, 104, 105, *between, 106, end]
    expected = Answer("it", "s", "test", 0.0, ids, [[start, start + 3], [second, second + 2]], "stop", False)
    assert going.answer() == expected
    assert expected.said == [104, 105, end, 106, end]
    assert len(set(seeds)) == 2


def test_another_end_than_the_templates_stays(tiny_target: Target) -> None:
    other, end = tiny_target.tokenizer.pad_token_id, tiny_target.tokenizer.eos_token_id
    going = dialogue(tiny_target, hello("More?"), eos_ids=(end, other))
    start = len(going.ids)
    going.say([104, other], ended=True)
    assert going.ids[start : start + 2] == [104, other]
    assert end not in going.ids[start : start + 4]


def test_why_a_conversation_ends_early(tiny_target: Target, tokenizer: PreTrainedTokenizerFast) -> None:
    end = tiny_target.tokenizer.eos_token_id
    cut = dialogue(tiny_target, hello("More?"))
    cut.say([104, 105], ended=False)
    assert cut.finish == "length"
    between = continuation(tokenizer, hello(), [tokenizer.decode([104])], "More?")
    for spare, finish in ((0, ""), (-1, "full")):
        whole = len(prompt_ids(tokenizer, hello())) + 1 + len(between) + 8
        full = dialogue(tiny_target, hello("More?"), max_positions=whole + spare)
        full.say([104, end], ended=True)
        assert full.finish == finish
    tokenizer.chat_template = OPENED
    rewritten = dialogue(tiny_target, hello("More?"), tokenizer=tokenizer)
    rewritten.say([104, end], ended=True)
    assert rewritten.finish == "rewritten"
    assert len(rewritten.answer().turns) == 1


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared: Llama-4's tokenizer and MT-bench")
@pytest.mark.parametrize("template", [None, TRIMMING])
def test_mt_bench_in_llama_4s_tokens(template: str | None) -> None:
    """What the mask lets through is exactly what was said, and all of it exactly what the template writes."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "llama4-tokenizer")
    tokenizer.chat_template = template or tokenizer.chat_template
    questions = [json.loads(line)["turns"] for line in (SHARED / "benchmarks" / "mt-bench.jsonl").open()]
    real = [json.loads(line)["turns"][0].strip() for line in (SHARED / "benchmarks" / "humaneval.jsonl").open()]
    end = tokenizer.convert_tokens_to_ids("<|eot|>")
    limits = TargetText(tokenizer, (end,), 1 << 20)
    for number, turns in enumerate(questions):
        conversation = Conversation("it", "s", "test", [{"role": "user", "content": turns[0]}], turns[1:])
        going = Dialogue(Question(conversation, prompt_ids(tokenizer, conversation), 0.0, 0), limits, 8)
        said = [real[(number + turn) % len(real)] for turn in range(len(turns))]
        for text_ids in tokenizer(said, add_special_tokens=False).input_ids:
            going.say([*text_ids, end], ended=True)
        answer = going.answer()
        assert answer.finish == "stop"
        recorded = sequence(answer)
        assert tokenizer.decode(recorded.input_ids[recorded.loss_mask]) == "".join(f"{words}<|eot|>" for words in said)
        assert tokenizer.decode(answer.ids) == text(tokenizer, conversation, said[:-1]) + said[-1] + "<|eot|>"


@pytest.mark.usefixtures("brief")
def test_every_turn_is_answered_in_process(talking: Path, recipe: Settings, tiny_target: Target) -> None:
    regenerate(recipe, talking, tiny_target)
    prompts = {prompt.id: prompt for prompt in read_conversations(talking / "conversations" / "prompts.jsonl")}
    answers = read_answers(talking / ANSWERS)
    assert Counter(len(answer.turns) for answer in answers) == {1: 8, 2: 8, 3: 8}
    for answer in answers:
        prompt, said = prompts[answer.id], []
        expected = prompt_ids(tiny_target.tokenizer, prompt)
        for (start, end), follow_up in zip(answer.turns, [*prompt.follow_ups, None], strict=True):
            assert answer.ids[:start] == expected
            if answer.temperature == 0.0:
                assert tiny_target.generate([expected], [0.0], 8, [0])[0].ids == answer.ids[start:end]
            said.append(tiny_target.tokenizer.decode(answer.ids[start : end - 1]))
            if follow_up is not None:
                expected = answer.ids[:end] + continuation(tiny_target.tokenizer, prompt, said, follow_up)[1:]


@pytest.mark.usefixtures("brief")
def test_every_turn_is_recorded(talking: Path, recipe: Settings, tiny_target: Target, monkeypatch) -> None:
    regenerate(recipe, talking, tiny_target)
    monkeypatch.setattr("eagle3.data.checks.DISAGREEING_SHARE", 1.0)  # its ends are not what it would have said
    record(recipe, talking, tiny_target)
    answers = {answer.id: answer for answer in read_answers(talking / ANSWERS)}
    store = Store(talking / "store")
    ends = sum(len(a.turns) for a in answers.values() if a.temperature == 0.0)
    assert 0 < store.manifest.disagreeing <= ends
    for at in range(len(store)):
        answer = answers[store[at].id]
        assert store[at].input_ids[store[at].loss_mask].tolist() == answer.said


@pytest.mark.usefixtures("brief")
def test_killed_again_and_again_between_turns(
    talking: Path, recipe: Settings, tiny_target: Target, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(talking, whole)
    regenerate(recipe, whole, tiny_target)
    killed = 0
    for milliseconds in (20, 40, 60, 90, 60_000):
        process = fork.Process(target=regenerate, args=(recipe, talking, tiny_target))
        process.start()
        process.join(milliseconds / 1000)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed
    assert (talking / ANSWERS).read_bytes() == (whole / ANSWERS).read_bytes()
