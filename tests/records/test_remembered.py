"""What was read of runs before is believed as long as nothing has changed, and never longer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from records.studies import result, write_run
from vkd.records import reading, remembered
from vkd.records.reading import Damaged, read_runs
from vkd.records.remembered import RunMemory, cache_file


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs of every state, written a minute ago."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    for seed in (1, 2, 3):
        write_run(runs, result("none", None, seed=seed, top1=90.0 + seed))
        write_run(runs, result("kd", "abkd", point=(0.8, 0.3), seed=seed, top1=91.0 + seed))
    write_run(runs, result("kd", "rkld", seed=1), {"state": "failed", "reason": "the loss is not finite"})
    write_run(runs, result("kd", "rkld", seed=2), {"state": "running", "epoch": 3, "epochs": 20})
    broken = write_run(runs, result("kd", "rkld", seed=3))
    (broken / "result.json").write_text('{"format": 1')
    settle(runs)
    return runs / "quickstart"


def settle(folder: Path) -> None:
    """Let every file below a folder be a minute old."""
    then = time.time_ns() - 60_000_000_000
    for path in folder.rglob("*.*"):
        if path.is_file():
            os.utime(path, ns=(then, then))


def read_afresh(study):
    """What a process that starts now reads, keeping it for the next one, and what it read from files."""
    opened = []

    def reading_it(path, name=None):
        opened.append(Path(path).name)
        return read_run(path, name)

    read_run = remembered.read_run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remembered, "read_run", reading_it)
        memory = RunMemory(study)
        runs = memory.read(study.parent)
    memory.remember()
    return runs, opened


def told(runs):
    """All that a table can learn of runs."""
    return [
        (run.path, run.state, run.reason, run.content, run.parameters, run.environment, run.fingerprint) for run in runs
    ]


def test_a_second_look_opens_no_run_and_sees_the_same(study):
    expected = told(read_runs(study, study.parent))
    first, opened = read_afresh(study)
    assert len(opened) == len(expected) == 9
    assert told(first) == expected
    second, opened = read_afresh(study)
    assert opened == []
    assert told(second) == expected
    assert [list(run.content) for run in second] == [list(run.content) for run in first]


def test_a_run_that_changed_is_read_again_and_no_other(study):
    read_afresh(study)
    changed = sorted(study.glob("*/*abkd-s2-*"))[0]
    content = json.loads((changed / "result.json").read_text())
    content["metrics"]["test/top1"] = 12.5
    (changed / "result.json").write_text(json.dumps(content))
    settle(changed)
    runs, opened = read_afresh(study)
    assert opened == [changed.name]
    assert told(runs) == told(read_runs(study, study.parent))
    assert 12.5 in [run.metric("test/top1") for run in runs]


@pytest.mark.parametrize("name", ["status.json", "config.yaml", "result.json"])
def test_a_file_that_goes_is_noticed(study, name):
    read_afresh(study)
    for folder in study.glob("*/*"):
        (folder / name).unlink(missing_ok=True)
    assert told(read_afresh(study)[0]) == told(read_runs(study, study.parent))


def test_runs_that_come_and_go_are_noticed(study):
    read_afresh(study)
    write_run(study.parent, result("kd", "abkd", point=(0.8, 0.3), seed=9, top1=70.0))
    gone = sorted(study.glob("*/none-s1-*"))[0]
    for file in gone.iterdir():
        file.unlink()
    gone.rmdir()
    assert told(read_afresh(study)[0]) == told(read_runs(study, study.parent))


def test_what_changed_a_moment_ago_is_not_believed_since_its_time_need_not_tell_the_next_change(study):
    for path in study.rglob("*.json"):
        os.utime(path)
    _, opened = read_afresh(study)
    again, reopened = read_afresh(study)
    assert reopened == opened
    assert told(again) == told(read_runs(study, study.parent))


def test_a_file_that_could_not_be_read_is_tried_again_although_it_is_the_same(study, monkeypatch):
    def failing(folder, name, most=0):
        if name == "result.json" and "none-s1" in folder:
            raise Damaged("result.json cannot be read: Input/output error")
        return read_bytes(folder, name)

    read_bytes = reading.read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(reading, "read_bytes", failing)
        runs, _ = read_afresh(study)
        assert "damaged" in [run.state for run in runs if "none-s1" in run.path]
    again, opened = read_afresh(study)
    assert [name.rpartition("-")[0] for name in opened] == ["none-s1"]
    assert told(again) == told(read_runs(study, study.parent))


def test_a_run_written_over_with_its_old_time_is_read_again(study):
    read_afresh(study)
    path = sorted(study.glob("*/none-s1-*"))[0] / "result.json"
    before = path.stat()
    text = path.read_text()
    assert "91.0" in text
    path.write_text(text.replace("91.0", "49.0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    runs, _ = read_afresh(study)
    assert 49.0 in [run.metric("test/top1") for run in runs]


@pytest.mark.parametrize("entry", [None, [], 3, {}, ["?"], [None, "done", "", {"metrics": 10**6}]])
def test_an_entry_of_the_cache_that_makes_no_sense_is_read_again(study, entry):
    expected = told(read_afresh(study)[0])
    content = json.loads(cache_file(study).read_text())
    for own, known in content["runs"].items():
        content["runs"][own] = [known[0], *entry[1:]] if isinstance(entry, list) and len(entry) == 4 else entry
    cache_file(study).write_text(json.dumps(content))
    runs, opened = read_afresh(study)
    assert len(opened) == 9
    assert told(runs) == expected


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"reader": 1}', "\x00", "[" * 100_000])
def test_a_damaged_cache_is_as_none(study, damage):
    expected = told(read_afresh(study)[0])
    cache_file(study).write_text(damage)
    runs, opened = read_afresh(study)
    assert len(opened) == 9
    assert told(runs) == expected
    assert read_afresh(study)[1] == []


def test_the_cache_of_another_version_is_not_believed(study, monkeypatch):
    read_afresh(study)
    monkeypatch.setattr(remembered, "_code", lambda: "another")
    assert len(read_afresh(study)[1]) == 9


def test_a_cache_that_cannot_be_written_is_done_without(study, monkeypatch):
    monkeypatch.setattr(remembered, "cache_file", lambda root: Path("/proc/nothing/here.json"))
    assert len(read_afresh(study)[1]) == 9
    assert len(read_afresh(study)[1]) == 9


def test_a_user_without_a_home_has_no_cache(study, monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("VKD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert len(read_afresh(study)[1]) == 9
    assert len(read_afresh(study)[1]) == 9


def test_nothing_is_kept_beside_the_runs(study):
    before = sorted(study.parent.rglob("*"))
    read_afresh(study)
    assert sorted(study.parent.rglob("*")) == before
    assert cache_file(study).is_relative_to(os.environ["VKD_CACHE"])


def test_what_was_made_from_a_state_is_known_until_the_state_changes(study):
    memory = RunMemory(study)
    memory.read()
    state = memory.state("words")
    assert not memory.was_made("results", state)
    memory.remember("results", state)
    again = RunMemory(study)
    again.read()
    assert again.was_made("results", again.state("words"))
    assert again.state("words") != again.state("other words")
    (sorted(study.glob("*/none-s1-*"))[0] / "status.json").write_text('{"state": "failed"}')
    changed = RunMemory(study)
    changed.read()
    assert not changed.was_made("results", changed.state("words"))
