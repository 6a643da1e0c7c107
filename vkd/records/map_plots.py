"""The alpha-beta map of a table, and its section along alpha + beta = 1.

The map has two panels a grid: mean val top-1, which chooses, and the table's metric, which is reported. A cell is a
point of the grid. Axes whose values are evenly spaced are to scale; otherwise all cells are equally large and ticks say
the true values. Points beside the regular part (forward and reverse KL by their own names above all) are discs at their
places. A cell without a finished run is hatched and says why, one with fewer runs than there should be has a corner cut
off. Nothing is selected on test: the frame is around what val/top1 chose, in both panels.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vkd.records.alpha_beta import NAMED, Grid, GridPoint, grids_of
from vkd.records.grouping import SELECTION, Hole, Table, is_better, show
from vkd.records.plot_styles import (
    COLOUR_MAP,
    DARK,
    GREY,
    LIGHT,
    STYLES,
    add_axes,
    add_text,
    count,
    new_figure,
    spread,
    text_colour,
    wrap,
)
from vkd.records.reading import clean
from vkd.records.statistics import Summary, summarise
from vkd.records.tables import decimals, metric_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_GRIDS = 6
MOST_TEXTS = 300
"""Cells with a number in it, in all panels of a figure."""

_ON_LINE = 1e-6  # how far alpha + beta may lie from 1
_PANEL = (4.5, 3.6)  # inches that the cells of a panel have at most
_CELL = (0.98, 0.62)
_MOST_STRETCH = 2.6  # of a panel by discs beside its cells
_LEAST_CELL = 0.03
_TEXT_SIZE, _NAME_SIZE = 7.5, 6.5
_DISC_INCHES = 0.24
_MOST_LABELLED = 12  # discs and marks of a panel
_MOST_SAID = 8  # points without a run in a caption
_MOST_VECTOR = 2_500  # cells beyond which an SVG gets them as an image
_LINE_INCHES = 1.2 * _TEXT_SIZE / 72
_FORMS = ("wide", "tall", "mean")
"""Of the texts in cells: mean ± std above n; mean, std and n below each other; the mean alone."""

_LEFT, _RIGHT, _BETWEEN, _BAR = 0.62, 0.62, 1.15, 0.14
_HATCH = "////"


def draw_map(table: Table) -> Figure | None:
    """The map of each grid of the table, `MOST_GRIDS` at most; None where there is no grid."""
    grids = grids_of(table)
    shown = _choose(grids)
    if not shown:
        return None
    metrics = list(dict.fromkeys((SELECTION, table.metric)))
    planes = [_Plane(grid) for grid in shown]
    width = max(
        _LEFT + sum(plane.size[0] for _ in metrics) + _BETWEEN * (len(metrics) - 1) + _RIGHT + 0.3 for plane in planes
    )
    width = max(width, 6.4)
    signs = int((width - 0.4) / 0.0585)
    numbers = sum(len(grid.points) for grid in shown) * len(metrics) <= MOST_TEXTS
    blocks = []
    for grid, plane in zip(shown, planes, strict=True):
        lines = [wrap(grid.title, int(signs * 0.85), 2)]
        blocks.append((grid, plane, lines[0], [wrap(line, signs, 3) for line in _caption(table, grid, plane, metrics)]))
    left_out = _left_out(len(shown), len(grids))
    top = 0.42 + (0.2 if left_out else 0.0)
    heights = [
        0.2 * (title.count("\n") + 1) + 0.3 + plane.size[1] + 0.55 + 0.15 * _lines(caption) + 0.15
        for _, plane, title, caption in blocks
    ]
    legend = wrap(_legend(shown, planes, metrics), signs, 3)
    height = top + sum(heights) + 0.15 * (legend.count("\n") + 1) + 0.1
    figure = new_figure(width, height, dots=150.0 if len(shown) < 4 else 100.0)
    add_text(figure, 0.2, 0.12, f"{clean(table.study, 60)}: the alpha-beta map", fontsize=11, color=DARK)
    if left_out:
        add_text(figure, 0.2, 0.38, left_out)
    for (grid, plane, title, caption), height in zip(blocks, heights, strict=True):
        add_text(figure, 0.2, top, title, fontsize=9, color=DARK)
        panel_top = top + 0.2 * (title.count("\n") + 1) + 0.3
        for number, metric in enumerate(metrics):
            left = _LEFT + number * (plane.size[0] + _BETWEEN)
            axes = add_axes(figure, left, panel_top, *plane.size)
            bar = add_axes(figure, left + plane.size[0] + 0.1, panel_top, _BAR, plane.size[1])
            _Panel(figure, axes, bar, grid, plane, metric, numbers).draw(first=number == 0)
        _stack(figure, panel_top + plane.size[1] + 0.52, caption)
        top += height
    add_text(figure, 0.2, top, legend)
    return figure


def draw_line(table: Table) -> Figure | None:
    """val top-1 and the table's metric along alpha + beta = 1 for each grid that has two points or more there.

    None where there is none. Accuracies share their axes; another metric has its own, below those of val.
    """
    grids = [
        grid
        for grid in grids_of(table)
        if len(set(_alphas(grid))) > 1 and any(point.is_alpha_beta for point in _on_line(grid))
    ]
    shown = _choose(grids)
    if not shown:
        return None
    groups = [[SELECTION, table.metric]] if _is_top1(table.metric) else [[SELECTION], [table.metric]]
    groups = [list(dict.fromkeys(group)) for group in groups]
    across = min(2, len(shown))
    down = -(-len(shown) // across)
    left_out = _left_out(len(shown), len(grids))
    top = 0.45 + (0.2 if left_out else 0.0)
    panel = (4.6, 2.5 if len(groups) == 1 else 1.7)
    block = 0.68 + len(groups) * panel[1] + (len(groups) - 1) * 0.12 + 0.6
    width = across * (panel[0] + 0.95)
    caption = wrap(_about_section(shown, groups), int(width / 0.0585), 4)
    figure = new_figure(width, top + down * block + 0.15 * (caption.count("\n") + 1) + 0.1)
    title = f"{clean(table.study, 60)}: from reverse KL to forward KL along alpha + beta = 1"
    add_text(figure, 0.2, 0.12, title, fontsize=11 if across > 1 else 9.5, color=DARK)
    if left_out:
        add_text(figure, 0.2, 0.38, left_out)
    for place, grid in enumerate(shown):
        left = 0.75 + (place % across) * (panel[0] + 0.95)
        block_top = top + (place // across) * block
        add_text(figure, left - 0.55, block_top, wrap(grid.title, 80, 1), fontsize=8.5, color=DARK)
        for number, metrics in enumerate(groups):
            axes = add_axes(figure, left, block_top + 0.68 + number * (panel[1] + 0.12), *panel)
            _draw_section(figure, axes, grid, metrics, first=number == 0, last=number == len(groups) - 1)
    add_text(figure, 0.2, top + down * block, caption)
    return figure


class _Axis:
    """Where the values of alpha or beta lie on a panel.

    Args:
        values: of the regular part, ascending; empty where there is none.
        others: values of points beside it.
        step: the size of a cell where there is one value alone.
    """

    def __init__(self, values: Sequence[float], others: Iterable[float], step: float | None = None) -> None:
        self.values = list(values)
        self.step = step or 1.0
        self.to_scale = True
        if len(self.values) > 1:
            steps = [b - a for a, b in zip(self.values, self.values[1:], strict=False)]
            mean = (self.values[-1] - self.values[0]) / len(steps)
            self.to_scale = all(abs(step - mean) <= 1e-6 * mean + 1e-9 for step in steps)
            self.step = mean if self.to_scale else 1.0
        elif not self.values:
            others = sorted(others)
            self.step = (others[-1] - others[0]) / 5 or step or 0.2
        start = self.values or [others[0], others[-1]]
        margin = 0.5 * self.step
        self.limits = [self.place(start[0]) - margin, self.place(start[-1]) + margin]
        self.cells = (self.limits[1] - self.limits[0]) / self.step

    def place(self, value: float) -> float:
        """Where a value lies: at itself on an axis to scale, otherwise between the numbers of the cells beside it."""
        if self.to_scale:
            return value
        right = min(max(bisect.bisect_left(self.values, value), 1), len(self.values) - 1)
        low, high = self.values[right - 1], self.values[right]
        return right - 1 + (value - low) / (high - low)

    def edges(self) -> list[float]:
        """Of the cells."""
        return [self.place(value) - self.step / 2 for value in self.values] + [
            self.place(self.values[-1]) + self.step / 2
        ]

    def reaches(self, value: float) -> bool:
        """Whether a value lies in the panel."""
        return self.limits[0] <= self.place(value) <= self.limits[1]

    def stretched(self, value: float) -> list[float]:
        """The limits with which a disc at a value would be in the panel, and its half."""
        place, margin = self.place(value), 0.5 * self.step
        return [min(self.limits[0], place - margin), max(self.limits[1], place + margin)]

    def ticks(self, inches: float, size: float) -> list[float]:
        """The values at which ticks are, so that texts of `size` inches do not meet on an axis of `inches`."""
        span = self.limits[1] - self.limits[0]
        kept: list[float] = []
        for value in self.values:
            if not kept or (self.place(value) - self.place(kept[-1])) / span * inches >= size:
                kept.append(value)
        return kept


class _Plane:
    """The part of the alpha-beta plane that the panels of a grid show, and how large they are.

    Args:
        grid: to be shown.
    """

    def __init__(self, grid: Grid) -> None:
        self.discs = [point for point in grid.points if not grid.is_regular(point)]
        self.beside = [point for point in self.discs if grid.at(point.alpha, point.beta) is not None]
        self.discs = [point for point in self.discs if grid.at(point.alpha, point.beta) is None]
        alphas, betas = grid.alphas, grid.betas
        steps = [(axis[-1] - axis[0]) / (len(axis) - 1) if len(axis) > 1 else None for axis in (alphas, betas)]
        self.alpha = _Axis(alphas, [point.alpha for point in self.discs], steps[1])
        self.beta = _Axis(betas, [point.beta for point in self.discs], steps[0])
        most = [_MOST_STRETCH * axis.cells * axis.step for axis in (self.alpha, self.beta)]
        self.off = []
        for point in sorted(self.discs, key=lambda point: point.is_alpha_beta):
            limits = [self.alpha.stretched(point.alpha), self.beta.stretched(point.beta)]
            if all(high - low <= largest for (low, high), largest in zip(limits, most, strict=True)):
                self.alpha.limits, self.beta.limits = limits
            else:
                self.off.append(point)
        off = set(map(id, self.off))
        self.discs = [point for point in self.discs if id(point) not in off]
        cells = [(axis.limits[1] - axis.limits[0]) / axis.step for axis in (self.alpha, self.beta)]
        self.cell = tuple(
            max(_LEAST_CELL, min(size, panel / n)) for size, panel, n in zip(_CELL, _PANEL, cells, strict=True)
        )
        self.size = tuple(max(1.6, n * size) for n, size in zip(cells, self.cell, strict=True))
        self.cell = tuple(size / n for n, size in zip(cells, self.size, strict=True))

    def place(self, alpha: float, beta: float) -> tuple[float, float]:
        """Where a point lies, in the units of the axes."""
        return self.alpha.place(alpha), self.beta.place(beta)

    def reaches(self, alpha: float, beta: float) -> bool:
        """Whether a point lies in the panel."""
        return self.alpha.reaches(alpha) and self.beta.reaches(beta)

    def inches(self, place: tuple[float, float]) -> tuple[float, float]:
        """How far a place lies from the lower left corner."""
        return tuple(
            (value - axis.limits[0]) / (axis.limits[1] - axis.limits[0]) * size
            for value, axis, size in zip(place, (self.alpha, self.beta), self.size, strict=True)
        )

    def at_inches(self, x: float, y: float) -> tuple[float, float]:
        """The place, in the units of the axes, that lies so far from the lower left corner."""
        return tuple(
            axis.limits[0] + value / size * (axis.limits[1] - axis.limits[0])
            for value, axis, size in zip((x, y), (self.alpha, self.beta), self.size, strict=True)
        )

    def has_cell(self, alpha: float, beta: float) -> bool:
        """Whether a point is one of the regular part, with or without runs."""
        return alpha in self.alpha.values and beta in self.beta.values

    def line_crosses(self, box: _Box) -> bool:
        """Whether alpha + beta = 1 goes through a box."""
        xs, ys = zip(*map(self.inches, zip(*self.line(), strict=True)), strict=True)
        pieces = zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False)
        return any(
            min(x, right) < box.right
            and max(x, right) > box.left
            and min(y, top) < box.top
            and max(y, top) > box.bottom
            for (x, y), (right, top) in pieces
        )

    def line(self) -> tuple[list[float], list[float]]:
        """alpha + beta = 1 in the units of the axes: straight between the values of the regular part."""
        low, high = (self._value(limit) for limit in self.alpha.limits)
        turns = [*self.alpha.values, *(1 - beta for beta in self.beta.values)]
        alphas = [low, *sorted(value for value in turns if low < value < high), high]
        return [self.alpha.place(value) for value in alphas], [self.beta.place(1 - value) for value in alphas]

    def _value(self, place: float) -> float:
        """The alpha at a place of its axis."""
        values = self.alpha.values
        if self.alpha.to_scale:
            return place
        right = min(max(int(place // 1) + 1, 1), len(values) - 1)
        return values[right - 1] + (place - right + 1) * (values[right] - values[right - 1])


@dataclass(frozen=True)
class _Box:
    """A rectangle in a panel that holds something, in inches from its lower left corner."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> _Box:
        """The rectangle with its centre at (x, y)."""
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    def meets(self, other: _Box) -> bool:
        """Whether two rectangles have a point in common."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )


class _Panel:
    """One metric of a grid.

    Args:
        figure: that the panel is in.
        axes: of the cells; bar: of the colour bar.
        grid: whose points are drawn, where `plane` says.
        metric: SELECTION or that of the table.
        numbers: whether there may be texts in cells.
    """

    def __init__(
        self, figure: Figure, axes: Any, bar: Any, grid: Grid, plane: _Plane, metric: str, numbers: bool
    ) -> None:
        self.figure, self.axes, self.bar = figure, axes, bar
        self.grid, self.plane, self.metric = grid, plane, metric
        self.digits = decimals(metric)
        self.taken: list[_Box] = []
        summaries = [summary for point in grid.points if (summary := self.summary(point))]
        self.form = next((form for form in _FORMS if numbers and summaries and self._fits(form, summaries)), "")

    def summary(self, point: GridPoint) -> Summary | None:
        """Of a point, in the metric of the panel."""
        return _summary(point, self.metric)

    def _value(self, summary: Summary, form: str) -> list[str]:
        """The lines that say a value in a cell; a percentage that stands alone has one decimal."""
        text = spread(summary, self.digits)
        mean, sign, std = text.partition(" ± ")
        if form == "mean":
            return [f"{summary.mean:.1f}" if self.digits == 2 else mean]
        return [text] if form == "wide" or not sign else [mean, f"± {std}"]

    def _fits(self, form: str, summaries: list[Summary]) -> bool:
        """Whether cells have room for their values in a form."""
        width, height = self.plane.cell
        texts = [self._value(summary, form) for summary in summaries]
        lines = max(map(len, texts)) + (form != "mean")
        widest = max(_inches(line, _TEXT_SIZE) for text in texts for line in text)
        return widest + 0.07 <= width and lines * _LINE_INCHES + 0.05 <= height

    def draw(self, *, first: bool) -> None:
        """Draw everything; `first`: whether this is the leftmost panel, which says what the vertical axis is."""
        from matplotlib import colormaps
        from matplotlib.colors import Normalize

        better = is_better(self.metric)
        self.map = colormaps[COLOUR_MAP + ("_r" if better == -1 else "")]
        hidden = set(map(id, [*self.plane.off, *self.plane.beside]))
        drawn = [point for point in self.grid.points if id(point) not in hidden]
        means = [summary.mean for point in drawn if (summary := self.summary(point))]
        low, high, extend = _colour_range(means, 10.0**-self.digits)
        self.norm = Normalize(low, high)
        self._decorate(first)
        if not means:
            words = "no validation split,\nnothing is chosen" if self.metric == SELECTION else "no finished run"
            self.axes.text(0.5, 0.5, words, transform=self.axes.transAxes, ha="center", va="center", fontsize=8)
            self.bar.set_axis_off()
            return
        self._cells()
        self._bar(extend)
        self.axes.plot(*self.plane.line(), color="#ffffff", linewidth=1.8, alpha=0.6, zorder=1.4)
        self.axes.plot(*self.plane.line(), color="#000000", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
        self._discs()
        self._marks()
        self._frame()

    def _decorate(self, first: bool) -> None:
        """Axes, ticks and titles."""
        plane, axes = self.plane, self.axes
        axes.set_xlim(*plane.alpha.limits)
        axes.set_ylim(*plane.beta.limits)
        axes.set_autoscale_on(False)
        for axis, side, set_ticks, inches in (
            (plane.alpha, plane.size[0], axes.set_xticks, None),
            (plane.beta, plane.size[1], axes.set_yticks, 0.16),
        ):
            widest = max((_inches(show(value), 7.5) for value in axis.values), default=0.0) + 0.06
            ticks = axis.ticks(side, inches or widest)
            if ticks:
                set_ticks([axis.place(value) for value in ticks], [show(value) for value in ticks])
        axes.tick_params(labelsize=7.5, length=2.5, color=GREY)
        axes.set_xlabel("alpha", fontsize=8.5, labelpad=2)
        axes.tick_params(axis="y", labelleft=first)
        if first:
            axes.set_ylabel("beta", fontsize=8.5)
        use = "chosen on" if self.metric == SELECTION else "reported"
        axes.set_title(f"{metric_title(self.metric)}: {use}", fontsize=8.5, pad=5)
        axes.spines[["top", "right", "left", "bottom"]].set_color("#999999")
        axes.spines[["top", "right", "left", "bottom"]].set_linewidth(0.6)

    def _bar(self, extend: str) -> None:
        """The colour bar."""
        from matplotlib.cm import ScalarMappable

        bar = self.figure.colorbar(ScalarMappable(self.norm, self.map), cax=self.bar, extend=extend, extendfrac=0.04)
        bar.ax.tick_params(labelsize=7.5, length=2.5)
        bar.ax.locator_params(nbins=6)
        bar.set_label(metric_title(self.metric), fontsize=7.5, labelpad=3)
        bar.outline.set_linewidth(0.5)

    def _cells(self) -> None:
        """The regular part: colours, holes and numbers."""
        import numpy
        from matplotlib.collections import PolyCollection

        alphas, betas = self.grid.alphas, self.grid.betas
        if not alphas:
            return
        plane = self.plane
        means = numpy.ma.masked_all((len(betas), len(alphas)))
        holes, corners, texts = [], [], []
        half = (plane.alpha.step / 2, plane.beta.step / 2)
        for row, beta in enumerate(betas):
            for column, alpha in enumerate(alphas):
                point = self.grid.at(alpha, beta)
                x, y = plane.place(alpha, beta)
                summary = point and self.summary(point)
                if summary is None:
                    holes.append([(x + i * half[0], y + j * half[1]) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
                else:
                    means[row, column] = summary.mean
                    if summary.n < point.cell.expected:
                        cut = 0.36 * min(plane.cell) / 1.2
                        across, up = (2 * h * cut / size for h, size in zip(half, plane.cell, strict=True))
                        right, top = x + half[0], y + half[1]
                        corners.append([(right - across, top), (right, top), (right, top - up)])
                        edge = plane.inches((right, top))
                        self.taken.append(_Box(edge[0] - cut, edge[1] - cut, *edge))
                texts.append((point, alpha, beta, summary))
        self.axes.pcolormesh(
            plane.alpha.edges(),
            plane.beta.edges(),
            means,
            cmap=self.map,
            norm=self.norm,
            edgecolors="#ffffff",
            linewidth=0.6 if min(plane.cell) > 0.12 else 0.0,
            rasterized=means.size > _MOST_VECTOR,
            zorder=1,
        )
        if holes:
            self.axes.add_collection(
                PolyCollection(
                    holes, facecolors="#f2f2f2", edgecolors="#999999", hatch=_HATCH, linewidths=0.5, zorder=1.1
                )
            )
        if corners:
            self.axes.add_collection(
                PolyCollection(corners, facecolors="#ffffff", edgecolors="#000000", linewidths=0.6, zorder=2)
            )
        for point, alpha, beta, summary in texts:
            self._text(point, alpha, beta, summary)

    def _text(self, point: GridPoint | None, alpha: float, beta: float, summary: Summary | None) -> None:
        """What stands in a cell, as far as it has room beside what else lies there."""
        if not self.form:
            return
        is_full = self.form != "mean"
        name = NAMED.get((alpha, beta), "")
        name = name if self._is_named_inside(name) else ""
        if summary is None:
            lines = _why(point, self.metric) if is_full else []
            background = "#ffffff"
        else:
            lines = self._value(summary, self.form)
            lines += [count(summary.n, point.cell.expected)] if is_full else []
            background = self.map(self.norm(summary.mean))
        lines = [*([name] if name and lines else []), *lines]
        lines = [line for line in lines if _inches(line, _TEXT_SIZE) + 0.04 <= self.plane.cell[0]]
        if not lines:
            return
        width = max(_inches(line, _TEXT_SIZE) for line in lines) + 0.03
        height = len(lines) * _LINE_INCHES + 0.03
        if height > self.plane.cell[1]:
            return
        place = self.plane.place(alpha, beta)
        x, y = self.plane.inches(place)
        slack = (self.plane.cell[1] - height) / 2 - 0.03
        for shift in (0.0, *((slack, -slack) if slack > 0 else ())):
            box = _Box.around(x, y + shift, width, height)
            if not any(box.meets(other) for other in self._fixed):
                break
        else:
            return
        self.taken.append(box)
        masked = {"facecolor": background, "edgecolor": "none", "pad": 0.8}
        is_crossed = summary is None or self.plane.line_crosses(box)
        lifted = place[1] + shift / self.plane.cell[1] * self.plane.beta.step
        self.axes.text(
            place[0],
            lifted,
            "\n".join(lines),
            ha="center",
            va="center",
            fontsize=_TEXT_SIZE,
            linespacing=1.15,
            color="#000000" if summary is None else text_colour(background),
            bbox=masked if is_crossed else None,
            zorder=3,
        )

    @cached_property
    def _fixed(self) -> list[_Box]:
        """Where discs and the marks of names lie, which cannot give way."""
        marks = [_Box.around(*self._mark_place(*named), 0.1, 0.1) for named in self._marked()]
        return [*map(self._disc_box, self.plane.discs), *marks]

    def _is_named_inside(self, name: str) -> bool:
        """Whether cells have room for a value and for the name of a divergence."""
        lines = {"wide": 3, "tall": 4, "mean": 2}.get(self.form)
        if lines is None or _inches(name, _TEXT_SIZE) + 0.04 > self.plane.cell[0]:
            return False
        return lines * _LINE_INCHES + 0.04 <= self.plane.cell[1]

    def _marked(self) -> list[tuple[float, float]]:
        """The named divergences in the panel whose names stand neither in a cell nor at a disc."""
        discs = {(point.alpha, point.beta) for point in self.plane.discs}
        return [
            named
            for named in NAMED
            if self.plane.reaches(*named)
            and named not in discs
            and not (self.plane.has_cell(*named) and self._is_named_inside(NAMED[named]))
        ]

    def _mark_place(self, alpha: float, beta: float) -> tuple[float, float]:
        """Where the mark of a named divergence is, in inches: in the corner of a cell that has a value to show."""
        x, y = self.plane.inches(self.plane.place(alpha, beta))
        if self.form and self.plane.has_cell(alpha, beta):
            return x - self.plane.cell[0] / 2 + 0.06, y - self.plane.cell[1] / 2 + 0.06
        return x, y

    def _disc_inches(self, point: GridPoint) -> float:
        """How large a disc is, with the ring around it where it is chosen."""
        size = _DISC_INCHES if len(self.plane.discs) <= _MOST_LABELLED else _DISC_INCHES / 2
        return size * (1.5 if point.chosen else 1.0)

    def _disc_box(self, point: GridPoint) -> _Box:
        """What a disc covers."""
        size = self._disc_inches(point)
        return _Box.around(*self.plane.inches(self.plane.place(point.alpha, point.beta)), size, size)

    def _discs(self) -> None:
        """The points beside the regular part."""
        discs = self.plane.discs
        with_value = [point for point in discs if self.summary(point)]
        inches = _DISC_INCHES if len(discs) <= _MOST_LABELLED else _DISC_INCHES / 2
        if with_value:
            xs, ys = zip(*(self.plane.place(point.alpha, point.beta) for point in with_value), strict=True)
            self.axes.scatter(
                xs,
                ys,
                s=(0.85 * inches * 72) ** 2,
                c=[self.summary(point).mean for point in with_value],
                cmap=self.map,
                norm=self.norm,
                edgecolors="#000000",
                linewidths=0.9,
                zorder=5,
                clip_on=False,
            )
        without = [self.plane.place(point.alpha, point.beta) for point in discs if not self.summary(point)]
        if without:
            self.axes.plot(
                *zip(*without, strict=True), marker="x", color="#000000", markersize=7, linestyle="none", zorder=5
            )
        self.taken += map(self._disc_box, discs)
        if len(discs) > _MOST_LABELLED:
            return
        for point in discs:
            summary = self.summary(point)
            lines = [point.label]
            if summary:
                lines += [spread(summary, self.digits), count(summary.n, point.cell.expected)]
            else:
                lines += _why(point, self.metric)
            place = self.plane.inches(self.plane.place(point.alpha, point.beta))
            if not self._label(place, "\n".join(lines), self._disc_inches(point) / 2):
                self._label(place, point.label, self._disc_inches(point) / 2)

    def _marks(self) -> None:
        """The named divergences of which no run is shown at their place, or whose cell has no room for the name."""
        marked = self._marked()
        for named in marked:
            x, y = self._mark_place(*named)
            self.axes.plot(
                *self.plane.at_inches(x, y),
                marker="D",
                markersize=4.2,
                markerfacecolor="#ffffff",
                markeredgecolor="#000000",
                markeredgewidth=0.9,
                linestyle="none",
                zorder=5,
                clip_on=False,
            )
        self.taken += [_Box.around(*self._mark_place(*named), 0.1, 0.1) for named in marked]
        for named in marked:
            self._label(self._mark_place(*named), NAMED[named], 0.05)

    def _label(self, place: tuple[float, float], text: str, away: float) -> bool:
        """Write beside a place (in inches) what lies there, where nothing else is; whether there is such room."""
        x, y = place
        width = max(_inches(line, _NAME_SIZE) for line in text.split("\n")) + 0.05
        height = (text.count("\n") + 1) * _NAME_SIZE * 1.2 / 72 + 0.04
        right, up = away + 0.03 + width / 2, away + 0.02 + height / 2
        slanted = 0.7 * away + 0.02
        shifts = [(right, 0.0), (-right, 0.0), (0.0, up), (0.0, -up)]
        shifts += [
            (i * (slanted + width / 2), j * (slanted + height / 2)) for i, j in ((1, 1), (1, -1), (-1, 1), (-1, -1))
        ]
        panel = (self.plane.size[0], self.plane.size[1])
        for i, j in shifts:
            box = _Box.around(x + i, y + j, width, height)
            inside = box.left >= 0 and box.bottom >= 0 and box.right <= panel[0] and box.top <= panel[1]
            if inside and not any(box.meets(other) for other in self.taken):
                break
        else:
            return False
        self.taken.append(box)
        self.axes.text(
            *self.plane.at_inches(x + i, y + j),
            text,
            ha="center",
            va="center",
            fontsize=_NAME_SIZE,
            linespacing=1.15,
            color="#000000",
            bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.8},
            zorder=6,
        )
        return True

    def _frame(self) -> None:
        """A thick frame around the chosen cell, or a ring around the chosen disc: white between two lines of black."""
        from matplotlib.patches import Ellipse, Rectangle

        point = self.grid.chosen
        if point is None or any(point is off for off in self.plane.off):
            return
        x, y = self.plane.place(point.alpha, point.beta)
        steps = (self.plane.alpha.step, self.plane.beta.step)
        for colour, width in (("#000000", 4.2), ("#ffffff", 2.0), ("#000000", 0.8)):
            settings = {"fill": False, "edgecolor": colour, "linewidth": width, "zorder": 4, "clip_on": False}
            if min(self.plane.cell) < 0.2:
                settings["linewidth"] = width / 2
            if self.grid.is_regular(point):
                patch = Rectangle((x - steps[0] / 2, y - steps[1] / 2), *steps, joinstyle="miter", **settings)
            else:
                inches = 0.85 * self._disc_inches(point)
                sizes = (inches / size * step for size, step in zip(self.plane.cell, steps, strict=True))
                patch = Ellipse((x, y), *sizes, **settings)
            self.axes.add_patch(patch)


def _about_section(grids: list[Grid], groups: list[list[str]]) -> str:
    """What the signs along alpha + beta = 1 mean, as far as they are there."""
    points = [point for grid in grids for point in _on_line(grid)]
    found = [_about_seeds(points, [metric for group in groups for metric in group])]
    if any(not point.is_alpha_beta for point in points):
        found.append("filled: abkd, open: forward and reverse KL by their own names (n of both where both are there)")
    if any(point.chosen for point in points):
        found.append("ring: chosen by mean val/top1")
    if not all(map(_has_value, points)):
        found.append("cross: no finished run")
    if len(groups[0]) > 1:
        found.append("val is shifted to the left and the other to the right, to be told apart")
    return "; ".join(found)


def _alphas(grid: Grid) -> list[float]:
    """Where on alpha + beta = 1 a grid has a value."""
    return [point.alpha for point in _on_line(grid) if _has_value(point)]


def _draw_section(figure: Figure, axes: Any, grid: Grid, metrics: list[str], *, first: bool, last: bool) -> None:
    """Draw metrics along alpha + beta = 1 into axes of their own."""
    points = _on_line(grid)
    low = min(0.0, *(point.alpha for point in points))
    high = max(1.0, *(point.alpha for point in points))
    span = high - low
    for metric in metrics:
        (colour, marker), style, side = (STYLES[0], "--", -1) if metric == SELECTION else (STYLES[1], "-", 1)
        shift = 0.006 * span * side if len(metrics) > 1 else 0.0
        drawn = [(point, summary) for point in points if (summary := _summary(point, metric))]
        line = {point.alpha: summary.mean for point, summary in reversed(drawn)}  # of one place, that of abkd
        axes.plot(
            [alpha + shift for alpha in sorted(line)],
            [line[alpha] for alpha in sorted(line)],
            color=colour,
            linestyle=style,
            linewidth=1.2,
            label=metric_title(metric),
            marker="none",
            zorder=2,
        )
        for point, summary in drawn:
            own = 0.012 * span * side if not point.is_alpha_beta and _is_double(points, point) else 0.0
            axes.errorbar(
                point.alpha + shift + own,
                summary.mean,
                yerr=summary.std,
                color=colour,
                marker=marker,
                markersize=5.5,
                markerfacecolor=colour if point.is_alpha_beta else "#ffffff",
                elinewidth=1.2,
                capsize=2.5,
                zorder=3,
            )
            if point.chosen:
                axes.plot(
                    point.alpha + shift,
                    summary.mean,
                    marker="o",
                    markersize=11,
                    markerfacecolor="none",
                    markeredgecolor="#000000",
                    markeredgewidth=1.2,
                    linestyle="none",
                    zorder=4,
                )
    for point in points:
        if not _has_value(point) and not _is_double(points, point):
            axes.plot(
                point.alpha,
                0.03,
                transform=axes.get_xaxis_transform(),
                marker="x",
                color=GREY,
                markersize=6,
                linestyle="none",
            )
    axes.set_xlim(low - 0.06 * span, high + 0.06 * span)
    axes.margins(y=0.12)
    axes.grid(axis="y", color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7.5, labelbottom=last)
    axes.set_ylabel("top-1 (%)" if len(metrics) > 1 else metric_title(metrics[0]), fontsize=8)
    if last:
        axes.set_xlabel("alpha  (beta = 1 - alpha)", fontsize=8.5)
    if len(metrics) > 1:
        axes.legend(loc="best", fontsize=7.5, frameon=False)
    if first:
        _name_points(axes, points, (low - 0.06 * span, high + 0.06 * span))


def _is_double(points: list[GridPoint], point: GridPoint) -> bool:
    """Whether another point with a value lies where one does."""
    return any(other is not point and other.alpha == point.alpha and _has_value(other) for other in points)


def _name_points(axes: Any, points: list[GridPoint], limits: tuple[float, float]) -> None:
    """Write above the axes what the points are and over how many seeds, as many as have room; names go first."""
    inches = axes.get_position().width * axes.figure.get_size_inches()[0]
    by_alpha: dict[float, list[GridPoint]] = {}
    for point in points:
        by_alpha.setdefault(point.alpha, []).append(point)
    taken: list[tuple[float, float]] = []
    for alpha in sorted(by_alpha, key=lambda alpha: (not _any_chosen(by_alpha[alpha]), not by_alpha[alpha][0].name)):
        here = by_alpha[alpha]
        name = here[0].name or f"({show(alpha)}, {show(here[0].beta)})"
        if any(map(_has_value, here)):
            text = f"{name}\nn={'+'.join(str(_count(point)) for point in here)}"
        else:
            text = f"{name}\n{', '.join(_why(here[0], ''))}"
        half = max(_inches(line, 7) for line in text.split("\n")) / 2 + 0.04
        x = (alpha - limits[0]) / (limits[1] - limits[0]) * inches
        if any(x - half < right and left < x + half for left, right in taken):
            continue
        taken.append((x - half, x + half))
        axes.annotate(
            text,
            (alpha, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            color=GREY,
            annotation_clip=False,
        )


def _any_chosen(points: list[GridPoint]) -> bool:
    """Whether one of the points is the choice."""
    return any(point.chosen for point in points)


def _count(point: GridPoint) -> int:
    """The number of runs with any of the metrics."""
    return max(summary.n if summary else 0 for summary in (point.val, point.value))


def _on_line(grid: Grid) -> list[GridPoint]:
    """The points on alpha + beta = 1, in their order."""
    return [point for point in grid.points if abs(point.alpha + point.beta - 1) <= _ON_LINE]


def _has_value(point: GridPoint) -> bool:
    """Whether there is anything to draw of a point."""
    return point.val is not None or point.value is not None


def _summary(point: GridPoint, metric: str) -> Summary | None:
    """Of a point, in val/top1 or in the table's metric."""
    return point.val if metric == SELECTION else point.value


