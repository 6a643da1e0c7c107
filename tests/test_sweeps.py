"""Sweeps that survive: what their index says, what the same command does again, and how failures are told."""

import functools
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import TINY, lines, only_run, read, runs_in, snapshot, start, train, untimed, wait_for_epochs, weights
from PIL import Image

import vkd
import vkd.train
from vkd.composition import compose_jobs
from vkd.errors import ConfigError
from vkd.jobs import Jobs
from vkd.records.run_directory import RunDirectory
from vkd.records.sweep_index import Job, Sweep, SweepIndex, read_sweep
from vkd.training.checkpoint import read_checkpoint
from vkd.training.learner import Learner
from vkd.training.session import Session

SWEEP = ["-m", "divergence=abkd", "divergence.alpha=0.5,1", "divergence.beta=0.5"]


def index_in(place: Path) -> Path:
    """The one index of a sweep below a working directory."""
    (path,) = place.glob("runs/.sweeps/*/sweep.json")
    return path


def states(place: Path) -> list[str]:
    return [job.state for job in read_sweep(index_in(place)).jobs]


def failing_learner(fails):
    """`Learner.step` that raises where `fails(learner)`."""
    step = Learner.step

    def guarded(self, *arguments, **options):
        if fails(self):
            raise ZeroDivisionError("the cause")
        return step(self, *arguments, **options)

    return guarded


# The index


def test_the_index_lists_every_job_with_its_words_state_directory_and_device(place):
    assert train(*SWEEP, "seed=1,2", "recipe.batch_size=256") == 0
    sweep = read_sweep(index_in(place))
    assert sweep.command == [*TINY, *SWEEP, "seed=1,2", "recipe.batch_size=256"]
    assert sweep.directory == str(place)
    assert [job.number for job in sweep.jobs] == [1, 2, 3, 4]
    for job, (alpha, seed) in zip(sweep.jobs, [(0.5, 1), (0.5, 2), (1.0, 1), (1.0, 2)], strict=True):
        result = read(place / job.directory / "result.json")
        assert (result["divergence"]["alpha"], result["seed"]) == (alpha, seed)
        assert f"seed={seed}" in job.overrides
        assert (job.state, job.pid, job.note, job.traceback) == ("done", os.getpid(), "", "")
        assert job.device.startswith("cpu (")
    assert [path.name for path in index_in(place).parent.parent.iterdir()] == [index_in(place).parent.name]


def test_a_single_run_has_no_index(place):
    assert train() == 0
    assert not (place / "runs" / ".sweeps").exists()


def test_the_same_points_in_other_words_and_another_order_are_the_same_sweep_and_are_not_done_again(place, capsys):
    assert train(*SWEEP) == 0
    before = snapshot(place / "runs" / "digits")
    capsys.readouterr()
    assert train("-m", "divergence=abkd", "divergence.alpha=1.0,0.5", "divergence.beta=5e-1", "workers=0") == 0
    assert capsys.readouterr().out.count("already done: ") == 2
    assert snapshot(place / "runs" / "digits") == before
    sweep = read_sweep(index_in(place))
    assert [job.state for job in sweep.jobs] == ["done", "done"]
    assert [job.note for job in sweep.jobs] == ["already done", "already done"]
    assert "divergence.alpha=1.0" in sweep.jobs[0].overrides
    assert read(place / sweep.jobs[0].directory / "result.json")["divergence"]["alpha"] == 1.0


def test_the_same_run_twice_in_one_sweep_is_done_once_and_both_jobs_say_where(place):
    assert train("-m", "hydra/launcher=fused", "divergence=abkd", "divergence.beta=0.5", "divergence.alpha=1,1.0") == 0
    first, second = read_sweep(index_in(place)).jobs
    assert (first.state, second.state) == ("done", "done")
    assert first.directory == second.directory
    assert second.note == "the same run as another"
    assert only_run(place / "runs" / "digits")


def test_a_damaged_index_stops_no_sweep(place):
    assert train(*SWEEP) == 0
    index_in(place).write_text("{ torn")
    assert train(*SWEEP) == 0
    assert states(place) == ["done", "done"]


