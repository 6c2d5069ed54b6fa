"""A real vLLM on the CPU, in an environment of its own, and a run with the demo's head; `make test-serving` makes both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """``serve("name", option=value)``: a vLLM that starts in the background; all are stopped when the module ends."""
    logs, servers = tmp_path_factory.mktemp("logs"), list[subprocess.Popen[bytes]]()

    def start(name: str, options: dict[str, Any]) -> LiveEngine:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(TARGET), "--host", "127.0.0.1",
            "--port", str(port), "--enforce-eager", "--gpu-memory-utilization", "0.4", "--dtype", "float32",
            "--max-model-len", "1024",
        ]  # fmt: skip
        for option, value in options.items():
            command += [f"--{option.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
        log = logs / f"{name}.log"
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("wb") as file:
            server = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        servers.append(server)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return connect(f"http://127.0.0.1:{port}")
            time.sleep(0.5)
        raise RuntimeError(f"vLLM did not start:\n{log.read_text(errors='replace')[-4000:]}")

    with ThreadPoolExecutor(AT_ONCE) as starting:
        try:
            yield lambda name, **options: starting.submit(start, name, options)
        finally:
            starting.shutdown(wait=False, cancel_futures=True)
            for server in servers:
                os.killpg(server.pid, signal.SIGKILL)  # it holds nothing that must be saved
                server.wait()
