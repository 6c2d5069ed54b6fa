"""What decoding wrote down, answer by answer: the raw data of every metric and every coloured example.

``eval/traces.jsonl`` holds one JSON object per answer, with the fields of :class:`Trace`:

    {"prompt_id": "a1b2", "source": "explain", "prompt": "What does ... do?", "temperature": 0.0, "mode": "speculative",
     "drafting": "chain 5", "seed": 12, "input_tokens": 61, "ids": [17, 300, 6], "pieces": ["It", " returns", "<|eot|>"],
     "authors": ["target", "draft", "target"], "repeated": [false, false, false], "finish": "stop",
     "rounds": [{"drafted": 5, "accepted": 1, "emitted": 2}], "ttft_s": 0.011, "total_s": 0.034, "lossless": null}

* ``prompt``: the last message of the user, to be shown. ``input_tokens``: the whole prompt in the target's chat format.
* ``mode``: ``baseline`` (target alone, ``rounds`` is empty, every author is ``target``) or ``speculative``.
  ``drafting``: null or how its rounds drafted, ``chain K`` or ``tree TOTAL/DEPTH/TOP_K``. The answers to a prompt at a
  temperature are decoded one right after the other, and stand together in the file: the baseline, then the main chain's
  (``eval.chain``), then those of ``eval.beside``. Every one is compared with the same baseline. Where the main chain was
  chosen by measurement, it may be another at each temperature, or none; a chain of 5 then comes behind it.
* ``pieces``: the text of each token; joined they are the answer. A token that ends inside a character has "" and the
  token that completes the character has it.
* ``authors``: who proposed each token. Token 0 comes from the target's prefill.
* ``repeated``: whether the 8-gram that ends in the token stands earlier in the same answer.
* ``finish``: ``stop`` (an end token) or ``length`` (cut at the limit).
* ``rounds``: in order, from token 1 on. A round emits its accepted tokens and one of the target's; ``emitted`` is less
  than ``accepted + 1`` where the answer was trimmed at its end token. ``drafted``: tokens that the target verified; of a
  tree its nodes, root excluded. Rounds with ``drafted`` 0 count in no metric of acceptance.
* ``ttft_s``: from the start of the request to its first token; ``total_s``: to its last. Between the two there is
  nothing but the rounds, or, of a baseline, the tokens after the first.
* ``lossless``: at T=0, on speculative answers, the comparison with the baseline: ``{"equal": true, "position": null,
  "gap": null}``, or the first differing position and the target's top-2 logit gap there; a gap below 1e-4 is a tie.

Beside it ``eval/eval.json`` says how all of them were made: ``{"schema": 1, "benchmark": "stdlib", "settings": {"engine": "native", "tensor_parallel": 1, "chain": 5, "beside":
["tree 60/7/10"], "temperatures": [...], "prompts": 48, "max_new_tokens": 128, "sampling": "sampled", "dtype": "float32"}, "seed": 0, "batch": 1,
"engine": "...", "target": {...}, "draft": {...}, "environment": {...}, "calibration": null}``. Where ``chain`` is ``auto``,
``calibration`` is what :mod:`.calibration` found and chose.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..data.files import encode_line

BASELINE, SPECULATIVE = "baseline", "speculative"
UNFINISHED = "\ufffd"  # what a tokenizer makes of bytes that are no character yet
TIE = 1e-4  # top-2 logit gap below which either token is greedy decoding's


class Round(NamedTuple):
    """One iteration: tokens ``drafted``, of them ``accepted``, and ``emitted`` after trimming at the end token."""

    drafted: int
    accepted: int
    emitted: int


@dataclass(frozen=True)
class Lossless:
    """A speculative greedy answer against the plain one; ``position`` and ``gap`` of their first difference."""

    equal: bool
    position: int | None = None
    gap: float | None = None

    @property
    def diverged(self) -> bool:
        """Whether the answers differ other than after a tie."""
        return not self.equal and (self.gap is None or self.gap >= TIE)


@dataclass(frozen=True)
class Trace:
    """One answer; the fields are explained above."""

    prompt_id: str
    source: str
    prompt: str
    temperature: float
    mode: str
    drafting: str | None
    seed: int
    input_tokens: int
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    authors: tuple[str, ...]
    repeated: tuple[bool, ...]
    finish: str
    rounds: tuple[Round, ...]
    ttft_s: float
    total_s: float
    lossless: Lossless | None = None

    @property
    def key(self) -> tuple[str, float, str | None]:
        """What there is one trace of."""
        return self.prompt_id, self.temperature, self.drafting

    def inside_repeats(self) -> list[bool]:
        """Per round, whether all the tokens it emitted are repeated."""
        marks, at = [], 1
        for entry in self.rounds:
            marks.append(all(self.repeated[at : at + entry.emitted]))
            at += entry.emitted
        return marks

    def to_line(self) -> bytes:
        """The trace as a line of ``traces.jsonl``."""
        return encode_line(asdict(self) | {"rounds": [entry._asdict() for entry in self.rounds]})

    @classmethod
    def from_line(cls, line: bytes) -> Trace:
        """Read what :meth:`to_line` wrote."""
        fields = json.loads(line)
        lossless = fields.pop("lossless")
        rounds = tuple(Round(**entry) for entry in fields.pop("rounds"))
        for name in ("ids", "pieces", "authors", "repeated"):
            fields[name] = tuple(fields[name])
        return cls(**fields, rounds=rounds, lossless=Lossless(**lossless) if lossless else None)


def read_traces(path: Path) -> list[Trace]:
    """All traces of an evaluation, in the order in which they were decoded."""
    with path.open("rb") as file:
        return [Trace.from_line(line) for line in file]


def resume(path: Path, sizes: Sequence[int]) -> int:
    """How many of the groups of so many answers ``path`` holds; what a crash left behind the last whole one is cut off."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        lines = [line for line in file if line.endswith(b"\n")]
        ends = [end for end in itertools.accumulate(sizes) if end <= len(lines)]
        file.truncate(sum(len(line) for line in lines[: max(ends, default=0)]))
    return len(ends)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; bytes of an unfinished character wait for the token that finishes it."""
    found: list[str] = []
    before = ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list only of several sequences
        if text.endswith(UNFINISHED) and end < len(ids):
            found.append("")
            continue
        found.append(text[len(before) :])
        before = text
    return found
