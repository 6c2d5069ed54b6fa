"""Two processes that hold target and draft together evaluate as one does, write once, and come to the same end."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from eagle3.cli import main
from eagle3.configs import entry
from eagle3.configs.errors import Incomplete, Told, UserError
from eagle3.configs.loader import dump
from eagle3.configs.settings import EvalSettings, RunSettings, Settings, TargetSettings
from eagle3.configs.signals import StopRequest
from eagle3.data.conversations import Conversation
from eagle3.data.files import encode_line
from eagle3.eval import calibration, stage
from eagle3.eval.agreement import led, stopping
from eagle3.eval.stage import evaluate
from eagle3.eval.traces import Trace, read_traces
from eagle3.models.checkpoint import save_draft
from eagle3.models.draft import Eagle3Draft
from eagle3.models.native import memory
from eagle3.models.native.parallel import Group
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig

VOCABULARY, LAYERS, CHAIN, TREE, LIMIT = 264, (0, 1, 2), 4, "tree 40/5/8", 12
TESTS, TEMPERATURES = 2, (0.0, 1.0)
SIZE, GROUPS = 3, TESTS * len(TEMPERATURES)

#: What a launcher starts: the command line, which says as what it ended, and has an accident where it is told to.
RANK = """
import os, signal, sys
from pathlib import Path
from eagle3 import cli
from eagle3.eval import stage

rank, (out, accident, *arguments) = os.environ["RANK"], sys.argv[1:]
left = [3 * 3]  # the warm-up and two groups

def counting(known):
    def decode(*given):
        left[0] -= 1
        if left[0] == 0 and accident == f"signal {rank}":
            os.kill(os.getpid(), signal.SIGTERM)
        if left[0] == 0 and accident == f"bug {rank}":
            raise ZeroDivisionError
        return known(*given)
    return decode

stage.decode = counting(stage.decode)
code = cli.main(arguments)
(Path(out) / f"code-{rank}").write_text(str(code))
sys.exit(code)
"""


class Ended(NamedTuple):
    """How a launch ended: the launcher's code, those of its processes by rank, and what all of them said."""

    code: int
    codes: list[int]
    said: str


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """For a mixture of experts whose vocabulary can be dealt."""
    folder = tmp_path_factory.mktemp("target")
    tiny = json.loads((tiny_folder / "config.json").read_text())
    tiny = {key: value for key, value in tiny.items() if key not in ("layer_types", "no_rope_layers", "moe_layers")}
    torch.manual_seed(0)
    Llama4ForCausalLM(Llama4TextConfig(**tiny | {"vocab_size": VOCABULARY, "num_hidden_layers": 4})).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return Settings(
        run=RunSettings(name="run", seed=5),  # of which chain and tree have tokens accepted
        target=TargetSettings(path=str(folder), layers=LAYERS),
        eval=EvalSettings(chain=CHAIN, beside=(TREE,), temperatures=TEMPERATURES, prompts=TESTS, max_new_tokens=LIMIT),
    )


@pytest.fixture(scope="module")
def shared(settings: Settings) -> Settings:
    """For two processes."""
    return replace(settings, eval=replace(settings.eval, tensor_parallel=2))


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, new_draft: Callable[..., Eagle3Draft]) -> Path:
    """A run with prompts and a draft; not to be written to."""
    folder = tmp_path_factory.mktemp("ready") / "run"
    prompts = [Conversation(f"id {i}", "a", "test", [{"role": "user", "content": f"Say {i}."}]) for i in range(TESTS)]
    (folder / "conversations").mkdir(parents=True)
    (folder / "conversations" / "prompts.jsonl").write_bytes(b"".join(encode_line(one._asdict()) for one in prompts))
    save_draft(new_draft(vocab_size=VOCABULARY, target_layers=LAYERS), folder / "draft", torch.float32)
    return folder


@pytest.fixture
def run_dir(ready: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ready, tmp_path / "run"))


