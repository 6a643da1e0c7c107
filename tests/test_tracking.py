"""What W&B is told of runs and of a study's results, as its own offline files say."""

import base64
import csv
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import wandb
import yaml
from commands import read, runs_in, train
from offline_runs import offline_artifacts, offline_run, offline_summary, records
from PIL import Image
from wandb import wandb_agent

import vkd
from vkd.composition import compose_config, compose_jobs, read_command_line
from vkd.config import parse, request_key
from vkd.errors import ConfigError
from vkd.records.grouping import build_table
from vkd.records.reading import read_runs
from vkd.records.tables import to_csv, to_markdown
from vkd.study_tracking import log_study, read_table_csv
from vkd.tracking import TRACKERS, config_in_wandb, describe, may_contact_wandb
from vkd.training.trainer import Trainer


@pytest.fixture(scope="module", autouse=True)
def nobody(tmp_path_factory):
    """A machine without a key, whose home is empty and whose W&B server is nowhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("home")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_DATA_DIR", str(home / "data"))
        patch.setenv("WANDB_BASE_URL", "http://wandb.invalid")
        yield home


@pytest.fixture(scope="module")
def tracked(trained, nobody, tmp_path_factory):
    """The finished runs of a study by what they are taught with, and one that failed after its only epoch."""
    root = tmp_path_factory.mktemp("tracked") / "runs"
    (root / "teachers").parent.mkdir()
    (root / "teachers").symlink_to(trained / "teachers")
    words = [f"runs_root={root}", "study=map", "tracker=offline", "tracker.log_student=true"]
    fit = Trainer.fit

    def fit_and_fail(self):
        fit(self)
        raise ZeroDivisionError("late")

    assert train("-m", *words, "divergence=fkld,rkld") == 0
    assert train(*words, "divergence=abkd") == 0
    assert train(*words, "method=none", "tracker.log_student=false") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", fit_and_fail)
        assert train(*words, "seed=9", "divergence=rkld") == 1
    runs = {run.name.rpartition("-s")[0]: run for run in runs_in(root / "map") if "-s1-" in run.name}
    (runs["failed"],) = (run for run in runs_in(root / "map") if "-s9-" in run.name)
    return runs


def compose(*words):
    return parse(compose_config(list(words)))


def point(summary):
    return summary.get("divergence/alpha"), summary.get("divergence/beta")


# Runs


def test_forward_and_reverse_kl_and_the_alpha_beta_divergence_are_points_of_one_plane(tracked):
    summaries = {name: offline_summary(run) for name, run in tracked.items()}
    assert point(summaries["kd-fkld"]) == (1.0, 0.0)
    assert point(summaries["kd-rkld"]) == (0.0, 1.0)
    assert point(summaries["kd-abkd"]) == (0.8, 0.3)
    assert point(summaries["failed"]) == (0.0, 1.0)
    assert {summaries[name]["divergence/temperature"] for name in ("kd-fkld", "kd-rkld", "kd-abkd")} == {4.0}
    assert not [name for name in summaries["none"] if name.startswith(("divergence/", "teacher/"))]
    # What has no place on the plane is given none.
    for words in (["divergence=js"], ["method=at"]):
        assert point(describe(compose(*words), "study")) == (None, None)


def test_the_summary_of_a_finished_run_is_its_last_epoch_and_what_its_result_knows(tracked):
    for name in ("kd-fkld", "kd-rkld", "kd-abkd", "none"):
        result, summary = read(tracked[name] / "result.json"), offline_summary(tracked[name])
        for metric, value in result["metrics"].items():
            assert summary.get(metric) == (None if value is None else pytest.approx(value)), metric
        assert {"val/top1", "test/top1", "val/top1_at_best_val", "test/top1_max_over_epochs"} <= set(summary)
        assert summary["student/parameters"] == result["student"]["parameters"] == 1054
        assert summary["timing/seconds"] == pytest.approx(result["timing"]["seconds"])
        assert (summary["fingerprint"], summary["group"]) == (result["fingerprint"], result["group"])
        assert (summary["study"], summary["seed"], summary["method"]) == ("map", 1, name.split("-")[0])
        assert (summary["dataset"], summary["student/arch"]) == ("digits", "cifar_resnet8_width4")
        if name != "none":
            assert summary["teacher/val_top1"] == pytest.approx(result["teacher"]["accuracy"]["val"])
            assert summary["teacher/test_top1"] == pytest.approx(result["teacher"]["accuracy"]["test"])
            assert summary["teacher/arch"] == "cifar_resnet8_width4"


def test_a_run_that_fails_keeps_what_it_is_and_its_epochs_and_has_no_student(tracked):
    _, config, history, exit_code = offline_run(tracked["failed"])
    summary = offline_summary(tracked["failed"])
    assert exit_code == 1
    assert config["divergence"]["name"] == "rkld"
    assert (summary["study"], summary["seed"], summary["method"]) == ("map", 9, "kd")
    assert summary["val/top1"] == pytest.approx(history[-1]["val/top1"])
    assert not {"student/parameters", "fingerprint", "test/top1_max_over_epochs"} & set(summary)
    assert offline_artifacts(tracked["failed"]) == {}


def test_the_config_is_the_runs_own_with_the_names_that_runs_are_grouped_by(tracked):
    rows = {"kd-fkld": "kd fkld", "kd-rkld": "kd rkld", "kd-abkd": "kd abkd (0.8, 0.3)", "none": "plain student"}
    for name, row in rows.items():
        run, config, history, exit_code = offline_run(tracked[name])
        del config["_wandb"]
        settings = config.pop("settings")
        assert config.pop("row") == row
        assert config == yaml.safe_load((tracked[name] / "config.yaml").read_text())
        assert (run.run_group, run.display_name, exit_code, len(history)) == ("map", tracked[name].name, 0, 1)
        assert len(settings) == 8


def test_runs_have_the_same_settings_where_they_differ_in_seed_and_place_alone():
    def settings(*words, study="one"):
        return config_in_wandb(compose(*words), study)["settings"]

    usual = settings("seed=1")
    assert (
        usual == settings("seed=2") == settings("study=other", study="other") == settings("tracker=none", "workers=0")
    )
    others = [["divergence=rkld"], ["divergence.temperature=2"], ["recipe.epochs=3"], ["method=none"], ["method=dkd"]]
    assert len({usual, *(settings(*words) for words in others)}) == 1 + len(others)
    assert config_in_wandb(compose(), "digits")["study"] == "digits"
    assert config_in_wandb(compose("method=[at,kd]"), "digits")["row"] == "kd+at fkld"


def test_every_metric_is_drawn_over_the_epoch_and_summarised_by_its_last_value(tmp_path):
    tracker = TRACKERS["offline"](compose(), tmp_path, name="run", study="study")
    accuracies = [10.0, 50.0, 30.0]
    for epoch, accuracy in enumerate(accuracies, 1):
        tracker.log({"epoch": epoch, "val/top1": accuracy, "train/loss": 60 - accuracy, "test/nll": None})
    tracker.finish({"val/top1_at_best_val": 50.0, "test/nll": None})
    summary, history = offline_summary(tmp_path), offline_run(tmp_path)[2]
    assert (summary["val/top1"], summary["train/loss"], summary["val/top1_at_best_val"]) == (30.0, 30.0, 50.0)
    assert [(line["epoch"], line["_step"], line["val/top1"]) for line in history] == [
        (epoch, epoch, accuracy) for epoch, accuracy in enumerate(accuracies, 1)
    ]
    assert not any("test/nll" in line for line in [summary, *history])
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    defined = [record.metric for record in records(path) if record.HasField("metric")]
    assert [(one.name or one.glob_name, one.step_metric) for one in defined] == [("epoch", ""), ("*", "epoch")]
    assert not any(one.HasField("summary") for one in defined)


# The student as an artifact


def test_the_student_is_logged_where_it_is_asked_for_from_its_own_file_without_a_copy(tracked, nobody):
    run = tracked["kd-abkd"]
    result = read(run / "result.json")
    ((name, artifact),) = offline_artifacts(run).items()
    assert (name, artifact.type) == (run.name, "model")
    (entry,) = artifact.manifest.contents
    content = (run / "student.safetensors").read_bytes()
    assert entry.path == "student.safetensors"
    assert base64.b64decode(entry.digest) == hashlib.md5(content).digest()
    assert Path(entry.local_path) == (run / "student.safetensors").resolve()
    card = json.loads(artifact.metadata)
    assert (card["arch"], card["classes"], card["dataset"]) == ("cifar_resnet8_width4", 10, "digits")
    assert card["fingerprint"] == result["fingerprint"]
    assert card["divergence"] == result["divergence"]
    assert card["test/top1"] == pytest.approx(result["metrics"]["test/top1"])
    assert offline_artifacts(tracked["none"]) == {}
    assert not [path for path in (nobody / "data").rglob("*") if path.is_file()]


def test_a_student_that_cannot_be_logged_is_a_warning_and_the_run_is_done(tracked, tmp_path, monkeypatch, caplog):
    for name in ("result.json", "status.json", "config.yaml"):
        (tmp_path / name).write_bytes((tracked["kd-fkld"] / name).read_bytes())
    tracker = TRACKERS["offline"](compose("tracker.log_student=true"), tmp_path, name="run", study="study")
    tracker.log({"epoch": 1, "val/top1": 3.0})
    with caplog.at_level(logging.WARNING, logger="vkd"):
        tracker.finish({"val/top1": 3.0})
    (said,) = (record.getMessage() for record in caplog.records if record.name == "vkd")
    assert said.startswith("W&B did not take the student (")
    assert said.endswith(str(tmp_path / "student.safetensors"))
    assert offline_run(tmp_path)[3] == 0
    assert offline_summary(tmp_path)["teacher/test_top1"] > 0


def test_logging_the_student_is_no_part_of_what_a_run_is():
    usual, logged = compose(), compose("tracker.log_student=true")
    assert (usual.tracker.log_student, logged.tracker.log_student) == (False, True)
    assert request_key(usual) == request_key(logged)
    with pytest.raises(ConfigError, match=r"tracker\.log_student = maybe is not what[\s\S]*true or false"):
        compose("tracker.log_student=maybe")


# A sweep of W&B


AGENT = """
import logging, sys
from pathlib import Path
from vkd.config import Config, DatasetConfig, StudentConfig, TrackerConfig
from vkd.tracking import TRACKERS

