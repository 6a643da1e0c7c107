"""What `python -m vkd.dashboard` would send to W&B, to the call that sends it, and what it refuses."""

import importlib.util
import json
import os
import socket

import pytest
import wandb
from commands import read

import vkd.dashboard
from vkd.composition import compose_config
from vkd.config import parse
from vkd.tracking import config_in_wandb, describe


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """A machine without a key, in an empty folder, from which nobody is reached."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)

    def refuse(*_arguments, **_options):
        raise AssertionError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def dashboard(*words):
    return vkd.dashboard.main(list(words))


@pytest.fixture
def workspace(tmp_path):
    """The workspace of a study as it would be sent."""
    assert dashboard("entity=me", "project=mine", "study=alpha_beta", f"output={tmp_path / 'sent.json'}") == 0
    return read(tmp_path / "sent.json")


def panels(workspace, kind):
    """The configs of the panels of a kind, in their order."""
    sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"] if panel["viewType"] == kind]


# What is sent


def test_the_workspace_shows_the_runs_of_the_study_grouped_as_its_tables_are(workspace):
    assert (workspace["entity"], workspace["project"]) == ("me", "mine")
    assert (workspace["displayName"], workspace["type"]) == ("vkd alpha_beta", "project-view")
    (runs,) = workspace["spec"]["section"]["runSets"]
    (chosen,) = runs["filters"]["filters"]
    assert (chosen["key"], chosen["op"], chosen["value"]) == ({"section": "run", "name": "group"}, "=", "alpha_beta")
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [
        ("config", "row.value"),
        ("config", "settings.value"),
    ]
    logged = config_in_wandb(parse(compose_config([])), "alpha_beta")
    assert {"row", "settings"} <= logged.keys()
    assert workspace["spec"]["section"]["settings"]["useRunsTableGroupingInPanels"] is True


def test_without_a_study_all_runs_are_shown_but_the_teachers_that_vkd_trained(tmp_path):
    assert dashboard("entity=me", "name=ours", "output=sent.json") == 0
    sent = read(tmp_path / "sent.json")
    (chosen,) = sent["spec"]["section"]["runSets"][0]["filters"]["filters"]
    assert (chosen["key"]["name"], chosen["op"], chosen["value"]) == ("group", "!=", "teachers")
    assert (sent["displayName"], sent["project"]) == ("ours", "vkd")


def test_curves_are_means_over_seeds_with_their_deviation_over_epochs(workspace):
    curves = panels(workspace, "Run History Line Plot")
    shown = [metric for curve in curves for metric in curve["metrics"]]
    assert shown[:2] == ["val/top1", "test/top1"]
    for name in ("entropy", "agreement", "ece", "teacher_kl", "nll"):
        assert {f"val/{name}", f"test/{name}"} <= set(shown)
    assert {(curve["xAxis"], curve["groupAgg"], curve["groupArea"]) for curve in curves} == {
        ("epoch", "mean", "stddev")
    }


def test_every_panel_reads_a_name_that_a_run_of_abkd_logs(workspace, trained):
    result = read(next((trained / "digits").glob("*/*/result.json")))
    logged = {*result["metrics"], *describe(parse(compose_config(["divergence=abkd"])), "study")}
    curves = {name for curve in panels(workspace, "Run History Line Plot") for name in curve["metrics"]}
    (plot,) = panels(workspace, "Parallel Coordinates Plot")
    columns = [column["accessor"] for column in plot["columns"]]
    scatters = [
        tuple(plot.get(axis) for axis in ("xAxis", "yAxis", "zAxis")) for plot in panels(workspace, "Scatter Plot")
    ]
    summaries = {*columns, *(name for plot in scatters for name in plot if name)}
    assert all(name.startswith("summary:") for name in summaries)
    assert curves | {name.removeprefix("summary:") for name in summaries} <= logged
    assert columns == [
        *("summary:divergence/alpha", "summary:divergence/beta", "summary:divergence/temperature"),
        *("summary:val/top1", "summary:test/top1"),
    ]
    alpha, beta, top1 = "summary:divergence/alpha", "summary:divergence/beta", "summary:val/top1"
    assert scatters == [(alpha, beta, top1), (alpha, top1, None), (beta, top1, None)]


def test_the_gradient_goes_from_the_lowest_to_the_highest_value_and_gets_lighter(workspace):
    gradients = [plot["customGradient"] for plot in panels(workspace, "Parallel Coordinates Plot")]
    gradients += [plot["customGradient"] for plot in panels(workspace, "Scatter Plot") if "zAxis" in plot]
    assert len(gradients) == 2
    for gradient in gradients:
        assert [point["offset"] for point in gradient] == [0, 25, 50, 75, 100]
        colours = [bytes.fromhex(point["color"][1:]) for point in gradient]
        brightness = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in colours]
        assert brightness == sorted(brightness)


def test_the_results_of_the_collector_and_the_comparison_of_runs_are_there(workspace):
    figures, report = panels(workspace, "Media Browser")
    assert {"figures/accuracy", "figures/alpha_beta", "figures/reliability"} <= set(figures["mediaKeys"])
    assert report["mediaKeys"] == ["report"]
    (table,) = panels(workspace, "Weave")
    assert '"table"' in json.dumps(table)
    assert panels(workspace, "Run Comparer") == [{"diffOnly": "split"}]
    (importance,) = panels(workspace, "Parameter Importance")
    assert importance["targetKey"] == "val/top1"


# Sending it


class Client:
    """W&B's client, which keeps what it is asked."""

    asked: list

    def __init__(self):
        self._service_api = self
        self.app_url = "https://wandb.invalid"

    def execute_graphql(self, query, variables):
        self.asked.append((query, variables))
        return {"upsertView": {"view": {"id": "id", "name": "nw-abc-v"}}}


