"""What `python -m vkd.train` leaves behind, how it goes on after a stop, and who is told."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
import wandb
from commands import (
    PAIR,
    PLAIN,
    TEACHERS,
    TINY,
    lines,
    only_run,
    read,
    runs_in,
    snapshot,
    start,
    train,
    untimed,
    wait_for_epochs,
    weights,
)
from offline_runs import offline_run
from safetensors.torch import load_file

import vkd
import vkd.train
from vkd.composition import compose_config
from vkd.config import config_directory, parse
from vkd.records.run_directory import RunDirectory
from vkd.tracking import TRACKERS
from vkd.training.interruption import Interrupted
from vkd.training.session import Session
from vkd.training.trainer import Trainer

MACS = 64 * (36 + 2 * 144) + 16 * (2 * 144 + 16) + 4 * (2 * 144 + 16) + 40
"""Multiply-accumulates of the student on 8x8 images: by stage pixels times 3x3 and 1x1 weights; the classifier."""

LEFT_BEHIND = {
    "config.yaml",
    "metrics.jsonl",
    "result.json",
    "student.safetensors",
    "last.ckpt",
    "status.json",
    "train.log",
    ".lock",
}


# What a run leaves behind


def test_a_run_leaves_the_files_of_its_contract_and_nothing_else(trained):
    teacher, student = only_run(trained / TEACHERS), only_run(trained / PAIR)
    assert {path.name for path in student.iterdir()} == LEFT_BEHIND
    assert {path.name for path in teacher.iterdir()} == LEFT_BEHIND - {"last.ckpt"}
    assert runs_in(trained) == [student, teacher]
    assert {path.name for path in trained.iterdir()} == {"digits", "teachers"}
    hash8 = read(student / "result.json")["fingerprint"][:8]
    assert student.name == f"kd-fkld-s1-{hash8}"
    assert teacher.name == f"none-s0-{read(teacher / 'result.json')['fingerprint'][:8]}"
    assert read(student / "status.json")["state"] == "done"
    log = (student / "train.log").read_text()
    assert "epoch 1/1" in log
    assert "done: val" in log


def test_the_result_holds_every_key_of_its_contract(trained):
    result = read(only_run(trained / PAIR) / "result.json")
    assert result.keys() >= {
        *("fingerprint", "group", "study", "dataset", "teacher", "student", "method", "divergence"),
        *("seed", "recipe", "metrics", "timing", "environment"),
    }
    assert re.fullmatch("[0-9a-f]{64}", result["fingerprint"])
    assert re.fullmatch("[0-9a-f]{64}", result["group"])
    assert result["fingerprint"] != result["group"]
    teacher = read(only_run(trained / TEACHERS) / "result.json")
    assert result["teacher"]["arch"] == "cifar_resnet8_width4"
    assert result["teacher"]["saw_val"] is False
    assert re.fullmatch("[0-9a-f]{64}", result["teacher"]["sha256"])
    for split in ("val", "test"):
        assert result["teacher"]["accuracy"][split] == pytest.approx(teacher["metrics"][f"{split}/top1"], abs=1e-9)
    assert result["student"] == {"arch": "cifar_resnet8_width4", "parameters": 1054, "macs": MACS}
    assert {name: result["teacher"][name] for name in ("parameters", "macs")} == {"parameters": 1054, "macs": MACS}
    for split, images in (("val", 259), ("test", 500)):
        bins = result["reliability"][split]
        assert sum(bins["counts"]) == images
        assert 100 * sum(bins["correct"]) / images == pytest.approx(result["metrics"][f"{split}/top1"], abs=1e-9)
        gaps = [abs(sure - right) for sure, right in zip(bins["confidence"], bins["correct"], strict=True)]
        assert sum(gaps) / images == pytest.approx(result["metrics"][f"{split}/ece"], abs=1e-9)
    assert result["timing"]["evaluation_images_per_second"] > 0
    assert result["method"] == {"kd": {"weight": 0.9, "temperature_squared": True}}
    assert result["divergence"] == {"name": "fkld", "temperature": 4.0}
    assert (result["seed"], result["study"], result["cross_entropy_weight"]) == (1, "digits", 0.1)
    assert (result["recipe"]["epochs"], result["recipe"]["optimizer"]) == (1, "momentum")
    metrics = result["metrics"]
    for split in ("val", "test"):
        for name in ("top1", "top5", "nll", "ece", "entropy", "agreement", "teacher_kl"):
            assert isinstance(metrics[f"{split}/{name}"], float)
        for name in ("top1", "top5", "agreement"):
            assert 0 <= metrics[f"{split}/{name}"] <= 100
        assert 0 <= metrics[f"{split}/ece"] <= 1
    assert metrics["test/top1_at_best_val"] == metrics["test/top1_max_over_epochs"] == metrics["test/top1"]
    assert result["timing"]["images_per_second"] > 0
    assert result["timing"]["seconds"] > 0
    environment = result["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["timm"] == timm.__version__
    assert environment["device"].startswith("cpu")
    assert "git" in environment
    (line,) = lines(only_run(trained / PAIR) / "metrics.jsonl")
    assert line["epoch"] == 1
    assert line["test/top1"] == metrics["test/top1"]


def test_timm_loads_the_saved_student_and_it_classifies_as_recorded(trained):
    run = only_run(trained / PAIR)
    model = timm.create_model(
        "cifar_resnet8_width4", num_classes=10, in_chans=1, checkpoint_path=str(run / "student.safetensors")
    ).eval()
    from sklearn.datasets import load_digits

    from vkd.data.splits import stratified_split

    scans = load_digits()
    _, held = stratified_split(scans.target.astype(np.int64), 500 / 1797, seed=0)
    pixels = torch.from_numpy(np.rint(scans.images[held] * (255 / 16)).astype(np.float32))[:, None]
    with torch.no_grad():
        predicted = model((pixels / 255 - 0.3050) / 0.3759).argmax(dim=1)
    accuracy = 100 * (predicted.numpy() == scans.target[held]).mean()
    assert accuracy == pytest.approx(read(run / "result.json")["metrics"]["test/top1"], abs=1e-9)


def test_a_run_that_is_done_is_not_done_again(trained, tmp_path, capsys):
    before = snapshot(trained)
    assert train(f"runs_root={trained}") == 0
    assert snapshot(trained) == before
    assert f"already done: {only_run(trained / PAIR)}" in capsys.readouterr().out


def test_plain_training_has_neither_teacher_nor_divergence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("-m", "method=none", "divergence=fkld,abkd", "cross_entropy_weight=0.1,0.5") == 0
    run = only_run(tmp_path / "runs")
    assert run.parent == tmp_path / "runs" / PLAIN
    assert run.name.startswith("none-s1-")
    result = read(run / "result.json")
    assert (result["teacher"], result["divergence"], result["method"]) == (None, None, {})
    assert result["cross_entropy_weight"] == 1.0
    assert result["metrics"]["test/agreement"] is None
    assert result["metrics"]["train/loss"] == result["metrics"]["train/cross_entropy"]
    config = (run / "config.yaml").read_text()
    assert "teacher: null" in config
    assert "divergence: null" in config


def test_a_whole_number_and_its_decimal_form_are_one_run(place, capsys):
    assert train("-m", "divergence=abkd", "divergence.alpha=1,1.0", "divergence.beta=0.0,0", "seed=1") == 0
    run = only_run(place / "runs" / "digits")
    assert capsys.readouterr().out.count(f"already done: {run.relative_to(place)}") == 3
    assert read(run / "result.json")["divergence"]["alpha"] == 1.0


def test_a_run_belongs_to_the_study_that_its_command_names(place):
    assert train("study=my-study_2") == 0
    run = only_run(place / "runs" / "my-study_2")
    assert read(run / "result.json")["study"] == "my-study_2"
    assert run.parent == place / "runs" / "my-study_2" / PAIR.name


def test_a_checkpoint_that_is_not_wanted_is_gone_when_the_run_is_done(place):
    assert train("keep_checkpoint=false") == 0
    assert {path.name for path in only_run(place / "runs" / "digits").iterdir()} == LEFT_BEHIND - {"last.ckpt"}


def test_snapshots_show_the_student_before_training_on_the_way_and_at_the_end_whatever_stops_it(place, monkeypatch):
    words = ["recipe.epochs=3", "snapshot_every=2"]
    assert train(*words, "study=whole") == 0
    whole = only_run(place / "runs" / "whole")
    kept = RunDirectory(whole).snapshots()
    assert list(kept) == [0, 2, 3]
    tensors = {epoch: load_file(path) for epoch, path in kept.items()}
    assert all(
        torch.equal(tensor, tensors[3][name]) for name, tensor in load_file(whole / "student.safetensors").items()
    )
    for early, late in ((0, 2), (2, 3)):
        assert any(not torch.equal(tensor, tensors[late][name]) for name, tensor in tensors[early].items())

    def die(self, epoch, step):
        if (epoch, step) == (3, 0):
            raise KeyboardInterrupt
        return save(self, epoch, step)

    save = Session.save
    with monkeypatch.context() as patch:
        patch.setattr(Session, "save", die)
        assert train(*words, "study=stopped") == 130
    stopped = only_run(place / "runs" / "stopped")
    assert list(RunDirectory(stopped).snapshots()) == [0, 2]
    assert train(*words, "study=stopped") == 0
    for epoch, path in RunDirectory(stopped).snapshots().items():
        assert all(torch.equal(tensor, tensors[epoch][name]) for name, tensor in load_file(path).items())
    assert list(RunDirectory(stopped).snapshots()) == [0, 2, 3]
    assert not (only_run(place / "runs" / "teachers") / "snapshots").exists()


def test_snapshots_that_come_too_late_are_told_of_and_those_of_an_attempt_that_is_lost_go(place, capsys):
    words = ["recipe.epochs=2", "study=late"]
    assert train(*words) == 0
    directory = RunDirectory(only_run(place / "runs" / "late"))
    assert train(*words, "snapshot_every=1") == 0
    assert "done without snapshots" in capsys.readouterr().out
    (directory.path / "status.json").unlink()
    directory.checkpoint.unlink()
    directory.snapshot(7).parent.mkdir()
    for lost in (directory.snapshot(7), directory.path / "snapshots" / ".epoch_0001.safetensors.x.tmp"):
        lost.write_bytes(b"of an earlier attempt")
    assert train(*words, "snapshot_every=2") == 0
    assert list(directory.snapshots()) == [0, 2]
    assert sorted(path.name for path in (directory.path / "snapshots").iterdir()) == [
        "epoch_0000.safetensors",
        "epoch_0002.safetensors",
    ]


def test_a_command_leaves_the_process_that_calls_it_as_it_was(place):
    def state():
        logger = logging.getLogger("vkd")
        signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        speech = [(list(one.handlers), one.level, one.propagate) for one in (logger, logging.getLogger())]
        return list(sys.argv), Path.cwd(), signals, speech, torch.get_rng_state().tolist(), dict(os.environ)

    before = state()
    assert train("-m", "seed=1,2", "precision=bf16") == 0
    assert train("seed=x") == 2
    assert train("--info", "defaults") == 0
    assert state() == before


# Fingerprints and seeds


def test_the_teacher_is_trained_once_and_found_again(place, trained, capsys):
    before = snapshot(place / "runs" / "teachers")
    assert train("seed=2") == 0
    assert snapshot(place / "runs" / "teachers") == before
    assert "epoch 1/1" in capsys.readouterr().out
    ours, first = (read(only_run(root / PAIR) / "result.json") for root in (place / "runs", trained))
    assert ours["teacher"] == first["teacher"]
    assert ours["group"] == first["group"]
    assert ours["fingerprint"] != first["fingerprint"]


def test_the_same_seed_gives_the_same_bits_in_any_place_and_another_seed_gives_others(place, trained):
    assert train("-m", "seed=1,2") == 0
    same, other = runs_in(place / "runs" / "digits")
    first = only_run(trained / PAIR)
    assert weights(same) == weights(first)
    assert untimed(same) == untimed(first)
    assert weights(other) != weights(first)
    assert untimed(other)[0] != untimed(first)[0]


def test_a_deterministic_run_says_so_in_its_record_and_switches_nothing_for_the_next(place, trained):
    assert train("deterministic=true", "study=repeatable") == 0
    assert not torch.are_deterministic_algorithms_enabled()
    run = only_run(place / "runs" / "repeatable")
    assert read(run / "result.json")["environment"]["deterministic"] == {"asked": True, "exceptions": []}
    usual = only_run(trained / "digits")
    assert read(usual / "result.json")["environment"]["deterministic"] == {"asked": False, "exceptions": []}
    assert read(run / "result.json")["fingerprint"] == read(usual / "result.json")["fingerprint"]
    assert weights(run) == weights(usual)


def test_what_decides_no_number_is_not_in_the_fingerprint(place, trained):
    words = ["device=auto", "study=other", "workers=0", "evaluation_batch_size=100", "results_root=elsewhere"]
    words += ["data_root=no/data", "dataset.root=no/root", "tracker.project=other", "keep_checkpoint=false"]
    expected = read(only_run(trained / PAIR) / "result.json")["fingerprint"]
    assert train(*words) == 0
    run = only_run(place / "runs" / "other" / PAIR.name)
    assert run.name == f"kd-fkld-s1-{expected[:8]}"
    assert read(run / "result.json")["fingerprint"] == expected
    assert weights(run) == weights(only_run(trained / PAIR))


def test_labels_of_the_test_split_change_neither_weights_nor_selection(place):
    from sklearn.datasets import load_digits

    scans = load_digits()
    images = np.rint(scans.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = scans.target.astype(np.int64)
    names = np.array([str(digit) for digit in range(10)])
    orders = {"honest": np.arange(500), "permuted": np.random.RandomState(0).permutation(500)}
    for name, order in orders.items():
        folder = place / name / "mine"
        folder.mkdir(parents=True)
        np.savez(folder / "train.npz", images=images[500:], labels=labels[500:], class_names=names)
        np.savez(folder / "test.npz", images=images[:500], labels=labels[:500][order], class_names=names)
        assert train("dataset.name=mine", f"data_root={name}", "method=none", "recipe.epochs=12", f"study={name}") == 0
    honest, permuted = (only_run(place / "runs" / name) for name in orders)
    assert weights(honest) == weights(permuted)
    one, other = (read(run / "result.json")["metrics"] for run in (honest, permuted))
    assert one["test/top1"] > 60 > 30 > other["test/top1"]
    for name in ("best_epoch", "val/top1", "val/nll", "val/top1_at_best_val", "train/loss"):
        assert one[name] == other[name]


# Sweeps, failures and stops


def test_a_job_that_fails_does_not_end_the_sweep_and_is_told_in_the_end(place, capsys):
    assert train("-m", "teacher.checkpoint=missing.pth,null", "seed=1") == 1
    said = capsys.readouterr()
    assert "job 1 of 2" in said.out
    assert "job 2 of 2" in said.out
    assert "1 of 2 jobs failed:" in said.err
    assert "job 1 (" in said.err.splitlines()[-1]
    assert "there is no checkpoint 'missing.pth'" in said.err.splitlines()[-1]
    assert "Traceback" not in said.err
    assert read(only_run(place / "runs" / "digits") / "status.json")["state"] == "done"


@pytest.mark.parametrize("error", [ZeroDivisionError("a fault of ours"), SystemExit(3)])
def test_an_unexpected_error_is_kept_in_the_run_and_the_sweep_goes_on(place, monkeypatch, capsys, error):
    fit = Trainer.fit

    def fail_for_seed_1(self):
        if self.seed == 1:
            raise error
        return fit(self)

    monkeypatch.setattr(Trainer, "fit", fail_for_seed_1)
    assert train("-m", "seed=1,2") == 1
    said = capsys.readouterr().err
    assert f"1 of 2 jobs failed:\njob 1 (seed=1): {type(error).__name__}" in re.sub(r"\(.* seed=1\)", "(seed=1)", said)
    failed, done = (read(run / "status.json") for run in runs_in(place / "runs" / "digits"))
    assert failed["state"] == "failed"
    assert "fail_for_seed_1" in failed["traceback"]
    assert failed["reason"] == (str(error) or type(error).__name__)
    assert done["state"] == "done"
    assert not (runs_in(place / "runs" / "digits")[0] / "result.json").exists()
    assert "fail_for_seed_1" in (runs_in(place / "runs" / "digits")[0] / "train.log").read_text()
    monkeypatch.undo()
    os.chdir(place)
    assert train("seed=1") == 0
    assert read(runs_in(place / "runs" / "digits")[0] / "status.json")["state"] == "done"


def test_a_signal_ends_a_sweep_after_the_step_in_hand_and_the_same_command_goes_on_exactly(place, capsys):
    words = ["-m", "recipe.epochs=2", "seed=1,2"]
    assert train(*words, "study=whole") == 0
    steps = []

    def stop_in_step_20(self, *arguments, **options):
        steps.append(arguments)
        if len(steps) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    from vkd.training.learner import Learner

    step = Learner.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", stop_in_step_20)
        assert train(*words, "study=stopped") == 130
    assert len(steps) == 20
    assert "stopped after step 3 of epoch 2; the same command goes on from there" in capsys.readouterr().out
    stopped = only_run(place / "runs" / "stopped")
    assert read(stopped / "status.json")["state"] == "interrupted"
    assert (stopped / "last.ckpt").exists()
    assert not (stopped / "result.json").exists()
    assert train(*words, "study=stopped") == 0
    assert "going on after step 3 of epoch 2" in capsys.readouterr().out
    for whole, resumed in zip(runs_in(place / "runs/whole"), runs_in(place / "runs/stopped"), strict=True):
        assert weights(whole) == weights(resumed)
        (history, result), (other_history, other_result) = untimed(whole), untimed(resumed)
        assert history == other_history
        assert result["metrics"] == other_result["metrics"]
        assert result["fingerprint"] == other_result["fingerprint"]


def test_ctrl_c_while_the_teacher_is_trained_ends_the_command_and_it_goes_on_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def stop(self):
        raise Interrupted("stopped after step 1 of epoch 1")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", stop)
        assert train() == 130
    teacher = only_run(tmp_path / "runs")
    assert read(teacher / "status.json")["state"] == "interrupted"
    assert train() == 0
    assert read(teacher / "status.json")["state"] == "done"


def test_real_processes_that_are_stopped_or_killed_go_on_to_the_same_bits(place):
    numbers = {"stopped": signal.SIGTERM, "killed": signal.SIGKILL}
    processes = {study: start("vkd.train", *TINY, "recipe.epochs=12", f"study={study}", cwd=place) for study in numbers}
    runs = {}
    for study, process in processes.items():
        runs[study] = wait_for_epochs(process, place / "runs" / study, 2)
        process.send_signal(numbers[study])
    said = {study: process.communicate(timeout=60) for study, process in processes.items()}
    assert "Traceback" not in str(said)
    assert "the same command goes on from there" in said["stopped"][0]
    assert processes["stopped"].returncode == 130
    assert processes["killed"].returncode == -signal.SIGKILL
    assert read(runs["stopped"] / "status.json")["state"] == "interrupted"
    assert read(runs["killed"] / "status.json")["state"] == "running"
    assert train("recipe.epochs=12", "study=whole") == 0
    whole = only_run(place / "runs" / "whole")
    for study, run in runs.items():
        assert (run / "last.ckpt").exists()
        assert not (run / "result.json").exists()
        assert 2 <= len(lines(run / "metrics.jsonl")) < 12
        assert train("recipe.epochs=12", f"study={study}") == 0
        assert "going on after step" in (run / "train.log").read_text()
        assert weights(run) == weights(whole)
        assert untimed(run)[0] == untimed(whole)[0]
        assert untimed(run)[1]["metrics"] == untimed(whole)[1]["metrics"]


def test_two_processes_that_want_one_teacher_train_it_once(tmp_path):
    words = [*TINY, "teacher.recipe.epochs=15"]
    processes = [start("vkd.train", *words, f"seed={seed}", cwd=tmp_path) for seed in (1, 2)]
    said = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    teacher = only_run(tmp_path / "runs" / "teachers")
    assert (teacher / "train.log").read_text().count("epoch 15/15") == 1
    results = [read(run / "result.json") for run in runs_in(tmp_path / "runs" / "digits")]
    assert [result["seed"] for result in results] == [1, 2]
    assert results[0]["teacher"] == results[1]["teacher"]


def test_a_run_that_another_process_is_at_is_left_alone(place, capsys):
    assert train("recipe.epochs=2") == 0
    run = only_run(place / "runs" / "digits")
    (run / "result.json").unlink()
    before = (run / "metrics.jsonl").read_bytes(), weights(run)
    with RunDirectory(run).held():
        assert train("recipe.epochs=2") == 1
    assert "another process is at work in" in capsys.readouterr().err
    assert ((run / "metrics.jsonl").read_bytes(), weights(run)) == before


# Help and Hydra


def test_help_lists_every_group_and_choice_and_five_examples_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vkd.train.main(["recipe.epochs=0", "--help"]) == 0
    page = capsys.readouterr().out
    folders = [folder for folder in config_directory().iterdir() if folder.is_dir() and folder.name != "hydra"]
    # Hydra's own groups have two names.
    for folder in [*folders, *(config_directory() / "hydra").iterdir()]:
        group = folder.relative_to(config_directory()).as_posix()
        (listed,) = re.findall(rf"^  {group}: .*\n((?:      .*\n)+)", page, re.MULTILINE)
        choices = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
        assert {choice.strip() for choice in listed.replace("\n", " ").split(",")} == choices
    examples = re.findall(r"^      python -m vkd\.train", page.split("EXAMPLES")[1], re.MULTILINE)
    assert len(examples) >= 5
    assert not list(tmp_path.iterdir())


def test_the_help_page_needs_no_torch(tmp_path):
    code = (
        "import sys, vkd.train; assert vkd.train.main(['--help']) == 0;"
        "heavy = {'torch', 'timm', 'wandb', 'sklearn'} & set(sys.modules); assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(vkd.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--cfg", "job"], "arch: cifar_resnet20"),
        (["seed=7", "--cfg", "job", "divergence=abkd"], "alpha: 0.8"),
        (["--cfg", "job", "--package", "divergence"], "name: fkld"),
        (["--info", "defaults"], "dataset/digits"),
        (["--version"], "Hydra"),
    ],
)
def test_the_switches_of_hydra_show_what_they_show_and_end_well(tmp_path, monkeypatch, capsys, words, shown):
    monkeypatch.chdir(tmp_path)
    assert vkd.train.main(words) == 0
    said = capsys.readouterr()
    assert shown in said.out
    assert said.err == ""
    assert not list(tmp_path.iterdir())


def test_a_switch_may_stand_anywhere_among_the_words(place):
    assert train("seed=1,2", "--multirun", "study=middle") == 0
    assert len(runs_in(place / "runs" / "middle")) == 2


def test_an_experiment_that_sweeps_does_so_without_a_switch_and_leaves_its_words_in_files(place, capsys):
    words = ["+experiment=quickstart", "method=kd", "divergence=fkld", "seed=1,2", "dataset=digits"]
    assert train(*words) == 0
    assert "job 2 of 2" in capsys.readouterr().out
    assert len(runs_in(place / "runs" / "quickstart")) == 2
    assert {path.name for path in place.iterdir()} == {"runs"}
    assert {path.name for path in (place / "runs").iterdir()} == {"quickstart", "teachers", ".sweeps"}


# Trackers


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A machine without a key, on which every attempt to reach another one is noted and fails."""
    attempts = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded(self, address):
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        attempts.append(address)
        raise OSError("no network in tests")

    def guarded_look_up(host, *arguments, **options):
        if host in (None, "localhost", "127.0.0.1", "::1"):
            return look_up(host, *arguments, **options)
        attempts.append(host)
        raise socket.gaierror(-3, "no network in tests")

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.invalid")  # wandb's own process could reach no other host
    return attempts


