"""From runs to the structure of a table: which runs are averaged, in which row and column, and against what.

The rules, in one place:

- Runs are averaged when they differ in their seed alone: the same `group` fingerprint, and nothing else that a record
  states apart but measurements and what the fingerprint leaves out.
- A row is a method, a divergence, alpha and beta. Where anything else tells apart two groups of one cell, the row is
  split, and its `variant` names the keys that differ, as well as those that are asked for.
- A column is a data set, a teacher and a student, and the keys that are asked for.
- Plain training has no teacher, so it stands in every column of its data set and student that it does not contradict.
- A difference is stated between groups of the same data, recipe and precision only, and of the same teacher where both
  have one. It is to the plain student and to a baseline: KD, or the rows whose name is given.
- The mark of the best row looks at the validation set.
- Rows of one method and divergence that differ in nothing but the settings of these two (alpha, beta, temperature,
  weights) are the points of a grid. The one with the best mean val/top1 is its choice, the first of several; test is
  never asked. What asking it would have gained is stated.
- A choice that was trained again at dataset.val_fraction=0 is the only row of its grid beside published figures.
- A published figure stands beside the rows of its method, divergence, alpha and beta whose settings do not contradict
  the published ones. It is of test top-1, so no other metric has one beside it. Our difference to it is stated unless
  the epochs are others or those published are not known, dataset.val_fraction is not 0, dataset.train_fraction is not
  1, the data set has not the published number of images and classes, a stated part of the published recipe is
  contradicted, or the teacher's test accuracy is not the published one; whoever trained that teacher.
- The teacher's own line is compared where the teacher was given. One that vkd trained is another network.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vkd.errors import ConfigError, list_names, nearest
from vkd.records.published import SIZES, TEACHER, ClassificationFigure
from vkd.records.reading import Run, clean
from vkd.records.statistics import Difference, Summary, compare, summarise

_UNSAID = "(not said)"
MOST_IN_VARIANT = 12
"""Settings that a row's name states; a damaged or strange run can differ from the others in thousands."""
SELECTION = "val/top1"
_HASH = re.compile(r"[0-9a-f]{40,64}")
_FREE = ("method.", "divergence.", "cross_entropy_weight")  # what may differ between a row and its baseline
_IN_KEY = frozenset({"divergence.name", "divergence.alpha", "divergence.beta"})
_OF_VAL = frozenset({"dataset.val_fraction", "dataset.val", "dataset.train"})  # what retraining on all of train changes
_OF_ROWS = frozenset({"method", "divergence"}) | _IN_KEY
_OF_COLUMNS = frozenset({"dataset", "teacher", "student", "dataset.name", "teacher.arch", "student.arch"})
KD, PLAIN = "kd", "none"
"""Baselines that need not be spelt as the label of a row."""

PERCENT = re.compile(r"(top\d+|agreement)(_.*)?")
"""Names of metrics, without their split, that are percentages, of which more is better."""

LOWER_IS_BETTER = frozenset({"nll", "ece", "teacher_kl"})
PUBLISHED_METRIC = "test/top1"
TEACHER_TOLERANCE = 1.0  # points of accuracy between two teachers beyond which their students do not compare
_FIRST_METHODS = {"none": 0, "kd": 1}
_FIRST_DIVERGENCES = {"": -1, "fkld": 0, "rkld": 1}


@dataclass(frozen=True)
class Column:
    """A data set, a teacher (empty where there are plain runs only) and a student.

    settings: names and values of the further keys of the config that tell columns apart.
    """

    dataset: str
    teacher: str
    student: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """The column's header."""
        pair = f"{self.teacher} -> {self.student}" if self.teacher else self.student
        return "".join([f"{self.dataset}: {pair}", *(f", {name}={show(value)}" for name, value in self.settings)])

    @property
    def order(self) -> tuple:
        """By data set, teacher and student, then by the values of the settings."""
        return (self.dataset, self.teacher, self.student, _order(tuple(value for _, value in self.settings)))


