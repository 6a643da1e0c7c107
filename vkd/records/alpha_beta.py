"""The alpha-beta plane of a table: which rows are the points of one grid, where they lie and what lies next to them.

- A grid is the rows of a column that have the divergence abkd and agree in everything but alpha and beta.
- Rows of fkld and rkld are its points (1, 0) and (0, 1) where they agree with it in everything else. What
  divergence.match_kl_scale multiplies by is 1 there, so that it may be anything.
- Of a row without a finished run there is a config alone, which says less than a result. It stands in every grid that
  it does not contradict.
- Fewer than two distinct points of abkd are no grid, and one beyond a million is no point.

alpha and beta count as the same where they agree to nine decimals: a range of a sweep says 0.30000000000000004.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vkd.records.grouping import Cell, Column, Group, Hole, Row, Table, show
from vkd.records.statistics import Summary

NAMED: dict[tuple[float, float], str] = {
    (1.0, 0.0): "FKLD",
    (0.0, 1.0): "RKLD",
    (0.5, 0.5): "Hellinger",
    (1.0, 1.0): "squared Euclidean",
    (0.0, 0.0): "log-Euclidean",
}
"""Divergences that are points of the plane, up to a factor (Cichocki et al., Generalized Alpha-Beta Divergences and
Their Application to Robust Nonnegative Matrix Factorization, Entropy 2011): forward and reverse Kullback-Leibler
divergence, the squared distances of Hellinger and of Euclid, and Euclid's of the logarithms."""

OWN_POINTS: dict[str, tuple[float, float]] = {"fkld": (1.0, 0.0), "rkld": (0.0, 1.0)}
"""Where divergences lie that have another name than abkd."""

ALPHA_BETA = "abkd"
_DECIMALS = 9
_FURTHEST = 1e6  # from 0: no map can show both this and the points that divergences are named for
_LEAST_FILLED = 0.5  # share of the betas that an alpha of the regular part has, and the other way round
_MOST_IN_TITLE = 4
_OF_POINT = frozenset({"divergence.name", "divergence.alpha", "divergence.beta"})
_SCALE = "divergence.match_kl_scale"


@dataclass(frozen=True)
class GridPoint:
    """A row of the table at its place in the plane.

    alpha, beta: rounded to nine decimals; row: of the table; cell: the row's in the column of the grid.
    """

    alpha: float
    beta: float
    row: Row
    cell: Cell

    @property
    def val(self) -> Summary | None:
        """val/top1 in percent over the seeds; None where no finished run has one."""
        return self.cell.val

    @property
    def value(self) -> Summary | None:
        """The table's metric over the seeds; None where no finished run has one."""
        return self.cell.summary

    @property
    def chosen(self) -> bool:
        """Whether val/top1 chose it among the points of abkd."""
        return self.is_alpha_beta and bool(self.cell.chosen)

    @property
    def holes(self) -> list[Hole]:
        """The runs that should be there and are not."""
        return self.cell.holes

    @property
    def is_alpha_beta(self) -> bool:
        """Whether the runs have the divergence abkd, and not the same one by a name of its own."""
        return self.row.key.divergence == ALPHA_BETA

    @property
    def name(self) -> str:
        """What the divergence at this place is called; empty where it has no name."""
        return NAMED.get((self.alpha, self.beta), "")

    @property
    def label(self) -> str:
        """The point in words: "(0.7, 0.3)", "(0.5, 0.5) Hellinger", and "FKLD" for runs of fkld."""
        if not self.is_alpha_beta:
            return self.name
        return f"({show(self.alpha)}, {show(self.beta)}) {self.name}".rstrip()


