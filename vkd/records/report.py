"""The report of a study: one HTML page with its question, table, maps, curves, figures, failures, machines and runs.

The page needs no network and no second file. Everything is there to read without JavaScript; with it the table sorts,
maps and lines say which run they show, curves can be of other metrics, and commands can be copied. Whatever comes from
a run is somebody else's text: it is escaped by the template and kept out of scripts, and the page's own policy lets no
script run but the one that belongs to it, and nothing be fetched. The same runs give the same bytes.

jinja2 is imported when a report is written, so that reading and tables start without it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from vkd.errors import ConfigError
from vkd.records.alpha_beta import NAMED, Grid, GridPoint, grids_of
from vkd.records.commands import command_of, train_command
from vkd.records.grouping import SELECTION, Row, Table, show
from vkd.records.histories import Curve, curves_of, read_history
from vkd.records.plot_styles import choose_rows
from vkd.records.reading import Damaged, Run, clean
from vkd.records.results import ANALYSES
from vkd.records.statistics import Summary
from vkd.records.sweep_index import FILE_NAME, FOLDER, read_sweep
from vkd.records.tables import about_protocol, decimals, describe_hole, grid, holes, metric_title, notes, ours_width

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_PAGE_BYTES = 8 * 2**20
MOST_ROWS = 2_000
"""Of the table; also its cells, over all columns."""
MOST_RUNS = 2_000
"""Whose commands are listed."""
MOST_LINES = 500
"""Runs that a plot of parallel coordinates shows."""
MOST_POINTS = 1_000
"""Of all maps of the page."""
MOST_GRIDS = 6
MOST_CURVES = 8
"""Rows whose curves are shown, of each column."""
MOST_EPOCHS = 300
"""Points of a curve: a screen shows no more."""

_SHARE = 3 * 2**19
"""Bytes that any one part of the page may take; the figures may take twice that."""
_MOST_NOTE = 4_000
_MOST_NOTES = 300
_MOST_COMMAND = 4_000
_MOST_QUESTION_BYTES = 2**18
_MOST_SVG_BYTES = 3 * 2**20
_MOST_SWEEPS = 50
_MOST_NAMED = 6
_MOST_SEEDS = 50

LEVELS = 10
"""Of the colour scale of maps and lines; the colours are in the template."""

CURVE_METRICS = ("val/top1", "test/top1", "train/loss", "test/entropy", "test/agreement")

_FIGURES = {
    "accuracy": "Every seed, every mean and the teacher",
    "alpha_beta": "The map of alpha and beta",
    "alpha_beta_line": "Along alpha + beta = 1, from reverse to forward KL",
    "curves": "Training curves",
    "reliability": "Reliability: accuracy against confidence",
    "cost": "Accuracy against what a student costs",
    "mass_step": "Where one step moves probability mass",
    "mass_training": "Where training moves probability mass",
}
"""What the static figures show, in the order of the page."""

_VERSIONS = ("vkd", "git", "torch", "timm", "python", "device")
_INLINE = re.compile(r"`([^`\n]+)`|\*\*([^*\n]+)\*\*|\[([^\]\n]*)\]\([^()\n]*\)")
_T = TypeVar("_T")


class Piece(NamedTuple):
    """A part of a sentence: plain "text", "code" or "strong"."""

    kind: str
    text: str


class Text(NamedTuple):
    """A cell of the table: what `table.md` has there, what it is sorted by (None for a hole), and its marks."""

    text: str
    value: float | None = None
    is_number: bool = False
    mark: str = ""


def to_html(table: Table, *, runs_root: Path, folder: Path, figures: Mapping[str, bytes]) -> str:
    """The whole of `report.html`, at most `MOST_PAGE_BYTES` long; what is beyond is left out, and the page says so.

    Args:
        table: the study's.
        runs_root: below which `Run.path` leads to a run.
        folder: of the study's results. Plots of `vkd.analyze` are taken from it, and the study's question from
            `experiments/STUDY/README.md` beside the folder of all results, where these are.
        figures: static figures as SVG, by name.
    """
    runs = _runs(table)
    seen = grids_of(table)
    environment = _environment()
    analysis = _analysis(folder, {run.fingerprint for run in runs.values() if run.done})
    shown, more_figures = _figures(figures, analysis or {})
    maps = _maps(table, seen)
    context = {
        "study": table.study,
        "title": f"{table.study}: {metric_title(table.metric)}",
        "command": table.command,
        "question": _question(table, folder),
        "facts": _facts(table, runs),
        "protocol": [_pieces(line) for line in about_protocol(table)[:_MOST_NOTES]],
        "table": _table(table),
        "notes": _said(notes(table)),
        "maps": maps,
        "lines": [one for one in (_parallel(table, each) for each in seen[:MOST_GRIDS]) if one],
        "more_grids": max(0, len(seen) - len(maps)),
        "curves": _curves(table, runs_root),
        "figures": shown,
        "more_figures": more_figures,
        "stale_analysis": analysis is None,
        "holes": _said(holes(table), MOST_RUNS),
        "machines": _machines(runs),
        "runs": _listed_runs(table, runs, runs_root),
        "levels": range(LEVELS),
        "left_out": [],
    }
    template = environment.get_template("report.html.jinja")
    html = template.render(context)
    for name in ("figures", "lines", "maps", "curves"):  # none is over its share unless runs have strange names
        if len(html.encode()) <= MOST_PAGE_BYTES:
            break
        context["left_out"].append(name)
        html = template.render(context | {left: [] for left in context["left_out"]})
    return html


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """jinja2 with every expression escaped, and a name that is not there an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["readable"] = _readable
    environment.filters["policy_hash"] = _policy_hash
    return environment


