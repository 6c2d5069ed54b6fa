"""A real vLLM answers as the target does in process: the same greedy ids, whole and exact."""

from __future__ import annotations

from pathlib import Path

import pytest
from eagle3.cli import main
from eagle3.data.answers import Answer, read_answers

from .conftest import Serve

pytestmark = pytest.mark.serving

CHANGES = ["prepare.train=8", "prepare.validation=4", "prepare.test=4", "regenerate.max_new_tokens=64"]


@pytest.fixture(scope="module")
def url(serve: Serve) -> str:
    """vLLM with the target that ships."""
    return serve("target").result().url


def answers(folder: Path, *changes: str) -> dict[str, Answer]:
    """What the stages write with these changes of the demo's recipe."""
    for stage in ("prepare", "regenerate"):
        assert main([stage, "tiny", f"run.root={folder}", *CHANGES, *changes]) == 0
    return {answer.id: answer for answer in read_answers(folder / "tiny" / "conversations" / "answers.jsonl")}


def test_vllm_answers_as_the_target_in_process(url: str, tmp_path: Path) -> None:
    greedy = "regenerate.temperatures=0.0"
    here = answers(tmp_path / "here", greedy)
    there = answers(tmp_path / "there", greedy, f"regenerate.endpoints={url}/v1", "regenerate.concurrency=8")
    assert len(here) == 16
    assert there == here
    assert {answer.finish for answer in there.values()} == {"stop", "length"}


def test_what_vllm_samples_depends_on_the_seed_alone(url: str, tmp_path: Path) -> None:
    warm = ["regenerate.temperatures=1.0", f"regenerate.endpoints={url}", "regenerate.max_new_tokens=16"]
    first, other = (answers(tmp_path / name, *warm, "run.seed=1") for name in ("first", "other"))
    assert first == other
    train = [name for name, answer in first.items() if answer.split == "train"]
    changed = answers(tmp_path / "changed", *warm, "run.seed=2")
    assert all(first[name] != changed[name] for name in train)
