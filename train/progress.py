"""The line that training overwrites, and the one that it ends with."""

from __future__ import annotations

from typing import Any

from ..configs.status import StatusLine, minutes


class TrainProgress:
    """Shows on stderr how far training is, and how fast it was since this start.

    Args:
        total: optimiser steps in all.
        done: steps that an earlier start had taken; they do not count for speed and time left.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._at_start, self._step = total, done, done
        self._seconds = self._tokens = self._tflop = self._waited = self._used = 0.0
        self._length, self._line = 0.0, StatusLine()

    def show(self, line: dict[str, Any]) -> None:
        """Count one step's line of metrics.jsonl, and show it if the last one is long enough ago."""
        seconds, self._step = line["seconds"], line["step"]
        self._seconds += seconds
        self._tokens += line["tokens_per_s"] * seconds
        self._tflop += line["tflop_per_s"] * seconds
        self._waited += line["waited"] * seconds
        self._used += line.get("mfu", 0.0) * seconds
        last = self._step == self._total
        if not (last or self._line.due):
            return
        left = self._seconds / (self._step - self._at_start) * (self._total - self._step)
        accuracy = " ".join(f"{value:.2f}" for value in line["accuracy"])
        text = (
            f"train {self._step}/{self._total}, loss {line['loss']:.3f}, accuracy {accuracy}, AL {self._length:.2f}, "
        )
        self._line.show(f"{text}{self._speed()}, {minutes(left)} left", last)

    def validated(self, acceptance_length: float) -> None:
        """Note the simulated acceptance length, which the next lines show."""
        self._length = acceptance_length

    def summary(self) -> str:
        """How long this start took, and how fast it was."""
        steps = self._step - self._at_start
        return f"{steps:,} steps in {minutes(self._seconds)}, validation apart: {self._speed()}"

    def _speed(self) -> str:
        elapsed = max(self._seconds, 1e-9)
        mfu = f" (MFU {self._used / elapsed:.0%})" if self._used else ""
        speed = f"{self._tokens / elapsed:,.0f} tokens/s, {self._tflop / elapsed:,.2f} TFLOP/s{mfu}"
        return f"{speed}, waiting for data {self._waited / elapsed:.0%}"