@pytest.fixture(scope="module")
def alone(settings: Settings, ready: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    """What one process answers."""
    folder = Path(shutil.copytree(ready, tmp_path_factory.mktemp("alone") / "run"))
    evaluate(settings, folder)
    found = traces_of(folder)
    assert len(found) == SIZE * GROUPS
    for drafting in (f"chain {CHAIN}", TREE):
        assert any(entry.accepted for trace in found if trace.drafting == drafting for entry in trace.rounds)
    return found


RESUME = "torchrun --nproc-per-node 2 --no-python eagle3 eval"


def traces_of(run_dir: Path) -> list[Trace]:
    """All that does not depend on the clock."""
    return [replace(trace, ttft_s=0.0, total_s=0.0) for trace in read_traces(run_dir / "eval" / "traces.jsonl")]


# --- in two forks of this process


def _evaluate(group: Group, settings: Settings, run_dir: Path, folders: list[Path]) -> str:
    """What this rank was told at its end; rank 1 sees another folder than rank 0."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            if group.rank == 1:
                patch.setattr(stage, "write_atomic", None)
            evaluate(settings, folders[group.rank])
    except UserError as error:
        return str(error)
    except Told as told:
        return f"told {told.exit_code}"
    return "done"


def test_they_answer_as_one_and_the_first_writes(
    shared: Settings, run_dir: Path, alone: list[Trace], tmp_path: Path, together: Callable[..., list[Any]]
) -> None:
    """Of prompts and traces the second has none."""
    other = tmp_path / "other"
    shutil.copytree(run_dir / "draft", other / "draft")
    assert together(_evaluate, shared, run_dir, [run_dir, other]) == ["done", "done"]
    assert traces_of(run_dir) == alone
    assert json.loads((run_dir / "eval" / "eval.json").read_text())["environment"]["processes"] == 2
    assert [path.name for path in other.iterdir()] == ["draft"]
    before = (run_dir / "eval" / "traces.jsonl").read_bytes()
    assert together(_evaluate, shared, run_dir, [run_dir, other]) == ["done", "done"]
    assert (run_dir / "eval" / "traces.jsonl").read_bytes() == before
    evaluate(shared, run_dir)  # what is complete needs no other process


def test_what_the_first_refuses_ends_all(
    shared: Settings, run_dir: Path, tmp_path: Path, together: Callable[..., list[Any]]
) -> None:
    (run_dir / "conversations" / "prompts.jsonl").unlink()
    first, second = together(_evaluate, shared, run_dir, [run_dir, run_dir])
    assert first.startswith("run.name = run: there is no ") and second == "told 2"


def _agree(group: Group) -> dict[str, Any]:
    found: dict[str, Any] = {"led": led(group, lambda: [group.rank])}

    def refuse() -> None:
        raise Incomplete("not all of it")

    with pytest.raises((Incomplete, Told)) as ended:
        led(group, refuse)
    found["refused"] = type(ended.value).__name__, ended.value.exit_code
    stop = StopRequest("")
    found["stopping"] = [stopping(group, stop)]
    stop.requested = group.rank == 1
    found["stopping"].append(stopping(group, stop))
    found["least"] = group.least(7 - group.rank)
    return found


def test_the_first_leads_and_any_can_stop_all(together: Callable[..., list[Any]]) -> None:
    for rank, found in enumerate(together(_agree)):
        assert found["led"] == [0]
        assert found["refused"] == (("Incomplete", "Told")[rank], 3)
        assert found["stopping"] == [False, True]
        assert found["least"] == 6


def test_who_is_alone_leads() -> None:
    assert led(None, lambda: 3) == 3
    stop = StopRequest("")
    assert not stopping(None, stop)
    stop.requested = True
    assert stopping(None, stop)


def _memory(group: Group, settings: Settings, run_dir: Path, free: list[int]) -> str:
    meminfo = run_dir / f"meminfo-{group.rank}"
    meminfo.write_text(f"MemAvailable: {free[group.rank]} kB\n")
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "MEMINFO", meminfo)
        return _evaluate(group, settings, run_dir, [run_dir, run_dir])


def test_memory_is_that_of_the_machine_and_all_are_refused(
    shared: Settings, run_dir: Path, together: Callable[..., list[Any]]
) -> None:
    """The second finds less free, for both on the machine."""
    for said in together(_memory, shared, run_dir, [1 << 30, 80]):
        assert "= " in said and " on each of 2 processes its weights take" in said
        assert "the draft head 0.0 GB, and 0.0 GB of cpu are free; take a device" in said


def _choose(group: Group, settings: Settings, run_dir: Path) -> tuple[bool, list[str]]:
    """Whether this rank took part in measuring, and what it then decoded with; each would choose another chain."""
    measured, sides = list[bool](), list[str]()
    known, answer = calibration.calibrate, stage._answer

    def calibrate(*given: Any) -> Any:
        measured.append(known(*given)["measured"])
        chosen = [{"temperature": t, "chain": group.rank + 1} for t in settings.eval.temperatures]
        return {"schema": 1, "measured": True, "prompts": 1, "tokens": LIMIT, "temperatures": chosen}

    def noted(plan: Any, bench: Any, *given: Any) -> None:
        sides.extend(bench.sides[0.0])
        answer(plan, bench, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "calibrate", calibrate)
        patch.setattr(stage, "_answer", noted)
        if group.rank == 1:
            patch.setattr(stage, "write_atomic", None)
        evaluate(settings, run_dir)
    return all(measured) and len(measured) == 1, sides


def test_the_first_chooses_the_chain_for_all(
    shared: Settings, run_dir: Path, together: Callable[..., list[Any]]
) -> None:
    path = run_dir / "conversations" / "prompts.jsonl"
    prompt = Conversation("held out", "a", "validation", [{"role": "user", "content": "Say it."}])
    path.write_bytes(path.read_bytes() + encode_line(prompt._asdict()))
    chosen = replace(shared, eval=replace(shared.eval, chain="auto", beside=()))
    assert together(_choose, chosen, run_dir) == [(True, ["chain 1", "chain 5"])] * 2
    found = json.loads((run_dir / "eval" / "calibration.json").read_text())
    assert {entry["chain"] for entry in found["temperatures"]} == {1}
    assert {trace.drafting for trace in traces_of(run_dir)} == {None, "chain 1", "chain 5"}


# --- what is refused before


def test_a_number_of_processes_that_was_not_started(
    settings: Settings, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_dir.parent / "recipe.yaml"
    path.write_text(dump(settings))
    asked = ["eval", str(path), f"run.root={run_dir.parent}", "eval.tensor_parallel=2"]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert said == (
        "error: eval.tensor_parallel = 2: there are 1 processes; start 2, as with torchrun --nproc-per-node 2, or set it"
        " to 1\n"
    )
    assert main([*asked, "eval.engine=transformers", "eval.beside=[]"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "error: eval.tensor_parallel = 2: transformers (eval.engine) holds the target in one process; set "
        "eval.engine=native, or 1\n"
    )
    monkeypatch.setenv("RANK", "1")  # the first says it
    assert main([*asked, "eval.engine=transformers", "eval.beside=[]"]) == 2
    assert capsys.readouterr().err == ""


def test_the_first_alone_writes_the_recipe(settings: Settings, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(settings, run=replace(settings.run, root=str(run_dir.parent)))
    monkeypatch.setenv("RANK", "1")
    with entry.opened(settings) as folder:
        assert folder == run_dir and not (folder / "config.yaml").exists()
    monkeypatch.setenv("RANK", "0")
    with entry.opened(settings) as folder:
        assert (folder / "config.yaml").exists()


# --- under a real launcher


@pytest.fixture
def launch(settings: Settings, run_dir: Path) -> Iterator[Callable[..., Ended]]:
    """``launch("signal 1", ...)`` evaluates the run in two processes, of which one has that accident."""
    script, recipe = run_dir.parent / "rank.py", run_dir.parent / "recipe.yaml"
    script.write_text(RANK)
    recipe.write_text(dump(settings))
    started: list[subprocess.Popen[str]] = []

    def run(accident: str, *overrides: str) -> Ended:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port", str(port)]
        given = [str(script), str(run_dir.parent), accident, "eval", str(recipe), f"run.root={run_dir.parent}"]
        process = subprocess.Popen(
            [*torchrun, *given, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        said, _ = process.communicate(timeout=120)
        codes = [int(path.read_text()) for path in sorted(run_dir.parent.glob("code-*"))]
        for path in run_dir.parent.glob("code-*"):
            path.unlink()
        return Ended(process.returncode, codes, said)

    yield run
    for process in started:
        process.kill()


@pytest.mark.slow
def test_a_signal_to_one_ends_both_and_they_go_on(
    launch: Callable[..., Ended], run_dir: Path, alone: list[Trace]
) -> None:
    ended = launch("signal 1", "eval.tensor_parallel=2")
    assert ended.codes == [75, 75], ended.said
    assert ended.said.count(f"interrupted: 2 of {GROUPS} prompts are answered; resume with: {RESUME} ") == 1
    assert traces_of(run_dir) == alone[: 2 * SIZE] and not (run_dir / "eval" / "eval.json").exists()
    ended = launch("none", "eval.tensor_parallel=2")
    assert (ended.code, ended.codes) == (0, [0, 0]), ended.said
    assert traces_of(run_dir) == alone
    assert len(re.findall(r"^eval +done in ", ended.said, re.MULTILINE)) == ended.said.count("report.html") == 1


@pytest.mark.slow
def test_what_is_refused_is_said_once(launch: Callable[..., Ended], run_dir: Path) -> None:
    ended = launch("none")
    assert ended.codes == [2, 2], ended.said
    assert re.findall("^error: .*", ended.said, re.MULTILINE) == [
        "error: eval.tensor_parallel = 1: there are 2 processes; start 1, as with torchrun --nproc-per-node 1, or set it "
        "to 2"
    ]
    assert not (run_dir / "eval").exists()


@pytest.mark.slow
def test_a_bug_in_one_leaves_nobody_waiting(launch: Callable[..., Ended], run_dir: Path, alone: list[Trace]) -> None:
    ended = launch("bug 0", "eval.tensor_parallel=2")
    assert ended.code != 0 and "ZeroDivisionError" in ended.said
    assert traces_of(run_dir) == alone[:SIZE]
