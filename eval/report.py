"""From the raw data of an evaluation to report.json, report.md and report.html, and several reports side by side.

    eagle3 report runs/tiny runs/mine

Nothing is decoded here: all follows from ``eval/traces.jsonl`` and ``eval/eval.json`` (see :mod:`.traces`), so a report
can be made again at any time. Training log, prompts and recipe of the run are shown where they are there.
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..configs.drafting import PLAIN, chain
from ..configs.errors import UserError
from ..data.conversations import read_conversations
from ..data.files import encode_json, read_lines, write_atomic
from ..models.native.parallel import launched
from ..models.repeats import repeated_rate
from .cautions import against_card, cautions, warnings
from .conclusion import elsewhere, gains, slower
from .headlines import compared, drafting_of, has_beside, is_chosen, overall
from .markdown import render_markdown
from .metrics import acceptance, draftings, results
from .page import Material, render_page
from .tables import (
    circumstances,
    conditions,
    diverged,
    drafting_name,
    draftings_rows,
    length_of,
    markdown_table,
    percent,
    speedup_of,
    summary_rows,
    temperature_name,
    text_table,
    tps,
)
from .traces import Trace, read_traces

SCHEMA = 1
WIDTH = 100  # of sentences in a terminal
Json = dict[str, Any]


class Evaluation(NamedTuple):
    """``eval.json`` and ``traces.jsonl`` of a run."""

    description: Json
    traces: list[Trace]


def write_report(run_dir: Path) -> Json:
    """Write ``eval/report.json``, ``.md`` and ``.html`` of a run; returns what report.json holds.

    Raises:
        UserError: the run has no complete evaluation, or one that is damaged.
    """
    evaluation = _read_evaluation(run_dir)
    report = build_report(run_dir, evaluation)
    recipe = run_dir / "config.yaml"
    material = Material(
        traces=_shown(evaluation),
        # The curve is that of the run's own head.
        curve=[] if evaluation.description["settings"]["draft"] else _read_curve(run_dir / "train" / "metrics.jsonl"),
        prompts=_count_prompts(run_dir / "conversations" / "prompts.jsonl"),
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
    )
    folder = run_dir / "eval"
    write_atomic(folder / "report.md", render_markdown(report).encode())
    write_atomic(folder / "report.html", render_page(report, material).encode())
    write_atomic(folder / "report.json", encode_json(report))
    return report


def build_report(run_dir: Path, evaluation: Evaluation) -> Json:
    """What report.json holds: schema 1, and beside it ``command``, ``simulated``, ``calibration`` (how chains were chosen),
    of each result whether it is the ``headline``, and figures without repeats.
    """
    description, traces = evaluation
    found = results(traces, description)
    for entry in found:
        drafting = drafting_of(entry)
        its = None if drafting == PLAIN else drafting.name, entry["temperature"]
        answers = [
            t.ids for t in traces if (t.drafting, t.temperature) == its and entry["category"] in (None, t.source)
        ]
        entry["repeated_ngram_rate"] = repeated_rate(answers)
    name = run_dir.resolve().name
    draft = description["draft"]
    return {
        "schema": SCHEMA,
        "run": name,
        "target": description["target"],
        "draft": draft,
        "environment": description["environment"],
        "results": found,
        "warnings": warnings(found) + cautions(found) + against_card(draft["imported"], found),
        "simulated": _simulated(draft["training"], evaluation),
        "calibration": description.get("calibration"),  # which older ones have not
        "command": _again(run_dir / "config.yaml", f"{name}-again", description["settings"]["tensor_parallel"]),
    }


def _again(recipe: Path, name: str, processes: int) -> str:
    """The command that makes everything anew; where several processes evaluate, the first ends before that."""
    given = f"{shlex.quote(str(recipe))} run.name={shlex.quote(name)}"
    whole = f"eagle3 run {given}"
    return whole if processes == 1 else f"{whole}\n{launched(f'eagle3 eval {given}', processes)}"


def summary_table(report: Json) -> str:
    """The figures over all prompts as plain text, for a terminal: the main draftings' and what follows, then all draftings."""
    parts = [
        f"{report['run']}: {conditions(report)}\n{text_table(*summary_rows(report))}",
        "\n".join(textwrap.fill(sentence, WIDTH) for sentence in (gains(report), elsewhere(report)) if sentence),
    ]
    if has_beside(report):
        slow = slower(report)
        table = text_table(*draftings_rows(report, without=("TPS/user", "drafted")))
        parts.append("\n".join([table, textwrap.fill(slow, WIDTH)] if slow else [table]))
    parts.append("\n".join(f"warning: {warning}" for warning in report["warnings"]))
    return "\n\n".join(part for part in parts if part)


