"""report.json keeps its schema, its figures are those of the traces, and mistakes are told as such."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from eagle3.configs.errors import UserError
from eagle3.configs.loader import save
from eagle3.configs.settings import Settings
from eagle3.data.files import encode_json
from eagle3.eval.report import _again, compare, summary_table, write_report
from eagle3.eval.tables import draftings_rows
from eagle3.eval.traces import BASELINE, SPECULATIVE, Lossless, Round, Trace
from eagle3.models.repeats import repeated

CHAIN, TREE = 3, "tree 9/3/2"
HOSTILE = ("<script>alert(1)</script>", "&amp;", "a\nb", "|", "\x1b", "", '"quoted"', "é")

NUMBER = (int, float)
#: Schema 1 of a result: the type of every key.
RESULT: dict[str, Any] = {
    "benchmark": str, "category": (str, type(None)), "n_prompts": int, "engine": str, "dtype": str, "batch": int,
    "temperature": NUMBER, "seed": int, "input_tokens_mean": NUMBER, "output_tokens_mean": NUMBER, "source": str,
    "drafting": dict, "rounds": int, "drafted": int, "accepted": int, "emitted_tokens": int, "acceptance_rate": NUMBER,
    "acceptance_length": NUMBER, "acceptance_length_ci95": list, "acceptance_by_position": list,
    "acceptance_by_position_ci95": list, "ttft_s": NUMBER, "tps_per_user": NUMBER, "tps_per_user_ci95": list,
    "tps_per_user_e2e": NUMBER, "baseline_tps_per_user": NUMBER, "speedup": NUMBER, "speedup_ci95": list,
    "losslessness": (dict, type(None)), "round_ms": NUMBER, "drafted_per_round": NUMBER, "baseline_token_ms": NUMBER,
}  # fmt: skip
REPORT: dict[str, Any] = {
    "schema": int, "run": str, "target": dict, "draft": dict, "environment": dict, "results": list, "warnings": list,
}  # fmt: skip
DRAFTING = {"method": str, "length": int, "total": (int, type(None)), "top_k": int, "sampling": str}
WITHOUT_REPEATS = (
    "rounds", "drafted", "accepted", "acceptance_rate", "acceptance_length", "acceptance_length_ci95",
    "acceptance_by_position", "acceptance_by_position_ci95",
)  # fmt: skip


def answers(
    source: str, number: int, temperature: float, accepted: tuple[int, ...], chain: int = CHAIN, beside: bool = False
) -> list[Trace]:
    """Answers of the same tokens: plain ones take 10 ms each, a round of the chain 16 ms, and one of a tree 12 ms."""
    emitted = sum(count + 1 for count in accepted)
    ids = tuple((7 * number + index) % 50 for index in range(emitted + 1))
    authors = ["target"] + [name for count in accepted for name in ["draft"] * count + ["target"]]
    common: dict[str, Any] = {
        "prompt_id": f"{source}-{number}", "source": source, "prompt": "What is `<b>`?", "temperature": temperature,
        "seed": number, "input_tokens": 20, "ids": ids, "pieces": tuple(HOSTILE[i % len(HOSTILE)] for i in ids),
        "repeated": tuple(repeated(ids)), "finish": "length", "ttft_s": 0.02,
    }  # fmt: skip
    plain = Trace(
        **common, mode=BASELINE, drafting=None, authors=("target",) * len(ids), rounds=(), total_s=0.02 + 0.01 * emitted
    )
    drafted = [(f"chain {chain}", chain, 0.016), *([(TREE, 9, 0.012)] if beside else [])]
    return [plain] + [
        Trace(
            **common,
            mode=SPECULATIVE,
            drafting=name,
            authors=tuple(authors),
            rounds=tuple(Round(nodes, count, count + 1) for count in accepted),
            total_s=0.02 + seconds * len(accepted),
            lossless=Lossless(True) if temperature == 0 else None,
        )
        for name, nodes, seconds in drafted
    ]


def write_run(
    folder: Path,
    temperatures: tuple[float, ...] = (0.0, 1.0),
    sources: tuple[str, ...] = ("code", "<i>|prose"),
    chain: int = CHAIN,
    beside: bool = False,
) -> Path:
    """A run that was evaluated, with training log and recipe; with a tree ``beside`` the chain, if so."""
    for name in ("eval", "train"):
        (folder / name).mkdir(parents=True)
    traces = [
        trace
        for temperature in temperatures
        for source in sources
        for number in range(3)
        for trace in answers(source, number, temperature, (3, number, 0, 2), chain, beside)
    ]
    (folder / "eval" / "traces.jsonl").write_bytes(b"".join(trace.to_line() for trace in traces))
    description = {
        "schema": 1, "benchmark": "bench", "seed": 0, "batch": 1, "engine": "engine 1",
        "settings": {"draft": None, "engine": "native", "chain": chain, "tensor_parallel": 1, "beside": [TREE] if beside else [],
                     "temperatures": list(temperatures), "prompts": 6, "max_new_tokens": 8, "sampling": "sampled",
                     "dtype": "float32"},
        "target": {"name": "<target>", "weights_sha256": "ab" * 32, "num_layers": 4, "hidden_size": 8,
                   "vocab_size": 50},
        "draft": {"draft_vocab_size": 40, "vocab_size": 50, "parameters": 1234, "weights_sha256": "cd" * 32,
                  "training": {"step": 10, "acceptance_length": 2.4, "chain": CHAIN}, "imported": None},
        "environment": {"processor": "cpu & co", "device": "cpu", "threads": 1},
    }  # fmt: skip
    (folder / "eval" / "eval.json").write_bytes(encode_json(description))
    lines: list[dict[str, Any]] = [validation(0, 1.0)]
    lines += [{"step": step, "loss": 5.0 / step, "accuracy": [0.5] * CHAIN} for step in range(1, 11)]
    lines += [validation(10, 2.4)]
    (folder / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save(Settings(), folder / "config.yaml")
    return folder


def validation(step: int, length: float) -> dict[str, Any]:
    """A validation line of the training log."""
    return {
        "step": step,
        "validation": {"loss": 2.0, "acceptance_length": length, "rounds": 9, "accuracy": [0.6, 0.5, 0.4]},
    }


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose report is written."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo")
    write_report(folder)
    return folder


def check_types(value: dict[str, Any], schema: dict[str, Any]) -> None:
    """Every key of the schema is there, with its type."""
    assert schema.keys() <= value.keys()
    wrong = {key: value[key] for key, kind in schema.items() if not isinstance(value[key], kind)}
    assert not wrong


def test_report_json_keeps_schema_1(run_dir: Path) -> None:
    report = json.loads((run_dir / "eval" / "report.json").read_text())
    check_types(report, REPORT)
    assert (report["schema"], report["run"], report["warnings"]) == (1, "demo", [])
    for entry in report["results"]:
        check_types(entry, RESULT)
        check_types(entry["drafting"], DRAFTING)
        assert len(entry["acceptance_by_position"]) == len(entry["acceptance_by_position_ci95"]) == CHAIN
        for key in ("acceptance_length", "tps_per_user", "speedup"):
            low, high = entry[f"{key}_ci95"]
            assert low <= entry[key] <= high
        assert all(key in entry["without_repeats"] for key in WITHOUT_REPEATS)
        assert (entry["losslessness"] is None) == (entry["temperature"] > 0)


def test_there_is_a_result_for_all_prompts_and_for_each_source(run_dir: Path) -> None:
    found = json.loads((run_dir / "eval" / "report.json").read_text())["results"]
    expected = [(t, category) for t in (0.0, 1.0) for category in (None, "<i>|prose", "code")]
    assert [(entry["temperature"], entry["category"]) for entry in found] == expected
    assert [entry["n_prompts"] for entry in found] == [6, 3, 3] * 2


def test_figures_are_those_of_the_traces(run_dir: Path) -> None:
    entry = json.loads((run_dir / "eval" / "report.json").read_text())["results"][0]
    accepted = 2 * sum(3 + number + 0 + 2 for number in range(3))
    assert (entry["rounds"], entry["accepted"], entry["drafted"]) == (24, accepted, 24 * CHAIN)
    assert entry["acceptance_length"] == pytest.approx(1 + accepted / 24)
    assert entry["speedup"] == pytest.approx((24 + accepted) * 0.010 / (24 * 0.016))
    assert entry["repeated_ngram_rate"] == 0


def test_loops_are_counted_and_warned_of(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "loops", temperatures=(0.0,), sources=("a",), beside=True)
    path = folder / "eval" / "traces.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # 100 rounds that emit one token more than 8 tokens that repeat themselves
        ids = [index % 8 for index in range(401)]
        rounds = [{"drafted": 3, "accepted": 3, "emitted": 4}] * 100 if line["mode"] == SPECULATIVE else []
        line.update(ids=ids, pieces=["x"] * 401, authors=["target"] * 401, repeated=repeated(ids), rounds=rounds)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = write_report(folder)
    entry = report["results"][0]
    assert entry["rounds"] == 300 and entry["without_repeats"]["rounds"] == 12
    assert entry["repeated_ngram_rate"] == pytest.approx(386 / 394)
    told = [warning for warning in report["warnings"] if "98% of the 8-grams" in warning]
    assert len(told) == 1 and told[0].startswith("all prompts at T=0, chain 3: ")
    assert "98% of the 8-grams" in summary_table(report)
    assert "98% of the 8-grams" in (folder / "eval" / "report.html").read_text()


def test_simulated_stands_beside_the_decoding_that_counts_the_same_rounds(run_dir: Path) -> None:
    simulated = json.loads((run_dir / "eval" / "report.json").read_text())["simulated"]
    assert simulated["acceptance_length"] == 2.4
    assert simulated["decoded_acceptance_length"] == pytest.approx(1 + 36 / 24)


def test_training_log_prompts_and_recipe_are_optional(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare")
    for name in ("train/metrics.jsonl", "config.yaml"):
        (folder / name).unlink()
    write_report(folder)
    assert "Training" not in (folder / "eval" / "report.html").read_text()


def test_no_counted_round_leaves_gaps_and_no_figures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "short", temperatures=(1.0,), sources=("a",))
    lines = [trace.to_line() for number in range(3) for trace in answers("a", number, 1.0, ())]
    (folder / "eval" / "traces.jsonl").write_bytes(b"".join(lines))
    report = write_report(folder)
    assert report["results"][0]["acceptance_length"] is None and report["results"][0]["speedup"] is None
    assert "\u2013" in summary_table(report)


def test_summary_table_is_small_and_aligned(run_dir: Path) -> None:
    report = json.loads((run_dir / "eval" / "report.json").read_text())
    table, conclusion = summary_table(report).split("\n\n")
    title, header, *rows = table.splitlines()
    assert title.startswith("demo: chain of 3 (sampled at T>0), float32, batch 1, 6 prompts")
    assert [row.split()[0] for row in rows] == ["0", "1"]
    for name in ("AL", "without", "accepted", "TPS/user", "speed-up"):
        column = header.index(name)
        assert all(row[column - 1] == " " and row[column] != " " for row in rows)
    assert max(map(len, [header, *rows, *conclusion.splitlines()])) <= 100


def test_compare_sets_runs_side_by_side(run_dir: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", temperatures=(0.0, 0.5))
    write_report(other)
    table = compare([run_dir, other])
    rows = {
        cells[0]: cells[1:]
        for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines())
        if cells
    }
    assert rows[""] == ["demo", "other"]
    assert rows["T=0 AL"][0] == rows["T=0 AL"][1] != ""
    assert rows["T=1 AL"][1] == rows["T=0.5 AL"][0] == ""
    assert "differ" not in table
    same_name = write_run(tmp_path / "again" / "demo")
    write_report(same_name)
    assert str(same_name) in compare([run_dir, same_name])


def test_compare_says_what_is_not_like_with_like(run_dir: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", chain=4)
    path = other / "eval" / "eval.json"
    description = json.loads(path.read_text())
    description["target"]["weights_sha256"] = "ef" * 32
    path.write_text(json.dumps(description))
    write_report(other)
    assert "the runs differ in target, drafting." in compare([run_dir, other])


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tree beside its chain, and its report."""
    folder = write_run(tmp_path_factory.mktemp("several") / "demo", beside=True)
    write_report(folder)
    return folder


