"""`python -m vkd.speed.first_step [key=value ...]`: `vkd.train` up to its first training step, then the time of day.

It is the command itself, with its imports, Hydra, the data set and the tracker; the run is asked to stop behind its
first step, and the last line of the output is when that step was done, in seconds since the epoch of the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import vkd.train
from vkd.command import STOPPED
from vkd.training import interruption


class _StopAtOnce:
    """Asked whether to stop, which a trainer does behind every step: yes, and when that was."""

    def __init__(self) -> None:
        self.asked: float | None = None

    def __call__(self) -> bool:
        if self.asked is None:
            _wait_for_device()
            self.asked = time.time()
        return True


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(words: list[str]) -> int:
    """The exit code: 0 when a step was taken."""
    stop = _StopAtOnce()

    @contextmanager
    def stopping() -> Iterator[_StopAtOnce]:
        yield stop

    interruption.stop_on_signals = stopping
    code = vkd.train.main(words)
    if code != STOPPED or stop.asked is None:
        return code or 1
    print(stop.asked)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