def test_a_sweep_leaves_one_finished_offline_run_a_job_with_a_nested_config_and_asks_nobody(place, nobody, capsys):
    words = ["tracker=offline", "tracker.tags=[a,b]", "study=tracked", "divergence=abkd", "divergence.alpha=1"]
    assert train("-m", "seed=1,2,3", *words) == 0
    runs = runs_in(place / "runs" / "tracked")
    identifiers = set()
    for seed, directory in enumerate(runs, 1):
        run, config, history, exit_code = offline_run(directory)
        identifiers.add(run.run_id)
        assert exit_code == 0
        assert (run.run_group, run.job_type, run.project) == ("tracked", "kd", "vkd")
        assert run.display_name == directory.name
        assert list(run.tags) == ["a", "b"]
        assert config["seed"] == seed
        assert config["divergence"]["alpha"] == 1.0
        assert config["divergence"]["beta"] == 0.3
        assert config["method"] == {"kd": {"weight": 0.9, "temperature_squared": True}}
        assert config["recipe"]["learning_rate"] == 0.05
        assert isinstance(config["recipe"]["epochs"], int)
        result = read(directory / "result.json")["metrics"]
        (line,) = history
        assert line["epoch"] == 1
        assert line["test/top1"] == pytest.approx(result["test/top1"])
        assert line["train/kd"] == pytest.approx(result["train/kd"])
    assert len(identifiers) == 3
    assert nobody == []
    assert "W&B failed" not in capsys.readouterr().out


