"""A real vLLM on the CPU, in an environment of its own, and a run with the demo's head; `make test-serving` makes both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from eagle3.cli import main
from eagle3.configs.settings import TargetSettings
from eagle3.data.chat import prompt_ids
from eagle3.data.conversations import read_conversations
from eagle3.eval.live import LiveEngine, connect
from eagle3.models.target import Target, load_target

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "runs" / "tiny"
TARGET = ROOT / "models" / "embedded"
PYTHON = ROOT / ".venv-serving" / "bin" / "python"
PROMPTS = 104
MOST = 32  # tokens of an answer
CHAIN = 5
START_S = 300
AT_ONCE = 2  # engines that start together: a core each


class Engine:
    """A vLLM with the target that ships, on a port of its own; it may be killed and started again."""

    def __init__(self, log: Path, options: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = probe.getsockname()
        self.url, self._log = f"http://127.0.0.1:{self._address[1]}", log
        self._command = [
            str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(TARGET), "--host", "127.0.0.1",
            "--port", str(self._address[1]), "--enforce-eager", "--gpu-memory-utilization", "0.3", *options,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Returns before it answers."""
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(
                self._command, stdout=file, stderr=file, env=os.environ | settings, start_new_session=True
            )

    def kill(self) -> None:
        """As the system does that runs out of memory."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def connected(self) -> LiveEngine:
        """Wait until it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(self._address) == 0:
                    return connect(self.url)
            time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start:\n{self.log()}")

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]


Start = Callable[[str, Sequence[str]], Engine]
Serve = Callable[..., "Future[LiveEngine]"]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the demo's head, and more held-out prompts than the demo has."""
    folder = tmp_path_factory.mktemp("runs")
    assert (DEMO / "draft" / "model.safetensors").exists(), "make demo first"
    changes = ["prepare.train=8", "prepare.validation=1", f"prepare.test={PROMPTS}", f"eval.max_new_tokens={MOST}"]
    assert main(["prepare", str(DEMO / "config.yaml"), f"run.root={folder}", *changes]) == 0
    shutil.copytree(DEMO / "draft", folder / "tiny" / "draft")
    return folder / "tiny"


@pytest.fixture(scope="session")
def target() -> Target:
    """The target that ships, in the numerics of the engine."""
    return load_target(TargetSettings())


@pytest.fixture(scope="session")
def prompts(run: Path, target: Target) -> list[list[int]]:
    found = [c for c in read_conversations(run / "conversations" / "prompts.jsonl") if c.split == "test"]
    assert len(found) == PROMPTS >= 100
    return [prompt_ids(target.tokenizer, conversation) for conversation in found]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """``start("name", ["--option", "value"])``: a vLLM, which is killed when the module ends."""
    logs, engines = tmp_path_factory.mktemp("logs"), list[Engine]()

    def started(name: str, options: Sequence[str]) -> Engine:
        engines.append(Engine(logs / f"{name}.log", options))
        return engines[-1]

    yield started
    for engine in engines:
        engine.kill()
        print(engine.log())


@pytest.fixture(scope="module")
def serve(start: Start) -> Iterator[Serve]:
    """``serve("name", option=value)``: one in float32 that starts in the background, until it answers."""

    def served(name: str, options: dict[str, Any]) -> LiveEngine:
        command = ["--dtype", "float32", "--max-model-len", "1024"]
        for option, value in options.items():
            command += [f"--{option.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
        return start(name, command).connected()

    starting = ThreadPoolExecutor(AT_ONCE)
    yield lambda name, **options: starting.submit(served, name, options)
    starting.shutdown(wait=False, cancel_futures=True)  # nobody waits for one that is about to be killed
