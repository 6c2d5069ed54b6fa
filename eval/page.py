"""report.html: one file without scripts that fetches nothing; a browser is told to refuse it if it tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from ..configs.drafting import FIXED, PLAIN
from . import plots
from .answers import SHOWN, render_answers
from .conclusion import elsewhere, formula, gains, slower
from .headlines import drafted, drafting_of, has_beside, main_results, overall
from .markdown import described, simulated_sentence
from .style import STYLE
from .tables import (
    BESIDE,
    DEFINITIONS,
    HOW_TO_READ_COST,
    conditions,
    diverged,
    drafting,
    draftings_rows,
    length_of,
    number,
    percent,
    result_rows,
    temperature_name,
    times,
    tps,
)
from .traces import Trace

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
Json = dict[str, Any]


class Material(NamedTuple):
    """What a page shows beside the figures; ``prompts`` counts by source and split. All but traces may be empty."""

    traces: Sequence[Trace]
    curve: Sequence[Json]
    prompts: dict[str, dict[str, int]]
    recipe: str


def render_page(report: Json, material: Material) -> str:
    """The whole page."""
    sections = [
        _headline(report),
        _acceptance(report),
        _sources_and_speed(report),
        _beside(report),
        _choice(report),
        _training(report, material.curve),
        _answers(material.traces),
        _results(report),
        _circumstances(report, material),
        _definitions(),
        _again(report, material.recipe),
    ]
    title = escape(f"{report['run']}: draft report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(report: Json) -> str:
    cards = "".join(_card(entry, colour) for colour, entry in enumerate(overall(report)))
    said = "".join(f"<li>{escape(warning)}</li>" for warning in report["warnings"])
    box = f'<div class="warnings"><strong>Before you quote these figures</strong><ul>{said}</ul></div>' if said else ""
    return (
        f'<header><p class="kicker">EAGLE-3 draft report</p><h1>{escape(report["run"])}</h1>'
        f'<p class="lead">{escape(lead(report))}</p>'
        + _elsewhere(report)
        + f'<p class="note">{escape(_subject(report))} Measured with: {escape(conditions(report))}. '
        "Intervals are 95%.</p>"
        f'</header><div class="cards">{cards}</div>{box}'
    )


def _elsewhere(report: Json) -> str:
    said = elsewhere(report)
    return f"<p>{escape(said)}</p><p class='note'>{escape(formula())}</p>" if said else ""


def lead(report: Json) -> str:
    """What a reader should take home: the gain, and what a round gives at the lowest temperature."""
    entry = drafted(report)[0]
    parts = [gains(report)]
    if entry["acceptance_length"] is not None:
        fresh, at = entry["without_repeats"]["acceptance_length"], temperature_name(entry["temperature"])
        parts.append(
            f"At {at} a round of {drafting_of(entry).name} gives {number(entry['acceptance_length'])} tokens on average"
            + (f", {number(fresh)} where it does not merely repeat the answer." if fresh is not None else ".")
        )
    lossless = entry["losslessness"]
    if lossless:
        same = lossless["answers"] - lossless["diverged"]
        every = f"All {same}" if not lossless["diverged"] else f"{same} of {lossless['answers']}"
        ties = f", {lossless['ties']} of them up to a tie" if lossless["ties"] else ""
        parts.append(f"{every} greedy answers are those of plain decoding{ties}.")
    return " ".join(part for part in parts if part)


def _subject(report: Json) -> str:
    target, draft = report["target"], report["draft"]
    shape = f"{target['num_layers']} layers, {target['hidden_size']:,} wide"
    head = f"a head of {draft['parameters'] / 1e6:,.3g} M parameters"
    words = f"{draft['draft_vocab_size']:,} of {target['vocab_size']:,} tokens"
    return f"Target: {target['name']} ({shape}). Draft: {head} over {words}."


def _card(entry: Json, colour: int) -> str:
    facts = [
        ("AL without repeats", length_of(entry["without_repeats"])),
        ("drafted tokens accepted", percent(entry["acceptance_rate"])),
        ("tokens per second", tps(entry)),
        ("repeated 8-grams", percent(entry["repeated_ngram_rate"])),
    ]
    if entry["losslessness"]:
        facts.append(("differ from plain decoding", diverged(entry)))
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return (
        f'<section class="card s{colour % 6}"><h3>{escape(temperature_name(entry["temperature"]))}'
        f"<span>{escape(drafting(entry))}</span></h3>"
        f'<div class="pair">{_big(times(entry["speedup"]), "speed-up", entry["speedup_ci95"])}'
        f"{_big(number(entry['acceptance_length']), 'acceptance length', entry['acceptance_length_ci95'])}</div>"
        f"<dl>{listed}</dl></section>"
    )


def _big(value: str, what: str, ci95: Sequence[float | None]) -> str:
    between = f"{number(ci95[0])} to {number(ci95[1])}" if ci95[0] is not None else ""
    figure = f'<div class="big">{escape(value)}</div><div class="ci">{between}</div>'
    return f'<div><div class="what">{what}</div>{figure}</div>'


def _acceptance(report: Json) -> str:
    figures = [
        ("All rounds", "", plots.acceptance_by_position(report, False)),
        ("Without repeated rounds", "", plots.acceptance_by_position(report, True)),
    ]
    note = "How often a drafted token stands, with all before it. Bars are 95% intervals."
    return _figures("Acceptance by position", note, figures)


def _sources_and_speed(report: Json) -> str:
    figures = [
        (
            "Acceptance length by source",
            "hollow: without repeated rounds",
            plots.acceptance_by_source(report),
        ),
        ("Tokens per second and user", f"batch {overall(report)[0]['batch']}", plots.speed(report)),
    ]
    return _figures("Where it helps, and what it gains", "", figures)


def _beside(report: Json) -> str:
    if not has_beside(report):
        return ""
    header, rows = draftings_rows(report)
    table = _table(header, rows, [row[1] == PLAIN.name for row in rows])
    said = f'<p class="note">{escape(slow)}</p>' if (slow := slower(report)) else ""
    return f'<section><h2>{BESIDE}</h2><p class="note">{escape(HOW_TO_READ_COST)}</p>{table}{said}</section>'


def _choice(report: Json) -> str:
    """How the chains were chosen; "" where the recipe says how long they are."""
    drawn = plots.expected_speedup(report)
    if not drawn:
        return ""
    calibration = report["calibration"]
    note = (
        f"Lines: expected of each chain from {calibration['prompts']} validation prompts, as tokens a round \u00d7 time of a "
        "token / time of a round; 0 is plain decoding. Points: measured on the test prompts. The chain with the best "
        "expectation was chosen at each temperature before any of them was answered, the shorter one within 1%; chain "
        f"{FIXED} stands beside it for comparison between runs and machines."
    )
    return _figures("The chain that pays", note, [("Speed-up by chain length", "bars are 95% intervals", drawn)])


def _training(report: Json, curve: Sequence[Json]) -> str:
    note = ""
    top = plots.best(curve)
    if top:
        note = (
            f"The head of step {top.x:,.0f} was kept: the best simulated acceptance length on the validation prompts. "
        )
    if report["simulated"]:
        note += simulated_sentence(report["simulated"])
    return _figures("Training", note, [(title, "", plot) for title, plot in plots.training(curve)], "plots three")


def _figures(title: str, note: str, figures: Iterable[tuple[str, str, str]], name: str = "plots") -> str:
    """A section of captioned plots; "" where there is none."""
    drawn = "".join(
        f"<figure><figcaption>{escape(caption)} <span>{escape(aside)}</span></figcaption>{plot}</figure>"
        for caption, aside, plot in figures
        if plot
    )
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section><h2>{escape(title)}</h2>{said}<div class="{name}">{drawn}</div></section>' if drawn else ""


def _answers(traces: Sequence[Trace]) -> str:
    legend = (
        '<p class="note legend">'
        '<span class="d">written by the draft</span> <span class="t">written by the target</span> '
        '<span class="again">repeats an earlier 8-gram</span> Point at a token to see its round. '
        f"Of each source (at most {SHOWN}) this is the prompt whose acceptance length lies in the middle.</p>"
    )
    return f"<section><h2>Answers, token by token</h2>{legend}{render_answers(traces)}</section>"


def _results(report: Json) -> str:
    header, rows = result_rows(report)
    whole = [entry["category"] is None for entry in main_results(report)]
    return f"<section><h2>All results</h2>{_table(header, rows, whole)}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], strong: Sequence[bool] | None = None) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in header)
    marks = strong or [False] * len(rows)
    body = "".join(
        ("<tr class='all'>" if mark else "<tr>") + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for mark, row in zip(marks, rows, strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _circumstances(report: Json, material: Material) -> str:
    parts = []
    for name in ("target", "draft", "environment"):
        rows = [row for row in described(report) if row[0].startswith(f"{name}: ")]
        cells = "".join(
            f"<tr><td>{escape(key.partition(': ')[2])}</td><td>{escape(value)}</td></tr>" for key, value in rows
        )
        parts.append(f'<h3>{name.capitalize()}</h3><table class="facts-table">{cells}</table>')
    if material.prompts:
        splits = ("train", "validation", "test")
        rows = [
            [source, *(f"{counts.get(split, 0):,}" for split in splits)] for source, counts in material.prompts.items()
        ]
        parts[-1] += f"<h3>Prompts by source</h3>{_table(['source', *splits], rows)}"
    columns = "".join(f"<div>{part}</div>" for part in parts)
    return f'<section><h2>Target, draft, environment</h2><div class="columns">{columns}</div></section>'


def _definitions() -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in DEFINITIONS)
    return f'<section><h2>What the words mean</h2><dl class="definitions">{listed}</dl></section>'


def _again(report: Json, recipe: str) -> str:
    shown = (
        f'<details><summary>the recipe</summary><pre class="recipe">{escape(recipe)}</pre></details>' if recipe else ""
    )
    return f'<section><h2>Measure it again</h2><pre class="command">{escape(report["command"])}</pre>{shown}</section>'