def test_a_run_that_fails_is_marked_so_in_wandb_and_does_not_touch_the_next(place, nobody, monkeypatch):
    fit = Trainer.fit

    def fail_for_seed_1(self):
        records = fit(self)
        if self.seed == 1:
            raise ZeroDivisionError("late")
        return records

    monkeypatch.setattr(Trainer, "fit", fail_for_seed_1)
    assert train("-m", "seed=1,2", "tracker=offline") == 1
    failed, done = (offline_run(run) for run in runs_in(place / "runs" / "digits"))
    assert (failed[3], done[3]) == (1, 0)
    assert failed[0].run_id != done[0].run_id
    assert len(failed[2]) == len(done[2]) == 1


def test_a_tracker_that_fails_is_reported_once_and_the_run_succeeds(place, nobody, monkeypatch, capsys):
    def broken(**_settings):
        raise wandb.errors.CommError("the server is on fire")

    monkeypatch.setattr(wandb, "init", broken)
    assert train("tracker=offline", "recipe.epochs=2") == 0
    said = capsys.readouterr()
    assert (said.out + said.err).count("the server is on fire") == 1
    assert "the run goes on with its local files alone" in said.out
    run = only_run(place / "runs" / "digits")
    assert read(run / "status.json")["state"] == "done"
    assert len(lines(run / "metrics.jsonl")) == 2