def test_what_a_report_shows_of_the_main_drafting_does_not_change_with_others_beside_it(
    run_dir: Path, several: Path
) -> None:
    alone, beside = (json.loads((run / "eval" / "report.json").read_text()) for run in (run_dir, several))
    assert [entry for entry in beside["results"] if entry["drafting"]["method"] == "chain"] == alone["results"]
    assert len(beside["results"]) == 2 * len(alone["results"])
    assert {key: beside[key] for key in beside if key not in ("results", "command")} == {
        key: alone[key] for key in alone if key not in ("results", "command")
    }
    assert summary_table(beside).startswith(summary_table(alone))
    rows = [line.split("|")[2:] for line in compare([run_dir, several]).splitlines()]
    assert all(len({cell.strip() for cell in cells[:2]}) == 1 for cells in rows[2:] if cells)
    with_tree, without = ((run / "eval" / "report.md").read_text() for run in (several, run_dir))
    section = with_tree.partition("## Draftings side by side")[2].partition("\n## ")[0]
    rest = with_tree.replace(f"## Draftings side by side{section}\n", "")
    assert rest.replace(str(several), str(run_dir)) == without


def test_draftings_stand_side_by_side(several: Path) -> None:
    report = json.loads((several / "eval" / "report.json").read_text())
    chained, grown = report["results"][0], report["results"][3]
    assert grown["drafting"] == {"method": "tree", "length": 3, "total": 9, "top_k": 2, "sampling": "greedy"}
    assert (chained["round_ms"], grown["round_ms"]) == pytest.approx((16, 12))
    assert chained["speedup"] < grown["speedup"]
    header, rows = draftings_rows(report)
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert [(row["T"], row["drafting"]) for row in cells] == [
        (t, name) for t in ("0", "1") for name in ("none", "chain 3", TREE)
    ]
    assert [row["ms a round"] for row in cells[:3]] == ["10.0 a token", "16.0", "12.0"]
    assert [row["drafted"] for row in cells[:3]] == ["\u2013", "3.00", "9.00"]
    assert [row["accepted"] for row in cells[:3]] == ["\u2013", "50%", "17%"]
    assert [row["diverged"] for row in cells] == ["\u2013", "0 of 6", "0 of 6"] + ["\u2013"] * 3
    shown = summary_table(report).splitlines()
    assert sum(TREE in line for line in shown) == 2 and max(map(len, shown[1:])) <= 100
    text = (several / "eval" / "report.md").read_text()
    assert "## Draftings side by side" in text and f"| {TREE} |" in text


