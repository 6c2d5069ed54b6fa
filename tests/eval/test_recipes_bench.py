"""The benchmark of recipes: what it compares, what it keeps, and that it decodes validation prompts alone."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
from eagle3.configs.entry import finish
from eagle3.configs.errors import Incomplete, UserError
from eagle3.eval.bench import recipes
from eagle3.eval.bench.recipes import Head

OPTIONS = ["--chain", "2", "--prompts", "3", "--hardware", "two cores"]


def test_differences_are_paired_by_seed() -> None:
    heads = {
        "first": [Head((2.0, 1.5), 10.0, 1000), Head((3.0, 1.7), 12.0, 1000), Head((4.0, 1.9), 14.0, 1000)],
        "other": [Head((2.3, 1.5), 20.0, 1001), Head((3.4, 1.5), 20.0, 1001), Head((4.5, 1.5), 20.0, 1001)],
    }
    found = recipes.difference(heads, "other", 0)
    assert found.mean == pytest.approx(0.4)
    assert found.half == pytest.approx(4.303 * 0.1 / 3**0.5)
    lines = recipes.table(heads)
    assert "3.400  +0.400 [+0.152, +0.648]" in lines[2] and lines[2].endswith("20  1,001")
    alone = {name: each[:1] for name, each in heads.items()}
    assert recipes.difference(alone, "other", 0) == (pytest.approx(0.3), None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seeds", "11"], "error: --seeds = 11: "),
        (["--variants", "sgd"], "error: --variants = sgd: there is no such variant; give adamw (former), "),
        (["--variants", "mine: train.lr=1"], "error: setting = train.lr: there is no such setting"),
        (["--run", "nowhere"], "error: --run = nowhere: there is no "),
        (["--chain", "0"], "error: --chain = 0: it is too small"),
    ],
)
def test_what_makes_no_sense_is_refused(
    trained: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(trained / "config.yaml"), "--run", str(trained), "--root", str(tmp_path), *options]
    assert finish(lambda: recipes.main(given)) == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_variant_has_a_name_and_overrides() -> None:
    assert recipes.variant("muon") == ("muon", recipes.MUON)
    assert recipes.variant("slow: train.epochs=2 run.seed=1") == ("slow", ("train.epochs=2", "run.seed=1"))


def test_heads_are_decoded_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a training that takes the run's head as it is; the prompts are those of the validation split."""

    def taken(asked: object, run: Path, folder: Path, overrides: object) -> float:
        shutil.copytree(run / "draft", folder / "draft", dirs_exist_ok=True)
        return 7.0

    monkeypatch.setattr(recipes, "train", taken)
    out = tmp_path / "out.json"
    given = [str(trained / "config.yaml"), "--run", str(trained), "--root", str(tmp_path / "root"), "--out", str(out)]
    given += [*OPTIONS, "--seeds", "2", "--variants", "adamw (former)", "muon"]
    recipes.main(given)
    lines = json.loads(out.read_bytes())
    assert [line["shape"].partition("T=")[2] for line in lines] == ["0, 2 seeds, muon", "1, 2 seeds, muon"]
    for line in lines:
        assert line["value"] == line["reference"]["value"] >= 1.0 and line["ratio"] == line["limit"] == 1.0
    kept = json.loads((tmp_path / "root" / "muon-1" / "decoded.json").read_bytes())
    assert kept["key"][-1] == ["validation-0", "validation-1", "validation-2"]
    assert kept["lengths"][0] == pytest.approx(statistics.mean([lines[0]["value"]]), abs=1e-4)
    said = capsys.readouterr().out
    assert said.count(" of 4: ") == 4
    monkeypatch.setattr(recipes.Bench, "_decode", None)
    recipes.main(given)
    assert capsys.readouterr().out == said


@pytest.mark.slow
def test_a_training_that_is_done_is_not_repeated(trained: Path, tmp_path: Path) -> None:
    given = [str(trained / "config.yaml"), "train.epochs=1", "--run", str(trained), "--root", str(tmp_path)]
    given += [*OPTIONS, "--seeds", "1", "--variants"]
    recipes.main([*given, "muon"])
    spent, log = tmp_path / "muon-0" / "cpu.json", tmp_path / "muon-0" / "train" / "metrics.jsonl"
    before = spent.read_bytes(), log.stat().st_mtime_ns
    assert json.loads(before[0])["cpu_s"] > 0
    recipes.main([*given, "muon"])
    assert (spent.read_bytes(), log.stat().st_mtime_ns) == before
    with pytest.raises(Incomplete, match=r"muon-0 ended with 2: see .*train\.log"):
        recipes.main([*given, "muon: train.optimizer=adamw"])


def test_a_run_without_validation_prompts_is_refused(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    prompts = run / "conversations" / "prompts.jsonl"
    prompts.write_text("".join(line for line in prompts.open() if '"validation"' not in line))
    with pytest.raises(UserError, match="it has no validation prompts"):
        recipes.main([str(run / "config.yaml"), "--run", str(run), "--root", str(tmp_path / "root")])
