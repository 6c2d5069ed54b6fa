"""What a server's answers, and its failures to answer, are to whoever asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from eagle3.data.client import Client, Trouble


class Stub(ThreadingHTTPServer):
    """Replies with code, text and headers, or breaks off where the code is 0, after ``delay`` seconds."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: tuple[int, str, dict[str, str]] = (200, "{}", {})
        self.delay = 0.0
        self.asked: list[tuple[str, Any, Any]] = []  # path, body, headers
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def client(self, timeout_s: float = 5.0) -> Client:
        return Client(f"{self.url}/v1/", timeout_s, lambda trouble: trouble)


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, json.loads(content) if content else None, self.headers))
        time.sleep(self.server.delay)
        code, text, headers = self.server.reply
        if not code:
            return
        with suppress(BrokenPipeError):  # an asker that did not wait
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode("latin1"))

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def trouble(client: Client, path: str = "/x") -> Trouble:
    with pytest.raises(Trouble) as caught:
        client.json(path)
    return caught.value


def test_json_goes_in_and_comes_out(stub: Stub) -> None:
    stub.reply = (200, '{"a": [1]}', {})
    client = stub.client()
    assert client.url == stub.url
    assert client.json("/v1/completions", {"prompt": [1, 5]}, "mine") == {"a": [1]}
    assert client.text("/metrics") == '{"a": [1]}'
    (path, body, headers), (other, nothing, plain) = stub.asked
    assert (path, body, other, nothing) == ("/v1/completions", {"prompt": [1, 5]}, "/metrics", None)
    assert (headers["Content-Type"], headers["X-Request-Id"]) == ("application/json", "mine")
    assert plain["X-Request-Id"] is None


def test_a_key_is_sent_where_there_is_one(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, header in (("", None), ("s3cret", "Bearer s3cret")):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        stub.client().json("/v1/models")
        assert stub.asked[-1][2]["Authorization"] == header


@pytest.mark.parametrize("code", [400, 401, 403, 404, 405, 408, 422, 425, 429, 500, 502, 503, 504])
def test_which_codes_may_do_better_later(stub: Stub, code: int) -> None:
    stub.reply = (code, "no\n  luck", {})
    found = trouble(stub.client())
    assert (str(found), found.code, found.sent) == (f"says {code}: no luck", code, True)
    assert found.transient == (code in (408, 425, 429, 500, 502, 503, 504))


def test_what_is_said_is_cut(stub: Stub) -> None:
    stub.reply = (400, "x" * 999, {})
    assert str(trouble(stub.client())) == f"says 400: {'x' * 200}"
    stub.reply = (400, "x", {"Content-Length": "9"})  # and then nothing more comes
    assert str(trouble(stub.client())) in ("says 400: Bad Request", "says 400: x")


@pytest.mark.parametrize(("said", "pause_s"), [({"Retry-After": "7"}, 7.0), ({"Retry-After": "Fri"}, 0.0), ({}, 0.0)])
def test_for_how_long_it_asks_to_be_left_alone(stub: Stub, said: dict[str, str], pause_s: float) -> None:
    stub.reply = (429, "busy", said)
    assert trouble(stub.client()).pause_s == pause_s


def test_no_answer(stub: Stub) -> None:
    stub.reply = (0, "", {})
    broken = trouble(stub.client())
    stub.reply = (200, "{", {"Content-Length": "9"})
    torn = trouble(stub.client())
    stub.delay = 0.2
    late = trouble(stub.client(0.05))
    stub.shutdown()
    stub.server_close()
    gone = trouble(stub.client())
    assert str(broken).startswith("broke off (Remote end closed")
    assert str(torn).startswith("broke off (IncompleteRead")
    assert str(late) == "did not answer within 0.05 s"
    assert str(gone).startswith("cannot be reached (") and "refused" in str(gone)
    assert [found.sent for found in (broken, torn, late, gone)] == [True, True, True, False]
    assert all(found.transient and found.code == 0 for found in (broken, torn, late, gone))


@pytest.mark.parametrize("text", ["", "<html>", '{"a": "\xff"}'])
def test_what_is_no_json(stub: Stub, text: str) -> None:
    stub.reply = (200, text, {})
    found = trouble(stub.client())
    assert (str(found), found.code, found.transient) == ("answers with no JSON", 200, False)


@pytest.mark.parametrize(
    ("text", "models"),
    [
        ('{"data": [{"id": "a", "owned_by": "vllm"}, {"id": "b"}]}', ["a", "b"]),
        ('{"data": []}', []),
        ('{"data": [1, {"name": "a"}]}', []),
        ('{"data": 1}', []),
        ("{}", []),
        ("[]", []),
    ],
)
def test_models_are_those_that_it_lists(stub: Stub, text: str, models: list[str]) -> None:
    stub.reply = (200, text, {})
    assert [entry["id"] for entry in stub.client().models()] == models
    assert stub.asked[0][0] == "/v1/models"


def test_a_trouble_is_what_it_means_to_whoever_asks(stub: Stub) -> None:
    stub.reply = (503, "loading", {})
    client = Client(stub.url, 5.0, lambda trouble: ValueError(f"it {trouble}"))
    for ask in (client.models, lambda: client.json("/x"), lambda: client.text("/x")):
        with pytest.raises(ValueError, match="it says 503: loading"):
            ask()