def slowed(run: Path, drafting: str) -> dict[str, Any]:
    """The report of a run in which one drafting takes 9 times as long."""
    path = run / "eval" / "traces.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["total_s"] *= 9 if line["drafting"] == drafting else 1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_report(run)


def test_a_main_drafting_that_slows_the_target_down_is_warned_of(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "slow", temperatures=(0.0,), sources=("a",), beside=True)
    report = slowed(folder, f"chain {CHAIN}")
    assert report["warnings"] == [f"all prompts at T=0, chain {CHAIN}: the draft slows the target down"]
    assert "Slower than plain decoding" not in summary_table(report)


def test_one_that_was_asked_for_as_comparison_is_named_under_the_table(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "slow", sources=("a",), beside=True)
    report = slowed(folder, TREE)
    said = f"Slower than plain decoding here, measured for comparison: {TREE} at T=0 and T=1."
    assert report["warnings"] == []
    assert said in summary_table(report)
    assert said in (folder / "eval" / "report.md").read_text() and said in (folder / "eval" / "report.html").read_text()


def test_answers_of_a_drafting_that_was_not_asked_for_or_is_missing(several: Path, tmp_path: Path) -> None:
    for number, beside in enumerate(([], [TREE, "chain 9"], ["tree 9/3/3"])):
        folder = Path(shutil.copytree(several, tmp_path / f"{number}"))
        description = json.loads((folder / "eval" / "eval.json").read_text())
        description["settings"]["beside"] = beside
        (folder / "eval" / "eval.json").write_text(json.dumps(description))
        with pytest.raises(UserError, match=r"as many answers of every drafting \(plain: 12, chain 3: 12, tree"):
            write_report(folder)


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.json: there is no such file; run `eagle3 run`"):
        write_report(tmp_path)
    with pytest.raises(UserError, match=r"report\.json: there is no such file"):
        compare([tmp_path])
    folder = write_run(tmp_path / "run")
    path = folder / "eval" / "traces.jsonl"
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", b"".join(whole.splitlines(keepends=True)[:-1]), b"{}\n", b"[]\n"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"traces\.jsonl"):
            write_report(folder)
    path.unlink()
    with pytest.raises(UserError, match="it cannot be read"):
        write_report(folder)


