"""`hydra/launcher=slurm` and `=fused_slurm`: the jobs of a sweep as a Slurm job array, or as processes here."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.singleton import Singleton
from omegaconf import OmegaConf

from hydra_plugins.vkd_launchers.cluster_launcher import ClusterLauncher
from hydra_plugins.vkd_launchers.worker import Failure, Group
from vkd.errors import ConfigError, require

logger = logging.getLogger("vkd")

_SHARED = (
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
)
"""What submitit calls alike for every executor; it wants the executor's name before the others."""
_SECONDS_BETWEEN_LOOKS = 30
"""How long Slurm is left in peace between two questions about its queue."""
_SECONDS_TO_STOP = 60
"""How long a local job that is asked to stop may take for the step in hand and its checkpoint."""


class SlurmLauncher(ClusterLauncher):
    """Hands each group to submitit, all of them as one job array.

    Before its time limit a job writes a checkpoint and goes back into the queue. The command waits for the jobs; they
    do not need it, and go on without it.

    Args:
        fused, students_per_job: as for every cluster launcher.
        executor: submitit's: `slurm`, or `local` for processes of this machine.
        submitit_folder: where submitit keeps a job's pickles and what it printed.
        max_num_timeout: how often a job may go back into the queue at its time limit.
        array_parallelism: how many jobs may run at once.
        options: submitit's other parameters; None leaves one to Slurm.
    """

    def __init__(
        self,
        *,
        fused: bool,
        students_per_job: int | None,
        executor: str,
        submitit_folder: str,
        max_num_timeout: int,
        array_parallelism: int,
        **options: Any,
    ) -> None:
        super().__init__(fused=fused, students_per_job=students_per_job)
        self.executor_name = executor
        self.submitit_folder = submitit_folder
        self.max_num_timeout = max_num_timeout
        self.array_parallelism = array_parallelism
        self.options = {
            name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for name, value in options.items()
        }
        self._executor: Any = None
        self._jobs: dict[int, Any] = {}
        self._waiting: deque[tuple[int, Group]] = deque()
        self._looked = time.monotonic()
        self._gone_before: set[int] = set()
        self._lost: set[int] = set()

    def check(self) -> None:
        """Raise ConfigError for an option that makes no sense."""
        super().check()
        self.require_whole("array_parallelism")
        known = self.executor_name in ("slurm", "local")
        require(known, f"hydra.launcher.executor={self.executor_name}", expected="slurm or local")

    @contextmanager
    def opened(self, groups: Sequence[Group]) -> Iterator[None]:
        """submitit's executor. Raises ConfigError where there is no Slurm, or it refuses an option or the jobs."""
        import submitit

        self._jobs, self._waiting = {}, deque()
        self._gone_before, self._lost = set(), set()
        if self.executor_name == "slurm":
            # It warns again and again where Slurm keeps no accounts, which `_gone` makes up for.
            logging.getLogger("submitit").setLevel(logging.ERROR)
            self._executor = self._slurm_executor()
            self._submit_array(groups)
        else:
            self._executor = submitit.LocalExecutor(self.submitit_folder, max_num_timeout=self.max_num_timeout)
            self._executor.update_parameters(**self._local_options())
        yield

    def start(self, group: Group) -> int:
        """Hand a group over, to Slurm with all others, or to this machine once there is room; its first number."""
        number = group.jobs[0][0]
        if self.executor_name == "local":
            self._waiting.append((number, group))
        return number

    def describe(self, jobs: int, groups: int) -> str:
        """How many jobs are where."""
        if self.executor_name == "local":
            processes = f"{groups} process{'es' * (groups > 1)}"
            return f"{jobs} jobs in {processes} of this machine, {min(groups, self.array_parallelism)} at once"
        ids = self._slurm_ids()
        return f"{jobs} jobs in {groups} of Slurm's: squeue -j {ids}, scancel {ids}"

    def wait(self, handles: Sequence[int]) -> list[int]:
        """Wait for a moment; the groups whose jobs have ended."""
        running = [number for number in handles if number in self._jobs]
        while self._waiting and len(running) < self.array_parallelism:
            number, group = self._waiting.popleft()
            self._jobs[number] = self._submit(group)
            running.append(number)
        time.sleep(0.2 if self.executor_name == "local" else 1)
        ended = [number for number in running if self._jobs[number].done()]
        if self.executor_name == "slurm" and time.monotonic() - self._looked > _SECONDS_BETWEEN_LOOKS:
            self._looked = time.monotonic()
            gone = self._gone(set(running) - set(ended))
            # Twice in a row: a result may be on its way through the file system when its job has just left the queue.
            self._lost, self._gone_before = self._lost | (gone & self._gone_before), gone
        return [*ended, *sorted(self._lost & set(running) - set(ended))]

    def failures(self, handle: int) -> list[Failure]:
        """What a job says has failed. Raises submitit's errors where there is nobody left to say."""
        job = self._jobs[handle]
        if handle in self._lost:
            raise RuntimeError(f"Slurm has ended job {job.job_id}, which left no result; see {job.paths.stdout}")
        return job.result().return_value

    def stop(self, handles: Sequence[int]) -> None:
        """Slurm's jobs go on; the processes of this machine are asked to stop with a checkpoint."""
        if self.executor_name == "slurm":
            logger.info("the jobs go on in Slurm; scancel %s stops them, with a checkpoint each", self._slurm_ids())
            return
        logger.info("asking the jobs to stop, with a checkpoint each")
        running = [self._jobs[number] for number in handles if number in self._jobs]
        while running:
            for job in running:
                # A local job's id is the process that passes the signal on. One that comes before the job has begun
                # its work, or while it is in a step without end, does not stop it: then it is sent again.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(job.job_id), signal.SIGTERM)
            deadline = time.monotonic() + _SECONDS_TO_STOP
            while running and time.monotonic() < deadline:
                running = [job for job in running if not job.done()]
                time.sleep(0.1)
        logger.info("stopped; the same command goes on from there")

    def _slurm_executor(self) -> Any:
        """submitit's executor for Slurm, with all options."""
        import submitit

        try:
            executor = submitit.AutoExecutor(
                folder=self.submitit_folder, cluster="slurm", slurm_max_num_timeout=self.max_num_timeout
            )
        except RuntimeError as error:
            raise ConfigError(
                "there is no Slurm on this machine: srun is not found",
                expected="a machine from which Slurm takes jobs",
                hint="hydra/launcher=slurm_local, to try it with processes of this machine",
            ) from error
        options = {**self.options, "array_parallelism": self.array_parallelism}
        try:
            executor.update_parameters(
                **{name if name in _SHARED else f"slurm_{name}": value for name, value in options.items()}
            )
        except (AssertionError, NameError, TypeError, ValueError) as error:
            raise ConfigError(
                f"submitit refuses an option of the launcher: {str(error).splitlines()[0]}",
                expected="hydra.launcher.* as in conf/hydra/launcher/slurm.yaml",
            ) from error
        return executor

    def _local_options(self) -> dict[str, Any]:
        """The options that submitit's local executor has: all jobs see the GPUs that this command sees."""
        gpus = _visible_gpus()
        return {
            "timeout_min": self.options["timeout_min"],
            "signal_delay_s": self.options["signal_delay_s"],
            "stderr_to_stdout": self.options["stderr_to_stdout"],
            "gpus_per_node": len(gpus),
            "visible_gpus": gpus,
        }

    def _submit_array(self, groups: Sequence[Group]) -> None:
        """Submit all groups at once, as one array."""
        from submitit.core.utils import FailedSubmissionError

        try:
            with self._executor.batch():
                for group in groups:
                    self._jobs[group.jobs[0][0]] = self._submit(group)
        except FailedSubmissionError as error:
            reasons = [line for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
            raise ConfigError(
                f"Slurm refused the jobs: {reasons[0]}",
                expected="a partition, time, account and resources that sbatch accepts",
                hint="hydra.launcher.partition=NAME, or another option of conf/hydra/launcher/slurm.yaml",
            ) from error

    def _submit(self, group: Group) -> Any:
        """Hand a group to submitit through Hydra's launcher, which is what runs there; submitit's job."""
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

        number, words, _ = group.jobs[0]
        launcher = BaseSubmititLauncher()
        launcher.setup(hydra_context=self.hydra_context, task_function=group, config=self.config)
        job_id = f"job_id_for_{number - 1}"
        return self._executor.submit(
            launcher, list(words), "hydra.sweep.dir", number - 1, job_id, Singleton.get_state()
        )

    def _gone(self, numbers: set[int]) -> set[int]:
        """Which of these groups are in Slurm's queue no more; none where that cannot be told.

        submitit asks Slurm's accounting alone, without which it would wait for ever for a job that was killed.
        """
        if not numbers:
            return set()
        command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={self._slurm_ids()}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return set()
        # This is what it says once it has forgotten all of them.
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            return set()
        queued = set(done.stdout.split())
        return {number for number in numbers if str(self._jobs[number].job_id) not in queued}

    def _slurm_ids(self) -> str:
        """The ids of the arrays, as Slurm's commands take them."""
        return ",".join(sorted({str(job.job_id).partition("_")[0] for job in self._jobs.values()}))


def _visible_gpus() -> list[int]:
    """The numbers of the GPUs that this process may use. Raises ConfigError where they have no numbers."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        import torch

        return list(range(torch.cuda.device_count()))
    try:
        return [int(name) for name in names.split(",") if name]
    except ValueError as error:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={names} names GPUs otherwise than by numbers",
            expected="numbers, which submitit's local executor passes on to its jobs",
            hint="CUDA_VISIBLE_DEVICES=0,1",
        ) from error