def _is_top1(metric: str) -> bool:
    """Whether a metric is a top-1 accuracy, which can share its axes with that on val."""
    return metric.rpartition("/")[2].startswith("top1")


def _choose(grids: list[Grid]) -> list[Grid]:
    """The grids to draw, in their order: those with a chosen point and the largest first, where there are too many."""
    if len(grids) <= MOST_GRIDS:
        return grids
    ranked = sorted(
        range(len(grids)), key=lambda place: (grids[place].chosen is None, -len(grids[place].points), place)
    )
    return [grids[place] for place in sorted(ranked[:MOST_GRIDS])]


def _left_out(shown: int, every: int) -> str:
    """The sentence about grids that are not drawn; empty where all are."""
    if shown == every:
        return ""
    return f"{shown} of {every} grids: those with a chosen point, and the largest; the table has all"


def _why(point: GridPoint | None, metric: str) -> list[str]:
    """Why a cell has no value, in a few words a line: "1 failed", "missing"."""
    if point is None:
        return ["missing"]
    counts = Counter[str]()
    for hole in point.holes:
        counts[_kind(hole)] += len(hole.seeds) or 1
    if metric == SELECTION and point.value is not None:
        return ["no val"]
    lines = [f"{n} {kind}" for kind, n in sorted(counts.items())]
    return lines[:2] + ["..."] * (len(lines) > 2) or ["no value"]


