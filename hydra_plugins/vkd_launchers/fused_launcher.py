"""`hydra/launcher=fused`: the jobs of a sweep handed over together, so that students can share a teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException


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
        if not callable(getattr(task_function, "together", None)):
            raise HydraException("hydra/launcher=fused belongs to python -m vkd.train")
        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; an error of one is the task's to report."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        jobs, returns = [], []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = number
            HydraConfig.instance().set_config(composed)
            own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
            # Now, while ${hydra:...} speaks of this job. What cannot be resolved is explained by who reads it.
            with contextlib.suppress(OmegaConfBaseException):
                OmegaConf.resolve(own)
            jobs.append((list(composed.hydra.overrides.task), own))
            returns.append(JobReturn(overrides=filter_overrides(overrides), cfg=own, status=JobStatus.COMPLETED))
        self.task_function.together(jobs)
        return returns
