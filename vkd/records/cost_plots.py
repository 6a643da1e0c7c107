"""What accuracy costs: the table's metric against the student's parameters, multiply-accumulates and speed.

A point is a row in one column, so that students of several sizes stand beside each other, with their teachers. Images/s
are those of evaluation (images loaded, put through the student and measured), and are shown where all of them were
measured on one device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vkd.records.grouping import PERCENT, Row, Table, teacher_split
from vkd.records.plot_styles import (
    DARK,
    GREY,
    LIGHT,
    about_rows,
    add_axes,
    add_text,
    choose_rows,
    cut,
    new_figure,
    row_styles,
    wrap,
)
from vkd.records.reading import Run, clean, number
from vkd.records.statistics import Summary, summarise
from vkd.records.tables import metric_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_COLUMNS = 12
MOST_ROWS = 8

_PANEL = (3.0, 2.7)
_GAP = 0.72
_SIDE = 0.02  # of the width of a panel between rows of one student
_LEAST_RANGE = 1.5  # between the ends of a cost axis
_LABEL_SIGNS = 44


@dataclass(frozen=True)
class Point:
    """A row in a column, or a column's teacher.

    name: of the network; row: None for a teacher.
    value: the table's metric; costs: parameters, multiply-accumulates of one image, images/s, each None where it is not
    known, and a spread where runs differ in it.
    """

    name: str
    column: int
    row: Row | None
    value: Summary
    costs: tuple[Summary | None, Summary | None, Summary | None]


def points_of(table: Table, index: int, rows: Sequence[Row]) -> list[Point]:
    """The points of a column: those of `rows` that have the metric, and the teacher where the metric is an accuracy."""
    column = table.columns[index]
    found = []
    runs: list[Run] = []
    for row in rows:
        cell = row.cells[index]
        if cell.group is None or cell.summary is None:
            continue
        own = [run for _, run in sorted(cell.group.runs.items())]
        runs += own
        costs = (
            _summary(own, lambda run: _fact(run, "student", "parameters")),
            _summary(own, lambda run: _fact(run, "student", "macs")),
            _summary(own, lambda run: _fact(run, "timing", "evaluation_images_per_second")),
        )
        found.append(Point(column.student, index, row, cell.summary, costs))
    teacher = table.teachers[index]
    if teacher is not None and _is_accuracy(table.metric):
        costs = (
            _summary(runs, lambda run: _fact(run, "teacher", "parameters")),
            _summary(runs, lambda run: _fact(run, "teacher", "macs")),
            None,
        )
        found.append(Point(column.teacher, index, None, teacher.summary, costs))
    return found


def _choose(table: Table, columns: Sequence[int]) -> list[Row]:
    """The rows that most columns would show, `MOST_ROWS` at most, in the table's order."""
    chosen = Counter(id(row) for index in columns for row in choose_rows(table, index, MOST_ROWS))
    ranked = sorted((row for row in table.rows if id(row) in chosen), key=lambda row: -chosen[id(row)])
    kept = {id(row) for row in ranked[:MOST_ROWS]}
    return [row for row in table.rows if id(row) in kept]


def draw_cost(table: Table) -> Figure | None:
    """The metric against each cost that is known; None where none is."""
    columns = range(min(len(table.columns), MOST_COLUMNS))
    few = _choose(table, columns)
    points = [point for index in columns for point in points_of(table, index, few)]
    devices = _devices(points)
    titles = ["parameters", "multiply-accumulates of one image", "images/s of evaluation"]
    panels = [
        (title, place)
        for place, title in enumerate(titles)
        if any(point.row and point.costs[place] for point in points) and not (place == 2 and len(devices) > 1)
    ]
    if not panels:
        return None
    rows = [row for row in few if any(point.row is row for point in points)]
    styles = {id(row): style for row, style in zip(rows, row_styles(rows), strict=True)}
    has_teacher = any(point.row is None for point in points)
    labels = [wrap(row.label, _LABEL_SIGNS, 2) for row in rows] + ["teacher"] * has_teacher
    legend_lines = sum(label.count("\n") + 1 for label in labels)
    longest = max(len(line) for label in labels for line in label.split("\n"))
    beside = 0.5 + 0.06 * longest
    width = max(len(panels) * (_PANEL[0] + _GAP) + 0.35 + beside, 6.5)
    caption = [wrap(text, int((width - 0.4) / 0.0585), 3) for text in _caption(table, points, devices, panels)]
    top = 0.92
    body = max(_PANEL[1] + 0.55, 0.15 * legend_lines + 0.3)
    height = top + body + 0.15 * sum(text.count("\n") + 1 for text in caption) + 0.15
    figure = new_figure(width, height)
    title = f"{clean(table.study, 60)}: {metric_title(table.metric)} against cost"
    add_text(figure, 0.2, 0.12, title, fontsize=11, color=DARK)
    for number_, (title, place) in enumerate(panels):
        left = _GAP + number_ * (_PANEL[0] + _GAP)
        axes = add_axes(figure, left, top, *_PANEL)
        _draw(axes, title, place, points, rows, styles)
        if number_ == 0:
            axes.set_ylabel(metric_title(table.metric), fontsize=8.5)
    _legend(add_axes(figure, len(panels) * (_PANEL[0] + _GAP) + 0.35, top, beside, body), rows, styles, labels)
    top += body
    for text in caption:
        add_text(figure, 0.2, top, text)
        top += 0.15 * (text.count("\n") + 1)
    return figure