def _readable(text: str) -> str:
    """`text` as HTML shows it: an arrow that no line ends in, and no backslash before a dollar sign for Markdown."""
    return text.replace("\\$", "$").replace(" -> ", " \N{RIGHTWARDS ARROW} ")


def _policy_hash(text: str) -> str:
    """The hash by which a Content-Security-Policy knows a script or a style sheet."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()}'"


def _pieces(text: str) -> list[Piece]:
    """The parts of a line of Markdown: code spans, bold words, and of links their words alone."""
    found, end = [], 0
    for match in _INLINE.finditer(text):
        code, strong, link = match.groups()
        found.append(Piece("text", text[end : match.start()]))
        if code is not None:
            found.append(Piece("code", code))
        else:
            found.append(Piece("text", link) if strong is None else Piece("strong", strong))
        end = match.end()
    found.append(Piece("text", text[end:]))
    return [Piece(kind, _readable(part)) for kind, part in found if part]


def _within(items: Iterable[_T], size: Callable[[_T], int], most: int, most_bytes: int = _SHARE) -> list[_T]:
    """The first `most` items at most whose sizes add up to no more than `most_bytes`; the others are not asked for."""
    kept, total = [], 0
    for item in islice(items, most):
        total += size(item)
        if total > most_bytes:
            break
        kept.append(item)
    return kept


def _escaped_size(text: str) -> int:
    """Bytes of a text in the page, where `&` and quotes take five."""
    return len(text.encode()) + 4 * sum(text.count(sign) for sign in "&<>\"'")


def _said(lines: Sequence[str], most: int = _MOST_NOTES) -> dict[str, Any]:
    """Sentences in their pieces, each cut to a readable length, and how many are left out."""
    cut = (line if len(line) <= _MOST_NOTE else f"{line[:_MOST_NOTE]}... (in full in table.md)" for line in lines)
    kept = _within(cut, lambda line: _escaped_size(line) + 60, most, _SHARE // 2)
    return {"lines": [_pieces(line) for line in kept], "more": len(lines) - len(kept)}


def _question(table: Table, folder: Path) -> dict[str, Any]:
    """Title and question of the study's page in the lab notebook; empty where it has none."""
    parts = Path(table.study).parts
    root = folder.absolute()
    if root.parts[-len(parts) :] != parts:
        return {"title": "", "paragraphs": []}
    for _ in range(len(parts) + 1):
        root = root.parent
    data = _read_plain_file(root.joinpath("experiments", *parts, "README.md"), _MOST_QUESTION_BYTES)
    blocks = re.split(r"\n\s*\n", (data or b"").decode("utf-8", errors="replace").replace("\r", ""))
    blocks = [" ".join(_one_line(block).split()) for block in blocks if block.strip()]
    title = next((block.lstrip("# ") for block in blocks if block.startswith("# ")), "")
    prose = [block for block in blocks if not block.startswith(("#", "|", "```"))]
    named = [block for block in prose if block.startswith(("**Question", "**Setting"))]
    return {
        "title": _pieces(title[:300]),
        "paragraphs": [_pieces(block[:_MOST_NOTE]) for block in (named or prose[:1])],
    }