def test_a_tracker_that_fails_in_the_middle_is_reported_once_and_asked_no_more(place, nobody, monkeypatch, capsys):
    asked = []

    class Broken:
        summary: ClassVar[dict] = {}

        def define_metric(self, *_names, **_options):
            pass

        def log(self, line, step):
            asked.append(step)
            raise BrokenPipeError("gone")

        def finish(self, exit_code):
            asked.append("finish")

    monkeypatch.setattr(wandb, "init", lambda **_settings: Broken())
    assert train("tracker=offline", "recipe.epochs=3") == 0
    assert asked == [1]
    assert capsys.readouterr().out.count("W&B failed (gone)") == 1


@pytest.fixture
def asked(nobody, monkeypatch):
    """What W&B is asked for, which it does not do."""
    seen = {}

    def note(**settings):
        seen.update(settings)
        raise RuntimeError("not in tests")

    monkeypatch.setattr(wandb, "init", note)
    return seen


def test_wandb_without_a_key_is_offline_and_says_how_to_send_the_run(place, asked, capsys):
    assert train("tracker=wandb") == 0
    assert asked["mode"] == "offline"
    said = capsys.readouterr().out
    run = only_run(place / "runs" / "digits").relative_to(place)
    assert "no W&B key is configured" in said
    assert f"wandb login && wandb sync {run}/wandb/offline-run-*" in said


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({"WANDB_API_KEY": "0" * 40}, "", "online"),
        ({"WANDB_API_KEY": ""}, "", "offline"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, "", "offline"),
        ({}, "machine wandb.invalid login user password 0000", "online"),
        ({}, "machine api.wandb.ai login user password 0000", "offline"),
        ({}, "machine wandb.invalid login", "offline"),
        ({}, "\xff\xfe", "offline"),
    ],
)
def test_a_key_is_found_where_wandb_looks_for_it(asked, monkeypatch, caplog, tmp_path, environment, netrc, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Path(os.environ["NETRC"]).write_bytes(netrc.encode("latin-1"))
    config = parse(compose_config(["tracker=wandb", "tracker.project=mine", "tracker.entity=me"]))
    with caplog.at_level("INFO", logger="vkd"):
        TRACKERS["wandb"](config, tmp_path, name="run", study="study")
    assert (asked["mode"], asked["project"], asked["entity"], asked["group"]) == (mode, "mine", "me", "study")
    assert ("no W&B key" in caplog.text) == (mode == "offline" and not environment.get("WANDB_API_KEY"))
    assert ("WANDB_MODE=offline" in caplog.text) == ("WANDB_MODE" in environment)


def test_the_offline_tracker_stays_offline_with_a_key_and_the_none_tracker_never_asks_wandb(
    asked, monkeypatch, tmp_path
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    config = parse(compose_config(["tracker=none"]))
    tracker = TRACKERS["none"](config, tmp_path, name="run", study="study")
    tracker.log({"epoch": 1})
    tracker.finish({})
    assert asked == {}
    assert not list(tmp_path.iterdir())
    TRACKERS["offline"](config, tmp_path, name="run", study="study")
    assert asked["mode"] == "offline"
    assert asked["reinit"] == "create_new"


def test_a_resumed_run_keeps_its_identity_in_wandb_and_another_run_has_another(asked, tmp_path):
    config = parse(compose_config([]))
    identifiers = []
    for folder in ("one", "one", "two"):
        (tmp_path / folder).mkdir(exist_ok=True)
        TRACKERS["offline"](config, tmp_path / folder, name="run", study="study")
        identifiers.append(asked["id"])
    assert identifiers[0] == identifiers[1] != identifiers[2]


def test_a_signal_that_comes_after_the_last_step_of_a_job_still_ends_the_sweep(place, monkeypatch):
    done = []
    fit = Trainer.fit

    def fit_and_be_signalled(trainer):
        records = fit(trainer)
        done.append(records)
        os.kill(os.getpid(), signal.SIGTERM)
        return records

    monkeypatch.setattr(Trainer, "fit", fit_and_be_signalled)
    assert train("-m", "method=none", "seed=1,2,3") == 130
    assert len(done) == 1
    assert read(only_run(place / "runs" / "digits") / "status.json")["state"] == "done"


def test_a_method_that_cannot_serve_the_pair_says_so_before_a_teacher_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train("method=fitnet", "method.fitnet.stage=9") == 1
    assert "method.fitnet.stage = 9, but these networks share 3 stages" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
