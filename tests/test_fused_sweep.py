"""`python -m vkd.train -m hydra/launcher=fused`: students side by side, each of which is what it would be alone."""

import contextlib
import dataclasses
import functools
import io
import os
import re
import shutil
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import TINY, lines, read, runs_in, snapshot, start, train, untimed, wait_for_epochs, weights
from offline_runs import offline_run
from rich.console import Console

import vkd.collect
import vkd.training.run
from vkd.composition import compose_config
from vkd.config import Config, parse
from vkd.jobs import Jobs
from vkd.training.learner import Learner
from vkd.training.run import Outcome, run, run_together, shared_part
from vkd.training.session import Session
from vkd.training.trainer import Trainer

QUIET = Console(quiet=True)
FUSED = ["-m", "hydra/launcher=fused"]
SHORT = ["recipe.epochs=2", "recipe.batch_size=128"]
# Twelve jobs, of which eight are runs: neither `at` nor plain training has a divergence.
SWEEP = ["method=kd,at,none", "divergence=fkld,abkd", "seed=1,2"]
JOBS, RUNS = 12, 8


def command(folder: Path, *words: str) -> SimpleNamespace:
    """Call vkd.train in `folder`: its exit code, what it said, and (seed, students) of every training that it did."""
    out, err = io.StringIO(), io.StringIO()
    with noted_trainings(folder) as trainings, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train(*SHORT, *words)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue(), trainings=trainings)


@contextlib.contextmanager
def noted_trainings(folder: Path):
    """Work in `folder`, and note (seed, students) of every training that is done there."""
    trainings = []
    fit = Trainer.fit

    def noted(self):
        trainings.append((self.seed, len(self.sessions)))
        return fit(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Trainer, "fit", noted)
        yield trainings


@functools.cache
def composed(*words: str) -> Config:
    """The config of one short run."""
    return parse(compose_config([*TINY, *SHORT, *words]))


KD, KD_AB = ("method=kd", "divergence=fkld"), ("method=kd", "divergence=abkd")
DKD, DKD_AB = ("method=dkd", "divergence=fkld"), ("method=dkd", "divergence=abkd")
AT, SP, PLAIN = ("method=at",), ("method=sp",), ("method=none",)


def together(folder: Path, *jobs: tuple[str, ...], **fields) -> tuple[list[Outcome], list[tuple[int, int]]]:
    """Train students side by side in `folder`, without a command line: their outcomes, and the trainings."""
    configs = [dataclasses.replace(composed(*words), **fields) for words in jobs]
    with noted_trainings(folder) as trainings:
        return run_together(configs, console=QUIET), trainings


def students(folder: Path) -> dict[str, Path]:
    """The directories of the students below a working directory, by their path from its runs root."""
    runs = folder / "runs"
    return {directory.relative_to(runs).as_posix(): directory for directory in runs_in(runs / "digits")}


def status(directory: Path) -> dict:
    return read(directory / "status.json")


def assert_same(found: dict[str, Path], expected: dict[str, Path]) -> None:
    """Every bit of what runs have learnt and measured is that of the run of the same name."""
    for name, directory in found.items():
        assert weights(directory) == weights(expected[name]), name
        assert untimed(directory) == untimed(expected[name]), name


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What is trained without a command is on one thread too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def with_teacher(trained, tmp_path_factory):
    """Makes empty working directories whose runs root holds the trained teacher."""

    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(trained / "teachers", folder / "runs" / "teachers")
        return folder

    return make


@pytest.fixture
def folder(with_teacher):
    """One such directory."""
    return with_teacher("folder")


