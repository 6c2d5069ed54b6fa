"""Threads are chosen by arithmetic, by measurement, or by the user, and those of before come back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from eagle3.configs import entry
from eagle3.configs.loader import load
from eagle3.configs.settings import Settings
from eagle3.data import record as recording_stage
from eagle3.data import regenerate as answering
from eagle3.data import threads
from eagle3.data.threads import FEWEST_ROWS, LONGEST_UNIT, SMALL_MATRIX, SMALL_PRODUCT, Work, best, calibrate
from eagle3.models import costs
from eagle3.models.native.loading import load_native
from eagle3.models.shapes import draft_config
from eagle3.models.target import Target, load_target

CPU = torch.device("cpu")
SMALL = Work.of([(128, 128)] * 73, 6)
MEDIUM = Work.of([(4096, 1024)] * 8, 6)
LARGE = Work.of([(16_384, 16_384)] * 80, 6)


class Machine:
    """Its clock runs for as long as a unit of work takes with the threads that torch has, and notes who did one."""

    def __init__(self, seconds: Callable[[int, int], float]) -> None:
        self.seconds, self.now, self.units = seconds, 0.0, list[int]()

    def clock(self) -> float:
        return self.now

    def unit(self, rows: int = 1) -> None:
        self.units.append(torch.get_num_threads())
        self.now += self.seconds(self.units[-1], len(self.units))


@pytest.fixture(autouse=True)
def machine_of_8_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody has chosen, and 8 cores are there for the one process."""
    monkeypatch.setattr(entry, "REQUESTED_THREADS", None)
    monkeypatch.setattr(entry, "own_cores", lambda: 8)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def found(seconds: Callable[[int, int], float], most: int = 8) -> int:
    machine = Machine(seconds)
    return best(calibrate(machine.unit, most, machine.clock))


@pytest.mark.parametrize(
    ("seconds", "threads_chosen"),
    [
        (lambda count, _: 0.1 / count, 8),
        (lambda count, _: 0.1, 1),
        (lambda count, _: 0.1 * count, 1),
        (lambda count, _: 0.1 / min(count, 4), 4),  # half of the cores are hyperthreads
        (lambda count, _: 0.1 / count**0.25, 1),  # 1.19 times as fast for each doubling
        (lambda count, _: 0.1 / count**0.35, 8),  # 1.27 times
        (lambda count, _: 0.01 if count == 8 else 0.1, 1),  # a doubling without gain ends it
    ],
)
def test_twice_the_threads_have_to_be_worth_it(seconds: Callable[[int, int], float], threads_chosen: int) -> None:
    assert found(seconds) == threads_chosen


@pytest.mark.parametrize("most", [1, 2, 3, 6, 8])
def test_there_are_no_more_threads_than_cores(most: int) -> None:
    machine = Machine(lambda count, _: 0.01 / count)
    assert best(calibrate(machine.unit, most, machine.clock)) == most
    assert max(machine.units, default=1) == most


def test_the_last_step_need_not_be_a_doubling() -> None:
    assert found(lambda count, _: 0.1 / count, most=6) == 6
    assert found(lambda count, _: 0.1 / (count if count < 6 else 4.4), most=6) == 4  # 1.1 times; 1.14 are wanted


def test_noise_does_not_hide_a_gain_nor_make_one() -> None:
    def disturbed(count: int, unit: int) -> float:
        return 0.01 / min(count, 2) * (8 if unit % 3 else 1)

    assert found(disturbed) == 2
    assert found(lambda count, unit: 0.01 * (8 if unit % 3 else 1)) == 1


def test_a_calibration_is_short() -> None:
    machine = Machine(lambda count, _: 0.9)
    assert best(calibrate(machine.unit, 8, machine.clock)) == 1
    assert machine.now == pytest.approx(2 * 0.9)  # once each
    machine = Machine(lambda count, _: 1e-3 / count)
    calibrate(machine.unit, 8, machine.clock)
    assert len(machine.units) == 3 * 2 * threads.REPEATS


def test_what_is_small() -> None:
    assert SMALL.small and not MEDIUM.small and not LARGE.small
    assert Work.of([(512, 512), (512,)], 1).small and not Work.of([(512, 514)], 1).small
    assert SMALL_MATRIX == 512 * 512
    rows = int(SMALL_PRODUCT / (2 * 128 * 128))
    assert Work.of([(128, 128)], rows).small and not Work.of([(128, 128)], rows + 1).small
    assert Work.of([(4, 128, 128), (128,)], 6) == (4, 4 * 128 * 128, 6)  # four experts


def test_what_is_measured_is_short_or_not_measured() -> None:
    assert MEDIUM.measurable_rows == 6
    long = MEDIUM._replace(rows=100_000)
    assert FEWEST_ROWS < long.measurable_rows == int(LONGEST_UNIT / (2 * MEDIUM.numbers))
    assert LARGE.measurable_rows == LARGE._replace(rows=100_000).measurable_rows == 0