@dataclass(frozen=True)
class Key:
    """What makes a row, but for its variant."""

    method: str
    divergence: str
    alpha: float | None
    beta: float | None

    @property
    def order(self) -> tuple:
        """Plain training first, then KD with forward and reverse KL, then the rest by name, alpha and beta."""
        numbers = tuple((value is not None, value or 0.0) for value in (self.alpha, self.beta))
        method, divergence = _FIRST_METHODS.get(self.method, 2), _FIRST_DIVERGENCES.get(self.divergence, 2)
        return (method, self.method, divergence, self.divergence, *numbers)

    @property
    def label(self) -> str:
        """The row in words: "plain student", "kd fkld", "kd abkd (0.8, 0.3)"."""
        if self.method == "none":
            return "plain student"
        point = f" ({show(self.alpha)}, {show(self.beta)})" if self.alpha is not None or self.beta is not None else ""
        return f"{self.method} {self.divergence}".rstrip() + point


@dataclass
class Group:
    """Runs that differ in their seed alone, and the holes where others of them should be."""

    key: Key
    place: Column
    parameters: dict[str, Any]
    fingerprint: str = ""
    runs: dict[int, Run] = field(default_factory=dict)
    holes: list[Run] = field(default_factory=list)

    @property
    def seeds(self) -> set[int]:
        """Seeds of the runs and of the holes."""
        return set(self.runs) | {run.seed for run in self.holes}

    @property
    def set_parameters(self) -> frozenset[tuple[str, Any]]:
        """The parameters that are not null: what the group is."""
        return frozenset((name, value) for name, value in self.parameters.items() if value is not None)

    @property
    def environments(self) -> set[tuple[str, ...]]:
        """Versions and devices of the finished runs."""
        names = ("torch", "timm", "device")
        return {tuple(run.environment.get(name, "?") for name in names) for run in self.runs.values()}


@dataclass(frozen=True)
class Hole:
    """Runs of a cell that are not there: their seeds, why, and where they lie if they lie anywhere."""

    seeds: tuple[int, ...]
    reason: str
    path: str = ""