def test_an_index_that_cannot_be_written_is_said_before_anything_is_done(place, capsys):
    (place / "runs" / ".sweeps").write_text("in the way")
    assert train(*SWEEP) == 2
    said = capsys.readouterr().err
    assert "the files of the sweep cannot be written" in said
    assert "runs_root=" in said
    assert not (place / "runs" / "digits").exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"jobs": 3}',
        '{"command": [], "directory": "", "jobs": [{"number": 1, "key": "", "overrides": [], "state": "well"}]}',
        '{"command": [], "directory": "", "jobs": [{"number": "x", "key": "", "overrides": []}]}',
        '{"command": [], "directory": "", "jobs": [{"number": true, "key": "", "overrides": []}]}',
        '{"command": [], "directory": "", "jobs": [{"number": 1%s, "key": "", "overrides": []}]}' % ("0" * 400),
        '{"command": [], "directory": "", "jobs": [{"number": 1, "key": "", "overrides": "abc"}]}',
        '{"command": [], "directory": "", "jobs": [{"number": 1, "key": "", "overrides": [], "state": ["done"]}]}',
        '{"command": [], "directory": "", "jobs": []}',
        '{"command": [], "directory": "", "jobs": {}}',
        "[" * 100_000,
    ],
)
def test_something_else_than_an_index_is_one_message(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ConfigError, match="is damaged"):
        read_sweep(tmp_path / "sweep.json")


def test_an_index_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "sweep.json")
    with pytest.raises(ConfigError, match="it is no plain file"):
        read_sweep(tmp_path / "sweep.json")


def test_a_command_with_the_jobs_in_another_order_mixes_none_of_them_up(tmp_path):
    def begun(*keys: str) -> SweepIndex:
        index = SweepIndex(tmp_path)
        index.begin(Sweep([], "", [Job(number, key, [key]) for number, key in enumerate(keys, start=1)]))
        return index

    first = begun("a", "b", "b")
    begun("b", "a", "b")
    first.update(1, "a", state="done", directory="runs/a", device="cpu", pid=7)
    first.update(3, "b", state="failed")
    assert [(job.key, job.state) for job in first.read().jobs] == [("b", "waiting"), ("a", "done"), ("b", "failed")]
    kept = begun("a", "b", "b").read().jobs[0]
    assert (kept.state, kept.directory, kept.device, kept.pid) == ("done", "runs/a", "cpu", 7)


def test_where_a_job_ran_is_kept_when_the_command_is_given_again(place):
    assert train(*SWEEP) == 0
    (before, _) = read_sweep(index_in(place)).jobs
    index = SweepIndex(index_in(place).parent)
    index.update(1, before.key, host="node7", pid=77)
    assert train(*SWEEP) == 0
    (after, _) = read_sweep(index_in(place)).jobs
    assert (after.host, after.pid, after.device) == ("node7", 77, before.device)
    assert after.note == "already done"


