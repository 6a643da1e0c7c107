"""The jobs of a command line: run one by one, in groups, or in processes elsewhere, and what became of each."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vkd import launched
from vkd.command import complain, logger, speaking
from vkd.errors import UserError, require
from vkd.records.run_directory import DONE, FAILED, INTERRUPTED, RUNNING, WAITING, InUse, RunDirectory
from vkd.records.sweep_index import FOLDER, Job, Sweep, SweepIndex

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from vkd.config import Config
    from vkd.training.assembly import Workplace
    from vkd.training.run import Outcome

Planned = Sequence[tuple[Sequence[str], "Config"]]
"""The words and the config of each job of a command."""


class Jobs:
    """Runs the jobs that Hydra hands out, one after the other or in groups, and remembers what became of each.

    A job never raises what would end the rest of a sweep: it reports, and the next one has its turn. Being asked to
    stop ends all of them.

    A sweep has an index, in which every job's state is kept. Pickled, as a launcher hands it to a process elsewhere, it
    speaks on that process's own output there, and reports through the index.

    Args:
        console: where progress is shown; None for one of its own at each call.
        planned: the jobs, as far as they are known beforehand; None where only a sweeper knows them.
        command: the words of the whole command.
    """

    def __init__(self, console: Console | None, planned: Planned | None, command: Sequence[str] = ()) -> None:
        self.console = console
        self.count = None if planned is None else len(planned)
        self.failures: list[tuple[int, str, str]] = []
        self.index: SweepIndex | None = None
        self._directory = str(Path.cwd())
        self._elsewhere = False
        self._number = 0
        self._workplace: Workplace | None = None
        planned = None if planned is None else [(own_words(words), config) for words, config in planned]
        self._planned = planned or []
        self._keys: list[str] = []
        self._left_to_others: list[int] = []
        self._states: dict[int, str] = {}
        self._is_new = False
        if self.count is not None and self.count > 1:
            self._begin_index(planned, command)

    @property
    def folder(self) -> Path | None:
        """Where the files of the sweep are; None where the jobs are not known beforehand, or there is one alone."""
        return None if self.index is None else self.index.folder

    def planned(self, number: int, words: Sequence[str]) -> Config | None:
        """The config of a job as it was composed beforehand, so that it need not be composed again; None without one.

        Args:
            number: of the job, from 1.
            words: its words; a job of other words is not the one that was planned.
        """
        if number <= len(self._planned) and self._planned[number - 1][0] == list(words):
            return self._planned[number - 1][1]
        return None

    def __getstate__(self) -> dict[str, object]:
        require_no_launcher("this launcher")
        return {"count": self.count, "index": self.index, "directory": self._directory, "keys": self._keys}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(None, None)
        self.count, self.index = state["count"], state["index"]
        self._directory, self._keys = state["directory"], state["keys"]
        self._elsewhere = True

    def __call__(self, composed: DictConfig) -> None:
        """One job by itself: what Hydra and its launchers call."""
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        words = list(hydra.overrides.task)
        self._number += 1
        # A launcher that runs jobs elsewhere makes a new process for each.
        number = hydra.job.num + 1 if self._elsewhere else self._number
        with self._at_work():
            if self.count != 1:
                logger.info("")
                logger.info("job %d%s: %s", number, f" of {self.count}" if self.count else "", " ".join(words))
            with self._reported([(number, words)]):
                self._run([(number, words, _parsed(composed))], more=not self._elsewhere and number != self.count)

    def together(self, jobs: Sequence[tuple[int, Sequence[str], DictConfig | Config]]) -> None:
        """Jobs side by side, as far as they can be: what the fused launchers call.

        Args:
            jobs: of each its number, its words and its config.
        """
        require_no_launcher("hydra/launcher=fused")
        with self._at_work():
            groups = self.groups(jobs)
            last = jobs[-1][0] if jobs else 0
            for place, group in enumerate(groups, start=1):
                logger.info("")
                numbers = ", ".join(str(job) for job, _, _ in group)
                logger.info("group %d of %d: job%s %s", place, len(groups), "s" * (len(group) > 1), numbers)
                with self._reported([(job, words) for job, words, _ in group]):
                    self._run(group, more=place != len(groups) or (not self._elsewhere and last != self.count))

    def groups(
        self, jobs: Sequence[tuple[int, Sequence[str], DictConfig | Config]]
    ) -> list[list[tuple[int, Sequence[str], Config]]]:
        """The jobs in groups that can be trained side by side; those that are impossible are reported and left out."""
        from vkd.training.run import shared_part

        groups: dict[str, list[tuple[int, Sequence[str], Config]]] = {}
        for number, words, composed in jobs:
            self._number = max(self._number, number)
            with self._reported([(number, words)]):
                config = _parsed(composed)
                groups.setdefault(repr(shared_part(config)), []).append((number, words, config))
        return list(groups.values())

    def _run(self, jobs: Sequence[tuple[int, Sequence[str], Config]], *, more: bool) -> None:
        """Run jobs that share everything but method and divergence; `more` are to come after them."""
        from vkd.training.assembly import Workplace
        from vkd.training.distribution import join
        from vkd.training.interruption import Interrupted, stop_on_signals
        from vkd.training.run import run_together

        def changed(place: int, outcome: Outcome) -> None:
            number, words, _ = jobs[place]
            if isinstance(outcome.error, InUse) and self.count != 1:
                # Another command is at it, and keeps the index; of a sweep that is no failure.
                logger.info("job %d is left to whoever is at it: %s", number, outcome.error.problem)
                self._left_to_others.append(number)
            elif outcome.state == FAILED and not outcome.skipped:
                self._failed([(number, words)], outcome.error, outcome)
            else:
                self._note(number, outcome.state, outcome)

        self._workplace = self._workplace or Workplace()
        configs = [config for _, _, config in jobs]
        if self._elsewhere:
            configs = _on_one_device(configs, jobs[0][0])
        try:
            with stop_on_signals() as should_stop:
                run_together(
                    configs,
                    words=[words for _, words, _ in jobs],
                    on_change=changed,
                    console=self.console,
                    should_stop=should_stop,
                    workplace=self._workplace,
                )
        except Interrupted as stop:
            logger.info("%s; the same command goes on from there", stop)
            raise
        # A signal that came when no step was left to stop after; it is meant for the jobs to come.
        if more and join().agree(should_stop()):
            raise Interrupted(f"stopped after job {jobs[-1][0]}")

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Speak, and stand where the command was called."""
        if self.console is not None:
            yield
            return
        before = str(Path.cwd())
        with speaking() as console:
            self.console = console
            try:
                if Path(self._directory).is_dir():
                    os.chdir(self._directory)
                yield
            finally:
                os.chdir(before)
                self.console = None

    @contextmanager
    def _reported(self, jobs: Sequence[tuple[int, Sequence[str]]]) -> Iterator[None]:
        """Report what goes wrong with all of these jobs."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if self._elsewhere and isinstance(error, SystemExit):
                raise  # whoever started this process ends it so, as submitit does once it has queued the job again
            self._failed(jobs, error)

    def _failed(
        self, jobs: Sequence[tuple[int, Sequence[str]]], error: BaseException, outcome: Outcome | None = None
    ) -> None:
        """Say that jobs failed, but for those of which that is known."""
        known = {number for number, _, _ in self.failures}
        jobs = [job for job in jobs if job[0] not in known]
        expected = isinstance(error, UserError)
        message = str(error) if expected else "".join(traceback.format_exception(error)).strip()
        alone = self.count == 1
        complain(message if alone else f"job {', '.join(str(number) for number, _ in jobs)} failed: {message}")
        lines = message.splitlines()
        # A traceback says what happened in its last line, a message to the user in its first.
        headline = lines[0] if expected else lines[-1]
        self.failures += [(number, self._distinct(words), headline) for number, words in jobs]
        for number, _ in jobs:
            self._note(number, FAILED, outcome, note=headline, traceback="" if expected else message)

    def _note(self, number: int, state: str, outcome: Outcome | None = None, **fields: object) -> None:
        """Keep a job's state, in the index too; where that cannot be written, say so: no run depends on it."""
        self._states[number] = state
        if self.index is None or not launched.is_first():
            return
        changes = {"state": state, "note": "", "traceback": ""}
        if outcome is not None:
            changes["note"] = outcome.note
            if outcome.directory is not None:
                changes["directory"] = str(outcome.directory.path)
        if outcome is None or not outcome.skipped:  # else it ran when and where the index says
            device = None if outcome is None else outcome.device
            changes.update(host=socket.gethostname(), pid=os.getpid(), device=device)
        try:
            self.index.update(number, self._keys[number - 1], **{**changes, **fields})
        except (OSError, UserError) as error:
            reason = error.problem if isinstance(error, UserError) else error
            logger.warning("the index of the sweep could not be written: %s", reason)

    def summary(self) -> int:
        """Say which jobs failed, if there were several; the exit code."""
        failures = {number: (words, headline) for number, words, headline in self.failures}
        if self.index is not None:
            failures = {**self._failures_elsewhere(), **failures}
        if self.count != 1 and failures:
            lines = [f"job {number} ({words}): {headline}" for number, (words, headline) in sorted(failures.items())]
            complain("\n".join([f"{len(lines)} of {self.count or self._number} jobs failed:", *lines]))
        if self._left_to_others:
            numbers = ", ".join(map(str, self._left_to_others))
            logger.info("another process is at work on job %s; python -m vkd.sweep shows how it stands", numbers)
        return 1 if failures else 0

    def abandon(self) -> None:
        """Remove the files of a sweep of which no job has begun, as far as this command has made them."""
        if self.index is not None and self._is_new and not self._states:
            shutil.rmtree(self.index.folder, ignore_errors=True)
            with suppress(OSError):  # others are there
                self.index.folder.parent.rmdir()
                self.index.folder.parent.parent.rmdir()

    def _failures_elsewhere(self) -> dict[int, tuple[str, str]]:
        """What the index says of jobs that ran in other processes: number -> (words, what went wrong)."""
        here = {*self._states, *self._left_to_others}
        left = [number for number in range(1, self.count + 1) if number not in here]
        if not left:
            return {}
        try:
            by_key = {job.key: job for job in self.index.read().jobs}
        except UserError as error:
            return {number: (self._distinct(self._planned[number - 1][0]), error.problem) for number in left}
        jobs = [(number, by_key[key]) for number in left if (key := self._keys[number - 1]) in by_key]
        self._left_to_others += [number for number, job in jobs if job.state == RUNNING and _is_held(job)]
        jobs = [(number, job) for number, job in jobs if number not in self._left_to_others]
        reasons: dict[str, Callable[[Job], str]] = {
            FAILED: lambda job: job.note,
            INTERRUPTED: lambda job: "was interrupted; the same command goes on",
            RUNNING: lambda job: f"its process ended without a word (process {job.pid} on {job.host})",
            WAITING: lambda job: "did not start",
        }
        return {
            number: (self._distinct(job.overrides), reasons[job.state](job))
            for number, job in jobs
            if job.state != DONE
        }

    def _begin_index(self, planned: Planned, command: Sequence[str]) -> None:
        """Write the index, in a folder that the same jobs find again. Raises UserError where that is not possible."""
        from vkd.config import fingerprint, request_key
        from vkd.errors import ConfigError

        self._keys = [request_key(config) for _, config in planned]
        studies = {config.study or config.dataset.name for _, config in planned}
        name = f"{studies.pop() if len(studies) == 1 else 'several'}-{fingerprint({'jobs': sorted(self._keys)})[:8]}"
        self.index = SweepIndex((Path(planned[0][1].runs_root) / FOLDER / name).resolve())
        if not launched.is_first():  # of several processes that do each of the jobs together
            return
        self._is_new = not self.index.folder.exists()
        jobs = [
            Job(number, key, list(words))
            for number, (key, (words, _)) in enumerate(zip(self._keys, planned, strict=True), start=1)
        ]
        try:
            self.index.begin(Sweep(list(command), str(Path.cwd()), jobs, socket.gethostname(), os.getpid()))
        except OSError as error:
            raise ConfigError(
                f"the files of the sweep cannot be written: {error}",
                expected="a folder that you may write to",
                hint="runs_root=SOME_OTHER_FOLDER",
            ) from error

    def _distinct(self, words: Sequence[str]) -> str:
        """What tells a job from the others of the command: its words that not all of them have."""
        shared = set.intersection(*(set(others) for others, _ in self._planned)) if len(self._planned) > 1 else set()
        return " ".join(word for word in words if word not in shared) or " ".join(words)


