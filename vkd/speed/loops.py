"""The loops that are compared, made from one config: vkd's own, the classic one and the bound."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vkd.composition import compose_config
from vkd.config import Config, parse
from vkd.data.augmentation import build_augmentations
from vkd.data.sources import ImageArrays, load_source
from vkd.data.streaming import INTERPOLATIONS
from vkd.errors import ConfigError
from vkd.methods import METHODS
from vkd.models import create_model, save_weights
from vkd.speed.alternation import Part
from vkd.speed.bound import BoundLoop
from vkd.speed.classic import ClassicLoop, PhotoDataset, make_transform
from vkd.speed.separate import SeparateLoop
from vkd.training.assembly import Workplace, assemble
from vkd.training.environment import choose_device
from vkd.training.teacher import open_untrained, teacher_normalization
from vkd.training.trainer import Trainer

LOOPS = {
    "classic": "the classic loop: PIL transforms, fp32",
    "run": "vkd's run",
    "cached": "vkd's run, teacher's views all cached",
    "fused": "vkd's students side by side",
    "bound": "the bound: networks, loss, optimizer",
    "plain": "vkd's run without a teacher",
}
"""What can be compared, by name."""

ROWS_AT_ONCE = 1 << 16
"""Rows of the teacher's table that are filled at a time."""


def as_measured(config: Config, folder: Path) -> Config:
    """The config of the loops that are compared, whose files lie in `folder`.

    Every step has a whole batch. The teacher is asked anew each time, and may be as bad as it likes: its weights decide
    no speed, so that one without weights of its own gets random ones.

    Raises ConfigError where the config has no teacher, or a method that a step of one view does not serve.
    """
    if config.is_plain:
        raise ConfigError(
            "method=none has no teacher, and the benchmark compares distillation",
            expected="a method, kd by default; the part `plain` measures training without a teacher beside it",
            hint="python -m vkd.benchmark without method=none",
        )
    for name in config.method:
        if METHODS[name].views > 1:
            raise ConfigError(
                f"method={name} learns from {METHODS[name].views} views of each image, and the benchmark compares "
                "steps over one",
                expected="a method of one view, such as kd or dkd",
            )
    recipe = dataclasses.replace(config.recipe, drop_last=True)
    teacher = dataclasses.replace(config.teacher, allow_chance_accuracy=True, cache="none")
    return dataclasses.replace(config, runs_root=str(folder), recipe=recipe, teacher=teacher)


