"""The line that says how far something long is: kept in a log, overwritten on a terminal."""

from __future__ import annotations

import sys

import pytest
from eagle3.configs import status
from eagle3.configs.status import StatusLine, minutes


def shown(line: StatusLine) -> None:
    line.show("1 of 2")
    line.say("by the way")
    line.show("2 of 2", last=True)


def test_a_log_keeps_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    shown(StatusLine())
    assert capsys.readouterr().err == "1 of 2\nby the way\n2 of 2\n"


def test_a_terminal_overwrites_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown(StatusLine())
    assert capsys.readouterr().err == "\r1 of 2\x1b[K\r\x1b[Kby the way\n\r2 of 2\x1b[K\n"


def test_when_the_next_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    line, patient = StatusLine(), StatusLine(patient=True)
    assert line.due and not patient.due
    line.show("1 of 2")
    now[0] = 9.9
    assert not line.due and not patient.due
    now[0] = 10.0
    assert line.due and patient.due


def test_minutes() -> None:
    assert [minutes(seconds) for seconds in (0.4, 59.6, 65, 3601)] == ["0:00", "1:00", "1:05", "60:01"]
