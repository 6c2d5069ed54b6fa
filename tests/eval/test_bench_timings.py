"""The timings of decoding are of what they say: the parts of a round, by thread count and beside cores that are busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eagle3.configs.entry import finish
from eagle3.configs.errors import UserError
from eagle3.data.bench import sides
from eagle3.eval.bench import comparison, decoding, machine, timings
from eagle3.eval.bench.machine import RESTRICTIONS, SPIN, Watch, commit, hardware, restrict, spinning
from eagle3.eval.bench.parts import EXTENDED, GREEDY, SAMPLED, TOKEN, VERIFIED, Operation, Round, load_operations
from eagle3.eval.bench.timings import Condition, Times, lines_of, table, thread_counts
from eagle3.eval.bench.workload import Workload, load_checked, read_workload
from eagle3.eval.drafters import ChainDrafter
from eagle3.eval.speculate import Limits, NativeVerifier, Sampling, decode
from eagle3.models.native.draft import NativeDraft

CONTEXT, CHAIN = 40, 3
ASKED: Any = SimpleNamespace(hardware="two cores", commit="0123abc")


@pytest.fixture(scope="module")
def workload(trained: Path) -> Workload:
    return read_workload(trained, None, 2)


@pytest.fixture(scope="module")
def operations(workload: Workload) -> dict[str, Operation]:
    return load_operations(workload, CONTEXT, CHAIN)


def ended(process: int) -> bool:
    """Whether it has, within some seconds; one that nobody has asked about yet may be left as a zombie."""
    for _ in range(200):
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_timings_are_measured_by_threads_and_beside_busy_cores(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sides, "LEAST", 1)
    monkeypatch.setattr(timings, "BUDGET_S", 0.0)
    monkeypatch.setattr(timings, "cores", lambda: 2)
    out = tmp_path / "found.json"
    options = ["--only", "timings", "--rounds", "1", "--prompts", "2", "--hardware", "two cores", "--out", str(out)]
    options += ["--threads", "1"]
    decoding.main([*options, "--run", str(trained), "--commit", "0123abc"])
    results = json.loads(out.read_bytes())
    names = [TOKEN, *(f"verify of {count}" for count in VERIFIED[1:]), f"draft extension by {EXTENDED}", "draft step"]
    names += [GREEDY, SAMPLED, SAMPLED]  # the last of them twice: in tokens, and in rounds at T=0
    conditions = [f"1 thread, {beside}" for beside in ("idle", "1 busy core", "2 busy cores")]
    labels = [line["notes"].partition(";")[0] for line in results]
    assert labels == [f"{name}, {condition}" for condition in conditions for name in names]
    tokens = {line["notes"].partition(";")[0]: line["value"] for line in results}
    for line, label in zip(results, labels, strict=True):
        assert (line["benchmark"], line["unit"], line["hardware"]) == ("timing", "ms", "two cores")
        assert line["commit"] == "0123abc" and line["value"] > 0
        condition = label.partition(", ")[2]
        if line["reference"]["name"] == "a token":
            assert line["reference"]["value"] == tokens[f"{TOKEN}, {condition}"]
            assert line["ratio"] == pytest.approx(line["value"] / line["reference"]["value"], rel=0.05, abs=1e-3)
    assert [line["limit"] for line in results if line["limit"]] == [1.6, 1.05]  # of an idle machine alone
    said = capsys.readouterr()
    assert "timings: 1 thread, 2 busy cores, round 1 of 1" in said.err
    assert said.out.count("verify of 61") == 1 and "verify of 6 takes" in said.out


def test_a_context_is_what_every_call_starts_from(operations: dict[str, Operation], workload: Workload) -> None:
    target = load_checked(workload, 200)
    cache = target.new_cache(200)
    text = (workload.prompts[0] + workload.prompts[1]) * 9
    target.forward(torch.tensor(text[:CONTEXT]), cache)
    expected = target.forward(torch.tensor(text[CONTEXT : CONTEXT + 6]), cache).last_hidden
    verify: Any = operations["verify of 6"]
    for _ in range(2):
        operations[TOKEN].prepare()
        operations[TOKEN].run()
        operations["verify of 6"].prepare()
        found = verify._target.forward(verify._ids, verify._cache).last_hidden
        assert torch.equal(found, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rounds_are_those_of_decoding(workload: Workload, temperature: float) -> None:
    target = load_checked(workload, 4 * (workload.longest + 1 + CHAIN))

    def both() -> tuple[NativeVerifier, ChainDrafter]:
        capacity = workload.longest + 1 + CHAIN
        head = NativeDraft(workload.draft, target.head.embedding, capacity, CHAIN)
        return NativeVerifier(target, capacity), ChainDrafter(head, CHAIN)

    operation = Round(*both(), workload.prompts, workload.limits, Sampling(temperature))
    rounds = []
    verifier, drafter = both()
    for number, prompt in enumerate(workload.prompts):
        sampling = Sampling(temperature, seed=number)
        rounds.append(len(decode(prompt, verifier, drafter, workload.limits, sampling).rounds))
    with torch.inference_mode():
        started = list[int]()
        for _ in range(sum(rounds)):
            operation.prepare()
            started.append(operation.answers)
            operation.run()
    assert [started.count(answer) for answer in (1, 2)] == rounds and all(rounds)
    assert operation.finished


def test_each_condition_has_its_threads_and_busy_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, beside = list[tuple[int, int]](), [0]

    @contextmanager
    def spinning_less(count: int) -> Iterator[None]:
        beside[0] = count
        yield
        beside[0] = 0

    class Seen:
        def prepare(self) -> None: ...

        def run(self) -> None:
            seen.append((torch.get_num_threads(), beside[0]))

    monkeypatch.setattr(timings, "spinning", spinning_less)
    monkeypatch.setattr(timings, "cores", lambda: 4)
    monkeypatch.setattr(timings, "BUDGET_S", 0.0)
    monkeypatch.setattr(timings, "load_operations", lambda *_: {each: Seen() for each in (TOKEN, "verify of 6")})
    monkeypatch.setattr(timings, "table", lambda *_: [])
    monkeypatch.setattr(timings, "lines_of", lambda measured, *_: list(measured))
    workload: Any = SimpleNamespace(
        prompts=[[1]], limits=Limits(4, ()), target=SimpleNamespace(path="tiny", dtype="float32"), run="tiny"
    )
    asked: Any = SimpleNamespace(threads=[1, 3], rounds=2, chain=5)
    found = timings.timings(workload, asked)
    assert found == [Condition(threads, busy) for threads in (1, 3) for busy in (0, 1, 4)]
    every = [(threads, busy) for threads in (1, 3) for busy in (0, 0, 1, 1, 4, 4) * 2]
    assert [each for each in seen if each[1]] == [each for each in every if each[1]]
    assert set(seen) == set(every)
    assert torch.get_num_threads() == 1  # as before


def test_what_prepares_a_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    class Slow:
        prepared = 0

        def prepare(self) -> None:
            self.prepared += 1
            clock[0] += 7.0

        def run(self) -> None:
            clock[0] += 0.02

    monkeypatch.setattr(timings, "now", lambda: clock[0])
    monkeypatch.setattr(timings.time, "process_time", lambda: 1.5 * clock[0])
    slow = Slow()
    assert timings.milliseconds(slow, 0.05) == pytest.approx((20.0, 30.0))
    assert slow.prepared == 3
    assert timings.milliseconds(slow, 0.0) == pytest.approx((20.0, 30.0))
    assert slow.prepared == 4


def test_figures_are_medians_of_rounds_beside_a_token_of_the_same_condition() -> None:
    idle, busy = Condition(1, 0), Condition(1, 1)
    walls = {
        idle: {
            TOKEN: [1.0, 2.0, 4.0],
            "verify of 6": [2.0, 5.0, 6.0],
            GREEDY: [3.0, 3.0, 3.0],
            SAMPLED: [3.0, 4.0, 6.0],
        },
        busy: {
            TOKEN: [4.0, 4.0, 4.0],
            "verify of 6": [8.0, 9.0, 4.0],
            GREEDY: [5.0, 5.0, 5.0],
            SAMPLED: [5.0, 5.0, 5.0],
        },
    }
    measured = {
        condition: {name: Times(wall, [1.0 if name == TOKEN else 1.5] * 3) for name, wall in times.items()}
        for condition, times in walls.items()
    }
    found: list[Any] = lines_of(measured, 0.25, ASKED, "tiny")
    lines = {(line["notes"].partition(";")[0], line["reference"]["name"]): line for line in found}
    verify = lines["verify of 6, 1 thread, idle", "a token"]
    assert (verify["value"], verify["reference"], verify["ratio"]) == (5.0, {"name": "a token", "value": 2.0}, 2.0)
    assert verify["limit"] == 1.6
    assert verify["notes"] == (
        "verify of 6, 1 thread, idle; rounds: [2.0, 5.0, 6.0]; processor: 1.500 ms, 1.50 of a token; "
        "other processes kept 0.25 cores busy"
    )
    assert lines["verify of 6, 1 thread, 1 busy core", "a token"]["ratio"] == 2.0
    assert lines[f"{TOKEN}, 1 thread, 1 busy core", "a token on an idle machine"]["ratio"] == 2.0
    assert lines[f"{SAMPLED}, 1 thread, idle", f"a {GREEDY}"]["ratio"] == pytest.approx(4 / 3, abs=1e-4)
    shown = "\n".join(table(measured, 0.25))
    assert "verify of 6 takes 2.00 tokens [at most 1.6]" in shown
    assert "warning: the machine was not idle; other processes kept 0.2 cores busy" in shown
    assert "warning" not in "\n".join(table(measured, 0.01))


@pytest.mark.parametrize(("count", "found"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_thread_counts_double_up_to_the_cores(count: int, found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "cores", lambda: count)
    assert thread_counts(None) == found
    assert thread_counts([1, 1]) == [1]
    with pytest.raises(UserError, match=rf"--threads = {count + 1}: this process may use"):
        thread_counts([count + 1])


def test_busy_processes_end_with_their_block() -> None:
    with spinning(2) as processes:
        assert len(set(processes)) == 2
        for process in processes:
            os.kill(process, 0)  # it is there
    assert all(map(ended, processes))
    with pytest.raises(RuntimeError, match="here"), spinning(1) as processes:
        raise RuntimeError("here")
    assert all(map(ended, processes))


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_a_busy_process_computes_and_ends_once_its_parent_was_killed() -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, SPIN], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    process = int(parent.stdout.readline())

    def ticks() -> int:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11])

    before = ticks()
    for _ in range(200):
        if ticks() > before + 2:
            break
        time.sleep(0.05)
    assert ticks() > before + 2
    parent.kill()
    parent.communicate()
    assert ended(process)


def test_what_others_compute_is_told_from_what_this_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(process_time=iter((1.0, 2.0)).__next__, perf_counter=iter((0.0, 4.0)).__next__)
    monkeypatch.setattr(machine, "time", clock)
    monkeypatch.setattr(machine, "busy_seconds", iter((10.0, 13.0)).__next__)
    assert Watch().others() == 0.5


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``capability("AVX512")`` is a processor that has it, with nothing restricted."""
    for name in RESTRICTIONS["avx2"]:
        monkeypatch.delenv(name, raising=False)
    return lambda name: monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)


