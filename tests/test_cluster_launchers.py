"""`hydra/launcher=ray`, `=slurm` and their fused forms: the jobs of a sweep in other processes, and what they leave."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest
from commands import TINY, read, train, untimed, weights
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

import vkd.collect
from hydra_plugins.vkd_launchers import slurm_launcher
from hydra_plugins.vkd_launchers.cluster_launcher import ClusterLauncher
from hydra_plugins.vkd_launchers.engines import require_engine
from hydra_plugins.vkd_launchers.ray_launcher import RayLauncher
from hydra_plugins.vkd_launchers.slurm_launcher import SlurmLauncher
from hydra_plugins.vkd_launchers.worker import Group
from vkd.composition import compose_config
from vkd.config import config_directory, parse
from vkd.jobs import Jobs
from vkd.training.interruption import Interrupted, stop_on_signals

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is None, reason="needs vkd's extra ray"
)
with_submitit = pytest.mark.skipif(
    importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None, reason="needs vkd's extra slurm"
)
THREE = ["-m", "study=three", "divergence=fkld,rkld,js"]


@pytest.fixture(scope="module")
def taught(trained, tmp_path_factory):
    """A working directory with the trained teacher and, from Hydra's basic launcher, the three students of it."""
    folder = tmp_path_factory.mktemp("taught")
    shutil.copytree(trained / "teachers", folder / "runs" / "teachers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(*THREE) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """An empty working directory with the trained teacher."""
    shutil.copytree(trained / "teachers", tmp_path / "runs" / "teachers")
    monkeypatch.chdir(tmp_path)
    # The threads of a worker, on which the last bits of a sum depend, as the tests' own process has them.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory):
    """A Ray that the launcher has started, and that its sweeps join, so that the workers need not start again."""
    ray = pytest.importorskip("ray")
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("OMP_NUM_THREADS", "1")
        launcher = ray_launcher(ray={"init": {"num_cpus": 1}})
        with launcher.opened([]):
            yield ray
    assert not (home / ".ray").exists(), "the key of a Ray that is no more was left behind"


def ray_launcher(**options) -> RayLauncher:
    """The launcher as its file configures it, but for `options`."""
    return RayLauncher(**file_options("ray", options))


@functools.cache
def launcher_node(name: str):
    return compose_config([f"hydra/launcher={name}"], with_hydra=True).hydra.launcher


def file_options(name: str, options: dict) -> dict:
    """What a launcher's file gives its class, with `options` over it."""
    node = copy.deepcopy(launcher_node(name))
    OmegaConf.set_struct(node, False)
    merged = OmegaConf.merge(node, options)
    return {key: merged[key] for key in merged if key not in ("_target_", "submitit_folder")}


def students(folder: Path) -> dict[str, Path]:
    """The directories of the students below `folder`, by their paths below the runs root."""
    runs = folder / "runs"
    return {path.parent.relative_to(runs).as_posix(): path.parent for path in runs.glob("three/*/*/status.json")}


def index(folder: Path) -> list[dict]:
    """The jobs in the index of the one sweep below `folder`."""
    (path,) = folder.glob("runs/.sweeps/*/sweep.json")
    return read(path)["jobs"]


def assert_same(found: dict[str, Path], expected: dict[str, Path]) -> None:
    assert found.keys() <= expected.keys()
    for name, run in found.items():
        assert weights(run) == weights(expected[name]), name
        assert untimed(run) == untimed(expected[name]), name


class Elsewhere(ClusterLauncher):
    """Runs each group in this process, as another process would find it: pickled, and somewhere else."""

    elsewhere = Path("/")
    lost = ()

    def __init__(self, **options):
        super().__init__(**{"fused": False, "students_per_job": None, **options})
        self.groups, self.done = [], {}

    def start(self, group):
        self.groups.append([number for number, _, _ in group.jobs])
        self.done[len(self.groups)] = group
        return len(self.groups)

    def describe(self, jobs, groups):
        return f"{jobs} jobs in {groups} groups"

    def wait(self, handles):
        return list(reversed(handles))

    def failures(self, handle):
        number, words, _ = self.done[handle].jobs[0]
        if number in self.lost:
            raise OSError("the machine burnt down\nand nobody knows why")
        group = pickle.loads(cloudpickle.dumps(self.done[handle]))
        here = Path.cwd()
        os.chdir(self.elsewhere)
        config = copy.deepcopy(self.config)
        with open_dict(config):
            config.hydra.job.num, config.hydra.overrides.task = number - 1, words
        HydraConfig.instance().set_config(config)
        try:
            return group(OmegaConf.create({}))
        finally:
            os.chdir(here)

    def stop(self, handles):
        raise AssertionError("nobody asked to stop")


def launch_elsewhere(launcher: Elsewhere, *jobs: str, planned: bool = True) -> Jobs:
    """Hand jobs, each written as words, to a launcher as Hydra does; the sweep's task afterwards."""
    words = [[*TINY, "study=three", *job.split()] for job in jobs]
    task = Jobs(None, [(job, parse(compose_config(job))) for job in words] if planned else None)
    config = compose_config(["hydra/launcher=fused"], with_hydra=True)
    config.hydra.sweep.dir = "runs/.sweeps/test"
    launcher.setup(hydra_context=None, task_function=task, config=config)
    assert len(launcher.launch([["hydra/launcher=fused", *job] for job in words], 0)) == len(jobs)
    return task


# Through the engines


@with_ray
def test_a_sweep_through_ray_leaves_the_runs_of_the_basic_launcher_and_is_collected(folder, taught, ray_here):
    assert train(*THREE, "hydra/launcher=ray") == 0
    assert len(students(folder)) == 3
    assert_same(students(folder), students(taught))
    jobs = index(folder)
    assert [(job["number"], job["state"], job["note"]) for job in jobs] == [(n, "done", "") for n in (1, 2, 3)]
    assert os.getpid() not in {job["pid"] for job in jobs}
    assert all(job["device"].startswith("cpu") for job in jobs)
    assert all((folder / job["directory"] / "result.json").is_file() for job in jobs)
    assert vkd.collect.main(["study=three"]) == 0
    assert all(name in (folder / "results" / "three" / "table.md").read_text() for name in ("fkld", "rkld", "js"))


@with_ray
def test_students_side_by_side_in_a_ray_worker_are_those_of_the_basic_launcher_and_one_fails_alone(
    folder, taught, ray_here, capfd
):
    words = ["divergence=fkld,rkld", "method.kd.weight=0.9,1e38"]
    assert train(*THREE, *words, "hydra/launcher=fused_ray") == 1
    said = capfd.readouterr()
    assert "4 jobs in 1 Ray task;" in said.out
    jobs = index(folder)
    assert [job["state"] for job in jobs] == ["done", "failed", "done", "failed"]
    assert len({job["pid"] for job in jobs}) == 1
    done = {name: run for name, run in students(folder).items() if (run / "result.json").exists()}
    assert len(done) == 2
    assert_same(done, students(taught))
    assert all(read(run / "result.json")["timing"]["students_at_once"] == 4 for run in done.values())
    told = said.err[said.err.index("vkd: 2 of 4 jobs failed:") :].splitlines()
    assert [line.split()[:2] for line in told[1:3]] == [["job", "2"], ["job", "4"]]
    assert "the loss is not finite: term 'kd'" in told[1]


@with_ray
def test_jobs_that_no_machine_of_a_local_ray_has_room_for_are_refused_rather_than_waited_for(folder, ray_here, capsys):
    assert train(*THREE, "hydra/launcher=ray", "hydra.launcher.gpus_per_job=64") == 2
    said = capsys.readouterr().err
    assert "a job asks for" in said
    assert "64 GPUs, and no machine of the Ray cluster has both" in said
    assert students(folder) == {}


@with_submitit
def test_a_sweep_through_submitits_local_executor_leaves_the_runs_of_the_basic_launcher(folder, taught, capsys):
    assert train(*THREE, "hydra/launcher=fused_slurm_local") == 0
    assert "3 jobs in 1 process of this machine, 1 at once" in capsys.readouterr().out
    assert len(students(folder)) == 3
    assert_same(students(folder), students(taught))
    jobs = index(folder)
    assert [job["state"] for job in jobs] == ["done"] * 3
    assert len({job["pid"] for job in jobs} - {os.getpid()}) == 1
    (log,) = folder.glob("runs/.sweeps/*/.submitit/*/*.out")
    assert log.read_text().count("done: val") == 3


@with_submitit
def test_slurm_gets_one_array_with_a_gpu_a_job_and_the_signal_before_the_limit(tmp_path, monkeypatch):
    scripts = {"srun": "", "sbatch": 'cp "$1" "$(dirname "$0")/given"; echo Submitted batch job 77'}
    options = {"partition": "gpus", "timeout_min": 30, "array_parallelism": 2}
    launcher, groups = submitted(tmp_path, monkeypatch, scripts, **options)
    assert [launcher.start(group) for group in groups] == [1, 2, 3]
    assert launcher.describe(3, 3) == "3 jobs in 3 of Slurm's: squeue -j 77, scancel 77"
    asked = (tmp_path / "given").read_text()
    for option in ("array=0-2%2", "gpus-per-node=1", "partition=gpus", "time=30", "signal=USR2@180", "job-name=vkd"):
        assert f"#SBATCH --{option}\n" in asked
    # What each job is given is its own group alone, so that a large sweep stays small.
    given = [pickle.loads(path.read_bytes()).function.task_function for path in tmp_path.rglob("*_submitted.pkl")]
    assert sorted(job[0] for group in given for job in group.jobs) == [1, 2, 3]


@with_submitit
def test_a_job_that_slurm_has_ended_without_a_result_is_lost_also_where_it_keeps_no_accounts(tmp_path, monkeypatch):
    scripts = {
        "srun": "",
        "sbatch": "echo Submitted batch job 77",
        "squeue": "echo 77_1",
        "sacct": "echo Slurm accounting storage is disabled >&2; exit 1",
    }
    launcher, _ = submitted(tmp_path, monkeypatch, scripts)
    monkeypatch.setattr(slurm_launcher, "_SECONDS_BETWEEN_LOOKS", 0)
    assert launcher.wait([1, 2, 3]) == []
    assert launcher.wait([1, 2, 3]) == [1, 3]
    with pytest.raises(RuntimeError, match="Slurm has ended job 77_0, which left no result"):
        launcher.failures(1)


@with_submitit
def test_where_there_is_no_slurm_the_command_says_so(folder, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(folder))
    assert train(*THREE, "hydra/launcher=slurm") == 2
    assert "there is no Slurm on this machine" in capsys.readouterr().err
    assert students(folder) == {}


def submitted(tmp_path, monkeypatch, scripts: dict[str, str], **options) -> tuple[SlurmLauncher, list[Group]]:
    """The launcher with three groups, which it has handed to a Slurm of which these scripts are the commands."""
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    launcher = SlurmLauncher(submitit_folder=str(tmp_path / "jobs" / "%j"), **file_options("slurm", options))
    task = Jobs(None, None)
    launcher.setup(hydra_context=None, task_function=task, config=OmegaConf.create({}))
    groups = [Group(task, [(number, [f"seed={number}"], None)], str(tmp_path)) for number in (1, 2, 3)]
    with launcher.opened(groups):
        return launcher, groups


# Groups


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, [[1], [2, 4], [3], [5]]),
        ({"fused": True}, [[1, 3], [2, 4], [5]]),
        ({"fused": True, "students_per_job": 1}, [[1], [2, 4], [3], [5]]),
    ],
)
def test_jobs_that_ask_for_the_same_run_share_a_worker_and_fused_ones_all_that_can_be_side_by_side(
    folder, monkeypatch, options, groups
):
    launcher = Elsewhere(**options)
    monkeypatch.setattr(Elsewhere, "failures", lambda *_: [])
    # Plain training has no divergence, so that the second and the fourth are one run.
    launch_elsewhere(
        launcher,
        "divergence=fkld",
        "method=none divergence=fkld",
        "divergence=rkld",
        "method=none divergence=rkld",
        "divergence=rkld seed=2",
    )
    assert launcher.groups == groups