def _kind(hole: Hole) -> str:
    """What a hole is, in a word: "failed", "running", "missing", "without value"."""
    kind = hole.reason.partition(":")[0]
    return "without value" if kind.startswith("done") else clean(kind, 14)


def _caption(table: Table, grid: Grid, plane: _Plane, metrics: list[str]) -> list[str]:
    """What the figure says below the panels of a grid."""
    found = []
    chosen = grid.chosen
    if chosen is not None:
        found.append(f"chosen by mean {SELECTION}: {chosen.label}: {_values(chosen, metrics)}")
        around = grid.neighbours(chosen)
        words = [_around(chosen, around, metric) for metric in metrics]
        if any(words):
            neighbours = f"its {len(around)} neighbours" if len(around) > 1 else "its neighbour"
            found.append(f"{neighbours}: {'; '.join(word for word in words if word)}")
    elif any(point.val for point in grid.points if point.is_alpha_beta):
        found.append("its method's choice by val/top1 is a point of another grid")
    for point in grid.points:
        if not point.is_alpha_beta:
            is_off = any(point is other for other in plane.off)
            where = f"({show(point.alpha)}, {show(point.beta)}){', beyond the map' if is_off else ''}"
            found.append(f"{point.row.label}, at {where}: {_values(point, metrics)}")
    empty = [(alpha, beta, grid.at(alpha, beta)) for alpha in grid.alphas for beta in grid.betas]
    empty = [place for place in empty if place[2] is None or place[2].val is place[2].value is None]
    if empty:
        words = [f"({show(alpha)}, {show(beta)}) {' and '.join(_why(point, ''))}" for alpha, beta, point in empty]
        more = f"; and {len(words) - _MOST_SAID} more" if len(words) > _MOST_SAID else ""
        found.append(f"no finished run: {'; '.join(words[:_MOST_SAID])}{more}")
    off = sum(point.is_alpha_beta for point in plane.off)
    if off:
        found.append(f"beyond the map: {off} further point{'s' * (off > 1)} of abkd, which the table has")
    found += [seeds] if (seeds := _about_seeds(grid.points, metrics)) else []
    return found