class Loops:
    """Makes the loops, which share the data set and the teacher.

    Args:
        config: from `as_measured`.
        students: K, of the loop `fused`.

    Raises UserError where data, networks or config do not fit.
    """

    def __init__(self, config: Config, students: int) -> None:
        self.students = students
        self.workplace = Workplace()
        self.device = choose_device(config.device)
        self.data = self.workplace.data(config, self.device, 1)
        self.data.steps_per_epoch(config.recipe.batch_size, drop_last=True)
        self.has_random_teacher = not config.teacher.is_given
        if self.has_random_teacher:
            path = Path(config.runs_root, "teacher.safetensors")
            save_weights(open_untrained(config, self.data), path, {})
            teacher = dataclasses.replace(config.teacher, checkpoint=str(path))
            config = dataclasses.replace(config, teacher=teacher)
        self.config = config
        self._separate: SeparateLoop | None = None
        self.switches: str | None = None
        """Which switches are on in the loops with a teacher, as soon as one of them is made."""

    def make(self, name: str) -> Part:
        """The loop called `name` in `LOOPS`. Raises UserError where this config has no such loop."""
        makers: dict[str, Callable[[], Part]] = {
            "classic": self._classic,
            "run": lambda: self._trained("run", [self.config]),
            "cached": self._cached,
            "fused": lambda: self._trained("fused", grid(self.config, self.students)),
            "bound": self._bound,
            "plain": lambda: self._trained("plain", [_without_teacher(self.config)]),
        }
        return makers[name]()

    def _trained(self, name: str, configs: Sequence[Config]) -> Part:
        trainer = self._assemble(configs)
        return self._part(name, trainer, trainer.take_steps, students=len(configs))

    def _cached(self) -> Part:
        teacher = dataclasses.replace(self.config.teacher, cache="views")
        # Parsed once more, since not every method can do with a cache.
        config = parse(dataclasses.replace(self.config, teacher=teacher).as_dict())
        trainer = self._assemble([config])
        fill_views(trainer)
        return self._part("cached", trainer, trainer.take_steps)

    def _bound(self) -> Part:
        loop = self.bound()
        return self._part("bound", loop, loop.take_steps)

    def bound(self, *, compiled: bool = True) -> BoundLoop:
        """The bound; with `compiled` false, no network of it is compiled whatever the config says."""
        config = self.config
        if not compiled:
            teacher = dataclasses.replace(config.teacher, compile=False)
            config = dataclasses.replace(config, teacher=teacher, compile=False)
        return BoundLoop(self._assemble([config]))

    def _assemble(self, configs: Sequence[Config]) -> Trainer:
        trainer = assemble(configs, self.workplace)
        if self.switches is None and not configs[0].is_plain:
            self.switches = trainer.switches.describe()
        return trainer

    def _part(self, name: str, loop: object, take_steps: Callable[[int], None], students: int = 1) -> Part:
        return Part(name, students * self.config.recipe.batch_size, take_steps, loop)

    def _classic(self) -> Part:
        loop = self._separate = SeparateLoop(make_classic_loop, self.config)
        return Part("classic", self.config.recipe.batch_size, loop.take_steps, loop, running=loop.running)

    def close(self) -> None:
        """End the processes that the loops have."""
        if self._separate is not None:
            self._separate.close()

    def classic_loop(self) -> ClassicLoop:
        """The classic loop, in this process."""
        config, data = self.config, self.data
        student, teacher = (
            create_model(
                arch,
                num_classes=data.num_classes,
                in_channels=data.channels,
                image_size=size or data.image_size,
                seed=0,
            )
            for arch, size in ((config.student.arch, None), (config.teacher.arch, self._teacher_size()))
        )
        source = load_source(config.dataset, Path(config.data_root).expanduser())
        own_sizes = not isinstance(source.train, ImageArrays)
        transform = make_transform(
            build_augmentations(config.dataset.augmentation, data.loading, channels=data.channels),
            data.image_size,
            data.mean,
            data.std,
            crop_fraction=config.dataset.crop_fraction if own_sizes else None,
            interpolation=INTERPOLATIONS[config.dataset.interpolation],
        )
        return ClassicLoop(
            student,
            teacher,
            PhotoDataset(source.train, transform),
            batch_size=config.recipe.batch_size,
            workers=config.workers,
            device=self.device,
            learning_rate=config.recipe.learning_rate,
            momentum=config.recipe.momentum,
            weight_decay=config.recipe.weight_decay,
            teacher_image_size=self._teacher_size(),
        )

    def _teacher_size(self) -> tuple[int, int] | None:
        """(height, width) that the teacher's images are resized to; None where they stay as they are."""
        # The network matters for the normalisation alone, which costs the same whatever its constants are.
        return teacher_normalization(self.config.teacher, torch.nn.Identity(), self.data).image_size


def make_classic_loop(config: Config) -> ClassicLoop:
    """The classic loop of a config from `Loops.config`; for another process."""
    return Loops(config, students=1).classic_loop()


def _without_teacher(config: Config) -> Config:
    """Plain training, of the same student by the same recipe."""
    return dataclasses.replace(config, method={}, divergence={}, teacher=None, cross_entropy_weight=1.0)


def grid(config: Config, students: int) -> list[Config]:
    """The first `students` points of the smallest square grid of (alpha, beta) that has as many: alpha from 0.6 to 1,
    beta from 0 to 0.4, all of one method and one teacher.

    Raises ConfigError where no method uses a divergence.
    """
    if not any(METHODS[name].uses_divergence for name in config.method):
        raise ConfigError(
            f"method={','.join(config.method)} compares no distributions, so there is no grid of alpha and beta",
            expected="a method with a divergence for the part `fused`, such as kd",
        )
    defaults = parse(compose_config(["divergence=abkd"])).divergence
    temperature = config.divergence["temperature"]
    side = math.ceil(math.sqrt(students))
    points = [
        (0.6 + 0.4 * row / max(1, side - 1), 0.4 * column / max(1, side - 1))
        for row in range(side)
        for column in range(side)
    ]
    return [
        dataclasses.replace(config, divergence={**defaults, "temperature": temperature, "alpha": alpha, "beta": beta})
        for alpha, beta in points[:students]
    ]


def fill_views(trainer: Trainer) -> None:
    """Fill the trainer's table of the teacher's logits, with random ones: how fast they are read is all that counts."""
    views = trainer.teacher.views
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(min(ROWS_AT_ONCE, views.rows), views.classes, generator=random).to(views.device)
    for start in range(0, views.rows, ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, views.rows))
        views.store(rows, logits[: len(rows)])
    views.flush()
