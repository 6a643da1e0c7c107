"""The commands that repeat runs, from their records, which may come from anybody."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from vkd.records.reading import Run, number

_TRAIN = ["python", "-m", "vkd.train"]
_OF_THIS_MACHINE = ("runs_root", "results_root", "data_root", "tracker", "device")
"""Keys that say where files and accounts are, and decide no number."""
_LAUNCHER = re.compile(r"hydra/launcher=\w+")


def command_of(run: Run) -> str | None:
    """The command that the run recorded, as `train_command` repeats it; None where it is no command of vkd's."""
    environment = run.content.get("environment")
    recorded = environment.get("command") if isinstance(environment, dict) else None
    if not isinstance(recorded, str) or not recorded.isprintable():
        return None
    try:
        words = shlex.split(recorded)
    except ValueError:
        return None
    if words[:3] != _TRAIN:
        return None
    return train_command(words[3:], processes=int(number(run.parameters.get("world_size")) or 1))


def train_command(words: Sequence[str], *, processes: int = 1) -> str | None:
    """`vkd.train` with these words, less those of the machine that they were said on; None where they do anything else.

    Whoever pastes the line trains and does nothing else, whoever wrote the words: each is quoted anew for the shell,
    and there is no line for words with switches, with Hydra's own settings, which can call any function, with
    interpolations or with config groups from elsewhere.
    """
    kept = []
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if word in ("-m", "--multirun") or _LAUNCHER.fullmatch(word):
            kept.append(word)
            continue
        is_group = "." not in key
        if (
            not word.isprintable()
            or word.startswith("-")
            or "hydra" in key.lower()
            or "_target_" in word
            or "${" in word
            or (is_group and ".." in value)
        ):
            return None
        if not key.startswith(_OF_THIS_MACHINE):
            kept.append(word)
    start = _TRAIN if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), *_TRAIN[1:]]
    return shlex.join([*start, *kept])