def test_a_worker_that_stands_elsewhere_writes_where_the_command_was_called_and_under_the_jobs_own_number(
    folder, taught, tmp_path_factory
):
    launcher = Elsewhere()
    launcher.elsewhere = tmp_path_factory.mktemp("elsewhere")
    task = launch_elsewhere(launcher, "divergence=fkld", "divergence=rkld method.kd.weight=1e38", "divergence=js")
    assert [number for number, _, _ in task.failures] == [2]
    assert [job["state"] for job in index(folder)] == ["done", "failed", "done"]
    assert list(launcher.elsewhere.iterdir()) == []
    assert_same({name: run for name, run in students(folder).items() if "rkld" not in name}, students(taught))


def test_a_lost_worker_is_a_failure_of_its_jobs_and_the_others_are_waited_for(folder, capsys):
    launcher = Elsewhere()
    launcher.lost = [1]
    task = launch_elsewhere(launcher, "divergence=fkld", "divergence=js")
    assert task.summary() == 1
    assert [job["state"] for job in index(folder)] == ["waiting", "done"]
    assert "1 of 2 jobs failed:\njob 1 (" in capsys.readouterr().err
    assert task.failures[0][2] == "its worker was lost (OSError: the machine burnt down)"


def test_a_worker_without_the_file_system_of_the_command_says_so(tmp_path):
    group = Group(Jobs(None, None), [(3, ["seed=1"], None)], str(tmp_path / "missing"))
    ((number, words, reason),) = group(OmegaConf.create({}))
    assert (number, words) == (3, "seed=1")
    assert "missing is not on" in reason


