"""A live engine beside our own decoder: the same tokens, and as many drafted ones accepted at every position.

    served = ask(LiveEngine("http://127.0.0.1:8000"), prompts, max_new_tokens=128)
    differences(target, prompts, ours, served)     # [] if the engine runs the head that was trained

The engine answers over its OpenAI interface and counts acceptance in ``/metrics`` (vLLM's names). Counters are those of
all its users, so nobody else may ask it meanwhile.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ..configs.errors import UserError
from ..models.draft import Eagle3Draft
from ..models.target import Target
from .speculate import ChainDrafter, Limits, Sampling, TargetVerifier, decode
from .stage import compare
from .traces import Round

TOLERANCE = 0.01  # by which accepted counts may differ, of ours
AT_ONCE = 8  # requests in flight
PATIENCE_S = 600.0
DRAFTS = "vllm:spec_decode_num_drafts_total"
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")


class Counters(NamedTuple):
    """``rounds``, and how many of them accepted at least i drafted tokens: ``by_position[i - 1]``."""

    rounds: int
    by_position: list[int]

    def since(self, earlier: Counters) -> Counters:
        """What was counted after ``earlier``."""
        before = earlier.by_position + [0] * (len(self.by_position) - len(earlier.by_position))
        positions = [now - then for now, then in zip(self.by_position, before, strict=True)]
        return Counters(self.rounds - earlier.rounds, positions)

    @property
    def acceptance_length(self) -> float:
        """1 + accepted / rounds."""
        return 1 + sum(self.by_position) / max(1, self.rounds)

    def __str__(self) -> str:
        shares = " ".join(f"{count / max(1, self.rounds):.3f}" for count in self.by_position)
        return f"acceptance length {self.acceptance_length:.3f} ({shares} by position, {self.rounds:,} rounds)"


class Served(NamedTuple):
    """Greedy answers, token ids each, and what was counted while they were made."""

    answers: list[list[int]]
    counters: Counters


class LiveEngine:
    """A serving engine at ``url``, such as http://127.0.0.1:8000."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if not re.match(r"https?://", self.url):
            raise UserError("--against", url, "it is no address", "give the engine's, as http://127.0.0.1:8000")

    def model(self) -> str:
        """The name of the model that it serves."""
        return str(json.loads(self._get("/v1/models"))["data"][0]["id"])

    def greedy(self, model: str, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
        """The most likely answer to ``prompt``, as token ids, its end token included."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        choice = json.loads(self._read(request))["choices"][0]
        if not isinstance(choice.get("token_ids"), list):
            raise UserError("--against", self.url, "it returns no token ids", "serve with vLLM 0.32 or later")
        return list(choice["token_ids"])

    def counters(self) -> Counters:
        """All that it has counted so far; nothing where it has not drafted yet."""
        rounds, positions = 0, dict[int, int]()
        for line in self._get("/metrics").splitlines():
            if not (found := SAMPLE.match(line)):
                continue
            if found["name"] == DRAFTS:
                rounds += round(float(found["value"]))
            elif found["name"] == PER_POSITION and (place := re.search(r'position="(\d+)"', found["labels"] or "")):
                at = int(place[1])
                positions[at] = positions.get(at, 0) + round(float(found["value"]))
        return Counters(rounds, [positions.get(at, 0) for at in range(max(positions, default=-1) + 1)])

    def _get(self, path: str) -> str:
        return self._read(urllib.request.Request(self.url + path))

    def _read(self, request: urllib.request.Request) -> str:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
                return str(response.read().decode())
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:200]
            raise UserError("--against", self.url, f"it refuses ({error.code}: {said})", "see its log") from error
        except OSError as error:
            remedy = "start the engine first, as the head's README.md says"
            raise UserError("--against", self.url, f"it does not answer ({error})", remedy) from error


def ask(engine: LiveEngine, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Served:
    """Let ``engine`` answer ``prompts`` (token ids) greedily."""
    model, before = engine.model(), engine.counters()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = list(threads.map(lambda prompt: engine.greedy(model, prompt, max_new_tokens), prompts))
    return Served(answers, engine.counters().since(before))


def decode_all(
    target: Target,
    draft: Eagle3Draft | None,
    prompts: Sequence[Sequence[int]],
    chain: int,
    max_new_tokens: int,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> Served:
    """The same with our own decoder; plain decoding without a ``draft``. ``advance`` is told of every answer's tokens."""
    capacity = max(map(len, prompts)) + max_new_tokens + chain + 1
    verifier = TargetVerifier(target, capacity)
    drafter = None if draft is None else ChainDrafter(draft, target.head.embedding, chain, capacity)
    answers, rounds = [], list[Round]()
    for prompt in prompts:
        decoded = decode(prompt, verifier, drafter, Limits(max_new_tokens, target.info.eos_ids), Sampling(0.0))
        answers.append(decoded.ids)
        rounds += decoded.rounds
        advance(len(decoded.ids))
    positions = [sum(entry.accepted > at for entry in rounds) for at in range(chain)]
    return Served(answers, Counters(len(rounds), positions))


def differences(target: Target, prompts: Sequence[Sequence[int]], ours: Served, theirs: Served) -> list[str]:
    """Where the engine says or accepts something else, each in a line; [] if nowhere.

    An answer may differ after a tie of the target's two best logits. Accepted counts may differ by a hundredth.
    """
    found = []
    for number, (prompt, mine, other) in enumerate(zip(prompts, ours.answers, theirs.answers, strict=True), 1):
        if (lossless := compare(target, list(prompt), mine, other)).diverged:
            problem = f"it says something else from token {lossless.position} on, where the two best logits are"
            found.append(f"prompt {number}: {problem} {lossless.gap:.2g} apart")
    if theirs.counters.rounds == 0:
        return [*found, "it has drafted nothing: it was started without the head, or counts under other names"]
    if len(theirs.counters.by_position) != len(ours.counters.by_position):
        drafted = len(theirs.counters.by_position)
        return [*found, f"it drafts {drafted} tokens a round, and {len(ours.counters.by_position)} were compared"]
    counts = zip(ours.counters.by_position, theirs.counters.by_position, strict=True)
    for at, (kept, accepted) in enumerate(counts, 1):
        if abs(accepted - kept) > TOLERANCE * kept:
            found.append(f"position {at}: it accepted {accepted:,} drafted tokens, and our decoder {kept:,}")
    if abs(theirs.counters.rounds - ours.counters.rounds) > TOLERANCE * ours.counters.rounds:
        found.append(f"it took {theirs.counters.rounds:,} rounds, and our decoder {ours.counters.rounds:,}")
    return found
