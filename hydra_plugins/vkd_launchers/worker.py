"""What runs in a worker of a cluster: the jobs of one group, in the place of the sweep's own task."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra_plugins.vkd_launchers.sweep_jobs import SweepJob

if TYPE_CHECKING:
    from omegaconf import DictConfig

Failure = tuple[int, str, str]
"""The number of a job, its words, and what went wrong in one line: as `vkd.jobs.Jobs.failures` has it."""


class Group:
    """The jobs that one worker does. Hydra calls it there as the task of the first of them.

    It holds their configs, as they were checked when the sweep began: a config file that changes while a job waits in a
    queue changes nothing.

    Args:
        task: the sweep's own, a `vkd.jobs.Jobs`.
        jobs: with their configs; several are done together.
        directory: where the command was called.
    """

    def __init__(self, task: Any, jobs: list[SweepJob], directory: str) -> None:
        self.task = task
        self.jobs = jobs
        self.directory = directory

    @property
    def numbers(self) -> str:
        """The numbers of its jobs, as a message names them."""
        return f"job{'s' * (len(self.jobs) > 1)} {', '.join(str(number) for number, _, _ in self.jobs)}"

    def all_failed(self, reason: str) -> list[Failure]:
        """All of its jobs as failures, for the same reason."""
        return [(number, " ".join(words), reason) for number, words, _ in self.jobs]

    def __call__(self, composed: DictConfig) -> list[Failure]:
        """Do the jobs; those that failed."""
        if not Path(self.directory).is_dir():
            return self.all_failed(
                f"{self.directory} is not on {socket.gethostname()}: workers need the file system of the command"
            )
        with scheduler_answered():
            if len(self.jobs) == 1:
                self.task(self.jobs[0][2])
            else:
                self.task.together(self.jobs)
        return self.task.failures


@contextmanager
def scheduler_answered() -> Iterator[None]:
    """A signal before the time limit stops the work with a checkpoint, and then reaches whoever handles it.

    submitit gives Slurm the job again in its handler, and leaves the process: right where the signal finds it, in the
    middle of a step, were it not put off until the work within this context has ended. SIGTERM, which it ignores, stops
    the work too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from vkd.training.interruption import Interrupted

    put_off: list[Callable[[], object]] = []
    present = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in present}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}

    def note(number: int, frame: FrameType | None) -> None:
        put_off.append(lambda: handlers[number](number, frame))
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if put_off:
            put_off[0]()
