"""How a chain is chosen: by arithmetic on what was measured, once for an evaluation, and the same for all processes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3.configs.drafting import FIXED, LONGEST
from eagle3.configs.errors import UserError
from eagle3.configs.settings import EvalSettings, Settings
from eagle3.data.conversations import Conversation
from eagle3.data.files import encode_line
from eagle3.eval import calibration, stage
from eagle3.eval.calibration import (
    IN_A_ROW,
    Counted,
    Request,
    Timed,
    best_chain,
    clock_of,
    costs,
    described,
    expected_speedups,
    rising,
)
from eagle3.eval.report import write_report
from eagle3.eval.sampling import Proposal
from eagle3.eval.speculate import Sampling, Verdict
from eagle3.eval.stage import evaluate
from eagle3.eval.traces import read_traces
from eagle3.models.checkpoint import save_draft
from eagle3.models.draft import Eagle3Draft
from eagle3.models.target import Target

TEMPERATURES, TESTS, LIMIT = (0.0, 1.0), 2, 5
CPU = torch.device("cpu")


# --- the choice


def test_expected_speedup_is_tokens_by_cost() -> None:
    timed = Timed(0.002, [0.003, 0.004])
    assert expected_speedups([0.8, 0.4], timed) == pytest.approx([1.8 * 2 / 3, 2.2 * 2 / 4])


@pytest.mark.parametrize(
    ("speedups", "chain"),
    [
        ([0.7, 0.8, 0.9], 0),  # none pays
        ([1.005, 0.9], 0),  # none by more than noise
        ([1.2, 1.5, 1.4], 2),
        ([1.2, 1.495, 1.5, 1.51], 2),  # within a hundredth the shortest
        ([1.2, 1.4, 1.5], 3),
        ([1.5, 1.5], 1),
        ([], 0),
    ],
)
def test_the_fastest_chain_is_chosen_and_of_equals_the_shortest(speedups: list[float], chain: int) -> None:
    assert best_chain(speedups) == chain


def test_temperatures_have_their_own_choice() -> None:
    timed = Timed(0.001, [0.001 + 0.0003 * k for k in range(1, LONGEST + 1)])
    sure = [0.9**i for i in range(1, LONGEST + 1)]
    unsure = [0.5**i for i in range(1, LONGEST + 1)]
    hopeless = [0.1**i for i in range(1, LONGEST + 1)]
    found = [described(0.0, Counted(9, shares), timed)["chain"] for shares in (sure, unsure, hopeless)]
    assert found[0] > found[1] > found[2] == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 3, 2, 4], [1, 2.5, 2.5, 4]),
        ([3, 2, 1], [2, 2, 2]),
        ([1, 4, 2, 3, 9], [1, 3, 3, 3, 9]),
        ([2], [2]),
    ],
)
def test_costs_never_fall_with_the_length(values: list[float], expected: list[float]) -> None:
    assert rising(values) == pytest.approx(expected)


class Machine:
    """Target, head and clock in one: a token takes 10 s, each drafted one 1 s more, and a draft step 2 s.

    It stalls for 1000 s every 11th time.
    """

    def __init__(self) -> None:
        self.time, self.verified, self.length = 0.0, list[int](), 0
        self.taken_in = 0

    def clock(self) -> float:
        return self.time

    def start(self, prompt: Sequence[int], sampling: Sampling) -> Verdict:
        self.length = self.taken_in = len(prompt)
        self.length += 1
        self.taken_in = 1
        return Verdict([*prompt[1:], 7], torch.empty(0))

    def verify(self, proposal: Proposal | None) -> Verdict:
        assert proposal is None or self.taken_in == self.length  # no gaps in the rows of a head that drafts
        count = 0 if proposal is None else len(proposal.tokens)
        self.verified.append(count)
        self.time += 10 + count + (1000 if len(self.verified) % 11 == 0 else 0)
        self.length += 1
        return Verdict([7], torch.empty(0))


class Chain:
    """A drafter of so many tokens for a :class:`Machine`."""

    def __init__(self, machine: Machine, length: int) -> None:
        self.machine, self.length = machine, length

    def start(self, sampling: Sampling) -> None:
        pass

    def update(self, verdict: Verdict) -> None:
        self.machine.taken_in += len(verdict.tokens)

    def propose(self) -> Proposal:
        self.machine.time += 2 * self.length
        return Proposal(torch.zeros(self.length, dtype=torch.long))


def test_costs_are_those_of_rounds_whatever_else_the_machine_does() -> None:
    machine = Machine()
    chains: list[Any] = [Chain(machine, length) for length in range(1, 5)]
    requests = [Request([1, 2], Sampling()), Request([1, 2, 3], Sampling())]
    verifier: Any = machine
    timed = costs(requests, verifier, chains, tokens=6, clock=machine.clock, turns=9)
    assert timed == (10, [10 + 3 * length for length in range(1, 5)])
    blocks = [machine.verified[at : at + IN_A_ROW] for at in range(0, len(machine.verified), IN_A_ROW)]
    assert all(len(set(block)) == 1 for block in blocks)
    turns = [sorted(block[0] for block in blocks[at : at + 5]) for at in range(0, len(blocks), 5)]
    assert turns == [[0, 1, 2, 3, 4]] * 10


def test_the_clock_is_that_of_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This thread's own where it computes alone: it stands still while another process has the core."""
    assert clock_of(CPU, alone=True) is time.thread_time
    assert clock_of(CPU, alone=False) is time.perf_counter
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock_of(CPU, alone=True) is time.perf_counter
    waited = list[Any]()
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    gpu = torch.device("cuda", 1)
    assert clock_of(gpu, alone=True)() > 0 and waited == [gpu]


