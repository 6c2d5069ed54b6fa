"""What the parts of a round cost beside one token, by thread count, on an idle machine and beside busy cores.

    timings(workload, asked)        # prints a table per thread count; returns the lines of a results file

A token is a verify of one: the target's forward, logits and the most likely token of each row. Every figure is the mean
of the calls that fit :data:`BUDGET_S` of a round, and then the median of the rounds: the mean, because a product that now
and then waits for a thread costs what it waits. In every round all parts are measured on the idle machine, then all of
them beside one busy core, then beside as many as there are, so that a ratio compares what was measured together.

Beside the time on the clock stands that of the processor, of all threads: where other processes keep a machine busy that
was to be idle, the latter still says what one thread computes, though not what it waits for.

Targets and heads are loaded anew for each thread count, for what they choose by measurement when they are loaded.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ...configs.errors import UserError
from ...data.bench.sides import result
from .inside import now
from .machine import Watch, cores, spinning
from .parts import GREEDY, SAMPLED, TOKEN, Operation, load_operations
from .workload import Workload

BUDGET_S = 0.1
#: The most that a figure of an idle machine may be, in tokens, and that a round at T=1 may take of one at T=0.
LIMITS = {"verify of 6": 1.6}
SAMPLED_LIMIT = 1.05
NOT_IDLE = 0.1  # cores that other processes keep busy


class Condition(NamedTuple):
    """Threads of this process, and processes that keep cores busy beside it."""

    threads: int
    busy: int

    @property
    def beside(self) -> str:
        """The latter in words."""
        return f"{self.busy} busy core{'s' if self.busy > 1 else ''}" if self.busy else "idle"

    @property
    def name(self) -> str:
        """Both in words."""
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}, {self.beside}"


class Times(NamedTuple):
    """Milliseconds a call, one per round: of the clock, and of all threads of this process on the processor."""

    wall: list[float]
    cpu: list[float]


Measured = Mapping[Condition, Mapping[str, Times]]


def thread_counts(wanted: Sequence[int] | None) -> list[int]:
    """Those that are asked for, or else 1, 2, 4, ... and as many as there are cores.

    Raises:
        UserError: fewer than one, or more than cores.
    """
    most = cores()
    if wanted is None:
        return sorted({1 << power for power in range(most.bit_length())} | {most})
    for count in wanted:
        if not 1 <= count <= most:
            raise UserError("--threads", count, f"this process may use {most} cores", f"give 1 to {most}")
    return list(dict.fromkeys(wanted))


def timings(workload: Workload, asked: argparse.Namespace) -> list[dict[str, object]]:
    """Measure by thread count, and print each table when it is there; torch's own number of threads is put back."""
    context = int(statistics.median(map(len, workload.prompts))) + workload.limits.max_new_tokens // 2
    shape = (
        f"{workload.target.path}, {workload.target.dtype}, {context} tokens of context, chain {asked.chain}, batch 1"
    )
    print(f"timings of {shape}: ms, and in tokens of the same condition", flush=True)
    results, usual = list[dict[str, object]](), torch.get_num_threads()
    try:
        for threads in thread_counts(asked.threads):
            torch.set_num_threads(threads)
            operations = load_operations(workload, context, asked.chain)
            measured, others = measure(operations, threads, asked.rounds)
            for line in table(measured, others):
                print(line, flush=True)
            results += lines_of(measured, others, asked, f"{shape}, {workload.run}")
    finally:
        torch.set_num_threads(usual)
    return results


