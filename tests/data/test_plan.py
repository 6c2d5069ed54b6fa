"""What a run will cost: Maverick's arithmetic, measured before assumed, and a disk that is too small."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from eagle3 import cli
from eagle3.configs.errors import UserError
from eagle3.configs.loader import load
from eagle3.configs.settings import Settings
from eagle3.data import plan_tokens
from eagle3.data.answers import read_answers
from eagle3.data.chat import prompt_ids
from eagle3.data.conversations import Conversation
from eagle3.data.files import encode_line
from eagle3.data.plan import STORED, Plan, Speeds, make_plan
from eagle3.data.plan_table import render
from eagle3.data.plan_tokens import Asked, longest_of
from eagle3.data.quantise import encode
from eagle3.data.regenerate import regenerate
from eagle3.data.store import Store
from eagle3.data.units import counted, in_bytes
from eagle3.models.generate import Answer
from eagle3.models.target import Target
from transformers import Llama4Config, Llama4TextConfig

TRIMMING = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPACED = (
    "{% for m in messages %} {{ m.role }}: {{ m.content }} <|eot|>{% endfor %}"
    "{% if add_generation_prompt %} assistant: {% endif %}"
)
UNKNOWN = Speeds(None, None, None)
BILLION = 1_000_000_000


@pytest.fixture(scope="module")
def maverick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maverick's configuration, as its checkpoint nests it; no weights."""
    folder = tmp_path_factory.mktemp("maverick")
    text = Llama4TextConfig(
        vocab_size=202_048, hidden_size=5120, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8,
        head_dim=128, intermediate_size=8192, intermediate_size_mlp=16384, num_local_experts=128,
        num_experts_per_tok=1, interleave_moe_layer_step=2,
    )  # fmt: skip
    Llama4Config(text_config=text.to_dict()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flagship(maverick: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The recipe that ships, with a billion tokens and half of them answers."""
    overrides = ["prepare.max_prompt_tokens=1000", "regenerate.max_new_tokens=1000", "prepare.train=499000"]
    overrides += ["prepare.validation=500", "prepare.test=500", f"run.root={tmp_path_factory.mktemp('runs')}"]
    settings = load("maverick", [f"target.path={maverick}", *overrides])
    return make_plan(settings, Speeds(None, 5000.0, 20_000.0), gpus=8)


def test_maverick_as_the_arithmetic_has_it(flagship: Plan) -> None:
    experts, rest = 386.5e9, (3.02 + 6.04 + 3.02 + 1.03 + 1.03) * 1e9
    assert flagship.target.parameters == pytest.approx(experts + rest, rel=1e-3)
    assert flagship.target.layers == (1, 23, 44)
    assert flagship.head["parameters_per_step"] == pytest.approx(515e6, rel=1e-3)
    assert flagship.head["flop_per_token"] == pytest.approx(22.1e9, rel=1e-3)


def test_bytes_of_maverick_by_dtype(flagship: Plan) -> None:
    assert list(flagship.store_bytes_per_token.values()) == [40_960, 25_612, 20_496]
    assert flagship.tokens["all"] == BILLION
    ends, beside = 2 * 202_048 * 5120 * 2, 5 * BILLION
    assert list(flagship.store_bytes.values()) == [
        size * BILLION + beside + ends for size in flagship.store_bytes_per_token.values()
    ]
    assert flagship.stored_as == "float8_e4m3fn"
    assert flagship.disk["store"] == flagship.store_bytes["float8_e4m3fn"]
    assert in_bytes(flagship.disk["store"]) == "20.5 TB"


@pytest.mark.parametrize("last_hidden", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("features", ["float32", "bfloat16", "float8_e4m3fn"])
def test_bytes_of_a_token_are_those_that_are_stored(
    features: str, last_hidden: str, changed: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = changed("record", features_dtype=features, last_hidden_dtype=last_hidden)
    settings = replace(settings, run=replace(settings.run, root=str(tmp_path)))
    plan = make_plan(settings, UNKNOWN, gpus=1)
    stored = encode("features", torch.ones(1, 3, 32), features) | encode("last_hidden", torch.ones(1, 32), last_hidden)
    assert plan.store_bytes_per_token[plan.stored_as] == sum(tensor.nbytes for tensor in stored.values())
    assert plan.disk["store"] == plan.store_bytes[plan.stored_as]
    assert len(plan.store_bytes) == 3 + ((features, last_hidden) not in STORED)
    assert sum("(this recipe)" in line for line in render(plan).splitlines()) == 1


def test_memory_of_maverick(flagship: Plan) -> None:
    assert flagship.memory["weights"] == pytest.approx(800e9 / 8, rel=0.01)
    pairs = 64 * 2000 * 48 * 2 * 8 * 128 * 2
    assert flagship.memory["regenerate"] - flagship.memory["weights"] == pairs // 8
    assert flagship.memory["record"] - flagship.memory["weights"] == 16_384 * 5120 * 7 * 2
    by_stage = [held["all"] for held in flagship.training_memory.values()]
    assert by_stage == sorted(by_stage, reverse=True)
    assert all(held["the target's ends"] == 2 * 202_048 * 5120 * 4 for held in flagship.training_memory.values())


def test_hours_are_told_for_speeds_that_are_given(flagship: Plan) -> None:
    assert flagship.hours["regenerate"] is None
    assert flagship.hours["record"] == pytest.approx(BILLION / 5000 / 3600)
    assert flagship.hours["train"] == pytest.approx(2 * 499 / 500 * BILLION / 20_000 / 3600)
    hours = render(flagship).partition("\nhours\n")[2].splitlines()
    assert [line.split(None, 1) for line in hours[:3]] == [
        ["regenerate", "give --answer-tokens-per-s"],
        ["record", "55.6"],
        ["train", "27.7"],
    ]


def test_a_disk_that_is_too_small_is_warned_of(flagship: Plan) -> None:
    assert flagship.disk["free"] < 30e12, "this machine has room for Maverick's store"
    (warning,) = flagship.warnings
    assert warning.startswith("the disk of run.root = ") and "is too small by " in warning
    assert render(flagship).endswith(f"\n\nwarning: {warning}")


def test_measured_beats_assumed(recipe: Settings, finished: Path, tmp_path: Path) -> None:
    settings = replace(recipe, run=replace(recipe.run, root=str(tmp_path), name="run"))
    assumed = make_plan(settings, UNKNOWN, gpus=1)
    assert (assumed.tokens["all"], assumed.tokens["measured"]) == (24 * 512, False)  # the target has no more positions
    assert assumed.tokens["answer"] == 24 * recipe.regenerate.max_new_tokens
    assert not (tmp_path / "run").exists()
    assert assumed.disk["there"] == 0 and assumed.warnings == []

    run = Path(shutil.copytree(finished, tmp_path / "run"))
    recorded = make_plan(settings, UNKNOWN, gpus=1)
    store = Store(run / "store")
    manifest, lengths = store.manifest, store.lengths()
    assert (recorded.tokens["all"], recorded.tokens["answer"]) == (manifest.tokens, manifest.supervised_tokens)
    assert recorded.tokens["origin"] == "the recorded store"
    trained = sum(lengths[at] for at in store.indices("train"))
    assert (recorded.tokens["training"], recorded.tokens["trained"]) == (16, trained * settings.train.epochs)
    assert (recorded.tokens["longest"], recorded.tokens["most_said"]) == (max(lengths), 8)
    assert recorded.disk["there"] == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    shards = (path.stat().st_size for path in (run / "store").glob("shard-*.safetensors"))
    actual = sum(shards) + (run / "store" / "head.safetensors").stat().st_size
    assert recorded.disk["store"] == pytest.approx(
        actual, rel=0.2
    )  # headers weigh much in a store as small as this one

    written = sum((run / "conversations" / name).stat().st_size for name in ("prompts.jsonl", "answers.jsonl"))
    assert recorded.disk["conversations"] == pytest.approx(
        written, rel=0.5
    )  # so do the names in lines as short as these

    shutil.rmtree(run / "store")
    answered = make_plan(settings, UNKNOWN, gpus=1).tokens
    for key in ("conversations", "training", "prompt", "answer", "measured"):
        assert answered[key] == recorded.tokens[key]
    assert answered["trained"] == pytest.approx(recorded.tokens["trained"], rel=0.1)
    assert (answered["origin"], answered["longest"], answered["most_said"]) == ("the answers", 512, 8)

    (run / "conversations" / "answers.summary.json").unlink()
    prompts = run / "conversations" / "prompts.jsonl"
    prompts.write_text("".join(sorted(prompts.read_text().splitlines(keepends=True))[:11]))
    chosen = make_plan(settings, UNKNOWN, gpus=1).tokens
    training = prompts.read_text().count('"split": "train"')
    assert (chosen["conversations"], chosen["training"], chosen["origin"]) == (11, training, "the chosen prompts")
    assert (chosen["all"], chosen["trained"]) == (11 * 512, training * 512 * settings.train.epochs)


def test_several_turns_are_several_answers(maverick: Path, tmp_path: Path) -> None:
    limits = ["prepare.max_prompt_tokens=1000", "regenerate.max_new_tokens=3000", "train.epochs=2"]
    settings = load("maverick", [f"target.path={maverick}", f"run.root={tmp_path}", *limits])
    folder = tmp_path / "maverick" / "conversations"
    folder.mkdir(parents=True)
    alone = make_plan(settings, UNKNOWN, gpus=8)
    assert "by the recipe's counts, a turn each (eagle3 prepare counts the turns): every prompt" in render(alone)
    rows = [("train", 0), ("train", 4), ("test", 1)]
    lines = [{"id": str(at), "source": "s", "split": split, "messages": [], "follow_ups": ["Why?"] * more, "given": []}
             for at, (split, more) in enumerate(rows)]  # fmt: skip
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = make_plan(settings, Speeds(100.0, 1000.0, 10.0), gpus=8)
    tokens = plan.tokens
    assert (tokens["prompt"], tokens["answer"]) == (3 * 1000 + (4 + 1) * 16, (1 + 5 + 2) * 3000)
    assert (tokens["longest"], tokens["most_said"]) == (16_064, 15_000)
    assert tokens["trained"] == 2 * (2 * 1000 + 4 * 16 + 6 * 3000)
    assert tokens["origin"] == (
        "the chosen prompts and their 8 turns, with 16 tokens of the chat template between two turns "
        "(assumed, since the target's tokenizer and template cannot be read)"
    )
    assert plan.hours == {
        "regenerate": 24_000 / 100 / 3600, "record": 27_080 / 1000 / 3600, "train": 40_128 / 10 / 3600
    }  # fmt: skip
    pairs = 48 * 2 * 8 * 128 * 2
    assert plan.memory["regenerate"] - plan.memory["weights"] == 64 * 16_064 * pairs // 8
    assert alone.memory["regenerate"] - alone.memory["weights"] == 64 * 4_000 * pairs // 8
    assert "  longest conversation       16,064\n" in render(plan)


def test_a_conversation_that_is_longer_than_a_batch_is_one(maverick: Path, tmp_path: Path) -> None:
    batches = ["record.batch_tokens=1000", "train.batch_tokens=800", "regenerate.max_new_tokens=2000"]
    settings = load("maverick", [f"target.path={maverick}", f"run.root={tmp_path}", *batches])
    plan = make_plan(settings, UNKNOWN, gpus=8)
    longest = 4096 + 2000
    assert plan.tokens["longest"] == longest
    assert plan.memory["record"] - plan.memory["weights"] == longest * 5120 * 7 * 2
    assert {held["batch"] for held in plan.training_memory.values()} == {longest * (20_496 + 9)}


@pytest.mark.usefixtures("brief")
def test_no_run_holds_more_than_was_planned(
    talking: Path, recipe: Settings, tiny_target: Target, changed: Callable[..., Settings]
) -> None:
    settings = replace(
        changed("prepare", max_prompt_tokens=120), run=replace(recipe.run, root=str(talking.parent), name=talking.name)
    )
    planned = make_plan(settings, UNKNOWN, gpus=1).tokens
    regenerate(settings, talking, tiny_target)
    answered = make_plan(settings, UNKNOWN, gpus=1).tokens
    answers = read_answers(talking / "conversations" / "answers.jsonl")
    assert sum(len(answer.turns) for answer in answers) == 48
    assert planned["answer"] == 48 * settings.regenerate.max_new_tokens
    assert 0 < max(len(answer.ids) for answer in answers) <= planned["longest"]
    assert 0 < max(len(answer.said) for answer in answers) <= planned["most_said"] == 24
    for key in ("prompt", "answer", "all", "trained"):
        assert 0 < answered[key] <= planned[key]
    for key in ("conversations", "training", "longest", "most_said"):
        assert answered[key] == planned[key]


QUESTIONS = ("Why?", " Why", " 12", "\n\nso", "'s", "  ", "é你🙂 ", "<|", "word0of")


@pytest.mark.parametrize("template", ["its own", "trimming", "spaced"])
@pytest.mark.parametrize("follow_ups", [0, 1, 3])
def test_what_is_as_long_as_the_recipe_allows_is_no_longer_than_planned(
    follow_ups: int,
    template: str,
    recipe: Settings,
    tiny_target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts and answers of just the longest length, whatever questions begin and end with."""
    most, tokenizer = recipe.regenerate.max_new_tokens, copy.deepcopy(tiny_target.tokenizer)
    tokenizer.chat_template = {"its own": tokenizer.chat_template, "trimming": TRIMMING, "spaced": SPACED}[template]
    text = tiny_target.text._replace(tokenizer=tokenizer)
    monkeypatch.setattr(plan_tokens, "load_text", lambda settings: text)
    monkeypatch.setattr(tiny_target, "text", text)
    full = Answer([104] * (most - 1) + [tokenizer.eos_token_id], True)
    monkeypatch.setattr(tiny_target, "generate", lambda prompts, *rest: [full for _ in prompts])
    for number, question in enumerate(QUESTIONS):
        asked = Conversation(str(number), "s", "train", [{"role": "user", "content": "One?"}], (question,) * follow_ups)
        longest = len(prompt_ids(tokenizer, asked)) + follow_ups * len(tokenizer(question).input_ids)
        settings = replace(
            recipe,
            run=replace(recipe.run, root=str(tmp_path), name=asked.id),
            prepare=replace(recipe.prepare, max_prompt_tokens=longest),
        )
        folder = tmp_path / asked.id / "conversations"
        folder.mkdir(parents=True)
        (folder / "prompts.jsonl").write_bytes(encode_line(asked._asdict()))
        planned = make_plan(settings, UNKNOWN, gpus=1).tokens
        regenerate(settings, tmp_path / asked.id, tiny_target)
        answered = make_plan(settings, UNKNOWN, gpus=1).tokens
        assert answered["answer"] == planned["answer"] == (1 + follow_ups) * most
        spare = planned["prompt"] - answered["prompt"]
        assert 0 <= spare == planned["all"] - answered["all"] <= 5 * follow_ups
        assert ("tokens of the chat template" in planned["origin"]) == bool(follow_ups)


def test_given_answers_are_planned_as_they_are_kept(recipe: Settings, tiny_target: Target, tmp_path: Path) -> None:
    """Their turns are those of the assistant, calls of tools too, and they need no room to answer in."""
    said = {"role": "assistant", "content": "So."}
    messages = [{"role": "user", "content": "One?"}, said, {"role": "tool", "content": "1"}]
    asked = Conversation("it", "s", "train", messages, ("And " * 40,), (said, said))
    settings = replace(
        recipe,
        run=replace(recipe.run, root=str(tmp_path), name="run"),
        prepare=replace(recipe.prepare, max_prompt_tokens=200, keep_answers=True),
        regenerate=replace(recipe.regenerate, max_new_tokens=400),
    )
    folder = tmp_path / "run" / "conversations"
    folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_bytes(encode_line(asked._asdict()))
    planned = make_plan(settings, UNKNOWN, gpus=1).tokens
    regenerate(settings, tmp_path / "run", tiny_target)
    (answer,) = read_answers(folder / "answers.jsonl")
    assert len(answer.turns) == 3
    assert 112 < len(answer.ids) - len(answer.said) <= planned["prompt"]
    assert len(answer.ids) <= planned["all"] == planned["longest"] == 512


@pytest.mark.parametrize(
    ("turns", "given", "positions", "between", "longest"),
    [
        (1, False, 1000, 7, (50, 20, 70)),
        (3, False, 1000, 0, (50, 60, 110)),
        (3, False, 1000, 7, (64, 60, 124)),
        (3, False, 123, 7, (64, 60, 123)),
        (3, False, 83, 7, (63, 60, 83)),
        (3, True, 83, 7, (64, 60, 83)),
        (9, False, 60, 7, (40, 60, 60)),
        (1, False, 60, 7, (40, 20, 60)),
        (1, True, 60, 7, (50, 20, 60)),
        (9, False, 10, 7, (0, 20, 20)),  # which regenerate refuses
    ],
)
def test_the_targets_positions_end_a_conversation(
    turns: int, given: bool, positions: int, between: int, longest: tuple[int, int, int], recipe: Settings
) -> None:
    settings = replace(
        recipe,
        prepare=replace(recipe.prepare, max_prompt_tokens=50),
        regenerate=replace(recipe.regenerate, max_new_tokens=20),
    )
    assert longest_of(settings, positions, Asked(True, turns, given), between) == longest


def test_the_disk_is_that_of_the_nearest_folder(
    recipe: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=0)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    settings = replace(recipe, run=replace(recipe.run, root=str(tmp_path / "not" / "yet")))
    plan = make_plan(settings, UNKNOWN, gpus=1)
    assert asked == [tmp_path]
    assert plan.warnings[0].endswith(f"is too small by {in_bytes(plan.disk['all'])}")
    there = tmp_path / "not" / "yet" / "tiny"
    there.mkdir(parents=True)
    (there / "part").write_bytes(b"x" * 500)
    for free, warnings in ((plan.disk["all"] - 500, 0), (plan.disk["all"] - 501, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        found = make_plan(settings, UNKNOWN, gpus=1)
        assert (found.disk["there"], len(found.warnings)) == (500, warnings)
    assert found.warnings == [f"the disk of run.root = {there.parent} is too small by 1 B"]


def test_the_command_says_it_as_a_table_and_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "tiny", "prepare.train=100", "--tokens-per-s", "1e3", "--gpus", "1"]) == 0
    table = capsys.readouterr().out
    assert "\ntokens   at most, by the recipe's counts: every prompt and answer as long as the recipe allows\n" in table
    assert cli.main(["plan", "tiny", "prepare.train=100", "--tokens-per-s", "1e3", "--gpus", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"]["conversations"] == 196
    assert plan["hours"] == {"regenerate": None, "record": plan["tokens"]["all"] / 1e3 / 3600, "train": None}
    assert f"{plan['tokens']['all']:,}" in table
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("speeds", "gpus", "complaint"),
    [
        (Speeds(0.0, None, None), 1, "--answer-tokens-per-s = 0.0: it is no speed; give"),
        (Speeds(None, float("nan"), None), 1, "--tokens-per-s = nan: it is no speed; give"),
        (Speeds(None, None, -1.0), 1, "--train-tokens-per-s = -1.0: it is no speed; give"),
        (UNKNOWN, 0, "--gpus = 0: it is too small; give at least 1"),
    ],
)
def test_what_is_no_speed(recipe: Settings, speeds: Speeds, gpus: int, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        make_plan(recipe, speeds, gpus)


def test_a_recipe_that_does_not_suit_its_target(changed) -> None:
    with pytest.raises(UserError, match="draft.vocab_size = 100000: the target has a vocabulary of"):
        make_plan(changed("draft", vocab_size=100_000), UNKNOWN, 1)


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (1234, "1.23 kB"), (99_960, "100 kB"), (40.96e12, "41.0 TB")],
)
def test_sizes_have_three_digits(amount: float, text: str) -> None:
    assert in_bytes(amount) == text
    assert counted(400.7e9) == "401 B"


def test_a_spool_takes_what_it_may_hold(recipe: Settings, tmp_path: Path) -> None:
    settings = replace(recipe, run=replace(recipe.run, root=str(tmp_path)))
    whole = make_plan(settings, UNKNOWN, gpus=1)
    spooled = replace(
        settings, record=replace(settings.record, spool_shards=2), train=replace(settings.train, epochs=1)
    )
    bounded = make_plan(spooled, UNKNOWN, gpus=1)
    gone = whole.tokens["all"] * 16 // 24 - 2 * settings.record.shard_tokens
    per_token = whole.store_bytes_per_token[whole.stored_as] + 5
    assert whole.disk["store"] - bounded.disk["store"] == gone * per_token > 0
