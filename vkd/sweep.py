"""Show how a sweep stands: `python -m vkd.sweep`, and with `watch=true` as it goes on.

Reads the index of the sweep and its run directories; torch is not imported, so this works wherever the files are.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from rich.console import Console
from rich.live import Live

from vkd.command import quietly, run_command
from vkd.errors import ConfigError, list_names, nearest
from vkd.records.sweep_table import SweepReader, SweepTable, find_sweep, to_rich, to_text

HELP = """\
vkd.sweep: how the jobs of a sweep stand.

    python -m vkd.sweep
    python -m vkd.sweep dir=runs/.sweeps/NAME watch=true

KEYS
  dir=null          folder of a sweep, or its name in runs_root/.sweeps; null: the one that changed last
  runs_root=runs    where sweeps are looked for
  watch=false       true: again and again until all jobs have ended or Ctrl-C, or the process that started the sweep
                    is gone from this machine and no job is running; in place on a terminal, elsewhere another table
                    whenever something has changed
  every=2           seconds between two looks

A row is a job of the sweep, with those of its words that not all jobs share. STATES
  waiting           not begun, or stopped by an earlier command and not yet gone on with
  running           epoch: done of all; left: as long as its epochs took so far
  stale             says that it is running, and its process is gone from this machine
  interrupted       asked to stop; the same command goes on from there
  done              with its test top-1 in percent
  failed            with its reason; everything about it is in train.log and status.json of its directory

The line below has the totals and the time that all of it will take, if jobs go on to take as long as those that are
done, and as many run at once as now; then the command that goes on with what is not done.

Exit status: 0, whatever became of the jobs; 2 when there is no such sweep or the command is wrong; 130 when asked to
stop."""


@dataclass
class SweepConfig:
    """The keys of the command."""

    dir: str | None = None
    runs_root: str = "runs"
    watch: bool = False
    every: float = 2.0


def parse(words: Sequence[str]) -> SweepConfig:
    """The config that `key=value` words make. Raises ConfigError."""
    names = [field.name for field in fields(SweepConfig)]
    config = OmegaConf.structured(SweepConfig)
    for word in words:
        name, _, value = word.partition("=")
        if name not in names:
            hint = " or ".join(f"{near}={value or '...'}" for near in nearest(name.lstrip("-"), names))
            raise ConfigError(f"vkd.sweep has no key {name!r}", expected=list_names(names), hint=hint or "--help")
        if not value:
            raise ConfigError(f"{name} needs a value", expected=f"{name}=...", hint="python -m vkd.sweep --help")
        try:
            # Paths are no text to be interpreted.
            config[name] = value.replace("${", "\\${")
        except ValidationError:
            expected = "true or false" if name == "watch" else "a number of seconds"
            raise ConfigError(f"{word} is not what this key takes", expected=expected) from None
    made = OmegaConf.to_object(config)
    if not (math.isfinite(made.every) and made.every > 0):
        raise ConfigError(f"every={made.every} is no time to wait", expected="seconds, above 0")
    if made.dir == "null":
        made.dir = None
    return made


def watch(reader: SweepReader, console: Console, every: float) -> None:
    """Show a sweep until all of its jobs have ended, or nobody is left to begin them.

    Raises ConfigError when its index is gone.
    """
    if not console.is_terminal or console.is_dumb_terminal:
        shown: SweepTable | None = None
        while shown is None or not shown.ended:
            table = reader.read()
            if table != shown:
                print(to_text(table), end="\n\n", flush=True)
            shown = table
            time.sleep(0 if table.ended else every)
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            table = reader.read()
            live.update(to_rich(table, console.height), refresh=True)
            if table.ended:
                return
            time.sleep(every)


def _show(words: list[str], console: Console) -> None:
    config = parse(words)
    reader = SweepReader(find_sweep(config.dir, config.runs_root))
    if config.watch:
        watch(reader, console, config.every)
    elif console.is_terminal:
        console.print(to_rich(reader.read()))
    else:
        print(to_text(reader.read()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 2 for wrong input, 130 when asked to stop."""
    return run_command(argv, HELP, _show)


if __name__ == "__main__":
    sys.exit(quietly(main))