def test_many_processes_write_one_index_and_no_change_is_lost(tmp_path):
    index = SweepIndex(tmp_path)
    index.begin(Sweep(["-m"], str(tmp_path), [Job(number, str(number), []) for number in range(1, 41)]))
    code = """
import sys
from vkd.records.run_directory import RunDirectory
from vkd.records.sweep_index import SweepIndex
index = SweepIndex(sys.argv[1])
for number in range(int(sys.argv[2]), 41, 4):
    index.update(number, str(number), state="running")
    index.update(number, str(number), state="done", note=f"by {sys.argv[2]}")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(vkd.__file__).parents[1])}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(first)], env=environment)
        for first in range(1, 5)
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    assert [(job.state, job.note) for job in index.read().jobs] == [
        ("done", f"by {(number - 1) % 4 + 1}") for number in range(1, 41)
    ]


# Failures


def test_of_fifty_jobs_five_fail_and_when_the_cause_is_gone_those_five_alone_are_done(place, capsys, monkeypatch):
    words = ["-m", "hydra/launcher=fused", "divergence=abkd", "divergence.alpha=0,0.25,0.5,0.75,1"]
    words += ["divergence.beta=0.25,0.5", "seed=1,2,3,4,5", "recipe.batch_size=256"]
    count, failures = 50, 5
    # The command is given twice, and fifty jobs take seconds to compose.
    planned = functools.cache(lambda flags, overrides: compose_jobs(flags, overrides))
    monkeypatch.setattr(vkd.train, "compose_jobs", lambda flags, overrides: planned(tuple(flags), tuple(overrides)))

    def is_bad(learner):
        parameters = learner.method.methods["kd"].divergence.parameters
        return parameters["beta"] == 0.25 and learner.is_of_seed_3

    made = Learner.__init__

    def make(self, *arguments, seed, **options):
        self.is_of_seed_3 = seed == 3
        made(self, *arguments, seed=seed, **options)

    monkeypatch.setattr(Learner, "__init__", make)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", failing_learner(is_bad))
        assert train(*words) == 1
    said = capsys.readouterr().err
    assert f"{failures} of {count} jobs failed:" in said
    summary = said[said.index(f"{failures} of {count} jobs failed:") :].splitlines()[1:]
    assert len(summary) == failures
    assert all("divergence.beta=0.25 seed=3" in line and "ZeroDivisionError: the cause" in line for line in summary)
    runs = runs_in(place / "runs" / "digits")
    results = [run for run in runs if (run / "result.json").exists()]
    failed = [run for run in runs if read(run / "status.json")["state"] == "failed"]
    assert (len(runs), len(results), len(failed)) == (count, count - failures, failures)
    for run in failed:
        assert "ZeroDivisionError: the cause" in read(run / "status.json")["traceback"]
        assert "in guarded" in (run / "train.log").read_text()
    assert sorted(states(place)) == ["done"] * (count - failures) + ["failed"] * failures
    for job in read_sweep(index_in(place)).jobs:
        assert ("in guarded" in job.traceback) == (job.state == "failed")

    before = {run: snapshot(run) for run in results}
    assert train(*words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("already done: ") == count - failures
    assert {run: snapshot(run) for run in results} == before
    assert all((run / "result.json").exists() for run in runs)
    assert states(place) == ["done"] * count


def test_a_misspelt_key_stops_a_sweep_before_its_first_job_and_leaves_nothing(place, capsys):
    before = snapshot(place)
    assert train(*SWEEP, "recipe.epoch=3,4") == 2
    assert "there is no key recipe.epoch" in capsys.readouterr().err
    assert snapshot(place) == before


def test_jobs_that_ran_elsewhere_are_told_by_the_index_however_they_ended(place, capsys):
    planned = compose_jobs(["-m"], [*TINY, "seed=1,2,3,4,5"])
    jobs = Jobs(None, planned, ["-m"])
    elsewhere = pickle.loads(pickle.dumps(jobs))
    assert elsewhere.index.path == jobs.index.path
    keys = [job.key for job in jobs.index.read().jobs]
    for number, state in enumerate(["done", "failed", "running", "interrupted"], start=1):
        note = "why" if state == "failed" else ""
        elsewhere.index.update(number, keys[number - 1], state=state, note=note, pid=77, host="node")
    assert jobs.summary() == 1
    said = capsys.readouterr().err
    assert "4 of 5 jobs failed:" in said
    for number, told in [(2, "why"), (3, "process 77 on node"), (4, "interrupted"), (5, "did not start")]:
        (line,) = [line for line in said.splitlines() if line.startswith(f"job {number} (")]
        assert f"seed={number}): " in line
        assert told in line
    for number in range(1, 6):
        elsewhere.index.update(number, keys[number - 1], state="done")
    assert jobs.summary() == 0


def test_an_index_that_is_lost_fails_no_job_that_ran_here(place, monkeypatch, capsys):
    step = Learner.step

    def lose_it(self, *arguments, **options):
        for path in place.glob("runs/.sweeps/*/sweep.json"):
            path.unlink()
        return step(self, *arguments, **options)

    monkeypatch.setattr(Learner, "step", lose_it)
    assert train("-m", "seed=1,2") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "the index of the sweep could not be written" in said.out
    assert len(runs_in(place / "runs" / "digits")) == 2


def test_a_job_that_another_command_is_at_is_no_failure_of_this_one(place, capsys):
    assert train("-m", "seed=1,2") == 0
    one, other = runs_in(place / "runs" / "digits")
    (other / "result.json").unlink()
    index = SweepIndex(index_in(place).parent)
    index.update(2, index.read().jobs[1].key, state="running", pid=77)
    capsys.readouterr()
    with RunDirectory(other).held():
        assert train("-m", "seed=1,2") == 0
        said = capsys.readouterr()
        assert said.err == ""
        assert "job 2 is left to whoever is at it: another process is at work in" in said.out
        assert (one / "result.json").exists()
        # From a process elsewhere the index alone says how it stands.
        jobs = Jobs(None, compose_jobs(["-m"], [*TINY, "seed=1,2"]), ["-m"])
        for number, state in enumerate(("done", "running"), start=1):
            jobs.index.update(number, jobs._keys[number - 1], state=state, directory=str(other))
        assert jobs.summary() == 0
    assert jobs.summary() == 0
    assert train("-m", "seed=1,2") == 0
    assert (other / "result.json").exists()


def test_a_launcher_that_cannot_start_leaves_nothing(place, monkeypatch, capsys):
    before = snapshot(place)

    def refuse(*_arguments, **_options):
        raise ConfigError("this launcher cannot start here")

    monkeypatch.setattr(vkd.train, "run_hydra", refuse)
    assert train("-m", "seed=1,2") == 2
    assert "this launcher cannot start here" in capsys.readouterr().err
    assert snapshot(place) == before


def test_a_run_that_was_done_otherwise_says_so_where_determinism_is_asked_for(place, capsys):
    assert train() == 0
    assert train("deterministic=true") == 0
    assert "it was done without deterministic=true" in capsys.readouterr().out


def test_a_teacher_whose_weights_are_gone_is_trained_again_and_one_whose_are_damaged_says_how(place, capsys):
    (teacher,) = (place / "runs" / "teachers").glob("*/*/student.safetensors")
    whole_file = teacher.read_bytes()
    teacher.write_bytes(whole_file[:100])
    assert train("seed=1") == 1
    assert f"try: remove {teacher.parent.relative_to(place)}, and the same command trains" in capsys.readouterr().err
    teacher.unlink()
    assert train("seed=1") == 0
    assert weights(teacher.parent)


def test_who_waits_for_a_teacher_that_another_process_trains_can_be_stopped(place):
    (teacher,) = (place / "runs" / "teachers").glob("*/*")
    (teacher / "result.json").unlink()
    with RunDirectory(teacher).held():
        process = start("vkd.train", *TINY, cwd=place)
        assert any("waiting for another process" in line for line in iter(process.stdout.readline, ""))
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped while another process is at work in" in said


# Stops, kills, and what disks do


def test_a_stopped_sweep_says_what_was_interrupted_and_what_did_not_start(place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        step = Learner.step

        def stop_in_the_second_run(self, *arguments, **options):
            if states(place) == ["done", "running", "waiting"]:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, *arguments, **options)

        patch.setattr(Learner, "step", stop_in_the_second_run)
        assert train("-m", "seed=1,2,3") == 130
    assert "the same command goes on from there" in capsys.readouterr().out
    assert states(place) == ["done", "interrupted", "waiting"]
    assert read(runs_in(place / "runs" / "digits")[1] / "status.json")["epoch"] == 0
    assert train("-m", "seed=1,2,3") == 0
    said = capsys.readouterr().out
    assert said.count("already done: ") == 1
    assert "going on after step 1 of epoch 1" in said
    assert states(place) == ["done"] * 3


LONG = ["recipe.epochs=4", "divergence=rkld"]


def stop_after(epochs: int, *words: str) -> None:
    """Start a run and stop it when it has so many epochs behind it."""
    finish_epoch = Session.finish_epoch

    def finish_and_stop(self, epoch):
        finish_epoch(self, epoch)
        if epoch == epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "finish_epoch", finish_and_stop)
        assert train(*LONG, *words) == 130


def assert_goes_on_as_if_nothing_had_been(place: Path, run: Path) -> None:
    assert train(*LONG) == 0
    assert train(*LONG, "runs_root=whole") == 0
    expected = only_run(place / "whole" / "digits")
    assert weights(run) == weights(expected)
    assert untimed(run) == untimed(expected)


def test_a_torn_checkpoint_gives_way_to_the_one_before_and_the_log_says_so(place):
    stop_after(3)
    run = only_run(place / "runs" / "digits")
    assert read_checkpoint(run / "last.ckpt")["position"] == [4, 0]
    assert read_checkpoint(run / "previous.ckpt")["position"] == [3, 0]
    content = (run / "last.ckpt").read_bytes()
    (run / "last.ckpt").write_bytes(content[: len(content) // 2])
    assert_goes_on_as_if_nothing_had_been(place, run)
    log = (run / "train.log").read_text()
    assert "last.ckpt is damaged: its checksum does not match; going on from the checkpoint before it" in log
    assert "going on after step 0 of epoch 3" in log
    assert not (run / "previous.ckpt").exists()
    assert [line["epoch"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_kill_within_an_epoch_loses_what_came_after_the_last_checkpoint_alone(place, precision):
    words = [*LONG, f"precision={precision}", "checkpoint_minutes=0", "recipe.ema_decay=0.9", "recipe.batch_size=16"]
    process = start("vkd.train", *TINY, *words, cwd=place)
    run = wait_for_epochs(process, place / "runs" / "digits", 1)
    while (read_checkpoint(run / "last.ckpt")["position"])[1] == 0 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    epoch, step = read_checkpoint(run / "last.ckpt")["position"]
    assert step > 0
    assert train(*words) == 0
    assert f"going on after step {step} of epoch {epoch}" in (run / "train.log").read_text()
    assert train(*words, "checkpoint_minutes=null", "runs_root=other") == 0
    other = only_run(place / "other" / "digits")
    assert run.name == other.name
    assert weights(run) == weights(other)
    assert untimed(run) == untimed(other)


def test_a_kill_while_workers_read_the_images_changes_no_bit_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("ant", "bee"):
            folder = tmp_path / "photos" / split / kind
            folder.mkdir(parents=True)
            for number in range(24):
                image = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{number}.png")
    words = ["dataset=imagefolder", "dataset.root=photos", "dataset.image_size=16", "dataset.val_fraction=0.25"]
    words += ["recipe.epochs=3", "recipe.batch_size=4", "teacher.recipe.epochs=1", "teacher.recipe.batch_size=16"]
    words += ["workers=2", "checkpoint_minutes=0"]
    process = start("vkd.train", *TINY, *words, cwd=tmp_path)
    run = wait_for_epochs(process, tmp_path / "runs" / "imagefolder", 1)
    while read_checkpoint(run / "last.ckpt")["position"][1] == 0 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert train(*words, "workers=0") == 0
    assert "going on after step" in (run / "train.log").read_text()
    shutil.copytree(tmp_path / "runs" / "teachers", tmp_path / "other" / "teachers")
    assert train(*words, "workers=0", "runs_root=other") == 0
    other = only_run(tmp_path / "other" / "imagefolder")
    assert run.name == other.name
    assert weights(run) == weights(other)
    assert untimed(run) == untimed(other)


def test_a_kill_while_the_teacher_is_trained_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["teacher.recipe.epochs=12", "recipe.batch_size=128"]
    first = start("vkd.train", *TINY, *words, cwd=tmp_path)
    teacher = wait_for_epochs(first, tmp_path / "runs" / "teachers", 2)
    first.send_signal(signal.SIGSTOP)  # so that it does not finish meanwhile
    # This one finds the teacher in the making, and waits for whoever is at it.
    second = start("vkd.train", *TINY, *words, cwd=tmp_path)
    assert any("waiting for another process" in line for line in iter(second.stdout.readline, ""))
    first.kill()
    first.communicate()
    assert read(teacher / "status.json")["state"] == "running"
    assert not (teacher / "result.json").exists()
    assert not (teacher / "student.safetensors").exists()
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0, said
    assert "going on after step" in (teacher / "train.log").read_text()
    assert RunDirectory(teacher).is_done()
    assert [line["epoch"] for line in lines(teacher / "metrics.jsonl")] == list(range(1, 13))
    assert (only_run(tmp_path / "runs" / "digits") / "result.json").exists()


def test_a_disk_that_is_full_keeps_the_checkpoint_and_stops_the_run_with_one_message(place):
    stop_after(2)
    run = only_run(place / "runs" / "digits")
    kept = (run / "last.ckpt").read_bytes()
    most = len(kept) // 2

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    environment = {**os.environ, "PYTHONPATH": str(Path(vkd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "vkd.train", *TINY, *LONG],
        cwd=place, env=environment, preexec_fn=limited, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "last.ckpt could not be written: " in done.stderr
    assert "the same command again once there is" in done.stderr
    assert "Traceback" not in done.stderr
    assert (run / "last.ckpt").read_bytes() == kept
    assert read(run / "status.json")["state"] == "failed"
    assert "last.ckpt could not be written" in read(run / "status.json")["reason"]
    assert not list(run.glob(".*.tmp"))
    assert_goes_on_as_if_nothing_had_been(place, run)


def test_a_checkpoint_of_another_config_is_not_gone_on_from(place, capsys):
    for seed in (1, 2):
        stop_after(2, f"seed={seed}")
    one, other = runs_in(place / "runs" / "digits")
    (other / "last.ckpt").write_bytes((one / "last.ckpt").read_bytes())
    (other / "previous.ckpt").unlink()
    assert train(*LONG, "seed=2") == 1
    assert "last.ckpt belongs to a run with another config" in capsys.readouterr().err
    assert not (other / "result.json").exists()
    (other / "last.ckpt").unlink()
    assert train(*LONG, "seed=2") == 0
