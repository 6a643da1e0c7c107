"""The commands that repeat runs, from their records."""

from __future__ import annotations

import shlex

from vkd.records.reading import Run, number

TRAIN = ["python", "-m", "vkd.train"]
OF_THIS_MACHINE = ("runs_root=", "results_root=", "data_root=", "tracker", "device=")
"""What words of a command begin with that say where its files and accounts are, and decide no number."""


def command_of(run: Run) -> str | None:
    """The command that the run recorded, without the folders of its machine; None where it is no command of vkd's.

    Each word is quoted anew: whoever pastes the line starts `vkd.train` and nothing else, whoever wrote the file.
    """
    environment = run.content.get("environment")
    recorded = environment.get("command") if isinstance(environment, dict) else None
    if not isinstance(recorded, str) or not recorded.isprintable():
        return None
    try:
        words = shlex.split(recorded)
    except ValueError:
        return None
    if words[:3] != TRAIN:
        return None
    processes = number(run.parameters.get("world_size")) or 1
    start = TRAIN if processes == 1 else ["torchrun", "--nproc-per-node", str(int(processes)), *TRAIN[1:]]
    return shlex.join([*start, *(word for word in words[3:] if not word.startswith(OF_THIS_MACHINE))])
