"""What a head's files cannot tell shows in its acceptance, beside what its card says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from eagle3.cli import main
from safetensors.torch import load_file, save_file
from torch import Tensor

from .conftest import DEMO

pytestmark = pytest.mark.serving

RECIPE = str(DEMO / "config.yaml")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's head, with its card."""
    head = tmp_path_factory.mktemp("heads") / "demo"
    assert main(["export", str(DEMO), "--format", "hf", "--out", str(head)]) == 0
    return head


def rewritten(head: Path, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(head / "model.safetensors")
    for name in names:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, head / "model.safetensors", metadata={"format": "pt"})


def faithful(head: Path) -> None:
    """Nothing is wrong."""


def norm_fed_back(head: Path) -> None:
    """Pitfall 4: its engine feeds the normed output back, its trainer did not."""
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"norm_output": True}))


def pairs_interleaved(head: Path) -> None:
    """Pitfall 5: its trainer turned neighbours, as Llama-4 does, and engines turn halves."""
    width = json.loads((head / "config.json").read_text())["head_dim"]
    names = tuple(f"midlayer.self_attn.{name}_proj.weight" for name in "qk")
    rewritten(head, names, lambda weight: weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).flatten(0, 2))


def features_descending(head: Path) -> None:
    """Pitfall 6: its trainer had the last captured layer first."""
    rewritten(head, ("fc.weight",), lambda weight: weight.unflatten(1, (3, -1)).flip(1).flatten(1))


@pytest.mark.parametrize("plant", [faithful, norm_fed_back, pairs_interleaved, features_descending])
def test_a_head_that_is_misread_accepts_less_than_its_card_says(
    plant: Callable[[Path], None], exported: Path, tmp_path: Path
) -> None:
    theirs = Path(shutil.copytree(exported, tmp_path / "theirs"))
    plant(theirs)
    assert main(["import", str(theirs), RECIPE, "--format", "hf", "--out", str(tmp_path / "head")]) == 0
    shutil.copytree(DEMO / "conversations", tmp_path / "run" / "conversations")
    changes = [f"run.root={tmp_path}", "run.name=run", f"eval.draft={tmp_path / 'head'}", "eval.chain=5"]
    assert main(["eval", RECIPE, *changes, "eval.temperatures=0"]) == 0  # the answers that the card is about
    report = json.loads((tmp_path / "run" / "eval" / "report.json").read_text())
    said = [warning for warning in report["warnings"] if "its card says an acceptance length of" in warning]
    assert len(said) == (plant is not faithful)
