"""What the runs of a table did epoch by epoch: losses, accuracy, entropy and agreement with the teacher.

A line is the mean of a row over its seeds, the band around it one sample standard deviation to each side, a marker an
epoch that was measured; between two of them the line goes straight on. Few rows are shown: the baselines, what val/top1
chose, and the best by val/top1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vkd.records.grouping import Row, Table
from vkd.records.histories import Curve, curves_of
from vkd.records.plot_styles import (
    DARK,
    GREY,
    LIGHT,
    about_rows,
    add_axes,
    add_text,
    choose_rows,
    new_figure,
    row_styles,
    wrap,
)
from vkd.records.reading import Run, clean
from vkd.records.tables import metric_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_COLUMNS = 3
MOST_TERMS = 4
MEASURED = ("val/top1", "test/top1", "test/entropy", "test/agreement")
"""What is shown beside the terms of the loss."""

_NOT_TERMS = frozenset({"train/loss", "train/top1", "train/top5"})
_LINE_STYLES = ("-", "--", ":", "-.")
_MOST_MARKERS = 16  # of a line
_MOST_DRAWN = 100  # epochs of a line, of all columns together: a vector graphic holds each of them four times
_WIDE_RANGE = 30.0  # between the losses of two terms, beyond which their axis is logarithmic
_PANEL = (2.75, 1.95)
_ACROSS, _GAPS = 3, (0.68, 0.62)
_LABEL_SIGNS = 42


def runs_of_curves(table: Table) -> list[Run]:
    """The runs whose histories `draw_curves` shows."""
    found: dict[str, Run] = {}
    for index in range(min(len(table.columns), MOST_COLUMNS)):
        for row in choose_rows(table, index):
            found |= {run.path: run for _, run in sorted(row.cells[index].group.runs.items())}
    return list(found.values())


def draw_curves(
    table: Table, histories: Mapping[str, list[dict[str, float]]], unread: Iterable[str] = ()
) -> Figure | None:
    """The curves of the first `MOST_COLUMNS` columns; None where no history says anything.

    Args:
        table: whose rows are shown.
        histories: lines of `read_history` by `Run.path`.
        unread: why some histories could not be read.
    """
    blocks = []
    for index in range(min(len(table.columns), MOST_COLUMNS)):
        rows = choose_rows(table, index)
        panels = _panels(replace(table, rows=rows), index, histories)
        if panels:
            blocks.append((index, rows, panels))
    if not blocks:
        return None
    width = _ACROSS * (_PANEL[0] + _GAPS[0]) + 0.25
    signs = int((width - 0.4) / 0.0585)
    caption = _caption(table, blocks, list(unread), signs)
    top = 0.45
    heights = [0.5 + _rows_of_panels(panels) * (_PANEL[1] + _GAPS[1]) for _, _, panels in blocks]
    below = sum(text.count("\n") + 1 for text in caption)
    height = top + sum(heights) + 0.15 * below + 0.15
    figure = new_figure(width, height, dots=150.0 if len(blocks) == 1 else 100.0)
    add_text(figure, 0.2, 0.12, f"{clean(table.study, 60)}: epoch by epoch", fontsize=11, color=DARK)
    for (index, rows, panels), height in zip(blocks, heights, strict=True):
        title = wrap(table.columns[index].title, int(signs * 0.85), 1)
        add_text(figure, 0.2, top, title, fontsize=9, color=DARK)
        styles = {id(row): style for row, style in zip(rows, row_styles(rows), strict=True)}
        for place, (name, curves) in enumerate([*panels, ("", [])]):
            left = _GAPS[0] + (place % _ACROSS) * (_PANEL[0] + _GAPS[0])
            panel_top = top + 0.5 + (place // _ACROSS) * (_PANEL[1] + _GAPS[1])
            axes = add_axes(figure, left, panel_top, *_PANEL)
            if curves:
                _draw(axes, name, curves, styles, _MOST_DRAWN // len(blocks))
            else:
                _legend(axes, _shown(rows, panels), styles)
        top += height
    for text in caption:
        add_text(figure, 0.2, top, text)
        top += 0.15 * (text.count("\n") + 1)
    return figure


def _rows_of_panels(panels: list) -> int:
    """Lines of panels, with one for the legend."""
    return -(-(len(panels) + 1) // _ACROSS)


def _panels(
    table: Table, index: int, histories: Mapping[str, list[dict[str, float]]]
) -> list[tuple[str, list[tuple[str, list[Curve]]]]]:
    """The panels of a column that have something to show: their names, and their metrics, each with its curves."""
    paths = [run.path for row in table.rows for run in row.cells[index].group.runs.values()]
    names = {name for path in paths for line in histories.get(path, ()) for name in line}
    terms = sorted(name for name in names if name.startswith("train/") and name not in _NOT_TERMS)
    terms.sort(key=lambda name: name != "train/cross_entropy")
    if not terms:
        terms = ["train/loss"] if "train/loss" in names else []
    found = []
    for title, metrics in [("terms of the training loss", terms), *((name, [name]) for name in MEASURED)]:
        curves = [(metric, curves_of(table, index, metric, histories)) for metric in metrics]
        curves = [(metric, some) for metric, some in curves if some]
        if curves:
            found.append((title, curves))
    return found


def _shown(rows: list[Row], panels: list[tuple[str, list[tuple[str, list[Curve]]]]]) -> list[Row]:
    """The rows that have a line in any panel."""
    drawn = {id(curve.row) for _, metrics in panels for _, curves in metrics for curve in curves}
    return [row for row in rows if id(row) in drawn]


def _draw(
    axes: Any, name: str, metrics: list[tuple[str, list[Curve]]], styles: dict[int, tuple[str, str]], most: int
) -> None:
    """Draw a panel: every metric in a line style of its own, every row in a colour and with a marker of its own.

    Args:
        most: epochs to draw of a line.
    """
    is_loss = name not in MEASURED
    shown = metrics[:MOST_TERMS]
    for (_, curves), line_style in zip(shown, _LINE_STYLES, strict=False):
        for curve in curves:
            colour, marker = styles[id(curve.row)]
            drawn = _places(len(curve.epochs), most)
            epochs, mean, low, high = (
                [values[place] for place in drawn] for values in (curve.epochs, curve.mean, curve.low, curve.high)
            )
            axes.fill_between(epochs, low, high, color=colour, alpha=0.16, linewidth=0, zorder=1)
            step = -(-len(epochs) // _MOST_MARKERS)
            axes.plot(
                epochs,
                mean,
                color=colour,
                linestyle=line_style,
                linewidth=1.2,
                marker=marker,
                markersize=3.4,
                # Lines that lie on each other show their markers in turn.
                markevery=(list(styles).index(id(curve.row)) % step, step),
                zorder=2,
            )
    title, _, unit = metric_title(name).partition(" (")
    title, label = (name, "weighted loss") if is_loss else (title, unit.rstrip(")"))
    values = [value for _, curves in shown for curve in curves for value in curve.mean]
    if is_loss and min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        axes.set_yscale("log")
        label += " (logarithmic)"
    axes.set_title(title, fontsize=8.5, pad=5)
    axes.set_xlabel("epoch", fontsize=8, labelpad=2)
    axes.set_ylabel(label, fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    epochs = [epoch for _, curves in shown for curve in curves for epoch in curve.epochs]
    if min(epochs) == max(epochs):
        axes.set_xticks([epochs[0]])
    else:
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    if is_loss:
        _name_terms(axes, [metric for metric, _ in shown], len(metrics) - len(shown))


def _places(n: int, most: int) -> list[int]:
    """At most `most` of the places 0 to n - 1, evenly spread, the last one among them."""
    step = -(-n // most)
    return list(range((n - 1) % step, n, step))


def _name_terms(axes: Any, metrics: list[str], left_out: int) -> None:
    """Say which line style is which term of the loss."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=GREY, linestyle=style, linewidth=1.2)
        for _, style in zip(metrics, _LINE_STYLES, strict=False)
    ]
    labels = [clean(metric.removeprefix("train/"), 24).replace("_", " ") for metric in metrics]
    if left_out:
        handles.append(Line2D([], [], linestyle="none"))
        labels.append(f"and {left_out} further terms")
    axes.legend(handles, labels, loc="best", fontsize=7, frameon=True, framealpha=0.85, edgecolor="none")


