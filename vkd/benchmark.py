"""`python -m vkd.benchmark`: how fast this machine trains, beside the classic loop and beside what it could do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vkd.command import import_training, logger, parse_words, quietly, run_command
from vkd.composition import compose_config, group_choices
from vkd.config import Config, parse
from vkd.errors import ConfigError, list_names, nearest
from vkd.speed.scratch import scratch_folder

if TYPE_CHECKING:
    from rich.console import Console

LOOP_NAMES = ("classic", "run", "cached", "fused", "bound", "plain")
OTHER_PARTS = ("profile", "divergences", "startup")

HELP = """\
vkd.benchmark: images a second and peak memory of training, side by side, on this machine.

    python -m vkd.benchmark [key=value ...]

PARTS, measured in turn in one process; evaluation is in none of them
  classic      what published code does: images augmented one by one in worker processes, fp32, contiguous,
               .item() in every step
  run          vkd's run
  cached       vkd's run with the teacher's logits on all views in its cache
  fused        vkd's students side by side: a grid of alpha and beta of one teacher (student-images/s)
  bound        the same networks, loss and optimizer with the same switches on one batch: no data, no metrics
  plain        vkd's run without a teacher
  profile      what the bound's step spends its time on, and what the device's arithmetic would allow
  divergences  each divergence, forward and backward, beside torch.nn.functional.kl_div
  startup      `vkd.train --help`, `import vkd` and the first step of the default run

KEYS
  parts=[...]           some of the parts; without it all, and those that these data cannot have are left out
  repetitions=5         alternations; tables show the median and the range
  steps=null            timed steps of a part in an alternation; null: as many as take `run` about `seconds`
  seconds=3
  students=9            of the part fused
  shapes=[64x100,256x1000,8x512x50257]
                        of the logits in the part divergences; the first number as memory allows, and on a CPU such that
                        there are at most 2^25 of them
  output=results/speed  folder of <device>_<pair>_<precision>.json; null: none is written
  and every word of vkd.train: dataset=, pair=, teacher.arch=, precision=, device=, workers=, recipe.batch_size=,
  channels_last=, compile=, fused_optimizer=, graphs=, teacher.compile=, teacher.fold=, ...

Weights decide no speed: a teacher without teacher.checkpoint or teacher.pretrained has random ones here.

EXAMPLES
  python -m vkd.benchmark dataset=cifar100 pair=resnet56_resnet20
  python -m vkd.benchmark dataset=cifar100 pair=resnet56_resnet20 precision=bf16 'parts=[run,fused,bound]' students=16

Exit status: 0; 2 for wrong input; 130 when asked to stop."""


@dataclass
class BenchmarkConfig:
    """The keys of this command, those that it shares with `vkd.train` aside."""

    parts: list[str] | None = None
    repetitions: int = 5
    steps: int | None = None
    seconds: float = 3.0
    students: int = 9
    shapes: list[str] = field(default_factory=lambda: ["64x100", "256x1000", "8x512x50257"])
    output: str | None = "results/speed"


def read_words(words: Sequence[str]) -> tuple[BenchmarkConfig, Config]:
    """The command's own keys and the config of the runs that it measures. Raises ConfigError."""
    own_names = [entry.name for entry in fields(BenchmarkConfig)]
    known = {*own_names, *(entry.name for entry in fields(Config)), *group_choices()}
    own_words, shared = [], []
    for word in words:
        key, sign, _ = word.partition("=")
        root = key.lstrip("+~").partition(".")[0].partition("@")[0]
        if sign and root not in known:
            hint = " or ".join(f"{name}=..." for name in nearest(root, known)) or "--help"
            raise ConfigError(f"there is no key {key}", expected=list_names(known, most=60), hint=hint)
        (own_words if key in own_names else shared).append(word)
    own = parse_words(BenchmarkConfig, own_words)
    _check(own)
    composed = compose_config(shared)
    import_training()
    return own, parse(composed)


def _check(own: BenchmarkConfig) -> None:
    parts = [*LOOP_NAMES, *OTHER_PARTS]
    for part in own.parts or []:
        if part not in parts:
            hint = " or ".join(f"parts=[{name}]" for name in nearest(part, parts))
            raise ConfigError(f"there is no part {part!r}", expected=", ".join(parts), hint=hint)
    for name in ("repetitions", "students", "steps"):
        value = getattr(own, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}", expected="a whole number from 1", hint="--help")
    if not 0 < own.seconds < float("inf"):
        raise ConfigError(f"seconds = {own.seconds}", expected="a number above 0")
    if own.output is not None and Path(own.output).is_file():
        raise ConfigError(f"output = {own.output} is a file", expected="a folder", hint="output=results/speed")
    if own.parts == [] or not own.shapes:
        raise ConfigError("there is nothing to measure", expected="at least one part and one shape", hint="--help")


def benchmark(words: Sequence[str], console: Console) -> dict[str, Any]:
    """Measure what the words ask for, print it and write it; see `vkd.speed.report`.

    Raises UserError for wrong input, OSError where the file cannot be written, once the figures are printed.
    """
    own, config = read_words(words)
    from vkd.speed.report import measure, write
    from vkd.speed.tables import print_report

    with scratch_folder() as folder:
        report = measure(own, config, folder, words)
    print_report(report, console)
    if own.output is not None:
        logger.info("\nwritten to %s", write(report, Path(own.output)))
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 2 for wrong input, 130 when asked to stop."""
    return run_command(argv, HELP, benchmark)


if __name__ == "__main__":
    sys.exit(quietly(main))