@dataclass(frozen=True)
class Published:
    """What others report for a cell or for a teacher.

    top1: percent; figures: where it is stated, more than once where sources agree.
    difference: ours minus theirs; None where there is none of ours, or where the two are not comparable.
    reasons: why they are not; empty where they are.
    """

    top1: float
    figures: tuple[ClassificationFigure, ...]
    difference: float | None
    reasons: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Where it is printed."""
        return tuple(dict.fromkeys(figure.source for figure in self.figures))


@dataclass
class Cell:
    """One group in one column.

    values: the metric by seed; `summary` their mean, None where there are none.
    to_plain, to_baseline: difference to the plain student and to the table's baseline, None where there is none;
        `remarks` say why.
    best: whether this is the best mean val/top1 of the column; mixed: whether the runs' environments differ.
    chosen: whether val/top1 chose it from its grid; None where it is no point of a grid.
    published: what others report for it; other_settings: their figures of the same method with settings not ours.
    """

    group: Group | None = None
    values: dict[int, float] = field(default_factory=dict)
    summary: Summary | None = None
    val: Summary | None = None
    to_plain: Difference | None = None
    to_baseline: Difference | None = None
    holes: list[Hole] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    best: bool = False
    mixed: bool = False
    chosen: bool | None = None
    published: list[Published] = field(default_factory=list)
    other_settings: list[ClassificationFigure] = field(default_factory=list)

    @property
    def expected(self) -> int:
        """Number of runs that should be there."""
        return len(self.values) + sum(len(hole.seeds) for hole in self.holes)


@dataclass
class Row:
    """A method with its divergence and variant, and a cell for each column."""

    key: Key
    variant: str
    cells: list[Cell]

    @property
    def label(self) -> str:
        """The row in words, variant included."""
        return f"{self.key.label} [{self.variant}]" if self.variant else self.key.label


@dataclass(frozen=True)
class Teacher:
    """Accuracy of a column's teacher, with a spread where there are several.

    unknown: it may have seen val; hindrances: why its accuracy and a published one do not compare.
    published: what others report for the teacher of that name.
    """

    summary: Summary
    unknown: bool
    hindrances: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()


@dataclass
class PublishedRow:
    """A row of figures of others, by the name that they give the method, for each column; nothing of ours is in it."""

    label: str
    cells: list[list[Published]]


@dataclass
class Selection:
    """The choice among the points of a grid in one column, by mean val/top1.

    points: the rows of the grid that have a val/top1, in their order; chosen: the one of them with the best mean.
    gain: the best mean of the table's metric over `points` minus that of `chosen`, which choosing by that metric would
        have gained; None for a metric that is not of test or that has no better and worse.
    retrained: the row of the same settings at dataset.val_fraction=0.
    """

    column: Column
    points: list[Row]
    chosen: Row
    gain: float | None = None
    retrained: Row | None = None


@dataclass
class Table:
    """What a table says, before it has a form.

    baseline: what `Cell.to_baseline` is the difference to, in words; empty where it is to plain students alone.
    selections: the choices among the points of grids.
    unplaced: runs that belong to no cell, with their reasons; remarks: what else a reader must know.
    published_rows: what others report for these columns and no row has beside it, where that was asked for.
    """

    study: str
    metric: str
    command: str
    columns: list[Column]
    rows: list[Row]
    teachers: list[Teacher | None]
    unplaced: list[Hole]
    remarks: list[str]
    published_rows: list[PublishedRow] = field(default_factory=list)
    baseline: str = "KD"
    selections: list[Selection] = field(default_factory=list)

    def has_published(self, index: int) -> bool:
        """Whether anything published stands in the column at `index`."""
        return any(row.cells[index].published for row in self.rows) or any(
            row.cells[index] for row in self.published_rows
        )


def build_table(
    runs: Iterable[Run],
    *,
    study: str,
    metric: str,
    command: str,
    published: Iterable[ClassificationFigure] = (),
    published_rows: bool = False,
    baseline: str = KD,
    row_keys: Sequence[str] = (),
    column_keys: Sequence[str] = (),
) -> Table:
    """The table of `metric` over `runs`; `command` is what made it.

    Raises ConfigError where no row is the baseline, and where no run has a key of `row_keys` or `column_keys`.

    Args:
        row_keys: keys of the config whose values every row names, also where no two rows differ in them alone.
        column_keys: keys of the config that tell columns apart, beside data set, teacher and student.
        baseline: what differences are taken to beside the plain student: `KD`, which is method kd with divergence fkld;
            `PLAIN`, for no other; or the label of rows, with or without their variant.
        published: figures of others, to stand beside ours.
        published_rows: whether those of them that belong beside no row become rows of their own.
    """
    figures = list(published) if metric == PUBLISHED_METRIC else []
    runs = sorted(runs, key=lambda run: run.path)
    row_keys = _known_keys("rows", row_keys, runs, _OF_ROWS, elsewhere=_OF_COLUMNS | set(column_keys))
    column_keys = _known_keys("columns", column_keys, runs, _OF_COLUMNS, elsewhere=_OF_ROWS)
    groups, unplaced, remarks = _group(runs, column_keys)
    columns = _columns(groups)
    members = {column: [group for group in groups if _belongs(group, column)] for column in columns}
    rows = _rows(columns, members, row_keys)
    title, to = _baseline(rows, baseline)
    selections = []
    for index, column in enumerate(columns):
        cells = [row.cells[index] for row in rows]
        _fill(cells, metric)
        _find_missing(cells)
        _compare([(row, row.cells[index]) for row in rows], title, to)
        remarks += _mark_best(column, cells)
        _set_beside(column, [(row.key, row.cells[index]) for row in rows], figures)
        selections += _select(column, rows, index, metric)
    teachers = [_teacher(members[column], teacher_split(metric)) for column in columns]
    teachers = [
        teacher and replace(teacher, published=_published_teacher(teacher, column, figures))
        for column, teacher in zip(columns, teachers, strict=True)
    ]
    for column, teacher in zip(columns, teachers, strict=True):
        if teacher is not None and teacher.summary.n > 1:
            remarks.append(f"the teacher's line of {column.title} is a mean of {teacher.summary.n} teachers")
    others = _published_rows(columns, rows, figures) if published_rows else []
    remarks = list(dict.fromkeys(remarks))
    return Table(study, metric, command, columns, rows, teachers, unplaced, remarks, others, title, selections)


def teacher_split(metric: str) -> str:
    """The split whose teacher accuracy stands beside `metric`."""
    return "val" if metric.startswith("val/") else "test"


def teacher_label(metric: str) -> str:
    """What the teacher's line is called beside `metric`: another one than its own accuracy must not be taken for it."""
    split = teacher_split(metric)
    return f"teacher ({split})" if metric == f"{split}/top1" else f"teacher ({split} top-1)"


def show(value: Any) -> str:
    """A setting's value as a table shows it; hashes are cut to eight digits."""
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, tuple):
        return "[" + ", ".join(show(part) for part in value) + "]"
    if value is None:
        return "not set"
    text = str(value)
    return text[:8] if _HASH.fullmatch(text) else clean(text, 60)


