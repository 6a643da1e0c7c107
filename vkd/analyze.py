"""`python -m vkd.analyze`: where a divergence moves probability mass, of one run or of a study."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vkd.command import import_training, parse_words, quietly, run_command
from vkd.errors import ConfigError, nearest
from vkd.records.analysis_tables import check_folder, run_tables, study_tables, write_analysis
from vkd.records.atomic import write_json_atomically
from vkd.records.finished import finished_run, finished_runs
from vkd.records.grouping import SELECTION, build_table
from vkd.records.reading import printable

HELP = """\
vkd.analyze: where a divergence moves probability mass, as in the analysis of ABKD (ICML 2025).

    python -m vkd.analyze run=RUN_DIRECTORY [key=value ...]
    python -m vkd.analyze study=NAME [key=value ...]

KEYS
  run=null                  directory of a finished run with a teacher: its student after the last epoch and every
                            snapshot (snapshot_every=1 of vkd.train leaves one an epoch); writes analysis.json there
  study=null                folder of runs below runs_root: forward KL, reverse KL and the alpha-beta point chosen by
                            val/top1 (where that is one of these two, the best of the others), over training and in one
                            step from the same student; the other points after the last epoch
  split=null                val, train or test; null: val, and train where there is no val. Nothing is selected by it
  images=1000               how many of it, spread evenly over its order, not augmented
  rate=0.1                  of the step z - rate * T^2 * dD/dz whose log mass ratio is looked at
  output=null               with run=: the JSON file to write; null: analysis.json in the run's directory
  runs_root=runs, results_root=results    with study=: where runs are, and where results go
  data_root=null            where the data set is; null: where the config of the run says
  teacher.checkpoint=null   where the teacher's weights are; null: where the config of the run says
  device=auto               cuda, mps, cpu, cuda:1, ...
  fetch=false               true: download what the config of a run names, a data set or pretrained weights

EXAMPLES
  python -m vkd.analyze run=runs/quickstart/cifar_resnet20-cifar_resnet8_width4/kd-fkld-s1-0a1b2c3d
  python -m vkd.analyze study=quickstart

With p the teacher's and q the student's distribution at the divergence's temperature T, and other classes than the
label's under-estimated where q < p and over-estimated elsewhere:
  share        of the L1 norm of dD/dz that goes to the target, to under- and to over-estimated classes
  classes      over how many classes it is spread: exp(entropy of the shares)
  prefers q    partial correlation of log mass ratio and q among equally wrong classes (p - q held): 0 for forward KL,
               above 0 for reverse KL (Thm. 3.2)
  hardness     |p^alpha - q^alpha| / |alpha|, or |ln p - ln q| at alpha = 0; confidence: q^beta; means over classes
  bound        the largest (|LogR| - |N|) over its bound (Prop. 3.1, 4.2), which is never above 1
study= writes to results_root/study: analysis.json, analysis.md, mass_step.png and .svg, mass_training.png and .svg."""


@dataclass
class TeacherWords:
    """What may be said of the teacher."""

    checkpoint: str | None = None


@dataclass
class AnalyzeConfig:
    """The keys of this command."""

    run: str | None = None
    study: str | None = None
    split: str | None = None
    images: int = 1000
    rate: float = 0.1
    output: str | None = None
    runs_root: str = "runs"
    results_root: str = "results"
    data_root: str | None = None
    teacher: TeacherWords = field(default_factory=TeacherWords)
    device: str = "auto"
    fetch: bool = False


def _parse(words: Sequence[str]) -> AnalyzeConfig:
    config = parse_words(AnalyzeConfig, words)
    if (config.run is None) == (config.study is None):
        raise ConfigError("name what to analyse", expected="either run=DIRECTORY or study=NAME", hint="--help")
    if config.study is not None and config.output is not None:
        raise ConfigError("output= belongs to run=", expected="results_root=FOLDER with study=")
    if config.images < 1:
        raise ConfigError(f"images={config.images}", expected="1 or more", hint="images=1000")
    if not (math.isfinite(config.rate) and config.rate > 0):
        raise ConfigError(f"rate={config.rate} is no rate of a step", expected="a number above 0", hint="rate=0.1")
    if config.split not in (None, "val", "train", "test"):
        near = " or ".join(f"split={name}" for name in nearest(config.split, ["val", "train", "test"]))
        raise ConfigError(f"there is no split {config.split!r}", expected="val, train or test", hint=near)
    return config


def analyze(words: Sequence[str]) -> str:
    """Analyse what the words ask for and write it; what to print. Raises UserError for wrong input."""
    config = _parse(words)
    runs_root = Path(config.runs_root)
    runs = finished_runs(runs_root, config.study) if config.run is None else [finished_run(Path(config.run))]
    if config.run is not None:
        target = _target(config)
    else:
        folder = Path(config.results_root, config.study)
        check_folder(folder)
    import_training()
    from vkd.analyzing import Request, Workbench, analyze_run, analyze_study

    shared = {name: getattr(config, name) for name in ("split", "images", "rate", "device", "data_root", "fetch")}
    request = Request(**shared, teacher_checkpoint=config.teacher.checkpoint)
    if config.run is not None:
        found = analyze_run(Path(config.run), runs[0], Workbench(request))
        write_json_atomically(target, found)
        return run_tables(found)
    said = {name: getattr(config, name) for name in ("study", "split", "images", "rate")}
    words = [f"{name}={value}" for name, value in said.items() if value != getattr(AnalyzeConfig, name)]
    command = shlex.join(["python", "-m", "vkd.analyze", *words])
    table = build_table(runs, study=config.study, metric=SELECTION, command=command)
    found = analyze_study(table, runs_root, request)
    write_analysis(found, folder)
    return f"{study_tables(found)}\n\n{folder}"


def _target(config: AnalyzeConfig) -> Path:
    """The file that the analysis of a run is written to. Raises ConfigError where none can be put there."""
    target = Path(config.output) if config.output else Path(config.run, "analysis.json")
    folder = target.parent
    if target.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"{folder} is a file" if folder.exists() else f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        why = f"nothing can be written to {folder}"
    else:
        return target
    raise ConfigError(f"{target} cannot be written: {why}", expected="a file in a folder of yours", hint="output=FILE")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 2 for wrong input, 130 when asked to stop."""
    return run_command(argv, HELP, lambda words, _: print(printable(analyze(words))))


if __name__ == "__main__":
    sys.exit(quietly(main))
