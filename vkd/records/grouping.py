"""From runs to the structure of a table: which runs are averaged, in which row and column, and against what.

The rules, in one place:

- Runs are averaged when they differ in their seed alone: the same `group` fingerprint, and nothing else that a record
  states apart but measurements and what the fingerprint leaves out.
- A row is a method, a divergence, alpha and beta. Where anything else tells apart two groups of one cell, the row is
  split, and its `variant` names the keys that differ.
- Plain training has no teacher, so it stands in every column of its data set and student.
- A difference is stated between groups of the same data, recipe and precision (and teacher, for the one to KD) only.
- The mark of the best row looks at the validation set.
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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

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
PUBLISHED_METRIC = "test/top1"
TEACHER_TOLERANCE = 1.0  # points of accuracy between two teachers beyond which their students do not compare
_FIRST_METHODS = {"none": 0, "kd": 1}
_FIRST_DIVERGENCES = {"": -1, "fkld": 0, "rkld": 1}


@dataclass(frozen=True, order=True)
class Column:
    """A data set, a teacher (empty where there are plain runs only) and a student."""

    dataset: str
    teacher: str
    student: str

    @property
    def title(self) -> str:
        """The column's header."""
        return (
            f"{self.dataset}: {self.teacher} -> {self.student}" if self.teacher else f"{self.dataset}: {self.student}"
        )


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
    to_plain, to_kd: difference to the baseline, None where there is none; `remarks` say why.
    best: whether this is the best mean val/top1 of the column; mixed: whether the runs' environments differ.
    published: what others report for it; other_settings: their figures of the same method with settings not ours.
    """

    group: Group | None = None
    values: dict[int, float] = field(default_factory=dict)
    summary: Summary | None = None
    val: Summary | None = None
    to_plain: Difference | None = None
    to_kd: Difference | None = None
    holes: list[Hole] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    best: bool = False
    mixed: bool = False
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
class Table:
    """What a table says, before it has a form.

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
) -> Table:
    """The table of `metric` over `runs`; `command` is what made it.

    Args:
        published: figures of others, to stand beside ours.
        published_rows: whether those of them that belong beside no row become rows of their own.
    """
    figures = list(published) if metric == PUBLISHED_METRIC else []
    groups, unplaced, remarks = _group(sorted(runs, key=lambda run: run.path))
    columns = _columns(groups)
    members = {column: [group for group in groups if _belongs(group, column)] for column in columns}
    rows = _rows(columns, members)
    for index, column in enumerate(columns):
        cells = [row.cells[index] for row in rows]
        _fill(cells, metric)
        _find_missing(cells)
        _compare([(row.key, row.cells[index]) for row in rows])
        remarks += _mark_best(column, cells)
        _set_beside(column, [(row.key, row.cells[index]) for row in rows], figures)
    teachers = [_teacher(members[column], teacher_split(metric)) for column in columns]
    teachers = [
        teacher and replace(teacher, published=_published_teacher(teacher, column, figures))
        for column, teacher in zip(columns, teachers, strict=True)
    ]
    for column, teacher in zip(columns, teachers, strict=True):
        if teacher is not None and teacher.summary.n > 1:
            remarks.append(f"the teacher's line of {column.title} is a mean of {teacher.summary.n} teachers")
    others = _published_rows(columns, rows, figures) if published_rows else []
    return Table(study, metric, command, columns, rows, teachers, unplaced, list(dict.fromkeys(remarks)), others)


def teacher_split(metric: str) -> str:
    """The split whose teacher accuracy stands beside `metric`."""
    return "val" if metric.startswith("val/") else "test"


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


def _group(runs: list[Run]) -> tuple[list[Group], list[Hole], list[str]]:
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
        key, place = _key(run), Column(run.dataset, run.teacher, run.student)
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
        key, place = _key(run), Column(run.dataset, run.teacher, run.student)
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
    taught = {(place.dataset, place.student) for place in pairs}
    plain = {group.place for group in groups if group.key.method == "none"}
    return sorted(pairs | {place for place in plain if (place.dataset, place.student) not in taught})


def _belongs(group: Group, column: Column) -> bool:
    """Whether a group stands in a column; plain training does in every column of its data set and student."""
    if group.key.method == "none":
        return (group.place.dataset, group.place.student) == (column.dataset, column.student)
    return group.place == column


def _rows(columns: list[Column], members: dict[Column, list[Group]]) -> list[Row]:
    """The rows in order, each with the cells of its groups and empty cells where it has none."""
    by_key: dict[Key, dict[int, list[Group]]] = defaultdict(lambda: defaultdict(list))
    for index, column in enumerate(columns):
        for group in members[column]:
            by_key[group.key][index].append(group)
    rows = []
    for key in sorted(by_key, key=lambda key: key.order):
        names = _differing(by_key[key].values())
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


def _compare(column: list[tuple[Key, Cell]]) -> None:
    """Put the differences to the plain student and to KD into the cells of one column."""
    filled = [(key, cell) for key, cell in column if cell.values]
    plain = _Baseline([cell for key, cell in filled if key.method == "none"], "plain student", teacher=False)
    kd = _Baseline([cell for key, cell in filled if (key.method, key.divergence) == ("kd", "fkld")], "KD", teacher=True)
    for key, cell in filled:
        if key.method != "none":
            cell.to_plain = plain.difference(cell)
        if (key.method, key.divergence) != ("kd", "fkld"):
            cell.to_kd = kd.difference(cell)


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
        free = _FREE if with_teacher else (*_FREE, "teacher.")
        items = {(name, value) for name, value in cell.group.set_parameters if not name.startswith(free)}
        return frozenset(items | {("", with_teacher)})

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
