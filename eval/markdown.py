"""report.md: the figures of a report as tables, for terminals, reviews and issues."""

from __future__ import annotations

from typing import Any

from .conclusion import elsewhere, formula, gains, slower
from .headlines import drafted, drafting_of, has_beside
from .tables import (
    BESIDE,
    DEFINITIONS,
    HOW_TO_READ_COST,
    NONE,
    conditions,
    draftings_rows,
    interval,
    markdown_table,
    number,
    percent,
    result_rows,
    temperature_name,
)

Json = dict[str, Any]
CHECKSUM = 16  # characters of a checksum that are shown


def render_markdown(report: Json) -> str:
    """The whole report as Markdown."""
    parts = [
        f"# Draft report: {report['run']}",
        f"Measured with: {conditions(report)}. Intervals: 95%, bootstrap over prompts.",
        gains(report),
        f"{said} {formula()}" if (said := elsewhere(report)) else "",
        "\n".join(f"- **Warning**: {warning}" for warning in report["warnings"]),
        "## Results",
        markdown_table(*result_rows(report)),
        _beside(report),
        "## Acceptance by position",
        _positions(report),
        _simulated(report),
        "## Target, draft, environment",
        markdown_table(["", ""], described(report)),
        "## Definitions",
        "\n".join(f"- **{name}**: {text}" for name, text in DEFINITIONS),
        "## Again",
        f"    {report['command']}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def described(report: Json) -> list[list[str]]:
    """Every fact about target, draft and environment as (name, value); checksums stand in full in report.json alone."""
    rows = []
    for section in ("target", "draft", "environment"):
        for name, value in report[section].items():
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            for inner, entry in pairs:
                shown = _value(entry)[:CHECKSUM] if name.endswith("sha256") else _value(entry)
                rows.append([f"{section}: {name} {inner}".replace("_", " ").strip(), shown])
    return rows


def simulated_sentence(simulated: Json) -> str:
    """What the trainer's simulation said, beside decoding."""
    decoded = interval(simulated["decoded_acceptance_length"], simulated["decoded_acceptance_length_ci95"])
    return (
        f"Simulated along the greedy {simulated['split']} answers, chain of {simulated['chain']}, the head's "
        f"acceptance length was {number(simulated['acceptance_length'])}; decoding the test prompts at T=0, "
        f"counted in the same way, gave {decoded}."
    )


def _simulated(report: Json) -> str:
    return simulated_sentence(report["simulated"]) if report["simulated"] else ""


def _beside(report: Json) -> str:
    if not has_beside(report):
        return ""
    parts = [f"## {BESIDE}", HOW_TO_READ_COST, markdown_table(*draftings_rows(report)), slower(report)]
    return "\n\n".join(part for part in parts if part)


def _positions(report: Json) -> str:
    entries = [(f"{temperature_name(e['temperature'])}, {drafting_of(e).name}", e) for e in drafted(report)]
    sides = [
        (name, e)
        for name, entry in entries
        for name, e in ((name, entry), (f"{name} without repeats", entry["without_repeats"]))
    ]
    depth = max(len(entry["acceptance_by_position"]) for _, entry in sides)
    rows = [
        [name]
        + [
            interval(v, ci, percent)
            for v, ci in zip(e["acceptance_by_position"], e["acceptance_by_position_ci95"], strict=True)
        ]
        + [""] * (depth - len(e["acceptance_by_position"]))
        for name, e in sides
    ]
    return markdown_table(["", *(str(position) for position in range(1, depth + 1))], rows)


def _value(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return NONE if value is None else str(value)
