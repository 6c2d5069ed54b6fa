"""What must be known before figures are quoted: errors in the measurement, answers that differ, heads that were misread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .headlines import drafting_of, is_main
from .tables import length_of, percent, temperature_name

SAME = 0.01  # by which an acceptance length over the same greedy answers may differ
REPEATING = 0.2  # share of repeated 8-grams from which on a report warns
Json = dict[str, Any]


def warnings(found: Sequence[Json]) -> list[str]:
    """What in ``results`` cannot be right, or is not lossless."""
    said = []
    for entry in found:
        low, length = entry["speedup_ci95"][0], entry["acceptance_length"]
        if low is not None and length is not None and low > length:
            said.append(
                f"{_where(entry)}: the speed-up's interval, from {low:.2f} on, lies above the acceptance length "
                f"{length:.2f}: an error in the measurement"
            )
        lossless = entry["losslessness"]
        if lossless and lossless["diverged"] and entry["category"] is None:
            said.append(
                f"{_where(entry)}: {lossless['diverged']} of {lossless['answers']} answers differ from plain decoding "
                f"(largest top-2 gap {lossless['largest_gap']:.2g})"
            )
    return said


def cautions(found: Sequence[Json]) -> list[str]:
    """What is no error, but must be known before figures over all prompts are quoted.

    Of the main drafting: the others answer the same prompts, and repeat as much; how slow they are is for comparison.
    """
    said = []
    for entry in found:
        if entry["category"] is not None or not is_main(entry, found):
            continue
        if entry["repeated_ngram_rate"] > REPEATING:
            share = percent(entry["repeated_ngram_rate"])
            said.append(
                f"{_where(entry)}: {share} of the 8-grams repeat an earlier one of their answer; "
                "read the figures without repeats"
            )
        high = entry["speedup_ci95"][1]
        if high is not None and high < 1:
            said.append(f"{_where(entry)}: the draft slows the target down")
    return said


def against_card(imported: Json | None, found: Sequence[Json]) -> list[str]:
    """Where an imported head accepts less than its own card says, on the same benchmark and drafted alike."""
    said = []
    for figure in imported["figures"] if imported else []:
        for entry in found:
            same = figure["args"]["temperature"], figure["args"]["drafting"], figure["benchmark"]
            if entry["category"] is not None or (entry["temperature"], entry["drafting"], entry["benchmark"]) != same:
                continue
            if _accepts_less(entry, figure):
                said.append(
                    f"{temperature_name(entry['temperature'])}, {drafting_of(entry).name}: its card says an acceptance "
                    f"length of {figure['value']:.2f}, and here it is {length_of(entry)}: it may be misread (layers, "
                    "norms fed back, RoPE, the order of features), or the target runs in other numerics"
                )
    return said


def _accepts_less(entry: Json, figure: Json) -> bool:
    """Over the same greedy answers by more than a hundredth; over others, by more than chance."""
    if entry["acceptance_length"] is None:
        return False
    told = figure["args"]
    answers = entry["temperature"], entry["n_prompts"], round(entry["output_tokens_mean"], 4), entry["dtype"]
    if (0.0, told["prompts"], told["output_tokens_mean"], told["dtype"]) == answers:
        return bool(entry["acceptance_length"] < (1 - SAME) * figure["value"])
    return bool(entry["acceptance_length_ci95"][1] < figure["value"])


def _where(entry: Json) -> str:
    """Of which answers an entry of ``results`` tells."""
    at = temperature_name(entry["temperature"])
    return f"{entry['category'] or 'all prompts'} at {at}, {drafting_of(entry).name}"
