"""torchrun: one run on two processes, as a user starts, stops and loses it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import TINY, lines, only_run, read, runs_in, train, untimed, wait_for_epochs, weights
from safetensors.torch import load_file

import vkd
import vkd.command
from vkd.evaluate import evaluate
from vkd.records.sweep_index import SweepIndex

PROCESSES = 2
WORDS = ["recipe.learning_rate=0.005", "recipe.ema_decay=0.9", "recipe.epochs=4", "keep_checkpoint=false"]


def torchrun(*words: str, cwd: Path, module: str = "vkd.train") -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node 2 -m vkd.train` with a tiny run's words before `words`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(vkd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES)]
    start = ["-m", module] if module == "vkd.train" else [module]
    return subprocess.Popen(
        [*launcher, *start, *TINY, *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def teacher(trained) -> str:
    """The word for a teacher that need not be trained."""
    (weights_file,) = (trained / "teachers").rglob("student.safetensors")
    return f"teacher.checkpoint={weights_file}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher) -> tuple[Path, str, str]:
    """The folder of an uninterrupted run, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    process = torchrun(teacher, *WORDS, cwd=folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out, err


def test_two_processes_leave_one_run_and_the_numbers_of_one_process(whole, tmp_path, monkeypatch, teacher):
    folder, _, _ = whole
    run = only_run(folder)
    assert read(run / "result.json")["world_size"] == 2
    assert [line["epoch"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4]
    monkeypatch.chdir(tmp_path)
    assert train(teacher, *WORDS) == 0
    alone = only_run(tmp_path)
    # Other numbers in the last digits, and so another run.
    assert alone.name != run.name
    for before, after in zip(lines(alone / "metrics.jsonl"), lines(run / "metrics.jsonl"), strict=True):
        for name in ("train/loss", "train/kd", "val/nll", "test/nll", "test/teacher_kl"):
            assert after[name] == pytest.approx(before[name], rel=0.01), name
    one, two = (load_file(path / "student.safetensors") for path in (alone, run))
    assert list(one) == list(two)
    for name, value in one.items():
        assert torch.allclose(value.float(), two[name].float(), rtol=0.05, atol=0.02), name


def test_the_first_process_alone_speaks_and_says_how_the_work_is_shared_out(whole):
    _, out, err = whole
    assert (
        "2 processes: batches of 64 are 2 x 32; learning rate 0.005 for the whole batch; BatchNorm synchronised" in out
    )
    assert out.count("epoch 1/4") == out.count("done: ") == 1
    assert "Traceback" not in err
    assert "Warning" not in err


def test_stopped_by_sigterm_the_same_command_goes_on_to_the_same_bits(whole, tmp_path, teacher):
    process = torchrun(teacher, *WORDS, cwd=tmp_path)
    run = wait_for_epochs(process, tmp_path, 1)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the same command goes on from there" in out, err
    assert read(run / "status.json")["state"] == "interrupted"
    again = torchrun(teacher, *WORDS, cwd=tmp_path)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "going on after step" in out
    expected = only_run(whole[0])
    assert only_run(tmp_path).name == expected.name
    assert weights(only_run(tmp_path)) == weights(expected)
    assert untimed(only_run(tmp_path)) == untimed(expected)


def process_with_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of one of torchrun's processes."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text().replace("LOCAL_RANK", "LOCAL"):
            return int(child)
    raise AssertionError(children)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the process in /proc")
def test_the_death_of_one_process_ends_the_run_at_once_with_a_reason(tmp_path, teacher):
    process = torchrun(teacher, "recipe.epochs=500", cwd=tmp_path)
    run = wait_for_epochs(process, tmp_path, 1)
    os.kill(process_with_rank(process, 1), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode != 0
    status = read(run / "status.json")
    assert status["state"] == "failed"
    assert status["reason"].startswith("another of the 2 processes of this run ended without a word")
    assert err.count("vkd: ") == 1
    assert "vkd: another of the 2 processes of this run ended" in err


FAULTY = """
import os, sys
import vkd.train
from vkd.training.learner import Learner

step = Learner.step


def faulty(self, images, *arguments, **options):
    if os.environ["RANK"] == "1" and len(images) == 16:
        raise ValueError("the second machine is on fire")
    step(self, images, *arguments, **options)


Learner.step = faulty
sys.exit(vkd.train.main())
"""


def test_a_sweep_goes_on_behind_wrong_input_and_ends_with_the_reason_where_one_process_fails(tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    # A teacher is trained too, which is found again when the run is measured.
    process = torchrun("-m", "recipe.batch_size=63,64,32", cwd=tmp_path, module=str(script))
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    (folder,) = (path for path in (tmp_path / "runs" / ".sweeps").iterdir() if path.is_dir())
    jobs = SweepIndex(folder).read().jobs
    assert [job.state for job in jobs] == ["failed", "done", "failed"]
    runs = {read(path / "status.json")["state"]: path for path in runs_in(tmp_path) if "teachers" not in path.parts}
    assert sorted(runs) == ["done", "failed"]
    assert err.count("job 1 failed: recipe.batch_size=63 is that of all 2 processes together") == 1
    assert "try: recipe.batch_size=64" in err
    reason = read(runs["failed"] / "status.json")["reason"]
    assert reason == "process 1 of the 2 of this run failed: ValueError: the second machine is on fire"
    assert f"job 3 failed: {reason}" in err
    assert "vkd: process 1 of 2 failed: the second machine is on fire" in err
    found = evaluate([f"run={runs['done']}", "device=cpu"])["metrics"]["test/agreement"]
    assert found == pytest.approx(read(runs["done"] / "result.json")["metrics"]["test/agreement"])


@pytest.mark.parametrize("launcher", ["fused", "submitit_local"])
def test_launchers_of_their_own_are_refused_beside_torchrun(tmp_path, monkeypatch, capsys, launcher):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert train("-m", f"hydra/launcher={launcher}", "seed=1,2") == 2
    said = capsys.readouterr().err
    assert f"hydra/launcher={launcher} sends jobs to processes of their own, and torchrun started 2" in said
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_not_the_first_leaves_wrong_input_to_the_first_to_explain(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(vkd.command, "_SECONDS_TO_SPEAK", 0)
    printed = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert train("method=nonsense") == 2
        printed[rank] = capsys.readouterr()
    assert "nonsense" in printed["0"].err
    assert "nonsense" not in printed["1"].err
    # The first would have ended this one by now.
    assert "process 1 of this run failed, and the first did not" in printed["1"].err
    assert printed["1"].out == ""
