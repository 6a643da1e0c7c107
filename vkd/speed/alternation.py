"""Measures several loops in turn in one process, so that whatever the machine does meanwhile befalls them alike.

One alternation runs every part once, each over the same number of steps, and the next one begins with another part. A
part's rate is the images of its timed steps by their seconds; the device is waited for before and after. What two parts
have to do with each other is the ratio of their rates within an alternation, of which the median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from vkd.speed.memory import weigh
from vkd.speed.separate import SeparateLoop
from vkd.training.clock import synchronize

WARM_UP_STEPS = 5
"""Steps of each part before anything is measured: they pay for allocation, algorithm choice, compilation, capture."""

CALIBRATION_STEPS = 5
MOST_STEPS = 5000


@dataclass
class Part:
    """One of the loops that are compared.

    name: as in the tables.
    images_per_step: images that one step learns from, once for each student.
    take_steps: take so many steps.
    loop: whatever holds the part's tensors between steps, to weigh it.
    running: the context in which steps are taken; it ends what would otherwise go on beside the other parts.
    """

    name: str
    images_per_step: int
    take_steps: Callable[[int], None]
    loop: Any
    running: Callable[[], AbstractContextManager[Any]] = nullcontext

    def weigh(self, device: torch.device) -> dict[str, int | None]:
        """Its memory; see `vkd.speed.memory.weigh`."""
        if isinstance(self.loop, SeparateLoop):
            return self.loop.weigh()
        return weigh(self.loop, self.take_steps, self.running, device)


@dataclass
class Rates:
    """What an alternation measured: steps timed at a time, and each part's images a second, one value a repetition."""

    steps: int
    images_per_second: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some values."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


def ratio(rates: Mapping[str, Sequence[float]], part: str, other: str) -> Spread | None:
    """By how much `part` is faster than `other`, repetition by repetition; None where one was not measured."""
    if not rates.get(part) or not rates.get(other):
        return None
    return Spread.of([mine / others for mine, others in zip(rates[part], rates[other], strict=True)])


def alternate(
    parts: Sequence[Part],
    *,
    device: torch.device,
    repetitions: int,
    steps: int | None,
    seconds: float,
    settling_steps: int,
    on_progress: Callable[[str], None] = lambda said: None,
) -> Rates:
    """Measure the parts in turn.

    Args:
        parts: at least one, of different names.
        device: where they run.
        repetitions: alternations, each of which gives one value a part.
        steps: timed steps of a part in an alternation; None for as many as take the first part about `seconds`.
        seconds: see `steps`.
        settling_steps: untimed steps before the timed ones, in which workers start and whatever queues they fill
            reaches the level at which the part keeps it.
        on_progress: told what is being done.
    """
    for part in parts:
        on_progress(f"warming up: {part.name}")
        with part.running():
            part.take_steps(WARM_UP_STEPS)
            synchronize(device)
    if steps is None:
        pace = _seconds_of(parts[0], CALIBRATION_STEPS, settling_steps, device) / CALIBRATION_STEPS
        steps = max(1, min(MOST_STEPS, round(seconds / pace)))
    rates = Rates(steps, {part.name: [] for part in parts})
    for repetition in range(repetitions):
        on_progress(f"alternation {repetition + 1} of {repetitions}, {steps} steps each")
        first = repetition % len(parts)
        for part in [*parts[first:], *parts[:first]]:
            took = _seconds_of(part, steps, settling_steps, device)
            rates.images_per_second[part.name].append(steps * part.images_per_step / took)
    return rates


def _seconds_of(part: Part, steps: int, settling_steps: int, device: torch.device) -> float:
    """How long so many steps take, once the part runs as steadily as it will."""
    with part.running():
        part.take_steps(settling_steps)
        synchronize(device)
        started = time.perf_counter()
        part.take_steps(steps)
        synchronize(device)
        return time.perf_counter() - started
