"""The loop: batches of data, one teacher forward for each, and every student in training learns from them.

It knows no Hydra, no config file and no run directory layout; it can be stopped after any step and goes on exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vkd.config import RecipeConfig
from vkd.data import Data, Normalization
from vkd.errors import TrainingError
from vkd.methods import Output, Progress
from vkd.training.interruption import Interrupted
from vkd.training.session import Record, Session
from vkd.training.teacher import Teacher

UNTIMED_STEPS = 3
"""Steps of a process that the clock leaves out: they pay for allocation, algorithm choice and compilation."""

CHECK_EVERY = 100
"""Steps between looks at the device for a loss that is not finite."""


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
        channels_last: lay images out as the processor's convolutions like them.

    Raises ConfigError when the batch size leaves an epoch no step.
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
        channels_last: bool = False,
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
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.views = max((session.learner.method.views for session in self.sessions), default=1)
        self.steps_per_epoch = data.steps_per_epoch(recipe.batch_size, recipe.drop_last)
        self._steps_of_this_process = 0

    def fit(self) -> list[Record]:
        """Train to the end, from wherever the sessions stand, and give each session's record.

        Raises TrainingError when a loss is not finite or the sessions stand at different steps, Interrupted when asked
        to stop.
        """
        positions = {session.position for session in self.sessions}
        if len(positions) > 1:
            raise TrainingError(
                f"students that train side by side stand at different (epoch, step): {sorted(positions)}",
                expected="checkpoints of one moment",
                hint="remove their checkpoints to start them again",
            )
        epoch, step = self.sessions[0].position
        while epoch <= self.recipe.epochs:
            self._train_epoch(epoch, step)
            for session in self.sessions:
                session.finish_epoch(epoch)
            self.display.epoch_done(self.sessions[0].history[-1])
            epoch, step = epoch + 1, 0
            if self.should_stop() and epoch <= self.recipe.epochs:
                raise Interrupted(f"stopped after epoch {epoch - 1}")
        return [session.record() for session in self.sessions]

    def _train_epoch(self, epoch: int, first_step: int) -> None:
        self.display.epoch_started(epoch, self.recipe.epochs, first_step, self.steps_per_epoch)
        batches = self.data.train_batches(
            seed=self.seed,
            epoch=epoch,
            batch_size=self.recipe.batch_size,
            drop_last=self.recipe.drop_last,
            start_step=first_step,
            views=self.views,
        )
        total = self.recipe.epochs * self.steps_per_epoch
        started, timed_images = time.perf_counter(), 0
        for step, batch in enumerate(batches, start=first_step + 1):
            progress = Progress(epoch, self.recipe.epochs, (epoch - 1) * self.steps_per_epoch + step, total)
            (images, teacher_output), *others = [self._view(view) for view in (batch.images, *batch.views)]
            for session in self.sessions:
                session.learner.step(images, teacher_output, batch.targets, batch.indices, progress, others)
            timed_images += len(batch.targets)
            self._steps_of_this_process += 1
            if self._steps_of_this_process == UNTIMED_STEPS:
                self._synchronize()
                started, timed_images = time.perf_counter(), 0
            self.display.step_done(len(batch.targets), self.sessions[0].learner.epoch_figures)
            if step % CHECK_EVERY == 0 or step == self.steps_per_epoch:
                for session in self.sessions:
                    session.learner.check_finite()
            if self.should_stop():
                self._count_time(started, timed_images)
                self._stop(epoch, step)
        self._count_time(started, timed_images)

    def _view(self, pixels: Tensor) -> tuple[Tensor, Output | None]:
        """One view of a batch, uint8 [B, C, H, W]: what the students see, and what the teacher says about it."""
        images = self.normalization(pixels).contiguous(memory_format=self.layout)
        return images, None if self.teacher is None else self.teacher(pixels, images)

    def _count_time(self, started: float, images: int) -> None:
        self._synchronize()
        seconds = time.perf_counter() - started
        if self._steps_of_this_process <= UNTIMED_STEPS:
            seconds, images = 0.0, 0
        for session in self.sessions:
            session.add_training_time(seconds, images)

    def _stop(self, epoch: int, step: int) -> None:
        for session in self.sessions:
            session.learner.check_finite()
            session.save(epoch, step)
        raise Interrupted(f"stopped after step {step} of epoch {epoch}")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
