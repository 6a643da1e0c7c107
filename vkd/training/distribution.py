"""The processes that train one student together, and what they say to each other.

Every process has its share of each batch and computes summands: the loss of its share, weighted by the share's size,
and its gradient. Their sums over the processes are the loss and the gradient of the whole batch, so that a student
learns what it would on one process. All hold the same weights and do the same steps; the first one writes the files.

A run lives as long as all of its processes do. What goes wrong with all of them alike (wrong input, a loss that is not
finite) is a failed run as any other. Where one of them fails by itself, or dies, the others learn why (`explain`,
`LostProcess`) and end.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vkd import launched
from vkd.errors import ConfigError, TrainingError, UserError

logger = logging.getLogger("vkd")

T = TypeVar("T")

PATIENCE_SECONDS = 5.0
"""How long a process that fails waits for the others to do so too, and one that ends for their farewell."""

LAST_WORDS_SECONDS = 1.0
"""How long one that lost another looks for what that said of it."""

STUCK_SECONDS = 15.0
"""How long the first process may take to notice that another is dead, before it is ended from the outside."""

_LONG = datetime.timedelta(days=365)
"""How long the first process may be alone at work while the others wait for it. One that dies is noticed at once."""


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The newer of torch's two names."""


class LostProcess(TrainingError):
    """Another process of the run has ended before its time, so that this one cannot go on."""


