"""`eagle3 export`: what it writes, what it refuses, and what its check finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eagle3.cli import main
from eagle3.configs.loader import load, save
from eagle3.eval import export
from eagle3.eval.engines import load_engine
from eagle3.eval.serving import Served, decode_all
from eagle3.models.checkpoint import load_draft
from eagle3.models.formats import FORMATS
from eagle3.models.target import Target
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("name", FORMATS)
def test_a_head_is_written_with_its_card(name: str, trained: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "heads" / name
    assert main(["export", str(trained), "--format", name, "--out", str(out)]) == 0
    assert {"README.md", "config.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == [name]
    text = (out / "README.md").read_text()
    target = json.loads((trained / "draft" / "config.json").read_text())["eagle3_target"]
    assert target["weights_sha256"] in text
    assert "Not measured." in text
    assert str(out) in text  # in the command that launches it
    assert main(["export", str(trained), "--format", name, "--out", str(out), "--check"]) == 0
    assert f"{out} is the head of {trained}" in capsys.readouterr().out


def test_what_was_measured_stands_on_the_card(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    changes = ["eval.prompts=2", "eval.max_new_tokens=4", "eval.temperatures=0", f"run.root={tmp_path}", "run.name=run"]
    assert main(["eval", str(run / "config.yaml"), *changes]) == 0
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "head")]) == 0
    text = (tmp_path / "head" / "README.md").read_text()
    assert "Measured with chain of 5" in text
    assert "| T   | drafting | acceptance length" in text


def test_the_card_tells_given_answers_from_the_targets_own(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    path = run / "conversations" / "answers.summary.json"
    for given, said in (
        (0, "16 answers of the target's own (24"),
        (5, "11 answers of the target's own and 5 that came"),
    ):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"by_finish": {"length": 24 - given, "given": given}})
        )
        assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / str(given))]) == 0
        assert said in (tmp_path / str(given) / "README.md").read_text()


def test_a_head_that_was_changed_is_told(trained: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "head"
    assert main(["export", str(trained), "--format", "vllm", "--out", str(out)]) == 0
    tensors = load_file(out / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors")
    assert main(["export", str(trained), "--format", "vllm", "--out", str(out), "--check"]) == 3
    assert "vLLM: there is no lm_head.weight, which it leaves uninitialised" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_live_engine_is_compared_with_the_recipes_engine(
    engine: str, trained: Path, tiny_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """What transformers' model says stands in for a live engine's answers; then one token of them is another."""
    run, out = Path(shutil.copytree(trained, tmp_path / "run")), tmp_path / "head"
    chosen = ["eval.max_new_tokens=6", f"eval.engine={engine}"]
    save(load(run / "config.yaml", chosen), run / "config.yaml")
    draft, wrong, used = load_draft(run / "draft").eval(), list[int](), list[str]()

    def load_noted(*arguments: Any) -> Any:
        target = load_engine(*arguments)
        used.append(type(target).__name__)
        return target

    def answer(_: Any, prompts: list[list[int]], most: int) -> Served:
        served = decode_all(tiny_target, draft, prompts, 5, most)
        for place in wrong:
            served.answers[0][place] ^= 1
        return served

    monkeypatch.setattr(export, "load_engine", load_noted)
    monkeypatch.setattr(export, "connect", lambda url: SimpleNamespace(url=url))
    monkeypatch.setattr(export, "ask", answer)
    assert main(["export", str(run), "--format", "hf", "--out", str(out)]) == 0
    command = ["export", str(run), "--format", "hf", "--out", str(out), "--check", "--against", "http://it"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 test prompts, greedy, chain of 5, float32 here" in said
    assert "the same tokens, and accepted counts within 1% at every position" in said
    wrong.append(2)
    assert main(command) == 3
    assert "prompt 1: it says something else from token 2 on" in capsys.readouterr().err
    assert used == ["NativeTarget" if engine == "native" else "Target"] * 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "vlm", "--out", "x"], "--format = vlm: there is no such format; did you mean vllm?"),
        (["--format", "gguf", "--out", "x"], "--format = gguf: there is no such format; choose one of hf, vllm, "),
        (["--format", "hf", "--out", "."], "--out = .: something stands there; choose a new folder"),
        (
            ["--format", "hf", "--out", "config.yaml/x"],
            "--out = config.yaml/x: it cannot be written (Not a directory); ",
        ),
        (["--format", "hf", "--out", "x", "--check"], "draft = x/config.json: there is no such file; "),
        (
            ["--format", "hf", "--out", "x", "--against", "y"],
            "--against = y: it belongs to --check; export first, then",
        ),
        (["--format", "hf", "--out", "x", "--check", "--prompts", "0"], "--prompts = 0: nothing to compare; give 1 or"),
    ],
)
def test_mistakes_are_refused(
    trained: Path, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(trained)
    assert main(["export", str(trained), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
    assert not Path("x").exists()


def test_folders_without_a_head_are_refused(trained: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["export", str(tmp_path), "--format", "hf", "--out", str(tmp_path / "x")]
    assert main(command) == 2
    assert "it is no run; give the folder of a run, such as runs/tiny" in capsys.readouterr().err
    shutil.copy(trained / "config.yaml", tmp_path)
    assert main(command) == 2
    assert "it has no head yet; run `eagle3 train` first, to its end" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "type", "config"])
def test_a_head_that_contradicts_itself_is_not_exported(
    damage: str, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    weights, config = run / "draft" / "model.safetensors", run / "draft" / "config.json"
    tensors, said = load_file(weights), json.loads(config.read_text())
    if damage == "missing":
        del tensors["fc.weight"]
    elif damage == "type":
        tensors["d2t"] = tensors["d2t"].int()
    else:
        said["intermediate_size"] *= 2
    save_file(tensors, weights)
    config.write_text(json.dumps(said))
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: draft = ")
    assert error.count("\n") == 1
