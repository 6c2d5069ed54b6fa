"""The line that training overwrites: step, loss, accuracy by TTT step, speed, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

INTERVAL_TERMINAL, INTERVAL_LOG = 0.2, 10.0  # seconds; a log keeps every line


class TrainProgress:
    """Shows how far training is, on stderr.

    Args:
        total: optimiser steps in all.
        done: steps that an earlier start had taken; they do not count for the time left.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._at_start = total, done
        self._started, self._shown = time.monotonic(), 0.0
        self._terminal = sys.stderr.isatty()

    def show(self, line: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl, if the last one is long enough ago."""
        now, step = time.monotonic(), line["step"]
        last = step == self._total
        if not last and now - self._shown < (INTERVAL_TERMINAL if self._terminal else INTERVAL_LOG):
            return
        self._shown = now
        left = (now - self._started) / (step - self._at_start) * (self._total - step)
        minutes, seconds = divmod(round(left), 60)
        accuracy = " ".join(f"{value:.2f}" for value in line["accuracy"])
        text = f"train {step}/{self._total}, loss {line['loss']:.3f}, accuracy {accuracy}, "
        text += f"{line['tokens_per_s']:,} tokens/s, {minutes}:{seconds:02d} left"
        end = "\n" if last or not self._terminal else ""
        print(f"\r{text}\x1b[K" if self._terminal else text, end=end, file=sys.stderr, flush=True)
