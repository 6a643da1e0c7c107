import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from records.studies import result, write_run

import vkd
import vkd.collect
import vkd.collecting
import vkd.records.terminal
from vkd.collect import main


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of 3 rows x 3 seeds, one of them failed, in the working directory."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    for seed, top1 in enumerate((90.0, 91.0, 92.0), 1):
        write_run(runs, result("none", None, seed=seed, top1=top1))
        write_run(runs, result(seed=seed, top1=top1 + 1))
        failed = {"state": "failed", "reason": "loss is not finite", "traceback": "..."} if seed == 3 else None
        write_run(runs, result("kd", "abkd", point=(0.8, 0.3), seed=seed, top1=top1 + 2), failed)
    return runs


def test_a_study_is_written_and_shown(study, tmp_path, capsys):
    assert main(["study=quickstart"]) == 0
    folder = tmp_path / "results" / "quickstart"
    names = {"table.csv", "table.md", "table.tex", "report.html"}
    names |= {f"{name}.{suffix}" for name in ("accuracy", "cost") for suffix in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == names
    table = (folder / "table.md").read_text()
    assert capsys.readouterr().out == table
    assert table.startswith("# quickstart: test top-1 (%)\n\n    python -m vkd.collect study=quickstart\n")
    assert "seed 3: failed: loss is not finite (`quickstart/cifar_resnet20-cifar_resnet8_width4/kd-abkd-s3-" in table
    assert str(tmp_path) not in table
    lines = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    assert [float(line["mean"]) for line in lines] == [91.0, 92.0, 92.5]
    assert [line["difference_to_plain"] for line in lines] == ["", "1.0", "2.0"]
    image = Image.open(folder / "accuracy.png")
    assert len(set(image.convert("L").tobytes())) > 10


def test_collecting_twice_changes_no_byte(study, tmp_path):
    def collect():
        assert main(["study=quickstart"]) == 0
        return {path.name: path.read_bytes() for path in (tmp_path / "results" / "quickstart").iterdir()}

    assert collect() == collect()


def settle(folder):
    """Let every file below a folder be a minute old, as those of runs that are over."""
    then = time.time() - 60
    for path in folder.rglob("*.*"):
        if path.is_file():
            os.utime(path, (then, then))


def test_results_that_nothing_has_changed_are_left_alone_and_shown_again(study, tmp_path, capsys, monkeypatch):
    def collect(*words):
        assert main(["study=quickstart", *words]) == 0
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}, capsys.readouterr().out

    folder = tmp_path / "results" / "quickstart"
    settle(study)
    first, shown = collect()
    again, shown_again = collect()
    assert again == first
    assert shown_again == shown
    changes = {
        "a result of another content": lambda: (folder / "table.md").write_text("mine"),
        "a result that is gone": lambda: (folder / "accuracy.png").unlink(),
        "a run": lambda: write_run(study, result("kd", "rkld", seed=1, top1=93.0)),
        "the question": lambda: (tmp_path / "experiments/quickstart/README.md").write_text("# quickstart: why?"),
    }
    (tmp_path / "experiments/quickstart").mkdir(parents=True)
    for what, change in changes.items():
        before = collect()[0]
        change()
        settle(study)
        after, shown = collect()
        assert all(after[name] > before[name] for name in ("table.md", "accuracy.png", "report.html")), what
        assert (folder / "table.md").read_text() == shown
    assert collect("baseline=none")[0]["table.md"] > after["table.md"]


def test_a_figure_that_has_nothing_to_show_any_more_goes_and_other_files_stay(study, tmp_path):
    folder = tmp_path / "results" / "quickstart"
    folder.mkdir(parents=True)
    for name in ("alpha_beta.png", "mine.png"):
        (folder / name).write_bytes(b"earlier")
    assert main(["study=quickstart"]) == 0
    assert not (folder / "alpha_beta.png").exists()
    assert (folder / "mine.png").read_bytes() == b"earlier"