class Processes:
    """The processes of a run. This class is the usual case: there is one, and nothing to be said.

    rank, local_rank: which of all and of those on this machine this one is, from 0.
    world_size: how many there are.
    """

    rank = 0
    local_rank = 0
    world_size = 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Processes:
        return self

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.world_size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def part(self) -> tuple[int, int]:
        """Rank and world size, as `Data` wants to know which share of the images is meant."""
        return self.rank, self.world_size

    def sizes(self, count: int) -> list[int]:
        """How many of `count` things each process has: as evenly as can be, the larger shares first."""
        least, rest = divmod(count, self.world_size)
        return [least + (rank < rest) for rank in range(self.world_size)]

    def require_all(self) -> None:
        """Raise LostProcess where the processes are no longer together."""

    def first(self, function: Callable[[], T]) -> T:
        """What `function` gives on the first process, on all of them. What it raises there is raised everywhere."""
        return function()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        return [value]

    def agree(self, flag: bool) -> bool:
        """Whether any of the processes says so; once they are no longer together, whether this one does."""
        return flag

    def flags(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag whether any process raised it, without waiting: of several processes, at the call before."""
        return flags

    def settle(self) -> None:
        """Forget the flags of the last call."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over the processes in the place of each of these tensors of one type and device."""

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's values in the place of these tensors."""

    def gather_rows(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows of all processes one after the other: [sizes[rank], ...] to [sum of sizes, ...].

        The gradient of the own rows is multiplied by the number of processes. A loss that each process computes from
        all rows, and of which it takes the `world_size`th part, is then right both in its sum over the processes and in
        the sum of its gradients, by the rows and by parameters behind them.
        """
        return rows

    def explain(self, error: BaseException) -> BaseException:
        """The error that ends a run, for its record, once it is known whether the others failed as well.

        Where they did not, the processes are no longer together afterwards.
        """
        return error

    def if_stuck(self, tell: Callable[[LostProcess], object] | None) -> None:
        """Have `tell` called where another process is dead and this one hangs, just before it is ended."""


ONE = Processes()
"""One process, which is the default everywhere."""


@functools.cache
def join() -> Processes:
    """The processes that a launcher started for this run, connected to each other; `ONE` without a launcher.

    Every call gives the same. CUDA tensors travel by NCCL, others by gloo.

    Raises ConfigError where they cannot reach each other.
    """
    if launched.world_size() == 1:
        return ONE
    rank, world_size = launched.rank(), launched.world_size()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        control, watch = (dist.new_group(backend="gloo", timeout=_LONG) for _ in range(2))
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"the {world_size} processes of this run do not find each other: {str(error).splitlines()[0]}",
            expected="processes that torchrun started, on machines that reach each other",
            hint="torchrun --nproc-per-node 2 -m vkd.train ...",
        ) from error
    return _Several(rank, launched.local_rank(), world_size, store, control, watch)


class _Several(Processes):
    """Several processes, by `torch.distributed`. What is summed goes through the default group, the rest by gloo."""

    def __init__(
        self,
        rank: int,
        local_rank: int,
        world_size: int,
        store: dist.Store,
        control: dist.ProcessGroup,
        watch: dist.ProcessGroup,
    ) -> None:
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size
        self._tell_if_stuck: Callable[[LostProcess], object] | None = None
        self._explained: BaseException | None = None
        self._store = dist.PrefixStore("vkd", store)
        self._control, self._watch = control, watch
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._failures = 0
        self._lost: LostProcess | None = None
        self._noticed = threading.Event()
        self._farewell = threading.Thread(target=self._watch_over_others, name="vkd other processes", daemon=True)
        if self.is_first:
            self._farewell.start()
        atexit.register(self._leave)

    def require_all(self) -> None:
        if self._lost is not None:
            raise self._lost

    def first(self, function: Callable[[], T]) -> T:
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except (Exception, SystemExit) as error:
                answer[1] = error
        mine = answer[1]
        if mine is not None:
            answer[1] = _portable(mine)
        with self._reaching():
            dist.broadcast_object_list(answer, src=0, group=self._control)
        if mine is not None:
            raise mine
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.world_size
        with self._reaching():
            dist.all_gather_object(values, value, group=self._control)
        return values

    def agree(self, flag: bool) -> bool:
        if self._lost is not None:
            return flag
        said = torch.tensor([int(flag)])
        with self._reaching():
            dist.all_reduce(said, group=self._control)
        return bool(said)

    def flags(self, *flags: bool) -> tuple[bool, ...]:
        raised = torch.tensor([int(flag) for flag in flags])
        with self._reaching():
            before, self._pending = self._pending, (dist.all_reduce(raised, group=self._control, async_op=True), raised)
            if before is None:
                return (False,) * len(flags)
            work, raised = before
            work.wait()
        return tuple(bool(flag) for flag in raised)

    def settle(self) -> None:
        if self._pending is not None:
            with self._reaching():
                self._pending[0].wait()
            self._pending = None

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        if not tensors:
            return
        flat = torch.cat([entry.reshape(-1) for entry in tensors])
        with self._reaching():
            dist.all_reduce(flat)
        _spread(flat, tensors)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        for dtype in {entry.dtype: None for entry in tensors}:
            alike = [entry for entry in tensors if entry.dtype == dtype]
            flat = torch.cat([entry.reshape(-1) for entry in alike])
            with self._reaching():
                dist.broadcast(flat, src=0)
            _spread(flat, alike)

    def gather_rows(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        return _GatherRows.apply(rows, self, list(sizes))

    def all_rows(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """`gather_rows` without a gradient."""
        most = max(sizes)
        mine = rows.detach().contiguous()
        if len(mine) < most:
            mine = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        found = mine.new_empty(self.world_size * most, *mine.shape[1:])
        with self._reaching():
            _all_gather(found, mine)
        if min(sizes) == most:
            return found
        return torch.cat([found[rank * most : rank * most + size] for rank, size in enumerate(sizes)])

    def explain(self, error: BaseException) -> BaseException:
        self._pending = None
        if isinstance(error, LostProcess) or error is self._explained:
            return error
        self._explained = error
        self._noticed.set()
        attempt, self._failures = self._failures, self._failures + 1
        names = [self._failure_name(rank, attempt) for rank in range(self.world_size)]
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".strip()
        with contextlib.suppress(RuntimeError):
            self._store.set(names[self.rank], message)
        if self._appear(names):
            self._noticed.clear()
            return error
        self._lost = LostProcess(
            f"this process of {self.world_size} failed, and the others did not: {message.splitlines()[0]}",
            expected="all processes of a run to do alike",
        )
        if not self.is_first:
            # The first one speaks for all, but of this it knows no more than the message.
            print(f"vkd: process {self.rank} of {self.world_size} failed: {error}", file=sys.stderr, flush=True)
        return error

    def if_stuck(self, tell: Callable[[LostProcess], object] | None) -> None:
        self._tell_if_stuck = tell

    def _failure_name(self, rank: int, attempt: int) -> str:
        return f"failure/{attempt}/{rank}"

    def _appear(self, names: Sequence[str]) -> bool:
        """Whether all of these names turn up in the store before patience ends."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if self._store.check(list(names)):
                    return True
            except RuntimeError:  # it was kept by a process that is gone
                return False
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn the failure of reaching another process into what has become of that."""
        if self._lost is not None:
            raise self._lost
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._noticed.set()
            self._lost = self._last_words()
            raise self._lost from error

    def _last_words(self) -> LostProcess:
        """What ended another process, as far as it could say."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        others = {
            rank: self._failure_name(rank, self._failures) for rank in range(self.world_size) if rank != self.rank
        }
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                for rank, name in others.items():
                    if self._store.check([name]):
                        message = self._store.get(name).decode()
                        return _lost(f"process {rank} of the {self.world_size} of this run failed: {message}")
                time.sleep(0.05)
        return _lost(
            f"another of the {self.world_size} processes of this run ended without a word: it was killed, its machine "
            "is gone, or it ran out of memory"
        )

    def _watch_over_others(self) -> None:
        """On a thread of the first process: notice that another one dies, and end this one if it cannot.

        Waits for the farewells of all others, which come when they end well. A process that waits for a kernel of a
        dead one waits for ever, and deaf to signals.
        """
        farewells = [torch.zeros(1) for _ in range(self.world_size)]
        try:
            dist.gather(farewells[0], farewells, group=self._watch)
        except RuntimeError:
            if not self._noticed.wait(STUCK_SECONDS):
                self._lost = self._last_words()
                with contextlib.suppress(Exception):
                    if self._tell_if_stuck is not None:
                        self._tell_if_stuck(self._lost)
                _end_at_once(str(self._lost))

    def _leave(self) -> None:
        """At the end of Python: say farewell, or end without waiting for anybody where there is nobody to wait for."""
        if self._lost is not None:
            _end_at_once()
        with contextlib.suppress(RuntimeError):
            if self.is_first:
                self._noticed.set()
                self._farewell.join(PATIENCE_SECONDS)
                if self._farewell.is_alive():
                    # It still uses the group, which would abort the process if it were taken from under it.
                    return
            else:
                dist.gather(torch.zeros(1), None, group=self._watch)
            dist.destroy_process_group()


class GradientSum:
    """Sums gradients over the processes: a single message a step.

    Args:
        parameters: those that are trained, in one order on all processes. One without a gradient is left so.
        processes: several.

    Calling it raises TrainingError where other parameters have a gradient on another process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], processes: Processes) -> None:
        self.parameters, self.processes = list(parameters), processes
        self._checked: list[bool] | None = None

    def __call__(self) -> None:
        """Put the sum in the place of the own gradients."""
        present = [parameter.grad is not None for parameter in self.parameters]
        if present != self._checked:
            if any(others != present for others in self.processes.gather(present)):
                raise TrainingError(
                    "the processes of this run have gradients for different parameters",
                    expected="a network and a method that use the same parameters whatever the images are",
                    hint="the same command without torchrun",
                )
            self._checked = present
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        for dtype in {gradient.dtype: None for gradient in gradients}:
            self.processes.sum_([gradient for gradient in gradients if gradient.dtype == dtype])


class _GatherRows(torch.autograd.Function):
    """See `Processes.gather_rows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, processes: _Several, sizes: list[int]) -> Tensor:
        ctx.start, ctx.count, ctx.scale = sum(sizes[: processes.rank]), len(rows), processes.world_size
        return processes.all_rows(rows, sizes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.start : ctx.start + ctx.count] * ctx.scale, None, None


@torch.no_grad()
def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy one long vector back into the tensors that it was made of."""
    for entry, values in zip(tensors, flat.split([entry.numel() for entry in tensors]), strict=True):
        entry.copy_(values.view(entry.shape))


def _portable(error: BaseException) -> BaseException:
    """The error as another process can be told of it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _lost(problem: str) -> LostProcess:
    return LostProcess(
        problem,
        expected="all processes of a run to live until it is done",
        hint="the same command; it goes on from the last checkpoint",
    )


def _end_at_once(message: str = "") -> NoReturn:
    """End this process without waiting for its threads, its device and the other processes."""
    if message:
        print(f"vkd: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1)
