"""One run from a config to its directory: data, teacher, student, training, result."""

from __future__ import annotations

import dataclasses
import logging
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vkd.config import TEACHERS_STUDY, Config, StudentConfig, fingerprint, run_identity
from vkd.data import Data, Normalization, load_data
from vkd.divergences import make_divergence
from vkd.errors import ConfigError
from vkd.methods import METHODS, Combination, MethodContext, make_method
from vkd.models import Intermediates, count_parameters, create_model, save_weights
from vkd.randomness import derive_seed, generator
from vkd.records.atomic import write_json_atomically
from vkd.records.run_directory import DONE, FAILED, INTERRUPTED, RUNNING, RunDirectory
from vkd.tracking import TRACKERS, Tracker
from vkd.training.display import make_display
from vkd.training.environment import choose_device, environment
from vkd.training.learner import Learner
from vkd.training.measurement import Evaluator
from vkd.training.optimization import Schedule, make_optimizer
from vkd.training.precision import Precision
from vkd.training.session import Record, Session
from vkd.training.teacher import (
    Teacher,
    freeze,
    open_teacher,
    open_untrained,
    open_weights,
    teacher_identity,
    teacher_normalization,
)
from vkd.training.trainer import Trainer

logger = logging.getLogger("vkd")


@dataclass
class Outcome:
    """What became of a run.

    directory: where its files are.
    skipped: it had been done before.
    """

    directory: RunDirectory
    skipped: bool = False


