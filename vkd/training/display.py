"""How progress is shown: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger("vkd")

SECONDS_BETWEEN_FIGURES = 1.0
"""How often a bar asks for the running means, each time at the price of a synchronisation."""


def describe_epoch(line: dict[str, Any], epochs: int) -> str:
    """One line about an epoch: its losses, accuracies in percent, images a second."""
    means = {name.removeprefix("train/"): value for name, value in line.items() if name.startswith("train/")}
    losses = [f"{name} {value:.4f}" for name, value in _losses(means).items()]
    accuracies = [
        f"{split} {line[f'{split}/top1']:.2f} %"
        for split in ("train", "val", "test")
        if line.get(f"{split}/top1") is not None
    ]
    rate = line.get("images_per_second")
    speed = [f"{rate:,.0f} images/s"] if rate else []
    return f"epoch {line['epoch']}/{epochs}  " + "  ".join(losses + accuracies + speed)


def _losses(means: dict[str, float]) -> dict[str, float]:
    """The total and its terms; a single term without the total, which it is."""
    losses = {name: value for name, value in means.items() if name != "top1"}
    if len(losses) == 2:
        del losses["loss"]
    return losses


class LineDisplay:
    """A plain line an epoch."""

    def epoch_started(self, epoch: int, epochs: int, first_step: int, steps: int) -> None:
        """Remember how many epochs there are."""
        self.epochs = epochs

    def step_done(self, images: int, figures: Callable[[], dict[str, float]]) -> None:
        """Nothing is shown within an epoch."""

    def epoch_done(self, figures: dict[str, Any]) -> None:
        """Say what the epoch gave."""
        logger.info(describe_epoch(figures, self.epochs))

    def close(self) -> None:
        """Nothing is open."""


class Silent(LineDisplay):
    """Shows nothing."""

    def epoch_done(self, figures: dict[str, Any]) -> None:
        """Nothing."""


class BarDisplay(LineDisplay):
    """A bar over all the steps of the run, with the epoch, loss terms, accuracy, images a second and the time left."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
        )
        self.task = None
        self._images, self._since = 0, time.perf_counter()
        self._last_step = self._since

    def epoch_started(self, epoch: int, epochs: int, first_step: int, steps: int) -> None:
        """Put the bar where the run stands."""
        super().epoch_started(epoch, epochs, first_step, steps)
        done = (epoch - 1) * steps + first_step
        if self.task is None:
            self.task = self.progress.add_task("", total=epochs * steps, completed=done, figures="")
            self.progress.start()
        self.progress.update(self.task, description=f"epoch {epoch}/{epochs}", completed=done)
        # What passed since the last step was no training.
        self._since += time.perf_counter() - self._last_step

    def step_done(self, images: int, figures: Callable[[], dict[str, float]]) -> None:
        """Move the bar; about once a second, refresh the figures beside it."""
        self.progress.advance(self.task)
        self._images += images
        elapsed = time.perf_counter() - self._since
        if elapsed >= SECONDS_BETWEEN_FIGURES:
            means = figures()
            shown = [f"{self._images / elapsed:,.0f} images/s", f"train {means['top1']:.1f} %"]
            shown += [f"{name} {value:.3f}" for name, value in _losses(means).items()]
            self.progress.update(self.task, figures="  ".join(shown))
            self._images, self._since = 0, time.perf_counter()
        self._last_step = time.perf_counter()

    def close(self) -> None:
        """Take the bar away."""
        self.progress.stop()


def make_display(console: Console) -> LineDisplay:
    """Bars where there is a terminal to draw them on, lines elsewhere."""
    return BarDisplay(console) if console.is_terminal else LineDisplay()