# The signal before a time limit


@pytest.fixture
def heard():
    """What a scheduler's handler of SIGUSR2, which leaves the process as submitit's does, was told, and when."""
    events = []

    def leave(number, frame):
        events.append("queued again")
        raise SystemExit(144)

    before = signal.signal(signal.SIGUSR2, leave)
    yield events
    signal.signal(signal.SIGUSR2, before)


def test_the_scheduler_queues_a_job_again_only_when_its_checkpoint_is_written(heard):
    def work(_config):
        with stop_on_signals() as should_stop:
            signal.raise_signal(signal.SIGUSR2)
            assert should_stop()
            heard.append("checkpoint")
            raise Interrupted("after step 3")

    with pytest.raises(SystemExit, match="144"):
        Group(work, [(1, [], None)], ".")(None)
    assert heard == ["checkpoint", "queued again"]
    assert signal.getsignal(signal.SIGUSR2).__name__ == "leave"


def test_a_job_that_does_not_train_yet_is_queued_again_at_once_whatever_it_does_about_exits(heard):
    def work(_config):
        with contextlib.suppress(Exception, SystemExit):
            signal.raise_signal(signal.SIGUSR2)
            heard.append("went on")

    with pytest.raises(SystemExit, match="144"):
        Group(work, [(1, [], None)], ".")(None)
    assert heard == ["queued again"]


