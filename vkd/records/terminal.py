"""The table on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from vkd.records.grouping import Table
from vkd.records.tables import grid, holes, metric_title, spans, to_markdown

MOST_HOLES = 20


def print_table(table: Table, folder: Path) -> None:
    """Show the table, whose files lie in `folder`: with rich on a terminal, as Markdown elsewhere."""
    if not sys.stdout.isatty():
        print(to_markdown(table), end="")
        return
    console = Console(highlight=False, markup=False)
    for part in to_rich(table, console.width):
        console.print(part)
    if any(other.reasons for row in table.rows for cell in row.cells for other in cell.published):
        console.print("§: does not compare with ours; the notes say why")
    found = holes(table)
    for hole in found[:MOST_HOLES]:
        console.print(f"hole: {hole}")
    if len(found) > MOST_HOLES:
        console.print(f"... and {len(found) - MOST_HOLES} more holes, all listed in {folder / 'table.md'}")
    console.print(f"notes, holes and plots: {folder}")


def to_rich(table: Table, width: int) -> list[RichTable]:
    """The table for a terminal of `width` characters: one rich table, or one for each column where that is too wide.

    Where that breaks words, what others report becomes a table of its own, with the metric beside it.
    """
    header, body = grid(table)
    first = 4 + ("variant" in header[:5])

    def make(columns: Sequence[int], title: str) -> RichTable:
        made = RichTable(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left", title_style="bold")
        for index in [*range(first), *columns]:
            is_right = index >= first or header[index] in ("alpha", "beta")
            made.add_column(Text(header[index]), justify="right" if is_right else "left", overflow="fold")
        for line in body:
            if not any(line[index] for index in columns):
                continue  # a row of others alone, in the part that shows ours
            style = "italic" if line[0].startswith("teacher") else ""
            made.add_row(*(Text(line[index]) for index in [*range(first), *columns]), style=style)
        return made

    title = f"{table.study}: {metric_title(table.metric)}"
    whole = make(range(first, len(header)), title)
    console = Console(width=100_000)
    if not table.columns or console.measure(whole).maximum <= width:
        return [whole]
    made = []
    for span in spans(table):
        part = make(span, title)
        if len(span) > 3 and console.measure(part).minimum > width:
            made += [make(span[:3], title), make([span[0], *span[3:]], title)]
        else:
            made.append(part)
    return made
