"""The table on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from vkd.records.grouping import Table
from vkd.records.tables import about_selections, grid, holes, metric_title, ours_width, spans, to_markdown

MOST_HOLES = 20


def print_table(make: Callable[[], Table], folder: Path) -> None:
    """Show the table that `make` makes and whose files lie in `folder`: with rich on a terminal, elsewhere table.md."""
    if not sys.stdout.isatty():
        print((folder / "table.md").read_text(encoding="utf-8"), end="")
        return
    table, console = make(), _console()
    for part in [*to_rich(table, console.width), *_below(table)]:
        console.print(part)
    console.print(f"notes, all holes and plots: {folder}")


def watch_table(read: Callable[[], Table], every: float) -> NoReturn:
    """Show what `read` gives again and again: in place on a terminal, elsewhere as Markdown whenever it has changed.

    Ends with the KeyboardInterrupt that asks it to. Between two looks it waits `every` seconds, and no less than a look
    takes, so that a large study does not take the processor from the runs that it watches.
    """
    console = _console()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        shown = ""
        while True:
            began = time.monotonic()
            text = to_markdown(read())
            if text != shown:
                print(text, end="\n\n", flush=True)
            shown = text
            time.sleep(max(every, time.monotonic() - began))
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            began = time.monotonic()
            table = read()
            live.update(Group(*to_rich(table, console.width), *_below(table)), refresh=True)
            time.sleep(max(every, time.monotonic() - began))


def _console() -> Console:
    """A console that prints names as they are."""
    return Console(highlight=False, markup=False)


def _below(table: Table) -> list[Text]:
    """The lines below a table on a terminal: what its marks mean, and the first of its holes."""
    lines = []
    if any(other.reasons for row in table.rows for cell in row.cells for other in cell.published):
        lines.append("§: does not compare with ours; the notes say why")
    lines += [line.replace("`", "") for line in about_selections(table)]
    found = holes(table)
    lines += [f"hole: {hole}" for hole in found[:MOST_HOLES]]
    if len(found) > MOST_HOLES:
        lines.append(f"... and {len(found) - MOST_HOLES} more holes, all listed in table.md")
    return [Text(line) for line in lines]


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
    ours = ours_width(table)
    for span in spans(table):
        part = make(span, title)
        if len(span) > ours and console.measure(part).minimum > width:
            made += [make(span[:ours], title), make([span[0], *span[ours:]], title)]
        else:
            made.append(part)
    return made