def _fact(run: Run, *names: str) -> float | None:
    """A positive number at the end of a path of keys of a result; None where there is none."""
    content: Any = run.content if run.done else None
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    found = number(content)
    return found if found is not None and 0 < found < 1e18 else None


def _summary(runs: list[Run], fact: Callable[[Run], float | None]) -> Summary | None:
    """Of a fact over the runs that state it."""
    return summarise(value for run in runs if (value := fact(run)) is not None)


def _device(run: Run) -> str:
    """Where a run was measured, on several processes where there were several."""
    device = run.environment.get("device", "an unknown device")
    processes = int(number(run.parameters.get("world_size")) or 1)
    return device if processes == 1 else f"{processes} x {device}"


def _devices(points: list[Point]) -> list[str]:
    """On what the images/s of the points were measured."""
    found = {
        _device(run)
        for point in points
        if point.row is not None and point.costs[2]
        for run in point.row.cells[point.column].group.runs.values()
        if _fact(run, "timing", "evaluation_images_per_second")
    }
    return sorted(found)


def _draw(
    axes: Any, title: str, place: int, points: list[Point], rows: list[Row], styles: dict[int, tuple[str, str]]
) -> None:
    """Draw one panel."""
    drawn = [point for point in points if point.costs[place]]
    ends = [point.costs[place].mean + side * (point.costs[place].std or 0.0) for point in drawn for side in (-1, 1)]
    ends = [end for end in ends if end > 0] + [point.costs[place].mean for point in drawn]
    low, high = min(ends), max(ends)
    most = max(sum(point.row is not None and point.column == index for point in drawn) for index in range(MOST_COLUMNS))
    margin = 0.06 + (_SIDE * most / 2 if place < 2 else 0.0)
    span = max(math.log(high / low), math.log(_LEAST_RANGE)) / (1 - 2 * margin)
    middle = math.log(low * high) / 2
    low, high = math.exp(middle - span / 2), math.exp(middle + span / 2)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    side = (high / low) ** _SIDE
    for point in drawn:
        cost = point.costs[place]
        if point.row is None:
            axes.errorbar(
                cost.mean,
                point.value.mean,
                yerr=point.value.std,
                color=GREY,
                marker="*",
                markersize=10,
                markerfacecolor="#ffffff",
                elinewidth=1.0,
                capsize=2.5,
                zorder=3,
            )
            continue
        beside = [other.row for other in drawn if other.row is not None and other.column == point.column]
        turn = next(turn for turn, row in enumerate(beside) if row is point.row) - (len(beside) - 1) / 2
        colour, marker = styles[id(point.row)]
        axes.errorbar(
            cost.mean * (side**turn if place < 2 else 1.0),
            point.value.mean,
            yerr=point.value.std,
            xerr=cost.std if place == 2 else None,
            color=colour,
            marker=marker,
            markersize=5,
            elinewidth=1.0,
            capsize=2,
            zorder=3,
        )
    axes.set_xlabel(title, fontsize=8, labelpad=3)
    axes.tick_params(labelsize=7.5)
    axes.margins(y=0.1)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _ticks(axes, low, high)
    _name(axes, drawn, place, (low, high))


