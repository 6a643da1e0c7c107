"""Stopping in the right place: signals are noted at once and obeyed between two steps."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from vkd import launched

SAME_REQUEST_SECONDS = 3.0
"""Two signals within this time are one request where several processes train together."""


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


_STOPPING = ("SIGINT", "SIGTERM")
_WARNING = ("SIGUSR1", "SIGUSR2")
"""What schedulers send before they stop a job. A launcher that listens to one, as submitit does to queue the job again,
gets it once the checkpoint is written."""


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM become a request; a second one of either stops at once, as Python does by itself.

    SIGUSR1 and SIGUSR2 become one too where somebody handles them: the handler is called at the end of the context,
    when what the request stopped has left its checkpoint.

    Among several processes one that follows the first at once is the same request, which their launcher has passed on
    while a terminal or a scheduler sent it to all.

    Signals reach the main thread alone, so elsewhere this changes nothing.

    A worker of a cluster has `scheduler_answered` (`hydra_plugins.vkd_launchers.worker`) around this, and needs both.
    This one is there while runs train, of any command, and lets the step in hand end. That one is there for as long as
    the worker is at its jobs: before and between runs, while torch is imported or a job is looked at, no step is in
    hand, and it ends the work at once; and it keeps submitit's handler, which leaves the process, until not only the
    checkpoint but also what became of each job is written.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    present = [getattr(signal, name) for name in (*_STOPPING, *_WARNING) if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in present}
    for number in present:
        if signal.Signals(number).name in _WARNING and not callable(before[number]):
            del before[number]
    put_off: dict[int, FrameType | None] = {}
    asked_at = math.inf

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        name = signal.Signals(number).name
        if name in _WARNING:
            put_off[number] = frame
        elif request():
            if launched.world_size() == 1 or time.monotonic() - asked_at > SAME_REQUEST_SECONDS:
                raise KeyboardInterrupt
            return
        asked_at = time.monotonic()
        request.set(name)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            # None stands for a handler that Python did not install and cannot name.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number, frame in put_off.items():
            before[number](number, frame)
