"""What the runs of a table did epoch by epoch: their `metrics.jsonl`, and its means over seeds.

A history is a file that somebody else wrote, and is read as `vkd.records.reading` reads a result: nothing in it is
trusted to be small, whole or a number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vkd.records.grouping import Row, Table
from vkd.records.reading import LARGEST_FIGURE, Damaged, clean, number, read_bytes, strict_json
from vkd.records.statistics import summarise

FILE_NAME = "metrics.jsonl"
MOST_BYTES = 16 * 2**20
MOST_LINE_BYTES = 2**16
MOST_IN_LINE = 500
MOST_EPOCHS = 100_000

_NAME = re.compile(r"\w[\w./+-]{0,199}")


@dataclass(frozen=True)
class Curve:
    """A metric of one row epoch by epoch, over the seeds that state it.

    epochs: ascending, those alone at which a run states the metric; n: number of runs at each.
    mean: at each epoch; low, high: one sample standard deviation below and above it, and the mean itself for one run.
    """

    row: Row
    metric: str
    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    n: list[int]


def read_history(directory: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl` in their order; empty where there is no such file.

    A line is a dict of the metrics that are finite numbers, "epoch" (from 1, ascending from line to line) among them;
    what is null is left out.

    Raises Damaged.
    """
    lines: list[dict[str, float]] = []
    data = read_bytes(str(directory), FILE_NAME, MOST_BYTES) or b""
    for place, text in enumerate(data.splitlines(), start=1):
        if not text.strip():
            continue
        if len(lines) == MOST_EPOCHS:
            raise Damaged(f"{FILE_NAME} has more than {MOST_EPOCHS:,} lines")
        line = _read_line(text, place)
        epoch = line.get("epoch", 0.0)
        if not (epoch.is_integer() and epoch >= 1):
            raise Damaged(f"line {place} of {FILE_NAME} lacks a whole-numbered epoch from 1")
        if lines and epoch <= lines[-1]["epoch"]:
            raise Damaged(f"line {place} of {FILE_NAME} is of epoch {epoch:.0f}, which is not after the one before it")
        lines.append(line)
    return lines


def curves_of(table: Table, index: int, metric: str, histories: Mapping[str, list[dict[str, float]]]) -> list[Curve]:
    """The curve of each row that states `metric` in the column at `index`, in the order of rows.

    Args:
        table: whose finished runs are averaged as it groups them.
        index: of the column.
        metric: a name in the lines of the histories, such as "val/top1" or "train/cross_entropy".
        histories: lines of `read_history` by `Run.path`; a run that is not in it counts for nothing.
    """
    found = []
    for row in table.rows:
        group = row.cells[index].group
        values: dict[int, list[float]] = defaultdict(list)
        for _, run in sorted(group.runs.items()) if group is not None else ():
            for line in histories.get(run.path, ()):
                if metric in line:
                    values[int(line["epoch"])].append(line[metric])
        if not values:
            continue
        epochs = sorted(values)
        summaries = [summarise(values[epoch]) for epoch in epochs]
        mean = [summary.mean for summary in summaries]
        low = [summary.mean - (summary.std or 0.0) for summary in summaries]
        high = [summary.mean + (summary.std or 0.0) for summary in summaries]
        found.append(Curve(row, metric, epochs, mean, low, high, [summary.n for summary in summaries]))
    return found


def _read_line(text: bytes, place: int) -> dict[str, float]:
    """The numbers in a line. Raises Damaged."""
    if len(text) > MOST_LINE_BYTES:
        raise Damaged(f"line {place} of {FILE_NAME} is larger than {MOST_LINE_BYTES // 2**10} KiB")
    try:
        content = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"line {place} of {FILE_NAME} is not whole JSON: {clean(str(error), 120)}") from None
    if not isinstance(content, dict):
        raise Damaged(f"line {place} of {FILE_NAME} holds {type(content).__name__}, not a mapping")
    if len(content) > MOST_IN_LINE:
        raise Damaged(f"line {place} of {FILE_NAME} holds too many values")
    found = {}
    for name, value in content.items():
        if value is None:
            continue
        figure = number(value)
        if not _NAME.fullmatch(name):
            raise Damaged(f"line {place} of {FILE_NAME} has the metric {clean(repr(name), 60)}, which is no plain name")
        if figure is None or abs(figure) > LARGEST_FIGURE:
            shown = clean(repr(value), 40)
            raise Damaged(f"line {place} of {FILE_NAME} has {name} = {shown}, which can be no figure")
        found[name] = figure
    return found