@dataclass(frozen=True)
class Grid:
    """Points that differ in alpha and beta alone.

    column: of the table, at `index` there; method: of all points.
    title: the column, the method, and the settings that tell this grid from the others of its column.
    points: by alpha, then beta, then abkd before other names; a place may hold a point of each.
    """

    column: Column
    index: int
    method: str
    title: str
    points: list[GridPoint]

    @cached_property
    def _axes(self) -> tuple[list[float], list[float]]:
        """alphas and betas of the regular part."""
        return _regular({(point.alpha, point.beta) for point in self.points if point.is_alpha_beta})

    @cached_property
    def _lattice(self) -> dict[tuple[int, int], GridPoint]:
        """The points of abkd in the regular part, by the places of their alpha and beta in the axes."""
        alphas, betas = ({value: place for place, value in enumerate(axis)} for axis in self._axes)
        return {
            (alphas[point.alpha], betas[point.beta]): point
            for point in self.points
            if point.is_alpha_beta and point.alpha in alphas and point.beta in betas
        }

    @property
    def alphas(self) -> list[float]:
        """The alphas of the regular part, ascending; empty where the points lie on no lattice.

        The regular part is what is left when those alphas and betas are left out that have too few points, until each
        alpha has a point at half of the betas or more, each beta at half of the alphas or more, and more than half of
        all pairs have one. It holds at least two points.
        """
        return self._axes[0]

    @property
    def betas(self) -> list[float]:
        """The betas of the regular part, ascending; empty where the points lie on no lattice."""
        return self._axes[1]

    @property
    def chosen(self) -> GridPoint | None:
        """The point that val/top1 chose; None where it is of another grid, or none was."""
        return next((point for point in self.points if point.chosen), None)

    def at(self, alpha: float, beta: float) -> GridPoint | None:
        """The point of abkd at a pair of the regular part; None where no run is of it."""
        alphas, betas = self._axes
        if alpha not in alphas or beta not in betas:
            return None
        return self._lattice.get((alphas.index(alpha), betas.index(beta)))

    def is_regular(self, point: GridPoint) -> bool:
        """Whether a point of abkd lies in the regular part."""
        return point.is_alpha_beta and point.alpha in self._axes[0] and point.beta in self._axes[1]

    def neighbours(self, point: GridPoint) -> list[GridPoint]:
        """The points of abkd one step from `point` in alpha, in beta or in both: up to eight, in the order of points.

        Steps are those of the regular part; a point outside it has no neighbours.
        """
        if not self.is_regular(point):
            return []
        alphas, betas = self._axes
        x, y = alphas.index(point.alpha), betas.index(point.beta)
        around = ((x + i, y + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0))
        return [self._lattice[place] for place in around if place in self._lattice]


def grids_of(table: Table) -> list[Grid]:
    """The grids of a table: by column, then by method, then by the settings that tell them apart.

    Where rows of one place differ in nothing that their records state, they are points of several grids.
    """
    found = []
    for index, column in enumerate(table.columns):
        families = _families(table.rows, index)
        names = _telling(families)
        for family in families:
            words = [
                f"{name.removeprefix('divergence.')}={show(family.settings[name])}"
                for name in names
                if family.settings.get(name) is not None
            ]
            if len(words) > _MOST_IN_TITLE:
                words[_MOST_IN_TITLE:] = [f"and {len(words) - _MOST_IN_TITLE:,} further settings"]
            layers = _layers(family.rows, index)
            for number, layer in enumerate(layers, start=1):
                if len({(point.alpha, point.beta) for point in layer}) < 2:
                    continue
                more = [f"set {number} of runs"] if len(layers) > 1 else []
                title = ", ".join([f"{column.title}: {family.method}", *words, *more])
                points = layer + [_point(row, index) for row in family.own_rows]
                points.sort(key=lambda point: (point.alpha, point.beta, not point.is_alpha_beta))
                found.append(Grid(column, index, family.method, title, points))
    return found


class _Family:
    """The rows of one column that agree in everything but alpha and beta.

    Args:
        group: of its first row.
    """

    def __init__(self, group: Group) -> None:
        self.method = group.key.method
        self.is_whole = bool(group.fingerprint)
        self.settings = _settings(group)
        self.rows: list[Row] = []
        self.own_rows: list[Row] = []


def _families(rows: list[Row], index: int) -> list[_Family]:
    """The families of a column, in the order of their first rows, each with its rows of fkld and rkld."""
    groups = [(row, row.cells[index].group) for row in rows if row.cells[index].group is not None]
    points = [
        (row, group)
        for row, group in groups
        if group.key.divergence == ALPHA_BETA
        and all(value is not None and abs(value) <= _FURTHEST for value in (group.key.alpha, group.key.beta))
    ]
    exact: dict[tuple, _Family] = {}
    for row, group in points:
        if group.fingerprint:
            exact.setdefault((group.key.method, _set(_settings(group))), _Family(group)).rows.append(row)
    whole = _Finder(exact.values())
    alone: dict[tuple, _Family] = {}
    for row, group in points:
        if not group.fingerprint:
            settings = _settings(group)
            fitting = whole.agreeing(group.key.method, settings)
            key = (group.key.method, _set(settings))
            for family in fitting or [alone.setdefault(key, _Family(group))]:
                family.rows.append(row)
    places = {id(row): place for place, row in enumerate(rows)}
    families = [*exact.values(), *alone.values()]
    for family in families:
        family.rows.sort(key=lambda row: places[id(row)])
    families.sort(key=lambda family: places[id(family.rows[0])])
    _add_own_rows(families, [(row, group) for row, group in groups if group.key.divergence in OWN_POINTS])
    return families