def _about_seeds(points: Iterable[GridPoint], metrics: list[str]) -> str:
    """Over how many runs the values of points are; empty where there are none."""
    counts = sorted({summary.n for point in points for metric in metrics if (summary := _summary(point, metric))})
    if not counts:
        return ""
    if counts[-1] == 1:
        return "n = 1 seed a point, so that there is no spread"
    n = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    return f"n = {n} seeds a point, ± one sample standard deviation"


def _values(point: GridPoint, metrics: list[str]) -> str:
    """A point's values in words."""
    words = []
    for metric in metrics:
        summary = _summary(point, metric)
        if summary is None:
            words.append(f"{_short_title(metric)} {' and '.join(_why(point, metric))}")
        else:
            digits = decimals(metric)
            words.append(f"{_short_title(metric)} {spread(summary, digits)} ({count(summary.n, point.cell.expected)})")
    return ", ".join(words)


def _around(chosen: GridPoint, around: list[GridPoint], metric: str) -> str:
    """Mean and range of the neighbours in a metric, and how far that is from the chosen point; empty without any."""
    means = [summary.mean for point in around if (summary := _summary(point, metric))]
    own = _summary(chosen, metric)
    if not means or own is None:
        return ""
    digits = decimals(metric)
    low, high = min(means), max(means)
    if len(around) == 1:
        unit = " points" if digits == 2 else ""
        return f"{_short_title(metric)} {low:.{digits}f} ({low - own.mean:+.{digits}f}{unit} from it)"
    middle = summarise(means).mean
    unit = " points" if digits == 2 else ""
    return (
        f"{_short_title(metric)} {middle:.{digits}f} on average, {low:.{digits}f} to {high:.{digits}f} "
        f"({low - own.mean:+.{digits}f} to {high - own.mean:+.{digits}f}{unit} from it)"
    )


