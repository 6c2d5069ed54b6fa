"""The benchmark of decoding measures what it says: all sides say the same, and the parts of a round are its own."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from eagle3.configs.entry import finish
from eagle3.data.bench import sides
from eagle3.eval.bench import decoding
from eagle3.eval.bench.decoding import CHAIN, FORMER, GENERATE, PLAIN
from eagle3.eval.bench.inside import Inside, Timed

OPTIONS = ["--prompts", "2", "--longer", "4", "--tree", "6", "3", "2", "--rounds", "1", "--only", "decoding"]


def test_decoding_is_measured(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sides, "LEAST", 1)
    out = tmp_path / "found" / "it.json"
    decoding.main([*OPTIONS, "--run", str(trained), "--out", str(out), "--hardware", "two cores"])
    results = json.loads(out.read_bytes())
    ratios, rounds = results[:3], results[3:]
    assert [(line["notes"].split(";")[0], line["reference"]["name"], line["limit"]) for line in ratios] == [
        (PLAIN, GENERATE, 1.5),
        (CHAIN, FORMER, 1.5),
        (CHAIN, PLAIN, 2.0),
    ]
    for line in ratios:
        assert line["ratio"] == pytest.approx(line["value"] / line["reference"]["value"], rel=0.02)
        assert line["unit"] == "TPS/user" and line["hardware"] == "two cores"
    assert [line["notes"].split(";")[0] for line in rounds] == [CHAIN, "native, chain 4", "native, tree"]
    assert all(0 < line["ratio"] < 1 and line["value"] < line["reference"]["value"] for line in rounds)
    said = capsys.readouterr().out
    assert said.count("2 of 2") == 7  # every side says what plain decoding says


def test_a_target_that_the_head_was_not_trained_on_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finish(lambda: decoding.main(["--run", str(trained), "--target", "embedded", "--only", "timings"])) == 2
    said = f"error: --target = embedded: the head in {trained / 'draft'} was trained on another target; give"
    assert said in capsys.readouterr().err


def test_a_run_without_a_head_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(lambda: decoding.main(["--run", str(tmp_path)])) == 2
    assert f"error: --run = {tmp_path}: it has no head; give a trained run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--tree", "3", "7", "10"],
            '--tree = 3 7 10: "tree 3/7/10" verifies fewer nodes than it has levels; give nodes,',
        ),
        (["--prompts", "0"], "--prompts = 0: it is too small; give at least 1"),
        (["--chain", "0"], "--chain = 0: it is too small; give at least 1"),
        (["--threads", "1", "0"], "--threads = 0: this process may use"),
        (
            ["--against", "nowhere.json"],
            "--against = nowhere.json: it cannot be read (No such file or directory); give",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert finish(lambda: decoding.main(options)) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_calls_are_timed_and_all_else_is_let_through() -> None:
    class Slow:
        length = 3

        def work(self, seconds: float) -> float:
            time.sleep(seconds)
            return 2 * seconds

    timed: Any = Timed(Slow(), "work")
    assert timed.work(0.01) == 0.02 and timed.work(0.0) == 0.0 and timed.length == 3
    first, second = timed.seconds["work"]
    assert first >= 0.01 > second


def test_what_is_neither_verify_nor_draft_is_other() -> None:
    assert Inside(verify=3.0, draft=1.0, whole=5.0, rounds=7).other == pytest.approx(0.2)