logging.basicConfig(level="INFO", format="%(message)s")
config = Config(seed=3, dataset=DatasetConfig(name="digits"), student=StudentConfig(arch="net"),
                tracker=TrackerConfig(project="ours", entity="us"))
for name, study in [("teacher", "teachers"), ("first", "sweep-abc"), ("second", "sweep-abc")]:
    folder = Path(name)
    folder.mkdir()
    tracker = TRACKERS[sys.argv[1]](config, folder, name=name, study=study)
    tracker.log({"epoch": 1, "val/top1": 50.0})
    tracker.finish({"val/top1": 50.0})
"""


@pytest.mark.parametrize("tracker", ["wandb", "offline"])
def test_the_first_student_of_a_w_and_b_agents_command_is_the_run_that_the_agent_has_opened(tmp_path, tracker):
    (tmp_path / "parameters.yaml").write_text("wandb_version: 1\ndivergence.alpha:\n  value: 0.4\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(vkd.__file__).parents[1]),
        "WANDB_SWEEP_ID": "abc",
        "WANDB_RUN_ID": "opened1",
        "WANDB_PROJECT": "theirs",
        "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "parameters.yaml"),
    }
    command = [sys.executable, "-c", AGENT, tracker]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    run, config, history, exit_code = offline_run(tmp_path / "first")
    assert (run.run_id, run.sweep_id, run.project, run.entity) == ("opened1", "abc", "theirs", "")
    assert (run.run_group, run.display_name, exit_code) == ("sweep-abc", "first", 0)
    assert (config["seed"], config["divergence.alpha"]) == (3, 0.4)
    assert history[0]["val/top1"] == 50.0
    assert offline_summary(tmp_path / "first")["val/top1"] == 50.0
    assert not (tmp_path / "teacher" / "wandb").exists()
    assert not (tmp_path / "second" / "wandb").exists()
    assert "teacher is not in W&B" in done.stderr
    assert "second is not in W&B" in done.stderr
    assert "W&B failed" not in done.stderr
    # Only what is followed can be sent.
    assert re.findall(r"wandb sync (\S+)/wandb", done.stderr) == (["first"] if tracker == "wandb" else [])


def test_under_an_agent_project_entity_and_id_are_left_to_it(tmp_path, monkeypatch):
    asked = {}

    def note(**settings):
        asked.update(settings)
        raise RuntimeError("not in tests")

    monkeypatch.setattr(wandb, "init", note)
    words = ["tracker.project=ours", "tracker.entity=us"]
    TRACKERS["offline"](compose(*words), tmp_path, name="run", study="study")
    assert (asked.pop("project"), asked.pop("entity"), len(asked.pop("id"))) == ("ours", "us", 16)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "opened2")
    TRACKERS["offline"](compose(*words), tmp_path, name="run", study="study")
    assert not {"project", "entity", "id"} & asked.keys()
    assert (asked["group"], asked["mode"]) == ("study", "offline")


SWEEP = Path(__file__).parents[1] / "experiments" / "wandb_sweep.yaml"


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """What W&B's agent starts for a point of the sweep in `experiments/`: a function of the point's values."""
    sweep = yaml.safe_load(SWEEP.read_text())
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "x1y2z3")
    monkeypatch.setenv("WANDB_RUN_ID", "")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    monkeypatch.setattr(
        wandb_agent, "AgentProcess", lambda *, command, env, **_: started.append((command, env)) or Mock()
    )
    agent = Mock(_sweep_command=sweep["command"], _function=None, _in_jupyter=False, _run_processes={})

    def start(values):
        arguments = {name: {"value": value} for name, value in values.items()}
        message = {"run_id": "opened1", "program": sweep["program"], "args": arguments}
        wandb_agent.Agent._command_run(agent, message)
        return started.pop()

    return start


def test_every_corner_of_the_sweep_in_experiments_is_a_command_that_vkd_understands(agent):
    sweep = yaml.safe_load(SWEEP.read_text())
    assert sweep["metric"] == {"name": "val/top1", "goal": "maximize"}  # what selects is never test
    alphas, betas, seeds = (entry["values"] for entry in sweep["parameters"].values())
    assert list(sweep["parameters"]) == ["divergence.alpha", "divergence.beta", "seed"]
    for corner in itertools.product(alphas[:: len(alphas) - 1], betas[:: len(betas) - 1], seeds[-1:]):
        command, environment = agent(dict(zip(sweep["parameters"], corner, strict=True)))
        assert command[1:4] == ["python", "-m", "vkd.train"]
        ((_, config),) = compose_jobs(*read_command_line(command[4:]))
        assert (config.divergence["alpha"], config.divergence["beta"], config.seed) == corner
        assert config.divergence["name"] == "abkd"
        assert (config.tracker.name, config.study) == ("wandb", "sweep-x1y2z3")
        assert (environment["WANDB_SWEEP_ID"], environment["WANDB_RUN_ID"]) == ("x1y2z3", "opened1")
        assert Path(environment["WANDB_SWEEP_PARAM_PATH"]).is_file()


def test_the_sweep_of_chosen_points_in_the_comments_is_one_of_wandb_too(agent):
    (comment,) = re.findall(r"#   method: bayes\n(?:#   .*\n)+", SWEEP.read_text())
    sweep = yaml.safe_load(re.sub(r"(?m)^#   ", "", comment))
    assert sweep.keys() == {"method", "run_cap", "parameters"}
    command, _ = agent({"divergence.alpha": 0.4312987, "divergence.beta": 1e-05, "seed": 1})
    assert set(sweep["parameters"]) == {"divergence.alpha", "divergence.beta", "seed"}
    ((_, config),) = compose_jobs(*read_command_line(command[4:]))
    assert (config.divergence["alpha"], config.divergence["beta"]) == (0.4312987, 1e-05)


# The results of a study


@pytest.fixture(scope="module")
def collected(tracked, tmp_path_factory):
    """The study's table, and a folder with results of it as the collector names them."""
    runs = read_runs(tracked["none"].parents[1], relative_to=tracked["none"].parents[2])
    table = build_table(runs, study="map", metric="test/top1", command="python -m vkd.collect study=map")
    folder = tmp_path_factory.mktemp("results") / "map"
    folder.mkdir()
    (folder / "table.csv").write_text(to_csv(table))
    (folder / "table.md").write_text(to_markdown(table))
    (folder / "report.html").write_text("<html><body>nothing of W&amp;B's, ± Ünïcode</body></html>", encoding="utf-8")
    for place, name in enumerate(("accuracy", "alpha_beta")):
        noise = np.random.default_rng(place).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return table, folder


