"""One line on stderr that says how far a long stage is."""

from __future__ import annotations

import time

from ..configs.status import StatusLine, minutes


class Progress:
    """Counts units and tokens, and says now and then ``record 3/27 shards, 1.2 shards/s, 5,120 tokens/s, 1:05 left``.

    Args:
        stage: the name at the start of the line.
        unit: what is counted, in the plural.
        total: units in all; None where nobody knows, and then units are timed instead of tokens.
        done: units that were there before this process started; they do not count for the speed.
    """

    def __init__(self, stage: str, unit: str, total: int | None, done: int = 0) -> None:
        self.stage, self.unit, self.total, self.done = stage, unit, total, done
        self._start, self._at_start, self._tokens, self._failed = time.monotonic(), done, 0, 0
        self._line = StatusLine()

    def advance(self, units: int, tokens: int, failed: int = 0) -> None:
        """Count ``units`` finished with ``tokens`` processed, of which ``failed`` came to nothing."""
        self.done += units
        self._tokens += tokens
        self._failed += failed
        if (last := self.total is not None and self.done >= self.total) or self._line.due:
            self._line.show(str(self), last)

    def finish(self) -> None:
        """Say the last line where no total told that it was the last."""
        self._line.show(str(self), last=True)

    def say(self, line: str) -> None:
        """A line of its own between those of the progress."""
        self._line.say(line)

    def __str__(self) -> str:
        elapsed = max(time.monotonic() - self._start, 1e-9)
        finished = self.done - self._at_start
        if self.total is None:
            return f"{self.stage} {self.done:,} {self.unit}, {finished / elapsed:,.0f} {self.unit}/s"
        left = (self.total - self.done) * elapsed / finished if finished else 0.0
        rate = f"{finished / elapsed:,.1f} {self.unit}/s, {self._tokens / elapsed:,.0f} tokens/s"
        failed = f", {self._failed:,} failed" if self._failed else ""
        return f"{self.stage} {self.done}/{self.total} {self.unit}{failed}, {rate}, {minutes(left)} left"
