"""`hydra/launcher=fused`: the jobs of a sweep handed over together, so that students can share a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.vkd_launchers.sweep_jobs import list_jobs, require_jobs


class FusedLauncher(Launcher):
    """Composes every job as Hydra's basic launcher does, and calls the task's `together` with all of them.

    Which of them are trained side by side, and how, is `vkd.jobs.Jobs.together`'s business.
    """

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what `launch` needs. Raises HydraException for a task that takes no jobs together."""
        require_jobs(task_function)
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; an error of one is the task's to report."""
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs, returns = list_jobs(self.config, self.hydra_context, self.task_function, job_overrides, initial_job_idx)
        self.task_function.together(jobs)
        return returns
