"""What all plots share: colours, markers, the rows that they show where they cannot show all, and how texts are cut.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; heat maps are in cividis, which grows evenly
lighter to every reader and on a grey printer. Whatever has a colour has a marker or a line style of its own as well.
matplotlib is imported when a figure is made, so that reading and tables start without it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vkd.records.grouping import Row, Table
from vkd.records.statistics import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN_STYLE = ("#000000", "o")
STYLES = (
    ("#0072B2", "s"),
    ("#D55E00", "^"),
    ("#009E73", "D"),
    ("#CC79A7", "v"),
    ("#E69F00", "P"),
    ("#56B4E9", "X"),
)
ROW_STYLES = (*STYLES, ("#777777", "<"), ("#8C510A", ">"))
"""Of rows, where each has its own: one more than rows are shown, plain training aside."""

COLOUR_MAP = "cividis"
DARK, GREY, LIGHT = "#222222", "#444444", "#dddddd"
MOST_SHOWN = 8
"""Rows of a column in figures that show a few."""

_DOLLAR = re.compile(r"(?<!\\)\$")
_MOST_PIXELS = 30_000


def new_figure(width: float, height: float, dots: float = 150.0) -> Figure:
    """An empty figure of so many inches and dots an inch, on matplotlib's Agg canvas and without its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=min(dots, _MOST_PIXELS / max(width, height)))
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Any:
    """Axes whose place in the figure is given in inches, `left` and `top` from its upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def add_text(figure: Figure, left: float, top: float, text: str, **settings: Any) -> Any:
    """A text whose upper left corner lies so many inches from the figure's."""
    across, down = figure.get_size_inches()
    settings = {"fontsize": 7.5, "color": GREY, "ha": "left", "va": "top", **settings}
    return figure.text(left / across, 1 - top / down, text, **settings)


def cut(text: str, most: int) -> str:
    """`text`, cut after `most` signs. It stays text: a dollar sign that stands alone begins a formula."""
    return text if len(text) <= most else _as_text(text[: most - 3]) + "..."


def wrap(text: str, width: int, most: int = 2) -> str:
    """`text` in lines of at most `width` signs, `most` of them, which stay text as well."""
    lines = textwrap.wrap(text, width, break_on_hyphens=False) or [""]
    if len(lines) > most:
        lines[most - 1 :] = [cut(" ".join(lines[most - 1 :]), width)]
    return "\n".join(map(_as_text, lines))


def _as_text(text: str) -> str:
    """A piece of a text that `clean` made, where the cut may have come between a dollar sign and its backslash."""
    return _DOLLAR.sub(r"\\$", text.rstrip("\\"))


def spread(summary: Summary, digits: int) -> str:
    """Mean and sample standard deviation, rounded: "41.20 ± 0.31"."""
    return f"{summary.mean:.{digits}f}" + ("" if summary.std is None else f" ± {summary.std:.{digits}f}")


def count(n: int, expected: int) -> str:
    """Number of runs, and of those that should be there where some are not: "n=3", "n=2 of 3"."""
    return f"n={n}" if n == expected else f"n={n} of {expected}"


def choose_rows(table: Table, index: int, most: int = MOST_SHOWN) -> list[Row]:
    """The rows of a column that a figure shows which has room for few: all with finished runs, where they are few.

    Otherwise the baselines (plain training, KD with forward and with reverse KL, and the table's own), what val/top1
    chose from a grid, and the best by mean val/top1; in the table's order. Baselines take half of the room at most.
    """
    rows = [row for row in table.rows if (group := row.cells[index].group) is not None and group.runs]
    if len(rows) <= most:
        return rows
    baselines = [row for row in rows if row.key.method == "none"]
    for divergence in ("fkld", "rkld"):
        baselines += [row for row in rows if (row.key.method, row.key.divergence) == ("kd", divergence)]
    named = [row for row in rows if table.baseline and table.baseline in (row.label, row.key.label)]
    places = {id(row): place for place, row in enumerate(rows)}

    def by_val(row: Row) -> tuple[float, int]:
        val = row.cells[index].val
        return (-round(val.mean, 9) if val else float("inf"), places[id(row)])

    chosen = sorted((row for row in rows if row.cells[index].chosen), key=by_val)
    ranked = [*(named + baselines)[: max(1, most // 2)], *chosen, *sorted(rows, key=by_val)]
    kept = {id(row): row for row in list({id(row): row for row in ranked}.values())[:most]}
    return [row for row in rows if id(row) in kept]


def row_styles(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Colour and marker of each of a few rows; the first plain student is black."""
    plain = next((row for row in rows if row.key.method == "none"), None)
    others = iter(range(len(rows)))
    return [PLAIN_STYLE if row is plain else ROW_STYLES[next(others) % len(ROW_STYLES)] for row in rows]


def about_rows(shown: int, every: int) -> str:
    """The sentence of a figure that shows fewer rows than there are; empty where it shows all."""
    if shown >= every:
        return ""
    return f"{shown} of {every} rows: baselines, what val/top1 chose from a grid, and the best by val/top1"


def luminance(colour: Sequence[float]) -> float:
    """The relative luminance of an sRGB colour, from 0 (black) to 1 (white) (WCAG 2.2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def text_colour(background: Sequence[float]) -> str:
    """Black or white, whichever has the higher contrast ratio (WCAG 2.2) to the background."""
    light = luminance(background)
    return "#000000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#ffffff"