def own_words(words: Sequence[str]) -> list[str]:
    """The words of a job less those that are Hydra's, as launchers hand them out."""
    return [word for word in words if not re.match(r"[+~]*hydra[./]", word)]


def _parsed(composed: DictConfig | Config) -> Config:
    from vkd.composition import register_schema
    from vkd.config import Config, parse

    register_schema()  # its resolvers, which another process does not have yet
    return composed if isinstance(composed, Config) else parse(composed)


def _is_held(job: Job) -> bool:
    """Whether a process is at work in the directory of a job."""
    if job.directory is None or not Path(job.directory).is_dir():
        return False
    try:
        with RunDirectory(job.directory).held():
            return False
    except InUse:
        return True


def _on_one_device(configs: Sequence[Config], number: int) -> list[Config]:
    """Configs of a job, or of a group, in a process that a launcher has started.

    Where nobody has given that process a GPU of its own, jobs that run at once must not all take the first.
    """
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return list(configs)
    own = f"cuda:{(number - 1) % count}"
    return [dataclasses.replace(config, device=own) if config.device == "auto" else config for config in configs]


def require_no_launcher(name: str) -> None:
    """Raise ConfigError where torchrun started several processes, each of which would launch all of the jobs."""
    count = launched.world_size()
    require(
        count == 1,
        f"{name} sends jobs to processes of their own, and torchrun started {count} for one job",
        "one or the other",
        "torchrun without hydra/launcher=..., or hydra/launcher=fused_ray without torchrun, which sends a group of "
        "students to each GPU",
    )
