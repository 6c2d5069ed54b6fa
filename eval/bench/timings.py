"""What the parts of a round cost beside one token, by thread count, on an idle machine and beside busy cores.

    timings(workload, asked)        # prints a table per thread count; returns the lines of a results file

A token is a verify of one: the target's forward, logits and the most likely token of each row. Every figure is the mean
of the calls that fit :data:`BUDGET_S` of a round, and then the median of the rounds: the mean, because a product that now
and then waits for a thread costs what it waits. In every round all parts are measured on the idle machine, then all of
them beside one busy core, then beside as many as there are, so that a ratio compares what was measured together.

Targets and heads are loaded anew for each thread count, for what they choose by measurement when they are loaded.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
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


Measured = Mapping[Condition, Mapping[str, Sequence[float]]]


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
    """Milliseconds a call, by condition and name, one per round; and how many cores others kept busy meanwhile.

    The latter is of the rounds on an idle machine, which it was only if this is about 0; None where no system says it.
    """
    torch.set_num_threads(threads)  # whatever was chosen while the target was loaded
    conditions = [Condition(threads, busy) for busy in sorted({0, 1, cores()})]
    found: dict[Condition, dict[str, list[float]]] = {each: {name: [] for name in operations} for each in conditions}
    others = list[float]()
    for operation in operations.values():
        milliseconds(operation, 0.0)
    for number, condition in itertools.product(range(rounds), conditions):
        print(f"timings: {condition.name}, round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        watch = Watch()
        with spinning(condition.busy):
            for name, operation in operations.items():
                found[condition][name].append(milliseconds(operation, BUDGET_S))
        kept = watch.others()
        if kept is not None and not condition.busy:
            others.append(kept)
    return found, statistics.median(others) if others else None


def milliseconds(operation: Operation, budget: float) -> float:
    """The mean of as many calls as take ``budget`` seconds, and of one at least."""
    spent, calls = 0.0, 0
    while not calls or spent < budget:
        operation.prepare()
        started = now()
        operation.run()
        spent += now() - started
        calls += 1
    return 1e3 * spent / calls


def table(measured: Measured, others: float | None) -> Iterator[str]:
    """A line per operation, a column per condition."""
    conditions = list(measured)
    yield f"  {conditions[0].name.partition(',')[0]:<22}" + "".join(f"{each.beside:>20}" for each in conditions)
    for name in measured[conditions[0]]:
        cells = []
        for condition in conditions:
            times = measured[condition]
            cells.append(f"{statistics.median(times[name]):12.3f} ({_ratio(times[name], times[TOKEN]):5.2f})")
        yield f"  {name:<22}" + "".join(cells)
    idle = measured[conditions[0]]
    for name, limit in LIMITS.items():
        yield f"  {name} takes {_ratio(idle[name], idle[TOKEN]):.2f} tokens [at most {limit:g}]"
    yield f"  a {SAMPLED} takes {_ratio(idle[SAMPLED], idle[GREEDY]):.3f} of one at T=0 [at most {SAMPLED_LIMIT:g}]"
    if others is not None and others > NOT_IDLE:
        yield f"  warning: the machine was not idle; other processes kept {others:.1f} cores busy"


def lines_of(
    measured: Measured, others: float | None, asked: argparse.Namespace, shape: str
) -> list[dict[str, object]]:
    """The lines of a results file: every figure beside a token, a token beside an idle one, sampled rounds beside greedy."""
    results, idle = list[dict[str, object]](), next(iter(measured.values()))

    def add(what: str, ours: Sequence[float], name: str, theirs: Sequence[float], limit: float | None) -> None:
        notes = f"{what}, {condition.name}; rounds: {[round(each, 3) for each in ours]}"
        if not condition.busy and others is not None:
            notes += f"; other processes kept {others:.2f} cores busy"
        value, beside = (round(statistics.median(each), 4) for each in (ours, theirs))
        ratio = _ratio(ours, theirs)
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
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
