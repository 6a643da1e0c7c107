"""All figures of a table, by the names of their files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vkd.records.grouping import Table
from vkd.records.histories import read_history
from vkd.records.reading import Damaged, clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures_of(table: Table, runs_root: Path) -> dict[str, Figure]:
    """The figures that have something to show, by name without suffix, in this order.

    accuracy: every row, every seed; alpha_beta: the map of each grid; alpha_beta_line: its section along alpha + beta =
    1; curves: epoch by epoch; reliability: calibration; cost: accuracy against size and speed.

    Args:
        table: of the study.
        runs_root: the folder that the paths of its runs are relative to; the histories of a few runs are read there.
    """
    from vkd.records.cost_plots import draw_cost
    from vkd.records.curve_plots import draw_curves, runs_of_curves
    from vkd.records.map_plots import draw_line, draw_map
    from vkd.records.plots import draw
    from vkd.records.reliability_plots import draw_reliability

    histories, unread = {}, []
    for run in runs_of_curves(table):
        try:
            histories[run.path] = read_history(Path(runs_root, run.path))
        except Damaged as error:
            unread.append(f"{run.path}: {clean(str(error))}")
    found = {
        "accuracy": draw(table),
        "alpha_beta": draw_map(table),
        "alpha_beta_line": draw_line(table),
        "curves": draw_curves(table, histories, unread),
        "reliability": draw_reliability(table),
        "cost": draw_cost(table),
    }
    return {name: figure for name, figure in found.items() if figure is not None}
