"""Crashes between any two steps of a writer, what a folder holds, and servers with troubles."""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from eagle3.data import endpoints
from eagle3.models.generate import Answer
from eagle3.models.target import Target


class Crash(BaseException):
    """The process would be gone here: nothing may catch this."""


class CrashPlan:
    """Counts the moments before and after operations on files, and ends the process, as it were, at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.moments = at, 0
        self._synced: set[int] = set()
        self._replace = os.replace

    @property
    def happened(self) -> bool:
        return self.moments >= self.at

    def fsync(self, handle: int) -> None:
        """A crash before it loses half of what was written, as a power cut does."""
        try:
            self._moment()
        except Crash:
            if stat.S_ISREG(os.fstat(handle).st_mode):
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
            raise
        self._synced.add(os.fstat(handle).st_ino)  # in truth nothing is: the machine that runs the tests stays on
        self._moment()

    def replace(self, source: Path, target: Path) -> None:
        """What is published before it was synced is lost by half."""
        self._moment()
        if os.stat(source).st_ino not in self._synced:
            os.truncate(source, os.stat(source).st_size // 2)
        self._replace(source, target)
        self._moment()

    def _moment(self) -> None:
        self.moments += 1
        if self.happened:  # and nothing happens after it, in whatever thread
            raise Crash


@contextmanager
def crashing(at: int) -> Iterator[CrashPlan]:
    plan = CrashPlan(at)
    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        patch.setattr(os, "fsync", plan.fsync)
        patch.setattr(os, "replace", plan.replace)
        yield plan


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` that is not hidden, with its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(name="crashing", scope="session")
def crashing_fixture() -> Callable[[int], AbstractContextManager[CrashPlan]]:
    """``with crashing(7) as crash:`` ends the block at the 7th moment; ``crash.happened`` says if it came to that."""
    return crashing


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder that is not hidden, with its content."""
    return snapshot


@pytest.fixture
def answered(run_dir: Path) -> Path:
    """The same run before it was recorded."""
    shutil.rmtree(run_dir / "store")
    return run_dir


@pytest.fixture
def asked(run_dir: Path) -> Path:
    """The same run before it was answered."""
    shutil.rmtree(run_dir / "store")
    for name in ("answers.jsonl", "answers.summary.json", "regenerate.stage.json"):
        (run_dir / "conversations" / name).unlink()
    return run_dir


class Stub(ThreadingHTTPServer):
    """An OpenAI-compatible server of ``target``, with whatever troubles it is given.

    ``trouble(request)`` is called before an answer and may sleep; it returns None, or the code, words and headers to
    answer with instead, or "drop" to break off.
    """

    daemon_threads = False  # when it is stopped it has stopped: the target computes one thing at a time
    request_queue_size = 128
    computing = threading.Lock()
    known: ClassVar[dict[tuple[Any, ...], Answer]] = {}  # some hundred requests are for the same few answers

    def __init__(self, target: Target, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(address, Handler)
        self.target, self.models, self.ids = target, ["mine"], True
        self.trouble: Callable[[dict[str, Any]], Any] = lambda request: None
        self.requests: list[dict[str, Any]] = []
        self.answered: list[list[int]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.005,))
        self.thread.start()

    def say(self, prompt: list[int], temperature: float, most: int, seed: int) -> Answer:
        generate = self.target.generate
        key = (generate, *prompt, temperature, most, seed)
        with self.computing:
            if key not in self.known:
                self.known[key] = generate([prompt], [temperature], most, [seed])[0]
            return self.known[key]

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"data": [{"id": name} for name in self.server.models]}))

    def do_POST(self) -> None:
        request, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with server.lock:
            server.requests.append(request)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        trouble = server.trouble(request)
        with server.lock:
            server.at_once -= 1
            if trouble == "drop":
                return
            if trouble is not None:
                self.reply(*trouble)
                return
            server.answered.append(request["prompt"])
        said = server.say(request["prompt"], request["temperature"], request["max_tokens"], request["seed"])
        shown = server.target.tokenizer.decode(said.ids, skip_special_tokens=True)
        choice = {"text": shown, "finish_reason": "stop" if said.finished else "length"}
        ids = {"token_ids": said.ids, "prompt_token_ids": request["prompt"]} if server.ids else {}
        self.reply(200, json.dumps({"choices": [choice | ids]}))

    def reply(self, code: int, text: str, headers: dict[str, str] | None = None) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # an asker that was killed
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def serve(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stub]]:
    """``serve()`` starts a server of the tiny target, and ``serve(stub)`` one in the place of a stopped one.

    Its clients pause for milliseconds.
    """
    monkeypatch.setattr(endpoints, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(endpoints, "LONGEST_PAUSE_S", 0.05)
    started: list[Stub] = []

    def start(former: Stub | None = None) -> Stub:
        stub = Stub(tiny_target, former.server_address if former else ("127.0.0.1", 0))
        started.append(stub)
        return stub

    yield start
    for stub in started:
        stub.stop()


@pytest.fixture
def brief(tiny_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny target, which has learned nothing, ends every answer by itself after three tokens."""
    real = tiny_target.generate

    def generate(prompts: Any, temperatures: Any, most: int, seeds: Any) -> list[Answer]:
        end = tiny_target.tokenizer.eos_token_id
        return [Answer([*said.ids[:3], end], True) for said in real(prompts, temperatures, 3, seeds)]

    monkeypatch.setattr(tiny_target, "generate", generate)


@pytest.fixture
def talking(asked: Path) -> Path:
    """The run before it was answered, with later turns in half of its conversations."""
    path = asked / "conversations" / "prompts.jsonl"
    rows = [json.loads(line) for line in path.open()]
    for number, row in enumerate(rows):
        row["follow_ups"] = ["And then?", "Why?"][: number % 3]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return asked
