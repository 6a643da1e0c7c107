"""What the runs of a table did epoch by epoch: their `metrics.jsonl`, and its means over seeds.

A history is a file that somebody else wrote, and is read as `vkd.records.reading` reads a result: nothing in it is
trusted to be small, whole or a number.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkd.records.grouping import Row, Table
from vkd.records.reading import LARGEST_FIGURE, MOST_DIGITS, Damaged, clean, number
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
    data = _read_bytes(directory / FILE_NAME)
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


def _read_bytes(path: Path) -> bytes:
    """Content of a plain file of reasonable size; nothing where there is none. Raises Damaged."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise Damaged(f"{FILE_NAME} is no plain file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name is none"
        raise Damaged(f"{FILE_NAME} cannot be read: {reason}") from None
    if len(data) > MOST_BYTES:
        raise Damaged(f"{FILE_NAME} is larger than {MOST_BYTES // 2**20} MiB")
    return data


def _read_line(text: bytes, place: int) -> dict[str, float]:
    """The numbers in a line. Raises Damaged."""
    if len(text) > MOST_LINE_BYTES:
        raise Damaged(f"line {place} of {FILE_NAME} is larger than {MOST_LINE_BYTES // 2**10} KiB")
    try:
        content = json.loads(
            text, object_pairs_hook=_without_twins, parse_int=_whole, parse_float=_finite, parse_constant=_finite
        )
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


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of JSON with these entries. Raises ValueError for a key that is there twice: readers differ on it."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is there twice")
    return content


def _whole(text: str) -> int:
    """An integer of JSON. Raises ValueError where it is endless."""
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    """A number of JSON. Raises ValueError for NaN and infinity, which JSON has not and vkd never writes."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{clean(text, 20)} is no number of JSON")
    return value