def _key(run: Run) -> Key:
    """The row's key of a run."""
    return Key(run.method, run.divergence, run.alpha, run.beta)


def _known_keys(
    what: str, names: Sequence[str], runs: list[Run], given: frozenset[str], elsewhere: frozenset[str]
) -> list[str]:
    """The `names`, each once, without those that are always there. Raises ConfigError for one that no run has.

    Args:
        what: the key of the command, for the message.
        given: names that make rows or columns whether they are asked for or not; elsewhere: those that make the other.
    """
    if not names:
        return []
    known = {name for run in runs if run.identified for name in run.parameters} - given - elsewhere
    for name in names:
        if name in given or name in known:
            continue
        near = nearest(name, known | given)
        hint = " or ".join(f"{what}={other}" for other in near)
        problem = f"no run has the key {clean(name, 60)!r}"
        if name in elsewhere:
            problem, hint = f"{name} makes {'columns' if what == 'rows' else 'rows'} and cannot make {what}", ""
        raise ConfigError(f"{what}: {problem}", expected=list_names(known | given, most=40), hint=hint)
    return [name for name in dict.fromkeys(names) if name not in given]


def _place(run: Run, column_keys: Sequence[str]) -> Column:
    """The column of a run."""
    settings = tuple((name, run.parameters.get(name)) for name in column_keys)
    return Column(run.dataset, run.teacher, run.student, settings)


def _group(runs: list[Run], column_keys: Sequence[str]) -> tuple[list[Group], list[Hole], list[str]]:
    """Groups of the runs, the holes that fit none, and remarks on runs that are there twice."""
    real: dict[tuple, Group] = {}
    seen: dict[str, Run] = {}
    remarks, unplaced = [], []
    for run in runs:
        if not run.done:
            continue
        if run.fingerprint in seen:
            first = seen[run.fingerprint]
            if run.metrics == first.metrics:
                remarks.append(f"`{run.path}` is the same run as `{first.path}` and is counted once")
            else:
                remarks.append(f"`{run.path}` has the fingerprint of `{first.path}`, other figures, and is not counted")
            continue
        seen[run.fingerprint] = run
        key, place = _key(run), _place(run, column_keys)
        group = Group(key, place, run.parameters, run.group)
        group = real.setdefault((run.group, key, place, group.set_parameters), group)
        if run.seed in group.runs:
            twin = group.runs[run.seed].path
            remarks.append(f"`{run.path}` has the group and seed of `{twin}` and is not counted")
        else:
            group.runs[run.seed] = run
    near: dict[tuple, list[Group]] = defaultdict(list)
    for group in real.values():
        near[group.key, group.place].append(group)
    for run in runs:
        if run.done:
            continue
        if not run.identified:
            unplaced.append(Hole((), run.why, run.path))
            continue
        key, place = _key(run), _place(run, column_keys)
        fitting = [group for group in near[key, place] if _agree(run.parameters, group.parameters)]
        if len(fitting) > 1:
            unplaced.append(Hole((run.seed,), f"{run.why} (may belong to several rows)", run.path))
            continue
        if not fitting:
            fitting = [Group(key, place, run.parameters)]
            near[key, place] += fitting
        if run.seed in fitting[0].seeds:
            remarks.append(f"`{run.path}` is not needed, since its seed is there from elsewhere: {run.why}")
        else:
            fitting[0].holes.append(run)
    return [group for groups in near.values() for group in groups], unplaced, remarks


