"""`eagle3 import`: a head comes in with its card's figures, is evaluated in its own right, and mistakes are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from eagle3.cli import main
from eagle3.models.checkpoint import load_draft


@pytest.fixture(scope="module")
def theirs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head in SGLang's format, measured and with its card."""
    folder = tmp_path_factory.mktemp("theirs")
    run = Path(shutil.copytree(trained, folder / "run"))
    changes = ["eval.prompts=3", "eval.max_new_tokens=4", "eval.temperatures=0", f"run.root={folder}", "run.name=run"]
    assert main(["eval", str(run / "config.yaml"), *changes]) == 0
    assert main(["export", str(run), "--format", "sglang", "--out", str(folder / "head")]) == 0
    return folder / "head"


def test_an_imported_head_is_evaluated_and_compared_with_its_card(
    theirs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, recipe = tmp_path / "head", str(trained / "config.yaml")
    assert main(["import", str(theirs), recipe, "--format", "sglang", "--out", str(head)]) == 0
    said = capsys.readouterr().out
    assert "Taken as given:\n  - captured layers, by output: [1, 3, 4] (as SGLang reads)" in said
    assert "captured layers, by output: [1, 3, 4] (as SGLang reads)" in (head / "README.md").read_text()
    ours, loaded = load_draft(trained / "draft"), load_draft(head)
    assert loaded.config == ours.config
    noted = json.loads((head / "config.json").read_text())
    assert noted["eagle3_import"]["format"] == "sglang"
    assert noted["eagle3_target"]["weights_sha256"]  # the head's own files said so

    shutil.copytree(trained / "conversations", tmp_path / "other" / "conversations")
    changes = ["eval.prompts=3", "eval.max_new_tokens=4", "eval.temperatures=0", f"eval.draft={head}"]
    assert main(["eval", recipe, f"run.root={tmp_path}", "run.name=other", *changes]) == 0
    report = json.loads((tmp_path / "other" / "eval" / "report.json").read_text())
    (figure,) = report["draft"]["imported"]["figures"]
    overall = next(entry for entry in report["results"] if entry["category"] is None)
    assert figure["value"] == round(overall["acceptance_length"], 4)
    assert figure["args"]["drafting"] == overall["drafting"]
    assert not [warning for warning in report["warnings"] if "its card says" in warning]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody/nothing", "--format", "hf"], "HEAD = nobody/nothing: "),
        (["draft", "--format", "hff"], "--format = hff: there is no such format; did you mean hf?"),
        (["store", "--format", "hf"], "draft = store/config.json: there is no such file; "),
        (["draft", "--format", "hf", "--out", "draft"], "--out = draft: something stands there; choose a new folder"),
        (["draft", "target.path=embedded", "--format", "hf"], "HEAD = draft: its hidden_size is 32, and that of embed"),
    ],
)
def test_mistakes_are_refused(
    arguments: list[str],
    said: str,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = [] if "--out" in arguments else ["--out", "x"]
    assert main(["import", arguments[0], "config.yaml", *arguments[1:], *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
    assert not Path("x").exists()


def test_a_draft_that_is_not_there_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [f"run.root={trained.parent}", f"run.name={trained.name}", "eval.draft=heads/none"]
    assert main(["eval", str(trained / "config.yaml"), *changes]) == 2
    assert "eval.draft = heads/none: there is no model.safetensors in it; give the folder" in capsys.readouterr().err
