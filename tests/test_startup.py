"""What a command loads before it has work to do, and how it ends when nobody reads what it says."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import PAIR, PLAIN, only_run, read, runs_in, train

import vkd
import vkd.evaluate
import vkd.train
from vkd.command import import_training, quietly

COMMANDS = ["vkd.train", "vkd.collect", "vkd.evaluate", "vkd.sweep", "vkd.export", "vkd.analyze", "vkd.dashboard"]
HEAVY = {"torch", "torchvision", "timm", "wandb", "sklearn", "scipy", "matplotlib"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(vkd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def unread_pipe() -> int:
    """The end to write to of a pipe whose other end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@contextlib.contextmanager
def unread_output() -> Iterator[None]:
    """Standard output goes, line by line, to a pipe that nobody reads."""
    with open(unread_pipe(), "w", buffering=1) as stream, contextlib.redirect_stdout(stream):
        yield


def run_python(*words: str, unbuffered: bool = False, **streams) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run([sys.executable, *words], env=environment, text=True, check=False, **streams)


# What is loaded


def test_importing_vkd_imports_nothing_but_the_standard_library():
    code = "import sys; before = set(sys.modules); import vkd; print(*(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in run_python("-c", code).stdout.split()}
    assert "vkd" in loaded
    assert loaded - {"vkd"} <= sys.stdlib_module_names


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_none_of_the_packages_that_take_seconds(command):
    done = run_python("-X", "importtime", "-m", command, "--help")
    assert done.returncode == 0
    assert command in done.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "omegaconf" in loaded, "the list of imports was not understood"
    assert not HEAVY & loaded


def test_a_run_on_the_digits_loads_neither_sklearn_nor_scipy_nor_matplotlib():
    code = (
        "import sys, pathlib; from vkd.command import import_training; import_training();"
        "from vkd.config import DatasetConfig; from vkd.data import load_source;"
        "source = load_source(DatasetConfig(name='digits'), pathlib.Path('nowhere'));"
        "assert len(source.train.labels) + len(source.test.labels) == 1797;"
        "print(*sys.modules)"
    )
    done = run_python("-c", code)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded, done.stderr
    assert not {"sklearn", "scipy", "matplotlib"} & loaded


@pytest.mark.parametrize("enabled", [True, False])
def test_importing_what_training_needs_leaves_the_garbage_collector_on_or_off_as_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        import_training.__wrapped__()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


# When nobody reads


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_that_nobody_reads_ends_without_a_word_as_a_broken_pipe_ends_others(command, unbuffered):
    pipe = unread_pipe()
    try:
        done = run_python("-m", command, "--help", unbuffered=unbuffered, stdout=pipe)
    finally:
        os.close(pipe)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_complaint_that_nobody_reads_ends_the_command_as_a_broken_pipe_ends_others(command):
    pipe = unread_pipe()
    try:
        done = run_python("-m", command, "--no-such-switch", stdout=pipe, stderr=pipe)
    finally:
        os.close(pipe)
    assert done.returncode == 141


@pytest.mark.parametrize("command", COMMANDS)
def test_help_without_any_standard_output_ends_well(command):
    script = f'exec "{sys.executable}" -m {command} --help >&-'
    done = subprocess.run(["sh", "-c", script], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_hydra_prints_for_its_own_switches_is_no_failure_when_nobody_reads_it(capsys):
    with unread_output():
        assert quietly(lambda: vkd.train.main(["--cfg", "job"])) == 141
    assert capsys.readouterr().err == ""


def test_a_run_that_nobody_reads_stops_as_if_asked_to_and_goes_on_later(place, capsys):
    with unread_output(), pytest.raises(SystemExit) as stopped:
        train("method=none")
    assert stopped.value.code == 141
    assert capsys.readouterr().err == ""
    run = only_run(place / "runs" / PLAIN)
    status = read(run / "status.json")
    assert (status["state"], status["traceback"]) == ("interrupted", "")
    assert train("method=none") == 0
    assert (run / "result.json").is_file()


def test_a_sweep_that_nobody_reads_starts_no_further_job(place, capsys):
    with unread_output(), pytest.raises(SystemExit) as stopped:
        train("-m", "seed=1,2")
    assert stopped.value.code == 141
    assert capsys.readouterr().err == ""
    assert len(runs_in(place / "runs" / PAIR)) <= 1


def test_figures_that_nobody_reads_are_no_failure_of_the_evaluation(trained, capsys):
    with unread_output():
        assert quietly(lambda: vkd.evaluate.main([f"run={only_run(trained / PAIR)}", "device=cpu"])) == 141
    assert capsys.readouterr().err == ""
