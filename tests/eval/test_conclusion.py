"""Reports of chosen chains: each temperature has a main drafting of its own, and plain decoding may be it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from eagle3.configs.errors import UserError
from eagle3.eval.card import _gains, _index
from eagle3.eval.conclusion import elsewhere, formula, gains
from eagle3.eval.headlines import compared, drafted, overall
from eagle3.eval.plots import expected_speedup
from eagle3.eval.report import compare, summary_table, write_report
from eagle3.eval.tables import conditions, result_rows
from eagle3.eval.traces import Round, Trace
from eagle3.models.traffic import MAVERICK, gain, maverick_head

TEMPERATURES, SOURCES = (0.0, 0.7, 1.0), ("a", "b")
CHOSEN = {0.0: 3, 0.7: 0, 1.0: 5}
#: Seconds a round of a chain; a plain token takes 0.01.
ROUND_S = {3: 0.012, 5: 0.020, 7: 0.060}
HOW = [("chain", 3), ("none", 0), ("chain", 5)]


def load_example() -> ModuleType:
    """The run that test_report.py makes."""
    spec = importlib.util.spec_from_file_location("report_example", Path(__file__).with_name("test_report.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(example: ModuleType, source: str, number: int, temperature: float) -> list[Trace]:
    """The plain answer, and those of the chosen chain, chain 5 and chain 7."""
    accepted = (3, number, 0, 2)
    plain, fast = example.answers(source, number, temperature, accepted)
    found = [plain]
    for length in dict.fromkeys((CHOSEN[temperature], 5, 7)):
        if length:
            rounds = tuple(Round(length, count, count + 1) for count in accepted)
            total = 0.02 + ROUND_S[length] * len(accepted)
            found.append(replace(fast, drafting=f"chain {length}", rounds=rounds, total_s=total))
    return found


def calibration(measured: bool = True) -> dict[str, Any]:
    entries = [{"temperature": temperature, "chain": CHOSEN[temperature]} for temperature in TEMPERATURES]
    for entry in entries:
        entry |= {"rounds": 9, "acceptance_by_position": [0.5] * 8, "token_ms": 10.0, "round_ms": [12.0] * 8}
        entry |= {"expected_speedup": [1.1, 1.2, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8]}
    return {"schema": 1, "measured": measured, "prompts": 8, "tokens": 48, "temperatures": entries}


def write_run(folder: Path) -> Path:
    """An evaluated run whose chains were chosen."""
    example = load_example()
    run: Path = example.write_run(folder, TEMPERATURES, SOURCES)
    traces = [
        trace
        for temperature in TEMPERATURES
        for source in SOURCES
        for number in range(3)
        for trace in answers(example, source, number, temperature)
    ]
    (run / "eval" / "traces.jsonl").write_bytes(b"".join(trace.to_line() for trace in traces))
    path = run / "eval" / "eval.json"
    description = json.loads(path.read_text())
    description["settings"] |= {"chain": "auto", "beside": ["chain 7"]}
    path.write_text(json.dumps(description | {"calibration": calibration()}))
    return run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose report is written; not to be written to."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "chosen")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def report(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "eval" / "report.json").read_text())
    return found


def how(entry: dict[str, Any]) -> tuple[str, int]:
    return entry["drafting"]["method"], entry["drafting"]["length"]


def test_every_temperature_has_its_own_headline(report: dict[str, Any]) -> None:
    assert [how(entry) for entry in overall(report)] == HOW
    assert {entry["headline"] for entry in report["results"]} == {"chosen", None}
    assert [how(entry) for entry in compared(report)] == [("chain", 5)] * 3
    assert [how(entry) for entry in drafted(report)] == [("chain", 3), ("chain", 5), ("chain", 5)]
    categories = [entry["category"] for entry in report["results"] if entry["headline"]]
    assert categories == [None, *SOURCES] * 3
    assert report["calibration"] == calibration()


def test_where_no_chain_pays_the_headline_is_plain_decoding(report: dict[str, Any]) -> None:
    plain = overall(report)[1]
    assert plain["drafting"] == {"method": "none", "length": 0, "total": None, "top_k": 1, "sampling": "greedy"}
    assert (plain["speedup"], plain["speedup_ci95"]) == (1.0, [1.0, 1.0])
    assert plain["tps_per_user"] == plain["baseline_tps_per_user"] == pytest.approx(100)
    assert plain["acceptance_length"] is plain["round_ms"] is plain["losslessness"] is None
    assert plain["rounds"] == plain["drafted"] == 0 and plain["acceptance_by_position"] == []


def test_what_was_chosen_is_said_with_the_figures(report: dict[str, Any]) -> None:
    said = "chain of 3 at T=0, no draft at T=0.7, chain of 5 at T=1, chosen (sampled at T>0)"
    assert conditions(report).startswith(said)
    table, conclusion, beside, *_ = summary_table(report).split("\n\n")
    _, header, *rows = table.splitlines()
    assert (
        "drafting" in header and max(map(len, [header, *rows, *conclusion.splitlines(), *beside.splitlines()])) <= 100
    )
    assert [
        name in row for name, row in zip(("chain 3 (chosen)", "no chain pays", "chain 5 (chosen)"), rows, strict=True)
    ]
    names = [line.split()[1:3] for line in beside.splitlines()[1:] if line[0].isdigit()]
    assert names == [
        ["none", "\u2013"], ["chain", "3"], ["chain", "5"], ["chain", "7"],
        ["none", "\u2013"], ["chain", "5"], ["chain", "7"],
        ["none", "\u2013"], ["chain", "5"], ["chain", "7"],
    ]  # fmt: skip
    columns, cells = result_rows(report)
    assert [row[columns.index("drafting")] for row in cells[:: 1 + len(SOURCES)]] == [
        "chain 3 (chosen)",
        "no chain pays",
        "chain 5 (chosen)",
    ]


def test_what_a_reader_takes_home(report: dict[str, Any], run_dir: Path) -> None:
    first, _, last = overall(report)
    said = (
        f"On this machine the head makes decoding {first['speedup']:.2f} times as fast at T=0 (chain 3) and "
        f"{last['speedup']:.2f} at T=1 (chain 5); no chain pays at T=0.7."
    )
    assert gains(report) == said
    for name in ("report.html", "report.md"):
        text = (run_dir / "eval" / name).read_text()
        assert said in text and elsewhere(report) in text and formula() in text
    page = (run_dir / "eval" / "report.html").read_text()
    assert page.index(said) < page.index(elsewhere(report)) < page.index('class="cards"')
    assert "plain decoding: no chain pays here" in page


def test_where_nothing_pays_nothing_is_promised(report: dict[str, Any]) -> None:
    plain = overall(report)[1]
    assert gains({"results": [plain]}) == "On this machine no chain pays at T=0.7."
    assert elsewhere({"results": [plain]}) == ""


def test_another_machine_is_a_formula_and_no_measurement(report: dict[str, Any]) -> None:
    """Of the longest chain, of which 67%, 58% and 25% of the rounds accept 1, 2 and 3 tokens."""
    said = elsewhere(report)
    assert said.startswith("By bytes read alone, which is a formula and no measurement, the same acceptance on Llama-4")
    best = gain([0.667, 0.583, 0.25], MAVERICK, maverick_head())
    assert f"at most about {best.speedup:.1f} times as fast at T=0 (chain {best.chain}), " in said
    assert "reads 17.2, 20.2, 26.1, 31.9, 37.7 GB to verify 1, 2, 4, 6, 8 tokens" in formula()
    assert "1.0 GB a draft step and 0.2 GB a round" in formula() and "chain 3 costs 1.71 tokens" in formula()


def test_slow_chains_beside_the_chosen_are_no_warnings(report: dict[str, Any]) -> None:
    assert report["warnings"] == []
    said = "Slower than plain decoding here, measured for comparison: chain 7 at T=0, T=0.7 and T=1."
    assert said in summary_table(report)


def test_a_curve_for_every_temperature_with_the_measured_points_on_it(report: dict[str, Any], run_dir: Path) -> None:
    drawn = expected_speedup(report)
    assert drawn.count("<polyline") == 3
    assert all(
        len(line.split('points="')[1].split('"')[0].split()) == 9 for line in drawn.splitlines() if "<polyline" in line
    )
    for said in ("T=0, chain 3, chosen, measured: ", "T=0, chain 7, measured: ", "T=0.7, none, chosen, measured: 1.00"):
        assert drawn.count(said) == 1
    assert drawn.count("<title>") == 3 + 3 + 2
    page = (run_dir / "eval" / "report.html").read_text()
    assert "The chain that pays" in page and drawn in page
    assert expected_speedup(report | {"calibration": calibration(measured=False)}) == ""
    assert expected_speedup(report | {"calibration": None}) == ""


def test_answers_are_shown_of_the_next_chain_where_none_pays(run_dir: Path) -> None:
    page = (run_dir / "eval" / "report.html").read_text()
    assert "T=0 · chain 3 · " in page and "T=0.7 · chain 5 · " in page and "T=1 · chain 5 · " in page
    assert "of 7 drafted tokens accepted" not in page


def test_runs_compare_by_the_fixed_chain(run_dir: Path, tmp_path: Path) -> None:
    example = load_example()
    older = example.write_run(tmp_path / "older", TEMPERATURES, SOURCES, chain=5)
    write_report(older)
    table = compare([run_dir, older])
    rows = {c[0]: c[1:] for c in ([x.strip() for x in line.split("|")[1:-1]] for line in table.splitlines()) if c}
    assert rows["drafting"] == ["chain of 5 (sampled at T>0)"] * 2 and "differ" not in table
    assert rows["T=0 AL"][0] == rows["T=0 AL"][1] != ""
    assert rows["T=0 main drafting, speed-up"][0].startswith("chain 3 (chosen): 2.")
    assert rows["T=0 main drafting, speed-up"][1].startswith("chain 5: ")
    assert rows["T=0.7 main drafting, speed-up"][0] == "no chain pays: 1.00 [1.00, 1.00]"


def test_a_card_lists_what_was_chosen_and_what_compares(report: dict[str, Any]) -> None:
    rows = [line.split("|")[1:3] for line in _gains(report).splitlines() if line.startswith(("| 0", "| 1"))]
    assert [(t.strip(), name.strip()) for t, name in rows] == [
        ("0", "chain 3 (chosen)"), ("0", "chain 5"), ("0.7", "chain 5"), ("1", "chain 5 (chosen)"),
    ]  # fmt: skip
    metrics = _index("title", report)["model-index"][0]["results"][0]["metrics"]
    assert [metric["args"]["drafting"]["length"] for metric in metrics] == [3, 5, 5, 5]


def test_simulated_stands_beside_the_chain_that_it_walked(report: dict[str, Any]) -> None:
    assert report["simulated"]["chain"] == 3 and report["simulated"]["decoded_acceptance_length"] is not None


def test_a_report_of_an_older_version_still_has_its_main_drafting(report: dict[str, Any]) -> None:
    older = [{key: value for key, value in entry.items() if key != "headline"} for entry in report["results"][3:6]]
    assert overall({"results": older}) == [older[0]]


def test_an_older_evaluation_has_no_calibration(tmp_path: Path) -> None:
    folder: Path = load_example().write_run(tmp_path / "older")
    found = write_report(folder)
    assert found["calibration"] is None and {entry["headline"] for entry in found["results"]} == {"fixed"}
    assert "The chain that pays" not in (folder / "eval" / "report.html").read_text()


def test_answers_of_another_choice_are_refused(run_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))
    path = folder / "eval" / "eval.json"
    description = json.loads(path.read_text())
    description["calibration"]["temperatures"][0]["chain"] = 4
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match="as many answers of every drafting"):
        write_report(folder)
