"""Reliability diagrams of a table: how often a student is right that is so and so confident.

Over 15 equal bins of the largest probability, the images of all seeds of a row together: accuracy above mean
confidence, the gap between the two, and below it which share of the images is so confident. The expected calibration
error (ECE) is the mean gap over images (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vkd.records.grouping import Cell, Table
from vkd.records.plot_styles import (
    DARK,
    GREY,
    LIGHT,
    STYLES,
    about_rows,
    add_axes,
    add_text,
    choose_rows,
    new_figure,
    wrap,
)
from vkd.records.reading import Run, clean, number
from vkd.records.statistics import summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 15
MOST_PANELS = 8
MOST_COLUMNS = 4
MOST_IMAGES = 10**12
"""Of a split: no count beyond it is one."""

_ACROSS = 4
_DIAGRAM, _STRIP = 2.0, 0.5
_GAPS = (0.72, 0.9)
_LABEL_SIGNS = 36


@dataclass(frozen=True)
class Reliability:
    """Images of a split by the largest probability of a student; bin k of 15 is (k/15, (k+1)/15].

    counts: images in each bin; confidence: the sum of their largest probabilities; correct: how many of them are
    classified rightly; runs: whose images these are, each with all of them.
    """

    counts: tuple[int, ...]
    confidence: tuple[float, ...]
    correct: tuple[int, ...]
    runs: int = 1

    @property
    def images(self) -> int:
        """Number of images, those of each run counted."""
        return sum(self.counts)

    @property
    def ece(self) -> float:
        """The expected calibration error, from 0 to 1."""
        gaps = (abs(right - sure) for right, sure in zip(self.correct, self.confidence, strict=True))
        return math.fsum(gaps) / self.images


def reliability_of(run: Run, split: str) -> Reliability | None:
    """What a finished run says of "val" or "test"; None where it says nothing, or what cannot have been counted."""
    content: Any = run.content if run.done else None
    for name in ("reliability", split):
        content = content.get(name) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        return None
    columns = [content.get(name) for name in ("counts", "confidence", "correct")]
    if not all(isinstance(column, list) and len(column) == BINS for column in columns):
        return None
    values = [[number(value) for value in column] for column in columns]
    if any(value is None or not 0 <= value <= MOST_IMAGES for column in values for value in column):
        return None
    counts, confidence, correct = values
    if not all(value.is_integer() for value in counts + correct) or not sum(counts):
        return None
    # A sum in float32 can lie a little beyond the number of its terms.
    if any(right > n or sure > n * 1.001 for n, sure, right in zip(counts, confidence, correct, strict=True)):
        return None
    return Reliability(tuple(map(int, counts)), tuple(confidence), tuple(map(int, correct)))


def pool(some: Iterable[Reliability]) -> Reliability | None:
    """All images of several runs together; None of no run."""
    some = list(some)
    if not some:
        return None
    return Reliability(
        tuple(map(sum, zip(*(one.counts for one in some), strict=True))),
        tuple(map(math.fsum, zip(*(one.confidence for one in some), strict=True))),
        tuple(map(sum, zip(*(one.correct for one in some), strict=True))),
        sum(one.runs for one in some),
    )


def draw_reliability(table: Table) -> Figure | None:
    """The diagrams of the test split for a few rows of each column; None where no run says anything.

    Where no run says anything of test, those of val.
    """
    for split in ("test", "val"):
        panels, sentences = _panels(table, split)
        if panels:
            return _draw(table, split, panels, sentences)
    return None


def _panels(table: Table, split: str) -> tuple[list[tuple[str, str, Cell, Reliability]], list[str]]:
    """Column, row, cell and images of each diagram, and what is said of those that are left out."""
    able = [index for index in range(len(table.columns)) if any(_states(row.cells[index], split) for row in table.rows)]
    panels, sentences = [], []
    shown = able[:MOST_COLUMNS]
    for index in shown:
        rows = [row for row in table.rows if _states(row.cells[index], split)]
        few = choose_rows(replace(table, rows=rows), index, max(2, MOST_PANELS // len(shown)))
        title = table.columns[index].title
        found = [(title, row.label, row.cells[index], _pooled(row.cells[index], split)) for row in few]
        panels += [panel for panel in found if panel[-1] is not None]
        if sentence := about_rows(len(few), len(rows)):
            sentences.append(f"{clean(title)}: {sentence}" if len(shown) > 1 else sentence)
    if len(shown) < len(able):
        sentences.append(f"the first {len(shown)} of {len(able)} columns")
    return panels, sentences


def _states(cell: Cell, split: str) -> bool:
    """Whether any run of a cell says something of a split, whatever that may be."""
    runs = cell.group.runs.values() if cell.group is not None else ()
    told = (run.content.get("reliability") for run in runs)
    return any(isinstance(one, dict) and isinstance(one.get(split), dict) for one in told)


def _pooled(cell: Cell, split: str) -> Reliability | None:
    """The images of all seeds of a cell."""
    found = (reliability_of(run, split) for _, run in sorted(cell.group.runs.items()))
    return pool(one for one in found if one is not None)


def _draw(
    table: Table, split: str, panels: list[tuple[str, str, Cell, Reliability]], sentences: Sequence[str]
) -> Figure:
    """The figure of some diagrams."""
    across = min(_ACROSS, len(panels))
    down = -(-len(panels) // across)
    width = max(across * (_DIAGRAM + _GAPS[0]) + 0.25, 4.6)
    height = _DIAGRAM + 0.08 + _STRIP + _GAPS[1]
    signs = int((width - 0.4) / 0.0585)
    columns = list(dict.fromkeys(title for title, *_ in panels))
    words = [wrap(f"{split} split, {columns[0]}", signs, 2)] if len(columns) == 1 else [f"{split} split"]
    caption = [
        wrap(text, signs, 4)
        for text in (
            "bars: accuracy in a bin, all seeds together; hatched: the gap to the mean confidence; dashed: perfect "
            "calibration; below: share of the images; ECE over 15 bins of all images together, in brackets the mean of "
            "the seeds' own; n counts an image once a seed",
            *sentences,
        )
    ]
    lines = [text.count("\n") + 1 for text in caption]
    top = 0.42 + 0.16 * (words[0].count("\n") + 1) + 0.12
    figure = new_figure(width, top + down * height + 0.15 * sum(lines) + 0.12)
    add_text(figure, 0.2, 0.12, f"{clean(table.study, 60)}: reliability", fontsize=11, color=DARK)
    add_text(figure, 0.2, 0.42, words[0], fontsize=8.5, color=DARK)
    for place, (title, label, cell, pooled) in enumerate(panels):
        left = _GAPS[0] - 0.12 + (place % across) * (_DIAGRAM + _GAPS[0])
        panel_top = top + (place // across) * height
        name = label if len(columns) == 1 else f"{label}, {title}"
        add_text(figure, left, panel_top + 0.36, wrap(name, _LABEL_SIGNS, 2), va="bottom", color=DARK, fontsize=7)
        diagram = add_axes(figure, left, panel_top + 0.42, _DIAGRAM, _DIAGRAM)
        strip = add_axes(figure, left, panel_top + 0.5 + _DIAGRAM, _DIAGRAM, _STRIP)
        _diagram(diagram, strip, pooled, _mean_ece(cell, split), first=place % across == 0)
    top += down * height
    for text, more in zip(caption, lines, strict=True):
        add_text(figure, 0.2, top, text)
        top += 0.15 * more
    return figure


def _mean_ece(cell: Cell, split: str) -> float | None:
    """The mean over the seeds of the ECE that those runs state whose bins are drawn."""
    drawn = (run for _, run in sorted(cell.group.runs.items()) if reliability_of(run, split) is not None)
    found = (run.metric(f"{split}/ece") for run in drawn)
    summary = summarise(value for value in found if value is not None)
    return summary and summary.mean


def _diagram(diagram: Any, strip: Any, pooled: Reliability, mean_ece: float | None, *, first: bool) -> None:
    """Draw one diagram and the strip below it."""
    edges = [place / BINS for place in range(BINS + 1)]
    filled = [place for place in range(BINS) if pooled.counts[place]]
    lefts = [edges[place] for place in filled]
    accuracy = [pooled.correct[place] / pooled.counts[place] for place in filled]
    confidence = [min(pooled.confidence[place] / pooled.counts[place], 1.0) for place in filled]
    diagram.bar(
        lefts, accuracy, 1 / BINS, align="edge", color=STYLES[0][0], edgecolor="#ffffff", linewidth=0.5, zorder=2
    )
    diagram.bar(
        lefts,
        [sure - right for sure, right in zip(confidence, accuracy, strict=True)],
        1 / BINS,
        bottom=accuracy,
        align="edge",
        facecolor="none",
        edgecolor=STYLES[1][0],
        hatch="/////",
        linewidth=0.6,
        zorder=3,
    )
    diagram.plot([0, 1], [0, 1], color="#000000", linestyle="--", linewidth=0.9, zorder=4)
    mean = "" if mean_ece is None else f" ({mean_ece:.4f})"
    diagram.text(
        0.03,
        0.97,
        f"ECE {pooled.ece:.4f}{mean}\nn={pooled.images:,}, {pooled.runs} seed{'s' * (pooled.runs > 1)}",
        transform=diagram.transAxes,
        ha="left",
        va="top",
        fontsize=7,
        color=DARK,
        bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
        zorder=5,
    )
    shares = [pooled.counts[place] / pooled.images for place in filled]
    strip.bar(lefts, shares, 1 / BINS, align="edge", color=GREY, edgecolor="#ffffff", linewidth=0.5, zorder=2)
    for axes in (diagram, strip):
        axes.set_xlim(0, 1)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LIGHT, linewidth=0.5)
        axes.set_axisbelow(True)
    diagram.set_ylim(0, 1)
    ticks, names = [0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"]
    diagram.set_xticks(ticks, [])
    diagram.set_yticks(ticks, names)
    strip.set_xticks(ticks, names)
    strip.set_ylim(0, max(shares) * 1.08)
    strip.set_yticks([max(shares)], [f"{max(shares):.0%}"])
    strip.set_xlabel("confidence", fontsize=7.5, labelpad=2)
    if first:
        diagram.set_ylabel("accuracy", fontsize=7.5)
        strip.set_ylabel("images", fontsize=7.5)
