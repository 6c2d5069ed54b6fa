"""Micro-batches, loaded in a thread while the steps before them are taken.

for planned, micros in feed(steps, load, clock):
    for batch in micros:            # one for each of planned.parts, in order
        ...
clock.waited                        # seconds for which the loop had nothing to do
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from threading import Semaphore
from typing import NamedTuple

from .batches import Collated
from .samples import Batch

AHEAD = 2  # micro-batches that are loaded and not taken yet


class Planned(NamedTuple):
    """One optimiser step: this rank's share of the batch, one part a micro-batch, and the supervised rows of all of it."""

    batch: Batch
    parts: tuple[tuple[int, ...], ...]
    rows: int


class Clock:
    """Seconds that were waited for batches, since :meth:`lap` was last called."""

    def __init__(self) -> None:
        self.waited = 0.0

    def lap(self) -> float:
        """The seconds so far; counting starts anew."""
        waited, self.waited = self.waited, 0.0
        return waited


def feed(
    steps: Iterable[Planned], load: Callable[[tuple[int, ...]], Collated], clock: Clock
) -> Iterator[tuple[Planned, Iterator[Collated]]]:
    """Yield each step with its micro-batches, of which the next are being loaded; all of one must be taken.

    Args:
        steps: asked for one ahead, in the caller's thread.
        load: makes a part's micro-batch, in another thread; what it raises comes out where the micro-batch is taken.
        clock: is told what was waited.
    """
    with closing(_Loader(load)) as loader:
        upcoming = ((step, [loader.submit(part) for part in step.parts]) for step in steps)
        current = next(upcoming, None)
        while current is not None:
            following = next(upcoming, None)
            step, micros = current
            yield step, loader.take(micros, clock)
            current = following


class _Loader:
    """A thread that keeps ``AHEAD`` micro-batches ready."""

    def __init__(self, load: Callable[[tuple[int, ...]], Collated]) -> None:
        self._load, self._slots = load, Semaphore(AHEAD)
        self._thread = ThreadPoolExecutor(1)

    def submit(self, part: tuple[int, ...]) -> Future[Collated]:
        return self._thread.submit(self._loaded, part)

    def take(self, micros: list[Future[Collated]], clock: Clock) -> Iterator[Collated]:
        for micro in micros:
            started = time.perf_counter()
            batch = micro.result()
            clock.waited += time.perf_counter() - started
            self._slots.release()
            yield batch

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._slots.release()  # the one that may wait for room
        self._thread.shutdown()

    def _loaded(self, part: tuple[int, ...]) -> Collated:
        self._slots.acquire()
        return self._load(part)
