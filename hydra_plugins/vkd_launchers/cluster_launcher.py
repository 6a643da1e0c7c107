"""What the launchers for clusters have in common: groups of jobs, handed to workers, and waited for one by one."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.vkd_launchers.engines import require_engine
from hydra_plugins.vkd_launchers.sweep_jobs import SweepJob, list_jobs, require_jobs
from hydra_plugins.vkd_launchers.worker import Failure, Group
from vkd.errors import UserError, require

logger = logging.getLogger("vkd")


class ClusterLauncher(Launcher):
    """Hands the jobs of a sweep to workers elsewhere.

    Hydra's own launchers for Ray and Slurm start what they are given and wait for it in order: the first worker that
    dies ends the wait, and with it, on Ray, all others. These start the same jobs through the same engines, and wait
    for each by itself.

    Jobs that ask for the same run are given to one worker, since two would be in each other's way.

    Args:
        fused: give the jobs that differ in method and divergence alone to one worker, which trains their students side
            by side.
        students_per_job: at most so many of them, so that several workers share a large group; None for all.
    """

    def __init__(self, *, fused: bool, students_per_job: int | None) -> None:
        self.fused = fused
        self.students_per_job = students_per_job
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `launch` needs, and look at the options: what Hydra makes of an error in `__init__` is no message.

        Raises HydraException for a task that takes no jobs together, ConfigError for a wrong option.
        """
        require_jobs(task_function)
        require_engine(f"{type(self).__module__}.{type(self).__name__}")
        self.check()
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def check(self) -> None:
        """Raise ConfigError for an option that makes no sense."""
        self.require_whole("students_per_job", self.students_per_job is None, "or null for no limit")

    def require_whole(self, name: str, otherwise: bool = False, others: str = "") -> None:
        """Raise ConfigError unless the option `name` is a whole number from 1, or `otherwise` holds."""
        value = getattr(self, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        expected = f"a whole number from 1{', ' * bool(others)}{others}"
        require(whole or otherwise, f"hydra.launcher.{name}={value}", expected=expected)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; an error of one is the task's to report.

        Raises UserError where the engine refuses the jobs, Interrupted when asked to stop.
        """
        from vkd.training.interruption import Interrupted, stop_on_signals

        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs, returns = list_jobs(self.config, self.hydra_context, self.task_function, job_overrides, initial_job_idx)
        groups = self._groups(jobs)
        if not groups:
            return returns
        with self.opened(groups), stop_on_signals() as should_stop:
            handles = {self.start(group): group for group in groups}
            logger.info("%s", self.describe(len(jobs), len(groups)))
            for handle in self._as_they_end(list(handles), should_stop):
                group = handles[handle]
                failures = self._outcome(handle, group)
                self.task_function.failures.extend(failures)
                logger.info("%s ended%s", group.numbers, f": {len(failures)} failed" if failures else "")
            if should_stop():
                raise Interrupted("stopped")
        return returns

    def _groups(self, jobs: Sequence[SweepJob]) -> list[Group]:
        """What each worker is given."""
        from vkd.config import request_key

        directory = str(Path.cwd())
        groups: list[Group] = []
        for alike in self.task_function.groups(jobs):
            same: dict[str, list[SweepJob]] = {}
            for job in alike:
                same.setdefault(request_key(job[2]), []).append(job)
            runs = list(same.values())
            size = (self.students_per_job or len(runs)) if self.fused else 1
            for start in range(0, len(runs), size):
                together = sorted(job for run in runs[start : start + size] for job in run)
                groups.append(Group(self.task_function, together, directory))
        return sorted(groups, key=lambda group: group.jobs[0][0])

    def _as_they_end(self, handles: list[Any], should_stop: Any) -> Iterator[Any]:
        """The handles, each once its worker has ended; those that are left when asked to stop are told so."""
        while handles and not should_stop():
            ended = self.wait(handles)
            yield from ended
            handles = [handle for handle in handles if handle not in ended]
        if handles:
            self.stop(handles)

    def _outcome(self, handle: Any, group: Group) -> list[Failure]:
        """The failures of a group, all of it where its worker was lost."""
        try:
            return self.failures(handle)
        except UserError:
            raise
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason was given'}"
            logger.warning("the worker of %s was lost: %s", group.numbers, error)
            return group.all_failed(f"its worker was lost ({reason})")

    @contextmanager
    def opened(self, groups: Sequence[Group]) -> Iterator[None]:
        """The engine, ready to start groups, for as long as the context lasts."""
        yield

    @abstractmethod
    def start(self, group: Group) -> Any:
        """Hand a group over; a hashable handle of it."""

    @abstractmethod
    def describe(self, jobs: int, groups: int) -> str:
        """What has been started where, in a line."""

    @abstractmethod
    def wait(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for at most a second; the handles that have ended."""

    @abstractmethod
    def failures(self, handle: Any) -> list[Failure]:
        """What failed in a group that has ended. Raises what the engine raises where its worker was lost."""

    @abstractmethod
    def stop(self, handles: Sequence[Any]) -> None:
        """What becomes of the groups that have not ended when the command is asked to stop."""