# --- in the stage


@pytest.fixture(scope="module")
def settings(recipe: Settings) -> Settings:
    return replace(recipe, eval=EvalSettings(temperatures=TEMPERATURES, prompts=TESTS, max_new_tokens=LIMIT))


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, new_draft: Callable[..., Eagle3Draft]) -> Path:
    """A run with test and validation prompts and a draft; not to be written to."""
    folder = tmp_path_factory.mktemp("ready") / "run"
    write_prompts(folder, ["test"] * TESTS + ["validation"] * 3)
    save_draft(new_draft(), folder / "draft", torch.float32)
    return folder


@pytest.fixture
def run_dir(ready: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready, tmp_path / "run"))


def write_prompts(folder: Path, splits: Sequence[str]) -> None:
    prompts = [
        Conversation(f"id {i}", "a", split, [{"role": "user", "content": f"Say {i}."}])
        for i, split in enumerate(splits)
    ]
    (folder / "conversations").mkdir(parents=True, exist_ok=True)
    path = folder / "conversations" / "prompts.jsonl"
    path.write_bytes(b"".join(encode_line(prompt._asdict()) for prompt in prompts))


def choosing(*lengths: int) -> Callable[..., Any]:
    """A calibration that was measured, and came to these chains for the temperatures."""

    def calibrate(requests: dict[float, list[Request]], *_: Any) -> Any:
        entries = [
            {"temperature": temperature, "chain": length, "rounds": 9, "acceptance_by_position": [0.5] * LONGEST,
             "token_ms": 1.0, "round_ms": [2.0] * LONGEST, "expected_speedup": [1.1] * LONGEST}
            for temperature, length in zip(requests, lengths, strict=True)
        ]  # fmt: skip
        return {"schema": 1, "measured": True, "prompts": 3, "tokens": LIMIT, "temperatures": entries}

    return calibrate


