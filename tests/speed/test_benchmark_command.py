"""`python -m vkd.benchmark`: what it writes, what it prints, and how it refuses."""

import io
import json
import os
import re
import signal
import time

import pytest
from commands import TINY, snapshot
from rich.console import Console

import vkd.benchmark
import vkd.speed.report
from vkd.divergences import DIVERGENCES
from vkd.speed import first_step, startup
from vkd.speed.scratch import scratch_folder
from vkd.speed.tables import print_report
from vkd.training import interruption

LOOPS = ["classic", "run", "cached", "fused", "bound", "plain"]
FAST = [
    "student.arch=cifar_resnet8",
    "steps=2",
    "repetitions=2",
    "students=2",
    "shapes=[4x10]",
    "workers=1",
    "recipe.batch_size=32",
]
STARTED = {"help": [0.5, 0.7], "import torch": [2.0, 2.1], "import vkd": [0.1, 0.2], "first step": [5.0, 4.0]}


def run(folder, *words):
    """The command's exit code in an empty working directory."""
    return vkd.benchmark.main([*TINY, *FAST, f"output={folder}", *words])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder of a full report, and what the command left in its working directory."""
    place = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(vkd.speed.report, "measure_startup", lambda repetitions, words: STARTED)
        assert run(place / "speed") == 0
    return place


@pytest.fixture
def report(measured):
    """The report as JSON."""
    (path,) = (measured / "speed").iterdir()
    return json.loads(path.read_text())


def test_it_leaves_one_file_named_after_device_pair_and_precision(measured):
    (path,) = (measured / "speed").iterdir()
    assert set(snapshot(measured)) == {"speed", f"speed/{path.name}"}
    assert re.fullmatch(r"cpu_[a-z0-9_]+_threads?_resnet8_width4_resnet8_fp32\.json", path.name)


def test_every_loop_has_a_positive_rate_for_each_repetition(report):
    assert list(report["images_per_second"]) == LOOPS
    for rates in report["images_per_second"].values():
        assert len(rates) == 2
        assert all(rate > 0 for rate in rates)
    assert (report["repetitions"], report["steps"], report["students"]) == (2, 2, 2)
    assert report["left_out"] == {}


def test_it_says_what_was_measured_and_on_what(report):
    assert report["pair"] == "resnet8_width4_resnet8"
    assert (report["dataset"], report["batch_size"], report["precision"]) == ("digits", 32, "fp32")
    assert report["device"].startswith("cpu (")
    assert report["teacher"] == {"arch": "cifar_resnet8_width4", "random_weights": True}
    assert "teacher folded" in report["switches"]
    environment = report["environment"]
    assert environment["command"].startswith("python -m vkd.benchmark dataset=digits ")
    assert {"torch", "timm", "python", "git", "hardware"} <= set(environment)
    assert environment["hardware"]["threads"] >= 1
    assert "package" not in environment


def test_a_ratio_lies_between_those_of_its_repetitions(report):
    rates = report["images_per_second"]
    quotients = sorted(mine / theirs for mine, theirs in zip(rates["run"], rates["classic"], strict=True))
    assert report["ratios"]["run/classic"] == {
        "median": pytest.approx(sum(quotients) / 2),
        "least": pytest.approx(quotients[0]),
        "most": pytest.approx(quotients[1]),
    }
    assert set(report["ratios"]) == {f"{name}/classic" for name in LOOPS[1:]} | {
        "run/bound",
        "fused/run",
        "plain/cached",
    }


def test_two_students_hold_more_than_one_and_plain_training_holds_no_teacher(report):
    memory = report["peak_memory_bytes"]
    assert all(entry["total"] == entry["held"] + entry["step"] for entry in memory.values())
    assert memory["fused"]["held"] > memory["run"]["held"] > memory["plain"]["held"] > 0


def test_every_divergence_and_kl_div_are_in_it(report):
    assert [cost["name"] for cost in report["divergences"]] == ["kl_div", *DIVERGENCES]
    assert {tuple(cost["shape"]) for cost in report["divergences"]} == {(4, 10)}
    assert report["startup_seconds"] == STARTED


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal_and_hold_the_figures_unbroken(report, width):
    report["images_per_second"] = {name: [1234567.8, 2345678.9] for name in LOOPS}
    report["ratios"] = {name: {"median": 12.345, "least": 10.0, "most": 123.456} for name in report["ratios"]}
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width))
    said = stream.getvalue()
    assert max(map(len, said.splitlines())) <= width
    assert said.count(" 1,790,123 ") == 6
    assert said.count("12.35 (10.00 to 123.46)") + said.count("12.34 (10.00 to 123.46)") == 8
    for words in ("fused, 2 students", "torch's kl_div", "abkd (0.8, 0.3)", "4.50 (4.00 to 5.00)", "random weights"):
        assert words in said


def test_what_a_method_cannot_have_is_left_out_with_its_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vkd.speed.report, "measure_startup", lambda repetitions, words: {})
    monkeypatch.setattr(vkd.speed.report.divergence_costs, "measure", lambda *_, **__: [])
    assert run("null", "method=at", "repetitions=1", "steps=1") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "fused was left out: method=at compares no distributions" in said
    assert "cached was left out: teacher.cache=views holds the teacher's logits" in said
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_does_not_lose_what_was_measured_before(tmp_path, monkeypatch, capsys):
    def fail(repetitions, words):
        raise RuntimeError("python -m vkd.train --help failed:\nno such module")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vkd.speed.report, "measure_startup", fail)
    assert run(tmp_path, "parts=[bound,startup]") == 0
    assert "no such module" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert len(written["images_per_second"]["bound"]) == 2
    assert written["images_per_second"]["run"] == []
    assert written["ratios"]["run/bound"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parts=[clasic]"], "parts=[classic]"),
        (["parts=[]"], "nothing to measure"),
        (["repetitions=0"], "repetitions = 0"),
        (["steps=0"], "steps = 0"),
        (["students=0"], "students = 0"),
        (["seconds=0"], "seconds = 0"),
        (["repetition=5"], "repetitions=..."),
        (["students=many"], "a whole number"),
        (["shapes=[64]"], "shapes=[64x100,"),
        (["shapes=[]"], "at least one part and one shape"),
        (["method=none"], "without method=none"),
        (["method=mlkd"], "2 views"),
        (["method=at", "parts=[fused]"], "no grid of alpha and beta"),
        (["method=at", "parts=[cached]"], "wants the teacher's features"),
        (["pair=resnet20_resnet9"], "resnet20_resnet8"),
        (["recipe.batch_size=5000"], "recipe.batch_size=5000 leaves no batch"),
        (["teacher.checkpoint=nowhere.pth"], "nowhere.pth"),
        (["-m"], "-m"),
        (["output=taken"], "output = taken is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message_and_leaves_nothing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("in the way")
    before = snapshot(tmp_path)
    given = [word for word in [*TINY, *FAST] if not any(word.startswith(new.split("=")[0] + "=") for new in words)]
    assert vkd.benchmark.main([*given, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vkd: ")
    assert message in said
    assert "Traceback" not in said
    assert snapshot(tmp_path) == before


def test_being_told_to_end_leaves_no_temporary_folder_and_no_handler():
    folders = []

    def be_told_to_end():
        with scratch_folder() as folder:
            (folder / "views").mkdir()
            folders.append(folder)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        be_told_to_end()
    assert not folders[0].exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_help_names_every_key_and_every_part(capsys):
    assert vkd.benchmark.main(["--help"]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 120
    for key in vkd.benchmark.BenchmarkConfig.__annotations__:
        assert re.search(rf"^  {key}=", page, re.MULTILINE)
    for part in [*LOOPS, "divergences", "startup"]:
        assert re.search(rf"^  {part} ", page, re.MULTILINE)


def test_the_first_step_is_timed_where_it_ends_and_the_run_stops_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(interruption, "stop_on_signals", interruption.stop_on_signals)  # put back afterwards
    started = first_step.time.time()
    assert first_step.main([*TINY, "teacher.arch=cifar_resnet8", f"runs_root={tmp_path}"]) == 0
    ended = first_step.time.time()
    said = capsys.readouterr().out.splitlines()
    assert started < float(said[-1]) < ended
    assert "stopped after step 1 of epoch 1" in said[-2]


def test_the_first_step_of_a_wrong_command_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(interruption, "stop_on_signals", interruption.stop_on_signals)
    assert first_step.main(["seed=none"]) != 0


def test_starts_are_timed_from_the_process_on_and_imports_beyond_torchs(monkeypatch):
    clock = [1000.0]
    taken = {"--help": 0.5, "import torch": 2.0, "import torch, vkd": 2.25, "vkd.speed.first_step": 6.0}
    started = []

    def pretend(*arguments):
        (found,) = (word for word in arguments if word in taken)
        started.append(found)
        clock[0] += taken[found]
        return f"said before\n{clock[0] - 1.0}\n"  # the process ends a second behind its step

    monkeypatch.setattr(startup, "_run", pretend)
    monkeypatch.setattr(startup.time, "time", lambda: clock[0])
    assert startup.measure_startup(2, ["device=cpu"]) == {
        "help": [0.5, 0.5],
        "import torch": [2.0, 2.0],
        "import vkd": [0.25, 0.25],
        "first step": [5.0, 5.0],
    }
    assert started == [*taken] * 2


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        startup._run("-c", "1 / 0")
