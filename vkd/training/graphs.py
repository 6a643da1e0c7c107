"""CUDA graphs: the kernels of a step are recorded once, and from then on launched by a single call.

A graph repeats what was recorded on the memory on which it was recorded. So whatever it reads lies in tensors that stay
where they are and are filled anew (`StaticBatch`), and whatever it took from the host, such as the learning rate, is
its key: with another one it is recorded again. Students that train side by side share one graph of their teacher, whose
outputs are overwritten by its next replay; all that read them are launched before that, in the order of the stream.

No graph is trusted: its first replay is compared with the same step taken eagerly, on another batch than that of the
recording, from the same weights, optimizer state and random numbers. Where they differ, or where recording fails,
training goes on eagerly from the eager step, and the log says so.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vkd.data.batches import ImageBatch
from vkd.errors import TrainingError
from vkd.methods import Combination, Output
from vkd.training.precision import Precision
from vkd.training.random_states import get_states, set_states

logger = logging.getLogger("vkd")

WARM_UP_STEPS = 3
"""Eager steps ahead of the first recording: they create the optimizer's state, and let libraries choose algorithms."""

FORWARD_TOLERANCE = 1e-2
"""How far what a replayed forward pass gives may be from the eager one, relative to how far that moved it: as far as
bfloat16 rounds, should another algorithm be chosen."""

BACKWARD_TOLERANCE = 5e-2
"""The same behind a backward pass: some kernels add up in no fixed order there, and Adam enlarges the rounding errors
of gradients that should be 0. A step on another batch differs by more."""


class Replayable(Protocol):
    """Work that was recorded."""

    def replay(self) -> None:
        """Do it again, on what its tensors hold now."""


class Capture(Protocol):
    """Records work on the device."""

    def run(self, function: Callable[[], object]) -> None:
        """Do the work of `function` as it will be recorded, but eagerly."""

    def capture(self, function: Callable[[], object]) -> Replayable:
        """Record the work of `function` without doing it. Raises whatever stands in the way."""


