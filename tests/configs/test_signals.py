"""SIGTERM and SIGINT are a question, the second one an order."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from eagle3.configs.errors import Interrupted
from eagle3.configs.signals import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_the_unit(number: signal.Signals) -> None:
    units = 0
    with pytest.raises(Interrupted) as caught, StopRequest("eagle3 bake") as stop:
        while units < 5:
            if units == 2:
                send(number)
            units += 1
            stop.check(f"{units} of 5 loaves are baked")
    assert str(caught.value) == "interrupted: 3 of 5 loaves are baked; resume with: eagle3 bake"
    assert caught.value.exit_code == 75


def test_without_a_signal_nothing_happens() -> None:
    with StopRequest("eagle3 bake") as stop:
        stop.check("all is well")
    assert not stop.requested


def test_the_second_signal_goes_to_the_earlier_handler() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest("eagle3 bake") as stop:
        send(signal.SIGINT)
        assert stop.requested
        send(signal.SIGINT)


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_are_put_back(fails: bool) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with StopRequest("eagle3 bake"):
            assert [signal.getsignal(number) for number in SIGNALS] != before
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