def _agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two sets of parameters, one of them from a config, are equal in every key that both have."""
    return all(b[name] == value for name, value in a.items() if name in b)


def _columns(groups: list[Group]) -> list[Column]:
    """The columns: every data set and pair, and plain students that no pair has."""
    pairs = {group.place for group in groups if group.key.method != "none"}
    plain = [group for group in groups if group.key.method == "none"]
    alone = {group.place for group in plain if not any(_belongs(group, column) for column in pairs)}
    return sorted(pairs | alone, key=lambda column: column.order)


def _belongs(group: Group, column: Column) -> bool:
    """Whether a group stands in a column; plain training does in every column of its data set and student."""
    if group.key.method == "none":
        is_same = (group.place.dataset, group.place.student) == (column.dataset, column.student)
        return is_same and _agree(dict(column.settings), group.parameters)
    return group.place == column


def _rows(columns: list[Column], members: dict[Column, list[Group]], row_keys: Sequence[str]) -> list[Row]:
    """The rows in order, each with the cells of its groups and empty cells where it has none.

    Args:
        row_keys: settings that every row names that has them.
    """
    by_key: dict[Key, dict[int, list[Group]]] = defaultdict(lambda: defaultdict(list))
    for index, column in enumerate(columns):
        for group in members[column]:
            by_key[group.key][index].append(group)
    rows = []
    for key in sorted(by_key, key=lambda key: key.order):
        stated = {name for groups in by_key[key].values() for group in groups for name in group.parameters}
        names = [name for name in row_keys if name in stated]
        names += [name for name in _differing(by_key[key].values()) if name not in names]
        split: dict[tuple, list[Cell]] = {}
        for index, groups in by_key[key].items():
            for group in groups:
                values = tuple(_setting(group, name) for name in names)
                split.setdefault(values, [Cell() for _ in columns])[index].group = group
        for values in sorted(split, key=_order):
            words = [f"{name}={show(value)}" for name, value in zip(names, values, strict=True) if value is not _UNSAID]
            if len(words) > MOST_IN_VARIANT:
                words[MOST_IN_VARIANT:] = [f"and {len(words) - MOST_IN_VARIANT:,} further settings"]
            rows.append(Row(key, ", ".join(words), split[values]))
    return rows


def _differing(cells: Iterable[list[Group]]) -> list[str]:
    """The names of the settings that tell apart the groups of one cell; "group" where no setting does."""
    names: set[str] = set()
    crowded = [groups for groups in cells if len(groups) > 1]
    for groups in crowded:
        for name in {name for group in groups for name in group.parameters}:
            known = {group.parameters.get(name) for group in groups if group.fingerprint}
            stated = {group.parameters[name] for group in groups if name in group.parameters}
            if len(known) > 1 or len(stated) > 1:
                names.add(name)
    found = sorted(names)
    if any(
        len({tuple(_setting(group, name) for name in found) for group in groups}) < len(groups) for groups in crowded
    ):
        found.append("group")
    return found


def _setting(group: Group, name: str) -> Any:
    """A group's value of a setting, or of its fingerprint; `_UNSAID` where there is only a config that lacks it."""
    if name == "group":
        return group.fingerprint or _UNSAID
    return group.parameters.get(name, None if group.fingerprint else _UNSAID)


def _order(values: tuple) -> tuple:
    """A sort key for values of several types: numbers by size before text."""
    return tuple((0, value, "") if isinstance(value, float) else (1, 0.0, str(value)) for value in values)


def _fill(cells: list[Cell], metric: str) -> None:
    """Put the values of `metric` into the cells, and the holes of runs that are there but not done."""
    for cell in cells:
        if cell.group is None:
            continue
        for seed, run in sorted(cell.group.runs.items()):
            value = run.metric(metric)
            if value is None:
                cell.holes.append(Hole((seed,), f"done, but has no {metric}", run.path))
            else:
                cell.values[seed] = value
        cell.holes += [Hole((run.seed,), run.why, run.path) for run in cell.group.holes]
        cell.holes.sort(key=lambda hole: hole.seeds)
        cell.summary = summarise(cell.values.values())
        selection = (run.metric(SELECTION) for run in cell.group.runs.values())
        cell.val = summarise(value for value in selection if value is not None)
        cell.mixed = len(cell.group.environments) > 1


def _find_missing(cells: list[Cell]) -> None:
    """Add a hole for every seed that at least half of a column's rows have and this row has not."""
    groups = [cell.group for cell in cells if cell.group is not None]
    counts: dict[int, int] = defaultdict(int)
    for group in groups:
        for seed in group.seeds:
            counts[seed] += 1
    expected = {seed for seed, count in counts.items() if 2 * count >= len(groups)}
    for cell in cells:
        missing = tuple(sorted(expected - cell.group.seeds)) if cell.group is not None else ()
        if missing:
            cell.holes.append(Hole(missing, "missing: no such run"))


def is_better(metric: str) -> int | None:
    """1 where a higher value of `metric` is better, -1 where a lower one is, None where neither is."""
    name = metric.rpartition("/")[2]
    return 1 if PERCENT.fullmatch(name) else -1 if name in LOWER_IS_BETTER else None