def test_with_a_key_the_workspace_is_saved_and_its_address_is_told(monkeypatch, workspace, capsys):
    monkeypatch.setattr(Client, "asked", [], raising=False)
    monkeypatch.setattr(wandb, "Api", Client)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    capsys.readouterr()
    assert dashboard("entity=me", "project=mine", "study=alpha_beta") == 0
    ((query, variables),) = Client.asked
    assert "upsertView" in query
    assert (variables["entityName"], variables["projectName"]) == ("me", "mine")
    assert (variables["displayName"], variables["type"]) == ("vkd alpha_beta", "project-view")

    def anonymous(value):
        """Without the identifiers that are drawn for each panel."""
        if isinstance(value, dict):
            return {key: anonymous(entry) for key, entry in value.items() if key != "__id__"}
        return [anonymous(entry) for entry in value] if isinstance(value, list) else value

    assert anonymous(json.loads(variables["spec"])) == anonymous(workspace["spec"])
    assert capsys.readouterr().out == "https://wandb.invalid/me/mine?nw=abc\n"


def test_what_w_and_b_refuses_is_one_message(monkeypatch, capsys):
    def refuse():
        raise wandb.errors.CommError("permission denied")

    monkeypatch.setattr(wandb, "Api", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert dashboard("entity=me") == 2
    assert capsys.readouterr().err == "vkd: W&B did not take the workspace: permission denied\n"


# What is refused


def test_nobody_is_contacted_where_wandb_mode_forbids_it(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "Api", None)
    assert dashboard("entity=me") == 2
    assert capsys.readouterr().err.startswith("vkd: WANDB_MODE=offline lets nobody contact W&B")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ([], "whose project is it?", "entity=me"),
        (["entity=me"], "no W&B key is configured", "output=dashboard.json"),
        (["entity=me", "project="], "project = None is not what this key takes", ""),
        (["entity=me", "projct=x"], "there is no key projct", "project"),
        (["entity=me", "study=a'b", "output=x.json"], "study=a'b is no name of a study", ""),
        (["entity=me", "output=no/x.json"], "cannot write to no/x.json: No such file or directory", "output=FILE"),
        (
            ["entity=me", "name=a \N{SMILING FACE WITH OPEN MOUTH}", "output=x.json"],
            "W&B takes no workspace of this",
            "",
        ),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_written(tmp_path, capsys, words, message, hint):
    assert dashboard(*words) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"vkd: {message}")
    assert f"try: {hint}" in said.err or not hint
    assert "Traceback" not in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_of_the_extra_the_command_says_how_to_install_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb_workspaces" else find(name))
    assert dashboard("entity=me", "output=x.json") == 2
    said = capsys.readouterr().err
    assert "wandb-workspaces, which this Python has not" in said
    assert "pip install 'vkd[dashboard]'" in said


def test_help_names_every_key(capsys):
    assert dashboard("--help") == 0
    page = capsys.readouterr().out
    for name in vkd.dashboard.DashboardConfig.__annotations__:
        assert f"\n  {name}" in page
    assert all(len(line) <= 120 for line in page.splitlines())