@torch.inference_mode()
def measure(operations: Mapping[str, Operation], threads: int, rounds: int) -> tuple[Measured, float | None]:
    """What a call takes, by condition and name; and how many cores others kept busy meanwhile.

    The latter is of the rounds on an idle machine, which it was only if this is about 0; None where no system says it.
    """
    torch.set_num_threads(threads)  # whatever was chosen while the target was loaded
    conditions = [Condition(threads, busy) for busy in sorted({0, 1, cores()})]
    found = {each: {name: Times([], []) for name in operations} for each in conditions}
    others = list[float]()
    for operation in operations.values():
        milliseconds(operation, 0.0)
    for number, condition in itertools.product(range(rounds), conditions):
        print(f"timings: {condition.name}, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        watch = Watch()
        with spinning(condition.busy):
            for name, operation in operations.items():
                for times, spent in zip(found[condition][name], milliseconds(operation, BUDGET_S), strict=True):
                    times.append(spent)
        kept = watch.others()
        if kept is not None and not condition.busy:
            others.append(kept)
    return found, statistics.median(others) if others else None


def milliseconds(operation: Operation, budget: float) -> tuple[float, float]:
    """Of the clock and of the processor: means of as many calls as take ``budget`` seconds, and of one at least."""
    wall, cpu, calls = 0.0, 0.0, 0
    while not calls or wall < budget:
        operation.prepare()
        started, started_cpu = now(), time.process_time()
        operation.run()
        wall, cpu = wall + now() - started, cpu + time.process_time() - started_cpu
        calls += 1
    return 1e3 * wall / calls, 1e3 * cpu / calls


def table(measured: Measured, others: float | None) -> Iterator[str]:
    """A line per operation, a column per condition; the first of these once more in processor time."""
    conditions, idle = list(measured), next(iter(measured.values()))
    titles = [*(each.beside for each in conditions), f"{conditions[0].beside}, processor"]
    yield f"  {conditions[0].name.partition(',')[0]:<22}" + "".join(f"{each:>20}" for each in titles)
    for name in idle:
        columns = [(each[name].wall, each[TOKEN].wall) for each in measured.values()]
        columns.append((idle[name].cpu, idle[TOKEN].cpu))
        cells = [f"{statistics.median(ours):12.3f} ({_ratio(ours, token):5.2f})" for ours, token in columns]
        yield f"  {name:<22}" + "".join(cells)
    for name, limit in LIMITS.items():
        yield f"  {name} takes {_ratio(idle[name].wall, idle[TOKEN].wall):.2f} tokens [at most {limit:g}]"
    ratio = _ratio(idle[SAMPLED].wall, idle[GREEDY].wall)
    yield f"  a {SAMPLED} takes {ratio:.3f} of one at T=0 [at most {SAMPLED_LIMIT:g}]"
    if others is not None and others > NOT_IDLE:
        yield f"  warning: the machine was not idle; other processes kept {others:.1f} cores busy"


def lines_of(
    measured: Measured, others: float | None, asked: argparse.Namespace, shape: str
) -> list[dict[str, object]]:
    """The lines of a results file: every figure beside a token, a token beside an idle one, sampled rounds beside greedy."""
    results, idle = list[dict[str, object]](), next(iter(measured.values()))

    def add(what: str, ours: Times, name: str, theirs: Times, limit: float | None) -> None:
        notes = f"{what}, {condition.name}; rounds: {[round(each, 3) for each in ours.wall]}; processor: "
        notes += f"{statistics.median(ours.cpu):.3f} ms, {_ratio(ours.cpu, theirs.cpu):.2f} of {name}"
        if not condition.busy and others is not None:
            notes += f"; other processes kept {others:.2f} cores busy"
        value, beside = (round(statistics.median(each.wall), 4) for each in (ours, theirs))
        ratio = _ratio(ours.wall, theirs.wall)
        line = result(asked, "timing", shape, "ms", value, (name, beside), limit or 0, notes, ratio)
        results.append(line | {"limit": limit})

    for condition, times in measured.items():
        for name, spent in times.items():
            if name == TOKEN:
                add(name, spent, "a token on an idle machine", idle[TOKEN], None)
            else:
                add(name, spent, "a token", times[TOKEN], None if condition.busy else LIMITS.get(name))
        add(SAMPLED, times[SAMPLED], f"a {GREEDY}", times[GREEDY], None if condition.busy else SAMPLED_LIMIT)
    return results


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(mine / max(other, 1e-9) for mine, other in zip(ours, theirs, strict=True))
