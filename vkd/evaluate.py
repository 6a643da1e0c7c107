"""`python -m vkd.evaluate`: measure a saved student, or any network with a checkpoint, on any data set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vkd.command import import_training, parse_words, quietly, run_command
from vkd.composition import compose_config
from vkd.config import Config, parse
from vkd.errors import ConfigError, nearest, require
from vkd.records.atomic import write_json_atomically
from vkd.records.foreign import confined, read_foreign_config
from vkd.records.reading import number, read_run
from vkd.records.run_directory import RunDirectory

HELP = """\
vkd.evaluate: accuracy, calibration, entropy and agreement of a network.

    python -m vkd.evaluate run=RUN_DIRECTORY [key=value ...]
    python -m vkd.evaluate arch=NAME checkpoint=FILE dataset=NAME [key=value ...]

KEYS
  run=null                  directory of a finished run: its student, data set and teacher
  arch=null                 any timm name, with checkpoint= or pretrained=true
  checkpoint=null           weights, .safetensors or .pth
  pretrained=false          timm's pretrained weights
  split=null                val or test; null measures both
  device=auto               cuda, mps, cpu, cuda:1, ...
  evaluation_batch_size=250
  output=null               also write the figures to this JSON file
  fetch=false               true: with run=, download what its config names, a data set or pretrained weights
  dataset=NAME, dataset.KEY=VALUE, data_root=data, workers=2    as in vkd.train

EXAMPLES
  python -m vkd.evaluate run=runs/quickstart/cifar_resnet20-cifar_resnet8_width4/kd-fkld-s1-0a1b2c3d
  python -m vkd.evaluate arch=cifar_resnet56 checkpoint=resnet56.safetensors dataset=cifar100

top1, top5 and agreement are percent; nll, entropy and teacher_kl are nats; ece (15 bins) goes from 0 to 1."""


@dataclass
class EvaluateConfig:
    """The keys of this command, those that it shares with `vkd.train` aside."""

    run: str | None = None
    arch: str | None = None
    checkpoint: str | None = None
    pretrained: bool = False
    split: str | None = None
    output: str | None = None
    fetch: bool = False


MOST_PIXELS = 2**29
"""Of the images of a batch where a run's config says how many and how large: 250 of 1448x1448."""
_SHARED = ("dataset", "data_root", "workers", "device", "evaluation_batch_size")


def _split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words for this command alone, and words that mean what they mean to `vkd.train`.

    Raises ConfigError for a key that is neither.
    """
    own, shared = [], []
    for word in words:
        key, sign, _ = word.partition("=")
        if key in EvaluateConfig.__annotations__:
            own.append(word)
        elif sign and (key in _SHARED or key.startswith("dataset.")):
            shared.append(word)
        else:
            names = [*EvaluateConfig.__annotations__, *_SHARED]
            near = " or ".join(f"{name}=..." for name in nearest(key, names))
            raise ConfigError(f"there is no key {key}", expected=", ".join(names), hint=near or "--help")
    return own, shared


def _config(own: EvaluateConfig, shared: list[str]) -> Config:
    """What the words ask for; where a recorded run is measured, its data set, student and teacher come first."""
    given = {word.partition("=")[0] for word in shared}
    values = OmegaConf.to_container(compose_config(shared))
    if own.run is None:
        values["student"]["arch"] = own.arch
        return parse(values)
    recorded = read_foreign_config(Path(own.run))
    if "dataset" not in given:
        changes = OmegaConf.from_dotlist([word for word in shared if word.startswith("dataset.")])
        recorded = OmegaConf.to_container(OmegaConf.merge(recorded, changes))
        values["dataset"] = recorded["dataset"]
    names = ["student", "teacher", "method", "divergence", "cross_entropy_weight", "recipe", "precision"]
    values.update({name: recorded[name] for name in names if name in recorded})
    # The batch size may change the last digits of a figure.
    for name in {"data_root", "evaluation_batch_size"} - given:
        values[name] = recorded.get(name, values[name])
    # runs_root/study/pair/run: a run may have been moved together with its teacher.
    above = list(Path(own.run).resolve().parents)
    values["runs_root"] = str(above[min(2, len(above) - 1)])
    config = parse(values)
    side = max(config.dataset.image_size or 1, (config.teacher and config.teacher.image_size) or 1)
    require(
        config.evaluation_batch_size * side**2 <= MOST_PIXELS,
        f"{own.run} asks for batches of {config.evaluation_batch_size:,} images of {side:,}x{side:,} pixels",
        f"at most {MOST_PIXELS:,} pixels a batch",
        "evaluation_batch_size=25",
    )
    return config


def evaluate(words: Sequence[str]) -> dict[str, Any]:
    """Measure what the words ask for; see `vkd.training.assessment.assess`. Raises UserError for wrong input."""
    own_words, shared = _split_words(words)
    own = parse_words(EvaluateConfig, own_words)
    if (own.run is None) == (own.arch is None):
        raise ConfigError("name what to measure", expected="either run=DIRECTORY or arch=NAME", hint="--help")
    if own.arch is not None and (own.checkpoint is None) != own.pretrained:
        raise ConfigError(f"arch={own.arch} needs weights", expected="checkpoint=FILE or pretrained=true")
    if own.run is not None and (own.checkpoint or own.pretrained):
        raise ConfigError("run= brings its own weights", expected="checkpoint= and pretrained= with arch= alone")
    if own.run is None and own.fetch:
        raise ConfigError("fetch=true belongs to run=", expected="arch= alone: its words say what is downloaded")
    import_training()
    from vkd.training.assessment import assess

    config = _config(own, shared)
    checkpoint = own.checkpoint if own.run is None else RunDirectory(own.run).weights
    with_teacher = own.run is not None and not config.is_plain
    hint = f"fetch=true, if {own.run} may decide what is downloaded"
    with nullcontext() if own.run is None or own.fetch else confined(hint):
        report = assess(
            config, checkpoint=checkpoint, with_teacher=with_teacher, split=own.split, world_size=_world_size(own.run)
        )
    if own.output is not None:
        write_json_atomically(own.output, report)
    return report


def _world_size(run: str | None) -> int:
    """How many processes did a run, as far as its result says."""
    found = None if run is None else number(read_run(run).parameters.get("world_size"))
    return 1 if found is None else max(1, int(found))


def _table(report: dict[str, Any]) -> str:
    from vkd.training.measurement import FIGURES, PERCENT_FIGURES

    rows = [f"{report['arch']} on {report['dataset']}", f"{'':<12}" + "".join(f"{s:>12}" for s in report["images"])]
    rows.append(f"{'images':<12}" + "".join(f"{count:>12,}" for count in report["images"].values()))
    for name in FIGURES:
        values = [report["metrics"][f"{split}/{name}"] for split in report["images"]]
        digits = 2 if name in PERCENT_FIGURES else 4
        shown = ["-" if value is None else f"{value:.{digits}f}" for value in values]
        rows.append(f"{name:<12}" + "".join(f"{value:>12}" for value in shown))
    return "\n".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 2 for wrong input, 130 when asked to stop."""
    return run_command(argv, HELP, lambda words, _: print(_table(evaluate(words))))


if __name__ == "__main__":
    sys.exit(quietly(main))