def _baseline(rows: list[Row], name: str) -> tuple[str, list[Row]]:
    """What a baseline is called in the table, and its rows; none for plain students. Raises ConfigError."""
    wanted = " ".join(name.split())
    if wanted in (PLAIN, "plain student"):
        return "", []
    if wanted == KD:
        return "KD", [row for row in rows if (row.key.method, row.key.divergence) == ("kd", "fkld")]
    found = [row for row in rows if wanted == row.label] or [row for row in rows if wanted == row.key.label]
    if not found:
        labels = {label for row in rows for label in (row.label, row.key.label)} - {"plain student"} | {KD, PLAIN}
        hint = " or ".join(f"'baseline={label}'" for label in nearest(wanted, labels))
        raise ConfigError(f"no row is called {clean(wanted, 60)!r}", expected=list_names(labels, most=40), hint=hint)
    return wanted, found


def _compare(column: list[tuple[Row, Cell]], title: str, to: list[Row]) -> None:
    """Put the differences to the plain student and to the rows `to`, called `title`, into the cells of one column."""
    filled = [(row, cell) for row, cell in column if cell.values]
    plain = _Baseline([cell for row, cell in filled if row.key.method == "none"], "plain student", teacher=False)
    of_baseline = {id(row) for row in to}
    baseline = _Baseline([cell for row, cell in filled if id(row) in of_baseline], title, teacher=True)
    for row, cell in filled:
        if row.key.method != "none":
            cell.to_plain = plain.difference(cell)
        if id(row) not in of_baseline:
            cell.to_baseline = baseline.difference(cell)


def protocol_of(group: Group, *, teacher: bool = True) -> frozenset[tuple[str, Any]]:
    """Data, recipe and precision of a group, and its teacher where that is asked for."""
    free = _FREE if teacher else (*_FREE, "teacher.")
    return frozenset((name, value) for name, value in group.set_parameters if not name.startswith(free))


class _Baseline:
    """The cells of one column that others may be compared with, found by data, recipe and precision.

    Args:
        cells: the candidates.
        name: what they are, in words.
        teacher: whether the teacher must be the same as well (never asked of plain training).
    """

    def __init__(self, cells: list[Cell], name: str, *, teacher: bool) -> None:
        self.name, self.teacher = name, teacher
        self.cells = cells
        self.by_protocol: dict[frozenset, list[Cell]] = defaultdict(list)
        for cell in cells:
            for with_teacher in {False, teacher}:
                self.by_protocol[self._protocol(cell, with_teacher)].append(cell)

    def _protocol(self, cell: Cell, with_teacher: bool) -> frozenset:
        """What must be equal in a group and its baseline."""
        return protocol_of(cell.group, teacher=with_teacher) | {("", with_teacher)}

    def difference(self, cell: Cell) -> Difference | None:
        """The difference of `cell` to its baseline; None, with a remark in the cell, where there is not one."""
        if not self.cells:
            return None
        with_teacher = self.teacher and cell.group.key.method != "none"
        protocol = self._protocol(cell, with_teacher)
        fitting = self.by_protocol.get(protocol, [])
        if len(fitting) > 1:
            own = {name: value for name, value in cell.group.parameters.items() if name not in _IN_KEY}
            exact = [other for other in fitting if _agree(own, other.group.parameters)]
            fitting = exact if len(exact) == 1 else fitting
        if len(fitting) == 1:
            return compare(cell.values, fitting[0].values)
        if fitting:
            cell.remarks.append(f"no difference to {self.name}: {len(fitting)} rows of it fit equally well")
        else:
            protocols = (self._protocol(other, with_teacher) for other in self.cells)
            nearest = min((protocol ^ other for other in protocols), key=len)
            names = ", ".join(sorted({name for name, _ in nearest}))
            cell.remarks.append(f"no difference to {self.name}: none has the same {names}")
        return None


def _mark_best(column: Column, cells: list[Cell]) -> list[str]:
    """Mark the best mean val/top1 of a column; a remark where the rows' validation sets differ."""
    seen = [cell for cell in cells if cell.val is not None]
    data = {
        frozenset((name, value) for name, value in cell.group.set_parameters if name.startswith("dataset."))
        for cell in seen
    }
    if len(data) > 1:
        return [f"no row of {column.title} is marked as the best, since the rows' validation sets differ"]
    if len(seen) < 2:
        return []  # the best of one says nothing
    best = max(cell.val.mean for cell in seen)
    for cell in seen:
        cell.best = cell.val.mean == best
    return []


