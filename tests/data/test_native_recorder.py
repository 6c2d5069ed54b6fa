"""The native target records what transformers' does, packed; and the command line asks for it by name."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from eagle3.cli import main
from eagle3.configs import loader
from eagle3.configs.settings import Settings
from eagle3.data.answers import read_answers
from eagle3.data.record import record
from eagle3.data.recorders import NativeRecorder
from eagle3.data.store import Store
from eagle3.models.native.loading import load_native
from eagle3.models.native.target import NativeTarget
from eagle3.models.target import Target


@pytest.fixture(scope="module")
def native(recipe: Settings) -> NativeTarget:
    return load_native(recipe.target, capacity=0)


@pytest.fixture
def exact(changed) -> Settings:
    return changed("record", features_dtype="float32", last_hidden_dtype="float32")


def test_its_store_is_transformers_store_up_to_rounding(
    answered: Path, exact: Settings, tiny_target: Target, native: NativeTarget, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(answered, tmp_path / "other"))
    record(exact, answered, tiny_target)
    record(exact, other, native)
    theirs, ours = Store(answered / "store"), Store(other / "store")
    assert ours.verify() == [] and len(ours) == len(theirs)
    differing = {
        field.name
        for field in dataclasses.fields(ours.manifest)
        if getattr(ours.manifest, field.name) != getattr(theirs.manifest, field.name)
    }
    assert differing == {"shards"}
    for index in range(len(ours)):
        mine, other_sample = ours[index], theirs[index]
        assert (mine.id, mine.input_ids.tolist()) == (other_sample.id, other_sample.input_ids.tolist())
        for found, wanted in ((mine.features, other_sample.features), (mine.last_hidden, other_sample.last_hidden)):
            assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_a_batch_is_packed(native: NativeTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = list[int]()
    real = native.decoder.forward
    monkeypatch.setattr(native.decoder, "forward", lambda ids, *rest: computed.append(len(ids)) or real(ids, *rest))
    batches = [[torch.arange(length).int().numpy() for length in lengths] for lengths in ((30, 2, 17), (5,))]
    states = list(NativeRecorder(native).record(batches))
    assert computed == [49, 5]
    assert [len(found.features) for found in states] == [len(found.last_hidden) for found in states] == [30, 2, 17, 5]


def test_a_recipe_asks_for_it(answered: Path, exact: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = answered.parent / "recipe.yaml"
    path.write_text(loader.dump(exact))
    asked = [str(path), f"run.root={answered.parent}", f"run.name={answered.name}", "record.engine=native"]
    monkeypatch.setattr("eagle3.models.target.load_target", None)  # nothing else may be loaded
    assert main(["record", *asked]) == 0
    assert len(Store(answered / "store")) == len(read_answers(answered / "conversations" / "answers.jsonl"))


def test_servers_have_engines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record", "tiny", "record.engine=native", "record.endpoints=[http://node:8000]"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: record.engine = native: servers record (record.endpoints), each in its own engine; leave"
    )
