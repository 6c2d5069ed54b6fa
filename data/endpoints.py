"""One OpenAI-compatible server of the target: token ids in, token ids out, and what its troubles mean.

    endpoint = Endpoint("http://127.0.0.1:8000", timeout_s=600.0)
    endpoint.find_model(None)
    endpoint.complete([1, 5, 9], max_tokens=128, temperature=0.0, seed=0).ids

A trouble is the server's, the request's, or the recipe's, and each has its own exception.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..configs.errors import UserError
from .client import Client, Trouble

PROBE_S = 10.0  # for a server to list its models
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0
BUSY = (429, 503)
#: Codes that say that the address, the model or the key is wrong, and not the request.
MISDIRECTED = (401, 403, 404, 405)
#: What OpenAI's own interface has; TensorRT-LLM, for one, refuses a request that holds anything it does not know.
OPENAI = ("model", "prompt", "max_tokens", "temperature", "seed", "top_p")


class Reply(NamedTuple):
    """A completion: its token ids, or None from a server that returns none, its text, and whether it ended by itself."""

    ids: list[int] | None
    text: str
    ended: bool


class Unavailable(Exception):
    """The server is away or busy, which says nothing about the request."""

    def __init__(self, words: str, pause_s: float = 0.0) -> None:
        super().__init__(words)
        self.pause_s = pause_s  # the least, as the server asks


class Failed(Exception):
    """The request came to nothing, and may do better another time."""


class Refused(Exception):
    """The server does not take this request, now or later."""


def completion_request(
    model: str, prompt: Sequence[int], max_tokens: int, temperature: float, seed: int
) -> dict[str, Any]:
    """The body of a request to ``/v1/completions`` for what the target itself says to ``prompt``, in token ids.

    Servers take what is left out from the target's generation_config.json, which may cut the distribution or punish
    repeats; so nothing is left out.
    """
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "return_token_ids": True,
    }


def backoff(attempt: int) -> float:
    """Seconds before another ``attempt`` (1, 2, ...): twice as long each time, shortened by chance so that clients part."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1.0)


class Endpoint:
    """A server at ``url``, with or without the ``/v1`` of its interface.

    Every method raises :class:`Unavailable`, :class:`Failed` or :class:`Refused`, and :class:`UserError` where it is not
    what the recipe says it is.

    Attributes:
        url: its address, without the ``/v1``.
        model: its name for the target, once it was found.
        strict: whether it takes no parameter but OpenAI's own, and so may sample as it likes beyond those.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._client = Client(url, timeout_s, self._meaning)
        self._prober = Client(url, min(PROBE_S, timeout_s), self._meaning)
        self.url = self._client.url
        self.model, self.strict = "", False
        self._answered = False

    def find_model(self, name: str | None) -> None:
        """Set ``model`` to ``name``, or to the first that the server lists."""
        models = [str(entry["id"]) for entry in self._prober.models()]
        if not models:
            raise self._mistaken("it lists no models", "give the address of an OpenAI-compatible server")
        if name is not None and name not in models:
            problem = f"{self.url} has no such model"
            raise UserError("regenerate.served_model", name, problem, f"choose one of {', '.join(models)}")
        self.model = name or models[0]

    def complete(self, prompt: list[int], max_tokens: int, temperature: float, seed: int) -> Reply:
        """What the target says to ``prompt``, at most ``max_tokens`` token ids; seeds are cut to 31 bits."""
        body = completion_request(self.model, prompt, max_tokens, temperature, seed % 2**31)
        found = self._ask(body)
        try:
            choice = found["choices"][0]
            finish, text, ids = choice["finish_reason"], choice["text"], choice.get("token_ids")
            given = choice.get("prompt_token_ids") or prompt
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Failed(f"{self.url} answers with no completion") from None
        if given != prompt:
            raise Refused(f"{self.url} answered another prompt than it was given")
        if finish not in ("stop", "length"):
            raise Failed(f"{self.url} ended for no good reason ({finish})")
        self._answered = True
        return Reply(ids, text, finish == "stop")

    def _ask(self, body: dict[str, Any]) -> Any:
        """The whole ``body``, or what OpenAI's own interface has of it where that is taken and the whole is refused."""
        if not self.strict:
            try:
                return self._client.json("/v1/completions", body)
            except Refused:
                if self._answered and not self.strict:  # it took these parameters before
                    raise
        found = self._client.json("/v1/completions", {name: body[name] for name in OPENAI})
        self.strict = True
        return found

    def _meaning(self, trouble: Trouble) -> Exception:
        words = f"{self.url} {trouble}"
        if not trouble.sent or trouble.code in BUSY:
            return Unavailable(words, min(trouble.pause_s, LONGEST_PAUSE_S))
        if trouble.code in MISDIRECTED and not self._answered:
            return self._mistaken(f"it {trouble}", "check address, served_model and OPENAI_API_KEY")
        return Failed(words) if trouble.transient or trouble.code in (200, *MISDIRECTED) else Refused(words)

    def _mistaken(self, problem: str, remedy: str) -> UserError:
        return UserError("regenerate.endpoints", self.url, problem, remedy)
