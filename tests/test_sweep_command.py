"""`python -m vkd.sweep`: what the index and the runs' own files say, at any moment and in any state."""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from commands import train

import vkd
import vkd.sweep
from vkd.records import sweep_table
from vkd.records.sweep_index import Job, Sweep
from vkd.records.sweep_table import SweepReader, choose_rows, find_sweep, show_seconds, to_rich
from vkd.sweep import main

HOST = socket.gethostname()
START = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)


def at(seconds):
    """A moment as the files have it."""
    return (START + timedelta(seconds=seconds)).isoformat(timespec="seconds")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function that writes the index of a sweep of these jobs into the working directory; its folder."""
    monkeypatch.chdir(tmp_path)

    def write(*jobs, name="digits-0a1b2c3d", command=("-m", "seed=1,2"), directory=None, **process):
        folder = tmp_path / "runs" / ".sweeps" / name
        folder.mkdir(parents=True, exist_ok=True)
        content = asdict(Sweep(list(command), str(directory or tmp_path), list(jobs)))
        (folder / "sweep.json").write_text(json.dumps({"format": 1, **content, **process}))
        return Path("runs", ".sweeps", name)

    return write


def job(number=1, state="waiting", words=(), *, run=True, updated=10, **fields):
    """A job of the index; `run` is whether it has a directory."""
    if run:
        fields = {"directory": f"runs/digits/run{number}", **fields}
    if state != "waiting":
        fields = {"host": HOST, "pid": os.getpid(), "device": "cuda:1 (NVIDIA H100)", "updated": at(updated), **fields}
    return Job(number, f"key{number}", list(words) or [f"seed={number}"], state, **fields)


def status(number, state, epoch=0, epochs=20, *, updated=20, **fields):
    """Write the `status.json` of a run; its directory."""
    folder = Path("runs", "digits", f"run{number}")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"state": state, "reason": "", "traceback": "", "epoch": epoch, "epochs": epochs}
    content |= {"pid": os.getpid(), "host": HOST, "updated": at(updated), **fields}
    (folder / "status.json").write_text(json.dumps(content))
    return folder


def done(number, top1=91.234, seconds=100.0):
    """Write what a finished run leaves; its directory."""
    folder = status(number, "done", 20)
    result = {"metrics": {"test/top1": top1}, "timing": {"seconds": seconds}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def running(number, epoch, seconds, epochs=20, ago=0.0, **fields):
    """Write what a run in its midst leaves, its last epoch ended `ago` seconds ago; its directory."""
    folder = status(number, "running", epoch, epochs, **fields)
    lines = [{"epoch": each, "seconds": seconds * each / epoch} for each in range(1, epoch + 1)]
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(file, (time.time() - ago, time.time() - ago))
    return folder


def dead_pid():
    """The number of a process that has been, and is gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def table(folder):
    """The table as it is now."""
    return SweepReader(folder).read()


def states(folder):
    return [row.state for row in table(folder).rows]


def cells(out):
    """The rows of a printed table by the number of the job, each as its words."""
    lines = [line.split() for line in out.splitlines()]
    return {int(line[0]): line[1:] for line in lines if line and line[0].isdigit() and line[1:2] != ["jobs:"]}


# The table


