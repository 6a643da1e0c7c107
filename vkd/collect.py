"""Collect the runs of a study into tables, plots and a report: `python -m vkd.collect study=quickstart`.

Reads run directories and published figures; torch is not imported, so this works wherever the files are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import fields

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from rich.console import Console

from vkd.collecting import CollectConfig, collect, list_studies, read_table
from vkd.command import quietly, run_command
from vkd.errors import ConfigError, list_names, nearest
from vkd.records.finished import require_study_name
from vkd.records.published import read_classification
from vkd.records.remembered import RunMemory
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
    records=false           true: runs.jsonl as well, the records of all runs of the table, to publish with it
    watch=false             true: shows the table again and again while runs go on, until Ctrl-C, and writes nothing; in
                            place on a terminal, elsewhere whenever it has changed
    every=2                 seconds between two looks
    tracker=none            offline or wandb: table, figures and report as one W&B run of the study's group, into W&B's
                            offline files or to W&B itself; with project=vkd and entity=NAME

Writes to results_root/study and prints the table:
    table.md, table.csv, table.tex    the table; the last for a paper (needs booktabs). The CSV has the maximum over
                                      test epochs as well, in a column that says so
    report.html                       everything on one page, which needs no network
    accuracy.{png,svg}                every seed of every row
    alpha_beta.{png,svg}              the map of a grid of alpha and beta, and alpha_beta_line the line alpha + beta = 1
    curves, reliability, cost         training, calibration, and accuracy against parameters, operations and images/s
What was made from the same files before is left as it is.

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
_EXPECTED = {
    "published_rows": "true or false",
    "records": "true or false",
    "watch": "true or false",
    "every": "seconds, above 0",
}
_TRACKERS = ("none", "offline", "wandb")


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
        shown = list_studies(config.runs_root)
        raise ConfigError("which study?", expected="study=NAME", hint=shown)
    config = OmegaConf.to_object(config)
    if not (math.isfinite(config.every) and config.every > 0):
        raise ConfigError(f"every={config.every} is no time to wait", expected=_EXPECTED["every"])
    if config.tracker not in _TRACKERS:
        near = " or ".join(f"tracker={name}" for name in nearest(config.tracker, _TRACKERS))
        raise ConfigError(f"there is no tracker {config.tracker!r}", expected=list_names(_TRACKERS), hint=near)
    require_study_name(config.study)
    return config


def _collect(words: list[str], _: Console) -> None:
    config = parse(words)
    if config.watch:
        memory = RunMemory(config.runs)
        published = read_classification(config.published)
        watch_table(lambda: read_table(config, memory, published), config.every)
    collect(config, show=lambda make: print_table(make, config.folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the words `argv` (those of the command line by default); its exit code."""
    return run_command(argv, HELP, _collect)


if __name__ == "__main__":
    sys.exit(quietly(main))