def test_markdown_keeps_its_tables_whole(run_dir: Path) -> None:
    text = (run_dir / "eval" / "report.md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert any("&lt;i>\\|prose" in line for line in tables)
    results = [line.replace("\\|", "") for line in tables if line.startswith(("| 0 ", "| 1 ", "| T "))]
    assert len(results) == 7 and len({line.count("|") for line in results}) == 1
    assert f"eagle3 run {run_dir}/config.yaml run.name=demo-again" in text


def imported(run: Path, value: float, **changes: Any) -> Path:
    """``run`` as the evaluation of an imported head whose card says ``value``."""
    path = run / "eval" / "eval.json"
    description = json.loads(path.read_text())
    drafting = {"method": "chain", "length": CHAIN, "total": None, "top_k": 1, "sampling": "greedy"}
    told = {"temperature": 0.0, "drafting": drafting, "prompts": 60, "output_tokens_mean": 9.0, "dtype": "float32"}
    figure = {"benchmark": "bench", "value": value, "args": told | changes}
    description["settings"]["draft"] = "heads/theirs"
    description["draft"] |= {"training": None, "imported": {"from": "theirs", "figures": [figure]}}
    path.write_bytes(encode_json(description))
    return run


def test_an_imported_head_that_accepts_less_than_its_card_says_is_told(tmp_path: Path) -> None:
    report = write_report(imported(write_run(tmp_path / "low"), 3.9))
    assert report["simulated"] is None
    said = [line for line in report["warnings"] if "its card says" in line]
    assert len(said) == 1
    assert said[0].startswith("T=0, chain 3: its card says an acceptance length of 3.90, and here it is 2.")
    assert "it may be misread (layers, norms fed back, RoPE, the order of features)" in said[0]


def test_over_the_same_greedy_answers_a_hundredth_is_told(tmp_path: Path) -> None:
    entry = write_report(write_run(tmp_path / "own"))["results"][0]
    measured, same = (
        entry["acceptance_length"],
        {"prompts": 6, "output_tokens_mean": round(entry["output_tokens_mean"], 4)},
    )
    for number, (factor, told) in enumerate(((1.005, 0), (1.02, 1))):
        report = write_report(imported(write_run(tmp_path / f"{number}"), measured * factor, **same))
        assert len([line for line in report["warnings"] if "its card says" in line]) == told


@pytest.mark.parametrize(("value", "changes"), [(2.4, {}), (3.9, {"temperature": 0.3}), (3.9, {"drafting": {}})])
def test_figures_that_hold_or_do_not_compare_are_not(value: float, changes: dict[str, Any], tmp_path: Path) -> None:
    report = write_report(imported(write_run(tmp_path / "run"), value, **changes))
    assert not [line for line in report["warnings"] if "its card says" in line]


def test_how_several_processes_measure_it_again() -> None:
    recipe = Path("runs/a b/config.yaml")
    alone = "eagle3 run 'runs/a b/config.yaml' run.name=c"
    assert _again(recipe, "c", 1) == alone
    launched = "torchrun --nproc-per-node 8 --no-python eagle3 eval 'runs/a b/config.yaml' run.name=c"
    assert _again(recipe, "c", 8).splitlines() == [alone, launched]