def test_the_records_of_all_runs_of_the_table_can_be_published_with_it(study, tmp_path):
    environment = {"host": "my-machine", "package": "/home/me/vkd", "platform": "Linux-of-mine"}
    write_run(study, result("kd", "rkld", seed=1, top1=93.0, environment=environment))
    folder = tmp_path / "results" / "quickstart"
    assert main(["study=quickstart", "records=true"]) == 0
    text = (folder / "runs.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    kept = {record.pop("path"): record for record in records}
    found = {
        path.parent.relative_to(study).as_posix(): json.loads(path.read_text()) for path in study.rglob("result.json")
    }
    for content in found.values():
        for name in environment:
            content["environment"].pop(name, None)
    assert kept == found
    assert not any(word in text for word in environment.values())
    assert "vkd.collect study=quickstart records=true" in (folder / "table.md").read_text()
    assert main(["study=quickstart"]) == 0
    assert not (folder / "runs.jsonl").exists()


def test_another_metric_and_other_roots_can_be_asked_for(study, tmp_path, capsys):
    words = ["study=quickstart", "metric=val/top1", f"runs_root={study}", f"results_root={tmp_path / 'out'}"]
    assert main(words) == 0
    table = (tmp_path / "out" / "quickstart" / "table.md").read_text()
    assert "    python -m vkd.collect study=quickstart metric=val/top1\n" in table
    assert "# quickstart: val top-1 (%)" in table
    assert str(tmp_path) not in table
    assert not (tmp_path / "results").exists()


def test_another_baseline_can_be_asked_for_and_is_named_in_every_file(study, tmp_path, capsys):
    assert main(["study=quickstart", "baseline=kd abkd (0.8, 0.3)"]) == 0
    folder = tmp_path / "results" / "quickstart"
    table = (folder / "table.md").read_text()
    assert "    python -m vkd.collect study=quickstart 'baseline=kd abkd (0.8, 0.3)'\n" in table
    assert "| to kd abkd (0.8, 0.3) |" in " ".join(table.split())
    lines = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))
    assert [line["difference_to_baseline"] for line in lines] == ["-2.0", "-1.0", ""]
    assert [line["difference_to_baseline_pairs"] for line in lines] == ["2", "2", ""]
    assert "To kd abkd (0.8, 0.3)" in (folder / "table.tex").read_text()
    assert main(["study=quickstart", "baseline=none"]) == 0
    header = next(line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| method"))
    assert header.split("|")[-2].strip() == "to plain"


def test_keys_of_the_config_make_rows_and_columns_that_are_asked_for(study, tmp_path, capsys):
    for seed in (1, 2, 3):
        write_run(study, result(seed=seed, top1=95.0, recipe={"epochs": 40}))
    assert main(["study=quickstart", "rows=method,divergence.temperature", "columns=dataset,recipe.epochs"]) == 0
    out = capsys.readouterr().out
    assert "study=quickstart rows=method,divergence.temperature columns=dataset,recipe.epochs\n" in out
    header = next(line for line in out.splitlines() if line.startswith("| method"))
    assert re.findall(r"epochs=\d+", header) == ["epochs=20", "epochs=40"]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "results" / "quickstart" / "table.csv").read_text())))
    assert [(line["method"], line["recipe.epochs"], line["variant"]) for line in lines] == [
        ("none", "20.0", ""),
        ("kd", "20.0", "divergence.temperature=4"),
        ("kd", "40.0", "divergence.temperature=4"),
        ("kd", "20.0", "divergence.temperature=4"),
    ]
    assert main(["study=quickstart", "rows=none", "columns=null"]) == 0
    assert "variant" in capsys.readouterr().out  # the epochs split the row again


def changes(monkeypatch, *steps):
    """Take the steps, one a pause of the command, then press Ctrl-C; the pauses, in seconds."""
    left, waits = list(steps), []

    def wait(seconds):
        waits.append(seconds)
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    monkeypatch.setattr(vkd.records.terminal.time, "sleep", wait)
    return waits


def test_watching_prints_the_table_whenever_it_has_changed_writes_nothing_and_ends_with_ctrl_c(
    study, tmp_path, monkeypatch, capsys
):
    waits = changes(
        monkeypatch, lambda: None, lambda: write_run(study, result(seed=4, top1=95.0)) and None, lambda: None
    )
    assert main(["study=quickstart", "watch=true", "every=3"]) == 130
    out = capsys.readouterr().out
    assert out.count("# quickstart: test top-1 (%)") == 2
    first, second = out.split("# quickstart")[1:]
    assert "92.00 ± 1.00 (3)" in first
    assert "92.75 ± 1.71 (4)" in second
    assert len(waits) == 4
    assert min(waits) >= 3
    assert not (tmp_path / "results").exists()


def test_watching_a_large_study_takes_no_more_than_half_of_the_time(study, monkeypatch, capsys):
    clock = iter(range(0, 1000, 7))
    waits = changes(monkeypatch)
    monkeypatch.setattr(vkd.records.terminal.time, "monotonic", lambda: float(next(clock)))
    assert main(["study=quickstart", "watch=true", "every=2"]) == 130
    assert waits == [7.0]


