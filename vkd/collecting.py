"""From the run directories of a study to its table and its folder of results; the work of `vkd.collect`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from omegaconf import MISSING

from vkd.errors import ConfigError, UserError, list_names, nearest
from vkd.records.grouping import KD, Table, build_table
from vkd.records.published import DEFAULT, ClassificationFigure, read_classification
from vkd.records.reading import Run, clean
from vkd.records.remembered import RunMemory, stamp
from vkd.records.results import RESULTS, inputs_of, write_results

HEADLINE = "test/top1"


@dataclass
class CollectConfig:
    """The keys of the command."""

    study: str = MISSING
    metric: str = HEADLINE
    baseline: str = KD
    runs_root: str = "runs"
    results_root: str = "results"
    published: str = DEFAULT
    published_rows: bool = False
    rows: str = ""
    columns: str = ""
    records: bool = False
    watch: bool = False
    every: float = 2.0
    tracker: str = "none"
    project: str = "vkd"
    entity: str | None = None

    @property
    def runs(self) -> Path:
        """The folder of the study's runs."""
        return Path(self.runs_root, self.study)

    @property
    def folder(self) -> Path:
        """The folder of the study's results."""
        return Path(self.results_root, self.study)

    @property
    def words(self) -> list[str]:
        """The words of the command that decide what the table says, without the places of files."""
        words = [f"study={self.study}"] + [f"metric={self.metric}"] * (self.metric != HEADLINE)
        words += [f"baseline={self.baseline}"] * (self.baseline != KD)
        words += [f"published={self.published}"] * (self.published != DEFAULT)
        words += ["published_rows=true"] * self.published_rows
        words += ["records=true"] * self.records
        return words + [f"{name}={value}" for name in ("rows", "columns") if (value := getattr(self, name))]


def collect(config: CollectConfig, show: Callable[[Callable[[], Table]], None]) -> None:
    """Read the study's runs, write the results, show the table and, where that is asked for, log all of it.

    Results that were made from the same files by the same version of vkd are left as they are. Raises UserError.

    Args:
        show: given what makes the table, which takes a while, for the case that its files do not serve.
    """
    memory = RunMemory(config.runs)
    published = read_classification(config.published)
    runs = _read(config, memory)
    table = cache(partial(_make, config, runs, published))
    what = str(config.folder.resolve())

    # As they are now: what changes while the results are written is the next call's.
    made_from = stamp(inputs_of(config.study, folder=config.folder, runs_root=Path(config.runs_root)))

    def state() -> str:
        made = stamp(config.folder / name for name in RESULTS)
        return memory.state(config.words, repr(published), made_from, made)

    if not memory.was_made(what, state()):
        write_results(table(), config.folder, runs_root=Path(config.runs_root), records=config.records)
        memory.remember(what, state())
    else:
        memory.remember()
    show(table)
    if config.tracker != "none":
        from vkd.study_tracking import log_study

        log_study(
            table(),
            config.folder,
            tracker=config.tracker,
            project=config.project,
            entity=config.entity,
            directory=Path(config.runs_root, ".collected", config.study),
        )


def read_table(config: CollectConfig, memory: RunMemory, published: list[ClassificationFigure]) -> Table:
    """The table of the study's runs as they are now. Raises UserError.

    Args:
        memory: of the runs of the study.
        published: figures of others, to stand beside ours.
    """
    return _make(config, _read(config, memory), published)


def _read(config: CollectConfig, memory: RunMemory) -> list[Run]:
    """The study's runs. Raises UserError where there are none, or none has the metric."""
    runs = memory.read(relative_to=config.runs_root)
    if not runs:
        what = "there are no runs in" if config.runs.is_dir() else "there is no folder"
        raise UserError(f"nothing to collect: {what} {config.runs}", hint=list_studies(config.runs_root))
    _check_metric(config.metric, runs)
    return runs


def _make(config: CollectConfig, runs: list[Run], published: list[ClassificationFigure]) -> Table:
    return build_table(
        runs,
        study=config.study,
        metric=config.metric,
        baseline=config.baseline,
        command=shlex.join(["python", "-m", "vkd.collect", *config.words]),
        published=published,
        published_rows=config.published_rows,
        row_keys=_split(config.rows),
        column_keys=_split(config.columns),
    )


def _split(text: str) -> list[str]:
    """The names in `text`, separated by commas; "none" and "null" name nothing."""
    names = [name.strip() for name in text.split(",")]
    return [] if names in (["none"], ["null"]) else [name for name in names if name]


def list_studies(runs_root: str) -> str:
    """The studies below a folder of runs, as the words that would collect them."""
    root = Path(runs_root)
    try:
        names = sorted(clean(path.name) for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError:
        names = []
    return " or ".join(f"study={name}" for name in names[:12]) or f"train something: {root} holds no study yet"


def _check_metric(metric: str, runs: list[Run]) -> None:
    """Raise ConfigError where finished runs exist and none of them knows the metric."""
    known = {name for run in runs for name in run.metrics}
    if known and metric not in known:
        near = nearest(metric, known)
        hint = " or ".join(f"metric={name}" for name in near)
        raise ConfigError(f"no run has the metric {metric!r}", expected=list_names(known, most=40), hint=hint)
