"""Runs from configs to their directories: data, teacher, students, training, results."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vkd import launched
from vkd.config import TEACHERS_STUDY, Config, StudentConfig, fingerprint, run_identity
from vkd.data import Data, Normalization
from vkd.errors import ConfigError, ModelError
from vkd.models import count_macs, count_parameters, load_into, load_weights, save_weights, weights_sha256
from vkd.records.atomic import write_json_atomically
from vkd.records.run_directory import DONE, FAILED, INTERRUPTED, RUNNING, WAITING, RunDirectory
from vkd.tracking import TRACKERS, Tracker
from vkd.training.assembly import (
    OpenedTeacher,
    Setting,
    Workplace,
    make_learner,
    make_methods,
    make_session,
    make_student,
    make_teacher,
    make_trainer,
    needs_features,
    open_given,
    open_setting,
    views_of,
)
from vkd.training.checkpoint import previous_checkpoint, remove_checkpoints
from vkd.training.determinism import Determinism, determinism
from vkd.training.display import make_display
from vkd.training.distribution import ONE, Processes, join
from vkd.training.environment import describe_device, environment
from vkd.training.interruption import Interrupted
from vkd.training.learner import Learner
from vkd.training.measurement import evaluation_mode
from vkd.training.memory import available_bytes, learner_bytes, step_bytes
from vkd.training.optimization import Schedule, make_optimizer
from vkd.training.session import Record, Session
from vkd.training.teacher import Teacher, open_untrained, teacher_identity, teacher_normalization
from vkd.training.teacher_views import require_discrete
from vkd.training.trainer import FAILURES

logger = logging.getLogger("vkd")


ONE_STUDENT_HINT = (
    "torchrun without hydra/launcher=..., or python -m vkd.train -m hydra/launcher=fused_ray, which sends groups of "
    "students to the GPUs"
)


@dataclass
class Outcome:
    """What has become of a run.

    state: WAITING, RUNNING, INTERRUPTED, DONE or FAILED.
    directory: where its files are; None as long as that is not known.
    skipped: it had been done before, or by another run of the same command.
    note: what a list of runs should say of it.
    error: why it failed; None where it did not.
    device: in words, once it runs.
    """

    state: str = WAITING
    directory: RunDirectory | None = None
    skipped: bool = False
    note: str = ""
    error: BaseException | None = None
    device: str | None = None


def run(
    config: Config,
    *,
    console: Console,
    should_stop: Callable[[], bool] = lambda: False,
    workplace: Workplace | None = None,
) -> Outcome:
    """Do the run that `config` describes: from its last checkpoint if there is one, not at all if it is done.

    Everything that can be wrong with the input is found before the run directory is made.

    Args:
        config: of the run.
        console: where progress is shown.
        should_stop: asked after every step; true stops with a checkpoint.
        workplace: what is shared with other runs of this process; None shares nothing.

    Raises UserError for wrong input, Interrupted when asked to stop; any exception after the directory is made leaves
    its traceback there.
    """
    (outcome,) = run_together([config], console=console, should_stop=should_stop, workplace=workplace)
    if outcome.error is not None:
        raise outcome.error
    return outcome


def run_together(
    configs: Sequence[Config],
    *,
    console: Console,
    words: Sequence[Sequence[str]] | None = None,
    on_change: Callable[[int, Outcome], None] = lambda place, outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
    workplace: Workplace | None = None,
) -> list[Outcome]:
    """Do runs that share everything but method and divergence: one data pipeline, one teacher, a student each.

    Each run has its own directory, records and checkpoints, as if it had run alone; on a CPU in float32 its numbers are
    those of the run alone, to the last bit. One that fails leaves its traceback and the others as they are.

    Args:
        configs: of the runs; those with the same `shared_part` may be together.
        console, should_stop, workplace: as for `run`.
        words: the command-line words of each; those that not all have are what it is called by.
        on_change: told at once when the state of a run changes, by its place among the configs.

    Raises what concerns all of them: UserError for wrong data or a wrong teacher, Interrupted when asked to stop.
    """
    if len(configs) > 1 and launched.world_size() > 1:
        raise ConfigError(
            f"torchrun started {launched.world_size()} processes for one student, and these are {len(configs)} "
            "students side by side",
            expected="one or the other",
            hint=ONE_STUDENT_HINT,
        )
    processes = join()
    processes.require_all()
    words = words or [[]] * len(configs)
    jobs = [
        _Job(config, own, _label(own, words), partial(on_change, place), processes)
        for place, (config, own) in enumerate(zip(configs, words, strict=True))
    ]
    try:
        # Students that train side by side ask for the same.
        with determinism(jobs[0].config) as found:
            _Group(jobs, console, should_stop, workplace or Workplace(), processes, found).do()
    except FAILURES as error:
        if (explained := processes.explain(error)) is not error:
            raise explained from error
        raise
    return [job.outcome for job in jobs]


def _label(own: Sequence[str], words: Sequence[Sequence[str]]) -> str:
    """What tells a run from the others: those of its words that not all of them have."""
    return " ".join(word for word in own if not all(word in others for others in words))


def shared_part(config: Config) -> tuple[Any, ...]:
    """What two configs must have alike for their students to be trained side by side: all but method and divergence.

    Methods that want the teacher's features, or several views, are kept to themselves, so that what a teacher gives the
    others stays what it would give each alone.
    """
    shared = dataclasses.replace(config, method={}, divergence={}, cross_entropy_weight=None)
    return config.is_plain, needs_features(config), views_of(config), dataclasses.asdict(shared)


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
        teacher=None,
        student=StudentConfig(arch=config.teacher.arch),
        method={},
        divergence={},
        cross_entropy_weight=1.0,
        recipe=config.teacher.recipe,
        keep_checkpoint=False,
        snapshot_every=None,
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


def _was_deterministic(directory: RunDirectory) -> bool:
    """Whether the finished run in a directory was done with deterministic algorithms, as far as its record says."""
    try:
        return json.loads(directory.result.read_text())["environment"]["deterministic"]["asked"] is True
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def _open_trained(config: Config, data: Data, directory: RunDirectory, processes: Processes = ONE) -> OpenedTeacher:
    model = open_untrained(config, data)
    try:
        # The others may be on machines that do not have the file.
        state = processes.first(lambda: load_weights(directory.weights))
        load_into(model, state, arch=config.teacher.arch, source=str(directory.weights))
    except ModelError as error:
        hint = f"remove {directory.path}, and the same command trains the teacher again"
        raise ModelError(error.problem, expected=error.expected, hint=hint) from error
    return OpenedTeacher(model, weights_sha256(model.state_dict()), source="trained", saw_val=False)


def find_teacher(config: Config, data: Data, *, device: torch.device, world_size: int = 1) -> Teacher | None:
    """The teacher of a run that has been done, without training one; None where its weights are no longer there.

    Args:
        config, data: of the run.
        device: where the teacher is wanted.
        world_size: how many processes did the run, and so trained its teacher.

    Raises ModelError when they are there and unusable.
    """
    teacher = config.teacher
    if teacher.is_given:
        if teacher.checkpoint is not None and not Path(teacher.checkpoint).exists():
            return None
        return open_given(config, data).freeze(config, data, device)
    own = teacher_training_config(config)
    identity = run_identity(own, data=data.identity, teacher=None, world_size=world_size)
    directory = directory_of(own, fingerprint(identity))
    if not directory.is_done(with_weights=True):
        return None
    return _open_trained(config, data, directory).freeze(config, data, device)


@dataclass
class _Job:
    """One run among those that are done together.

    words: what it was asked for by.
    label: what it is called by among the others.
    on_change: told what has become of it, whenever that changes.
    outcome: what has become of it.
    ended: it takes no further part, since it is done or has failed.
    entered: its directory is its own by now, so that an error belongs in there.
    repeats: the run of the group that is the same.
    holds: its lock and its log, let go when it ends.
    processes: those that do it together.
    """

    config: Config
    words: Sequence[str]
    label: str
    on_change: Callable[[Outcome], None]
    processes: Processes = ONE
    outcome: Outcome = field(default_factory=Outcome)
    ended: bool = False
    repeats: _Job | None = None
    entered: bool = False
    holds: ExitStack = field(default_factory=ExitStack)
    run_id: str = ""
    group_id: str = ""
    directory: RunDirectory | None = None
    learner: Learner | None = None
    session: Session | None = None
    tracker: Tracker | None = None

    def change(self, state: str, **fields: Any) -> None:
        """Note what has become of it, and tell whoever wants to know."""
        self.outcome = dataclasses.replace(self.outcome, state=state, **fields)
        self.on_change(self.outcome)

    def fail(self, error: BaseException) -> None:
        """Note why it ended, in its directory too where it has one."""
        error = self.processes.explain(error)
        self.ended = True
        if self.entered:
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
            with self.directory.speaking():
                logger.debug("failed\n%s", text)
            self.write_end(FAILED, error, text)
        self.release()
        self.change(FAILED, error=error)

    def interrupt(self, error: BaseException) -> None:
        """Note that it was stopped, and goes on another time."""
        self.ended = True
        self.write_end(INTERRUPTED, error)
        self.release()
        self.change(INTERRUPTED)

    def write_end(self, state: str, error: BaseException, text: str = "") -> None:
        """Write the state of a run that ends before its time, and tell its tracker."""
        if not self.processes.is_first:
            return
        reason = (str(error) or type(error).__name__).splitlines()[0]
        with self.directory.speaking():
            done = None if self.session is None else self.session.position[0] - 1
            try:
                self.directory.write_state(
                    state, epoch=done, epochs=self.config.recipe.epochs, reason=reason, traceback=text
                )
            except OSError as trouble:
                logger.warning("%s could not be told that the run has ended: %s", self.directory.path, trouble)
            if self.tracker is not None:
                self.tracker.finish({}, failed=True)

    def release(self) -> None:
        """Let go of what a run needs while it trains."""
        self.learner = self.session = self.tracker = None
        self.holds.close()

    def is_done(self) -> bool:
        """Whether nothing is left to do. Of a teacher that vkd trains the weights are wanted, and not its result."""
        return self.directory.is_done(with_weights=self.config.study == TEACHERS_STUDY)

    def skip(self, note: str) -> None:
        """It need not be done."""
        self.ended = True
        self.change(DONE, skipped=True, directory=self.directory, note=note)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn an error into this run's failure."""
        try:
            yield
        except FAILURES as error:
            if self.ended:  # what is done is done
                logger.warning("%s is done, but: %s", self.directory.path, error)
            else:
                self.fail(error)


