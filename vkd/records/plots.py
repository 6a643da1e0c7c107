"""The plot of a table: every seed, every mean, every teacher.

One panel a column. In it a line for each row: small open markers are seeds, the filled one is their mean, the bar one
sample standard deviation to each side, the dashed line the teacher. Colours are those of Okabe and Ito, which
colour-blind readers tell apart, and each method has a marker of its own, so that the plot survives a grey printer.
matplotlib is imported when a plot is drawn, so that reading and tables start without it.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from vkd.records.grouping import SELECTION, Cell, Column, Row, Table, show, teacher_split
from vkd.records.plot_styles import PLAIN_STYLE, STYLES, count, cut, new_figure, wrap
from vkd.records.tables import PERCENT, decimals, metric_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ACROSS = 3
MOST_ROWS = 60
_TITLE_SIGNS = 52


def draw(table: Table) -> Figure:
    """The figure of a table, on matplotlib's Agg canvas and without its global state.

    Of a table with more than `MOST_ROWS` rows the baselines and the best by val are drawn, and the figure says so.
    """
    across = max(1, min(MOST_ACROSS, len(table.columns)))
    down = max(1, -(-len(table.columns) // across))
    rows = _choose(table.rows)
    labels = [cut(row.label, 60) for row in rows]
    label_inches = 0.3 + 0.078 * max(map(len, labels), default=0)
    width = label_inches + 3.5 * across + 0.2
    panel_inches = 0.8 + 0.3 * max(1, len(labels))
    extra = 0.25 if len(rows) < len(table.rows) else 0.0
    titles = [_title(column) for column in table.columns]
    more = 0.14 * max((title.count("\n") - 1 for title in titles if title.count("\n") > 1), default=0)
    height = down * (panel_inches + 0.75 + more) + 0.25 + extra
    figure = new_figure(width, height)
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    figure.subplots_adjust(
        left=label_inches / width,
        right=1 - 0.7 / width,
        top=1 - (0.55 + extra + more) / height,
        bottom=(0.5 + 0.3) / height,
        wspace=0.7 / 2.8,
        hspace=(1.15 + more) / panel_inches,
    )
    for index, axis in enumerate(axes.flat):
        if index < len(table.columns):
            _panel(axis, table, rows, index, titles[index])
        else:
            axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(labels)), labels)
        axis.set_ylim(len(labels) - 0.4, -0.6)
    if extra:
        words = f"{len(rows)} of {len(table.rows)} rows: the first ones of the table and the best by {SELECTION}"
        figure.text(0.5, 1 - 0.12 / height, words, ha="center", va="center", fontsize=8, color="#444444")
    _legend(figure, height, any(table.teachers) and _is_accuracy(table.metric))
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG; the same figure gives the same bytes."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "vkd"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _choose(rows: list[Row]) -> list[Row]:
    """The rows to draw, in their order: all, or a tenth from the top and the best by mean val top-1 in any column."""
    if len(rows) <= MOST_ROWS:
        return rows
    places: dict[int, int] = dict.fromkeys(range(MOST_ROWS // 10), 0)
    for column in range(len(rows[0].cells)):
        seen = [(-row.cells[column].val.mean, index) for index, row in enumerate(rows) if row.cells[column].val]
        for place, (_, index) in enumerate(sorted(seen)):
            places[index] = min(place, places.get(index, place))
    ranked = sorted(range(len(rows)), key=lambda index: (places.get(index, len(rows)), index))
    return [rows[index] for index in sorted(ranked[:MOST_ROWS])]


def _title(column: Column) -> str:
    """The lines above a panel: the data set, the pair, and the settings that tell the column from others."""
    pair = f"{column.teacher} -> {column.student}" if column.teacher else column.student
    settings = ", ".join(f"{name}={show(value)}" for name, value in column.settings)
    return "\n".join([column.dataset, pair, *([wrap(settings, _TITLE_SIGNS)] if settings else [])])


def _panel(axis: Any, table: Table, rows: list[Row], index: int, title: str) -> None:
    """Draw the rows of one column of the table."""
    methods = list(dict.fromkeys(row.key.method for row in table.rows if row.key.method != "none"))
    cells = [row.cells[index] for row in rows]
    values = [value for cell in cells for value in cell.values.values()]
    for line, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        plain = row.key.method == "none"
        _dots(axis, line, cell, PLAIN_STYLE if plain else STYLES[methods.index(row.key.method) % len(STYLES)])
    axis.set_title(title, fontsize=8.5, pad=6 if not values else 14)
    axis.set_xlabel(metric_title(table.metric), fontsize=8.5)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", labelsize=8.5, length=0)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if not values:
        axis.set_xticks([])
        return
    spreads = [cell.summary.std or 0.0 for cell in cells if cell.summary]
    low = min(values + [cell.summary.mean - (cell.summary.std or 0.0) for cell in cells if cell.summary])
    high = max(values + [cell.summary.mean + (cell.summary.std or 0.0) for cell in cells if cell.summary])
    span = max(high - low, *spreads, 10.0 ** -decimals(table.metric) * 20)
    teacher = table.teachers[index]
    if teacher is not None and _is_accuracy(table.metric):
        low, high = _teacher(axis, teacher.summary.mean, low, high, span, teacher_split(table.metric))
    axis.set_xlim(low - 0.08 * span, high + 0.08 * span)
    axis.locator_params(axis="x", nbins=5)


def _dots(axis: Any, line: int, cell: Cell, style: tuple[str, str]) -> None:
    """Draw one row: its seeds, its mean and spread, and how many runs those are."""
    colour, marker = style
    right = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
    if cell.summary is None:
        axis.annotate(
            "no runs" if cell.group is None else "hole", (0.5, line), (0, 0), ha="center", color="#777777", **right
        )
        return
    axis.errorbar(
        cell.summary.mean,
        line,
        xerr=cell.summary.std,
        color=colour,
        marker=marker,
        markersize=6,
        elinewidth=1.4,
        capsize=2.5,
        zorder=3,
    )
    if len(cell.values) > 1:
        seeds = list(cell.values.values())
        axis.plot(
            seeds,
            [line + 0.24] * len(seeds),
            linestyle="none",
            marker=marker,
            markersize=3.5,
            markerfacecolor="none",
            markeredgecolor=colour,
            markeredgewidth=0.7,
            zorder=2,
        )
    shown = count(len(cell.values), cell.expected)
    axis.annotate(shown, (1, line), (4, 0), ha="left", color="#444444", annotation_clip=False, **right)


def _teacher(axis: Any, accuracy: float, low: float, high: float, span: float, split: str) -> tuple[float, float]:
    """Draw the teacher's line, or say beside which edge it lies where it would squeeze the rest; the new limits."""
    above = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 7.5, "color": "#444444"}
    edge = {**above, "xycoords": "axes fraction"}
    if accuracy > high + 1.2 * span:
        axis.annotate(f"teacher ({split}) {accuracy:.2f} \N{RIGHTWARDS ARROW}", (1, 1), (0, 2), ha="right", **edge)
    elif accuracy < low - 1.2 * span:
        axis.annotate(f"\N{LEFTWARDS ARROW} teacher ({split}) {accuracy:.2f}", (0, 1), (0, 2), ha="left", **edge)
    else:
        low, high = min(low, accuracy), max(high, accuracy)
        place = (accuracy - low) / (high - low) if high > low else 0.5
        side = "left" if place < 0.3 else "right" if place > 0.7 else "center"
        axis.axvline(accuracy, color="#444444", linestyle="--", linewidth=1.1, zorder=1)
        axis.annotate(f"teacher ({split}) {accuracy:.2f}", (accuracy, 1), (0, 2), ha=side, **above)
    return low, high


def _legend(figure: Figure, height: float, teacher: bool) -> None:
    """Say what the marks are, below the panels."""
    from matplotlib.lines import Line2D

    grey = "#444444"
    seed = Line2D([], [], color=grey, marker="o", linestyle="none", markersize=3.5, markerfacecolor="none")
    mean = Line2D([], [], color=grey, marker="o", markersize=6)
    handles = [(seed, "one seed"), (mean, "mean ± standard deviation")]
    if teacher:
        handles.append((Line2D([], [], color=grey, linestyle="--", linewidth=1.1), "teacher"))
    figure.legend(
        [handle for handle, _ in handles],
        [label for _, label in handles],
        loc="lower center",
        bbox_to_anchor=(0.5, 0.05 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )


def _is_accuracy(metric: str) -> bool:
    """Whether a metric is an accuracy that the teacher's can stand beside."""
    name = metric.rpartition("/")[2]
    return bool(PERCENT.fullmatch(name)) and name.startswith("top1")
