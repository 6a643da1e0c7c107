"""`hydra/launcher=ray` and `=fused_ray`: the jobs of a sweep on the machines of a Ray cluster, or on this one."""

from __future__ import annotations

import copy
import logging
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.vkd_launchers.cluster_launcher import ClusterLauncher
from hydra_plugins.vkd_launchers.worker import Failure, Group
from vkd.errors import ConfigError, require

logger = logging.getLogger("vkd")

_OBJECT_STORE_BYTES = 80 * 2**20
"""Of a Ray that is started for a sweep: little but configs passes through it, and Ray would take a third of memory."""
_SECONDS_TO_STOP = 120
"""How long workers that are asked to stop may take for the step in hand and its checkpoint."""


class RayLauncher(ClusterLauncher):
    """Runs each group as a Ray task. Where a worker dies, Ray starts its task again, which goes on from a checkpoint.

    Args:
        fused, students_per_job: as for every cluster launcher.
        gpus_per_job: GPUs of a job, below 1 for jobs that share one; `auto` is one where the cluster has any and the
            job does not ask for a CPU.
        cpus_per_job: CPUs of a job, which is how many threads it has; `auto` is what the cluster has for each GPU, and
            one CPU for a job without GPU.
        ray: `init`, the options of `ray.init`, and `remote`, those of the task.
    """

    def __init__(
        self,
        *,
        fused: bool,
        gpus_per_job: float | str,
        cpus_per_job: float | str,
        students_per_job: int | None,
        ray: DictConfig,
    ) -> None:
        super().__init__(fused=fused, students_per_job=students_per_job)
        self.gpus_per_job, self.cpus_per_job = gpus_per_job, cpus_per_job
        self.ray_config = ray

    def check(self) -> None:
        """Raise ConfigError for an option that makes no sense."""
        super().check()
        for name, value in (("gpus_per_job", self.gpus_per_job), ("cpus_per_job", self.cpus_per_job)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
            require(number or value == "auto", f"hydra.launcher.{name}={value}", expected="a number from 0, or auto")

    @contextmanager
    def opened(self, groups: Sequence[Group]) -> Iterator[None]:
        """Ray, started for this sweep or joined. Raises ConfigError where it cannot be, or is too small for a job."""
        options = OmegaConf.to_container(self.ray_config.init, resolve=True)
        is_local = options.get("address") == "local"
        if is_local:
            options.setdefault("object_store_memory", _OBJECT_STORE_BYTES)
        with _quiet_environment(is_local):
            import ray
            from hydra_plugins.hydra_ray_launcher._launcher_util import start_ray

            was_there = ray.is_initialized()
            try:
                start_ray(OmegaConf.create(options))
            except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"Ray cannot be reached: {error}",
                    expected="a running cluster at hydra.launcher.ray.init.address, or local",
                    hint="hydra.launcher.ray.init.address=local",
                ) from error
            try:
                self._check_size(groups, is_local)
                yield
            finally:
                if not was_there:
                    ray.shutdown()

    def start(self, group: Group) -> Any:
        """Hand a group to Ray; the reference to what comes of it."""
        from hydra_plugins.hydra_ray_launcher._launcher_util import launch_job_on_ray

        number, words, _ = group.jobs[0]
        # Hydra's part of the config is all that its worker reads; the jobs' own configs are in the group.
        config = copy.deepcopy(self.config)
        with open_dict(config):
            config.hydra.job.num = number - 1
            config.hydra.job.id = f"job_id_for_{number - 1}"
            config.hydra.overrides.task = list(words)
            config.hydra.sweep.dir = str(Path(str(config.hydra.sweep.dir)).resolve())
        gpus = self._gpus(group)
        options = {
            **OmegaConf.to_container(self.ray_config.remote, resolve=True),
            "name": group.numbers,
            "num_gpus": gpus,
            "num_cpus": self._cpus(gpus),
        }
        return launch_job_on_ray(self.hydra_context, OmegaConf.create(options), config, group, Singleton.get_state())

    def describe(self, jobs: int, groups: int) -> str:
        """How many jobs are on how large a cluster."""
        import ray

        have = ray.cluster_resources()
        size = f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
        return f"{jobs} jobs in {groups} Ray task{'s' * (groups > 1)}; the cluster has {size}"

    def wait(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for at most a second; the references whose tasks have ended."""
        import ray

        ended, _ = ray.wait(list(handles), num_returns=1, timeout=1)
        return ended

    def failures(self, handle: Any) -> list[Failure]:
        """What a task says has failed. Raises Ray's errors where there is nobody left to say."""
        import ray

        try:
            return ray.get(handle).return_value
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error  # what happened, without where

    def stop(self, handles: Sequence[Any]) -> None:
        """Ask the workers to stop, as Ctrl-C does, and wait for the checkpoints that they leave."""
        import ray

        logger.info("asking the workers to stop, with a checkpoint each")
        for handle in handles:
            ray.cancel(handle)
        ray.wait(list(handles), num_returns=len(handles), timeout=_SECONDS_TO_STOP)
        logger.info("stopped; the same command goes on from there")

    def _gpus(self, group: Group) -> float:
        import ray

        if self.gpus_per_job != "auto":
            return self.gpus_per_job
        wants_cpu = all(str(config.device).startswith("cpu") for _, _, config in group.jobs)
        return 1 if ray.cluster_resources().get("GPU", 0) and not wants_cpu else 0

    def _cpus(self, gpus: float) -> float:
        import ray

        if self.cpus_per_job != "auto":
            return self.cpus_per_job
        have = ray.cluster_resources()
        return max(1, int(have.get("CPU", 0) / have["GPU"] * gpus)) if gpus and have.get("GPU") else 1

    def _check_size(self, groups: Sequence[Group], is_local: bool) -> None:
        """Refuse jobs that no machine has room for, which Ray would wait for; a cluster may grow, so there warn."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for gpus in {self._gpus(group) for group in groups}:
            cpus = self._cpus(gpus)
            if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
                continue
            largest = "; ".join(sorted({f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes}))
            problem = f"a job asks for {cpus:g} CPUs and {gpus:g} GPUs, and no machine of the Ray cluster has both"
            require(not is_local, problem, expected=largest, hint="hydra.launcher.gpus_per_job, .cpus_per_job")
            logger.warning("%s (%s): the jobs wait until one has", problem, largest)


@contextmanager
def _quiet_environment(is_local: bool) -> Iterator[None]:
    """The environment variables that Ray reads when it is imported and started, where the user has not set them.

    It is to contact nobody, not to drop lines of a job that are like those of another, and, where it is started for
    this sweep, to be closed to others with a key that ends with it, rather than one that it leaves in the home.
    """
    wanted = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if not sys.stdout.isatty():
        wanted["RAY_COLOR_PREFIX"] = "0"
    if is_local and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        wanted["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
