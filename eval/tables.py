"""How figures are written, and tables as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..configs.drafting import PLAIN
from .headlines import at_temperature, drafting_of, is_chosen, is_plain, main_results, overall

Json = dict[str, Any]
NONE = "\u2013"  # an en dash
TIMES = "\u00d7"  # the sign of multiplication

DEFINITIONS = (
    ("Round", "one draft-and-verify iteration for one sequence; rounds that drafted nothing do not count. Accepted "
     "tokens are counted before the answer is trimmed at its end token."),
    ("Acceptance length (AL)", "1 + accepted tokens / rounds. It means nothing without its drafting."),
    ("Acceptance at position i", "rounds that accepted at least i drafted tokens / rounds. The conditional rate "
     "divides by the rounds that accepted at least i - 1."),
    ("Acceptance rate", "accepted tokens / drafted tokens; of a tree, / the nodes that were verified, root excluded."),
    ("Chain, tree", "chain K: K tokens, one after the other. tree TOTAL/DEPTH/TOP_K: TOTAL nodes are verified at once, in "
     "DEPTH levels, of TOP_K children a node; its positions are its levels. Every drafting answers the same prompts and is "
     "set against the same plain answers."),
    ("Drafted, ms a round", "drafted tokens / rounds, and time after the first token / rounds. The latter divided by the acceptance length it is ms a token, which is faster "
     "than plain decoding where it is less than plain decoding's: time after the first token / tokens after the first."),
    ("Without repeats", "the same, without the rounds in which every emitted token ends an 8-gram that stands earlier "
     "in the same answer. Text that goes in circles is easy to draft."),
    ("Repeated 8-grams", "8-grams that stand earlier in the same answer / all 8-grams of the answers."),
    ("Simulated AL", "along a recorded greedy answer, accept the rollout's joint prefix hit, advance by that and one, "
     "repeat. Nothing is decoded. The round that crosses the end of the answer is left out."),
    ("TPS/user", "emitted tokens after the first / time after the first, batch 1. End to end: all emitted tokens / the "
     "whole time of the request. TTFT: time to the first token."),
    ("Speed-up", "TPS/user with the draft / without it: same engine, same prompts, interleaved in one run. One whose "
     "interval lies above the acceptance length is an error in the measurement."),
    ("Diverged", "greedy answers that differ from plain greedy decoding other than after a tie (top-2 logit gap below "
     "1e-4). In float32 there must be none."),
    ("Drafting at T > 0", "sampled: from the draft's distribution, verified by rejection sampling; greedy: the draft's "
     "best tokens, verified in the same way. A tree is grown from the "
     "best ones at any temperature, and verified node by node. All keep the target's distribution."),
    ("Intervals", "95%, bootstrap over prompts."),
)  # fmt: skip


def number(value: float | None) -> str:
    """An acceptance length, with two decimals."""
    return NONE if value is None else f"{value:.2f}"


def times(value: float | None) -> str:
    """A speed-up."""
    return NONE if value is None else f"{value:.2f}{TIMES}"


def percent(value: float | None) -> str:
    """A share."""
    return NONE if value is None else f"{value:.0%}"


def rate(value: float | None) -> str:
    """A number per second, with three digits."""
    return NONE if value is None else _three_digits(value)


def milliseconds(value: float | None) -> str:
    """A duration that is given in seconds."""
    return NONE if value is None else f"{_three_digits(value * 1000)} ms"


def _three_digits(value: float) -> str:
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def interval(
    value: float | None, ci95: Sequence[float | None] | None, write: Callable[[float | None], str] = number
) -> str:
    """A figure with its interval, where it has one."""
    if value is None or not ci95 or ci95[0] is None:
        return write(value)
    return f"{write(value)} [{write(ci95[0])}, {write(ci95[1])}]"


def temperature_name(temperature: float) -> str:
    """A temperature as it is written everywhere."""
    return f"T={temperature:g}"


def diverged(entry: Json) -> str:
    """How many answers were not what plain greedy decoding says."""
    lossless = entry["losslessness"]
    return NONE if lossless is None else f"{lossless['diverged']} of {lossless['answers']}"


def tps(entry: Json) -> str:
    """Tokens per second and user, before and after."""
    return f"{rate(entry['baseline_tps_per_user'])} → {rate(entry['tps_per_user'])}"


def drafting(entry: Json) -> str:
    """How an entry was drafted: an acceptance length says nothing without it."""
    if is_plain(entry):
        return "plain decoding: no chain pays here"
    return f"{_size(entry)}, {entry['drafting']['sampling']}" + (", chosen" if is_chosen(entry) else "")


def drafting_name(entry: Json) -> str:
    """The same as short as in a recipe."""
    if is_plain(entry):
        return "no chain pays"
    return drafting_of(entry).name + (" (chosen)" if is_chosen(entry) else "")


def circumstances(entries: Sequence[Json]) -> dict[str, str]:
    """What every figure of ``entries``, one per temperature, was measured with; figures compare where these are the same."""
    first = entries[0]
    drafts = sorted({e["drafting"]["sampling"] for e in entries if e["temperature"] and not is_plain(e)})
    return {
        "drafting": _draftings(entries) + (f" ({' and '.join(drafts)} at T>0)" if drafts else ""),
        "numerics": first["dtype"],
        "batch": f"{first['batch']}",
        "prompts": f"{first['n_prompts']} prompts per temperature ({first['benchmark']})",
        "seed": f"{first['seed']}",
        "engine": first["engine"],
    }


def conditions(report: Json) -> str:
    """:func:`circumstances` in one line."""
    said = circumstances(overall(report)).items()
    return ", ".join(f"{name} {value}" if value.isdigit() else value for name, value in said)


def _draftings(entries: Sequence[Json]) -> str:
    if not any(map(is_chosen, entries)):
        return _size(entries[0])
    sizes = {entry["temperature"]: "no draft" if is_plain(entry) else _size(entry) for entry in entries}
    said = (f"{size} at {listed([t for t in sizes if sizes[t] == size])}" for size in dict.fromkeys(sizes.values()))
    return f"{', '.join(said)}, chosen"


def listed(temperatures: Sequence[float]) -> str:
    """Temperatures in a sentence."""
    *most, last = map(temperature_name, temperatures)
    return f"{', '.join(most)} and {last}" if most else last


def _size(entry: Json) -> str:
    how = entry["drafting"]
    return f"{how['method']} of " + (
        f"{how['length']}" if how["method"] == "chain" else f"{how['total']} nodes, depth {how['length']}"
    )


def length_of(entry: Json) -> str:
    """An acceptance length with its interval; ``entry`` is a result, or its part without repeats."""
    return interval(entry["acceptance_length"], entry["acceptance_length_ci95"])


def speedup_of(entry: Json) -> str:
    """A speed-up with its interval."""
    return interval(entry["speedup"], entry["speedup_ci95"])


RESULT_COLUMNS: tuple[tuple[str, Callable[[Json], str]], ...] = (
    ("T", lambda entry: f"{entry['temperature']:g}"),
    ("prompts", lambda entry: entry["category"] or "all"),
    ("n", lambda entry: str(entry["n_prompts"])),
    ("AL", length_of),
    ("AL without repeats", lambda entry: length_of(entry["without_repeats"])),
    ("repeated 8-grams", lambda entry: percent(entry["repeated_ngram_rate"])),
    ("accepted", lambda entry: percent(entry["acceptance_rate"])),
    ("TPS/user", tps),
    ("end to end", lambda entry: rate(entry["tps_per_user_e2e"])),
    ("TTFT", lambda entry: milliseconds(entry["ttft_s"])),
    ("speed-up", speedup_of),
    ("diverged", diverged),
    ("tokens in, out", lambda entry: f"{entry['input_tokens_mean']:.0f}, {entry['output_tokens_mean']:.0f}"),
)  # fmt: skip


def result_rows(report: Json) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of all results of the main draftings, which are named where they were chosen."""
    columns = list(RESULT_COLUMNS)
    if any(map(is_chosen, overall(report))):
        columns.insert(1, ("drafting", drafting_name))
    cells = [[write(entry) for _, write in columns] for entry in main_results(report)]
    return [name for name, _ in columns], cells