def run(config: Config, *, console: Console, should_stop: Callable[[], bool] = lambda: False) -> Outcome:
    """Do the run that `config` describes: from its last checkpoint if there is one, not at all if it is done.

    Everything that can be wrong with the input is found before the run directory is made.

    Raises UserError for wrong input, Interrupted when asked to stop; any exception after the directory is made leaves
    its traceback there.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1"):
        # Each of them would do the whole run by itself.
        raise ConfigError(
            f"a launcher such as torchrun started {processes} processes for one run",
            expected="one process a run",
            hint="python -m vkd.train, without the launcher",
        )
    device = choose_device(config.device)
    views = max((METHODS[name].views for name in config.method), default=1)
    data = load_data(config.dataset, config.data_root, device=device, workers=config.workers, views=views)
    for note in data.notes:
        logger.info("%s", note)
    return _Run(config, data, device, console, should_stop).do()


def teacher_training_config(config: Config) -> Config:
    """The plain run that trains the teacher of `config`, where nothing else gives it.

    It has the teacher's own recipe and seed, and float32 whatever the student's precision, so that every student of a
    study learns from the same teacher.
    """
    return dataclasses.replace(
        config,
        study=TEACHERS_STUDY,
        seed=config.teacher.seed,
        precision="fp32",
        student=StudentConfig(arch=config.teacher.arch),
        method={},
        divergence={},
        cross_entropy_weight=1.0,
        recipe=config.teacher.recipe,
        keep_checkpoint=False,
    )


def directory_of(config: Config, run_fingerprint: str) -> RunDirectory:
    """Where the files of a run belong."""
    return RunDirectory.of(
        runs_root=config.runs_root,
        study=config.study or config.dataset.name,
        teacher=None if config.is_plain else config.teacher.arch,
        student=config.student.arch,
        methods=list(config.method),
        divergence=config.divergence.get("name"),
        seed=config.seed,
        fingerprint=run_fingerprint,
    )


@dataclass
class _OpenedTeacher:
    """A teacher's network before it is frozen: its weights' sha256, where they come from, whether they saw val."""

    model: torch.nn.Module
    sha256: str
    source: str
    saw_val: bool | str

    def freeze(self, config: Config, data: Data, device: torch.device) -> Teacher:
        return freeze(
            self.model, config, data, source=self.source, sha256=self.sha256, saw_val=self.saw_val, device=device
        )


def _open_given(config: Config, data: Data) -> _OpenedTeacher:
    return _OpenedTeacher(*open_teacher(config, data), saw_val="unknown")


def _open_trained(config: Config, data: Data, directory: RunDirectory) -> _OpenedTeacher:
    return _OpenedTeacher(*open_weights(config, data, directory.weights), source="trained", saw_val=False)


def find_teacher(config: Config, data: Data, *, device: torch.device) -> Teacher | None:
    """The teacher of a run that has been done, without training one; None where its weights are no longer there.

    Raises ModelError when they are there and unusable.
    """
    teacher = config.teacher
    if teacher.is_given:
        if teacher.checkpoint is not None and not Path(teacher.checkpoint).exists():
            return None
        return _open_given(config, data).freeze(config, data, device)
    own = teacher_training_config(config)
    directory = directory_of(own, fingerprint(run_identity(own, data=data.identity, teacher=None)))
    if not directory.is_done():
        return None
    return _open_trained(config, data, directory).freeze(config, data, device)


class _Run:
    def __init__(
        self, config: Config, data: Data, device: torch.device, console: Console, should_stop: Callable[[], bool]
    ) -> None:
        self.config = config
        self.data = data
        self.device = device
        self.console = console
        self.should_stop = should_stop

    def do(self) -> Outcome:
        config, data = self.config, self.data
        student = create_model(
            config.student.arch,
            num_classes=data.num_classes,
            in_channels=data.channels,
            image_size=data.image_size,
            seed=derive_seed(config.seed, "student"),
        )
        opened, weights = None, None
        self._check_recipe(student)
        if not config.is_plain:
            opened, weights = self._find_teacher(student)
        identity = run_identity(config, data=data.identity, teacher=weights)
        group = fingerprint({key: value for key, value in identity.items() if key != "seed"})
        directory = directory_of(config, fingerprint(identity))
        if directory.is_done():
            # A teacher that is there is nothing to speak of: the runs that use it say so.
            if config.study != TEACHERS_STUDY:
                logger.info("already done: %s", directory.path)
            return Outcome(directory, skipped=True)
        teacher = None if opened is None else self._freeze(opened)
        learner = self._learner(student, teacher)
        directory.create()
        with directory.held(wait=config.study == TEACHERS_STUDY), directory.logged():
            # Whoever held the directory before may have finished the run.
            if directory.is_done():
                return Outcome(directory, skipped=True)
            directory.write_config(config.as_dict())
            try:
                self._train(directory, learner, teacher, fingerprint(identity), group)
            except BaseException as error:
                self._record_end(directory, error)
                raise
        return Outcome(directory)

    def _check_recipe(self, student: torch.nn.Module) -> None:
        """Raise ConfigError where data or network refuse the recipe, before a teacher is trained for nothing."""
        config, recipe = self.config, self.config.recipe
        self.data.steps_per_epoch(recipe.batch_size, recipe.drop_last)
        where = "teacher.recipe" if config.study == TEACHERS_STUDY else "recipe"
        Schedule(recipe, make_optimizer(recipe, student, where=where), where=where)
        if not config.is_plain and config.teacher.mean is not None:
            Normalization(config.teacher.mean, config.teacher.std, self.data.channels, key="teacher")

    def _record_end(self, directory: RunDirectory, error: BaseException) -> None:
        """Leave in the directory why the run ended early. Whoever called says it to the user."""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, KeyboardInterrupt):
            directory.write_state(INTERRUPTED, reason=reason, epochs=self.config.recipe.epochs)
        else:
            text = traceback.format_exc()
            directory.write_state(FAILED, reason=reason, traceback=text, epochs=self.config.recipe.epochs)
            logger.debug("failed\n%s", text)

    def _learner(self, student: torch.nn.Module, teacher: Teacher | None) -> Learner:
        config = self.config
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        student = student.to(self.device, memory_format=layout)
        method, intermediates, teacher_intermediates = self._method(student, None if teacher is None else teacher.model)
        if teacher is not None:
            teacher.intermediates = teacher_intermediates
        return Learner(
            student,
            method.to(self.device),
            config.recipe,
            precision=Precision(config.precision, self.device),
            cross_entropy_weight=config.cross_entropy_weight,
            seed=config.seed,
            device=self.device,
            intermediates=intermediates,
            compile=config.compile,
        )

    def _find_teacher(self, student: torch.nn.Module) -> tuple[_OpenedTeacher, dict[str, Any]]:
        """The teacher and what identifies it, training it first where nothing else gives it.

        A trained teacher is identified by the run that trains it, a given one by its weights. Whether the method can
        serve the pair is found out before a teacher is trained or measured.
        """
        config, data = self.config, self.data
        if config.teacher.is_given:
            opened = _open_given(config, data)
            weights = {"sha256": opened.sha256}
            self._method(student, opened.model)
        else:
            self._method(student, open_untrained(config, data))
            own = teacher_training_config(config)
            weights = {"fingerprint": fingerprint(run_identity(own, data=data.identity, teacher=None))}
            outcome = _Run(own, data, self.device, self.console, self.should_stop).do()
            opened = _open_trained(config, data, outcome.directory)
        normalization = teacher_normalization(config.teacher, opened.model, data)
        return opened, teacher_identity(config.teacher.arch, normalization, weights)

    def _freeze(self, opened: _OpenedTeacher) -> Teacher:
        teacher = opened.freeze(self.config, self.data, self.device)
        figures = ", ".join(f"{split} {value:.2f} %" for split, value in teacher.accuracy.items() if value is not None)
        logger.info("teacher %s (%s): %s", teacher.arch, teacher.source, figures)
        if teacher.saw_val == "unknown":
            logger.info("it may have been trained on the images of val, so its val figure may be inflated")
        return teacher

    def _train(
        self, directory: RunDirectory, learner: Learner, teacher: Teacher | None, run_id: str, group: str
    ) -> None:
        config, data, recipe = self.config, self.data, self.config.recipe
        self._announce(directory)
        normalization = Normalization(data.mean, data.std, data.channels).to(self.device)
        evaluator = Evaluator(
            data,
            normalization,
            teacher_logits={} if teacher is None else teacher.logits,
            batch_size=config.evaluation_batch_size,
            device=self.device,
        )
        study = config.study or config.dataset.name
        tracker: Tracker = TRACKERS[config.tracker.name](config, directory.path, name=directory.path.name, study=study)
        session = Session(
            learner,
            evaluator,
            fingerprint=run_id,
            checkpoint_path=directory.checkpoint,
            on_epoch=lambda line: self._epoch_done(directory, tracker, session, line),
        )
        display = make_display(self.console)
        finished = False
        try:
            if session.restore():
                epoch, step = session.position
                logger.info("going on after step %d of epoch %d", step, epoch)
                for line in session.history:
                    tracker.log(line)
            directory.write_metrics(session.history)
            directory.write_state(RUNNING, epoch=session.position[0] - 1, epochs=recipe.epochs)
            trainer = Trainer(
                [session],
                teacher=teacher,
                data=data,
                recipe=recipe,
                normalization=normalization,
                seed=config.seed,
                device=self.device,
                display=display,
                should_stop=self.should_stop,
                channels_last=config.channels_last,
            )
            (record,) = trainer.fit()
            self._write_result(directory, learner, teacher, record, run_id, group)
            tracker.finish(record.metrics)
            finished = True
        finally:
            display.close()
            if not finished:
                tracker.finish({}, failed=True)

    def _announce(self, directory: RunDirectory) -> None:
        config, data = self.config, self.data
        sizes = ", ".join(f"{data.sizes[split]:,} {split}" for split in ("train", "val", "test") if split in data.sizes)
        logger.info("run %s", directory.path)
        logger.info(
            "%s: %d classes, %s images, %s; %s on %s", data.name, data.num_classes, sizes, data.loading,
            config.precision, self.device,
        )  # fmt: skip
        late = [epoch for epoch in config.recipe.milestones if epoch >= config.recipe.epochs]
        if config.recipe.scheduler == "multistep" and late:
            logger.warning("the rate never drops at %s: training ends after epoch %d", late, config.recipe.epochs)

    def _method(
        self, student: torch.nn.Module, teacher: torch.nn.Module | None
    ) -> tuple[Combination, Intermediates | None, Intermediates | None]:
        """How the student is taught, and what gives the features of student and teacher where that needs them.

        Raises UserError where the method cannot serve this pair.
        """
        config, data = self.config, self.data
        if teacher is None:
            return Combination({}), None, None
        divergence = None
        if config.divergence:
            divergence = make_divergence(**config.divergence)
        image_shape = (data.channels, *data.image_size)
        intermediates, teacher_intermediates = None, None
        if any(METHODS[name].needs_features for name in config.method):
            size = teacher_normalization(config.teacher, teacher, data).image_size or data.image_size
            intermediates = Intermediates(student, image_shape, arch=config.student.arch)
            teacher_intermediates = Intermediates(teacher, (data.channels, *size), arch=config.teacher.arch)
        context = MethodContext(
            divergence=divergence,
            num_classes=data.num_classes,
            train_size=data.train_size,
            epochs=config.recipe.epochs,
            steps_per_epoch=data.steps_per_epoch(config.recipe.batch_size, config.recipe.drop_last),
            student=student,
            teacher=teacher,
            image_shape=image_shape,
            generator=generator(config.seed, "method"),
            student_features=None if intermediates is None else intermediates.shapes,
            teacher_features=None if teacher_intermediates is None else teacher_intermediates.shapes,
            train_targets=data.train_targets,
        )
        return make_method(config.method, context, config.seed), intermediates, teacher_intermediates

    def _epoch_done(self, directory: RunDirectory, tracker: Tracker, session: Session, line: dict[str, Any]) -> None:
        directory.write_metrics(session.history)
        directory.write_state(RUNNING, epoch=line["epoch"], epochs=self.config.recipe.epochs)
        tracker.log(line)

    def _write_result(
        self,
        directory: RunDirectory,
        learner: Learner,
        teacher: Teacher | None,
        record: Record,
        run_id: str,
        group: str,
    ) -> None:
        config, data = self.config, self.data
        model = learner.evaluated_model
        save_weights(
            model,
            directory.weights,
            {"arch": config.student.arch, "num_classes": str(data.num_classes), "fingerprint": run_id},
        )
        result = {
            "format": 1,
            "fingerprint": run_id,
            "group": group,
            "study": config.study or config.dataset.name,
            "dataset": {
                "name": data.name,
                "identity": data.identity,
                "val_fraction": config.dataset.val_fraction,
                **({} if config.dataset.train_fraction == 1 else {"train_fraction": config.dataset.train_fraction}),
                "classes": data.num_classes,
                **{split: data.sizes.get(split, 0) for split in ("train", "val", "test")},
            },
            "teacher": None if teacher is None else teacher.as_record(),
            "student": {"arch": config.student.arch, "parameters": count_parameters(model)},
            "method": config.method,
            "cross_entropy_weight": config.cross_entropy_weight,
            "divergence": config.divergence or None,
            "seed": config.seed,
            "recipe": dataclasses.asdict(config.recipe),
            "precision": config.precision,
            "metrics": record.metrics,
            "timing": record.timing,
            "environment": environment(self.device),
        }
        write_json_atomically(directory.result, result)
        directory.write_state(DONE, epoch=config.recipe.epochs, epochs=config.recipe.epochs)
        if not config.keep_checkpoint:
            directory.checkpoint.unlink(missing_ok=True)
        shown = {"val": record.metrics["val/top1"], "test": record.metrics["test/top1"]}
        figures = ", ".join(f"{split} {value:.2f} %" for split, value in shown.items() if value is not None)
        logger.info("done: %s in %.1f s; %s", figures, record.timing["seconds"], directory.result)
