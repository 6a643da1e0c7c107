"""The loop: batches of data, one teacher forward for each, and every student in training learns from them.

It knows no Hydra, no config file and no run directory layout; it can be stopped after any step and goes on exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from vkd.config import RecipeConfig
from vkd.data import Data, Normalization
from vkd.data.batches import ImageBatch
from vkd.methods import Output, Progress
from vkd.training.clock import synchronize
from vkd.training.distribution import ONE, Processes
from vkd.training.graphs import Capture, CudaCapture, StaticBatch
from vkd.training.interruption import Interrupted
from vkd.training.session import Record, Session
from vkd.training.switches import Switches
from vkd.training.teacher import Teacher

UNTIMED_STEPS = 3
"""Steps of a process that the clock leaves out: they pay for allocation, algorithm choice and compilation."""

CHECK_EVERY = 100
"""Steps between looks at the device for a loss that is not finite."""


FAILURES = (Exception, SystemExit)
"""What makes a student fail, and no other one beside it: a library that wants to exit is no more than that."""


class Display(Protocol):
    """Who shows progress. Nothing it does changes a number."""

    def epoch_started(self, epoch: int, epochs: int, first_step: int, steps: int) -> None:
        """An epoch of `steps` steps begins, or goes on at `first_step`."""

    def step_done(self, images: int, figures: Callable[[], dict[str, float]]) -> None:
        """A step over `images` images is done; `figures()` gives the running means, and waits for the device."""

    def epoch_done(self, figures: dict[str, float | None]) -> None:
        """An epoch is complete, with its line of metrics."""


class Trainer:
    """Trains students side by side on one stream of batches. One student is the usual case.

    They share the batches and what the teacher says about them, and nothing else: each has its own weights, optimizer,
    gradient scaler and random numbers, so what becomes of one changes no digit of another. Students that stand at
    different steps, as a kill leaves them, are brought together: those that are behind train alone until they have
    caught up.

    Args:
        sessions: the students in training, with their records and checkpoints.
        teacher: the frozen teacher; None for plain training.
        data: the data set.
        recipe: epochs and batch size; the same for all sessions.
        normalization: of the students' input.
        seed: decides the order and augmentation of the data.
        device: where everything runs.
        display: who shows progress.
        should_stop: asked after every step; true ends training with a checkpoint and `Interrupted`.
        switches: of speed; of them, how images are laid out and whether steps are captured are its part.
        on_failure: told of a student that cannot go on, with the error; the others go on without it. None: the error is
            raised.
        capture: records steps; None for CUDA graphs where the switches say so, and for none elsewhere.
        checkpoint_seconds: time between checkpoints within an epoch; None: there is one at its end alone.
        processes: those that train together; each has a share of every batch. They stop, and keep checkpoints, after
            the same steps; a student that cannot go on ends the training then, whatever `on_failure` is.

    Raises ConfigError when the batch size leaves an epoch no step, or cannot be shared out.
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        *,
        teacher: Teacher | None,
        data: Data,
        recipe: RecipeConfig,
        normalization: Normalization,
        seed: int,
        device: torch.device,
        display: Display,
        should_stop: Callable[[], bool] = lambda: False,
        switches: Switches | None = None,
        on_failure: Callable[[Session, BaseException], None] | None = None,
        capture: Capture | None = None,
        checkpoint_seconds: float | None = None,
        processes: Processes = ONE,
    ) -> None:
        self.sessions = list(sessions)
        self.teacher = teacher
        self.data = data
        self.recipe = recipe
        self.normalization = normalization
        self.seed = seed
        self.device = device
        self.display = display
        self.should_stop = should_stop
        self.switches = switches
        self.layout = torch.contiguous_format if switches is None else switches.layout
        self.processes = processes
        self.on_failure = None if processes.several else on_failure
        self.capture = CudaCapture(device) if capture is None and switches is not None and switches.graphs else capture
        self.checkpoint_seconds = checkpoint_seconds
        self.views = max((session.learner.method.views for session in self.sessions), default=1)
        self.steps_per_epoch = data.steps_per_epoch(recipe.batch_size, recipe.drop_last, processes.world_size)
        self._steps_of_this_process = 0
        self._saved_at = time.perf_counter()
        self._failed: set[Session] = set()
        self._endless: Iterator[int] | None = None
        self._static: StaticBatch | None = None

    def fit(self) -> list[Record | None]:
        """Train to the end, from wherever the sessions stand, and give each session's record; None where one failed.

        Raises TrainingError when a loss is not finite and nobody is to be told of it, Interrupted when asked to stop.
        """
        self._saved_at = time.perf_counter()
        try:
            self._train()
        finally:
            self._release_graphs()
        return [None if session in self._failed else session.record() for session in self.sessions]

    def _train(self) -> None:
        while sessions := [session for session in self._going_on() if session.position[0] <= self.recipe.epochs]:
            epoch, step = min(session.position for session in sessions)
            self._train_epoch(epoch, step)
            for session in self._taking_part(epoch + 1, 0):
                with self._isolated(session), session.voice():
                    session.finish_epoch(epoch)
                    self.display.epoch_done(session.history[-1])
            self._saved_at = time.perf_counter()
            if self.processes.agree(self.should_stop()) and epoch < self.recipe.epochs:
                raise Interrupted(f"stopped after epoch {epoch}")

    def _release_graphs(self) -> None:
        """Free the memory of captured steps now; left to the garbage collector it would miss in the next run."""
        if self._static is not None:
            self._static.release()
            self._static = None
        for session in self.sessions:
            session.learner.release_graph()

    def take_steps(self, count: int) -> None:
        """The next `count` training steps, running on into the epochs to come; nothing is measured, saved or shown."""
        if self._endless is None:
            self._endless = self._steps_without_end()
        for _ in range(count):
            next(self._endless)

    def _steps_without_end(self) -> Iterator[int]:
        epoch, step = self.sessions[0].position
        while True:
            yield from self._steps(epoch, step)
            epoch, step = epoch + 1, 0

    def _going_on(self) -> list[Session]:
        return [session for session in self.sessions if session not in self._failed]

    def _taking_part(self, epoch: int, step: int) -> list[Session]:
        """The sessions that have not done step `step` (from 1) of `epoch`; step 0 is the end of the epoch before."""
        return [session for session in self._going_on() if session.position < (epoch, step)]

    @contextmanager
    def _isolated(self, session: Session) -> Iterator[None]:
        """Keep what goes wrong with one student from the others."""
        try:
            yield
        except FAILURES as error:
            if self.on_failure is None:
                raise
            self._failed.add(session)
            self.on_failure(session, error)

    def _train_epoch(self, epoch: int, first_step: int) -> None:
        self.display.epoch_started(epoch, self.recipe.epochs, first_step, self.steps_per_epoch)
        started, timed_images, step = time.perf_counter(), 0, first_step
        for step, images in enumerate(self._steps(epoch, first_step), start=first_step + 1):
            timed_images += images
            self._steps_of_this_process += 1
            if self._steps_of_this_process == UNTIMED_STEPS:
                synchronize(self.device)
                started, timed_images = time.perf_counter(), 0
            if not (sessions := self._taking_part(epoch, step)):
                continue  # nobody is left of those that were behind, and the others come later in the epoch
            self.display.step_done(images, sessions[0].learner.running_figures)
            if step % CHECK_EVERY == 0 or step == self.steps_per_epoch:
                self._check_finite(sessions)
            stop, due = self.processes.flags(self.should_stop(), self._checkpoint_is_due())
            if stop:
                self.processes.settle()
                self._count_time(epoch, first_step, started, timed_images)
                self._save(epoch, step)
                raise Interrupted(f"stopped after step {step} of epoch {epoch}")
            if due and step < self.steps_per_epoch:
                synchronize(self.device)
                before = time.perf_counter()
                self._save(epoch, step)
                # Writing is no part of the steps' time.
                started += time.perf_counter() - before
        self.processes.settle()
        self._count_time(epoch, first_step, started, timed_images)

    def _steps(self, epoch: int, first_step: int) -> Iterator[int]:
        """Every step of an epoch behind its first `first_step`: how many images it saw, once it is done.

        Of several processes those of all.
        """
        batches = self.data.train_batches(
            seed=self.seed,
            epoch=epoch,
            batch_size=self.recipe.batch_size,
            drop_last=self.recipe.drop_last,
            start_step=first_step,
            views=self.views,
            part=self.processes.part,
        )
        total = self.recipe.epochs * self.steps_per_epoch
        for step, batch in enumerate(batches, start=first_step + 1):
            whole = min(self.recipe.batch_size, self.data.train_size - (step - 1) * self.recipe.batch_size)
            if not (sessions := self._taking_part(epoch, step)):
                yield whole
                continue
            progress = Progress(epoch, self.recipe.epochs, (epoch - 1) * self.steps_per_epoch + step, total)
            static = self._placed(batch)
            (images, teacher_output), *others = self._see(batch) if static is None else static.views
            read, how = (batch, {}) if static is None else (static, {"capture": self.capture})
            for session in sessions:
                with self._isolated(session), session.voice():
                    session.learner.step(
                        images, teacher_output, read.targets, read.indices, progress, others, whole=whole, **how
                    )
            yield whole

    def _see(self, batch: ImageBatch) -> list[tuple[Tensor, Output | None]]:
        """For each view of a batch what the students see, and what the teacher says about it."""
        seen = []
        for number, pixels in enumerate((batch.images, *batch.views)):
            images = self._look(pixels)
            rows = batch.view_rows if number == 0 else None
            seen.append((images, None if self.teacher is None else self.teacher(pixels, images, rows)))
        return seen

    def _look(self, pixels: Tensor) -> Tensor:
        return self.normalization(pixels).contiguous(memory_format=self.layout)

    def _placed(self, batch: ImageBatch) -> StaticBatch | None:
        """The batch where captured steps read it; None where they are not to be captured, as that of a short batch."""
        if self.capture is None or len(batch.targets) != self.recipe.batch_size:
            return None
        if self._static is not None:
            self._static.load(batch)
            return self._static
        has_views = self.teacher is not None and self.teacher.views is not None
        self._static = StaticBatch(
            batch,
            self._see(batch),
            look=self._look,
            ask=lambda pixels, images, rows, out: self.teacher(pixels, images, rows, out),
            capture=self.capture,
            device=self.device,
            obstacle="its logits come from a table that the host looks into" if has_views else None,
        )
        return self._static

    def _check_finite(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            with self._isolated(session):
                session.learner.check_finite()

    def _count_time(self, epoch: int, first_step: int, started: float, images: int) -> None:
        """Tell those that were there from the first of these steps how long they took and how many images they saw."""
        synchronize(self.device)
        seconds = time.perf_counter() - started
        if self._steps_of_this_process <= UNTIMED_STEPS:
            seconds, images = 0.0, 0
        for session in self._taking_part(epoch, first_step + 1):
            session.add_training_time(seconds, images)

    def _checkpoint_is_due(self) -> bool:
        """Whether it is time for a checkpoint, by the first process's clock, which begins anew then."""
        now = time.perf_counter()
        if self.checkpoint_seconds is None or now - self._saved_at < self.checkpoint_seconds:
            return False
        self._saved_at = now
        return self.processes.is_first

    def _save(self, epoch: int, step: int) -> None:
        """Write the checkpoints of all that have done this step."""
        for session in self._taking_part(epoch, step):
            with self._isolated(session), session.voice():
                session.learner.check_finite()
                session.save(epoch, step)
        self._saved_at = time.perf_counter()
