"""The plots of a study's analysis: one step of each divergence, and training under each.

FKLD, RKLD and the AB point that val/top1 chose have the colours of Okabe and Ito that all plots have, and a marker and
a line of their own, so that colour-blind readers and a grey printer tell them apart. matplotlib is imported when a plot
is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vkd.records.plots import PLAIN_STYLE, STYLES
from vkd.records.reading import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_GRIDS = 4
"""Grids that are drawn; of more, the first ones."""

_LINES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)))
_NAMES = {
    name: {"color": colour, "marker": marker, "linestyle": line}
    for name, (colour, marker), line in zip(("FKLD", "RKLD", "AB"), STYLES, _LINES, strict=False)
}
_TEACHER = {"color": PLAIN_STYLE[0], "linestyle": (0, (1, 1)), "linewidth": 1.6}
_GREY = "#444444"
_PANEL = 2.75
_INCHES = 3.1
_HEAD, _FOOT = 0.8, 0.55


def draw_steps(found: dict[str, Any]) -> Figure | None:
    """`mass_step`: the log mass ratio of one step of each divergence from the same student, a line of panels a grid.

    None where no grid has a step. found: as `analysis.json` of a study has it.
    """
    grids = [grid for grid in found["grids"] if grid["step"]]
    if not grids:
        return None
    figure, lines = _canvas(grids, 3)
    for grid, axes in lines:
        step = grid["step"]
        for name, entry in step["steps"].items():
            _curve(axes[0], name, entry["by_rank"]["rank"], entry["by_rank"])
            for axis, group in zip(axes[1:], ("under", "over"), strict=True):
                _curve(axis, name, entry[group]["q"], entry[group])
        q = f"student's probability q, T = {step['temperature']:g}"
        titles = (
            "all classes",
            "under-estimated classes (q < p)",
            "over-estimated classes (q \N{GREATER-THAN OR EQUAL TO} p)",
        )
        for axis, title, words in zip(axes, titles, ("rank of the class at the teacher", q, q), strict=True):
            _dress(axis, title, words, "mean log mass ratio (nats)")
            _logarithmic(axis.xaxis)
            axis.axhline(0.0, color=_GREY, linewidth=0.8, zorder=1)
        start = f"{clean(step['from'])}, epoch {step['epoch']}, seed {step['seed']}"
        _head(
            axes[0],
            grid,
            f"one step each, of equal mean L1 norm, from: {start}; n = {step['images']:,} images of {grid['split']}",
        )
    names = dict.fromkeys(name for grid in grids for name in grid["step"]["steps"])
    _legend(figure, list(names), ["band: between the quartiles"])
    return figure


def draw_training(found: dict[str, Any]) -> Figure | None:
    """`mass_training`: where the gradient goes over training, and the students' mass in the end, four panels a grid.

    None where no grid has one of the rows. found: as `analysis.json` of a study has it.
    """
    grids = [grid for grid in found["grids"] if any(row["stands_for"] for row in grid["rows"])]
    if not grids:
        return None
    figure, lines = _canvas(grids, 4)
    names: dict[str, None] = {}
    for grid, axes in lines:
        seeds: dict[str, int] = {}
        rows = [(name, row) for name in _NAMES for row in grid["rows"] if name in row["stands_for"]]
        for name, row in rows:
            names[name] = None
            seeds[name] = len(row["seeds"])
            for axis, group in zip(axes, ("target", "under", "over"), strict=False):
                points = [(e["epoch"], e["statistics"][f"share/{group}"]) for e in row["epochs"]]
                points = [(epoch, share) for epoch, share in points if share]
                band = {
                    "mean": [100 * share["mean"] for _, share in points],
                    "low": [100 * (share["mean"] - (share["std"] or 0.0)) for _, share in points],
                    "high": [100 * (share["mean"] + (share["std"] or 0.0)) for _, share in points],
                }
                _curve(axis, name, [epoch for epoch, _ in points], band)
        _mass(axes[3], rows)
        for axis, title in zip(axes, ("target", "under-estimated", "over-estimated"), strict=False):
            _dress(
                axis,
                f"gradient to the {title}" + (" class" if title == "target" else " classes"),
                "epoch",
                "share of the L1 norm (%)",
            )
            axis.xaxis.get_major_locator().set_params(integer=True)
        _dress(axes[3], "mass after the last epoch", "rank of the class at the teacher", "mean probability, T = 1")
        _logarithmic(axes[3].xaxis)
        axes[3].set_yscale("log")
        counts = ", ".join(f"{name} n = {count} seeds" for name, count in seeds.items())
        _head(axes[0], grid, f"{counts}; {grid['images']:,} images of {grid['split']} each")
    _legend(figure, list(names), ["band: ± standard deviation over seeds"], teacher=True)
    return figure


def _mass(axis: Any, rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Draw the mean probability of the classes in the teacher's order, and the teacher's own."""
    for place, (name, row) in enumerate(rows):
        mass = row["mass_by_rank"]
        ranks = range(1, len(mass["student"]) + 1)
        if place == 0:
            axis.plot(ranks, mass["teacher"], zorder=4, **_TEACHER)
        _curve(axis, name, list(ranks), {"mean": mass["student"]})


