"""What we train is what vLLM serves: the same tokens, and the same drafted ones accepted, position by position.

A real vLLM on the CPU, in an environment of its own, with the demo's head; `make test-serving` makes both.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eagle3.cli import main
from eagle3.configs.settings import TargetSettings
from eagle3.data.chat import prompt_ids
from eagle3.data.conversations import read_conversations
from eagle3.eval.serving import LiveEngine, Served, ask, decode_all, differences
from eagle3.models.checkpoint import load_draft, save_draft
from eagle3.models.draft import Eagle3Draft
from eagle3.models.rollout import RolloutBatch, rollout
from eagle3.models.start import feature_scale
from eagle3.models.target import Target, load_target
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.serving

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-serving" / "bin" / "python"
CHAIN = 5
PROMPTS = 104
MOST = 32  # tokens of an answer
START_S = 240

Serve = Callable[[Path], AbstractContextManager[LiveEngine]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the demo's head, and more held-out prompts than the demo has."""
    demo, folder = ROOT / "runs" / "tiny", tmp_path_factory.mktemp("runs")
    assert (demo / "draft" / "model.safetensors").exists(), "make demo first"
    changes = ["prepare.train=8", "prepare.validation=1", f"prepare.test={PROMPTS}", f"eval.max_new_tokens={MOST}"]
    assert main(["prepare", str(demo / "config.yaml"), f"run.root={folder}", *changes]) == 0
    shutil.copytree(demo / "draft", folder / "tiny" / "draft")
    return folder / "tiny"


@pytest.fixture(scope="module")
def target() -> Target:
    """The target that ships, in the numerics of the engine."""
    return load_target(TargetSettings())


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """``with serve(head) as engine``: vLLM with the head in that folder."""
    logs = tmp_path_factory.mktemp("logs")

    @contextmanager
    def started(head: Path) -> Iterator[LiveEngine]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        chosen = {"method": "eagle3", "model": str(head), "num_speculative_tokens": CHAIN}
        command = [
            str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT / "models" / "embedded"),
            "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--gpu-memory-utilization", "0.4",
            "--dtype", "float32", "--max-model-len", "1024", "--speculative-config", json.dumps(chosen),
        ]  # fmt: skip
        log = logs / f"{head.parent.name}.{head.name}.log"
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("wb") as file:
            server = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        try:
            yield _ready(LiveEngine(f"http://127.0.0.1:{port}"), server, log)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # it holds nothing that must be saved
            server.wait()

    return started