def _macs_of(student: torch.nn.Module, setting: Setting) -> int | None:
    data = setting.data
    image = torch.zeros(1, data.channels, *data.image_size, device=setting.device)
    with evaluation_mode(student):
        return count_macs(student, image)


def _save_student(job: _Job, num_classes: int, model: torch.nn.Module, path: Path, **about: str) -> None:
    origin = {"arch": job.config.student.arch, "num_classes": str(num_classes), "fingerprint": job.run_id}
    save_weights(model, path, {**origin, **about})


class _Group:
    """Runs that are done together; see `run_together`."""

    def __init__(
        self,
        jobs: list[_Job],
        console: Console,
        should_stop: Callable[[], bool],
        workplace: Workplace,
        processes: Processes,
        determinism: Determinism,
    ) -> None:
        self.processes = processes
        self.determinism = determinism
        self.jobs = jobs
        self.config = jobs[0].config
        self.console = console
        self.should_stop = should_stop
        self.workplace = workplace

    @property
    def left(self) -> list[_Job]:
        """The runs that are still to be done."""
        return [job for job in self.jobs if not job.ended]

    def do(self) -> None:
        setting = open_setting(self.config, self.workplace, max(views_of(job.config) for job in self.jobs))
        for note in setting.data.notes:
            logger.info("%s", note)
        student = make_student(self.config, setting.data)
        self._check_recipe(student, setting)
        setting.decide(self.config, student)
        opened, weights = None, None
        if not self.config.is_plain:
            opened, weights = self._find_teacher(setting, student)
        del student
        for job in self.left:
            with job.guarded():
                self._identify(job, setting.data, weights)
        self._skip_repetitions()
        if not self.left:
            return
        if opened is not None:
            setting.teacher = self._make_teacher(setting, opened, weights)
        while self.left:
            chosen = self._as_many_as_fit(setting)
            self._train(chosen, setting)
            for job in chosen:
                if job.outcome.error is not None:
                    # What its traceback names would hold all of these students until the last ones are done.
                    traceback.clear_frames(job.outcome.error.__traceback__)
        for job in self.jobs:
            if job.repeats is not None:
                job.change(job.repeats.outcome.state)

    def _check_recipe(self, student: torch.nn.Module, setting: Setting) -> None:
        """Raise ConfigError where data or network refuse the recipe, before a teacher is trained for nothing."""
        config, recipe = self.config, self.config.recipe
        where = "teacher.recipe" if config.study == TEACHERS_STUDY else "recipe"
        setting.data.steps_per_epoch(
            recipe.batch_size, recipe.drop_last, self.processes.world_size, key=f"{where}.batch_size"
        )
        Schedule(recipe, make_optimizer(recipe, student, where=where), where=where)
        if not config.is_plain and config.teacher.mean is not None:
            Normalization(config.teacher.mean, config.teacher.std, setting.data.channels, key="teacher")

    def _find_teacher(
        self, setting: Setting, student: torch.nn.Module
    ) -> tuple[OpenedTeacher | None, dict[str, Any] | None]:
        """The teacher and what identifies it, training it first where nothing else gives it.

        A trained teacher is identified by the run that trains it, a given one by its weights. Whether the methods can
        serve the pair is found out before a teacher is trained or measured.
        """
        config, data = self.config, setting.data
        opened = open_given(config, data) if config.teacher.is_given else None
        model = open_untrained(config, data) if opened is None else opened.model
        for job in self.left:
            with job.guarded():
                make_methods(job.config, data, student, model, self.processes.world_size)
        if config.teacher.cache == "views":
            require_discrete(data)
        if not self.left:
            return None, None
        if opened is not None:
            weights = {"sha256": opened.sha256}
        else:
            own = teacher_training_config(config)
            identity = run_identity(own, data=data.identity, teacher=None, world_size=self.processes.world_size)
            weights = {"fingerprint": fingerprint(identity)}
            outcome = run(own, console=self.console, should_stop=self.should_stop, workplace=self.workplace)
            opened = _open_trained(config, data, outcome.directory, self.processes)
        normalization = teacher_normalization(config.teacher, opened.model, data)
        return opened, teacher_identity(config.teacher.arch, normalization, weights)

    def _identify(self, job: _Job, data: Data, weights: dict[str, Any] | None) -> None:
        identity = run_identity(job.config, data=data.identity, teacher=weights, world_size=self.processes.world_size)
        job.run_id = fingerprint(identity)
        job.group_id = fingerprint({key: value for key, value in identity.items() if key != "seed"})
        job.directory = directory_of(job.config, job.run_id)
        job.directory.label = job.label

    def _skip_repetitions(self) -> None:
        """End the runs that are done, and those that another one of the group does."""
        seen: dict[str, _Job] = {}
        for job in self.left:
            if self.processes.first(job.is_done):
                job.skip("already done")
                # A teacher that is there is nothing to speak of: the runs that use it say so.
                if job.config.study != TEACHERS_STUDY:
                    logger.info("already done: %s", job.directory.path)
                    if job.config.snapshot_every is not None and not job.directory.snapshots():
                        logger.warning("it was done without snapshots; runs_root=... repeats it elsewhere")
                    if job.config.deterministic and not _was_deterministic(job.directory):
                        logger.warning("it was done without deterministic=true; runs_root=... repeats it elsewhere")
            elif job.run_id in seen:
                job.repeats, job.ended = seen[job.run_id], True
                job.change(WAITING, skipped=True, directory=job.directory, note="the same run as another")
                logger.info("the same run as another of this sweep: %s", job.directory.path)
            else:
                seen[job.run_id] = job

    def _make_teacher(self, setting: Setting, opened: OpenedTeacher, identity: dict[str, Any]) -> Teacher:
        teacher = make_teacher(self.config, setting, self.workplace, opened, identity)
        figures = ", ".join(f"{split} {value:.2f} %" for split, value in teacher.accuracy.items() if value is not None)
        logger.info("teacher %s (%s): %s", teacher.arch, teacher.source, figures)
        if teacher.saw_val == "unknown":
            logger.info("it may have been trained on the images of val, so its val figure may be inflated")
        return teacher

    def _as_many_as_fit(self, setting: Setting) -> list[_Job]:
        """The next runs, with their learners, as many as memory and `students_at_once` allow; at least one."""
        chosen: list[_Job] = []
        most = self.config.students_at_once or len(self.left)
        room: float | None = None
        limit = ""
        for job in self.left:
            if len(chosen) == most:
                limit = "students_at_once"
                break
            with job.guarded():
                job.learner = make_learner(job.config, setting, make_student(job.config, setting.data))
                if len(self.left) > 1 and most > 1:
                    if room is None:
                        room = available_bytes(setting.device) - step_bytes(job.learner, setting, self.config.recipe)
                    room -= learner_bytes(job.learner)
                    if chosen and room < 0:
                        job.learner, limit = None, "memory"
                        break
                chosen.append(job)
        if limit:
            verb = "students are" if len(chosen) > 1 else "student is"
            logger.info("%d %s trained at once, the others after that (%s)", len(chosen), verb, limit)
        return chosen

    def _train(self, chosen: list[_Job], setting: Setting) -> None:
        """Train runs side by side to their results."""
        display = make_display(self.console)
        try:
            for job in chosen:
                with job.guarded():
                    self._enter(job, setting.device)
            jobs = [job for job in chosen if not job.ended]
            if jobs:
                self._announce(jobs, setting)
            self.processes.if_stuck(lambda error: [job.write_end(FAILED, error) for job in jobs if not job.ended])
            for job in jobs:
                with job.guarded(), job.directory.speaking():
                    self._start(job, setting)
            by_session = {job.session: job for job in jobs if not job.ended}
            if not by_session:
                return
            trainer = make_trainer(
                self.config,
                setting,
                list(by_session),
                display=display,
                should_stop=self.should_stop,
                on_failure=lambda session, error: by_session[session].fail(error),
            )
            for job, record in zip(by_session.values(), trainer.fit(), strict=True):
                if record is not None:
                    with job.guarded(), job.directory.speaking():
                        self._finish(job, setting, record, len(by_session))
        except BaseException as error:
            for job in chosen:
                if job.ended or not job.entered:
                    continue
                if isinstance(error, KeyboardInterrupt):
                    job.interrupt(error)
                else:
                    job.fail(error)
            if not isinstance(error, FAILURES):
                raise
        finally:
            self.processes.if_stuck(None)
            display.close()
            if setting.teacher is not None:
                setting.teacher.keep_views()
            for job in chosen:
                job.release()

    def _enter(self, job: _Job, device: torch.device) -> None:
        """Make a run's directory, keep others out of it, and let it log."""
        if self.processes.first(partial(self._take, job)):
            job.skip("done by another process")
            job.release()
            return
        job.entered = True
        job.change(RUNNING, directory=job.directory, device=describe_device(device))

    def _take(self, job: _Job) -> bool:
        """Make a run's directory and hold it; whether whoever held it before has finished the run."""
        job.directory.create()
        # A teacher that another process trains is worth waiting for.
        waiting = partial(self._stop_if_asked, job) if job.config.study == TEACHERS_STUDY else None
        job.holds.enter_context(job.directory.held(while_waiting=waiting))
        if job.is_done():
            return True
        job.holds.enter_context(job.directory.logged())
        job.directory.write_config(job.config.as_dict())
        return False

    def _stop_if_asked(self, job: _Job) -> None:
        if self.should_stop():
            raise Interrupted(f"stopped while another process is at work in {job.directory.path}")

    def _start(self, job: _Job, setting: Setting) -> None:
        """Bring a run to where its last checkpoint stands."""
        directory = job.directory
        self.processes.first(partial(self._open_tracker, job))
        job.session = make_session(
            job.config,
            setting,
            job.learner,
            fingerprint=job.run_id,
            checkpoint_path=directory.checkpoint,
            on_epoch=lambda line: self.processes.first(partial(self._epoch_done, job, line)),
            keep_snapshot=partial(self._keep_snapshot, job, setting.data.num_classes),
            voice=directory.speaking,
        )
        if job.session.restore():
            epoch, step = job.session.position
            logger.info("going on after step %d of epoch %d", step, epoch)
        else:
            self.processes.first(directory.remove_snapshots)  # of an attempt without a checkpoint
            job.session.keep_snapshot(job.learner.evaluated_model, 0)
        self.processes.first(partial(self._open_records, job))

    def _open_tracker(self, job: _Job) -> None:
        config, path = job.config, job.directory.path
        study = config.study or config.dataset.name
        job.tracker = TRACKERS[config.tracker.name](config, path, name=path.name, study=study)

    def _open_records(self, job: _Job) -> None:
        """Let the records say what the checkpoint has."""
        session = job.session
        for line in session.history:
            job.tracker.log(line)
        job.directory.write_metrics(session.history)
        job.directory.write_state(RUNNING, epoch=session.position[0] - 1, epochs=job.config.recipe.epochs)

    def _announce(self, jobs: Sequence[_Job], setting: Setting) -> None:
        """Say what is trained: of each run where it is, and once what they share."""
        for job in jobs:
            with job.directory.speaking():
                logger.info("run %s", job.directory.path)
        config, data = self.config, setting.data
        sizes = ", ".join(f"{data.sizes[split]:,} {split}" for split in ("train", "val", "test") if split in data.sizes)
        logger.info(
            "%s: %d classes, %s images, %s; %s on %s", data.name, data.num_classes, sizes, data.loading,
            config.precision, setting.device,
        )  # fmt: skip
        logger.info("speed: %s", setting.switches.describe())
        if self.processes.several:
            logger.info("%s", self._describe_processes(jobs[0].learner.student))
        if len(jobs) > 1:
            logger.info("%d students side by side", len(jobs))
        jobs[0].learner.precision.warn_if_emulated()
        late = [epoch for epoch in config.recipe.milestones if epoch >= config.recipe.epochs]
        if config.recipe.scheduler == "multistep" and late:
            logger.warning("the rate never drops at %s: training ends after epoch %d", late, config.recipe.epochs)

    def _describe_processes(self, student: torch.nn.Module) -> str:
        recipe, count = self.config.recipe, self.processes.world_size
        text = (
            f"{count} processes: batches of {recipe.batch_size} are {count} x {recipe.batch_size // count}; "
            f"learning rate {recipe.learning_rate:g} for the whole batch"
        )
        if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in student.modules()):
            text += "; BatchNorm " + ("synchronised" if self.config.sync_batch_norm else "of each share by itself")
        return text

    def _epoch_done(self, job: _Job, line: dict[str, Any]) -> None:
        job.directory.write_metrics(job.session.history)
        job.directory.write_state(RUNNING, epoch=line["epoch"], epochs=job.config.recipe.epochs)
        job.tracker.log(line)

    def _keep_snapshot(self, job: _Job, num_classes: int, model: torch.nn.Module, epoch: int) -> None:
        every, epochs = job.config.snapshot_every, job.config.recipe.epochs
        if every is not None and (epoch % every == 0 or epoch == epochs):
            path = job.directory.snapshot(epoch)
            self.processes.first(partial(_save_student, job, num_classes, model, path, epoch=str(epoch)))

    def _finish(self, job: _Job, setting: Setting, record: Record, students: int) -> None:
        """Write what came out, and tell everybody."""
        self.processes.first(partial(self._write_result, job, setting, record, students))
        job.ended = True
        job.change(DONE)
        self.processes.first(partial(self._close_records, job, record))

    def _write_result(self, job: _Job, setting: Setting, record: Record, students: int) -> None:
        config, data, directory, teacher = job.config, setting.data, job.directory, setting.teacher
        model = job.learner.evaluated_model
        _save_student(job, data.num_classes, model, directory.weights)
        result = {
            "format": 1,
            "fingerprint": job.run_id,
            "group": job.group_id,
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
            "student": {
                "arch": config.student.arch,
                "parameters": count_parameters(model),
                "macs": _macs_of(model, setting),
            },
            "method": config.method,
            "cross_entropy_weight": config.cross_entropy_weight,
            "divergence": config.divergence or None,
            "seed": config.seed,
            **({"world_size": self.processes.world_size} if self.processes.several else {}),
            "recipe": dataclasses.asdict(config.recipe),
            "precision": config.precision,
            "metrics": record.metrics,
            "reliability": record.reliability,
            "timing": record.timing if students == 1 else {**record.timing, "students_at_once": students},
            "environment": {
                **environment(setting.device),
                "deterministic": self.determinism.as_record(),
                "switches": dataclasses.asdict(setting.switches),
                # By itself, also where it was one of many.
                "command": shlex.join(["python", "-m", "vkd.train", *job.words]),
            },
        }
        write_json_atomically(directory.result, result)
        directory.write_state(DONE, epoch=config.recipe.epochs, epochs=config.recipe.epochs)

    def _close_records(self, job: _Job, record: Record) -> None:
        config, directory = job.config, job.directory
        if config.keep_checkpoint:
            previous_checkpoint(directory.checkpoint).unlink(missing_ok=True)
        else:
            remove_checkpoints(directory.checkpoint)
        shown = {"val": record.metrics["val/top1"], "test": record.metrics["test/top1"]}
        figures = ", ".join(f"{split} {value:.2f} %" for split, value in shown.items() if value is not None)
        logger.info("done: %s in %.1f s; %s", figures, record.timing["seconds"], directory.result)
        job.tracker.finish(record.metrics)
