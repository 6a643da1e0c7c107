"""Collect the runs of a study into tables and plots: `python -m vkd.collect study=quickstart`.

Reads run directories and published figures; torch is not imported, so this works wherever the files are.
"""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ValidationError

from vkd.command import STOPPED, quietly
from vkd.errors import ConfigError, UserError, list_names, nearest
from vkd.records.grouping import KD, Table, build_table
from vkd.records.published import DEFAULT, read_classification
from vkd.records.reading import Run, clean, printable, read_runs
from vkd.records.results import write_results
from vkd.records.terminal import print_table, watch_table

HELP = """\
vkd.collect - tables and plots of a study's runs

    python -m vkd.collect study=quickstart

Keys
    study=NAME              the folder of runs below runs_root; `study=teachers` for the trained teachers
    metric=test/top1        any name in the runs' metrics: val/top1, test/ece, test/top1_at_best_val, ...
    baseline=kd             what rows are compared with, beside the plain student: KD with fkld; none; or a row's name,
                            such as 'baseline=kd abkd (0.8, 0.3)'
    runs_root=runs          where the runs are
    results_root=results    where the results go
    published=none          no figures of others; published=results/published,mine.csv: the default, and your own
    published_rows=false    true: a row as well for each published method without runs here
    rows=KEY,KEY            keys of the config that every row names, beside method, divergence, alpha and beta, such as
                            divergence.temperature
    columns=KEY,KEY         keys of the config that tell columns apart, beside data set, teacher and student, such as
                            recipe.epochs
    watch=false             true: shows the table again and again while runs go on, until Ctrl-C, and writes nothing; in
                            place on a terminal, elsewhere whenever it has changed
    every=2                 seconds between two looks

Writes to results_root/study: table.md, table.csv, table.tex (for a paper; needs booktabs), accuracy.png, accuracy.svg;
prints the table.

A row is a method with a divergence, a column a data set with a teacher and a student, a cell mean ± standard deviation
over seeds (number of seeds) and the differences to the plain student and to the baseline. Runs that differ in anything
but their seed are never averaged. A run that failed, was cut off or is damaged is a hole, listed with its reason.

A difference is the mean over pairs of runs with the same seed, with its 95 % interval (Student's t distribution) and a
two-sided p-value: exact sign-flip permutation test up to 10 pairs, which with n pairs cannot be below 2^(1-n); paired t
test beyond. It is not corrected for the number of rows.

Rows of one method and divergence that differ in alpha, beta, temperature or weights are a grid: `¶` marks the point
with the best mean val/top1, and the notes say what selecting on test would have gained. Where that point was trained
again at dataset.val_fraction=0, this is the only row of its grid beside published figures. table.tex has of a grid the
chosen point alone.

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
    baseline: str = KD
    runs_root: str = "runs"
    results_root: str = "results"
    published: str = DEFAULT
    published_rows: bool = False
    rows: str = ""
    columns: str = ""
    watch: bool = False
    every: float = 2.0


_EXPECTED = {"published_rows": "true or false", "watch": "true or false", "every": "seconds, above 0"}


def parse(words: list[str]) -> CollectConfig:
    """The config that `key=value` words make. Raises ConfigError."""
    names = [field.name for field in fields(CollectConfig)]
    config = OmegaConf.structured(CollectConfig)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in names:
            near = nearest(name, names)
            hint = " or ".join(f"{name}={value}" for name in near) if equals else "python -m vkd.collect --help"
            raise ConfigError(f"vkd.collect has no key {name!r}", expected=list_names(names), hint=hint)
        if not value:
            raise ConfigError(f"{name} needs a value", expected=f"{name}=...", hint="python -m vkd.collect --help")
        try:
            # Names and paths are no text to be interpreted.
            config[name] = value.replace("${", "\\${")
        except ValidationError:
            raise ConfigError(f"{word} is not what this key takes", expected=_EXPECTED[name]) from None
    if OmegaConf.is_missing(config, "study"):
        shown = _list_studies(config.runs_root)
        raise ConfigError("which study?", expected="study=NAME", hint=shown)
    config = OmegaConf.to_object(config)
    if not (math.isfinite(config.every) and config.every > 0):
        raise ConfigError(f"every={config.every} is no time to wait", expected=_EXPECTED["every"])
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
        if config.watch:
            watch_table(lambda: read_table(config), config.every)
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
    table = read_table(config)
    write_results(table, Path(config.results_root, config.study))
    return table


def read_table(config: CollectConfig) -> Table:
    """The table of the study's runs as they are now. Raises UserError."""
    runs = list(read_runs(Path(config.runs_root, config.study), relative_to=config.runs_root))
    if not runs:
        folder = Path(config.runs_root, config.study)
        what = "there are no runs in" if folder.is_dir() else "there is no folder"
        raise UserError(f"nothing to collect: {what} {folder}", hint=_list_studies(config.runs_root))
    _check_metric(config.metric, runs)
    words = [f"study={config.study}"] + [f"metric={config.metric}"] * (config.metric != HEADLINE)
    words += [f"baseline={config.baseline}"] * (config.baseline != KD)
    words += [f"published={config.published}"] * (config.published != DEFAULT)
    words += ["published_rows=true"] * config.published_rows
    words += [f"{name}={value}" for name in ("rows", "columns") if (value := getattr(config, name))]
    return build_table(
        runs,
        study=config.study,
        metric=config.metric,
        baseline=config.baseline,
        command=shlex.join(["python", "-m", "vkd.collect", *words]),
        published=read_classification(config.published),
        published_rows=config.published_rows,
        row_keys=_split(config.rows),
        column_keys=_split(config.columns),
    )


def _split(text: str) -> list[str]:
    """The names in `text`, separated by commas; "none" and "null" name nothing."""
    names = [name.strip() for name in text.split(",")]
    return [] if names in (["none"], ["null"]) else [name for name in names if name]


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
