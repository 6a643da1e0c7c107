"""The jobs of a sweep as vkd's launchers hand them over: number, words and config of each."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vkd.jobs import own_words

if TYPE_CHECKING:
    from vkd.config import Config

SweepJob = tuple[int, list[str], "Config | DictConfig"]
"""Its number, from 1 in the order of the command, its words, and its config: parsed where it was planned."""


def require_jobs(task_function: TaskFunction) -> None:
    """Raise HydraException for a task that takes no jobs together: what else than `vkd.train` uses these launchers."""
    if not callable(getattr(task_function, "together", None)):
        raise HydraException("vkd's launchers belong to python -m vkd.train")


def list_jobs(
    config: DictConfig,
    hydra_context: HydraContext,
    task_function: Any,
    job_overrides: Sequence[Sequence[str]],
    initial_job_idx: int,
) -> tuple[list[SweepJob], list[JobReturn]]:
    """The jobs that a sweeper asks for, and what to answer it for each.

    The answer never is an error: what became of a job is the task's to report. A job that was composed beforehand, as
    all of a command's are when they are checked, is not composed again, which takes Hydra a quarter of a second.

    Args:
        config, hydra_context, task_function: as Hydra sets a launcher up with.
        job_overrides, initial_job_idx: as Hydra calls a launcher with.
    """
    setup_globals()
    configure_log(config.hydra.hydra_logging, config.hydra.verbose)
    jobs: list[SweepJob] = []
    returns: list[JobReturn] = []
    for index, overrides in enumerate(job_overrides, start=initial_job_idx):
        number, words = index + 1, own_words(overrides)
        known = task_function.planned(number, words)
        jobs.append((number, words, known or _compose(config, hydra_context, overrides, index)))
        returns.append(JobReturn(overrides=filter_overrides(overrides), status=JobStatus.COMPLETED))
    return jobs, returns


def _compose(config: DictConfig, hydra_context: HydraContext, overrides: Sequence[str], index: int) -> DictConfig:
    """The config of one job, as Hydra's basic launcher composes it."""
    composed = hydra_context.config_loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = composed.hydra.job.num = index
    HydraConfig.instance().set_config(composed)
    own = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
    # Now, while ${hydra:...} speaks of this job. What cannot be resolved is explained by who reads it.
    with contextlib.suppress(OmegaConfBaseException):
        OmegaConf.resolve(own)
    return own