def test_every_job_is_shown_with_its_state_progress_place_and_result(sweep, capsys):
    folder = sweep(
        job(1, "done", ["divergence=fkld", "seed=1", "study=mine"]),
        job(2, "running", ["divergence=fkld", "seed=2", "study=mine"]),
        job(3, "failed", ["divergence=abkd", "seed=1", "study=mine"], note="loss is not finite"),
        job(4, "interrupted", ["divergence=abkd", "seed=2", "study=mine"]),
        job(5, "waiting", ["divergence=rkld", "seed=1", "study=mine"], run=False),
        command=["-m", "study=mine", "divergence=fkld,abkd,rkld", "recipe.epochs=20", "notes='a b'"],
    )
    done(1)
    running(2, 5, 60.0)
    status(3, "failed", 3)
    status(4, "interrupted", 7)
    assert main([f"dir={folder}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"sweep {folder}\n")
    found = cells(out)
    assert found[1] == ["fkld", "1", "done", "20/20", "91.23", HOST, "cuda:1"]
    assert found[2][:4] == ["fkld", "2", "running", "5/20"]
    assert found[3] == ["abkd", "1", "failed", "3/20", HOST, "cuda:1", "loss", "is", "not", "finite"]
    assert found[4][2:4] == ["interrupted", "7/20"]
    assert found[5] == ["rkld", "1", "waiting"]
    header = out.splitlines()[2].split()
    assert header == ["job", "divergence", "seed", "state", "epoch", "left", "test", "top-1", "where", "note"]
    assert "mine" not in out.split("5 jobs")[0]
    *_, totals, command = out.splitlines()
    assert totals.startswith("5 jobs: 1 done, 1 running, 1 waiting, 1 interrupted, 1 failed; about ")
    words = "-m study=mine divergence=fkld,abkd,rkld recipe.epochs=20"
    assert command == f"go on: python -m vkd.train {words} 'notes='\"'\"'a b'\"'\"''"


def test_the_columns_of_the_printed_table_stand_below_each_other(sweep, capsys):
    sweep(job(1, "done", ["a.alpha=0.5", "seed=1"]), job(10, "done", ["a.alpha=77", "seed=2"]))
    done(1, 9.5)
    done(10, 91.234)
    main([])
    lines = capsys.readouterr().out.splitlines()[2:5]
    for name, texts in {"test top-1": ("9.50", "91.23"), "job": ("1", "10")}.items():
        ends = {line.index(text) + len(text) for line, text in zip(lines, (name, *texts), strict=True)}
        assert len(ends) == 1, name
    assert len({line.index(text) for line, text in zip(lines, ("alpha", "0.5", "77"), strict=True)}) == 1


def test_a_finished_sweep_says_no_command_that_goes_on(sweep, capsys):
    sweep(job(1, "done"))
    done(1)
    main([])
    assert capsys.readouterr().out.splitlines()[-1] == "1 job: 1 done"


def test_a_sweep_of_another_folder_says_where_its_command_belongs(sweep, tmp_path, capsys):
    elsewhere = tmp_path / "its folder"
    folder = sweep(job(1, "done"), job(2), directory=elsewhere)
    run = elsewhere / "runs" / "digits" / "run1"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"metrics": {"test/top1": 50}}))
    main([f"dir={folder}"])
    out = capsys.readouterr().out
    assert "50.00" in out
    assert out.splitlines()[-1] == f"go on: cd '{elsewhere}' && python -m vkd.train -m seed=1,2"


def test_keys_with_the_same_last_part_keep_all_of_it(sweep, capsys):
    sweep(job(1, words=["recipe.epochs=1", "teacher.recipe.epochs=2"]), job(2, words=["recipe.epochs=2"]))
    main([])
    assert "recipe.epochs  teacher.recipe.epochs" in capsys.readouterr().out


def test_many_keys_share_a_column(sweep, capsys):
    words = [[f"key{index}={index + number}" for index in range(8)] for number in (0, 1)]
    sweep(job(1, words=words[0]), job(2, words=words[1]))
    main([])
    out = capsys.readouterr().out
    assert "key0=1 key1=2 key2=3" in out
    assert len(out.splitlines()[2].split()) == 3


# States


def test_a_job_whose_process_is_gone_is_stale_where_that_can_be_known(sweep):
    gone = dead_pid()
    folder = sweep(*(job(number, "running") for number in range(1, 6)))
    running(1, 2, 10.0, pid=gone)
    running(2, 2, 10.0)
    running(3, 2, 10.0, pid=gone, host="another")
    running(4, 2, 10.0, pid=1)  # somebody else's, which may not be signalled
    running(5, 2, 10.0, pid="what")
    assert states(folder) == ["stale", "running", "running", "running", "running"]
    row = table(folder).rows[0]
    assert (row.note, row.epoch) == (f"process {gone} is gone", 2)
    assert row.seconds_left is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="nothing here tells such processes from others")
