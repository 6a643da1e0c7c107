"""The forms of a table: Markdown for a paper's repository and CSV for a script.

The same runs give the same bytes: no form holds a time of day, a path outside the folder of runs or the order in which
a disk lists its files.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vkd.records.grouping import (
    PERCENT,
    PUBLISHED_METRIC,
    SELECTION,
    Cell,
    Column,
    Hole,
    Published,
    Row,
    Selection,
    Table,
    show,
    teacher_label,
)
from vkd.records.published import BEST_ON_TEST, UNKNOWN, ClassificationFigure
from vkd.records.reading import clean
from vkd.records.statistics import CONFIDENCE, PAIRED_T, SIGN_FLIP, Difference, Summary, summarise

_WORDS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "top1_at_best_val": "top-1 at the epoch of the best val top-1 (%)",
    "top1_max_over_epochs": "top-1, maximum over epochs (%)",
    "agreement": "agreement with the teacher (%)",
    "nll": "NLL (nats)",
    "entropy": "entropy (nats)",
    "teacher_kl": "KL from the teacher (nats)",
    "ece": "ECE",
}
_CSV_COLUMNS = (
    "dataset teacher student {settings} method divergence alpha beta variant metric mean std n {differences} "
    + "val_top1 best_by_val chosen_from_grid test_selection_gain teacher_test test_top1_max_over_epochs "
    + "group seeds holes"
)
_DIFFERENCE_CSV_COLUMNS = ("", "_std", "_pairs", "_low", "_high", "_p", "_test")
_PUBLISHED_CSV_COLUMNS = "published_top1 published_source difference_to_published not_comparable published_also"
_VERSIONS = ("torch", "timm", "python", "device", "vkd", "git")


def metric_title(metric: str) -> str:
    """A metric's name in words, with its unit: "test top-1 (%)"."""
    split, _, name = metric.rpartition("/")
    return f"{split} {_WORDS.get(name, clean(name).replace('_', ' '))}".strip()


def decimals(metric: str) -> int:
    """Digits after the point with which a table shows a metric."""
    return 2 if PERCENT.fullmatch(metric.rpartition("/")[2]) else 4


