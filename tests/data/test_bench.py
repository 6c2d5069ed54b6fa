"""The benchmarks measure what they say: the same batches, the whole recording, every byte, and cold files that are cold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eagle3.configs.entry import finish
from eagle3.configs.errors import Incomplete
from eagle3.data.bench import experts, reading, recording, sides, subjects
from eagle3.data.bench.sides import Spent, compare
from eagle3.data.bench.subjects import SAID, Shape, Subject, llama
from eagle3.data.checks import check_states
from eagle3.data.recorders import TransformersRecorder
from eagle3.data.store import Store
from eagle3.models.native.target import NativeTarget
from eagle3.models.target_info import find_decoder

SHAPE = Shape(hidden=32, layers=8, inner=64, heads=4, kv_heads=2, vocabulary=300)
SMALL = [f"--{name.replace('_', '-')}={size}" for name, size in SHAPE._asdict().items()]
FIELDS = {
    "benchmark",
    "hardware",
    "commit",
    "versions",
    "shape",
    "unit",
    "value",
    "reference",
    "ratio",
    "limit",
    "notes",
}

BLOCKED = """
import sys
sys.modules |= dict.fromkeys(("datasets", "deepspeed", "wandb"))
import eagle3.data.bench.recording, eagle3.data.bench.reading, eagle3.data.bench.experts
"""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return llama(SHAPE, "cpu", request.param, tokens=3000, batch_tokens=1024)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sides, "LEAST", 1)


def test_they_need_no_more_than_recording_does() -> None:
    subprocess.run([sys.executable, "-c", BLOCKED], check=True)


def test_the_random_llama_always_says_the_same(subject: Subject) -> None:
    greedy = [answer for answer in subject.answers if answer.temperature == 0.0]
    assert len(greedy) >= 2 and len(subject.shards) > 3
    assert all(set(answer.said) == {SAID} for answer in greedy)
    for answer in greedy:
        (states,) = TransformersRecorder(subject.target).record([[torch.tensor(answer.ids).int().numpy()]])
        assert check_states(answer, states, subject.target) == 0


def test_the_bare_forward_is_the_targets_own_without_hooks(subject: Subject) -> None:
    inputs = subject.inputs()
    assert len(inputs) == sum(map(len, subject.shards))
    assert sum(int((rows > 0).sum()) for rows in inputs) <= subject.tokens <= sum(rows.numel() for rows in inputs)
    with torch.no_grad():
        bare = subject.bare(input_ids=inputs[0], use_cache=False)[0]
    assert bare.equal(subject.target.forward(inputs[0]).last_hidden)
    assert not any(module._forward_hooks for module in subject.bare.modules())
    assert any(module._forward_hooks for module in find_decoder(subject.target.model, "").modules())
    assert subject.bare.embed_tokens.weight.data_ptr() == subject.target.head.embedding.data_ptr()
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64  # attention's four matrices, and the MLP's three
    assert subject.flop_per_token() == 2 * 8 * layer


@pytest.mark.usefixtures("quick")
def test_recording_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, stores = tmp_path / "found" / "it.json", tmp_path / "stores"
    stores.mkdir()
    options = ["--targets", "llama", "embedded", "--tokens", "2000", "--conversations", "3", "--rounds", "1"]
    recording.main([*options, *SMALL, "--folder", str(stores), "--out", str(out), "--commit", "abc"])
    results = json.loads(out.read_bytes())
    assert [(set(line), line["benchmark"], line["limit"], line["commit"]) for line in results] == [
        (FIELDS, "recording", 0.9, "abc")
    ] * 6
    for line in results:
        assert line["ratio"] == pytest.approx(line["value"] / line["reference"]["value"], rel=0.01)
        assert line["value"] > 0 and line["unit"] == "tokens/s"
    sizes = [int(line["notes"].split("; ")[2].partition(" bytes")[0]) for line in results[:3]]
    assert 256 < sizes[0] < 400 and sizes[0] > sizes[1] > sizes[2] > 128  # 4 states of 32 in 2 bytes, or 1 and scales
    said = capsys.readouterr().out
    assert said.count("of processor time") == said.count("forward and capture") == 6
    assert list(stores.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_reading_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    options = ["--hidden", "64", "--tokens", "400", "--samples", "45", "--rounds", "1", "--dtypes", dtype]
    ended = finish(lambda: reading.main([*options, "--folder", str(tmp_path), "--out", str(tmp_path / "it.json")]))
    if "stays in memory" in capsys.readouterr().err:
        pytest.skip("a file in this folder is always in memory")
    assert ended == 0
    results = json.loads((tmp_path / "it.json").read_bytes())
    assert [line["benchmark"] for line in results] == [
        "random reads, cold",
        "random reads, warm",
        "random reads, again",
    ]
    assert all(set(line) == FIELDS and line["value"] > 0 for line in results)


def test_every_sample_is_read_whole_and_the_store_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = reading._parse(["--hidden", "64", "--tokens", "400", "--samples", "45"])
    reading.make_store(tmp_path, asked, "bfloat16")
    store = Store(tmp_path)
    assert store.verify() == [] and len(store.manifest.shards) == 3
    read = list[str]()
    real = Store.__getitem__
    monkeypatch.setattr(Store, "__getitem__", lambda store, at: read.append(real(store, at).id) or real(store, at))
    reader = reading.Reader(tmp_path, 8)
    reader.read()
    assert sorted(read) == sorted(map(str, range(45))) and read != sorted(read, key=int)
    last = store[int(read[-1])]
    assert all(reader._room[name].equal(tensor) for name, tensor in last.stored.items())
    assert reader._room["ids"].equal(last.input_ids)
    assert len(reader._room) == 4


FEW_EXPERTS = ["--hidden=64", "--inner=32", "--layers=8", "--experts=4", "--tokens=1500", "--rounds=1"]


@pytest.mark.usefixtures("quick")
def test_recording_experts_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "it.json"
    experts.main([*FEW_EXPERTS, "--folder", str(tmp_path), "--out", str(out)])
    results = json.loads(out.read_bytes())
    assert [(set(line), line["benchmark"], line["limit"]) for line in results] == [
        (FIELDS, "recording experts", 3.0)
    ] * 2
    assert all(line["value"] > 0 and line["reference"]["value"] > 0 for line in results)
    assert "stores differ by at most" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("quick")
def test_stores_that_differ_are_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = NativeTarget.prefill
    monkeypatch.setattr(NativeTarget, "prefill", lambda target, ids, lengths: real(target, ids.flip(0), lengths))
    with pytest.raises(Incomplete, match="of 0.0001 that rounding explains"):
        experts.main([*FEW_EXPERTS, "--dtypes=float32", "--folder", str(tmp_path)])


def test_medians_are_of_the_ratios_of_each_round() -> None:
    value = [Spent(2.0, 4.0), Spent(10.0, 1.0), Spent(4.0, 2.0)]
    reference = [Spent(1.0, 2.0), Spent(9.0, 1.0), Spent(1.0, 2.0)]
    assert compare(value, reference) == (4.0, 1.0, 0.5, 1.0)


def test_too_few_layers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(lambda: experts.main(["--layers", "4"])) == 2
    assert "error: --layers = 4: it is too small; give at least 8" in capsys.readouterr().err


def test_too_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(lambda: recording.main(["--rounds", "4"])) == 2
    assert finish(lambda: reading.main(["--rounds", "4"])) == 2
    assert capsys.readouterr().err.count("error: --rounds = 4: a median of so few says little; give 5 or more") == 2


def test_presets_have_the_parameters_that_they_are_called_by() -> None:
    for name, shape in subjects.PRESETS.items():
        attention = 2 * shape.hidden**2 + 2 * shape.hidden**2 * shape.kv_heads // shape.heads
        decoder = shape.layers * (attention + 3 * shape.hidden * shape.inner)
        ends = [
            decoder + count * shape.vocabulary * shape.hidden for count in (1, 2)
        ]  # tied, as the small ones, or not
        size = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert min(abs(total / size - 1) for total in ends) < 0.25, name