@pytest.mark.parametrize(
    ("work", "count", "said"),
    [(SMALL, 1, "eval: 1 thread: the model is small\n"), (LARGE, 8, "eval: 8 threads: the model is large\n")],
)
def test_what_needs_no_measuring(work: Work, count: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(lambda count, _: 0.1)
    with threads.computing("eval", work, CPU, machine.unit):
        assert torch.get_num_threads() == count
    assert capsys.readouterr().out == said and not machine.units


def test_what_is_measured_is_kept_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine, folder = Machine(lambda count, _: 0.01 / min(count, 4)), tmp_path / "eval"
    monkeypatch.setattr(calibrate, "__defaults__", (machine.clock,))
    with threads.computing("eval", MEDIUM, CPU, machine.unit, folder):
        assert torch.get_num_threads() == 4
    measured = "10.0 ms with 1, 5.0 ms with 2, 2.5 ms with 4, 2.5 ms with 8"
    assert capsys.readouterr().out == f"eval: 4 threads: its unit of work takes {measured}\n"
    assert json.loads((folder / "eval.threads.json").read_bytes()) == {"threads": 4}
    machine.units.clear()
    with threads.computing("eval", MEDIUM, CPU, machine.unit, folder):
        assert torch.get_num_threads() == 4
    monkeypatch.setattr(entry, "own_cores", lambda: 2)
    with threads.computing("eval", MEDIUM, CPU, machine.unit, folder):
        assert torch.get_num_threads() == 2
    assert not machine.units


@pytest.mark.parametrize("work", [SMALL, MEDIUM, LARGE])
def test_what_the_user_chose_stays(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "REQUESTED_THREADS", "3")
    torch.set_num_threads(3)  # as torch does by itself where it finds the variable
    machine = Machine(lambda count, _: 0.1 / count)
    with threads.computing("eval", work, CPU, machine.unit):
        assert torch.get_num_threads() == 3
    assert not machine.units


def test_processes_share_the_cores_and_do_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    machine = Machine(lambda count, _: 0.1)
    assert threads.choose(MEDIUM, machine.unit).threads == 8
    assert threads.choose(SMALL, machine.unit).threads == 1
    monkeypatch.setattr(entry, "own_cores", lambda: 1)
    assert threads.choose(LARGE, machine.unit).threads == 1
    assert not machine.units


def test_a_gpu_is_nobodys_business(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(5)
    machine = Machine(lambda count, _: 0.1)
    with threads.computing("eval", MEDIUM, torch.device("cuda"), machine.unit):
        assert torch.get_num_threads() == _of_a_new_thread() == 5
    assert not machine.units and capsys.readouterr().out == ""


def test_threads_that_load_begin_with_one_and_all_is_restored() -> None:
    torch.set_num_threads(5)
    with pytest.raises(RuntimeError), threads.computing("train", LARGE, CPU):
        assert torch.get_num_threads() == 8 and _of_a_new_thread() == 1
        raise RuntimeError
    assert torch.get_num_threads() == _of_a_new_thread() == 5


def _of_a_new_thread() -> int:
    asked = list[int]()
    thread = threading.Thread(target=lambda: asked.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return asked[0]


def test_a_container_has_fewer_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(entry.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(entry.sys, "platform", "linux")
    monkeypatch.setattr(entry, "CPU_QUOTA", quota := tmp_path / "cpu.max")
    for given, cores in ((None, 8), ("max 100000\n", 8), ("250000 100000\n", 3), ("1600000 100000\n", 8)):
        if given:
            quota.write_text(given)
        assert entry.own_cores() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert entry.own_cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert entry.own_cores() == 1


@pytest.mark.parametrize(("module", "stage"), [(answering, "regenerate"), (recording_stage, "record")])
def test_units_of_work_can_be_done(
    module: Any,
    stage: str,
    recipe: Settings,
    tiny_target: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = list[Any]()
    monkeypatch.setattr(module, "computing", lambda *given: asked.append(given))
    if stage == "record":
        module._threads(recipe, tmp_path, tiny_target, module._place(recipe))
    else:
        module._threads(recipe, tmp_path, tiny_target)
    [(name, work, device, unit, folder)] = asked
    assert (name, device, folder) == (stage, CPU, tmp_path) and work.small
    for rows in (1, 7, 300):
        unit(rows)


def test_all_of_the_demo_is_small() -> None:
    demo = load("tiny", [])
    target, native = load_target(demo.target), load_native(demo.target, 700)
    for model, rows in (
        (target, demo.regenerate.batch_size),
        (target, demo.record.batch_tokens),
        (native, demo.record.batch_tokens),
        (native, 1 + demo.eval.fixed_chain),
    ):
        assert Work.of(threads.shapes(model), rows).small
    head = draft_config(demo.draft, asdict(target.info))
    assert Work.of(costs.shapes(head), demo.train.batch_tokens).small
