"""What a reader takes home, in sentences: what the head gains here, and what the same acceptance is worth elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..models.traffic import MAVERICK, gain, maverick_head, round_cost
from .headlines import at_temperature, drafting_of, is_main, is_plain, overall
from .tables import listed, number, temperature_name

Json = dict[str, Any]
GIGA = 1e9


def gains(report: Json) -> str:
    """What this head gains on the machine on which the report was made; "" where nothing was timed."""
    fast, slow = list[str](), list[float]()
    for entry in overall(report):
        if is_plain(entry):
            slow.append(entry["temperature"])
        elif entry["speedup"] is not None:
            at = temperature_name(entry["temperature"])
            fast.append(f"{_times(number(entry['speedup']), fast)} at {at} ({drafting_of(entry).name})")
    said = [f"on this machine the head makes decoding {_joined(fast)}"] if fast else []
    if slow:
        said.append(f"{'' if fast else 'on this machine '}no chain pays at {listed(slow)}")
    sentence = "; ".join(said)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def elsewhere(report: Json) -> str:
    """What the acceptance of the longest chain would be worth on the flagship's target, by bytes alone; "" without any."""
    head = maverick_head()
    found = [(e, gain(e["acceptance_by_position"], MAVERICK, head)) for e in map(_longest, _temperatures(report)) if e]
    if not found:
        return ""
    gained = list[str]()
    for entry, best in found:
        drafting = f"chain {best.chain}" if best.chain else "no chain"
        at = temperature_name(entry["temperature"])
        gained.append(f"{_times(f'{best.speedup:.1f}', gained)} at {at} ({drafting})")
    return (
        f"By bytes read alone, which is a formula and no measurement, the same acceptance on {MAVERICK.name} would make "
        f"decoding at most about {_joined(gained)}."
    )


def formula() -> str:
    """What :func:`elsewhere` is made of."""
    head = maverick_head()
    verify = ", ".join(f"{MAVERICK.bytes(tokens) / GIGA:.1f}" for tokens in (1, 2, 4, 6, 8))
    return (
        f"The formula: tokens a round / (bytes a round / bytes a token), at batch 1, with acceptance by position as measured "
        f"here. {MAVERICK.name} in FP8 reads {verify} GB to verify 1, 2, 4, 6, 8 tokens, its head in bfloat16 "
        f"{head.step / GIGA:.1f} GB a draft step and {head.round / GIGA:.1f} GB a round, so that a round of chain 3 costs "
        f"{round_cost(3, MAVERICK, head):.2f} tokens. KV cache, communication and latencies are left out, and a head for "
        "that target may accept more or less."
    )


def slower(report: Json) -> str:
    """Which draftings were slower than plain decoding and are no headline; "" if none was."""
    names: dict[str, list[float]] = {}
    for entries in _temperatures(report):
        for entry in entries:
            high = entry["speedup_ci95"][1]
            if high is not None and high < 1 and not is_main(entry, report["results"]):
                names.setdefault(drafting_of(entry).name, []).append(entry["temperature"])
    said = ", ".join(f"{name} at {listed(temperatures)}" for name, temperatures in names.items())
    return f"Slower than plain decoding here, measured for comparison: {said}." if said else ""


def _temperatures(report: Json) -> list[list[Json]]:
    return [at_temperature(report, entry["temperature"]) for entry in overall(report)]


def _longest(entries: Sequence[Json]) -> Json | None:
    """The longest chain of which rounds were counted."""
    chains = [entry for entry in entries if entry["drafting"]["method"] == "chain" and entry["rounds"]]
    return max(chains, key=lambda entry: entry["drafting"]["length"], default=None)


def _times(figure: str, before: Sequence[str]) -> str:
    """A speed-up; what is said before need not be said again."""
    return figure if before else f"{figure} times as fast"


def _joined(parts: Sequence[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