class CudaCapture:
    """Records CUDA graphs, which share the memory that they need while they run.

    They may share it because they never run at the same time, and none of them leaves anything there that another one
    reads: what outlives a graph lies in tensors from outside.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._pool_holder: torch.cuda.CUDAGraph | None = None

    def run(self, function: Callable[[], object]) -> None:
        """Run `function` on the stream on which graphs are recorded, as CUDA wants it ahead of a recording."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            function()
        here.wait_stream(self.stream)

    def capture(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """A graph of what `function` launches. Raises RuntimeError where that cannot be recorded."""
        if self._pool_holder is None:
            # Shared memory lives as long as one graph that has a part in it, so an empty one holds it.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
                self._pool = torch.cuda.graph_pool_handle()
                self._pool_holder = self._record(lambda: None)
        return self._record(function)

    def _record(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            try:
                # Threads that load data meanwhile may do what they like: none of it is recorded.
                with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
                    function()
            finally:
                # torch leaves the recording's stream in place where ending the recording fails.
                torch.cuda.set_stream(here)
                torch.cuda.synchronize()
        return graph


class NotCapturable(Exception):
    """Why something is not to be captured."""


@dataclass
class Written:
    """Some of the tensors that a step writes.

    name: what they are, for the log.
    tensors: always in the same order.
    tolerance: of what a replay changes in them, relative to that.
    """

    name: str
    tensors: Sequence[Tensor]
    tolerance: float


class Graphed:
    """A function that is replayed, once it has been recorded and the recording was checked; until then it runs eagerly.

    Args:
        name: whose work it is, for the log.
        function: does the work, on the inputs that a call is given; it changes tensors in place and returns nothing.
        written: the tensors that it changes.
        baked: from the inputs, everything that a recording takes from the host, to compare by `==`; or raises
            NotCapturable.
        capture: records.
        device: where the work is done.
        obstacle: why it must always run eagerly; None where it need not.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Any], None],
        *,
        written: Callable[[], Sequence[Written]],
        baked: Callable[[Any], Any],
        capture: Capture,
        device: torch.device,
        obstacle: str | None = None,
    ) -> None:
        self.name = name
        self.capture = capture
        self._function, self._written, self._baked, self._device = function, written, baked, device
        self._warmed_up = 0
        self._recorded: tuple[Replayable, Any] | None = None  # with the inputs, whose memory it reads
        self._key: Any = None
        self._is_checked = False
        self.runs_eagerly = False
        """Whether capturing has been given up."""
        if obstacle is not None:
            self._give_up(obstacle, logging.INFO)

    def __call__(self, inputs: Any) -> None:
        """Do the work on `inputs`, whose tensors are those of every other call, filled anew."""
        if self.runs_eagerly:
            self._function(inputs)
            return
        if self._recorded is not None and self._key != self._baked(inputs):
            self._recorded = None
        if self._recorded is None:
            self._run_and_record(inputs)
        elif not self._is_checked:
            self._run_and_check(inputs)
        else:
            self._recorded[0].replay()

    def _run_and_record(self, inputs: Any) -> None:
        places, host_numbers = self._places(), torch.get_rng_state()
        self.capture.run(partial(self._function, inputs))
        self._warmed_up += 1
        if self._warmed_up < WARM_UP_STEPS:
            return
        moved, places = places != self._places(), self._places()
        drew_on_host = self._device.type != "cpu" and not torch.equal(host_numbers, torch.get_rng_state())
        try:
            if moved:
                raise NotCapturable("it puts new tensors in the place of others")
            if drew_on_host:
                raise NotCapturable("it draws random numbers on the host")
            self._record(inputs)
        except NotCapturable as reason:
            self._give_up(str(reason), logging.INFO)
        except Exception as error:
            self._give_up(f"recording it failed: {first_cause(error)}", logging.WARNING)
        if places != self._places():
            # A recording computes nothing, so what came of it there has no values.
            raise TrainingError(
                f"{self.name} changed when it was recorded in a CUDA graph: tensors took the place of others",
                expected="a step that changes its tensors in place",
                hint="graphs=false",
            )

    def _record(self, inputs: Any) -> None:
        self._key = self._baked(inputs)
        random = get_states(self._device)
        try:
            self._recorded = self.capture.capture(partial(self._function, inputs)), inputs
        finally:
            set_states(random, self._device)
        self._is_checked = False

    def _run_and_check(self, inputs: Any) -> None:
        before, random_before = self._copies(), get_states(self._device)
        self.capture.run(partial(self._function, inputs))
        eager, random_eager = self._copies(), get_states(self._device)
        self._put(before)
        set_states(random_before, self._device)
        try:
            self._recorded[0].replay()
            fault = self._fault(before, eager)
        except Exception as error:
            fault = f"replaying it failed: {first_cause(error)}"
        if fault is None:
            self._is_checked = True
            return
        self._put(eager)
        set_states(random_eager, self._device)
        self._give_up(fault, logging.WARNING)

    def _give_up(self, reason: str, level: int) -> None:
        self.runs_eagerly, self._recorded = True, None
        logger.log(level, "%s runs without a CUDA graph: %s", self.name, reason)

    def _places(self) -> list[Any]:
        """Where the tensors that are written lie."""
        return [(part.name, [entry.data_ptr() for entry in part.tensors]) for part in self._written()]

    @torch.no_grad()
    def _copies(self) -> list[list[Tensor]]:
        return [[entry.detach().clone() for entry in part.tensors] for part in self._written()]

    @torch.no_grad()
    def _put(self, copies: list[list[Tensor]]) -> None:
        for part, values in zip(self._written(), copies, strict=True):
            for entry, value in zip(part.tensors, values, strict=True):
                entry.copy_(value)

    def _fault(self, before: list[list[Tensor]], eager: list[list[Tensor]]) -> str | None:
        """In what the tensors are not what they were to become, from `before` to `eager`; None where they are."""
        for part, old, expected in zip(self._written(), before, eager, strict=True):
            moves = [_Move.of(*entries) for entries in zip(part.tensors, old, expected, strict=True)]
            error, change, rounding = (
                math.hypot(*(getattr(move, name) for move in moves)) for name in ("error", "change", "rounding")
            )
            # Not a comparison of the errors of each: a single tensor may hold rounding errors and nothing else.
            if not (error <= part.tolerance * change + rounding and all(move.is_of_size for move in moves)):
                return f"its first replay and the same step taken eagerly differ in {part.name}"
        return None


@dataclass
class _Move:
    """How far a tensor moved, as Euclidean lengths.

    change: in the eager step.
    replayed: in the replayed one.
    error: from where the eager step took it to where it is.
    rounding: of storing numbers of its size.
    """

    change: float
    replayed: float
    error: float
    rounding: float

    @classmethod
    @torch.no_grad()
    def of(cls, now: Tensor, before: Tensor, expected: Tensor) -> _Move:
        precision = torch.finfo(now.dtype).eps if now.is_floating_point() else 0.0
        now, before, expected = (entry.detach().double() for entry in (now, before, expected))
        lengths = (expected - before, now - before, now - expected, precision * expected)
        return cls(*torch.stack([torch.linalg.vector_norm(entry) for entry in lengths]).tolist())

    @property
    def is_of_size(self) -> bool:
        """Whether both steps moved it about as far."""
        return self.change / 2 - self.rounding <= self.replayed <= 2 * self.change + self.rounding


def first_cause(error: BaseException) -> str:
    """The first line of what went wrong first: what ends a failed recording says that it failed, and not why."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class Watched:
    """Gives the attributes of an object, and notes which were asked for.

    Args:
        watched: the object.
        read: takes their names.
    """

    def __init__(self, watched: object, read: set[str]) -> None:
        self._watched, self._read = watched, read

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._watched, name)


def step_obstacle(
    method: Combination, optimizer: torch.optim.Optimizer, precision: Precision, device: torch.device
) -> str | None:
    """Why a student's steps can be in no graph; None where nothing is known that speaks against it."""
    if precision.scaler is not None:
        return f"precision={precision.name} looks at the gradient on the host"
    # What a method does not promise it may do; a recording would repeat its decisions and draws of one single step.
    unsafe = [name for name, entry in method.methods.items() if not getattr(entry, "capturable", False)]
    if unsafe:
        return f"method={','.join(unsafe)} decides or draws on the host"
    if not _steps_on_device(optimizer, device):
        return f"the optimizer {type(optimizer).__name__} computes on the host"
    return None


def _steps_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether an optimizer's step takes nothing from the host but what stands in its parameter groups."""
    if type(optimizer) is torch.optim.SGD:
        return True
    if not type(optimizer).__module__.startswith("torch.optim."):
        return False
    # Those of torch that have the option count their steps on the host without it. On a CPU torch refuses it.
    wanted = (True,) if device.type == "cuda" else (True, False)
    return all(group.get("capturable") in wanted for group in optimizer.param_groups)


class StaticBatch:
    """The batch of a step and what the networks are shown of it, in tensors that stay where they are.

    Args:
        batch: one of the batches, for the shapes.
        views: for each of its views the students' images and the teacher's output (None without a teacher).
        look: gives the images of a view for the students, from its pixels.
        ask: writes the teacher's output on a view into the output that it is given, from its pixels, the students'
            images and the rows of the teacher's table.
        capture: records both.
        device: where everything lies.
        obstacle: why the two cannot be recorded; None where they can.

    Attributes:
        targets, indices: [B].
        views: as above.
    """

    def __init__(
        self,
        batch: ImageBatch,
        views: Sequence[tuple[Tensor, Output | None]],
        *,
        look: Callable[[Tensor], Tensor],
        ask: Callable[[Tensor, Tensor, Tensor | None, Output], object],
        capture: Capture,
        device: torch.device,
        obstacle: str | None = None,
    ) -> None:
        self.capture = capture
        self.targets, self.indices = batch.targets.clone(), batch.indices.clone()
        self.views = [
            (images.clone(), None if output is None else output.map(Tensor.clone)) for images, output in views
        ]
        self._pixels = [pixels.clone() for pixels in (batch.images, *batch.views)]
        self._look, self._ask = look, ask
        self._see: Graphed | None = Graphed(
            "the normalization" if self.views[0][1] is None else "the teacher",
            self._fill,
            written=self._written,
            baked=lambda rows: None,
            capture=capture,
            device=device,
            obstacle=obstacle,
        )

    def release(self) -> None:
        """Let go of the recording and its memory; nothing is loaded any more."""
        self._see = None

    def load(self, batch: ImageBatch) -> None:
        """Put another batch of the same shapes in the place of this one."""
        self.targets.copy_(batch.targets)
        self.indices.copy_(batch.indices)
        for mine, pixels in zip(self._pixels, (batch.images, *batch.views), strict=True):
            mine.copy_(pixels)
        self._see(batch.view_rows)

    @torch.no_grad()
    def _fill(self, rows: Tensor | None) -> None:
        for number, (pixels, (images, output)) in enumerate(zip(self._pixels, self.views, strict=True)):
            images.copy_(self._look(pixels))
            if output is not None:
                self._ask(pixels, images, rows if number == 0 else None, output)

    def _written(self) -> list[Written]:
        parts = [Written("the images", [images for images, _ in self.views], FORWARD_TOLERANCE)]
        outputs = [output.tensors for _, output in self.views if output is not None]
        return parts + [Written("the teacher's outputs", tensors, FORWARD_TOLERANCE) for tensors in outputs]