def refuse(*_: Any) -> Any:
    raise AssertionError


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_each_temperature_is_measured_and_answered_with_its_own(
    settings: Settings, run_dir: Path, tiny_target: Target, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(replace(settings, eval=replace(settings.eval, engine=engine)), run_dir, lambda _: tiny_target)
    found = json.loads((run_dir / "eval" / "calibration.json").read_text())
    assert json.loads((run_dir / "eval" / "eval.json").read_text())["calibration"] == found
    assert found["measured"] and found["prompts"] == 3
    assert [entry["temperature"] for entry in found["temperatures"]] == list(TEMPERATURES)
    traces = read_traces(run_dir / "eval" / "traces.jsonl")
    for entry in found["temperatures"]:
        shares, times = entry["acceptance_by_position"], [entry["token_ms"], *entry["round_ms"]]
        assert len(shares) == len(entry["expected_speedup"]) == LONGEST and times == sorted(times)
        assert shares == sorted(shares, reverse=True)
        assert entry["chain"] == best_chain(entry["expected_speedup"])
        names = {trace.drafting for trace in traces if trace.temperature == entry["temperature"]}
        assert names == {None, f"chain {FIXED}"} | ({f"chain {entry['chain']}"} if entry["chain"] else set())
    assert "chosen on 3 validation prompts" in capsys.readouterr().err
    assert {trace.prompt_id for trace in traces} == {f"id {i}" for i in range(TESTS)}
    write_report(run_dir)


def test_draftings_of_a_choice(settings: Settings, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None at T=0; at T=1 one that stands beside as well and is measured once."""
    monkeypatch.setattr(calibration, "calibrate", choosing(0, 7))
    chosen = replace(settings, eval=replace(settings.eval, beside=("chain 7", "tree 6/3/3")))
    evaluate(chosen, run_dir)
    traces = read_traces(run_dir / "eval" / "traces.jsonl")
    by_temperature = [[t.drafting for t in traces if t.temperature == at] for at in TEMPERATURES]
    assert by_temperature[0] == [None, "chain 5", "chain 7", "tree 6/3/3"] * TESTS
    assert by_temperature[1] == [None, "chain 7", "chain 5", "tree 6/3/3"] * TESTS
    results = write_report(run_dir)["results"]
    heads = [(e["temperature"], e["drafting"]["method"], e["drafting"]["length"]) for e in results if e["headline"]]
    assert list(dict.fromkeys(heads)) == [(0.0, "none", 0), (1.0, "chain", 7)]


def test_an_evaluation_that_goes_on_does_not_choose_again(
    settings: Settings, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "calibrate", choosing(2, 3))
    known, left = stage.decode, [3 + 3 + 1]  # warm-up, a group, and the first answer of the next

    def decode(*given: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise ZeroDivisionError
        return known(*given)

    monkeypatch.setattr(stage, "decode", decode)
    with pytest.raises(ZeroDivisionError):
        evaluate(settings, run_dir)
    assert len(read_traces(run_dir / "eval" / "traces.jsonl")) == 3
    monkeypatch.setattr(calibration, "calibrate", refuse)
    evaluate(settings, run_dir)
    names = {(trace.temperature, trace.drafting) for trace in read_traces(run_dir / "eval" / "traces.jsonl")}
    assert names == {(0.0, None), (0.0, "chain 2"), (0.0, "chain 5"), (1.0, None), (1.0, "chain 3"), (1.0, "chain 5")}


@pytest.mark.parametrize("content", [None, b"{", b"[]"])
def test_a_choice_that_is_lost_or_damaged(
    settings: Settings, run_dir: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    monkeypatch.setattr(calibration, "calibrate", choosing(2, 3))
    evaluate(settings, run_dir)
    (run_dir / "eval" / "eval.json").unlink()
    path = run_dir / "eval" / "calibration.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"^eval.chain = auto: .*calibration.json.*; delete .*/eval, and run"):
        evaluate(settings, run_dir)


@pytest.mark.parametrize(("splits", "limit"), [(["test"], LIMIT), (["test", "validation"], 1)])
def test_where_nothing_can_be_measured_the_fixed_chain_is_taken(
    settings: Settings, run_dir: Path, splits: list[str], limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without validation prompts, or where answers have no rounds; test prompts are not used."""
    write_prompts(run_dir, splits)
    evaluate(replace(settings, eval=replace(settings.eval, max_new_tokens=limit)), run_dir)
    said = [line for line in capsys.readouterr().err.splitlines() if "auto" in line]
    assert said == ["eval: no round could be measured on validation prompts; eval.chain = auto is taken as 5"]
    report = write_report(run_dir)
    assert {entry["headline"] for entry in report["results"]} == {"fixed"}
    assert {entry["drafting"]["length"] for entry in report["results"]} == {FIXED}


def test_a_chain_that_is_set_measures_nothing(
    settings: Settings, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "calibrate", refuse)
    evaluate(replace(settings, eval=replace(settings.eval, chain=2)), run_dir)
    assert not (run_dir / "eval" / calibration.FILE).exists()
    assert {trace.drafting for trace in read_traces(run_dir / "eval" / "traces.jsonl")} == {None, "chain 2"}
