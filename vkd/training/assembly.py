"""From configs to students in training: what runs of one process share, and what each has of its own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vkd import launched
from vkd.config import Config, fingerprint
from vkd.data import Data, Normalization, load_data
from vkd.divergences import make_divergence
from vkd.errors import ConfigError
from vkd.methods import METHODS, Combination, MethodContext, make_method
from vkd.models import Intermediates, count_macs, create_model
from vkd.randomness import derive_seed, generator
from vkd.training.allocator import keep_freed_memory
from vkd.training.batch_norm import synchronized
from vkd.training.display import Silent
from vkd.training.distribution import ONE, Processes, join
from vkd.training.environment import choose_device
from vkd.training.learner import Learner
from vkd.training.measurement import Evaluator
from vkd.training.precision import Precision
from vkd.training.session import Session
from vkd.training.switches import Switches, choose_switches
from vkd.training.teacher import Teacher, freeze, open_teacher, teacher_normalization
from vkd.training.teacher_views import TeacherViews, require_discrete
from vkd.training.trainer import Display, Trainer

logger = logging.getLogger("vkd")

VIEWS_FOLDER = ".teacher_views"
"""Below the runs root, where the teachers' logits are kept."""


class Workplace:
    """What the runs of one process share: the data set and the teacher that were used last.

    A sweep's runs mostly have one data set and one teacher, which are then read, measured and made fast once.
    """

    def __init__(self) -> None:
        self._data: tuple[str, Data] | None = None
        self._teacher: tuple[str, Teacher] | None = None

    def data(self, config: Config, device: torch.device, views: int) -> Data:
        """The data set of `config`, loaded for up to `views` views of each image. Raises as `load_data` does."""
        # As text, since the order of augmentations counts, which the comparison of mappings passes over.
        wanted = repr((config.dataset, config.data_root, device, config.workers))
        if self._data is None or self._data[0] != wanted or (views > 1 and not self._data[1].has_views):
            self._data = None  # let go of the one before first: two may not fit
            self._data = (
                wanted,
                load_data(config.dataset, config.data_root, device=device, workers=config.workers, views=views),
            )
        return self._data[1]

    def teacher(self, wanted: Any, make: Callable[[], Teacher]) -> Teacher:
        """The teacher that was used last, if `wanted` (whatever decides it) reads as it did then; else a new one."""
        if self._teacher is None or self._teacher[0] != repr(wanted):
            self._teacher = None
            self._teacher = (repr(wanted), make())
        return self._teacher[1]


@dataclass
class OpenedTeacher:
    """A teacher's network before it is frozen: its weights' sha256, where they come from, whether they saw val."""

    model: nn.Module
    sha256: str
    source: str
    saw_val: bool | str

    def freeze(
        self,
        config: Config,
        data: Data,
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
        *,
        measure: bool = True,
        processes: Processes = ONE,
    ) -> Teacher:
        """The teacher, measured on `val` and `test`; see `vkd.training.teacher.freeze`."""
        return freeze(
            self.model,
            config,
            data,
            source=self.source,
            sha256=self.sha256,
            saw_val=self.saw_val,
            device=device,
            layout=layout,
            measure=measure,
            processes=processes,
        )


def open_given(config: Config, data: Data) -> OpenedTeacher:
    """The teacher that the config names weights of. Raises ModelError where they do not fit."""
    return OpenedTeacher(*open_teacher(config, data), saw_val="unknown")


@dataclass
class Setting:
    """What students that train side by side share.

    data, device: what they are trained on.
    switches: of speed; None until a student is there to decide them by (`decide`).
    teacher: None in plain training, and until it is made.
    processes: those that train together.
    """

    data: Data
    device: torch.device
    switches: Switches | None = None
    teacher: Teacher | None = None
    processes: Processes = ONE

    def decide(self, config: Config, student: nn.Module) -> None:
        """Choose the switches for students like this one, and throw those of the whole process.

        Raises ConfigError for an impossible one.
        """
        self.switches = choose_switches(config, self.device, student)
        if self.processes.several and self.switches.graphs:
            logger.info("graphs=true: no steps are captured where several processes add up their gradients")
            self.switches = dataclasses.replace(self.switches, graphs=False)
        if self.switches.keep_freed_memory:
            keep_freed_memory()

    def normalization(self) -> Normalization:
        """Of the students' input."""
        made = Normalization(self.data.mean, self.data.std, self.data.channels, memory_format=self.switches.layout)
        return made.to(self.device)


