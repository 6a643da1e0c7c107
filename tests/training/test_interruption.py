"""Signals become a request, and the second one is obeyed at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from vkd.training.interruption import Interrupted, stop_on_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def send(number: int) -> None:
    """As `kill` does; the handler has run when this returns."""
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that a test finds again when it is over, whatever it did."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_by_name_and_stops_nothing_by_itself(number):
    with stop_on_signals() as should_stop:
        assert not should_stop()
        send(number)
        assert should_stop()
        assert should_stop.signal_name == number.name


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_signal_stops_at_once(first, second):
    with stop_on_signals() as should_stop:
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(second)
        assert should_stop.signal_name == first.name


def test_the_handlers_of_before_come_back(handlers):
    with stop_on_signals():
        assert all(signal.getsignal(number) != handler for number, handler in handlers.items())
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_the_handlers_of_before_come_back_after_an_error(handlers):
    with pytest.raises(ValueError, match="inside"), stop_on_signals():
        raise ValueError("inside")
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_in_another_thread_nothing_changes_and_one_can_still_ask(handlers):
    seen = []

    def work():
        with stop_on_signals() as should_stop:
            seen.append(should_stop())
            should_stop.set("SIGTERM")
            seen.append(should_stop())
            seen.append({number: signal.getsignal(number) for number in SIGNALS} == handlers)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True, True]


def test_an_interrupted_run_ends_the_sweep_it_belongs_to():
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert not issubclass(Interrupted, Exception)
