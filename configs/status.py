"""A line on stderr that says how far something long is: a terminal overwrites it, a log keeps it."""

from __future__ import annotations

import math
import sys
import time

INTERVAL_TERMINAL, INTERVAL_LOG = 0.2, 10.0  # seconds between lines


class StatusLine:
    """Shows a text now and then.

        line = StatusLine()
        for number, unit in enumerate(units, 1):
            work(unit)
            if line.due:
                line.show(f"{number} of {len(units)}")

    Args:
        patient: nothing is due until the first interval is over: what is quick goes without a word.
    """

    def __init__(self, patient: bool = False) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = time.monotonic() if patient else -math.inf

    @property
    def due(self) -> bool:
        """Whether the last text was shown long enough ago."""
        return time.monotonic() - self._shown >= (INTERVAL_TERMINAL if self._terminal else INTERVAL_LOG)

    def show(self, text: str, last: bool = False) -> None:
        """Show ``text`` in the place of the one before; nothing takes the place of the ``last``."""
        self._shown = time.monotonic()
        end = "\n" if last or not self._terminal else ""
        print(f"\r{text}\x1b[K" if self._terminal else text, end=end, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own between those."""
        print(f"\r\x1b[K{text}" if self._terminal else text, file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    """1:05."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}:{rest:02d}"
