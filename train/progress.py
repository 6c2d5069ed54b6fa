"""The line that training overwrites: step, loss, accuracy by TTT step, speed, time left."""

from __future__ import annotations

import time
from typing import Any

from ..configs.status import StatusLine, minutes


class TrainProgress:
    """Shows how far training is, on stderr.

    Args:
        total: optimiser steps in all.
        done: steps that an earlier start had taken; they do not count for the time left.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._at_start = total, done
        self._started, self._line = time.monotonic(), StatusLine()

    def show(self, line: dict[str, Any]) -> None:
        """Show one line of metrics.jsonl, if the last one is long enough ago."""
        step = line["step"]
        last = step == self._total
        if not (last or self._line.due):
            return
        left = (time.monotonic() - self._started) / (step - self._at_start) * (self._total - step)
        accuracy = " ".join(f"{value:.2f}" for value in line["accuracy"])
        text = f"train {step}/{self._total}, loss {line['loss']:.3f}, accuracy {accuracy}, "
        self._line.show(f"{text}{line['tokens_per_s']:,} tokens/s, {minutes(left)} left", last)