SUMMARY_COLUMNS: tuple[tuple[str, Callable[[Json], str]], ...] = (
    ("T", lambda entry: f"{entry['temperature']:g}"),
    ("AL [95%]", length_of),
    ("without repeats", lambda entry: length_of(entry["without_repeats"])),
    ("accepted", lambda entry: percent(entry["acceptance_rate"])),
    ("TPS/user", tps),
    ("speed-up [95%]", speedup_of),
    ("diverged", diverged),
)  # fmt: skip


def summary_rows(report: Json) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of the main draftings over all prompts, for a terminal."""
    columns = list(SUMMARY_COLUMNS)
    if any(map(is_chosen, overall(report))):
        columns[3] = ("drafting", drafting_name)  # in the place of "accepted", for which there is no room
    cells = [[write(entry) for _, write in columns] for entry in overall(report)]
    return [name for name, _ in columns], cells


BESIDE_COLUMNS: tuple[tuple[str, Callable[[Json], str], Callable[[Json], str]], ...] = (
    ("T", lambda plain: f"{plain['temperature']:g}", lambda entry: f"{entry['temperature']:g}"),
    ("drafting", lambda _: PLAIN.name, drafting_name),
    ("AL [95%]", lambda _: NONE, length_of),
    ("drafted", lambda _: NONE, lambda entry: rate(entry["drafted_per_round"])),
    ("accepted", lambda _: NONE, lambda entry: percent(entry["acceptance_rate"])),
    ("ms a round", lambda plain: f"{rate(plain['baseline_token_ms'])} a token", lambda entry: rate(entry["round_ms"])),
    ("TPS/user", lambda plain: rate(plain["baseline_tps_per_user"]), lambda entry: rate(entry["tps_per_user"])),
    ("speed-up [95%]", lambda _: NONE, speedup_of),
    ("diverged", lambda _: NONE, diverged),
)
BESIDE = "Draftings side by side"
HOW_TO_READ_COST = (
    "A round takes its milliseconds and gives AL tokens: the one divided by the other is ms a token, to be set beside "
    "plain decoding's in the first row of each temperature."
)


def draftings_rows(report: Json, without: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of all draftings over all prompts: per temperature plain decoding, then each.

    Columns ``without`` are left out, where there is no room for all.
    """
    columns = [column for column in BESIDE_COLUMNS if column[0] not in without]
    rows = []
    for first in overall(report):
        rows.append([plain(first) for _, plain, _ in columns])
        drafted = [entry for entry in at_temperature(report, first["temperature"]) if not is_plain(entry)]
        rows += [[write(entry) for _, _, write in columns] for entry in drafted]
    return [name for name, _, _ in columns], rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, for a terminal."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows])
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for Markdown that is also aligned as it stands."""
    safe = [[_cell(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in safe)) for column in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in safe]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(content: str) -> str:
    """Text that neither ends its cell nor its line."""
    return " ".join(content.split()).replace("|", "\\|").replace("<", "&lt;")