def _canvas(grids: list[dict[str, Any]], across: int) -> tuple[Figure, list[tuple[dict[str, Any], list[Any]]]]:
    """A figure with a line of panels for each grid; the grids with their axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = grids[:MOST_GRIDS]
    line = _HEAD + _PANEL
    left, width, extra = 0.75, across * (_INCHES + 0.65) + 0.3, 0.3 if len(shown) < len(grids) else 0.0
    height = len(shown) * (line + 0.5) + _FOOT + extra
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shown), across, squeeze=False)
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.15 / width,
        top=1 - (_HEAD + extra) / height,
        bottom=(0.5 + _FOOT) / height,
        wspace=0.85 / (_INCHES - 0.2),
        hspace=(_HEAD + 0.5) / _PANEL,
    )
    if extra:
        words = f"the first {len(shown)} of {len(grids)} grids; the others are in analysis.json"
        figure.text(0.5, 1 - 0.15 / height, words, ha="center", va="center", fontsize=8, color=_GREY)
    return figure, list(zip(shown, panels, strict=True))


def _curve(axis: Any, name: str, x: list[float], band: dict[str, list[float]]) -> None:
    """Draw a mean with its band, with some markers where there are many points; say so where there are none."""
    style = _NAMES[name]
    if not x:
        if not axis.texts:
            axis.annotate("too few", (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=8, color=_GREY)
        return
    every = [round(len(x) ** (place / 8)) - 1 for place in range(9)] if len(x) > 20 else None
    axis.plot(x, band["mean"], markersize=4.5, linewidth=1.5, markevery=every and sorted(set(every)), zorder=3, **style)
    if "low" in band:
        axis.fill_between(x, band["low"], band["high"], color=style["color"], alpha=0.16, linewidth=0, zorder=2)


def _logarithmic(axis: Any) -> None:
    """Make a scale of x logarithmic, with plain numbers that are there within less than a decade too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_xscale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _dress(axis: Any, title: str, x_label: str, y_label: str) -> None:
    """Give a panel its words and its lines."""
    axis.set_title(title, fontsize=8.5)
    axis.set_xlabel(x_label, fontsize=8.5)
    axis.set_ylabel(y_label, fontsize=8.5)
    axis.tick_params(labelsize=8)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _head(axis: Any, grid: dict[str, Any], words: str) -> None:
    """Say above the first panel of a line which grid it is of."""
    chosen = [row["label"] for row in grid["rows"] if "AB" in row["stands_for"]]
    title = f"{grid['title']}, {grid['method']}" + "".join(f"; AB: {label}" for label in chosen)
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axis.annotate(clean(title, 110), (0, 1), (-40, 38), fontsize=9, fontweight="bold", **place)
    axis.annotate(words, (0, 1), (-40, 25), fontsize=8, color=_GREY, **place)


def _legend(figure: Figure, names: list[str], words: list[str], *, teacher: bool = False) -> None:
    """Say what the lines are, below the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[tuple[Any, str]] = [(Line2D([], [], markersize=4.5, **_NAMES[name]), name) for name in names]
    if teacher:
        handles.append((Line2D([], [], **_TEACHER), "teacher"))
    handles += [(Patch(color=_GREY, alpha=0.16, linewidth=0), text) for text in words]
    figure.legend(
        [handle for handle, _ in handles],
        [label for _, label in handles],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.05 / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
        handlelength=3.2,
    )