def test_a_restriction_starts_the_command_anew_and_once(
    capability: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[tuple[list[str], dict[str, str]]]()
    monkeypatch.setattr(os, "execve", lambda _, command, environment: started.append((command, dict(environment))))
    capability("AVX512")
    restrict(None, "some.module", ["--isa", "avx2"])
    assert not started
    restrict("avx2", "some.module", ["--isa", "avx2"])
    ((command, environment),) = started
    assert command == [sys.executable, "-m", "some.module", "--isa", "avx2"]
    assert environment.items() >= RESTRICTIONS["avx2"].items()
    for name in RESTRICTIONS["avx2"]:
        monkeypatch.setenv(name, environment[name])
    restrict("avx2", "some.module", ["--isa", "avx2"])
    assert len(started) == 1


def test_a_restriction_to_what_the_processor_does_not_have_is_refused(capability: Callable[[str], None]) -> None:
    capability("DEFAULT")
    with pytest.raises(UserError, match="--isa = avx2: .* has no such instructions"):
        restrict("avx2", "some.module", [])


def test_results_say_what_was_restricted(capability: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    capability("AVX512")
    assert hardware("two cores") == "two cores"
    assert hardware("").endswith("AVX-512")
    capability("AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert hardware("").count("AVX2") == 1
    assert hardware("two cores") == "two cores, restricted to AVX2 (ATEN_CPU_CAPABILITY=avx2)"


def test_torch_is_restricted_by_the_variables() -> None:
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = os.environ | RESTRICTIONS["avx2"]
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() != "AVX512"


def test_the_commit_is_the_repositorys_unless_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert commit("0123abc") == "0123abc"
    monkeypatch.setattr(machine, "ROOT", tmp_path)  # as installed from a wheel
    assert commit("") == ""


def line(what: str, unit: str, value: float, **changes: object) -> dict[str, object]:
    fields: dict[str, object] = {"benchmark": "timing", "hardware": "two cores", "commit": "a", "shape": "tiny"}
    fields |= {"unit": unit, "value": value, "reference": {"name": "a token", "value": 1.0}, "ratio": value}
    return fields | {"notes": f"{what}; rounds: [1]"} | changes


def test_results_are_compared_figure_by_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(
        json.dumps([line("verify of 6", "ms", 3.0), line("native", "TPS/user", 100.0), line("x", "ms", 1)])
    )
    after.write_text(
        json.dumps([line("verify of 6", "ms", 1.5, commit="b"), line("native", "TPS/user", 150.0, commit="b")])
    )
    comparison.main([str(before), str(after)])
    first, header, verify, native, alone = capsys.readouterr().out.splitlines()
    assert first == "commit: a before, b after" and header.split()[:2] == ["before", "after"]
    assert verify.split()[:9] == ["verify", "of", "6,", "ms", "3.00", "1.50", "3.00", "1.50", "2.00"]
    assert native.split()[:7] == ["native,", "TPS/user", "100.00", "150.00", "100.00", "150.00", "1.50"]
    assert alone.strip() == "1 figure is in one of the two alone"


@pytest.mark.parametrize(
    ("content", "problem"), [("{", "it is no JSON"), ('[{"value": 1}]', "it holds no results of a benchmark")]
)
def test_what_holds_no_results_is_refused(
    content: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "before.json"
    path.write_text(content)
    assert finish(lambda: comparison.main([str(path), str(path)])) == 2
    assert capsys.readouterr().err == f"error: before = {path}: {problem}; give a file that --out wrote\n"
