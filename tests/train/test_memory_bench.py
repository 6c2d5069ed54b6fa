"""The memory benchmark counts what is held, and says so when a prediction is wrong."""

from __future__ import annotations

import sys

import pytest
import torch
from eagle3.configs.entry import finish
from eagle3.models.draft import DraftConfig
from eagle3.train.bench import memory
from eagle3.train.bench.ledger import Ledger

SMALL = memory.Shape(
    DraftConfig(96, 320, 4, 2, 16, 2000, 900, (1, 2, 3), 1e-5, 10_000.0, 512),
    3,
    ((4, 300), (60, 200)),
    "float8_e4m3fn",
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory.SHAPES, "tiny", SMALL)
    monkeypatch.setattr(memory, "resident", lambda name: memory.predicted(memory.SHAPES[name])["all"])


@pytest.mark.usefixtures("small")
def test_a_small_shape_is_as_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(lambda: memory.main(["--shapes", "tiny"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[2:19].rstrip() for line in lines[2:]] == [*memory.predicted(SMALL), "all, resident"]
    assert all(0.85 < float(line.split()[-1]) < 1.15 for line in lines[2:])


@pytest.mark.usefixtures("small")
def test_a_wrong_prediction_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = memory.predicted
    monkeypatch.setattr(memory, "predicted", lambda shape: real(shape) | {"mlp": int(0.8 * real(shape)["mlp"])})
    assert finish(lambda: memory.main(["--shapes", "tiny"])) == 3
    assert "off by more than 15%: tiny: mlp 0.80\n" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's largest size")
def test_a_fresh_process_grows() -> None:
    grown = memory.resident("tiny")
    assert grown is not None and 0 < grown < 50e6


def test_a_ledger_follows_storages() -> None:
    ledger = Ledger({"test_a_ledger_follows_storages": "here"}, "rest")
    first = torch.zeros(1000)
    ledger.adopt("first", [first])
    with ledger:
        second = first + 1
        view, third = second[3:], second * 2
        del third
        assert ledger.keep() == {"first": 4000, "here": 4000}
        del second
        assert len(view) == 997
        fourth = torch.zeros(500)
        del view
        fifth = torch.zeros(1500)
    assert ledger.peaks() == {"first": 4000, "here": 4000, "transient": 8000, "all": 12000}
    assert len(fourth) + len(fifth) == 2000
