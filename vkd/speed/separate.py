"""A loop in a process of its own, which nothing that vkd does to its process can make faster or slower."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from vkd.speed.memory import weigh
from vkd.training.clock import synchronize


class Loop(Protocol):
    """What a separate loop offers."""

    device: torch.device

    def take_steps(self, count: int) -> None:
        """The next steps; within `running`."""

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which steps are taken."""


class SeparateLoop:
    """A loop that another process makes and runs; between its steps that process waits.

    Args:
        make: a function that the process can import, which makes the loop.
        arguments: what it is called with; all of them can be pickled.

    Raises RuntimeError when the loop fails, with what it said.
    """

    def __init__(self, make: Callable[..., Loop], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would have this one's memory and threads
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, torch.get_num_threads(), make, arguments))
        self._process.start()
        theirs.close()
        self._receive()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The loop's own context."""
        self._ask("enter")
        try:
            yield
        finally:
            self._ask("leave")

    def take_steps(self, count: int) -> None:
        """Take so many steps, and wait until they are done."""
        self._ask("steps", count)

    def weigh(self) -> dict[str, int | None]:
        """See `vkd.speed.memory.weigh`."""
        return self._ask("weigh")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, command: str, value: Any = None) -> Any:
        self._connection.send((command, value))
        return self._receive()

    def _receive(self) -> Any:
        try:
            failure, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of the loop ended with exit code {self._process.exitcode}") from None
        if failure:
            raise RuntimeError(failure)
        return answer


def _serve(connection: Connection, threads: int, make: Callable[..., Loop], arguments: tuple[Any, ...]) -> None:
    """Make the loop and do what is asked, until nobody is there to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one in order
    torch.set_num_threads(threads)
    with contextlib.ExitStack() as running:
        try:
            loop = make(*arguments)
            connection.send((None, None))
            while True:
                command, value = connection.recv()
                connection.send((None, _do(loop, running, command, value)))
        except EOFError:
            return
        except Exception as error:
            connection.send((f"{type(error).__name__}: {error}", None))


def _do(loop: Loop, running: contextlib.ExitStack, command: str, value: Any) -> Any:
    if command == "enter":
        running.enter_context(loop.running())
    elif command == "leave":
        running.close()
    elif command == "steps":
        loop.take_steps(value)
        synchronize(loop.device)
    else:
        return weigh(loop, loop.take_steps, loop.running, loop.device)
    return None
