"""What a run will cost: Maverick's arithmetic, measured before assumed, and a disk that is too small."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from eagle3 import cli
from eagle3.configs.errors import UserError
from eagle3.configs.loader import load
from eagle3.configs.settings import Settings
from eagle3.data.plan import Plan, Speeds, make_plan
from eagle3.data.plan_table import render
from eagle3.data.store import Store
from eagle3.data.units import counted, in_bytes
from transformers import Llama4Config, Llama4TextConfig

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
    assert flagship.store_bytes["bfloat16"] == 40_960 * BILLION + beside + ends
    assert flagship.store_bytes["float8_e4m3fn"] == pytest.approx(20.5e12, rel=1e-3)
    assert flagship.disk["store"] == flagship.store_bytes["float8_e4m3fn"]
    assert in_bytes(flagship.disk["store"]) == "20.5 TB"


def test_memory_of_maverick(flagship: Plan) -> None:
    assert flagship.memory["weights"] == pytest.approx(800e9 / 8, rel=0.01)
    pairs = 64 * 2000 * 48 * 2 * 8 * 128 * 2
    assert flagship.memory["regenerate"] - flagship.memory["weights"] == pairs // 8
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
    longest = 24 * (recipe.prepare.max_prompt_tokens + recipe.regenerate.max_new_tokens)
    assumed = make_plan(settings, UNKNOWN, gpus=1)
    assert (assumed.tokens["all"], assumed.tokens["measured"]) == (longest, False)
    assert not (tmp_path / "run").exists()
    assert assumed.disk["there"] == 0 and assumed.warnings == []

    run = Path(shutil.copytree(finished, tmp_path / "run"))
    recorded = make_plan(settings, UNKNOWN, gpus=1)
    manifest = Store(run / "store").manifest
    assert (recorded.tokens["all"], recorded.tokens["answer"]) == (manifest.tokens, manifest.supervised_tokens)
    assert recorded.tokens["origin"] == "the recorded store"
    assert recorded.disk["there"] == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    shards = (path.stat().st_size for path in (run / "store").glob("shard-*.safetensors"))
    actual = sum(shards) + (run / "store" / "head.safetensors").stat().st_size
    assert recorded.disk["store"] == pytest.approx(
        actual, rel=0.2
    )  # headers weigh much in a store as small as this one

    shutil.rmtree(run / "store")
    answered = make_plan(settings, UNKNOWN, gpus=1)
    assert answered.tokens == recorded.tokens | {"origin": "the answers"}

    (run / "conversations" / "answers.summary.json").unlink()
    summary = json.loads((run / "conversations" / "summary.json").read_bytes())
    summary["kept"]["train"] = {"sums": 3}
    (run / "conversations" / "summary.json").write_text(json.dumps(summary))
    chosen = make_plan(settings, UNKNOWN, gpus=1).tokens
    assert (chosen["conversations"], chosen["training"], chosen["origin"]) == (11, 3, "the chosen prompts")


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