def views_of(config: Config) -> int:
    """How many views of each image the methods of a config want."""
    return max((METHODS[name].views for name in config.method), default=1)


def needs_features(config: Config) -> bool:
    """Whether any of its methods looks at features."""
    return any(METHODS[name].needs_features for name in config.method)


def open_setting(config: Config, workplace: Workplace, views: int) -> Setting:
    """Processes, device and data of a config; switches and teacher come later.

    Raises UserError where they are not there, or do not fit each other.
    """
    processes = join()
    processes.require_all()
    device = choose_device(config.device, processes)
    if processes.several and device.type == "cuda":
        torch.cuda.set_device(device)
    if config.teacher is not None and config.teacher.cache == "views" and not launched.is_on_one_machine():
        raise ConfigError(
            "teacher.cache=views keeps the teacher's logits in a folder of one machine, and this run has several",
            expected="processes on one machine, or a teacher that is asked anew",
            hint="teacher.cache=none",
        )
    return Setting(workplace.data(config, device, views), device, processes=processes)


def make_student(config: Config, data: Data) -> nn.Module:
    """The student with its first weights, on the CPU. Raises ModelError where it does not fit the data."""
    return create_model(
        config.student.arch,
        num_classes=data.num_classes,
        in_channels=data.channels,
        image_size=data.image_size,
        seed=derive_seed(config.seed, "student"),
    )


def make_methods(
    config: Config, data: Data, student: nn.Module, teacher: nn.Module | None, world_size: int = 1
) -> tuple[Combination, Intermediates | None]:
    """How the student is taught, and what gives its features where that needs them.

    Args:
        world_size: number of processes that train together.

    Raises UserError where the method cannot serve this pair.
    """
    if teacher is None:
        return Combination({}), None
    divergence = make_divergence(**config.divergence) if config.divergence else None
    image_shape = (data.channels, *data.image_size)
    intermediates, teacher_intermediates = None, None
    if needs_features(config):
        size = teacher_normalization(config.teacher, teacher, data).image_size or data.image_size
        intermediates = Intermediates(student, image_shape, arch=config.student.arch)
        teacher_intermediates = Intermediates(teacher, (data.channels, *size), arch=config.teacher.arch)
    context = MethodContext(
        divergence=divergence,
        num_classes=data.num_classes,
        train_size=data.train_size,
        epochs=config.recipe.epochs,
        steps_per_epoch=data.steps_per_epoch(config.recipe.batch_size, config.recipe.drop_last, world_size),
        student=student,
        teacher=teacher,
        image_shape=image_shape,
        generator=generator(config.seed, "method"),
        student_features=None if intermediates is None else intermediates.shapes,
        teacher_features=None if teacher_intermediates is None else teacher_intermediates.shapes,
        train_targets=data.train_targets,
    )
    return make_method(config.method, context, config.seed), intermediates


def make_teacher(
    config: Config,
    setting: Setting,
    workplace: Workplace,
    opened: OpenedTeacher,
    identity: dict[str, Any],
    *,
    measure: bool = True,
) -> Teacher:
    """The opened teacher frozen, measured and made fast, or the one of the run before, where it is the same.

    Args:
        identity: what the fingerprint takes of it.
        measure: whether its accuracy is wanted.
    """
    data, switches, processes = setting.data, setting.switches, setting.processes
    features = needs_features(config)

    def make() -> Teacher:
        teacher = opened.freeze(config, data, setting.device, switches.layout, measure=measure, processes=processes)
        batch_size = max(processes.sizes(config.recipe.batch_size))
        images = next(iter(data.eval_batches("test", batch_size=min(16, batch_size)))).images
        teacher.macs = count_macs(teacher.model, teacher.normalization(images[:1]))
        teacher = teacher.made_fast(switches, images, batch_size=batch_size, needs_features=features)
        if switches.cache == "views":
            teacher.views = _open_views(config, setting, teacher)
        return teacher

    wanted = (
        measure,
        identity,
        opened.source,
        data.identity,
        dataclasses.asdict(config.dataset),
        setting.device,
        switches,
        features,
        config.recipe.batch_size,
        config.evaluation_batch_size,
        config.runs_root,
        # What the switches say decides, not whether the config left it to them.
        dataclasses.asdict(dataclasses.replace(config.teacher, fold=True, compile=None, cache="none")),
    )
    return workplace.teacher(wanted, make)