def test_a_process_that_has_ended_is_gone_even_if_nobody_asked_for_its_exit_code(sweep):
    folder = sweep(job(1, "running"))
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    try:
        process.stdout.read()
        running(1, 2, 10.0, pid=process.pid)
        deadline = time.monotonic() + 10
        while states(folder) != ["stale"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert states(folder) == ["stale"]
    finally:
        process.wait()
        process.stdout.close()


def test_a_job_that_has_no_files_yet_is_stale_by_the_index(sweep):
    assert states(sweep(job(1, "running", run=False, pid=dead_pid()))) == ["stale"]
    assert states(sweep(job(1, "running", run=False))) == ["running"]


@pytest.mark.parametrize(
    ("index", "own", "shown"),
    [
        ("running", "done", "done"),
        ("running", "failed", "failed"),
        ("running", "interrupted", "interrupted"),
        ("failed", "running", "running"),
        ("interrupted", "done", "done"),
        ("waiting", "running", "running"),
        ("waiting", "done", "done"),
        ("waiting", "interrupted", "waiting"),
        ("waiting", "failed", "waiting"),
        ("done", "running", "done"),
    ],
)
def test_the_run_itself_knows_better_where_it_speaks_later(sweep, index, own, shown):
    folder = sweep(job(1, index))
    status(1, own)
    assert states(folder) == [shown]


def test_the_index_knows_better_where_the_run_spoke_before_it_began_again(sweep):
    folder = sweep(job(1, "running", updated=30))
    status(1, "failed", updated=20)
    assert states(folder) == ["running"]
    status(1, "running", updated=20, pid=dead_pid())
    assert states(folder) == ["running"]


def test_what_an_earlier_command_left_half_done_waits_even_if_it_was_killed(sweep):
    folder = sweep(job(1, "waiting"))
    status(1, "running", 5, pid=dead_pid())
    (row,) = table(folder).rows
    assert (row.state, row.epoch, row.note) == ("waiting", 5, "")


def test_a_failure_has_its_reason_on_one_line_from_whoever_knows_it(sweep):
    folder = sweep(
        job(1, "failed", note="of the index\nand more"),
        job(2, "failed"),
        job(3, "failed"),
        job(4, "failed", run=False, traceback="Traceback ...\n  File\nValueError: last line\n"),
        job(5, "failed", run=False),
    )
    for number, reason in ((1, "of the run"), (2, "of the run"), (3, "")):
        status(number, "failed", reason=reason, traceback="Traceback\nKeyError: 'x'")
    notes = [row.note for row in table(folder).rows]
    assert notes == ["of the index and more", "of the run", "KeyError: 'x'", "ValueError: last line", ""]


# Time left


def test_the_time_left_of_a_run_goes_by_the_epochs_that_it_has_done(sweep):
    folder = sweep(*(job(number, "running") for number in (1, 2, 3, 4)))
    running(1, 5, 60.0)  # 15 epochs of 12 s
    running(2, 5, 60.0, ago=7)  # 7 s of the next are over
    running(3, 5, 60.0, ago=5000)  # a clock that is wrong, or an epoch that takes long: not more than one is over
    status(4, "running", 0)
    left = [row.seconds_left for row in table(folder).rows]
    assert left[:3] == pytest.approx([180, 173, 168], abs=1)
    assert left[3] is None


def test_the_time_left_of_the_sweep_goes_by_finished_jobs_and_how_many_run_at_once(sweep):
    folder = sweep(
        *(job(number, "done") for number in (1, 2)),
        *(job(number, "running") for number in (3, 4)),
        *(job(number, "waiting") for number in (5, 6, 7, 8)),
        job(9, "failed"),
    )
    done(1, seconds=100.0)
    done(2, seconds=140.0)
    running(3, 10, 60.0)  # 60 s left
    running(4, 5, 25.0)  # 75 s left
    status(8, "interrupted", 10)  # half of it is done
    # 3.5 jobs of 120 s and the rest of two, two at once.
    assert table(folder).seconds_left == pytest.approx((3.5 * 120 + 60 + 75) / 2, abs=1)


def test_the_last_run_decides_when_the_sweep_ends(sweep):
    folder = sweep(job(1, "running"), job(2, "running"))
    running(1, 19, 19.0)
    running(2, 1, 50.0)
    assert table(folder).seconds_left == pytest.approx(19 * 50, abs=1)


def test_before_a_job_is_done_the_running_ones_say_how_long_the_others_take(sweep):
    folder = sweep(job(1, "running"), job(2, "waiting", run=False))
    running(1, 5, 50.0)
    assert table(folder).seconds_left == pytest.approx(150 + 200, abs=2)


def test_no_time_is_said_where_nothing_runs_or_nothing_is_known(sweep):
    folder = sweep(job(1, "done"), job(2, "waiting"), job(3, "interrupted"))
    done(1)
    assert table(folder).seconds_left is None
    folder = sweep(job(4, "running"), job(5, "waiting"))
    status(4, "running")
    assert table(folder).seconds_left is None
    assert "left" not in table(folder).summary()[0]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *[(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")],
        *[(86_399, "1 d 0 h"), (200_000, "2 d 7 h")],
    ],
)
def test_a_time_is_said_in_the_units_that_one_would_say_it_in(seconds, shown):
    assert show_seconds(seconds) == shown


# What is damaged, missing or meant to deceive


@pytest.mark.parametrize("state", ["running", "done", "failed", "interrupted", "waiting"])
@pytest.mark.parametrize(
    "content",
    [
        *[b"", b'{"state": "runn', b"[]", b"\xff\x00", b"null", b"[" * 100_000],
        b'{"state": ["x"], "epoch": {}, "pid": []}',
        b'{"state": "running", "epoch": 1e999, "epochs": NaN, "pid": 1' + b"0" * 400 + b', "host": {}}',
    ],
)
def test_a_damaged_status_is_said_and_ends_nothing(sweep, state, content, capsys):
    folder = sweep(job(1, state), job(2, "running"))
    running(2, 5, 60.0)
    for name in ("status.json", "result.json", "metrics.jsonl"):
        path = Path("runs", "digits", "run1", name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert main([f"dir={folder}"]) == 0
    assert cells(capsys.readouterr().out)[2][1:3] == ["running", "5/20"]
    row = table(folder).rows[0]
    assert row.state in (state, "running")
    if not content.startswith(b'{"state": ["x"]') and b"1e999" not in content:
        assert "status.json is damaged" in row.note


def test_what_is_missing_is_said(sweep):
    folder = sweep(job(1, "done"), job(2, "done"), job(3, "running"), job(4, "waiting"))
    status(2, "done", 20)
    notes = [row.note for row in table(folder).rows]
    assert notes == ["its directory is missing", "result.json is missing", "its directory is missing", ""]


def test_files_that_are_no_files_are_not_opened(sweep):
    folder = sweep(job(1, "done"), job(2, "running"))
    run = status(1, "done")
    os.mkfifo(run / "result.json")
    run = status(2, "running", 2)
    (run / "metrics.jsonl").mkdir()
    rows = table(folder).rows
    assert rows[0].note == "result.json is no plain file"
    assert (rows[1].seconds_left, rows[1].note) == (None, "")


def test_a_line_of_metrics_that_is_being_written_is_left_out(sweep):
    folder = sweep(job(1, "running"))
    with (running(1, 4, 40.0) / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "sec')
    assert table(folder).rows[0].seconds_left == pytest.approx(160, abs=1)


@pytest.mark.parametrize("directory", ["", "a\0b", "x" * 5000, "/dev/null", "."])
def test_an_index_with_odd_directories_is_shown_all_the_same(sweep, directory, capsys):
    folder = sweep(job(1, "failed", directory=directory), job(2, "running", directory=directory))
    assert main([f"dir={folder}"]) == 0
    assert set(cells(capsys.readouterr().out)) == {1, 2}


@pytest.mark.parametrize(
    "odd", [{"note": 5}, {"traceback": [1]}, {"host": 3}, {"pid": "x"}, {"device": ["d"]}, {"directory": {"x": 1}}]
)
def test_an_index_with_values_of_another_kind_is_one_message(sweep, odd, capsys):
    sweep(job(1, "failed", **odd))
    assert main([]) == 2
    (name,) = odd
    assert f"sweep.json is damaged: job 1: {name} is not" in capsys.readouterr().err


def test_nothing_that_names_hold_reaches_the_terminal_as_a_command_to_it(sweep, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\udc80"
    folder = sweep(
        job(1, "failed", [f"key{evil}=value{evil}"], note=f"note{evil}", host=f"host{evil}", device=f"dev{evil}"),
        job(2, "failed", ["key=1"], run=False),
        command=["-m", f"word{evil}"],
        name="evil\x1b[2J",
    )
    status(1, f"state{evil}", reason=evil)
    assert main([f"dir={folder}"]) == 0
    assert main([f"dir={evil}"]) == 2
    (folder / "sweep.json").write_text("{}")
    assert main([f"dir={folder}"]) == 2
    written = capsys.readouterr()
    for text in (written.out, written.err):
        assert "evil" in text
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)


# Which sweep


def touch(folder, seconds):
    os.utime(folder / "sweep.json", (seconds, seconds))


def test_the_sweep_that_changed_last_is_shown_where_none_is_named(sweep, capsys):
    old, new = sweep(job(1), name="zzz"), sweep(job(1), job(2), name="aaa")
    touch(old, 1_000)
    touch(new, 2_000)
    assert main([]) == 0
    assert capsys.readouterr().out.startswith(f"sweep {new}\n")
    touch(old, 3_000)
    assert main([]) == 0
    assert capsys.readouterr().out.startswith(f"sweep {old}\n")


def test_a_sweep_is_found_by_its_folder_its_index_and_its_name(sweep, tmp_path):
    folder = sweep(job(1))
    for name in (str(folder), str(tmp_path / folder), f"{folder}/", f"{folder}/sweep.json", folder.name):
        assert (find_sweep(name, "runs")).resolve() == (tmp_path / folder).resolve()


def test_a_wrong_folder_is_answered_with_the_nearest(sweep, capsys):
    sweep(job(1), name="quickstart-0a1b2c3d")
    sweep(job(1), name="cifar-99999999")
    assert main(["dir=runs/.sweeps/quickstrat-0a1b2c3d"]) == 2
    error = capsys.readouterr().err
    assert "runs/.sweeps/quickstrat-0a1b2c3d is not there" in error
    assert "try: dir=runs/.sweeps/quickstart-0a1b2c3d\n" in error
    assert main(["dir=runs"]) == 2
    assert "runs is no folder of a sweep: it has no sweep.json" in capsys.readouterr().err


def test_without_any_sweep_it_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "there is no sweep in runs/.sweeps" in capsys.readouterr().err
    assert main(["runs_root=nowhere", "dir=x"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dri=x"], "try: dir=x"),
        (["--watch"], "vkd.sweep has no key '--watch'"),
        (["watch"], "watch needs a value"),
        (["watch=maybe"], "expected: true or false"),
        (["every=soon"], "expected: a number of seconds"),
        (["every=0"], "every=0.0 is no time to wait"),
        (["every=nan"], "is no time to wait"),
        (["dir=${oc.env:HOME}"], "${oc.env:HOME} is not there"),
    ],
)
def test_wrong_words_are_answered_with_the_right_ones(sweep, words, message, capsys):
    sweep(job(1))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_damaged_index_is_one_message(sweep, capsys):
    folder = sweep(job(1))
    (folder / "sweep.json").write_text('{"jobs": [')
    assert main([]) == 2
    assert "is damaged" in capsys.readouterr().err


# Watching


def changes(monkeypatch, *steps):
    """Let each wait between two looks do the next of these."""
    left, waits = list(steps), []

    def wait(seconds):
        waits.append(seconds)
        if left:
            left.pop(0)()

    monkeypatch.setattr(vkd.sweep.time, "sleep", wait)
    return waits


def test_elsewhere_than_on_a_terminal_a_table_is_printed_whenever_something_changed(sweep, monkeypatch, capsys):
    sweep(job(1, "running"), job(2, "waiting", run=False))
    running(1, 1, 10.0)

    def end():
        done(1)
        done(2)
        sweep(job(1, "done"), job(2, "done"))

    waits = changes(monkeypatch, lambda: None, lambda: running(1, 2, 20.0), lambda: None, end)
    assert main(["watch=true", "every=3"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[3] for line in out.splitlines() if re.match(r"\s+1  ", line)] == ["1/20", "2/20", "20/20"]
    assert out.count("sweep runs") == 3
    assert waits[:4] == [3, 3, 3, 3]


def test_it_ends_when_nothing_runs_or_waits(sweep, monkeypatch):
    sweep(job(1, "failed"), job(2, "interrupted"), job(3, "running", run=False, pid=dead_pid()))
    waits = changes(monkeypatch)
    assert main(["watch=true"]) == 0
    assert sum(waits) == 0


def test_it_ends_when_jobs_wait_for_a_command_that_is_gone_and_says_so(sweep, monkeypatch, capsys):
    pid = dead_pid()
    for jobs in ([job(1, "done"), job(2, run=False)], [job(1, "interrupted"), job(2, run=False)], [job(1), job(2)]):
        sweep(*jobs, host=HOST, pid=pid)
        done(1)
        waits = changes(monkeypatch)
        assert main(["watch=true"]) == 0
        assert sum(waits) == 0
        total, go_on = capsys.readouterr().out.rstrip().splitlines()[-2:]
        assert total.startswith("2 jobs: ")
        assert total.endswith(f"; stopped: process {pid}, which began it, is gone and no job is running")
        assert go_on.startswith("go on: ")


def test_on_a_terminal_it_ends_then_too(sweep, on_terminal, monkeypatch):
    sweep(job(1), job(2, run=False), host=HOST, pid=dead_pid())
    waits = changes(monkeypatch)
    code, out = on_terminal("watch=true")
    assert (code, waits) == (0, [])
    assert "2 jobs: 2 waiting; stopped: process " in shown(out)


def test_a_job_that_still_runs_is_watched_to_its_end_though_the_command_is_gone(sweep, monkeypatch, capsys):
    pid = dead_pid()
    sweep(job(1, "running"), job(2, run=False), host=HOST, pid=pid)
    running(1, 1, 10.0)
    waits = changes(monkeypatch, lambda: None, lambda: done(1))
    assert main(["watch=true", "every=3"]) == 0
    first, last = re.findall(r"2 jobs: .*", capsys.readouterr().out)
    assert sum(waits) == 6
    assert "is gone" not in first
    assert "1 done, 1 waiting; stopped: process" in last


@pytest.mark.parametrize(
    ("host", "pid"),
    [(HOST, os.getpid()), (HOST, None), (HOST, 0), ("elsewhere", "gone"), (None, "gone"), (None, None)],
    ids=["alive", "unknown process", "no process", "elsewhere", "unknown host", "unknown"],
)
def test_jobs_that_may_still_be_begun_are_waited_for(sweep, host, pid):
    pid = dead_pid() if pid == "gone" else pid
    folder = sweep(job(1, "done"), job(2, run=False), host=host, pid=pid)
    done(1)
    assert not table(folder).ended
    assert table(folder).summary()[0] == "2 jobs: 1 done, 1 waiting"


def test_a_sweep_from_before_the_index_had_its_process_is_waited_for(sweep):
    folder = sweep(job(1))
    content = json.loads((folder / "sweep.json").read_text())
    (folder / "sweep.json").write_text(json.dumps({key: content[key] for key in ("command", "directory", "jobs")}))
    assert not table(folder).ended


def test_a_finished_sweep_is_not_called_stopped(sweep):
    folder = sweep(job(1, "done"), job(2, "failed"), host=HOST, pid=dead_pid())
    done(1)
    assert table(folder).ended
    assert table(folder).summary()[0] == "2 jobs: 1 done, 1 failed"


def test_what_the_command_wrote_in_its_last_moment_is_seen(sweep, monkeypatch):
    pid = dead_pid()
    folder = sweep(job(1), host=HOST, pid=pid)
    look = sweep_table._is_gone

    def end_meanwhile(speaker, host):
        if speaker["pid"] == pid:
            done(1)
            sweep(job(1, "done"), host=HOST, pid=pid)
        return look(speaker, host)

    monkeypatch.setattr(sweep_table, "_is_gone", end_meanwhile)
    assert table(folder).summary() == ["1 job: 1 done"]


class Terminal(io.StringIO):
    """What a terminal of 100 columns and 30 lines is sent."""

    def isatty(self):
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """A function that runs the command on a terminal: its exit code, and what it sent there."""
    for name, value in {"COLUMNS": "100", "LINES": "30", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    def run(*words):
        with contextlib.redirect_stdout(Terminal()) as screen:
            return main(list(words)), screen.getvalue()

    return run


def shown(text):
    """What is left of it without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_on_a_terminal_it_is_drawn_in_place_until_ctrl_c(sweep, monkeypatch, on_terminal):
    def interrupt():
        raise KeyboardInterrupt

    sweep(job(1, "running"), job(2, "waiting", run=False))
    running(1, 1, 10.0)
    changes(monkeypatch, lambda: running(1, 2, 20.0), lambda: running(1, 3, 30.0), interrupt)
    code, out = on_terminal("watch=true")
    assert code == 130
    frames = shown(out).split("sweep runs")[1:]
    assert [re.search(r"\d+/20", frame).group() for frame in frames][:3] == ["1/20", "2/20", "3/20"]
    # Up over the lines of the frame before, and the cursor back at the end.
    assert out.count("\x1b[1A") >= 2 * (len(frames[0].splitlines()) - 1)
    assert out.rstrip().endswith("\x1b[?25h")


def test_a_sweep_that_is_higher_than_the_terminal_shows_what_is_going_on(sweep, monkeypatch, on_terminal):
    jobs = [job(number, "done", run=False) for number in range(1, 41)]
    jobs += [job(41, "failed", note="out of memory", run=False), job(42, "running"), job(43, "running")]
    jobs += [job(number, run=False) for number in range(44, 101)]
    sweep(*jobs)
    running(42, 1, 10.0)
    running(43, 2, 10.0)

    def interrupt():
        raise KeyboardInterrupt

    changes(monkeypatch, interrupt)
    code, out = on_terminal("watch=true")
    assert code == 130
    frame = shown(out).split("sweep runs")[1].split("\x1b")[0]
    lines = frame.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    numbers = list(cells(frame))
    assert {41, 42, 43} <= set(numbers)
    assert numbers == list(range(min(numbers), max(numbers) + 1)), "the last done, those at work and the next to come"
    assert f"... and {100 - len(numbers)} more jobs" in frame
    assert "40 done, 2 running, 57 waiting, 1 failed" in frame


@pytest.mark.parametrize("room", [-5, 0, 1, 2, 7, 100])
@pytest.mark.parametrize(("finished", "at_work", "to_come"), [(50, 0, 0), (0, 0, 50), (20, 20, 20), (3, 1, 40)])
def test_no_more_rows_are_chosen_than_there_is_room_and_no_room_is_wasted(room, finished, at_work, to_come):
    kinds = ["done"] * finished + ["running"] * at_work + ["waiting"] * to_come
    rows = [sweep_table.Row(number, {}, state) for number, state in enumerate(kinds, start=1)]
    chosen = choose_rows(rows, room)
    assert len(chosen) == min(max(room, 1), len(rows))
    assert [row.number for row in chosen] == sorted({row.number for row in chosen})


def test_without_watching_a_terminal_is_shown_all_jobs(sweep, on_terminal):
    sweep(*(job(number, run=False) for number in range(1, 101)))
    code, out = on_terminal()
    assert code == 0
    assert list(cells(shown(out))) == list(range(1, 101))


def test_a_sweep_of_a_thousand_jobs_is_read_and_drawn_in_well_under_a_second(sweep):
    words = [[f"divergence.alpha={number % 7}", f"seed={number}"] for number in range(1000)]
    folder = sweep(
        *(job(number, "done", words[number - 1]) for number in range(1, 901)),
        *(job(number, "running", words[number - 1]) for number in range(901, 911)),
        *(job(number, "waiting", words[number - 1], run=False) for number in range(911, 1001)),
    )
    for number in range(1, 901):
        done(number)
    for number in range(901, 911):
        running(number, 10, 10.0)
    reader = SweepReader(folder)

    def draw():
        from rich.console import Console

        began = time.process_time()
        console = Console(file=io.StringIO(), force_terminal=True, width=120, height=50)
        console.print(to_rich(reader.read(), console.height))
        return time.process_time() - began

    assert draw() < 1
    assert draw() < 0.5


# As a command


def test_help_is_a_page_and_the_manual_of_training_names_it(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for key in ("dir=", "runs_root=", "watch=", "every="):
        assert key in out
    for state in ("waiting", "running", "stale", "interrupted", "done", "failed"):
        assert f"\n  {state} " in out
    assert max(map(len, out.splitlines())) <= 120
    from vkd.manual import train_page

    assert "vkd.sweep" in train_page()


def test_it_runs_as_a_module_without_torch_timm_hydra_or_wandb(sweep):
    sweep(job(1))
    code = (
        "import sys, vkd.sweep; status = vkd.sweep.main([]);"
        "heavy = {'torch', 'timm', 'hydra', 'wandb'} & set(sys.modules); assert not heavy, heavy; sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(vkd.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)
    words = [sys.executable, "-m", "vkd.sweep", "dir=nothing"]
    finished = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr


def test_the_index_of_a_real_sweep_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train("-m", "method=none", "seed=1,2") == 0
    capsys.readouterr()
    assert main([]) == 0
    found = cells(capsys.readouterr().out)
    assert [found[number][:3] for number in (1, 2)] == [["1", "done", "1/1"], ["2", "done", "1/1"]]
    assert float(found[1][3]) > 0
