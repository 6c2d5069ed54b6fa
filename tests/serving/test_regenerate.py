"""A real vLLM answers as the target does in process: the same greedy ids, whole and exact."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from eagle3.cli import main
from eagle3.data.answers import Answer, read_answers

pytestmark = pytest.mark.serving

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-serving" / "bin" / "python"
CHANGES = ["prepare.train=8", "prepare.validation=4", "prepare.test=4", "regenerate.max_new_tokens=64"]
START_S = 240


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM with the target that ships."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT / "models" / "embedded"),
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--gpu-memory-utilization", "0.4",
        "--dtype", "float32", "--max-model-len", "1024",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("logs") / "vllm.log"
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while not _listening(port):
            if time.monotonic() > deadline or server.poll() is not None:
                pytest.fail(f"vLLM did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # it holds nothing that must be saved
        server.wait()


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers(folder: Path, *changes: str) -> dict[str, Answer]:
    """What the stages write with these changes of the demo's recipe."""
    for stage in ("prepare", "regenerate"):
        assert main([stage, "tiny", f"run.root={folder}", *CHANGES, *changes]) == 0
    return {answer.id: answer for answer in read_answers(folder / "tiny" / "conversations" / "answers.jsonl")}


def test_vllm_answers_as_the_target_in_process(url: str, tmp_path: Path) -> None:
    greedy = "regenerate.temperatures=0.0"
    here = answers(tmp_path / "here", greedy)
    there = answers(tmp_path / "there", greedy, f"regenerate.endpoints={url}/v1", "regenerate.concurrency=8")
    assert len(here) == 16
    assert there == here
    assert {answer.finish for answer in there.values()} == {"stop", "length"}


def test_what_vllm_samples_depends_on_the_seed_alone(url: str, tmp_path: Path) -> None:
    warm = ["regenerate.temperatures=1.0", f"regenerate.endpoints={url}", "regenerate.max_new_tokens=16"]
    first, other = (answers(tmp_path / name, *warm, "run.seed=1") for name in ("first", "other"))
    assert first == other
    train = [name for name, answer in first.items() if answer.split == "train"]
    changed = answers(tmp_path / "changed", *warm, "run.seed=2")
    assert all(first[name] != changed[name] for name in train)