def _select(column: Column, rows: list[Row], index: int, metric: str) -> list[Selection]:
    """Choose from each grid of a column by mean val/top1, mark its points, and keep published figures to the choice."""
    grids: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        cell = row.cells[index]
        if cell.val is None or row.key.method == "none":
            continue
        if cell.group.parameters.get("dataset.val_fraction") != 0:
            grids[row.key.method, row.key.divergence, protocol_of(cell.group)].append(row)
    found = []
    for (method, divergence, _), points in grids.items():
        if len(points) < 2:
            continue
        # Of several equal ones max gives the first; what sums of decimals round to decides nothing.
        chosen = max(points, key=lambda row: round(row.cells[index].val.mean, 9))
        for row in points:
            row.cells[index].chosen = row is chosen
        family = [row for row in rows if (row.key.method, row.key.divergence) == (method, divergence)]
        again = [row for row in family if _retrains(row, chosen, index)]
        retrained = again[0] if len(again) == 1 else None
        if retrained is not None:
            whole = protocol_of(retrained.cells[index].group)
            of_grid = {id(row) for row in points}
            for row in family:
                cell = row.cells[index]
                if cell.group is None or row is retrained:
                    continue
                if id(row) in of_grid or protocol_of(cell.group) == whole:
                    cell.published, cell.other_settings = [], []
        found.append(Selection(column, points, chosen, _gain(points, chosen, index, metric), retrained))
    return found


def _gain(points: list[Row], chosen: Row, index: int, metric: str) -> float | None:
    """The best mean of `metric` over the points minus that of the chosen one."""
    sign = is_better(metric)
    own = chosen.cells[index].summary
    if not metric.startswith("test/") or sign is None or own is None:
        return None
    best = max((row.cells[index].summary.mean for row in points if row.cells[index].summary), key=lambda x: sign * x)
    return best - own.mean


def _retrains(row: Row, chosen: Row, index: int) -> bool:
    """Whether the runs of a row are those of another at dataset.val_fraction=0, and nothing else.

    A teacher that vkd trained learnt from the same split as its students, so that its weights are others as well.
    """
    group, other = row.cells[index].group, chosen.cells[index].group
    if group is None or group.parameters.get("dataset.val_fraction") != 0 or not group.runs or row.key != chosen.key:
        return False
    changed = {name for name, _ in group.set_parameters ^ other.set_parameters} - _OF_VAL
    if group.parameters.get("teacher.source") == other.parameters.get("teacher.source") == "trained":
        changed = {name for name in changed if not name.startswith("teacher.")}
    return not changed


def _teacher(groups: list[Group], split: str) -> Teacher | None:
    """The teachers' accuracy in a column, each teacher counted once; None where no run states it."""
    accuracies: dict[Any, float] = {}
    unknown = False
    hindrances: dict[str, None] = {}
    for run in sorted((run for group in groups for run in group.runs.values()), key=lambda run: run.path):
        accuracy = run.teacher_accuracy(split)
        if accuracy is not None:
            accuracies.setdefault(str(run.teacher_fact("sha256") or accuracy), accuracy)
            unknown = unknown or run.teacher_fact("saw_val") is not False
            if run.teacher_fact("source") == "trained":
                hindrances["the teacher here is one that vkd trained, another network than the published one"] = None
            hindrances |= dict.fromkeys(_other_sizes(run.dataset, run.parameters, ("test", "classes")))
    return Teacher(summarise(accuracies.values()), unknown, tuple(hindrances)) if accuracies else None


def _concerns(figure: ClassificationFigure, column: Column) -> bool:
    """Whether a figure is of a column; that of a student without a teacher is of every column of the student."""
    if figure.method == "none":
        return (figure.dataset, figure.student) == (column.dataset, column.student)
    return (figure.dataset, figure.teacher, figure.student) == (column.dataset, column.teacher, column.student)


def _set_beside(column: Column, filled: list[tuple[Key, Cell]], figures: list[ClassificationFigure]) -> None:
    """Put into the cells of a column what others report for their method, divergence, alpha, beta and settings."""
    figures = [figure for figure in figures if _concerns(figure, column)]
    teachers = [figure.top1 for figure in figures if figure.method == TEACHER]
    for key, cell in filled:
        if cell.group is None:
            continue
        fitting = []
        for figure in figures:
            if Key(figure.method, figure.divergence, figure.alpha, figure.beta) == key:
                fits = _agree(dict(figure.settings), cell.group.parameters)
                (fitting if fits else cell.other_settings).append(figure)
        ours = cell.summary and cell.summary.mean
        cell.published = _merge(fitting, ours, lambda figure, cell=cell: _hindrances(cell.group, figure, teachers))