@pytest.fixture(scope="module")
def fused(with_teacher):
    """A fused sweep, and where it was called. Tests must leave its students as they are."""
    folder = with_teacher("fused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("WANDB_MODE", "offline")
        done = command(folder, *FUSED, *SWEEP, "tracker=offline")
    done.folder = folder
    return done


def train_alone(folder: Path, *jobs: tuple[str, ...], seed: int = 1) -> Path:
    """Train students in `folder`, each by itself."""
    with noted_trainings(folder) as trainings:
        for words in jobs:
            run(dataclasses.replace(composed(*words), seed=seed), console=QUIET)
    assert trainings == [(seed, 1)] * len(jobs)
    return folder


@pytest.fixture(scope="module")
def alone(with_teacher):
    """A working directory with the sweep's students, each trained by itself."""
    folder = with_teacher("alone")
    for seed in (1, 2):
        train_alone(folder, KD, KD_AB, AT, PLAIN, seed=seed)
    return folder


@pytest.fixture(scope="module")
def others_alone(with_teacher):
    """Further students that are trained by themselves."""
    return train_alone(with_teacher("others_alone"), DKD, DKD_AB, SP)


@pytest.fixture(scope="module")
def expected(alone, others_alone):
    """The directories of all students that were trained by themselves."""
    return students(alone) | students(others_alone)


# A student among others


def test_every_student_of_a_fused_sweep_equals_its_run_alone_to_the_last_bit(fused, alone):
    assert fused.code == 0
    assert students(fused.folder).keys() == students(alone).keys()
    assert_same(students(fused.folder), students(alone))
    assert len({str(weights(directory)) for directory in students(fused.folder).values()}) == RUNS


def test_every_student_of_a_fused_sweep_has_a_directory_like_that_of_its_run_alone(fused, alone):
    for name, directory in students(fused.folder).items():
        other = students(alone)[name]
        files = {path.name for path in directory.iterdir()}
        assert files == {path.name for path in other.iterdir()} | {"wandb", ".wandb-id"}
        config, expected = (yaml.safe_load((path / "config.yaml").read_text()) for path in (directory, other))
        assert config["tracker"].pop("name") == "offline"
        assert expected["tracker"].pop("name") == "none"
        assert config == expected
        state = status(directory)
        assert (state["state"], state["epoch"], state["epochs"]) == ("done", 2, 2)


def test_a_train_log_has_the_lines_of_its_own_student_alone(fused):
    directories = students(fused.folder)
    for name, directory in directories.items():
        log = (directory / "train.log").read_text()
        assert re.findall(r" run (.+)", log) == [f"runs/{name}"]
        assert re.findall(r"epoch (\d)/2", log) == ["1", "2"]
        for epoch, line in zip(re.findall(r"epoch .*", log), lines(directory / "metrics.jsonl"), strict=True):
            assert f" {line['train/loss']:.4f}  " in epoch
            assert f"test {line['test/top1']:.2f} %" in epoch
        assert log.count("done: ") == 1
        assert not any(other.name in log for other in directories.values() if other != directory)


def test_every_student_of_a_fused_sweep_is_a_finished_offline_run_of_wandb(fused):
    identifiers = set()
    for directory in students(fused.folder).values():
        record, config, history, exit_code = offline_run(directory)
        identifiers.add(record.run_id)
        result = read(directory / "result.json")
        assert exit_code == 0
        assert record.display_name == directory.name
        assert (config["method"], config["seed"]) == (result["method"], result["seed"])
        assert [line["epoch"] for line in history] == [1, 2]
        assert history[-1]["test/top1"] == pytest.approx(result["metrics"]["test/top1"])
        assert history[-1]["train/loss"] == pytest.approx(result["metrics"]["train/loss"])
    assert len(identifiers) == RUNS


def test_the_table_of_a_fused_sweep_is_that_of_the_runs_alone(fused, alone, monkeypatch, capsys):
    for folder in (fused.folder, alone):
        monkeypatch.chdir(folder)
        assert vkd.collect.main(["study=digits"]) == 0
    for name in ("table.md", "table.csv"):
        found, expected = ((folder / "results" / "digits" / name).read_text() for folder in (fused.folder, alone))
        assert found == expected
    assert len(expected.splitlines()) == 1 + RUNS / 2


# Who is trained with whom


def test_students_of_a_seed_are_trained_side_by_side_where_they_can_share_a_teacher_and_equal_jobs_once(fused):
    # In Hydra's order: of each seed both of kd, then that of features, then plain training.
    assert fused.trainings == [(1, 2), (2, 2), (1, 1), (2, 1), (1, 1), (2, 1)]
    assert "group 6 of 6" in fused.out
    assert fused.out.count("the same run as another of this sweep") == JOBS - RUNS
    timings = [read(directory / "result.json")["timing"] for directory in students(fused.folder).values()]
    assert sorted(timing.get("students_at_once", 1) for timing in timings) == [1] * 4 + [2] * 4


def test_the_same_jobs_again_train_nothing_and_write_nothing(fused):
    before = {name: snapshot(directory) for name, directory in students(fused.folder).items()}
    again = command(fused.folder, *FUSED, "method=at", "divergence=fkld,abkd", "seed=1,2", "tracker=offline")
    assert (again.code, again.trainings) == (0, [])
    assert again.out.count("already done: ") == 4
    assert {name: snapshot(directory) for name, directory in students(fused.folder).items()} == before


def test_students_whose_methods_compare_features_share_a_teacher_too_and_equal_each_alone(folder, expected):
    assert together(folder, AT, SP)[1] == [(1, 2)]
    assert len(students(folder)) == 2
    assert_same(students(folder), expected)


@pytest.mark.parametrize(
    "apart",
    [
        {"dataset": {"val_fraction": 0.3}},
        {"dataset": {"augmentation": {"flip": {}}}},
        {"data_root": "elsewhere"},
        {"teacher": {"arch": "cifar_resnet8"}},
        {"teacher": {"checkpoint": "weights.safetensors"}},
        {"teacher": {"cache": "views"}},
        {"student": {"arch": "cifar_resnet8"}},
        {"recipe": {"epochs": 3}},
        {"recipe": {"batch_size": 32}},
        {"seed": 2},
        {"precision": "bf16"},
        {"study": "other"},
        {"channels_last": False},
        {"method": {}, "teacher": None},
        {"method": {"at": {}}},
        {"method": {"mlkd": {}}},
    ],
    ids=str,
)
def test_jobs_that_differ_in_what_students_share_are_not_in_one_group(apart):
    config = composed(*KD)
    fields = {
        name: dataclasses.replace(getattr(config, name), **value)
        if dataclasses.is_dataclass(getattr(config, name)) and value is not None
        else value
        for name, value in apart.items()
    }
    assert repr(shared_part(dataclasses.replace(config, **fields))) != repr(shared_part(config))


@pytest.mark.parametrize(
    "alike",
    [
        {"method": {"dkd": {}}},
        {"method": {"dkd": {}, "kd": {"weight": 1.0}}},
        {"divergence": {"name": "abkd", "alpha": 0.6}},
        {"divergence": {"name": "fkld", "temperature": 1.0}},
        {"cross_entropy_weight": 1.0},
    ],
    ids=str,
)
def test_jobs_that_differ_in_method_and_divergence_alone_are_in_one_group(alike):
    config = composed(*KD)
    assert repr(shared_part(dataclasses.replace(config, **alike))) == repr(shared_part(config))


def test_more_students_than_are_allowed_at_once_are_trained_after_the_others(folder, expected, caplog):
    with caplog.at_level("INFO", logger="vkd"):
        _, trainings = together(folder, KD, KD_AB, DKD, students_at_once=2)
    assert trainings == [(1, 2), (1, 1)]
    assert caplog.text.count("2 students are trained at once, the others after that (students_at_once)") == 1
    assert len(students(folder)) == 3
    assert_same(students(folder), expected)


@pytest.mark.parametrize("failing", [False, True])
def test_students_are_let_go_of_before_those_after_them_are_trained(folder, monkeypatch, failing):
    made, alive = [], []
    make_learner, step = vkd.training.run.make_learner, Learner.step

    def noted(*arguments):
        # Held beside the two before it for a moment, to see that it does not fit.
        learner = make_learner(*arguments)
        made.append(weakref.ref(learner.student))
        return learner

    def look_and_step(self, *arguments, **options):
        alive.append(sum(student() is not None for student in made[:2]))
        if failing and len(alive) == 5:
            raise ZeroDivisionError("a fault of ours")
        step(self, *arguments, **options)

    monkeypatch.setattr(vkd.training.run, "make_learner", noted)
    monkeypatch.setattr(Learner, "step", look_and_step)
    outcomes, trainings = together(folder, KD, KD_AB, DKD, students_at_once=2)
    assert trainings == [(1, 2), (1, 1)]
    assert [outcome.error is not None for outcome in outcomes] == [failing, False, False]
    assert (alive[0], alive[-1]) == (2, 0)


@pytest.mark.parametrize(
    ("free", "at_once", "said"),
    [(0, [1, 1, 1], "1 student is trained at once"), (310, [2, 1], "2 students are trained at once")],
)
def test_students_that_do_not_fit_into_memory_are_trained_after_the_others(
    folder, expected, monkeypatch, caplog, free, at_once, said
):
    # 310 free bytes hold two students, and the step of one.
    monkeypatch.setattr(vkd.training.run, "available_bytes", lambda device: free)
    monkeypatch.setattr(vkd.training.run, "step_bytes", lambda learner, setting, recipe: 100)
    monkeypatch.setattr(vkd.training.run, "learner_bytes", lambda learner: 100)
    with caplog.at_level("INFO", logger="vkd"):
        _, trainings = together(folder, KD, DKD, DKD_AB)
    assert trainings == [(1, count) for count in at_once]
    assert f"{said}, the others after that (memory)" in caplog.text
    assert len(students(folder)) == 3
    assert_same(students(folder), expected)


# Failures and stops


def test_a_student_whose_loss_is_not_finite_fails_alone_and_only_it_is_tried_again(folder, expected):
    words = [*FUSED, "method.kd.weight=1e38,0.9"]
    first = command(folder, *words)
    assert (first.code, first.trainings) == (1, [(1, 2)])
    (good,) = students(folder).keys() & expected.keys()
    (bad,) = (directory for name, directory in students(folder).items() if name != good)
    assert_same({good: students(folder)[good]}, expected)
    assert status(bad)["state"] == "failed"
    assert status(bad)["reason"].startswith("the loss is not finite: term 'kd' at step")
    assert "Traceback" in status(bad)["traceback"]
    assert "in check_finite" in status(bad)["traceback"]
    assert "in check_finite" in (bad / "train.log").read_text()
    assert not (bad / "result.json").exists()
    headline, told = first.err.splitlines()[-2:]
    assert headline == "vkd: 1 of 2 jobs failed:"
    assert re.fullmatch(r"job 1 \(.*method\.kd\.weight=1e\+?38.*\): .*", told)
    assert told.endswith(status(bad)["reason"])
    before = snapshot(students(folder)[good])
    again = command(folder, *words)
    assert (again.code, again.trainings) == (1, [(1, 1)])
    assert f"already done: runs/{good}" in again.out
    assert snapshot(students(folder)[good]) == before


def test_a_student_that_an_unexpected_error_ends_leaves_the_others_and_goes_on_when_it_is_asked_for_again(
    folder, expected
):
    step, taken = Learner.step, []

    def fail_in_the_second_epoch(self, *arguments, **options):
        if "kd" in self.method.methods:
            taken.append(self)
            if len(taken) == 12:
                raise ZeroDivisionError("a fault of ours")
        return step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", fail_in_the_second_epoch)
        (failed, done), trainings = together(folder, KD, DKD)
    assert trainings == [(1, 2)]
    assert isinstance(failed.error, ZeroDivisionError)
    assert done.error is None
    (ended,) = (directory for directory in students(folder).values() if directory != folder / done.directory.path)
    assert (status(ended)["state"], status(ended)["reason"]) == ("failed", "a fault of ours")
    assert "fail_in_the_second_epoch" in status(ended)["traceback"]
    again, trainings = together(folder, KD, DKD)
    assert trainings == [(1, 1)]
    assert [outcome.skipped for outcome in again] == [False, True]
    assert len(students(folder)) == 2
    assert_same(students(folder), expected)


def test_a_method_that_cannot_serve_the_pair_fails_alone(folder):
    done = command(folder, *FUSED, "method=fitnet", "method.fitnet.stage=9,1")
    assert (done.code, done.trainings) == (1, [(1, 1)])
    assert "1 of 2 jobs failed:\njob 1 (" in done.err
    assert "method.fitnet.stage = 9, but these networks share 3 stages" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err
    (directory,) = students(folder).values()
    assert status(directory)["state"] == "done"
    assert read(directory / "result.json")["method"]["fitnet"]["stage"] == 1


def test_a_sweep_with_an_impossible_job_does_not_start(folder):
    done = command(folder, *FUSED, "divergence.temperature=4,-1")
    assert (done.code, done.trainings, students(folder)) == (2, [], {})
    assert "no job was started, since one of them is impossible" in done.err
    assert "divergence.temperature = -1" in done.err


def test_an_impossible_job_that_nobody_saw_coming_fails_alone(folder, expected, monkeypatch, capsys):
    # As from a sweeper that thinks of its jobs while they run.
    monkeypatch.chdir(folder)
    jobs = Jobs(QUIET, None)
    words = [["divergence.temperature=-1"], ["divergence=fkld"]]
    jobs.together([(place, job, compose_config([*TINY, *SHORT, *job])) for place, job in enumerate(words, start=1)])
    assert jobs.summary() == 1
    said = capsys.readouterr().err
    assert "1 of 2 jobs failed:\njob 1 (divergence.temperature=-1): divergence.temperature = -1" in said
    assert len(students(folder)) == 1
    assert_same(students(folder), expected)


def test_students_that_a_stop_left_at_different_epochs_end_as_if_there_had_been_none(folder, expected):
    finish_epoch = Session.finish_epoch

    def stop(self, epoch):
        if "dkd" in self.learner.method.methods:
            raise KeyboardInterrupt
        finish_epoch(self, epoch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "finish_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            together(folder, KD, DKD)
    behind, ahead = students(folder).values()
    assert [len(lines(directory / "metrics.jsonl")) for directory in (behind, ahead)] == [0, 1]
    assert [status(directory)["state"] for directory in (behind, ahead)] == ["interrupted"] * 2
    assert together(folder, KD, DKD)[1] == [(1, 2)]
    assert_same(students(folder), expected)


def test_a_fused_sweep_that_is_killed_and_then_stopped_goes_on_to_the_same_bits(folder, monkeypatch, capsys):
    long = ("recipe.epochs=12", "recipe.batch_size=256", "recipe.evaluate_every=4")
    words = [*FUSED, "method=kd,dkd", "divergence=fkld", *long]
    monkeypatch.chdir(folder)
    process = start("vkd.train", *TINY, *words, cwd=folder)
    wait_for_epochs(process, folder / "runs" / "digits", 2)
    process.kill()
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == -signal.SIGKILL
    directories = list(students(folder).values())
    assert [status(directory)["state"] for directory in directories] == ["running"] * 2
    step, taken = Learner.step, []

    def stop_in_step_8(self, *arguments, **options):
        taken.append(self)
        if len(taken) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", stop_in_step_8)
        assert train(*words) == 130
    assert 8 <= len(taken) <= 9  # both students take the step in which it comes
    assert "the same command goes on from there" in capsys.readouterr().out
    for directory in directories:
        assert "going on after step" in (directory / "train.log").read_text()
        assert status(directory)["state"] == "interrupted"
        assert 2 <= len(lines(directory / "metrics.jsonl")) < 12
    assert train(*words) == 0
    together(folder, (*KD, *long), (*DKD, *long), study="whole")
    for directory, whole in zip(directories, runs_in(folder / "runs" / "whole"), strict=True):
        assert weights(directory) == weights(whole)
        assert untimed(directory)[0] == untimed(whole)[0]
        assert untimed(directory)[1]["metrics"] == untimed(whole)[1]["metrics"]
