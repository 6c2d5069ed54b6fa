"""Requests to one server over HTTP, and what there is instead of an answer.

    client = Client("http://127.0.0.1:8000", timeout_s=60.0, meaning=lambda trouble: trouble)
    client.json("/v1/completions", {"prompt": [1, 5]})

It asks with the standard library: an answer takes seconds, so a connection for each costs nothing, none is kept that the
server closes meanwhile, and nobody has to install or follow a client.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import Any

TRANSIENT = (408, 425, 429)  # and all from 500 on
WORDS = 200  # characters of a server's refusal that are passed on


class Trouble(Exception):
    """Why there is no answer, in a line that goes on from the server's name: "says 503: loading".

    Attributes:
        code: HTTP's; 0 where none came.
        sent: whether the server had the request.
        pause_s: for how long it asks to be left alone (Retry-After); 0 where it does not say.
    """

    def __init__(self, words: str, code: int = 0, sent: bool = True, pause_s: float = 0.0) -> None:
        super().__init__(words)
        self.code, self.sent, self.pause_s = code, sent, pause_s

    @property
    def transient(self) -> bool:
        """Whether the same request may do better later: no answer came, or the server is busy or failed."""
        return self.code in (0, *TRANSIENT) or self.code >= 500


class Client:
    """A server at ``url``, with or without the ``/v1`` of its interface; any number of threads may ask it at once.

    Every method raises what ``meaning`` makes of a :class:`Trouble`. A key is taken from the environment: OPENAI_API_KEY.
    """

    def __init__(self, url: str, timeout_s: float, meaning: Callable[[Trouble], Exception]) -> None:
        self.url, self._timeout_s, self._meaning = url.rstrip("/").removesuffix("/v1"), timeout_s, meaning

    def models(self) -> list[dict[str, Any]]:
        """What it serves, each with an "id"; [] from a server of another kind."""
        found = self.json("/v1/models")
        listed = found.get("data") if isinstance(found, dict) else None
        entries = listed if isinstance(listed, list) else []
        return [entry for entry in entries if isinstance(entry, dict) and "id" in entry]

    def json(self, path: str, body: dict[str, Any] | None = None, name: str = "") -> Any:
        """What it answers under ``path``, posted ``body`` if there is one, to a request of this ``name``."""
        answer = self._answer(path, body, name)
        try:
            return json.loads(answer)
        except ValueError:
            raise self._meaning(Trouble("answers with no JSON", code=200)) from None

    def text(self, path: str) -> str:
        """What it answers under ``path``, as text."""
        return self._answer(path, None, "").decode(errors="replace")

    def _answer(self, path: str, body: dict[str, Any] | None, name: str) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"X-Request-Id": name} if name else {})
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, content, headers)
            with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                return bytes(response.read())
        except (OSError, HTTPException) as error:
            raise self._meaning(_trouble(error, self._timeout_s)) from error


def _trouble(error: OSError | HTTPException, timeout_s: float) -> Trouble:
    if isinstance(error, urllib.error.HTTPError):
        said, pause = error.reason, error.headers.get("Retry-After", "")
        with error, suppress(OSError, HTTPException):
            said = " ".join(error.read().decode(errors="replace").split())[:WORDS]
        return Trouble(f"says {error.code}: {said}", error.code, pause_s=float(pause) if pause.isdecimal() else 0.0)
    if isinstance(error, urllib.error.URLError):  # it is raised before the server has the request
        return Trouble(f"cannot be reached ({error.reason})", sent=False)
    if isinstance(error, TimeoutError):
        return Trouble(f"did not answer within {timeout_s:g} s")
    return Trouble(f"broke off ({error or type(error).__name__})")