def log(collected, directory, tracker="offline"):
    log_study(*collected, tracker=tracker, project="vkd", entity=None, directory=directory)


def test_the_results_of_a_study_are_one_run_of_its_group_with_table_figures_report_and_files(collected, tmp_path):
    table, folder = collected
    own = folder / "draft.txt"  # which is nobody's business
    own.write_text("mine")
    before = dict(os.environ)
    log(collected, tmp_path)
    assert {name: os.environ.get(name) for name in before} == before
    run, config, history, exit_code = offline_run(tmp_path)
    assert (run.run_group, run.job_type, run.display_name, run.project) == ("map", "collect", "map-table", "vkd")
    assert (exit_code, config["study"], config["command"]) == (0, "map", table.command)
    assert len(history) == 1
    summary = offline_summary(tmp_path)
    media = next(tmp_path.glob("wandb/offline-run-*/files"))
    assert (media / summary["report.path"]).read_bytes() == (folder / "report.html").read_bytes()
    figures = sorted(folder.glob("*.png"))
    assert figures
    for figure in figures:
        shown = media / summary[f"figures/{figure.stem}.path"]
        assert Image.open(shown).tobytes() == Image.open(figure).tobytes()
    artifact = offline_artifacts(tmp_path)["map-results"]
    assert artifact.type == "results"
    for entry in artifact.manifest.contents:
        assert base64.b64decode(entry.digest) == hashlib.md5((folder / entry.path).read_bytes()).digest()
        # W&B sends this copy, also once the study has been collected again.
        assert Path(entry.local_path).read_bytes() == (folder / entry.path).read_bytes()
        assert tmp_path in Path(entry.local_path).parents
    assert {entry.path for entry in artifact.manifest.contents} == {path.name for path in folder.iterdir()} - {own.name}
    own.unlink()


