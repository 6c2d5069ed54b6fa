"""Answers as HTML, every token in the colour of its author, every round under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .metrics import rounds_of, speed
from .tables import number, temperature_name, times
from .traces import BASELINE, SPECULATIVE, Round, Trace

SHOWN = 6  # sources of which an answer is shown
CONTROL_PICTURES = 0x2400


def render_answers(traces: Sequence[Trace]) -> str:
    """For each of the first sources one prompt: the one in the middle by acceptance length, at every temperature."""
    temperatures = sorted({trace.temperature for trace in traces})
    parts = []
    for source in sorted({trace.source for trace in traces})[:SHOWN]:
        shown = _median_prompt([t for t in traces if t.source == source and t.temperature == temperatures[0]])
        found = {(t.temperature, t.mode): t for t in traces if t.prompt_id == shown.prompt_id and t.source == source}
        answers = [(found[at, SPECULATIVE], found[at, BASELINE]) for at in temperatures if (at, SPECULATIVE) in found]
        parts.append(_prompt(shown, answers))
    return "\n".join(parts)


def length(trace: Trace) -> float:
    """The acceptance length of one answer; 1 where no round counts."""
    rounds = rounds_of(trace)
    return 1 + sum(entry.accepted for entry in rounds) / max(len(rounds), 1)


def visible(piece: str) -> str:
    """A token's text, escaped, with the characters that cannot be seen made visible."""
    shown = "".join(chr(CONTROL_PICTURES + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in piece)
    return escape(shown).replace("\n", '<i class="newline">↵</i>\n').replace("\t", '<i class="newline">⇥</i>\t')


def _median_prompt(traces: Sequence[Trace]) -> Trace:
    ordered = sorted((t for t in traces if t.mode == SPECULATIVE), key=lambda trace: (length(trace), trace.prompt_id))
    return ordered[len(ordered) // 2]


def _prompt(shown: Trace, answers: Sequence[tuple[Trace, Trace]]) -> str:
    (fast, plain), *others = answers
    more = "".join(_answer(trace, baseline) for trace, baseline in others)
    if more:
        listed = ", ".join(temperature_name(trace.temperature) for trace, _ in others)
        more = f"<details><summary>the same prompt at {escape(listed)}</summary>{more}</details>"
    return (
        f'<article class="example"><h3>{escape(shown.source)} <span>{escape(shown.prompt_id)}</span></h3>'
        f'<pre class="prompt">{escape(shown.prompt)}</pre>{_answer(fast, plain)}{more}</article>'
    )


def _answer(trace: Trace, baseline: Trace) -> str:
    rounds = len(rounds_of(trace))
    ended = "ended by itself" if trace.finish == "stop" else "cut at the limit"
    facts = [
        temperature_name(trace.temperature),
        str(trace.drafting),
        f"{len(trace.ids)} tokens in {rounds} round{'' if rounds == 1 else 's'}",
        f"AL {number(length(trace))}",
        f"{times(speed([trace, baseline]).speedup.json)} as fast",
        ended,
    ]
    return f'<p class="facts">{" · ".join(map(escape, facts))}</p><pre class="answer">{_tokens(trace)}</pre>'


def _tokens(trace: Trace) -> str:
    parts = [_group(trace, 0, 1, "first token, from the target reading the prompt")]
    at = 1
    for number_, entry in enumerate(trace.rounds, 1):
        parts.append(_group(trace, at, at + entry.emitted, _says(number_, entry)))
        at += entry.emitted
    return "".join(parts)


def _group(trace: Trace, start: int, end: int, says: str) -> str:
    """Tokens that came together; what ``says`` holds is shown under the pointer."""
    tokens = "".join(_token(trace, index) for index in range(start, min(end, len(trace.ids))))
    return f'<span class="round" data-says="{escape(says)}">{tokens}</span>'


def _token(trace: Trace, index: int) -> str:
    name = "d" if trace.authors[index] == "draft" else "t"
    again = " again" if trace.repeated[index] else ""
    return f'<span class="{name}{again}">{visible(trace.pieces[index])}</span>'


def _says(index: int, entry: Round) -> str:
    if not entry.drafted:
        return f"round {index}: nothing drafted"
    return f"round {index}: {entry.accepted} of {entry.drafted} drafted tokens accepted"