def _short_title(metric: str) -> str:
    """The title of a metric without its unit."""
    return metric_title(metric).removesuffix(" (%)")


def _legend(grids: list[Grid], planes: list[_Plane], metrics: list[str]) -> str:
    """What the signs in the figure mean, as far as they are in it."""
    found = ["thick frame: chosen by mean val/top1, never by test"] if any(grid.chosen for grid in grids) else []
    cells = [
        (grid.at(alpha, beta), metric)
        for grid in grids
        for alpha in grid.alphas
        for beta in grid.betas
        for metric in metrics
    ]
    summaries = [(point, point and _summary(point, metric)) for point, metric in cells]
    if any(summary is None for _, summary in summaries):
        found.append("hatched: no finished run")
    if any(summary and summary.n < point.cell.expected for point, summary in summaries):
        found.append("white corner: some runs are not there")
    if any(plane.discs for plane in planes):
        found.append("disc: a point beside the grid (cross: no finished run)")
    named = dict.fromkeys(named for named in NAMED for plane in planes if plane.reaches(*named))
    names = ", ".join(f"{NAMED[place]} ({show(place[0])}, {show(place[1])})" for place in named)
    found += [f"diamonds and names: {names}"] if names else []
    found.append("dashed: alpha + beta = 1")
    if any(not (axis.to_scale) for plane in planes for axis in (plane.alpha, plane.beta)):
        found.append("cells of unevenly spaced values are equally large, not to scale")
    return "; ".join(found)


