"""Stopping in the right place: signals are noted at once and obeyed between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has left a checkpoint. The same command goes on from there.

    A KeyboardInterrupt, so that it also ends the sweep that the run belongs to.
    """


class StopRequest:
    """Whether somebody has asked to stop. Call it to know, `set` it to ask."""

    def __init__(self) -> None:
        self.signal_name = ""

    def __call__(self) -> bool:
        return bool(self.signal_name)

    def set(self, signal_name: str) -> None:
        """Ask for a stop after the step in hand."""
        self.signal_name = signal_name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM become a request; a second one of either stops at once, as Python does by itself.

    Signals reach the main thread alone, so elsewhere this changes nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in handled}

    def note(number: int, _frame: FrameType | None) -> None:
        if request():
            raise KeyboardInterrupt
        request.set(signal.Signals(number).name)

    for number in handled:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None stands for a handler that Python did not install and cannot name.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