def _ticks(axes: Any, low: float, high: float) -> None:
    """A few round numbers on a logarithmic axis, in words."""
    from matplotlib.ticker import NullFormatter, NullLocator

    if high / low < 3:
        step = 10.0 ** math.floor(math.log10((high - low) / 2))
        step *= next(times for times in (5, 2, 1) if times * step <= (high - low) / 2)
        candidates = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    else:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        candidates = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    inside = [value for value in candidates if low <= value <= high]
    kept: list[float] = []
    for value in inside:
        if not kept or math.log(value / kept[-1]) / math.log(high / low) * _PANEL[0] >= 0.42:
            kept.append(value)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(kept, [_short(value) for value in kept])


def _short(value: float) -> str:
    """A large number in a few signs: "84k", "1.7M"."""
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{sign}"
    return f"{value:.3g}"


def _name(axes: Any, drawn: list[Point], place: int, limits: tuple[float, float]) -> None:
    """Write the networks' names above the panel, each where its points are, in lines so that none meets another."""
    places: dict[tuple[str, bool], list[float]] = {}
    for point in drawn:
        places.setdefault((point.name, point.row is None), []).append(point.costs[place].mean)
    lines: list[list[tuple[float, float]]] = [[], [], []]
    for (name, is_teacher), means in sorted(places.items(), key=lambda item: (item[1][0], item[0])):
        mean = math.exp(math.fsum(map(math.log, means)) / len(means))
        text = cut(name, 26) + " (teacher)" * is_teacher
        half = (0.066 * len(text) * 6.5 / 7.5 + 0.08) / 2
        x = math.log(mean / limits[0]) / math.log(limits[1] / limits[0]) * _PANEL[0]
        x = min(max(x, half - 0.35), _PANEL[0] + 0.3 - half)
        for line, taken in enumerate(lines):
            if all(x + half < left or right < x - half for left, right in taken):
                taken.append((x - half, x + half))
                axes.text(
                    x / _PANEL[0],
                    1.02 + 0.055 * line,
                    text,
                    transform=axes.transAxes,
                    ha="center",
                    va="bottom",
                    fontsize=6.5,
                    color=GREY,
                )
                break
        axes.axvline(mean, color=LIGHT, linewidth=0.8, linestyle=":", zorder=0)


def _legend(axes: Any, rows: list[Row], styles: dict[int, tuple[str, str]], labels: list[str]) -> None:
    """Say which point is which row."""
    from matplotlib.lines import Line2D

    axes.set_axis_off()
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=5)
        for colour, marker in (styles[id(row)] for row in rows)
    ]
    if len(labels) > len(rows):
        handles.append(
            Line2D([], [], color=GREY, marker="*", linestyle="none", markersize=10, markerfacecolor="#ffffff")
        )
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(0, 1.0), borderaxespad=0, fontsize=7, frameon=False)


def _caption(table: Table, points: list[Point], devices: list[str], panels: list[tuple[str, int]]) -> list[str]:
    """What the figure says below its panels."""
    counts = sorted({point.value.n for point in points if point.row is not None})
    n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    found = [
        f"mean over n = {n} seed{'s' * (counts[-1] > 1)}, bars: one sample standard deviation; cost axes are "
        "logarithmic; rows of one student are set side by side"
    ]
    if any(point.row is None for point in points):
        found[0] += f"; teachers: {teacher_split(table.metric)} top-1"
    if any(place == 2 for _, place in panels):
        found.append(
            f"images/s on {clean(devices[0])}, loading and measuring included, timed beside whatever else ran; no "
            "teacher was timed"
        )
    elif len(devices) > 1:
        found.append(f"images/s are left out, since runs come from {len(devices)} devices: {', '.join(devices)}")
    rows = {id(point.row) for point in points if point.row is not None}
    every = sum(any(cell.summary for cell in row.cells) for row in table.rows)
    if sentence := about_rows(len(rows), every):
        found.append(sentence)
    if len(table.columns) > MOST_COLUMNS:
        found.append(f"the first {MOST_COLUMNS} of {len(table.columns)} columns")
    return found


def _is_accuracy(metric: str) -> bool:
    """Whether a metric is an accuracy that the teacher's can stand beside."""
    name = metric.rpartition("/")[2]
    return bool(PERCENT.fullmatch(name)) and name.startswith("top1")