def test_the_table_in_w_and_b_has_the_lines_of_the_csv_file_with_numbers_as_numbers(collected, tmp_path):
    log(collected, tmp_path)
    media = next(tmp_path.glob("wandb/offline-run-*/files"))
    shown = json.loads((media / offline_summary(tmp_path)["table.path"]).read_text())
    with (collected[1] / "table.csv").open(newline="") as lines:
        expected = list(csv.DictReader(lines))
    assert len(shown["data"]) == len(expected) == 4
    for row, line in zip(shown["data"], expected, strict=True):
        cells = dict(zip(shown["columns"], row, strict=True))
        assert list(cells) == list(line)
        for name in ("mean", "std", "n", "alpha", "beta", "val_top1", "teacher_test"):
            assert cells[name] == (float(line[name]) if line[name] else None), name
        for name in ("method", "divergence", "group", "seeds", "dataset"):
            assert cells[name] == (line[name] or None), name
    assert {row[shown["columns"].index("n")] for row in shown["data"]} == {1}


def test_a_column_is_all_numbers_or_all_texts_and_no_hash_becomes_a_number(tmp_path):
    lines = ["mean,variant,group,seeds,divergence,low", "1.5,2,0123456789,1,,nan", ",3,12e4,2,abkd,1"]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    columns, rows = read_table_csv(tmp_path / "table.csv")
    assert columns == lines[0].split(",")
    assert rows == [[1.5, "2", "0123456789", "1", None, "nan"], [None, "3", "12e4", "2", "abkd", "1"]]