def _one_line(text: str) -> str:
    """`text` with a space for whatever cannot be printed."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _read_plain_file(path: Path, most: int) -> bytes | None:
    """Content of a plain file; None where there is none that can be read or it is larger than `most`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            return None
        with path.open("rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError):
        return None
    return data if len(data) <= most else None


def _runs(table: Table) -> dict[str, Run]:
    """Every run of the table by its path, in the order of paths, whatever became of it."""
    found: dict[str, Run] = {}
    for row in table.rows:
        for cell in row.cells:
            if cell.group is not None:
                found |= {run.path: run for run in (*cell.group.runs.values(), *cell.group.holes)}
    for hole in table.unplaced:
        if hole.path:
            found.setdefault(hole.path, Run(hole.path, hole.reason.partition(":")[0], hole.reason.partition(": ")[2]))
    return dict(sorted(found.items()))


def _facts(table: Table, runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """What stands at the head of the page: how many runs, rows and holes there are."""
    done = sum(run.done for run in runs.values())
    teachers = [
        f"{teacher.summary.mean:.2f} %" + (f" ({column.title})" if len(table.columns) > 1 else "")
        for column, teacher in zip(table.columns, table.teachers, strict=True)
        if teacher is not None
    ]
    facts = [("runs", f"{done:,} of {len(runs):,} done"), ("rows", f"{len(table.rows):,}")]
    facts.append(("columns", f"{len(table.columns):,}"))
    if teachers:
        facts.append(("teacher", teachers[0] if len(teachers) == 1 else f"{len(teachers)} teachers, see the table"))
    return [(name, _readable(value)) for name, value in facts]


def _table(table: Table) -> dict[str, Any]:
    """Header and lines of `table.md` with what each is sorted by, and how many lines are left out.

    Left out are rows at the end, but for those that are marked as the best or the choice.
    """
    header, body = grid(table)
    first = 4 + any(row.variant for row in table.rows)
    has_teachers = int(any(table.teachers))
    shown = [table.has_published(index) for index in range(len(table.columns))]
    groups = []
    start = first
    for column, has_published in zip(table.columns, shown, strict=True):
        width = ours_width(table) + 2 * has_published
        titles = [metric_title(table.metric), *header[start + 1 : start + width]]
        groups.append({"title": _readable(column.title), "titles": titles})
        start += width
    lines = body[has_teachers : has_teachers + len(table.rows)]
    marked = [any(cell.best or cell.chosen for cell in row.cells) for row in table.rows]
    order = sorted(range(len(lines)), key=lambda place: (not marked[place], place))
    kept = _within(
        order,
        lambda place: 120 + sum(55 + _escaped_size(text) for text in lines[place]),
        max(1, MOST_ROWS // max(1, len(table.columns))),
    )
    published = body[has_teachers + len(table.rows) :]
    kept_published = _within(
        published, lambda line: 120 + sum(30 + _escaped_size(text) for text in line), 200, _SHARE // 4
    )
    return {
        "names": header[:first],
        "columns": groups,
        "teachers": body[:has_teachers],
        "has_marks": any(marked),
        "rows": [_line(table.rows[place], lines[place], first, shown, bool(table.baseline)) for place in sorted(kept)],
        "published": kept_published,
        "more": len(lines) - len(kept) + len(published) - len(kept_published),
    }


def _line(row: Row, texts: list[str], first: int, shown: list[bool], has_baseline: bool) -> list[Text]:
    """The cells of a row of the table.

    Args:
        texts: of its line; first: place of the first column of the table among them.
        shown: whether a column has published figures.
        has_baseline: whether a column has a difference to another baseline than plain students.
    """
    key = row.key
    cells = [Text(texts[0]), Text(texts[1]), Text(texts[2], key.alpha, True), Text(texts[3], key.beta, True)]
    cells += [Text(_readable(text)) for text in texts[4:first]]
    start = first
    for cell, has_published in zip(row.cells, shown, strict=True):
        values = [cell.summary and cell.summary.mean, cell.to_plain and cell.to_plain.mean]
        values += [cell.to_baseline and cell.to_baseline.mean] if has_baseline else []
        if has_published:
            first_published = cell.published[0] if cell.published else None
            values += [first_published and first_published.top1, first_published and first_published.difference]
        marks = ["chosen" if cell.chosen else "best" if cell.best else ""] + [""] * (len(values) - 1)
        for place, (value, mark) in enumerate(zip(values, marks, strict=True)):
            cells.append(Text(texts[start + place], value, True, mark))
        start += len(values)
    return cells


def _spread(summary: Summary | None, metric: str) -> str:
    """Mean, standard deviation and number of runs of a metric."""
    if summary is None:
        return "no run"
    digits = decimals(metric)
    std = "" if summary.std is None else f" ± {summary.std:.{digits}f}"
    return f"{summary.mean:.{digits}f}{std}, n = {summary.n}"


def _level(value: float, low: float, high: float) -> int:
    """The level of the colour scale that `value` has between `low` and `high`."""
    return min(LEVELS - 1, int((value - low) / (high - low) * LEVELS)) if high > low else LEVELS - 1


def _maps(table: Table, seen: Sequence[Grid]) -> list[dict[str, Any]]:
    """The maps of the grids: for each the panels of val and of the table's metric, and the same as a list."""
    found, left = [], MOST_POINTS
    for one in seen[:MOST_GRIDS]:
        if len(one.points) > left:
            break
        left -= len(one.points)
        metrics = list(dict.fromkeys((SELECTION, table.metric)))
        layout = _Layout(one)
        points = [_described(point, metrics) for point in one.points]
        found.append(
            {
                "title": _readable(one.title),
                "panels": [_panel(one, layout, metric, points) for metric in metrics],
                "layout": layout,
                "metrics": [metric_title(metric) for metric in metrics],
                "points": points,
                "named": [f"{name} ({show(alpha)}, {show(beta)})" for (alpha, beta), name in layout.named.items()],
                "neighbours": _neighbours(one),
                "n": _counts(one),
            }
        )
    return found


class _Layout:
    """Where the points of a grid lie in the picture, in pixels.

    Points of the regular part are cells of one size, whose centres are as far apart whatever alpha and beta are; the
    ticks have the true values. What lies outside is placed between or beyond these ticks. Where no part is regular the
    axes are linear.

    Args:
        one: the grid.
    """

    LEFT, RIGHT, TOP, BOTTOM = 54.0, 10.0, 8.0, 46.0
    BEYOND = 1.6
    """Cells beyond the axes to which points that lie further away are moved; the ticks have their values."""

    def __init__(self, one: Grid) -> None:
        self.alphas = one.alphas or _evenly([point.alpha for point in one.points])
        self.betas = one.betas or _evenly([point.beta for point in one.points])
        spots = [self._spot(point.alpha, point.beta) for point in one.points]
        self._low = [min([-0.5, *(spot[axis] - 0.5 for spot in spots)]) for axis in (0, 1)]
        ends = (len(self.alphas), len(self.betas))
        high = [max([ends[axis] - 0.5, *(spot[axis] + 0.5 for spot in spots)]) for axis in (0, 1)]
        spans = [high[axis] - self._low[axis] for axis in (0, 1)]
        self.cell_width = max(13.0, min(82.0, 440 / spans[0]))
        self.cell_height = max(13.0, min(46.0, 340 / spans[1]))
        self.width = self.LEFT + spans[0] * self.cell_width + self.RIGHT
        self.height = self.TOP + spans[1] * self.cell_height + self.BOTTOM
        self.has_numbers = self.cell_width >= 42 and self.cell_height >= 24
        self.named = {
            point: name
            for point, name in NAMED.items()
            if all(
                self._low[axis] <= _index(point[axis], values) <= high[axis]
                for axis, values in enumerate((self.alphas, self.betas))
            )
        }
        self.alpha_ticks = self._ticks([point.alpha for point in one.points], 0)
        self.beta_ticks = self._ticks([point.beta for point in one.points], 1)

    def _spot(self, alpha: float, beta: float) -> tuple[float, float]:
        """alpha and beta in cells from the centre of the first one, kept near the axes."""
        x, y = (
            max(-self.BEYOND, min(len(values) - 1 + self.BEYOND, _index(value, values)))
            for value, values in ((alpha, self.alphas), (beta, self.betas))
        )
        return x, y

    def centre(self, alpha: float, beta: float) -> tuple[float, float]:
        """Where (alpha, beta) lies; beta grows upwards."""
        x, y = self._spot(alpha, beta)
        across = self.LEFT + (x - self._low[0]) * self.cell_width
        return across, self.height - self.BOTTOM - (y - self._low[1]) * self.cell_height

    def _ticks(self, values: Iterable[float], axis: int) -> list[tuple[float, str]]:
        """Places and labels of an axis, those of the regular part first, none on top of another."""
        axes, values = (self.alphas, self.betas), set(values)
        found: list[tuple[float, str]] = []
        for value in sorted(values, key=lambda value: (value not in axes[axis], value)):
            label = show(value)
            place = self.centre(value, self.betas[0])[0] if axis == 0 else self.centre(self.alphas[0], value)[1]
            room = 7.0 * len(label) + 4 if axis == 0 else 12.0
            if all(abs(place - other) >= room for other, _ in found):
                found.append((place, label))
        return sorted(found)


def _evenly(values: Sequence[float]) -> list[float]:
    """As many evenly spaced values as there are different ones (at most 12), from the least to the largest."""
    low, high, count = min(values), max(values), min(12, len(set(values)))
    return [low + (high - low) * place / (count - 1) for place in range(count)] if count > 1 else [low]


def _index(value: float, values: Sequence[float]) -> float:
    """Where `value` lies among ascending `values`, as a place in the list that need not be whole nor inside."""
    if len(values) == 1:
        return (value - values[0]) / (abs(values[0]) or 1.0)
    after = next((place for place, other in enumerate(values) if other >= value), len(values) - 1)
    after = max(1, after)
    low, high = values[after - 1], values[after]
    return after - 1 + (value - low) / (high - low)


def _panel(one: Grid, layout: _Layout, metric: str, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is drawn of a grid for one metric: the points with their colours, and the ends of the colour scale."""
    means = [summary.mean for point in one.points if (summary := _summary(point, metric))]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    digits = decimals(metric)
    cells = {(point.alpha, point.beta) for point in one.points if point.is_alpha_beta}
    shared = cells & {(point.alpha, point.beta) for point in one.points if not point.is_alpha_beta}
    marks = []
    for number, (point, described) in enumerate(zip(one.points, points, strict=True)):
        x, y = layout.centre(point.alpha, point.beta)
        summary = _summary(point, metric)
        is_cell = point.is_alpha_beta and one.is_regular(point)
        is_small = not point.is_alpha_beta and (point.alpha, point.beta) in cells
        scale = 1.0 if is_cell else 0.9
        width, height = layout.cell_width * scale, layout.cell_height * scale
        if is_small:  # in a corner of the mark of abkd at the same place
            x, y = x + layout.cell_width / 2, y - layout.cell_height / 2
            width = height = max(8.0, min(17.0, 0.4 * layout.cell_width, 0.4 * layout.cell_height))
            x, y = x - width / 2 - 2, y + height / 2 + 2
        is_shared = (point.alpha, point.beta) in shared and not is_small
        expected, n = point.cell.expected, 0 if summary is None else summary.n
        marks.append(
            {
                "number": number,
                "left": x - width / 2,
                "top": y - height / 2,
                "x": x,
                "y": y,
                "width": width,
                "height": height,
                "is_cell": is_cell,
                "level": None if summary is None else _level(summary.mean, low, high),
                "text": f"{summary.mean:.{digits}f}" if summary and layout.has_numbers and not is_small else "",
                "below": f"{n} of {expected}" if n < expected and layout.has_numbers and not is_small else "",
                "above": point.name if _fits(point.name, width) and layout.has_numbers and not is_small else "",
                "is_shared": is_shared,
                "chosen": point.chosen,
                "title": "\n".join(described["lines"]),
            }
        )
    shown = {(point.alpha, point.beta) for point in one.points if _fits(point.name, layout.cell_width * 0.9)}
    shown = shown if layout.has_numbers else set()
    occupied = {(point.alpha, point.beta) for point in one.points}
    return {
        "title": metric_title(metric),
        "marks": marks,
        "names": [
            _name_of_place(name, place, layout, marks, occupied)
            for place, name in layout.named.items()
            if place not in shown
        ],
        "low": f"{low:.{digits}f}" if means else "",
        "high": f"{high:.{digits}f}" if means else "",
    }


def _name_of_place(
    name: str,
    place: tuple[float, float],
    layout: _Layout,
    marks: Sequence[Mapping[str, Any]],
    occupied: set[tuple[float, float]],
) -> dict[str, Any]:
    """A divergence's name at its place in a panel; a sign alone where a point has that place or one lies near."""
    x, y = layout.centre(*place)
    radius = max(2.0, min(5.0, layout.cell_height / 7))
    if place in occupied:  # in the corner, beside the number
        x, y = x - layout.cell_width / 2 + radius + 2, y - layout.cell_height / 2 + radius + 2
    near = (
        abs(x - mark["x"]) <= mark["width"] / 2 + 30 and abs(y - mark["y"]) <= mark["height"] / 2 + 14 for mark in marks
    )
    title = f"{name}: alpha {show(place[0])}, beta {show(place[1])}"
    return {"x": x, "y": y, "radius": radius, "name": name, "title": title, "is_free": not any(near)}


def _fits(name: str, width: float) -> bool:
    """Whether a name in small letters is no wider than a cell."""
    return 5.2 * len(name) <= width


def _summary(point: GridPoint, metric: str) -> Summary | None:
    """The summary of a point's runs, of val/top1 or of the table's metric."""
    return point.val if metric == SELECTION else point.value


def _described(point: GridPoint, metrics: Sequence[str]) -> dict[str, Any]:
    """All that is known of a point of a grid, in lines and in parts."""
    group = point.cell.group
    runs = sorted(group.runs.items()) if group is not None else []
    reasons = [_readable(describe_hole(hole).replace("`", "")) for hole in point.holes[:_MOST_NAMED]]
    values = [_spread(_summary(point, metric), metric) for metric in metrics]
    seeds = ", ".join(str(seed) for seed, _ in runs[:20]) + ", ..." * (len(runs) > 20)
    label = _readable(f"{point.row.label} {point.name}".rstrip())
    lines = [f"alpha {show(point.alpha)}, beta {show(point.beta)}: {label}{', chosen by val' * point.chosen}"]
    lines += [f"{metric_title(metric)}: {value}" for metric, value in zip(metrics, values, strict=True)]
    lines += [f"seed{'s' * (len(runs) > 1)} {seeds}"] if runs else []
    lines += [_readable(run.path) for _, run in runs[:_MOST_NAMED]]
    lines += [f"and {len(runs) - _MOST_NAMED:,} more"] if len(runs) > _MOST_NAMED else []
    lines += [f"hole: {reason}" for reason in reasons]
    return {
        "label": label,
        "alpha": show(point.alpha),
        "beta": show(point.beta),
        "values": values,
        "seeds": seeds or "-",
        "holes": "; ".join(reasons) or "-",
        "chosen": point.chosen,
        "lines": lines,
    }


def _neighbours(one: Grid) -> str:
    """How the val accuracy next to the chosen point spreads; empty where it has no neighbours."""
    chosen = one.chosen
    means = [point.val.mean for point in one.neighbours(chosen) if point.val] if chosen else []
    if not means:
        return ""
    low, high, digits = min(means), max(means), decimals(SELECTION)
    return (
        f"Next to the chosen point {_readable(chosen.label)}, which has {metric_title(SELECTION)} "
        f"{_spread(chosen.val, SELECTION)}, {len(means)} point{'s have' if len(means) > 1 else ' has'} "
        f"{low:.{digits}f} to {high:.{digits}f}."
    )


def _counts(one: Grid) -> str:
    """The numbers of runs that points without a hole are means over: "3", or "2 to 3"; empty where there are none."""
    whole = {len(point.cell.values) for point in one.points if len(point.cell.values) == point.cell.expected} - {0}
    return "" if not whole else f"{min(whole)}" if len(whole) == 1 else f"{min(whole)} to {max(whole)}"


def _parallel(table: Table, one: Grid) -> dict[str, Any] | None:
    """Parallel coordinates of a grid's runs: alpha, beta, val top-1, test top-1; None where no run has all of them.

    Of more than `MOST_LINES` runs those with the best val top-1 are shown.
    """
    metrics = list(dict.fromkeys((SELECTION, "test/top1", table.metric)))
    values: list[tuple[GridPoint, Run, list[float]]] = []
    for point in one.points:
        for run in point.cell.group.runs.values() if point.cell.group is not None else ():
            measured = [run.metric(metric) for metric in metrics]
            if None not in measured:
                values.append((point, run, [point.alpha, point.beta, *measured]))
    if not values:
        return None
    values.sort(key=lambda entry: (entry[2][2], entry[1].path))
    shown = values[-MOST_LINES:]
    axes = []
    left, right, top, bottom = 40.0, 540.0, 34.0, 250.0
    for number, title in enumerate(["alpha", "beta", *map(metric_title, metrics)]):
        held = [entry[2][number] for entry in shown]
        low, high = min(held), max(held)
        digits = decimals(metrics[number - 2])
        labels = [show(low), show(high)] if number < 2 else [f"{low:.{digits}f}", f"{high:.{digits}f}"]
        x = left + (right - left) * number / (len(metrics) + 1)
        axes.append({"title": title, "x": x, "low": low, "high": high, "labels": labels})
    lines = []
    for point, run, held in shown:
        heights = [
            bottom
            - (bottom - top)
            * ((value - axis["low"]) / (axis["high"] - axis["low"]) if axis["high"] > axis["low"] else 0.5)
            for value, axis in zip(held, axes, strict=True)
        ]
        words = [
            f"{metric_title(metric)} {value:.{decimals(metric)}f}"
            for metric, value in zip(metrics, held[2:], strict=True)
        ]
        head = f"alpha {show(point.alpha)}, beta {show(point.beta)}, seed {run.seed}"
        lines.append(
            {
                "path": " ".join(f"{axis['x']:.1f},{y:.1f}" for axis, y in zip(axes, heights, strict=True)),
                "level": _level(held[2], axes[2]["low"], axes[2]["high"]),
                "title": "\n".join([head, _readable(point.row.label), *words, _readable(run.path)]),
            }
        )
    return {
        "title": _readable(one.title),
        "axes": axes,
        "lines": lines,
        "top": top,
        "bottom": bottom,
        "more": len(values) - len(shown),
        "coloured_by": metric_title(SELECTION),
    }


def _curves(table: Table, runs_root: Path) -> list[dict[str, Any]]:
    """The curves of the main rows of each column, as the page's script draws them, metric by metric."""
    found = []
    for index, column in enumerate(table.columns[:MOST_GRIDS]):
        rows = choose_rows(table, index, MOST_CURVES)
        histories, unread = _histories(rows, index, runs_root)
        places = {id(row): place for place, row in enumerate(rows)}
        few = replace(table, rows=rows)
        metrics = []
        for metric in CURVE_METRICS:
            curves = curves_of(few, index, metric, histories)
            if curves:
                series = [_series(curve, places[id(curve.row)]) for curve in curves]
                metrics.append({"title": _curve_title(metric), "digits": decimals(metric), "series": series})
        if metrics:
            labels = [_readable(row.label) for row in rows]
            total = sum(bool(row.cells[index].values) for row in table.rows)
            found.append(
                {
                    "title": _readable(column.title),
                    "labels": labels,
                    "metrics": metrics,
                    "rows": total,
                    "unread": unread,
                }
            )
    return found


def _curve_title(metric: str) -> str:
    """The axis of a curve's metric, with its unit."""
    return "train loss (nats, weighted sum of all terms)" if metric == "train/loss" else metric_title(metric)


def _histories(rows: Sequence[Row], index: int, runs_root: Path) -> tuple[dict[str, list[dict[str, float]]], list[str]]:
    """The histories of the rows' runs by their paths, and why others are left out."""
    found, unread = {}, []
    for row in rows:
        group = row.cells[index].group
        for _, run in sorted(group.runs.items())[:_MOST_SEEDS] if group is not None else ():
            if ".." not in Path(run.path).parts and not Path(run.path).is_absolute():
                try:
                    found[run.path] = read_history(runs_root / run.path)
                except Damaged as error:
                    unread.append(f"{run.path}: {clean(str(error))}")
    return found, unread


def _series(curve: Curve, row: int) -> dict[str, Any]:
    """A curve in short numbers; of more than `MOST_EPOCHS` points every second, third, ... and the last."""
    step = -(-len(curve.epochs) // MOST_EPOCHS)
    places = [place for place in range(len(curve.epochs)) if (len(curve.epochs) - 1 - place) % step == 0]
    digits = decimals(curve.metric) + 1
    return {
        "row": row,
        "epochs": [curve.epochs[place] for place in places],
        "n": [curve.n[place] for place in places],
        **{name: [round(getattr(curve, name)[place], digits) for place in places] for name in ("mean", "low", "high")},
    }


def _analysis(folder: Path, fingerprints: set[str]) -> dict[str, bytes] | None:
    """The figures of `vkd.analyze` by name; None where they are of other runs than those with these fingerprints."""
    found = {name: _read_plain_file(folder / f"{name}.svg", _MOST_SVG_BYTES) for name in ANALYSES}
    found = {name: content for name, content in found.items() if content is not None}
    if not found:
        return {}
    try:
        content = json.loads(_read_plain_file(folder / "analysis.json", _MOST_SVG_BYTES) or b"")
        analysed = {run for grid in content["grids"] for row in grid["rows"] for run in row["runs"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return found if analysed and analysed <= fingerprints else None


def _figures(figures: Mapping[str, bytes], others: Mapping[str, bytes]) -> tuple[list[dict[str, str]], list[str]]:
    """The static figures as data of the page, in its order, and the names of those for which there is no room."""
    data = {**others, **figures}
    names = [name for name in _FIGURES if name in data] + sorted(data.keys() - _FIGURES.keys())
    shown, left, room = [], [], 2 * _SHARE
    for name in names:
        encoded = base64.b64encode(data[name]).decode()
        if len(encoded) <= room:
            room -= len(encoded)
            title = _FIGURES.get(name, clean(name).replace("_", " "))
            shown.append({"name": clean(name), "title": title, "data": encoded})
        else:
            left.append(clean(name))
    return shown, left


def _machines(runs: Mapping[str, Run]) -> dict[str, Any]:
    """Versions, commits and devices of the finished runs, with the number of runs of each."""
    counts: Counter[tuple[str, ...]] = Counter()
    for run in runs.values():
        if run.done:
            words = [
                value if value != "None" else "-" for name in _VERSIONS for value in [run.environment.get(name, "-")]
            ]
            parts = (run.content["environment"].get(name) for name in ("cpu", "gpu")) if run.environment else ()
            names = [clean(str(part["name"]), 80) for part in parts if isinstance(part, dict) and part.get("name")]
            counts[(*map(_readable, words), _readable(", ".join(names)) or "-")] += 1
    lines = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    kept = _within(lines, lambda line: 80 + sum(20 + _escaped_size(text) for text in line[0]), 200, _SHARE // 4)
    return {
        "names": ["vkd", "commit", "torch", "timm", "Python", "device", "processor"],
        "lines": kept,
        "more": len(lines) - len(kept),
    }


def _listed_runs(table: Table, runs: Mapping[str, Run], runs_root: Path) -> dict[str, Any]:
    """Every run with its state, figures and command, and how many are left out."""
    metrics = list(dict.fromkeys((SELECTION, "test/top1", table.metric)))
    words = _words_of_sweeps(runs_root, {path for path, run in runs.items() if not run.done})
    kept = _within(_describe_runs(runs, metrics, words), _size_of_run, MOST_RUNS)
    titles = [metric_title(metric) for metric in metrics]
    return {"list": kept, "more": len(runs) - len(kept), "total": len(runs), "titles": titles}


def _describe_runs(
    runs: Mapping[str, Run], metrics: Sequence[str], words: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """What the page says of each run."""
    for path, run in runs.items():
        values = [(metric, run.metric(metric)) for metric in metrics]
        shown = ["-" if value is None else f"{value:.{decimals(metric)}f}" for metric, value in values]
        command = _recorded_command(run) if run.done else words.get(path)
        yield {
            "path": _readable(path),
            "state": run.state,
            "reason": _readable(run.reason),
            "values": shown if run.done else [],
            "command": command if len(command or "") <= _MOST_COMMAND else None,
        }


def _recorded_command(run: Run) -> str | None:
    """The command that a finished run recorded; None where it is none of vkd's, or too long to take apart."""
    environment = run.content.get("environment")
    recorded = environment.get("command") if isinstance(environment, dict) else None
    return command_of(run) if isinstance(recorded, str) and len(recorded) <= _MOST_COMMAND else None


def _size_of_run(run: Mapping[str, Any]) -> int:
    """Bytes of a run in the page."""
    return 250 + sum(_escaped_size(run[name] or "") for name in ("path", "reason", "command")) + 60 * len(run["values"])


def _words_of_sweeps(runs_root: Path, paths: set[str]) -> dict[str, str]:
    """The commands that the indexes of sweeps have for the runs at `paths`: one that is not done has recorded none.

    Each word is quoted anew: whoever pastes the line starts `vkd.train` and nothing else.
    """
    found: dict[str, str] = {}
    levels = {path.count("/") + 1 for path in paths}
    try:
        folders = sorted(path.parent for path in (runs_root / FOLDER).glob(f"*/{FILE_NAME}")) if paths else []
    except OSError:
        return found
    for folder in folders[:_MOST_SWEEPS]:
        try:
            jobs = read_sweep(folder / FILE_NAME).jobs
        except ConfigError:
            continue
        for job in jobs:
            parts = Path(job.directory or "").parts
            tails = {"/".join(parts[-level:]) for level in levels} & paths
            if tails and (command := train_command(job.overrides)):
                found |= dict.fromkeys(tails, command)
    return found
