"""Which of the results in report.json a reader is shown: the main drafting's of each temperature, and which stand in for it.

overall(report)      # one per temperature: what headlines say, plain decoding where no chain pays
drafted(report)      # the same, but of a chain everywhere: of which acceptance is shown
compared(report)     # of the fixed chain where others were chosen: what compares between runs and machines
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..configs.drafting import FIXED, PLAIN, Drafting, chain

Json = dict[str, Any]


def drafting_of(entry: Json) -> Drafting:
    """How a result was drafted, but for its sampling."""
    return Drafting(**{name: entry["drafting"][name] for name in Drafting._fields})


def is_main(entry: Json, results: Sequence[Json]) -> bool:
    """Whether an entry of ``results`` is one of the main drafting of its temperature; in older reports the first is all's."""
    if "headline" in entry:
        return entry["headline"] is not None
    return drafting_of(entry) == drafting_of(results[0])


def is_chosen(entry: Json) -> bool:
    """Whether a main drafting was chosen by measurement."""
    return bool(entry.get("headline") == "chosen")  # which older reports have not


def is_plain(entry: Json) -> bool:
    """Whether this is plain decoding, where no chain pays."""
    return drafting_of(entry) == PLAIN


def main_results(report: Json) -> list[Json]:
    """The results of the main draftings."""
    return [entry for entry in report["results"] if is_main(entry, report["results"])]


def overall(report: Json) -> list[Json]:
    """The results of the main draftings over all prompts, one per temperature."""
    return [entry for entry in main_results(report) if entry["category"] is None]


def compared(report: Json) -> list[Json]:
    """The same of what compares between runs: where the main drafting was chosen, of the fixed chain, as though it were it."""
    return [_fixed(report, e) | {"headline": "fixed"} if is_chosen(e) else e for e in overall(report)]


def drafted_results(report: Json) -> list[Json]:
    """The results of which acceptance is shown: the main drafting's, and the fixed chain's where the main one is plain."""
    return [_fixed(report, entry) if is_plain(entry) else entry for entry in main_results(report)]


def drafted(report: Json) -> list[Json]:
    """The same over all prompts, one per temperature."""
    return [entry for entry in drafted_results(report) if entry["category"] is None]


def _fixed(report: Json, main: Json) -> Json:
    """The fixed chain's result beside a chosen one."""
    same = main["temperature"], main["category"]
    return next(
        entry
        for entry in report["results"]
        if (entry["temperature"], entry["category"]) == same and drafting_of(entry) == chain(FIXED)
    )


def at_temperature(report: Json, temperature: float) -> list[Json]:
    """The results over all prompts at a temperature, the main drafting's first."""
    return [e for e in report["results"] if e["category"] is None and e["temperature"] == temperature]


def has_beside(report: Json) -> bool:
    """Whether there are draftings beside the main ones."""
    return len(main_results(report)) < len(report["results"])