def _merge(
    figures: list[ClassificationFigure],
    ours: float | None,
    hindrances: Callable[[ClassificationFigure], tuple[str, ...]] = lambda _: (),
) -> list[Published]:
    """The figures in their order, those with the same number and the same hindrances to a comparison as one."""
    merged: dict[tuple, list[ClassificationFigure]] = defaultdict(list)
    for figure in figures:
        merged[figure.top1, hindrances(figure)].append(figure)
    return [
        Published(top1, tuple(same), None if reasons or ours is None else ours - top1, reasons)
        for (top1, reasons), same in merged.items()
    ]


def _hindrances(group: Group, figure: ClassificationFigure, teachers: list[float]) -> tuple[str, ...]:
    """Why a group's accuracy and a published one do not compare; what either side does not say is no reason.

    Args:
        teachers: the published accuracies of the column's teacher.
    """
    reasons = []
    ours = group.parameters
    epochs, val_fraction = ours.get("recipe.epochs"), ours.get("dataset.val_fraction")
    train_fraction = ours.get("dataset.train_fraction")
    if figure.epochs is None:
        reasons.append("the epochs behind the published figure are not known")
    elif epochs not in (None, figure.epochs):
        reasons.append(f"recipe.epochs {show(epochs)} here, {figure.epochs} there")
    learnt = "and published students learn from all images outside test"
    if val_fraction:
        reasons.append(f"dataset.val_fraction {show(val_fraction)} here, {learnt}")
    if train_fraction not in (None, 1):
        reasons.append(f"dataset.train_fraction {show(train_fraction)} here, {learnt}")
    is_whole = not val_fraction and train_fraction in (None, 1)  # otherwise fewer images to learn from are meant
    names = ("train", "test", "classes") if is_whole else ("test", "classes")
    reasons += _other_sizes(group.place.dataset, ours, names)
    reasons += [
        f"{name} {show(ours[name])} here, {show(theirs)} there"
        for name, theirs in figure.recipe
        if ours.get(name, theirs) != theirs
    ]
    runs = group.runs.values()
    own = summarise(accuracy for run in runs if (accuracy := run.teacher_accuracy("test")) is not None)
    if own and teachers:
        theirs = min(teachers, key=lambda accuracy: abs(accuracy - own.mean))
        if abs(own.mean - theirs) > TEACHER_TOLERANCE:
            reasons.append(f"the teacher has {own.mean:.2f} here, {theirs:.2f} there")
    return tuple(reasons)


def _other_sizes(dataset: str, parameters: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Where a data set has not the number of images or classes that figures of its name are of, as in a fragment."""
    found = []
    for name in names:
        ours, theirs = parameters.get(f"dataset.{name}"), SIZES.get(dataset, {}).get(name)
        if None not in (ours, theirs) and ours != theirs:
            found.append(f"dataset.{name} {show(ours)} here, {theirs} there")
    return found


def _published_teacher(teacher: Teacher, column: Column, figures: list[ClassificationFigure]) -> tuple[Published, ...]:
    """What others report for a column's teacher, with the difference to it of a teacher that was given."""
    found = [figure for figure in figures if figure.method == TEACHER and _concerns(figure, column)]
    return tuple(_merge(found, teacher.summary.mean, lambda _: teacher.hindrances))


def _published_rows(columns: list[Column], rows: list[Row], figures: list[ClassificationFigure]) -> list[PublishedRow]:
    """The published figures of the columns that stand beside no row, a row for each name that others give a method."""
    found: dict[str, list[list[ClassificationFigure]]] = {}
    for index, column in enumerate(columns):
        placed = {figure for row in rows for other in row.cells[index].published for figure in other.figures}
        for figure in figures:
            if _concerns(figure, column) and figure.method != TEACHER and figure not in placed:
                found.setdefault(figure.label, [[] for _ in columns])[index].append(figure)
    order = list(dict.fromkeys(figure.label for figure in figures))
    return [
        PublishedRow(label, [_merge(cell, None) for cell in found[label]]) for label in sorted(found, key=order.index)
    ]
