"""`python -m vkd.dashboard`: a saved workspace of W&B with the panels that a study of alpha and beta is read by."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vkd.command import parse_words, quietly, run_command
from vkd.errors import ConfigError, UserError, require
from vkd.records.atomic import write_json_atomically
from vkd.records.reading import printable
from vkd.tracking import has_wandb_key

HELP = """\
vkd.dashboard: a saved workspace of W&B with the panels that a study of alpha and beta is read by.

    python -m vkd.dashboard entity=NAME [key=value ...]

KEYS
  entity                    user or team whose project it is
  project=vkd               the project, as in tracker.project
  study=null                the study whose runs it shows; null: all but the teachers that vkd trained
  name=null                 of the workspace; null: vkd, and the study
  output=null               write what would be sent to this JSON file, and contact nobody

EXAMPLES
  python -m vkd.train +experiment=quickstart tracker=wandb
  python -m vkd.collect study=quickstart tracker=wandb
  python -m vkd.dashboard entity=me study=quickstart

Runs are grouped by their row in the tables, so that a curve is the mean over seeds with one standard deviation. Panels:
top-1 of val and test over epochs; parallel coordinates and scatter plots of alpha, beta and temperature against val
top-1, with fkld as (1, 0) and rkld as (0, 1); entropy, agreement, KL to the teacher and calibration; the runs side by
side; the collector's table, figures and report. Needs the packages of the extra: pip install 'vkd[dashboard]'."""


@dataclass
class DashboardConfig:
    """The keys of this command."""

    entity: str | None = None
    project: str = "vkd"
    study: str | None = None
    name: str | None = None
    output: str | None = None


def dashboard(words: Sequence[str]) -> str:
    """Save the workspace that the words ask for; its address, or the file. Raises UserError."""
    config = parse_words(DashboardConfig, words)
    require(bool(config.entity), "whose project is it?", "entity=NAME, of a user or a team", "entity=me")
    require(bool(config.project), "project has no value", "the name of a project", "project=vkd")
    require(
        all(sign.isalnum() or sign in "._-+/" for sign in config.study or ""),
        f"study={config.study} is no name of a study",
        "the name of a folder of runs: letters, digits, '.', '_', '-' and '+'",
    )
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError(
            "vkd.dashboard needs wandb-workspaces, which this Python has not",
            expected="the packages of the extra of that name",
            hint="pip install 'vkd[dashboard]', or pip install wandb-workspaces",
        )
    mode = os.environ.get("WANDB_MODE", "online")
    if config.output is None and mode != "online":
        raise ConfigError(
            f"WANDB_MODE={mode} lets nobody contact W&B",
            expected="WANDB_MODE=online, or none",
            hint="output=dashboard.json, for a look at what would be sent",
        )
    if config.output is None and not has_wandb_key():
        raise ConfigError(
            "no W&B key is configured",
            expected="wandb login, or WANDB_API_KEY in the environment",
            hint="output=dashboard.json, for a look at what would be sent",
        )
    # W&B reports its own crashes over the network unless told not to.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    from vkd.workspace import describe_workspace, make_workspace

    workspace = make_workspace(config.entity, config.project, study=config.study, name=config.name)
    if config.output is not None:
        try:
            write_json_atomically(config.output, describe_workspace(workspace))
        except OSError as error:
            raise UserError(f"cannot write to {config.output}: {error.strerror}", hint="output=FILE") from error
        return config.output
    try:
        return workspace.save().url
    except Exception as error:
        raise UserError(f"W&B did not take the workspace: {str(error).strip() or type(error).__name__}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 2 for wrong input or where W&B refuses, 130 when asked to stop."""
    return run_command(argv, HELP, lambda words, _: print(printable(dashboard(words))))


if __name__ == "__main__":
    sys.exit(quietly(main))