def test_on_a_terminal_a_watched_table_is_redrawn_in_place(study, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    for name, value in {"COLUMNS": "160", "LINES": "60", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", terminal)
    changes(monkeypatch, lambda: write_run(study, result(seed=4, top1=95.0)) and None)
    assert main(["study=quickstart", "watch=true"]) == 130
    sent = terminal.getvalue()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sent)
    assert "92.00 ± 1.00 (3)" in shown
    assert "92.75 ± 1.71 (4)" in shown
    assert re.search(r"\x1b\[\d*A", sent)  # the cursor goes up, over the table before
    assert "hole: kd abkd (0.8, 0.3)" in shown


def test_every_kind_of_hole_leaves_the_rest_standing(study, tmp_path, capsys):
    pair = study / "quickstart" / "cifar_resnet20-cifar_resnet8_width4"
    running = write_run(study, result("dkd", "fkld", seed=1), {"state": "running", "epoch": 2, "epochs": 20})
    half = write_run(study, result("dkd", "fkld", seed=2))
    (half / "result.json").write_text(json.dumps(result("dkd", "fkld", seed=2))[:300])
    unfinished = write_run(study, result("dkd", "fkld", seed=3))
    (unfinished / "result.json").unlink()
    (unfinished / "status.json").unlink()
    (pair / "kd-fkld-s9-0123abcd").mkdir()
    (pair / "kd-fkld-s9-0123abcd" / "config.yaml").write_text("a: [")
    assert main(["study=quickstart"]) == 0
    out = capsys.readouterr().out
    for words in ("running: epoch 2 of 20", "damaged: result.json is not whole JSON", "unfinished: no result.json"):
        assert words in out
    assert "hole (0 of 3)" in out
    assert f"(`quickstart/cifar_resnet20-cifar_resnet8_width4/{running.name}`)" in out
    assert "in no row: unfinished: no result.json; config.yaml is not plain YAML" in out


def test_a_study_of_holes_alone_is_a_table_of_holes(tmp_path, capsys):
    write_run(tmp_path / "runs", result(), {"state": "failed", "reason": "out of memory"})
    assert main(["study=quickstart", f"runs_root={tmp_path / 'runs'}", f"results_root={tmp_path}"]) == 0
    assert "failed: out of memory" in capsys.readouterr().out


def test_nothing_to_collect_is_said_with_the_folder_and_the_studies_that_exist(study, tmp_path, capsys):
    assert main(["study=quickstrat"]) == 2
    error = capsys.readouterr().err
    assert "nothing to collect: there is no folder runs/quickstrat" in error
    assert "study=quickstart" in error
    (study / "empty").mkdir()
    assert main(["study=empty"]) == 2
    assert "there are no runs in runs/empty" in capsys.readouterr().err
    assert main(["study=x", f"runs_root={tmp_path / 'nowhere'}"]) == 2
    assert "holds no study yet" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stuyd=quickstart"], "try: study=quickstart"),
        (["--study", "quickstart"], "vkd.collect has no key '--study'"),
        (["study"], "study needs a value"),
        ([], "try: study=quickstart"),
        (["study=../elsewhere"], "is no name of a study"),
        (["study=/tmp"], "is no name of a study"),
        (["study=quickstart", "metric=test/top"], "metric=test/top1"),
        (["study=quickstart", "baseline=kd abdk (0.8, 0.3)"], "try: 'baseline=kd abkd (0.8, 0.3)'"),
        (["study=quickstart", "baseline=kd rkld"], "no row is called 'kd rkld'"),
        (["study=quickstart", "rows=divergence.temprature"], "try: rows=divergence.temperature"),
        (["study=quickstart", "columns=recipe.epoch"], "try: columns=recipe.epochs"),
        (["study=quickstart", "watch=perhaps"], "watch=perhaps is not what this key takes\n  expected: true or false"),
        (["study=quickstart", "watch=true", "every=soon"], "expected: seconds, above 0"),
        (["study=quickstart", "watch=true", "every=0"], "every=0.0 is no time to wait"),
        (["study=quickstrat", "watch=true"], "there is no folder runs/quickstrat"),
    ],
)
def test_wrong_words_are_answered_with_the_right_ones(study, words, message, tmp_path, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_study_may_be_called_like_a_number(tmp_path, capsys):
    write_run(tmp_path / "runs", result(study="2026_01"))
    assert main(["study=2026_01", f"runs_root={tmp_path / 'runs'}", f"results_root={tmp_path}"]) == 0
    assert (tmp_path / "2026_01" / "table.md").exists()


def test_results_that_cannot_be_written_are_a_message(study, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["study=quickstart", "results_root=file"]) == 2
    assert "cannot write to file/quickstart" in capsys.readouterr().err


def test_help_is_a_page_and_no_error(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for key in (
        "study=",
        "metric=",
        "baseline=",
        "runs_root=",
        "results_root=",
        "published=",
        "published_rows=",
        "rows=",
        "columns=",
        "watch=",
        "every=",
    ):
        assert key in out
    for reason in ("dataset.val_fraction is", "dataset.train_fraction is", "epochs are not known"):
        assert reason in out


def test_on_a_terminal_the_table_is_shown_as_one_and_fits(study, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for width in ("100", "200"):
        terminal = Terminal()
        monkeypatch.setenv("COLUMNS", width)
        monkeypatch.setattr(sys, "stdout", terminal)
        assert main(["study=quickstart"]) == 0
        shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
        assert "plain student" in shown
        assert "hole: kd abkd (0.8, 0.3)" in shown
        assert max(map(len, shown.splitlines())) <= int(width)


def test_the_command_runs_as_a_module_without_importing_torch_timm_or_hydra(study):
    code = (
        "import sys, vkd.collect; status = vkd.collect.main(['study=quickstart']);"
        "heavy = {'torch', 'timm', 'hydra', 'wandb'} & set(sys.modules); assert not heavy, heavy; sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(vkd.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)
    words = [sys.executable, "-m", "vkd.collect", "study=nothing"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.fixture
def published_study(tmp_path, monkeypatch):
    """A study of a pair that the literature has figures of, in the working directory."""
    monkeypatch.chdir(tmp_path)
    pair = {"dataset": "cifar100", "teacher": "cifar_resnet56", "student": "cifar_resnet20"}
    for seed, top1 in enumerate((70.0, 71.0), 1):
        content = result(seed=seed, top1=top1, recipe={"epochs": 240}, study="pair", **pair)
        content["recipe"]["learning_rate"] = 0.05
        content["dataset"] |= {"val_fraction": 0.0, "train": 50_000, "test": 10_000, "classes": 100}
        content["teacher"] |= {"source": "checkpoint", "accuracy": {"val": None, "test": 72.34}}
        write_run(tmp_path / "runs", content)
    return tmp_path


def test_published_figures_stand_beside_ours_without_being_asked_for(published_study, capsys):
    assert main(["study=pair"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| kd "))
    assert [text.strip() for text in row.split("|")[-3:-1]] == ["70.66", "-0.16"]
    assert "    python -m vkd.collect study=pair\n" in out
    (line,) = csv.DictReader(io.StringIO((published_study / "results" / "pair" / "table.csv").read_text()))
    assert (line["published_top1"], line["published_source"]) == ("70.66", "RepDistiller README")
    assert main(["study=pair", "published_rows=true"]) == 0
    assert "| DKD+LSD (published) " in capsys.readouterr().out


def test_own_published_figures_can_be_added_and_all_can_be_left_out(published_study, capsys):
    (published_study / "mine.csv").write_text(
        "dataset,teacher,student,label,method,divergence,top1,source,epochs\n"
        "cifar100,cifar_resnet56,cifar_resnet20,KD,kd,fkld,71.25,a colleague,240\n"
    )
    assert main(["study=pair", "published=results/published,mine.csv"]) == 0
    out = capsys.readouterr().out
    assert "70.66 / 71.25" in out
    assert "-0.16 / -0.75" in out
    assert "    python -m vkd.collect study=pair published=results/published,mine.csv\n" in out
    assert main(["study=pair", "published=mine.csv"]) == 0
    assert "70.66" not in capsys.readouterr().out
    assert main(["study=pair", "published=none"]) == 0
    assert "| published" not in capsys.readouterr().out
    assert "published_top1" not in (published_study / "results" / "pair" / "table.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["published=nowhere.csv"], "there is no nowhere.csv"),
        (["published=wrong.csv"], "wrong.csv, line 2: top1 = 'seventy'"),
        (["published=misspelt.csv"], "try: divergence.temperature=..."),
        (["published_rows=maybe"], "published_rows=maybe is not what this key takes\n  expected: true or false"),
        (["publishd=none"], "try: published=none"),
    ],
)
def test_wrong_words_for_published_figures_are_a_message_and_leave_nothing(published_study, words, message, capsys):
    (published_study / "wrong.csv").write_text("dataset,student,label,method,top1,source\nd,s,x,none,seventy,x\n")
    (published_study / "misspelt.csv").write_text(
        "dataset,teacher,student,label,method,divergence,settings,top1,source\n"
        "d,t,s,KD,kd,fkld,divergence.temprature=4,70,x\n"
    )
    assert main(["study=pair", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (published_study / "results").exists()


def test_a_study_cannot_write_its_tables_among_the_published_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs", result(study="published"))
    assert main(["study=published"]) == 2
    assert "would lie among the published figures" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    assert main(["study=published", "results_root=elsewhere"]) == 0


def test_the_committed_quickstart_has_no_published_counterpart_and_no_column_of_one():
    folder = Path(vkd.__file__).parents[1] / "results" / "quickstart"
    assert "published" not in (folder / "table.md").read_text() + (folder / "table.csv").read_text()


def test_being_asked_to_stop_is_an_exit_code_and_no_traceback(study, monkeypatch, capsys):
    def interrupted(*_args, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(vkd.collecting, "build_table", interrupted)
    assert vkd.collect.main(["study=quickstart", f"runs_root={study}"]) == 130
    assert "Traceback" not in capsys.readouterr().err