def _lines(texts: Iterable[str]) -> int:
    """Number of lines of some texts below each other."""
    return sum(text.count("\n") + 1 for text in texts)


def _stack(figure: Figure, top: float, texts: Iterable[str]) -> None:
    """Write texts below each other."""
    for text in texts:
        add_text(figure, 0.2, top, text)
        top += 0.15 * (text.count("\n") + 1)


def _inches(text: str, size: float) -> float:
    """About how wide a line of text is in matplotlib's own font, never less than it is for what cells hold."""
    ems = sum(0.33 if sign in " .,:()ijlt'" else 0.86 if sign in "±+=mwMW" else 0.65 for sign in text)
    return ems * size / 72


def _colour_range(values: list[float], least: float) -> tuple[float, float, str]:
    """The lowest and highest value that have a colour of their own, and at which ends of the bar there are others.

    Values further from the quartiles than thrice their distance would leave one colour to all the others.
    """
    if not values:
        return 0.0, 1.0, "neither"
    ordered = sorted(values)
    first, third = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4 - (len(ordered) % 4 == 0)]
    room = 3 * max(third - first, 10 * least)
    kept = [value for value in ordered if first - room <= value <= third + room]
    low, high = kept[0], kept[-1]
    below, above = ordered[0] < low, ordered[-1] > high
    if high - low < least:
        low, high = low - 10 * least, high + 10 * least
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    return low, high, extend
