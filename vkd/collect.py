"""Collect the runs of a study into tables and plots: `python -m vkd.collect study=quickstart`.

Reads run directories and published figures; torch is not imported, so this works wherever the files are.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from vkd.command import STOPPED, quietly
from vkd.errors import ConfigError, UserError, list_names, nearest
from vkd.records.grouping import Table, build_table
from vkd.records.published import DEFAULT, read_classification
from vkd.records.reading import Run, clean, printable, read_runs
from vkd.records.results import write_results
from vkd.records.terminal import print_table

HELP = """\
vkd.collect - tables and plots of a study's runs

    python -m vkd.collect study=quickstart

Keys
    study=NAME              the folder of runs below runs_root; `study=teachers` for the trained teachers
    metric=test/top1        any name in the runs' metrics: val/top1, test/ece, test/top1_at_best_val, ...
    runs_root=runs          where the runs are
    results_root=results    where the results go
    published=none          no figures of others; published=results/published,mine.csv: the default, and your own
    published_rows=false    true: a row as well for each published method without runs here

Writes to results_root/study: table.md, table.csv, accuracy.png, accuracy.svg; prints the table.

A row is a method with a divergence, a column a data set with a teacher and a student, a cell mean ± standard deviation
over seeds (number of seeds) and the differences to the plain student and to KD. Runs that differ in anything but their
seed are never averaged. A run that failed, was cut off or is damaged is a hole, listed with its reason.

For test/top1, what others report for a data set, a teacher, a student and a method stands beside ours, with ours minus
theirs; `§` marks what does not compare, since the recipe, the size of the data set or the teacher's accuracy are not
theirs, their epochs are not known, dataset.val_fraction is not 0 or dataset.train_fraction is not 1, and the notes say
which. The format of such files: results/published/README.md.

Exit status: 0, also with holes; 2 when there is nothing to collect or the command is wrong; 130 when asked to stop.
"""
HEADLINE = "test/top1"


@dataclass
class CollectConfig:
    """The keys of the command."""

    study: str = MISSING
    metric: str = HEADLINE
    runs_root: str = "runs"
    results_root: str = "results"
    published: str = DEFAULT
    published_rows: bool = False


def parse(words: list[str]) -> CollectConfig:
    """The config that `key=value` words make. Raises ConfigError."""
    names = [field.name for field in fields(CollectConfig)]
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names:
            near = nearest(name, names)
            hint = " or ".join(f"{name}={value}" for name in near) if equals else "python -m vkd.collect --help"
            raise ConfigError(f"vkd.collect has no key {name!r}", expected=list_names(names), hint=hint)
        if not value:
            raise ConfigError(f"{name} needs a value", expected=f"{name}=...", hint="python -m vkd.collect --help")
        given[name] = value
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CollectConfig), given))
    except ValidationError:
        raise ConfigError(f"published_rows={given['published_rows']} is no switch", expected="true or false") from None
    except OmegaConfBaseException:
        shown = _list_studies(given.get("runs_root", "runs"))
        raise ConfigError("which study?", expected="study=NAME", hint=shown) from None
    parts = Path(config.study).parts
    if Path(config.study).is_absolute() or not parts or any(part.startswith(".") for part in parts):
        raise ConfigError(f"study={config.study} is no name of a study", expected="the name of a folder in runs_root")
    return config


def main(argv: list[str] | None = None) -> int:
    """Run the command with the words `argv` (those of the command line by default); the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"--help", "-h", "help"} & set(words):
        print(HELP, end="")
        return 0
    try:
        config = parse(words)
        table = collect(config)
    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return STOPPED
    print_table(table, Path(config.results_root, config.study))
    return 0


def collect(config: CollectConfig) -> Table:
    """Read the study's runs, write its results and give its table. Raises UserError."""
    runs = list(read_runs(Path(config.runs_root, config.study), relative_to=config.runs_root))
    if not runs:
        folder = Path(config.runs_root, config.study)
        what = "there are no runs in" if folder.is_dir() else "there is no folder"
        raise UserError(f"nothing to collect: {what} {folder}", hint=_list_studies(config.runs_root))
    _check_metric(config.metric, runs)
    words = [f"study={config.study}"] + [f"metric={config.metric}"] * (config.metric != HEADLINE)
    words += [f"published={config.published}"] * (config.published != DEFAULT)
    words += ["published_rows=true"] * config.published_rows
    table = build_table(
        runs,
        study=config.study,
        metric=config.metric,
        command=shlex.join(["python", "-m", "vkd.collect", *words]),
        published=read_classification(config.published),
        published_rows=config.published_rows,
    )
    write_results(table, Path(config.results_root, config.study))
    return table


def _list_studies(runs_root: str) -> str:
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


if __name__ == "__main__":
    sys.exit(quietly(main))