def compare(run_dirs: Sequence[Path]) -> str:
    """The reports of several runs side by side, as a Markdown table that is aligned as it stands.

    Where chains were chosen by measurement, figures are those of the fixed chain, and what was chosen stands below.

    Raises:
        UserError: a run without report.
    """
    reports = [_read_report(run_dir) for run_dir in run_dirs]
    names = [report["run"] for report in reports]
    header = [str(path) if names.count(name) > 1 else name for path, name in zip(run_dirs, names, strict=True)]
    settings = [_settings(report) for report in reports]
    rows = [[name, *(values[name] for values in settings)] for name in settings[0]]
    differing = [row[0] for row in rows if len(set(row[1:])) > 1]
    for temperature in sorted({entry["temperature"] for report in reports for entry in overall(report)}):
        at = [_at(compared(report), temperature) for report in reports]
        for name, write in (
            ("AL", length_of),
            ("AL without repeats", lambda entry: length_of(entry["without_repeats"])),
            ("acceptance rate", lambda entry: percent(entry["acceptance_rate"])),
            ("TPS/user", tps),
            ("speed-up", speedup_of),
            ("diverged", diverged),
        ):
            rows.append([f"{temperature_name(temperature)} {name}", *(write(entry) if entry else "" for entry in at)])
        heads = [_at(overall(report), temperature) for report in reports]
        if any(entry and is_chosen(entry) for entry in heads):
            cells = [f"{drafting_name(entry)}: {speedup_of(entry)}" if entry else "" for entry in heads]
            rows.append([f"{temperature_name(temperature)} main drafting, speed-up", *cells])
    said = [f"\nNot like with like: the runs differ in {', '.join(differing)}."] if differing else []
    return "\n".join([markdown_table(["", *header], rows), *said])


def _settings(report: Json) -> dict[str, str]:
    """Everything that must be the same where figures of several runs are compared."""
    target, machine = report["target"], report["environment"]
    return {
        "target": f"{target['name']} ({target['weights_sha256'][:8]})",
        **circumstances(compared(report)),
        "machine": f"{machine['processor']}, {machine['device']}, {machine['threads']} threads",
    }


def _at(entries: Sequence[Json], temperature: float) -> Json | None:
    return next((entry for entry in entries if entry["temperature"] == temperature), None)


def _read_report(run_dir: Path) -> Json:
    path = run_dir / "eval" / "report.json"
    report = _read_json(path, "run `eagle3 run` or `eagle3 eval` first")
    if report.get("schema") != SCHEMA:
        raise UserError("report", path, f"its schema is {report.get('schema')} and not {SCHEMA}", "make it again")
    return report


def _read_evaluation(run_dir: Path) -> Evaluation:
    folder = run_dir / "eval"
    description = _read_json(folder / "eval.json", "run `eagle3 run` or `eagle3 eval` first, to its end")
    path = folder / "traces.jsonl"
    remedy = f"delete {folder} and run `eagle3 eval`"
    try:
        traces = read_traces(path)
    except OSError as error:
        raise UserError("report", path, f"it cannot be read ({error.strerror})", remedy) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("report", path, f"it is damaged ({error})", remedy) from None
    if len({trace.key for trace in traces}) < len(traces) or not _are_whole(description, traces):
        counted = ", ".join(
            f"{name or 'plain'}: {n}" for name, n in Counter(trace.drafting for trace in traces).items()
        )
        problem = f"it does not hold as many answers of every drafting ({counted or 'none'})"
        raise UserError("report", path, problem, remedy)
    return Evaluation(description, traces)


def _are_whole(description: Json, traces: Sequence[Trace]) -> bool:
    """Whether there are as many answers of every drafting, at every temperature those of its own."""
    sides = Counter((trace.temperature, trace.drafting) for trace in traces)
    wanted = {
        (temperature, None if drafting == PLAIN else drafting.name)
        for temperature in description["settings"]["temperatures"]
        for drafting in (PLAIN, *draftings(description, temperature))
    }
    return sides.keys() == wanted and len(set(sides.values())) == 1


def _read_json(path: Path, remedy: str) -> Json:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError("report", path, "there is no such file", remedy) from None
    except (OSError, ValueError) as error:
        raise UserError("report", path, f"it cannot be read ({error})", remedy) from None
    if not isinstance(found, dict):
        raise UserError("report", path, "it is no JSON object", remedy)
    return found


def _read_curve(path: Path) -> list[Json]:
    return [line for _, line in read_lines(path, "train")] if path.exists() else []


def _count_prompts(path: Path) -> dict[str, dict[str, int]]:
    """Prompts by source and split."""
    counts: dict[str, dict[str, int]] = {}
    for conversation in read_conversations(path) if path.exists() else []:
        by_split = counts.setdefault(conversation.source, {})
        by_split[conversation.split] = by_split.get(conversation.split, 0) + 1
    return dict(sorted(counts.items()))


def _simulated(trained: Json | None, evaluation: Evaluation) -> Json | None:
    """The simulated acceptance length beside the decoded one that counts the same rounds, where both exist."""
    if not trained:
        return None
    name = chain(trained["chain"]).name
    greedy = [trace for trace in evaluation.traces if trace.temperature == 0 and trace.drafting == name]
    if not greedy:
        return None
    length = acceptance(greedy, "whole").length
    return {
        "acceptance_length": trained["acceptance_length"],
        "chain": trained["chain"],
        "split": "validation",
        "decoded_acceptance_length": length.json,
        "decoded_acceptance_length_ci95": length.ci95,
    }


def _shown(evaluation: Evaluation) -> list[Trace]:
    """The plain answers, and at each temperature those of the main drafting, or of the next where that is plain decoding."""
    description = evaluation.description
    kept = {
        temperature: next(drafting.name for drafting in draftings(description, temperature) if drafting != PLAIN)
        for temperature in description["settings"]["temperatures"]
    }
    return [trace for trace in evaluation.traces if trace.drafting in (None, kept[trace.temperature])]