def _open_views(config: Config, setting: Setting, teacher: Teacher) -> TeacherViews:
    """The table of the teacher's logits, in a folder of its own for whatever changes a digit of them."""
    data, switches = setting.data, setting.switches
    require_discrete(data)
    dataset, normalization = config.dataset, teacher.normalization
    identity = {
        "teacher": {"arch": teacher.arch, "sha256": teacher.sha256},
        "data": data.identity,
        "split": [dataset.val_fraction, dataset.train_fraction, dataset.split_seed],
        "augmentation": list(dataset.augmentation.items()),
        "mean": list(normalization.mean),
        "std": list(normalization.std),
        "image_size": list(normalization.image_size or data.image_size),
        "dtype": config.teacher.cache_dtype,
        # These decide how the logits are rounded.
        "precision": config.precision,
        "folded": switches.fold,
        "compiled": teacher.padded_to > 0,
        "channels_last": switches.channels_last,
        "device": setting.device.type,
        "torch": str(torch.__version__),
    }
    return TeacherViews.open(
        Path(config.runs_root) / VIEWS_FOLDER / f"{teacher.arch}-{fingerprint(identity)[:16]}",
        rows=data.train_size * data.view_count,
        classes=data.num_classes,
        dtype=getattr(torch, config.teacher.cache_dtype),
        identity=identity,
        device=setting.device,
    )


def make_learner(config: Config, setting: Setting, student: nn.Module) -> Learner:
    """The student in training, on its device. Raises UserError where the method cannot serve the pair."""
    device, processes, teacher = setting.device, setting.processes, setting.teacher
    student = student.to(device, memory_format=setting.switches.layout)
    over_all = processes.several and config.sync_batch_norm
    if over_all:
        student = synchronized(student, processes, device)
    method, intermediates = make_methods(
        config, setting.data, student, None if teacher is None else teacher.model, processes.world_size
    )
    method = method.to(device)
    if over_all:
        for name, entry in method.methods.items():
            if entry.per_image:  # the others see the whole batch anyway
                method.methods[name] = synchronized(entry, processes, device)
    return Learner(
        student,
        method,
        config.recipe,
        precision=Precision(config.precision, setting.device),
        cross_entropy_weight=config.cross_entropy_weight,
        seed=config.seed,
        device=device,
        intermediates=intermediates,
        compile=setting.switches.compile_student,
        fused_optimizer=setting.switches.fused_optimizer,
        capturable_optimizer=setting.switches.graphs,
        processes=processes,
    )


def make_session(config: Config, setting: Setting, learner: Learner, **options: Any) -> Session:
    """A learner with what measures it; `options` are those of `Session`."""
    evaluator = Evaluator(
        setting.data,
        setting.normalization(),
        teacher_logits={} if setting.teacher is None else setting.teacher.logits,
        batch_size=config.evaluation_batch_size,
        device=setting.device,
        processes=setting.processes,
    )
    return Session(learner, evaluator, details=evaluator.details, **options)


def make_trainer(
    config: Config,
    setting: Setting,
    sessions: Sequence[Session],
    *,
    display: Display,
    should_stop: Callable[[], bool] = lambda: False,
    on_failure: Callable[[Session, BaseException], None] | None = None,
) -> Trainer:
    """The loop over students in training that share a setting."""
    return Trainer(
        sessions,
        teacher=setting.teacher,
        data=setting.data,
        recipe=config.recipe,
        normalization=setting.normalization(),
        seed=config.seed,
        device=setting.device,
        display=display,
        should_stop=should_stop,
        switches=setting.switches,
        on_failure=on_failure,
        checkpoint_seconds=None if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes,
        processes=setting.processes,
    )


def assemble(configs: Sequence[Config], workplace: Workplace) -> Trainer:
    """A trainer of students side by side that leave no files: for measuring how fast their steps are.

    Args:
        configs: they differ in method and divergence alone, and their teacher's weights are given.

    Raises UserError for wrong input.
    """
    first = configs[0]
    setting = open_setting(first, workplace, max(views_of(config) for config in configs))
    students = [make_student(config, setting.data) for config in configs]
    setting.decide(first, students[0])
    if not first.is_plain:
        opened = open_given(first, setting.data)
        identity = {"sha256": opened.sha256}
        setting.teacher = make_teacher(first, setting, workplace, opened, identity, measure=False)
    learners = [make_learner(config, setting, student) for config, student in zip(configs, students, strict=True)]
    sessions = [make_session(first, setting, learner, fingerprint="") for learner in learners]
    return make_trainer(first, setting, sessions, display=Silent())