def test_sigterm_which_submitit_ignores_stops_a_job_that_does_not_train_yet():
    ignored = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ignored.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            Group(lambda _config: signal.raise_signal(signal.SIGTERM), [(1, [], None)], ".")(None)
    finally:
        signal.signal(signal.SIGTERM, before)


# What is asked for


@pytest.mark.parametrize(("launcher", "extra"), [(RayLauncher, "ray"), (SlurmLauncher, "slurm")])
def test_a_launcher_whose_packages_are_missing_says_what_to_install(monkeypatch, launcher, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "." in name else SimpleNamespace())
    with pytest.raises(vkd.errors.ConfigError) as caught:
        require_engine(f"{launcher.__module__}.{launcher.__name__}")
    package = {"ray": "hydra-ray-launcher", "slurm": "hydra-submitit-launcher"}[extra]
    assert f"hydra/launcher={extra} needs {package}, which is not installed" in str(caught.value)
    assert f"pip install 'vkd[{extra}]'" in str(caught.value)


def test_launchers_that_are_not_for_clusters_need_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    require_engine("hydra_plugins.vkd_launchers.fused_launcher.FusedLauncher")
    require_engine("hydra._internal.core_plugins.basic_launcher.BasicLauncher")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ray", "gpus_per_job", "many"),
        ("fused_ray", "gpus_per_job", -1),
        ("ray", "cpus_per_job", True),
        ("fused_ray", "students_per_job", 0),
        ("fused_slurm", "students_per_job", "two"),
        ("slurm_local", "array_parallelism", 0),
        ("slurm", "executor", "pbs"),
    ],
)
def test_a_wrong_option_of_a_launcher_is_one_message(monkeypatch, name, option, value):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    options = {**file_options(name, {}), option: value}
    launcher = RayLauncher(**options) if "ray" in name else SlurmLauncher(submitit_folder="jobs", **options)
    with pytest.raises(vkd.errors.ConfigError, match=rf"hydra\.launcher\.{option}={value}\n  expected: "):
        launcher.setup(hydra_context=None, task_function=Jobs(None, None), config=OmegaConf.create({}))


@pytest.mark.parametrize("engine", ["ray", "slurm", "slurm_local"])
def test_a_fused_launcher_differs_from_its_base_in_being_fused_alone(engine):
    plain, fused = (file_options(name, {}) for name in (engine, f"fused_{engine}"))
    assert {**plain, "fused": True} == fused
    assert (plain["fused"], fused["fused"]) == (False, True)


def test_the_keys_of_the_slurm_launcher_are_those_of_hydras():
    queue = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config").SlurmQueueConf
    ours = OmegaConf.load(config_directory() / "hydra" / "launcher" / "slurm.yaml")
    assert set(ours) == {*OmegaConf.structured(queue), "fused", "students_per_job", "executor"}


def test_no_engine_is_imported_before_it_is_used():
    code = "import sys; from hydra.core.plugins import Plugins; Plugins.instance(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hydra_plugins.vkd_launchers.ray_launcher" in done.stdout.split()
    assert not {"ray", "submitit", "torch"} & set(done.stdout.split())