def grid(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table as text, the teacher's accuracy in the first line of the body.

    Method, divergence, alpha, beta, the variant where a row has one; then for every column of the table the metric and
    the differences to the plain student and to the baseline where there is another, and where others report something,
    that and the difference to it.
    """
    to_baseline = bool(table.baseline)
    blank = [""] * (1 + to_baseline)
    variants = any(row.variant for row in table.rows)
    header = ["method", "divergence", "alpha", "beta"] + ["variant"] * variants
    width = len(header)
    shown = [table.has_published(index) for index in range(len(table.columns))]
    for column, has_published in zip(table.columns, shown, strict=True):
        header += [column.title, "to plain"] + [f"to {table.baseline}"] * to_baseline
        header += ["published", "to published"] * has_published
    body = []
    if any(table.teachers):
        line = [teacher_label(table.metric)] + [""] * (width - 1)
        for teacher, has_published in zip(table.teachers, shown, strict=True):
            flag = " (saw val: unknown)" if teacher and teacher.unknown else ""
            line += [_spread(teacher.summary, 2) + flag if teacher else "-", *blank]
            line += _beside(teacher.published if teacher else (), 2) * has_published
        body.append(line)
    for row in table.rows:
        key = row.key
        plain = key.method == "none"
        line = [
            "plain student" if plain else key.method,
            key.divergence or "-",
            show_point(key.alpha),
            show_point(key.beta),
        ]
        line += [row.variant] * variants
        for cell, has_published in zip(row.cells, shown, strict=True):
            line += _cell(cell, decimals(table.metric))[: 2 + to_baseline]
            line += _beside(cell.published, decimals(table.metric)) * has_published
        body.append(line)
    for other in table.published_rows:
        line = [f"{other.label} (published)"] + [""] * (width - 1)
        for published, has_published in zip(other.cells, shown, strict=True):
            line += ["", *blank]
            line += [_beside(published, decimals(table.metric))[0], ""] * has_published
        body.append(line)
    return header, body


def spans(table: Table) -> list[range]:
    """For each column of the table, the places in `grid`'s lines that belong to it."""
    start = 4 + any(row.variant for row in table.rows)
    found = []
    for index in range(len(table.columns)):
        found.append(range(start, start + ours_width(table) + 2 * table.has_published(index)))
        start = found[-1].stop
    return found


def ours_width(table: Table) -> int:
    """Number of texts of a column of the table that are not about published figures."""
    return 3 if table.baseline else 2


def notes(table: Table) -> list[str]:
    """What the table's numbers mean and under which conditions they came about, one sentence or list each."""
    found = [
        f"{metric_title(table.metric)}: mean ± sample standard deviation over seeds (number of seeds); "
        "`2 of 3` is 2 finished runs and 1 hole.",
        *_about_metric(table.metric),
        *about_differences(table),
        *_about_missing_differences(table),
    ]
    if any(cell.best for row in table.rows for cell in row.cells):
        found.append(f"`*` has the best mean {SELECTION} of its column. Nothing is selected on test.")
    found += about_selections(table)
    if any(teacher and teacher.unknown for teacher in table.teachers):
        found.append("saw val unknown: the teacher may have been trained on the validation images; see the protocol.")
    found += about_published(table) + about_protocol(table) + about_rows(table) + _about_machines(table)
    return found + [f"{remark[:1].upper()}{remark[1:]}." for remark in table.remarks]


def holes(table: Table) -> list[str]:
    """The runs that a cell should have and has not, each with its reason, every run once."""
    found: dict[str, None] = {}
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            where = row.label if row.key.method == "none" else f"{row.label}, {column.title}"
            for hole in cell.holes:
                found[f"{where if hole.path else f'{row.label}, {column.title}'}, {describe_hole(hole)}"] = None
        empty = [column.title for column, cell in zip(table.columns, row.cells, strict=True) if cell.group is None]
        if empty:
            found[f"{row.label}: no runs in {'; '.join(empty)}"] = None
    for hole in table.unplaced:
        found[f"in no row: {describe_hole(hole)}"] = None
    return list(found)


def describe_hole(hole: Hole) -> str:
    """A hole in one line: "seed 3: failed: loss not finite (`path`)"."""
    seeds = ", ".join(map(str, hole.seeds))
    name = f"seed{'s' * (len(hole.seeds) > 1)} {seeds}: " if hole.seeds else ""
    return f"{name}{hole.reason}" + (f" (`{hole.path}`)" if hole.path else "")


def to_markdown(table: Table) -> str:
    """The whole of `table.md`: heading, command, table, notes and holes."""
    header, body = grid(table)
    first = 4 + ("variant" in header[:5])
    escaped = [[_escape(text) for text in line] for line in [header, *body]]
    widths = [max(3, *(len(line[index]) for line in escaped)) for index in range(len(header))]
    right = [index >= first or header[index] in ("alpha", "beta") for index in range(len(header))]

    def line(texts: list[str]) -> str:
        cells = (
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(texts, widths, right, strict=True)
        )
        return f"| {' | '.join(cells)} |"

    rule = ["-" * (width - 1) + ":" if is_right else "-" * width for width, is_right in zip(widths, right, strict=True)]
    lines = [f"# {_escape(table.study)}: {metric_title(table.metric)}", "", f"    {table.command}", ""]
    lines += [line(escaped[0]), line(rule), *map(line, escaped[1:]), "", "## Notes", ""]
    lines += [f"- {_escape(note)}" for note in notes(table)]
    found = holes(table)
    if found:
        lines += ["", "## Holes", "", *(f"- {_escape(hole)}" for hole in found)]
    return "\n".join(lines) + "\n"


def to_csv(table: Table) -> str:
    """The table as CSV: a line for every row and column that has a run, numbers in full precision."""
    file = io.StringIO()
    has_published = any(map(table.has_published, range(len(table.columns))))
    compared = [f"difference_to_{name}{end}" for name in _compared(table) for end in _DIFFERENCE_CSV_COLUMNS]
    settings = [name for name, _ in table.columns[0].settings] if table.columns else []
    names = _CSV_COLUMNS.format(differences=" ".join(compared), settings=" ".join(settings))
    names += f" {_PUBLISHED_CSV_COLUMNS}" * has_published
    writer = csv.DictWriter(file, names.split(), lineterminator="\n")
    writer.writeheader()
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell.group is not None:
                line = _csv_line(table, column, row, cell) | (_published_csv_line(cell) if has_published else {})
                writer.writerow({name: _number(value) for name, value in line.items()})
    return file.getvalue()


def show_point(value: float | None) -> str:
    """alpha or beta as a row shows it."""
    return "-" if value is None else show(value)


def _spread(summary: Summary, digits: int) -> str:
    """Mean and standard deviation, rounded."""
    std = "" if summary.std is None else f" ± {summary.std:.{digits}f}"
    return f"{summary.mean:.{digits}f}{std}"


def _cell(cell: Cell, digits: int) -> list[str]:
    """A cell's three texts: the metric, the difference to the plain student, the difference to the baseline."""
    if cell.group is None:
        return ["-", "-", "-"]
    n, expected = len(cell.values), cell.expected
    count = f"({n})" if n == expected else f"({n} of {expected})"
    value = _spread(cell.summary, digits) if cell.summary else "hole"
    marks = "‡" * cell.mixed + "*" * cell.best + "¶" * bool(cell.chosen)
    return [
        f"{value} {count}{marks}",
        show_difference(cell.to_plain, digits),
        show_difference(cell.to_baseline, digits),
    ]


def show_difference(difference: Difference | None, digits: int) -> str:
    """A difference with its sign, its interval and p-value, and a mark where it is not paired."""
    if difference is None:
        return "-"
    text = f"{difference.mean:+.{digits}f}{'' if difference.paired else '†'}"
    if difference.interval is None:
        return text
    low, high = (f"{bound:+.{digits}f}" for bound in difference.interval)
    return f"{text} [{low}, {high}] {show_p_value(difference.p)}"


def show_p_value(p: float) -> str:
    """A p-value to two digits: "p=0.25", "p<0.001"."""
    return "p<0.001" if p < 0.001 else f"p={p:.2g}"


def _beside(published: Sequence[Published], digits: int) -> list[str]:
    """The texts beside a cell: what others report and the difference to it, in the same order; empty for nothing."""
    figures = (f"{other.top1:.{digits}f}{'§' * bool(other.reasons)}" for other in published)
    differences = ("-" if other.difference is None else f"{other.difference:+.{digits}f}" for other in published)
    return [" / ".join(figures), " / ".join(differences)]


def _about_metric(metric: str) -> list[str]:
    """What a reader must know of the metric itself."""
    split, _, name = metric.rpartition("/")
    if name == "top1_max_over_epochs":
        return [
            f"The maximum over epochs picks each run's epoch on {split} itself, as many papers do. It flatters every "
            "row and serves comparison with their numbers only."
        ]
    if name == "top1_at_best_val":
        return [f"{split} top-1 at the epoch with the best val top-1."]
    if split in ("val", "test"):
        return [f"{metric} is that of the last epoch."]
    return []


def about_differences(table: Table) -> list[str]:
    """How the differences were taken, and over how many pairs where some are missing."""
    cells = [(row, column, cell) for row in table.rows for column, cell in zip(table.columns, row.cells, strict=True)]
    found = []
    made = [difference for _, _, cell in cells for difference in (cell.to_plain, cell.to_baseline) if difference]
    if any(difference.paired for difference in made):
        meaning = "; KD is method kd with divergence fkld" if table.baseline == "KD" else ""
        found.append(f"Differences are means over pairs of runs with the same seed{_about_tests(made)}{meaning}.")
    if not all(difference.paired for difference in made):
        found.append("`†`: difference of the two means, since the seeds do not coincide.")
    partial: dict[int, list[str]] = defaultdict(list)
    for row, column, cell in cells:
        for name, difference in (("plain", cell.to_plain), (table.baseline, cell.to_baseline)):
            if difference and difference.paired and difference.n < len(cell.values):
                partial[difference.n].append(f"{row.label} to {name} ({column.title})")
    return found + [f"Over {n} pair{'s' * (n > 1)} only: {'; '.join(names)}." for n, names in sorted(partial.items())]


def _about_missing_differences(table: Table) -> list[str]:
    """Why some differences are not there."""
    cells = [(row, column, cell) for row in table.rows for column, cell in zip(table.columns, row.cells, strict=True)]
    reasons: dict[str, list[str]] = defaultdict(list)
    for row, column, cell in cells:
        for remark in cell.remarks:
            reasons[remark].append(f"{row.label} ({column.title})")
    return [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]


def _about_tests(differences: list[Difference]) -> str:
    """What the intervals and p-values beside differences are; nothing where there are none."""
    pairs = {test: [other.n for other in differences if other.test == test] for test in (SIGN_FLIP, PAIRED_T)}
    words = []
    if pairs[SIGN_FLIP]:
        least = ", ".join(f"{2 ** (1 - n):.2g} with {n}" for n in sorted(set(pairs[SIGN_FLIP])))
        words.append(f"of an exact {SIGN_FLIP} test over the pairs (at least {least})")
    if pairs[PAIRED_T]:
        counts = " or ".join(map(str, sorted(set(pairs[PAIRED_T]))))
        words.append(f"of a {PAIRED_T} test over {counts} pairs")
    if not words:
        return ""
    return (
        f", with the {CONFIDENCE:.0%} interval of Student's t distribution; p is two-sided, {' or '.join(words)}, and "
        "not corrected for the number of rows"
    )


def about_selections(table: Table) -> list[str]:
    """What was chosen from each grid, what choosing on test would have gained, and the figure without a val split."""
    found = [
        f"`¶` has the best mean {SELECTION} of the points of its grid, which differ in the settings of one method and "
        "divergence."
    ]
    for selection in table.selections:
        digits = decimals(table.metric)
        cell = selection.chosen.cells[table.columns.index(selection.column)]
        value = _spread(cell.summary, digits) if cell.summary else "hole"
        words = f"{selection.chosen.label} ({selection.column.title}) was chosen from {len(selection.points)} points: "
        words += f"{metric_title(table.metric)} {value}"
        if selection.gain is not None:
            words += f"; selecting on test would have gained {selection.gain:+.{digits}f}"
        found += [f"{words}; {_about_retraining(table, selection)}.", *_about_seeds(table, selection)]
    return found if table.selections else []


def _about_retraining(table: Table, selection: Selection) -> str:
    """The figure of the choice at dataset.val_fraction=0, or that there is none."""
    if selection.retrained is None:
        return "it was not run at dataset.val_fraction=0"
    cell = selection.retrained.cells[table.columns.index(selection.column)]
    value = _spread(cell.summary, decimals(table.metric)) if cell.summary else "hole"
    only = ", the only figure of its grid that is set beside published ones" * (table.metric == PUBLISHED_METRIC)
    return f"at dataset.val_fraction=0 it has {value} ({len(cell.values)}){only}"


def _about_seeds(table: Table, selection: Selection) -> list[str]:
    """A warning where the points of a grid were not all run with the same seeds, so that luck may have chosen."""
    index = table.columns.index(selection.column)
    seeds = {frozenset(row.cells[index].group.runs) for row in selection.points}
    if len(seeds) == 1:
        return []
    return [
        f"The points of that grid ({selection.column.title}) have different seeds: a mean over few is chosen by luck."
    ]


def _compared(table: Table) -> dict[str, str]:
    """What differences are taken to, by its name in the CSV: the name of the cell's attribute."""
    names = {"plain": "to_plain"}
    if table.baseline:
        names["kd" if table.baseline == "KD" else "baseline"] = "to_baseline"
    return names


class _Beside(NamedTuple):
    """A published figure where it stands: the row and column in words, the column, our cell."""

    where: str
    column: Column
    cell: Cell
    other: Published


def about_published(table: Table) -> list[str]:
    """Where the published figures come from, what they belong to, and where they do not compare with ours."""
    beside = [
        _Beside(f"{row.label} ({column.title})", column, cell, other)
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        for other in cell.published
    ]
    compared = [figure for place in beside for figure in place.other.figures]
    alone = [figure for row in table.published_rows for cell in row.cells for other in cell for figure in other.figures]
    figures = compared + alone
    found = []
    if figures:
        found.append(
            f"published: top-1 (%) that others report ({_list(figure.source for figure in figures)}), empty where none "
            "is known; to published: the mean here minus theirs. Compared are the numbers of images and classes, "
            "dataset.val_fraction, dataset.train_fraction, the teacher by its test accuracy, whoever trained it, and "
            f"of the recipes {_in_words(['recipe.epochs', *_compared_recipe(beside)])}; nothing else of them."
        )
    if alone:
        lengths: dict[str, dict[str, None]] = defaultdict(dict)
        for figure in alone:
            length = f"{figure.epochs} epoch{'s' * (figure.epochs > 1)}" if figure.epochs else "epochs not known"
            lengths[length][figure.label] = None
        words = (
            next(iter(lengths)) if len(lengths) == 1 else "; ".join(f"{n}: {', '.join(lengths[n])}" for n in lengths)
        )
        found.append(f"(published): a row of others without runs here, by the name in its source ({words}).")
    for epoch, words in (
        (BEST_ON_TEST, "are of the best epoch on test, those here of the last epoch, which favours theirs"),
        (UNKNOWN, "are of an epoch that is not known, best or last"),
    ):
        named = _name_figures([figure for figure in figures if figure.epoch_reported == epoch], figures)
        found += [f"The published {named} {words}."] if named else []
    return [
        *found,
        *_about_comparison(table, beside),
        *_about_recipes(table, beside),
        *_about_settings(table, beside),
    ]


def _name_figures(some: list[ClassificationFigure], figures: list[ClassificationFigure]) -> str:
    """The labels of `some` of the figures, each with its sources; with its data sets where others share both."""
    others = {(figure.label, figure.source) for figure in set(figures) - set(some)}
    sources: dict[str, set[str]] = defaultdict(set)
    for figure in some:
        is_shared = (figure.label, figure.source) in others
        sources[figure.label].add(f"{figure.source} on {figure.dataset}" if is_shared else figure.source)
    return ", ".join(f"{label} ({_list(sources[label])})" for label in sorted(sources))


def _compared_recipe(beside: list[_Beside]) -> list[str]:
    """The keys of published recipes, beside epochs, that were compared with those of a row, in their order."""
    found = (
        name
        for place in beside
        for figure in place.other.figures
        for name, _ in figure.recipe
        if name in place.cell.group.parameters
    )
    return list(dict.fromkeys(found))


def _about_comparison(table: Table, beside: list[_Beside]) -> list[str]:
    """Why figures are not comparable, and which sources contradict each other."""
    found = []
    teachers = [
        (column, other)
        for index, (column, teacher) in enumerate(zip(table.columns, table.teachers, strict=True))
        if teacher and table.has_published(index)
        for other in teacher.published
    ]
    shown = [place.other for place in beside] + [other for _, other in teachers]
    for reason in dict.fromkeys(reason for other in shown for reason in other.reasons):
        named: dict[str, None] = {}
        for column in table.columns:
            all_here = [place for place in beside if place.column == column]
            here = [place.where for place in all_here if reason in place.other.reasons]
            named |= dict.fromkeys([f"every figure of {column.title}"] if here and len(here) == len(all_here) else here)
        lines = [column.title for column, other in teachers if reason in other.reasons]
        named |= dict.fromkeys(f"the teacher of {title}" for title in lines)
        found.append(f"`§` not comparable: {reason}: {', '.join(named)}.")
    sources: dict[str, dict[float, list[str]]] = defaultdict(lambda: defaultdict(list))
    for place in beside:
        sources[place.where][place.other.top1] += place.other.sources
    for where, figures in sources.items():
        if len(figures) > 1:
            words = (f"{top1:.{decimals(table.metric)}f} ({_list(names)})" for top1, names in figures.items())
            found.append(f"Sources differ on {where}: {', '.join(words)}.")
    return found


def _about_recipes(table: Table, beside: list[_Beside]) -> list[str]:
    """What is not known of the published recipes, and where they treat the last batch otherwise."""
    pairs = [(place, figure) for place in beside for figure in place.other.figures]
    unsaid = _list(figure.label for _, figure in pairs if figure.epochs is not None and not figure.recipe)
    found = [f"Of the recipes behind the published {unsaid} the epochs alone are known."] if unsaid else []
    teachers = dict(zip(table.columns, table.teachers, strict=True))
    unmeasured = _list(
        place.column.title
        for place, figure in pairs
        if figure.method != "none" and (teacher := teachers[place.column]) and not teacher.published
    )
    found += [f"The accuracy of the published teacher is not known: {unmeasured}."] if unmeasured else []
    batches: dict[tuple[str, str], list[ClassificationFigure]] = defaultdict(list)
    for place, figure in pairs:
        ours, theirs = place.cell.group.parameters.get("recipe.drop_last"), str(figure.drop_last).lower()
        if figure.drop_last is not None and ours not in (None, theirs):
            batches[ours, theirs].append(figure)
    figures = [figure for _, figure in pairs]
    return found + [
        f"recipe.drop_last is {ours} here and {theirs} behind the published {_name_figures(some, figures)}."
        for (ours, theirs), some in batches.items()
    ]


def _about_settings(table: Table, beside: list[_Beside]) -> list[str]:
    """Which settings of the methods were compared, and the rows that have no figure because theirs are others."""
    compared: dict[str, list[str]] = defaultdict(list)
    unknown, unrecorded = [], []
    for place in beside:
        for figure in place.other.figures:
            names = [name for name, _ in figure.settings]
            recorded = [name for name in names if name in place.cell.group.parameters]
            stated = names + [name for name, _ in figure.recipe]
            unrecorded += [name for name in stated if name not in place.cell.group.parameters]
            if recorded:
                compared[", ".join(recorded)].append(figure.label)
            elif not names and figure.method != "none":
                unknown.append(figure.label)
    shown = "; ".join(f"{_list(labels)}: {names}" for names, labels in compared.items())
    found = [f"Settings in which rows and published figures were compared: {shown}."] if shown else []
    if unknown:
        found.append(f"The settings behind the published {_list(unknown)} are not known and not compared.")
    if unrecorded:
        found.append(f"Published settings that runs here do not record and that are not compared: {_list(unrecorded)}.")
    apart: dict[str, list[str]] = defaultdict(list)
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            for figure in cell.other_settings:
                ours = cell.group.parameters
                words = ", ".join(
                    f"{name} {show(theirs)}" for name, theirs in figure.settings if ours.get(name, theirs) != theirs
                )
                apart[f"{figure.label} is published with {words}"].append(f"{row.label} ({column.title})")
    return found + [f"No published figure beside {', '.join(rows)}: {words}." for words, rows in apart.items()]


def _list(names: Iterable[str]) -> str:
    """The names, each once, in alphabetical order."""
    return ", ".join(sorted(set(names)))


def _in_words(names: Sequence[str]) -> str:
    """The names in their order, as a sentence has them: "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def about_protocol(table: Table) -> list[str]:
    """Validation share, epochs, batch size and precision of each column."""
    found: dict[str, list[str]] = defaultdict(list)
    for index, column in enumerate(table.columns):
        groups = [row.cells[index].group for row in table.rows if row.cells[index].group is not None]
        words = []
        for name in (
            "dataset.val_fraction",
            "dataset.train_fraction",
            "recipe.epochs",
            "recipe.batch_size",
            "precision",
        ):
            values = {group.parameters.get(name) for group in groups} - {None}
            if values and not (name == "dataset.train_fraction" and values == {1}):  # all of train goes without saying
                shown = " or ".join(sorted((show(value) for value in values), key=lambda text: (len(text), text)))
                words.append(f"{name} {shown}")
        if words:
            found[", ".join(words)].append(column.title)
    if len(found) == 1:
        return [f"Protocol: {next(iter(found))}."]
    return [f"Protocol of {'; '.join(names)}: {words}." for words, names in found.items()]


def about_rows(table: Table) -> list[str]:
    """Weights and temperature of each method and divergence; for alpha-beta always how the divergence is scaled."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in table.rows:
        groups = [cell.group for cell in row.cells if cell.group is not None]
        names = {name for group in groups for name in group.parameters}
        words = []
        for name in sorted(names):
            section, _, rest = name.partition(".")
            is_own = section in ("method", "cross_entropy_weight", "divergence")
            if is_own and rest not in ("name", "alpha", "beta", "match_kl_scale"):
                values = {group.parameters.get(name) for group in groups} - {None}
                words += [f"{name} {' or '.join(sorted(map(show, values)))}"] if values else []
        if row.key.divergence == "abkd":
            states = {group.parameters.get("divergence.match_kl_scale") for group in groups}
            scale = {"true": "matched to KL's", "false": "not matched to KL's"}
            stated = " or ".join(sorted(scale.get(state, "not stated") for state in states))
            words.append(f"divergence scale: {stated} (match_kl_scale)")
        name = "plain student" if row.key.method == "none" else f"{row.key.method} {row.key.divergence}".rstrip()
        found[name, ", ".join(words)].append(row.label)
    alone: dict[str, int] = defaultdict(int)
    for name, _ in found:
        alone[name] += 1
    return [
        f"{name if alone[name] == 1 else '; '.join(labels)}: {words}."
        for (name, words), labels in found.items()
        if words
    ]


def _about_machines(table: Table) -> list[str]:
    """Versions and hardware, with the number of runs of each, and the cells whose runs do not agree in them."""
    counts: dict[str, set[str]] = defaultdict(set)
    mixed: dict[str, None] = {}
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            for run in cell.group.runs.values() if cell.group is not None else ():
                environment = run.environment
                words = (
                    f"{name} {show(environment[name])}" for name in _VERSIONS if environment.get(name, "None") != "None"
                )
                counts[", ".join(words) or "not recorded"].add(run.path)
            if cell.mixed:
                mixed[f"{row.label} ({column.title})"] = None
    found = [f"Made with {words}: {len(paths)} run{'s' * (len(paths) > 1)}." for words, paths in sorted(counts.items())]
    if mixed:
        found.append(f"`‡`: runs of one cell were made with different versions or hardware: {', '.join(mixed)}.")
    return found


def _csv_line(table: Table, column: Column, row: Row, cell: Cell) -> dict[str, Any]:
    """The values of one line of the CSV."""
    key, summary = row.key, cell.summary
    own = [run.teacher_accuracy("test") for run in cell.group.runs.values()]
    teacher = summarise(accuracy for accuracy in own if accuracy is not None)
    most = summarise(
        value for run in cell.group.runs.values() if (value := run.metric("test/top1_max_over_epochs")) is not None
    )
    chosen = (other for other in table.selections if other.chosen is row and other.column == column)
    gain = next((selection.gain for selection in chosen), None)
    line: dict[str, Any] = {
        "dataset": column.dataset,
        "teacher": column.teacher,
        "student": column.student,
        **{name: _plain(value) for name, value in column.settings},
        "method": key.method,
        "divergence": key.divergence,
        "alpha": key.alpha,
        "beta": key.beta,
        "variant": row.variant,
        "metric": table.metric,
        "mean": summary and summary.mean,
        "std": summary and summary.std,
        "n": len(cell.values),
        "val_top1": cell.val and cell.val.mean,
        "best_by_val": int(cell.best),
        "chosen_from_grid": cell.chosen if cell.chosen is None else int(cell.chosen),
        "test_selection_gain": gain,
        "teacher_test": teacher and teacher.mean,
        "test_top1_max_over_epochs": most and most.mean,  # what many papers print, and nothing here selects on
        "group": cell.group.fingerprint,
        "seeds": " ".join(map(str, sorted(cell.values))),
        "holes": "; ".join(map(describe_hole, cell.holes)),
    }
    for name, attribute in _compared(table).items():
        difference = getattr(cell, attribute)
        if difference is not None:
            low, high = difference.interval or (None, None)
            made = (difference.mean, difference.std, difference.n, low, high, difference.p, difference.test)
            line |= {f"difference_to_{name}{end}": x for end, x in zip(_DIFFERENCE_CSV_COLUMNS, made, strict=True)}
    return line


def _published_csv_line(cell: Cell) -> dict[str, Any]:
    """What a line of the CSV says of published figures: all of the first one, the others in words."""
    if not cell.published:
        return {}
    first, *others = cell.published
    return {
        "published_top1": first.top1,
        "published_source": "; ".join(first.sources),
        "difference_to_published": first.difference,
        "not_comparable": "; ".join(first.reasons),
        "published_also": "; ".join(f"{other.top1!r} ({', '.join(other.sources)})" for other in others),
    }


def _plain(value: Any) -> Any:
    """A setting in the CSV: a number as it is, and text so that a spreadsheet takes it for no formula."""
    if value is None or isinstance(value, float):
        return value
    text = show(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _number(value: Any) -> Any:
    """A value of the CSV: floats in full, nothing for None."""
    return "" if value is None else repr(value) if isinstance(value, float) else value


def _escape(text: str) -> str:
    """Text that Markdown neither takes for the end of a cell nor for HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")
