"""Serving engines over HTTP: greedy answers as token ids, and the acceptance that the engine itself has counted.

    engine = connect("http://127.0.0.1:8000")      # vLLM, SGLang or TensorRT-LLM: it says which it is
    engine.greedy([1, 2, 3], max_new_tokens=8)
    engine.counters().acceptance_length

Each counts in its own way. vLLM adds up in ``/metrics``, by position. SGLang tells of every request how many rounds
accepted how many tokens. TensorRT-LLM lists its iterations in ``/metrics``, forgets those that were read, and has no
figures by position. vLLM is run by the tests; of the others their sources of 2026 were read.
"""

from __future__ import annotations

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

from ..configs.errors import UserError
from ..configs.limits import ADDRESS
from ..data.client import Client, Trouble

PATIENCE_S = 600.0
DRAFTS = "vllm:spec_decode_num_drafts_total"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
#: SGLang's list of how many rounds accepted 0, 1, 2, ... tokens, in its versions from 0.5.9 on.
HISTOGRAMS = ("spec_correct_drafts_histogram", "spec_accept_histogram")


class Counters(NamedTuple):
    """``rounds``, drafted tokens ``accepted`` in them, and how many rounds accepted at least i: ``by_position[i - 1]``.

    ``by_position`` is empty where an engine does not count so.
    """

    rounds: int
    accepted: int
    by_position: list[int]

    @classmethod
    def of_positions(cls, rounds: int, by_position: list[int]) -> Counters:
        """Counters of an engine that counts by position."""
        return cls(rounds, sum(by_position), by_position)

    def __add__(self, other: object) -> Counters:
        """What both have counted."""
        if not isinstance(other, Counters):
            return NotImplemented
        pairs = zip_longest(self.by_position, other.by_position, fillvalue=0)
        return Counters(self.rounds + other.rounds, self.accepted + other.accepted, [a + b for a, b in pairs])

    def since(self, earlier: Counters) -> Counters:
        """What was counted after ``earlier``."""
        return self + Counters(-earlier.rounds, -earlier.accepted, [-count for count in earlier.by_position])

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / rounds."""
        return 1 + self.accepted / max(1, self.rounds)

    def __str__(self) -> str:
        shares = " ".join(f"{count / max(1, self.rounds):.3f}" for count in self.by_position)
        where = f"{shares} by position, " if shares else ""
        return f"acceptance length {self.acceptance_length:.3f} ({where}{self.rounds:,} rounds)"


class LiveEngine(ABC):
    """A serving engine, asked through ``client``, that serves ``model``."""

    def __init__(self, client: Client, model: str) -> None:
        self.client, self.url, self.model = client, client.url, model

    @abstractmethod
    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The most likely answer to ``prompt``, as token ids; the end token is there if the engine returns it."""

    @abstractmethod
    def counters(self) -> Counters:
        """All that it has counted so far; nothing where it has not drafted yet."""

    def _complete(self, prompt: Sequence[int], max_new_tokens: int, **asking: Any) -> Any:
        body = {"model": self.model, "prompt": list(prompt), "max_tokens": max_new_tokens, "temperature": 0, **asking}
        return self.client.json("/v1/completions", body)["choices"][0].get("token_ids")

    def _ids(self, found: Any) -> list[int]:
        if not isinstance(found, list) or not found:
            raise UserError(
                "--against", self.url, "it returns no token ids", "serve with a newer version of the engine"
            )
        return found


class VLLM(LiveEngine):
    """vLLM 0.32."""

    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The answer, its end token included."""
        return self._ids(self._complete(prompt, max_new_tokens, return_token_ids=True))

    def counters(self) -> Counters:
        """Sums over all its engines."""
        rounds, positions = 0, dict[int, int]()
        for line in self.client.text("/metrics").splitlines():
            if not (found := SAMPLE.match(line)):
                continue
            if found["name"] == DRAFTS:
                rounds += round(float(found["value"]))
            elif found["name"] == PER_POSITION and (place := re.search(r'position="(\d+)"', found["labels"] or "")):
                at = int(place[1])
                positions[at] = positions.get(at, 0) + round(float(found["value"]))
        return Counters.of_positions(rounds, [positions.get(at, 0) for at in range(max(positions, default=-1) + 1)])


class _Adding(LiveEngine):
    """An engine whose counts come in pieces, which are added up here."""

    def __init__(self, client: Client, model: str) -> None:
        super().__init__(client, model)
        self._counted, self._lock = Counters(0, 0, []), threading.Lock()

    def _add(self, pieces: Iterable[Counters]) -> Counters:
        with self._lock:
            for piece in pieces:
                self._counted += piece
            return self._counted


class SGLang(_Adding):
    """SGLang 0.5: its own interface, as the OpenAI one tells nothing of drafting."""

    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The answer, its end token included."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
        answer = self.client.json("/generate", {"input_ids": list(prompt), "sampling_params": sampling})
        self._add(_of_request(answer.get("meta_info", {})))
        return self._ids(answer.get("output_ids"))

    def counters(self) -> Counters:
        """Sums over the answers to our own requests."""
        return self._add([])


def _of_request(told: dict[str, Any]) -> list[Counters]:
    """What SGLang tells of one request; nothing where it did not draft."""
    for name in HISTOGRAMS:
        if histogram := told.get(name):
            reached = list(accumulate(reversed(histogram)))[::-1]
            return [Counters.of_positions(reached[0], reached[1:])]
    return []


class TensorRTLLM(_Adding):
    """TensorRT-LLM's trtllm-serve, started with ``enable_iter_perf_stats: true``."""

    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The answer, perhaps without its end token."""
        found = self._ids(self._complete(prompt, max_new_tokens, detokenize=False))
        self.counters()  # it keeps a limited number of iterations
        return found

    def counters(self) -> Counters:
        """Sums over the iterations that it has listed."""
        listed = json.loads(self.client.text("/metrics") or "[]")
        stats = [entry["specDecodingStats"] for entry in listed if entry.get("specDecodingStats")]
        return self._add(
            Counters(entry["numRequestsWithDraftTokens"], entry["numAcceptedTokens"], []) for entry in stats
        )


ENGINES: dict[str, type[LiveEngine]] = {"vllm": VLLM, "sglang": SGLang, "tensorrt_llm": TensorRTLLM}


def connect(url: str) -> LiveEngine:
    """The engine at ``url``, such as http://127.0.0.1:8000.

    Raises:
        UserError: it is no address, nobody answers, or it is of another kind.
    """
    if not ADDRESS.fullmatch(url):
        raise UserError("--against", url, "it is no address", "give the engine's, as http://127.0.0.1:8000")

    def meaning(trouble: Trouble) -> UserError:
        remedy = "see its log" if trouble.sent else "start the engine first, as the head's README.md says"
        return UserError("--against", url, f"it {trouble}", remedy)

    client = Client(url, PATIENCE_S, meaning)
    served = next(iter(client.models()), {})
    if served.get("owned_by") not in ENGINES:
        problem = f"it says that it is {served.get('owned_by')}"
        raise UserError("--against", url, problem, f"serve with one of {', '.join(ENGINES)}")
    return ENGINES[served["owned_by"]](client, str(served["id"]))