def _ready(engine: LiveEngine, server: subprocess.Popen[bytes], log: Path) -> LiveEngine:
    address = engine.url.removeprefix("http://").split(":")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((address[0], int(address[1]))) == 0:
                return engine
        time.sleep(0.5)
    pytest.fail(f"vLLM did not start:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(scope="module")
def prompts(run: Path, target: Target) -> list[list[int]]:
    found = [c for c in read_conversations(run / "conversations" / "prompts.jsonl") if c.split == "test"]
    assert len(found) == PROMPTS >= 100
    return [prompt_ids(target.tokenizer, conversation) for conversation in found]


@pytest.fixture(scope="module")
def plain(target: Target, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy decoding of the target alone."""
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    answers = target.generate([prompts[at] for at in order], [0.0] * len(prompts), MOST)
    found = dict(zip(order, (answer.ids for answer in answers), strict=True))
    return [found[at] for at in range(len(prompts))]


@pytest.fixture(scope="module")
def ours(run: Path, target: Target, prompts: list[list[int]]) -> Served:
    return decode_all(target, load_draft(run / "draft").eval(), prompts, CHAIN, MOST)


def variant(run: Path, draft: Eagle3Draft) -> Path:
    """A run like ``run`` with another head."""
    folder = run.parent / f"fc_norm-{draft.config.fc_norm}-D{draft.config.draft_vocab_size}"
    shutil.copytree(run, folder)
    noted = json.loads((run / "draft" / "config.json").read_text())
    kept = {key: noted[key] for key in ("eagle3_target", "eagle3_training")}
    save_draft(draft, folder / "draft", torch.float32, kept)
    return folder


def whole_vocabulary(draft: Eagle3Draft, target: Target, prompts: list[list[int]]) -> Eagle3Draft:
    """``draft``, with the target's rows for the tokens that it could not propose."""
    whole = Eagle3Draft(replace(draft.config, draft_vocab_size=draft.config.vocab_size))
    weights = {name: tensor for name, tensor in draft.state_dict().items() if name not in ("d2t", "t2d")}
    rows = target.head.lm_head.float().clone()
    rows[draft.draft_ids] = draft.lm_head.weight.detach()
    whole.load_state_dict(weights | {"lm_head.weight": rows})
    return whole.eval()


def of_eagle_3_1(draft: Eagle3Draft, target: Target, prompts: list[list[int]]) -> Eagle3Draft:
    """``draft`` with both flags, and norms that leave its first step about as it was."""
    flagged = Eagle3Draft(replace(draft.config, fc_norm=True, norm_output=True), draft.draft_ids)
    features = target.forward(torch.tensor(prompts[0])[None]).features[0]
    norms = {
        f"fc_norm.{at}.weight": torch.full((draft.config.hidden_size,), float(scale))
        for at, scale in enumerate(feature_scale(draft, features))
    }
    flagged.load_state_dict(draft.state_dict() | norms)
    return flagged.eval()


def agrees(engine: LiveEngine, target: Target, prompts: list[list[int]], plain: list[list[int]], ours: Served) -> None:
    theirs = ask(engine, prompts, MOST)
    print(f"ours {ours.counters}\nvLLM {theirs.counters}")
    assert differences(target, prompts, ours, theirs) == []
    assert differences(target, prompts, ours._replace(answers=plain), theirs) == []
    assert ours.counters.acceptance_length > 1.2  # else nothing was compared


@pytest.mark.parametrize("form", ["hf", "speculators"])
def test_the_demos_head_is_served_as_we_decode(
    form: str, run: Path, target: Target, prompts: list[list[int]], plain: list[list[int]], ours: Served, serve: Serve
) -> None:
    head = run.parent / form
    assert main(["export", str(run), "--format", form, "--out", str(head)]) == 0
    with serve(head) as engine:
        agrees(engine, target, prompts, plain, ours)


@pytest.mark.parametrize("make", [whole_vocabulary, of_eagle_3_1])
def test_other_kinds_of_head_are_too(
    make: Callable[[Eagle3Draft, Target, list[list[int]]], Eagle3Draft],
    run: Path,
    target: Target,
    prompts: list[list[int]],
    plain: list[list[int]],
    serve: Serve,
) -> None:
    draft = make(load_draft(run / "draft"), target, prompts)
    folder = variant(run, draft)
    assert main(["export", str(folder), "--format", "hf", "--out", str(folder / "hf")]) == 0
    with serve(folder / "hf") as engine:
        agrees(engine, target, prompts, plain, decode_all(target, draft, prompts, CHAIN, MOST))


def test_layers_shifted_by_one_are_told_by_the_files_and_by_the_engine(
    run: Path, serve: Serve, target: Target, prompts: list[list[int]], ours: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    head = run.parent / "shifted"
    assert main(["export", str(run), "--format", "vllm", "--out", str(head)]) == 0
    config = json.loads((head / "config.json").read_text())
    config["eagle_aux_hidden_state_layer_ids"] = [layer - 1 for layer in config["eagle_aux_hidden_state_layer_ids"]]
    (head / "config.json").write_text(json.dumps(config))
    with serve(head) as engine:
        command = ["export", str(run), "--format", "vllm", "--out", str(head), "--check", "--against", engine.url]
        assert main(command) == 3
        theirs = ask(engine, prompts, MOST)
    assert "it will capture the outputs of layers [0, 6, 11], and the head was trained on [1, 7, 12] (numbered by" in (
        capsys.readouterr().err
    )
    found = differences(target, prompts, ours, theirs)
    assert found
    assert all(line.startswith(("position", "it took")) for line in found)  # what it says is still the target's


def rope_of_the_default(draft: Eagle3Draft) -> Eagle3Draft:
    return reshaped(draft, rope_theta=10_000.0)


def norm_fed_back(draft: Eagle3Draft) -> Eagle3Draft:
    return reshaped(draft, norm_output=True)


def features_descending(draft: Eagle3Draft) -> Eagle3Draft:
    wrong = reshaped(draft)
    with torch.no_grad():
        wrong.fc.weight.copy_(draft.fc.weight.unflatten(1, (3, -1)).flip(1).flatten(1))
    return wrong


def reshaped(draft: Eagle3Draft, **changes: float | bool) -> Eagle3Draft:
    other = Eagle3Draft(replace(draft.config, **changes), draft.draft_ids)
    other.load_state_dict(draft.state_dict())
    return other.eval()


@pytest.mark.parametrize("mistake", [rope_of_the_default, norm_fed_back, features_descending])
def test_what_files_cannot_tell_shows_in_the_acceptance(
    mistake: Callable[[Eagle3Draft], Eagle3Draft], run: Path, target: Target, prompts: list[list[int]]
) -> None:
    """An engine that computes something else, for which our decoder stands in with a head that is wrong in that way."""
    some, draft = prompts[:12], load_draft(run / "draft").eval()
    ours, theirs = (decode_all(target, head, some, CHAIN, MOST) for head in (draft, mistake(draft)))
    found = differences(target, some, ours, theirs)
    assert found
    assert all(line.startswith(("position", "it took")) for line in found)


def test_the_speculators_package_computes_our_logits(run: Path, target: Target, tmp_path: Path) -> None:
    """A reader that we did not write, over a rollout of three steps."""
    head, draft = tmp_path / "head", load_draft(run / "draft").eval()
    assert main(["export", str(run), "--format", "speculators", "--out", str(head)]) == 0
    ids = torch.randint(10, 2000, (1, 40), generator=torch.Generator().manual_seed(0))
    seen, embedding = target.forward(ids), target.head.embedding.float().contiguous()
    given = {
        "features": seen.features[0, :-1].flatten(1).clone(),
        "next_ids": ids[0, 1:].clone(),
        "embedding": embedding,
    }
    save_file(given, tmp_path / "given")
    script = Path(__file__).with_name("read_speculators.py")
    command = [str(PYTHON), str(script), str(head), str(ROOT / "models" / "embedded"), "given", "out"]
    subprocess.run(command, check=True, cwd=tmp_path)
    theirs = load_file(tmp_path / "out")
    assert torch.equal(theirs["d2t"], draft.d2t)
    batch = RolloutBatch(
        ids, torch.ones_like(ids, dtype=torch.bool), seen.features, seen.last_hidden, torch.tensor([40])
    )
    with torch.no_grad():
        for step, output in enumerate(rollout(draft, embedding, batch, 3)):
            logits = theirs[str(step)][output.rows[:, 1]]
            torch.testing.assert_close(logits, draft.logits(output.y), rtol=1e-5, atol=1e-4)
