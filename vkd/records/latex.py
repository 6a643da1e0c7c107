"""The form of a table that goes into a paper: LaTeX that needs the package booktabs and no other.

A row is a method with its divergence. Of each grid it is the choice by val/top1 alone, since a paper reports what was
chosen; the other points stand in `table.md` and `table.csv`. Where the table has one column, the difference to the
baseline and what others report stand beside it; several columns leave no room for them on a page.

Whatever a name holds, it is escaped: text becomes printable ASCII, and what has no such form is named by its code.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from vkd.records.grouping import Cell, Column, Published, Row, Table, is_better, protocol_of, show, teacher_label
from vkd.records.reading import clean
from vkd.records.statistics import Difference, Summary
from vkd.records.tables import (
    about_differences,
    about_protocol,
    about_published,
    about_rows,
    about_selections,
    decimals,
    metric_title,
    show_p_value,
    show_point,
)

NOTHING = "--"
"""A cell without a figure."""

BEST, SECOND = "textbf", "underline"
"""The commands that mark the best mean of a column and the next one."""

_SIZES = ((3, "normalsize", "small"), (5, "small", "footnotesize"), (1_000_000, "scriptsize", "tiny"))
"""Up to how many columns text and spreads have which sizes, so that a page holds the columns of eight pairs."""

_SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "`": "\\textasciigrave{}",
    '"': "''",
    # After the end of a line of the table these two would be its arguments.
    "[": "{[}",
    "*": "{*}",
    "±": "$\\pm$",
    "\N{MULTIPLICATION SIGN}": "$\\times$",
    "→": "$\\to$",
    "§": "\\S{}",
    "¶": "\\P{}",
    "†": "\\dag{}",
    "‡": "\\ddag{}",
    "ß": "\\ss{}",
    "ø": "\\o{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{GREEK SMALL LETTER ALPHA}": "$\\alpha$",
    "\N{GREEK SMALL LETTER BETA}": "$\\beta$",
    "\N{GREEK SMALL LETTER GAMMA}": "$\\gamma$",
    "\N{GREEK SMALL LETTER LAMDA}": "$\\lambda$",
    "\N{GREEK SMALL LETTER TAU}": "$\\tau$",
}
_ACCENTS = {0x300: "`", 0x301: "'", 0x302: "^", 0x303: "~", 0x308: '"', 0x30A: "r", 0x30C: "v", 0x327: "c"}
_NOT_COMPARABLE = "\\textsuperscript{\\S}"
_WHEN = {
    "top1_at_best_val": "epoch of the best val top-1",
    "top1_max_over_epochs": "maximum over epochs, which is chosen on the split itself",
}


def escape(text: str) -> str:
    """`text` as LaTeX prints it, in ASCII: special characters and accents as commands, others as "[U+4E2D]".

    What stands between two backticks, as code does in Markdown, is set in the typewriter face.
    """
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return _escape(text)
    return "".join(f"\\texttt{{{_escape(part)}}}" if index % 2 else _escape(part) for index, part in enumerate(parts))


def to_latex(table: Table) -> str:
    """The whole of `table.tex`: the command as a comment, and a float with caption, label, table and notes."""
    rows = shown_rows(table)
    table = replace(table, rows=rows)
    ranks = [rank(table, rows, index) for index in range(len(table.columns))]
    variants = list(dict.fromkeys(row.variant for row in rows if row.variant))
    size, small = next(sizes for most, *sizes in _SIZES if len(table.columns) <= most)
    beside = len(table.columns) == 1
    has_published = beside and table.has_published(0)
    float_name = "table*" if len(table.columns) > 1 or has_published else "table"
    label = re.sub(r"[^A-Za-z0-9.]+", "-", table.study).strip("-")
    alignment = "ll" + "r" * (len(table.columns) + beside + has_published)
    lines = [
        f"% {clean(table.command, 2_000)}",
        "% needs \\usepackage{booktabs}",
        f"\\begin{{{float_name}}}",
        "  \\centering",
        f"  \\caption{{{_caption(table)}}}",
        f"  \\label{{tab:{label}}}",
        "  \\par\\medskip",
        f"  \\{size}\\setlength{{\\tabcolsep}}{{4pt}}",
        f"  \\begin{{tabular}}{{@{{}}{alignment}@{{}}}}",
        "    \\toprule",
        *(f"    {line} \\\\" for line in _header(table, has_published=has_published)),
        "    \\midrule",
    ]
    if any(table.teachers):
        line = [teacher_label(table.metric), ""]
        line += [_mean(teacher.summary, 2, small) if teacher else NOTHING for teacher in table.teachers]
        line += [""] * beside
        line += [_published(table.teachers[0].published if table.teachers[0] else (), 2)] * has_published
        lines += [f"    {' & '.join(line)} \\\\", "    \\midrule"]
    counts = _counts(rows)
    for row in rows:
        line = _names(row, variants)
        for cell, marks in zip(row.cells, ranks, strict=True):
            text = _cell(cell, decimals(table.metric), small, marks.get(id(row), ""), is_counted=len(counts) > 1)
            line.append(text)
        if beside:
            line.append(_difference(_to_baseline(table, row.cells[0]), decimals(table.metric)))
        if has_published:
            line.append(_published(row.cells[0].published, decimals(table.metric)))
        lines.append(f"    {' & '.join(line)} \\\\")
    if table.published_rows:
        lines.append("    \\midrule")
    for other in table.published_rows:
        figures = [_published(cell, decimals(table.metric)) for cell in other.cells]
        line = [f"{escape(other.label)} (published)", ""]
        line += ["", "", *figures] if has_published else figures
        lines.append(f"    {' & '.join(line)} \\\\")
    lines += ["    \\bottomrule", "  \\end{tabular}", ""]
    lines += ["  \\par\\medskip", "  \\parbox{\\linewidth}{\\footnotesize\\raggedright"]
    lines += [f"    {note}\\par" for note in _notes(table, ranks, variants)]
    return "\n".join([*lines, "  }", f"\\end{{{float_name}}}", ""])


def shown_rows(table: Table) -> list[Row]:
    """The rows of the table without those that are points of grids and were chosen in no column."""
    return [row for row in table.rows if any(cell.group is not None and cell.chosen is not False for cell in row.cells)]


def comparable_rows(rows: Sequence[Row], index: int) -> list[Row]:
    """The most rows that have a mean in a column and the same data, recipe, precision and teacher, in their order.

    Plain students have no teacher and compare with the students of any. Of several such sets it is the first.
    """
    seen = [row for row in rows if row.cells[index].summary is not None and row.cells[index].chosen is not False]
    sets: dict[frozenset, list[Row]] = {}
    groups = [(row, row.cells[index].group) for row in seen]
    for _, group in groups:
        if group.key.method != "none":
            sets.setdefault(protocol_of(group), [])
    taught = {protocol_of(group): protocol_of(group, teacher=False) for _, group in groups}
    for protocol, members in sets.items():
        for row, group in groups:
            is_plain = group.key.method == "none"
            own = protocol_of(group, teacher=False) if is_plain else protocol_of(group)
            if own == (taught[protocol] if is_plain else protocol):
                members.append(row)
    if not sets:
        for row, group in groups:
            sets.setdefault(protocol_of(group), []).append(row)
    return max(sets.values(), key=len, default=[])


def rank(table: Table, rows: Sequence[Row], index: int) -> dict[int, str]:
    """`BEST` and `SECOND` by the `id` of the rows that they belong to in a column; ties as printed share a mark.

    Nothing for a metric without better and worse, and where fewer than two rows are comparable.
    """
    sign = is_better(table.metric)
    members = comparable_rows(rows, index)
    if sign is None or len(members) < 2:
        return {}
    means = {id(row): round(row.cells[index].summary.mean, decimals(table.metric)) for row in members}
    order = sorted(set(means.values()), reverse=sign > 0)
    marks = dict(zip(order, (BEST, SECOND), strict=False))
    return {row: marks[mean] for row, mean in means.items() if mean in marks}


def _escape(text: str) -> str:
    """Text without code in it, escaped."""
    # Two hyphens side by side would be printed as one dash.
    pairs = zip(f" {text}", text, strict=False)
    return "".join("{}" * (before == after == "-") + _character(after) for before, after in pairs)


def _character(character: str) -> str:
    """One character, escaped."""
    if character in _SPECIAL:
        return _SPECIAL[character]
    if character.isspace():
        return " "
    if character.isascii():
        return character if character.isprintable() else f"{{[}}U+{ord(character):04X}]"
    first, *accents = unicodedata.normalize("NFD", character)
    if first.isascii() and first.isalpha() and len(accents) == 1 and ord(accents[0]) in _ACCENTS:
        base = {"i": "\\i", "j": "\\j"}.get(first, first)
        return f"\\{_ACCENTS[ord(accents[0])]}{{{base}}}"
    return f"{{[}}U+{ord(character):04X}]"


def _header(table: Table, *, has_published: bool) -> list[str]:
    """The lines above the first rule, without their ends: what the columns are."""
    if len(table.columns) == 1:
        to = f"to {table.baseline or 'plain student'}"
        title = metric_title(table.metric)
        names = ["method", "divergence", title, to] + ["published"] * has_published
        return [" & ".join(_escape(f"{name[:1].upper()}{name[1:]}") for name in names)]
    lines = []
    for name in ("dataset", "teacher", "student"):
        values = [_escape(getattr(column, name)) or NOTHING for column in table.columns]
        lines.append(" & ".join([{"dataset": "Data set"}.get(name, name.capitalize()), "", *values]))
    for index, (name, _) in enumerate(table.columns[0].settings if table.columns else ()):
        values = [_escape(show(column.settings[index][1])) for column in table.columns]
        lines.append(" & ".join([_escape(name), "", *values]))
    return lines


def _names(row: Row, variants: list[str]) -> list[str]:
    """Method and divergence of a row, with the letter of the note that tells its variant."""
    key = row.key
    letter = f"\\textsuperscript{{{_letter(variants.index(row.variant))}}}" if row.variant else ""
    point = ""
    if key.alpha is not None or key.beta is not None:
        point = f" ({_escape(show_point(key.alpha))}, {_escape(show_point(key.beta))})"
    if key.method == "none":
        return [f"plain student{letter}", NOTHING]
    return [f"{_escape(key.method)}{letter}", f"{_escape(key.divergence)}{point}" if key.divergence else NOTHING]


def _letter(index: int) -> str:
    """a, b, .. z, aa, ab, ..: the mark of a note."""
    text = ""
    while index >= 0:
        text = chr(ord("a") + index % 26) + text
        index = index // 26 - 1
    return text


def _counts(rows: Sequence[Row]) -> set[tuple[int, int]]:
    """The numbers of runs that are there and that should be, of the cells that state a figure."""
    cells = (cell for row in rows for cell in row.cells if cell.group is not None and cell.chosen is not False)
    return {(len(cell.values), cell.expected) for cell in cells}


def _cell(cell: Cell, digits: int, small: str, mark: str, *, is_counted: bool) -> str:
    """A cell: the mean with its mark, the spread in small, and the number of runs where cells differ in it."""
    if cell.group is None or cell.chosen is False:
        return NOTHING
    n, expected = len(cell.values), cell.expected
    count = "" if not is_counted else f" ({n})" if n == expected else f" ({n} of {expected})"
    if cell.summary is None:
        return f"hole{count}"
    raised = "\\ddag" * cell.mixed + "*" * cell.best
    return _mean(cell.summary, digits, small, mark) + count + (f"\\textsuperscript{{{raised}}}" if raised else "")


def _mean(summary: Summary, digits: int, small: str, mark: str = "") -> str:
    """Mean, marked, and standard deviation in the size `small`."""
    mean = _signless(summary.mean, digits)
    mean = f"\\{mark}{{{mean}}}" if mark else mean
    return mean if summary.std is None else f"{mean} {{\\{small}$\\pm$ {summary.std:.{digits}f}}}"


def _signless(value: float, digits: int) -> str:
    """A number; its minus is one of mathematics."""
    return f"{value:.{digits}f}".replace("-", "$-$")


def _signed(value: float, digits: int) -> str:
    """A number with its sign."""
    return f"{value:+.{digits}f}".replace("-", "$-$").replace("+", "$+$")


def _to_baseline(table: Table, cell: Cell) -> Difference | None:
    """The difference that the table states: to its baseline, or to the plain student where there is no other."""
    return cell.to_baseline if table.baseline else cell.to_plain


def _difference(difference: Difference | None, digits: int) -> str:
    """A difference with its interval and p-value in small."""
    if difference is None:
        return NOTHING
    mean = _signed(difference.mean, digits)
    if difference.interval is None:
        return mean + ("" if difference.paired else "\\textsuperscript{\\dag}")
    low, high = (_signed(bound, digits) for bound in difference.interval)
    p = re.sub("([=<])", r" \1 ", show_p_value(difference.p))
    return f"{mean} {{\\small [{low}, {high}], ${p}$}}"


def _published(published: Sequence[Published], digits: int) -> str:
    """What others report, with the mark of what does not compare."""
    return " / ".join(f"{other.top1:.{digits}f}" + _NOT_COMPARABLE * bool(other.reasons) for other in published)


def _caption(table: Table) -> str:
    """Metric, data sets, teachers, students, protocol, what ± is and how many seeds it is over."""
    title = metric_title(table.metric)
    places = "; ".join(map(_place, table.columns)) if len(table.columns) <= 3 else f"{len(table.columns)} columns"
    when = _WHEN.get(table.metric.rpartition("/")[2], "last epoch")
    counts = {n for n, _ in _counts(table.rows) if n}
    runs = f"n = {counts.pop()} seeds" if len(counts) == 1 else "seeds (n in parentheses)"
    words = f"{title[:1].upper()}{title[1:]} on {places}, {when}."
    protocols = about_protocol(table)
    words += f" {protocols[0]}" if len(protocols) == 1 else ""
    words += f" Mean ± sample standard deviation over {runs}."
    if is_better(table.metric) is not None:
        words += " The best mean of a column is bold, the second underlined."
    return escape(words)


def _place(column: Column) -> str:
    """A column in the words of a caption."""
    settings = "".join(f", {name} {show(value)}" for name, value in column.settings)
    return f"{column.dataset}, teacher {column.teacher or 'none'}, student {column.student}{settings}"


def _notes(table: Table, ranks: list[dict[int, str]], variants: list[str]) -> list[str]:
    """The lines below the table, as LaTeX."""
    found = [f"\\textsuperscript{{{_letter(index)}}} {escape(words)}." for index, words in enumerate(variants)]
    said = about_protocol(table) if len(about_protocol(table)) > 1 else []
    if len(table.columns) == 1:
        said += about_differences(table)
        said += about_published(table)
    else:
        said.append("The differences between rows, their intervals and p-values stand in `table.csv`.")
    for column, marks, index in zip(table.columns, ranks, range(len(ranks)), strict=True):
        others = [row.label for row in _left_out(table.rows, index)] if marks else []
        said += [f"Not ranked in {column.title}, since their protocol is another: {', '.join(others)}."] * bool(others)
    if any(cell.best for row in table.rows for cell in row.cells):
        said.append("*: the best mean val/top1 of its column; nothing is selected on test.")
    said += [words.replace("`¶` has", "Shown is the point with") for words in about_selections(table)]
    if any(cell.mixed for row in table.rows for cell in row.cells):
        said.append("‡: runs of one cell were made with different versions or hardware.")
    return found + [escape(words) for words in said + about_rows(table)]


def _left_out(rows: Sequence[Row], index: int) -> list[Row]:
    """The rows with a mean in a column that are not among its comparable ones."""
    members = {id(row) for row in comparable_rows(rows, index)}
    seen = (row for row in rows if row.cells[index].summary is not None and row.cells[index].chosen is not False)
    return [row for row in seen if id(row) not in members]