def test_a_study_that_is_collected_again_replaces_its_run_and_another_study_has_another(collected, tmp_path):
    table, folder = collected
    log(collected, tmp_path)
    first = offline_run(tmp_path)[0].run_id
    staged = {path.name for path in tmp_path.rglob("staging/*")}
    log(collected, tmp_path)
    assert offline_run(tmp_path)[0].run_id == first  # of the only run that is there
    again = {path.name for path in tmp_path.rglob("staging/*")}
    assert len(again) == len(staged)
    assert not again & staged
    log((dataclasses.replace(table, study="other"), folder), tmp_path / "other")
    assert offline_run(tmp_path / "other")[0].run_id != first


def test_what_is_not_there_is_left_out_of_the_results(collected, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.md").write_text("| a |")
    log((collected[0], tmp_path / "results"), tmp_path / "place")
    assert [entry.path for entry in offline_artifacts(tmp_path / "place")["map-results"].manifest.contents] == [
        "table.md"
    ]
    assert not [name for name in offline_summary(tmp_path / "place") if name.startswith(("figures", "table", "report"))]


def test_results_without_a_tracker_leave_nothing_and_a_failure_is_one_warning(collected, tmp_path, monkeypatch, caplog):
    asked = []

    def broken(**settings):
        asked.append(settings)
        raise wandb.errors.CommError("the server is on fire")

    monkeypatch.setattr(wandb, "init", broken)
    log(collected, tmp_path, tracker="none")
    assert (asked, list(tmp_path.iterdir())) == ([], [])
    with caplog.at_level(logging.WARNING, logger="vkd"):
        log(collected, tmp_path)
    assert caplog.messages == [f"W&B did not take the results (the server is on fire); they are in {collected[1]}"]


def test_results_go_online_only_where_that_is_asked_for_and_a_key_is_configured(collected, tmp_path, monkeypatch):
    modes = {}

    def note(**settings):
        modes[tracker, key] = (settings["mode"], settings["resume"])
        raise RuntimeError("not in tests")

    monkeypatch.setattr(wandb, "init", note)
    for key in ("", "0" * 40):
        monkeypatch.setenv("WANDB_API_KEY", key)
        for tracker in ("offline", "wandb"):
            log(collected, tmp_path, tracker=tracker)
    assert {mode for (tracker, key), mode in modes.items() if tracker == "offline" or not key} == {("offline", None)}
    assert modes["wandb", "0" * 40] == ("online", "allow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not may_contact_wandb(tmp_path)