def _add_own_rows(families: list[_Family], own: list[tuple[Row, Group]]) -> None:
    """Put the rows of fkld and rkld into the families that they agree with but for the scale of the divergence."""
    by_settings: dict[tuple, list[_Family]] = defaultdict(list)
    for family in families:
        if family.is_whole:
            by_settings[family.method, _set(family.settings, without=_SCALE)].append(family)
    every, alone = _Finder(families), _Finder(family for family in families if not family.is_whole)
    for row, group in own:
        settings = {name: value for name, value in _settings(group).items() if name != _SCALE}
        method = group.key.method
        if group.fingerprint:
            fitting = by_settings.get((method, _set(settings)), []) + alone.agreeing(method, settings)
        else:
            fitting = every.agreeing(method, settings)
        for family in fitting:
            family.own_rows.append(row)


class _Finder:
    """Finds the families that settings do not contradict, without asking each of them.

    Args:
        families: to look among.
    """

    def __init__(self, families: Iterable[_Family]) -> None:
        self.by_names: dict[tuple[str, frozenset[str]], list[_Family]] = defaultdict(list)
        for family in families:
            self.by_names[family.method, frozenset(family.settings)].append(family)
        self.by_values: dict[tuple, dict[tuple, list[_Family]]] = {}

    def agreeing(self, method: str, settings: dict[str, Any]) -> list[_Family]:
        """The families of a method that have the same value of every setting that both state."""
        found = []
        for (other, names), families in self.by_names.items():
            if other != method:
                continue
            common = tuple(sorted(names & settings.keys()))
            if (names, common) not in self.by_values:
                index: dict[tuple, list[_Family]] = defaultdict(list)
                for family in families:
                    index[tuple(family.settings[name] for name in common)].append(family)
                self.by_values[names, common] = index
            found += self.by_values[names, common].get(tuple(settings[name] for name in common), [])
        return found


def _settings(group: Group) -> dict[str, Any]:
    """What a group states, but for its point."""
    return {name: value for name, value in group.parameters.items() if name not in _OF_POINT}


def _set(settings: dict[str, Any], without: str = "") -> frozenset[tuple[str, Any]]:
    """The settings that are not null, but for one of them."""
    return frozenset((name, value) for name, value in settings.items() if value is not None and name != without)


def _telling(families: list[_Family]) -> list[str]:
    """The names of the settings in which families of one method differ that have more than one row."""
    names: set[str] = set()
    by_method: dict[str, list[_Family]] = defaultdict(list)
    for family in families:
        if len(family.rows) > 1:
            by_method[family.method].append(family)
    for same in by_method.values():
        for name in {name for family in same for name in family.settings}:
            if len({family.settings[name] for family in same if name in family.settings}) > 1:
                names.add(name)
    return sorted(names, key=lambda name: (not name.startswith(("divergence.", "method.")), name))


def _layers(rows: list[Row], index: int) -> list[list[GridPoint]]:
    """The points of rows, the n-th of each place in the n-th layer."""
    seen: dict[tuple[float, float], int] = defaultdict(int)
    layers: list[list[GridPoint]] = []
    for point in (_point(row, index) for row in rows):
        number = seen[point.alpha, point.beta]
        seen[point.alpha, point.beta] += 1
        if number == len(layers):
            layers.append([])
        layers[number].append(point)
    return layers


def _point(row: Row, index: int) -> GridPoint:
    """A row at its place."""
    alpha, beta = OWN_POINTS.get(row.key.divergence, (row.key.alpha, row.key.beta))
    # -0.0 would be another text than 0.0.
    return GridPoint(round(alpha, _DECIMALS) + 0.0, round(beta, _DECIMALS) + 0.0, row, row.cells[index])


def _regular(places: set[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The alphas and betas of the regular part of some places, ascending; both empty where there is none."""
    while places:
        by_alpha: dict[float, int] = defaultdict(int)
        by_beta: dict[float, int] = defaultdict(int)
        for alpha, beta in places:
            by_alpha[alpha] += 1
            by_beta[beta] += 1
        shares = {("alpha", alpha): n / len(by_beta) for alpha, n in by_alpha.items()}
        shares |= {("beta", beta): n / len(by_alpha) for beta, n in by_beta.items()}
        least = min(shares.values())
        # A diagonal of two points leaves each of its lines half full, and is no lattice.
        if least >= _LEAST_FILLED and len(places) > _LEAST_FILLED * len(by_alpha) * len(by_beta):
            return (sorted(by_alpha), sorted(by_beta)) if len(places) > 1 else ([], [])
        places = {(alpha, beta) for alpha, beta in places if min(shares["alpha", alpha], shares["beta", beta]) > least}
    return [], []