def _legend(axes: Any, rows: list[Row], styles: dict[int, tuple[str, str]]) -> None:
    """Say which line is which row, in a place of its own."""
    from matplotlib.lines import Line2D

    axes.set_axis_off()
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=1.2, markersize=4.5)
        for colour, marker in (styles[id(row)] for row in rows)
    ]
    labels = [wrap(row.label, _LABEL_SIGNS, 2) for row in rows]
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(-0.12, 1.06), fontsize=7, frameon=False)


def _caption(table: Table, blocks: list, unread: list[str], signs: int) -> list[str]:
    """What the figure says below its panels."""
    counts = sorted(
        {
            n
            for _, _, panels in blocks
            for _, metrics in panels
            for _, curves in metrics
            for curve in curves
            for n in curve.n
        }
    )
    n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    found = [f"mean of n = {n} seeds, band: ± one sample standard deviation"]
    if counts[-1] == 1:
        found = ["n = 1 seed, so that there is no band"]
    longest = max(len(curve.epochs) for _, _, panels in blocks for _, some in panels for _, cs in some for curve in cs)
    drawn = len(_places(longest, _MOST_DRAWN // len(blocks)))
    found[0] += "; markers are measured epochs" if longest <= _MOST_MARKERS else "; a marker every few epochs"
    found[0] += f"; {drawn} of {longest} measured epochs are drawn" if drawn < longest else ""
    for index, rows, _ in blocks:
        every = sum(bool(row.cells[index].group and row.cells[index].group.runs) for row in table.rows)
        if sentence := about_rows(len(rows), every):
            found.append(f"{clean(table.columns[index].title)}: {sentence}" if len(blocks) > 1 else sentence)
    if len(table.columns) > MOST_COLUMNS:
        found.append(f"the first {MOST_COLUMNS} of {len(table.columns)} columns")
    if unread:
        more = f" and {len(unread) - 1} others" if len(unread) > 1 else ""
        found.append(f"not shown, since it cannot be read: {clean(unread[0])}{more}")
    return [wrap(text, signs, 3) for text in found]
