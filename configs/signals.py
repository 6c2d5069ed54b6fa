"""Ending politely: SIGTERM and SIGINT become a question that a long loop asks between two units of work."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

from .errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Catches SIGTERM and SIGINT while the block runs.

        with StopRequest("eagle3 record runs/demo/config.yaml") as stop:
            for done, unit in enumerate(units, 1):
                work(unit)
                stop.check(f"{done} of {len(units)} shards are recorded")

    The first signal only sets ``requested``. It also puts the earlier handlers back, so that a second one ends a unit
    that takes too long. Several processes must agree before they leave a collective: let them reduce ``requested``, and
    raise :meth:`end` where it came to any.

    Args:
        resume: the command that goes on from here, told to the user.

    Use it in the main thread, where Python delivers signals.
    """

    def __init__(self, resume: str) -> None:
        self.resume = resume
        self.requested = False
        self._earlier: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        self._earlier = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def check(self, state: str) -> None:
        """Raise :class:`Interrupted`, saying ``state`` and how to resume, if a signal came."""
        if self.requested:
            raise self.end(state)

    def end(self, state: str) -> Interrupted:
        """What :meth:`check` raises."""
        return Interrupted(f"interrupted: {state}; resume with: {self.resume}")

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}
