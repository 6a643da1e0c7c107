"""A workspace of W&B: which panels it has, and what each of them shows.

Everything here happens on this machine; whoever saves the workspace contacts W&B. The panels read what `vkd.tracking`
and `vkd.study_tracking` log, by the names that it has there. Needs the package wandb-workspaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vkd.config import TEACHERS_STUDY
from vkd.errors import ConfigError
from vkd.records.results import ANALYSES, FIGURES

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

GRADIENT = (("#440154", 0), ("#3b528b", 25), ("#21918c", 50), ("#5ec962", 75), ("#fde725", 100))
"""Colours and where they stand, in percent, from the lowest value to the highest; of matplotlib's viridis."""

MEASURES = {
    "entropy": "entropy of the student (nats)",
    "agreement": "agreement with the teacher (%)",
    "teacher_kl": "KL to the teacher, T = 1 (nats)",
    "ece": "calibration error, ECE of 15 bins",
    "nll": "negative log-likelihood (nats)",
}
"""What is measured of each split beside top-1, with its unit."""


def make_workspace(entity: str, project: str, *, study: str | None = None, name: str | None = None) -> Workspace:
    """The workspace of a study.

    Args:
        entity: user or team whose project it is.
        project: W&B's.
        study: whose runs it shows, a name without quotes; None: those of all but the teachers that vkd trained.
        name: of the workspace; None: one that names the study.

    Raises ConfigError for a name that W&B does not take.
    """
    from pydantic import ValidationError
    from wandb_workspaces import workspaces

    group = workspaces.Metric("Group")
    try:
        return workspaces.Workspace(
            entity=entity,
            project=project,
            name=name or f"vkd {study or ''}".strip(),
            sections=_sections(),
            settings=workspaces.WorkspaceSettings(x_axis="epoch", max_runs=100),
            runset_settings=workspaces.RunsetSettings(
                filters=workspaces.And(group == study if study else group != TEACHERS_STUDY),
                # As in the tables, only runs that differ in their seed alone are averaged.
                groupby=[workspaces.Config("row"), workspaces.Config("settings")],
                order=[workspaces.Ordering(workspaces.Summary("val/top1"), ascending=False)],
                pinned_columns=["summary:val/top1", "summary:test/top1"],
            ),
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"W&B takes no workspace of this name: {reason}", expected="name=WORDS") from error


def _sections() -> list[Section]:
    """The sections of the workspace, the first one at its top."""
    from wandb_workspaces.reports import v2 as panels
    from wandb_workspaces.workspaces import Section

    gradient = [panels.GradientPoint(color=color, offset=offset) for color, offset in GRADIENT]
    alpha, beta, top1 = "divergence/alpha", "divergence/beta", "val/top1"

    def curves(title: str, *names: str) -> panels.LinePlot:
        return panels.LinePlot(
            title=title, x="epoch", y=list(names), title_x="epoch", groupby_aggfunc="mean", groupby_rangefunc="stddev"
        )

    def scatter(title: str, x: str, y: str, z: str | None = None) -> panels.ScatterPlot:
        return panels.ScatterPlot(title=title, x=x, y=y, z=z, gradient=gradient if z else None)

    columns = {alpha: "alpha", beta: "beta", "divergence/temperature": "temperature"}
    columns |= {top1: "val top-1 (%)", "test/top1": "test top-1 (%)"}
    plane = [
        panels.ParallelCoordinatesPlot(
            title="alpha, beta, temperature and top-1",
            columns=[panels.ParallelCoordinatesPlotColumn(name, title) for name, title in columns.items()],
            gradient=gradient,
        ),
        scatter("val top-1 (%) over alpha and beta", alpha, beta, top1),
        scatter("val top-1 (%) over alpha", alpha, top1),
        scatter("val top-1 (%) over beta", beta, top1),
    ]
    accuracy = [curves("val top-1 (%)", top1), curves("test top-1 (%)", "test/top1"), curves("loss", "train/loss")]
    measures = [curves(title, f"val/{name}", f"test/{name}") for name, title in MEASURES.items()]
    runs = [panels.RunComparer(diff_only="split"), panels.ParameterImportancePlot(with_respect_to=top1)]
    # Those that were not logged leave no gap.
    figures = [f"figures/{name}" for name in (*FIGURES, *ANALYSES)]
    collected = [
        panels.MediaBrowser(title="figures", media_keys=figures, num_columns=2),
        panels.WeavePanelSummaryTable(table_name="table"),
        panels.MediaBrowser(title="report", media_keys=["report"], num_columns=1),
    ]
    return [
        Section(name="Accuracy", panels=accuracy, is_open=True),
        Section(name="alpha and beta", panels=plane, is_open=True),
        Section(name="What the students are like", panels=measures, is_open=True),
        Section(name="Runs side by side", panels=runs),
        Section(name="Results of the collector", panels=collected, is_open=True),
    ]


def describe_workspace(workspace: Workspace) -> dict[str, Any]:
    """What is sent to W&B to save a workspace, as plain data."""
    view = workspace._to_model()
    about = {"entity": view.entity, "project": view.project, "displayName": view.display_name, "type": "project-view"}
    return {**about, "spec": view.spec.model_dump(mode="json", by_alias=True, exclude_none=True)}
