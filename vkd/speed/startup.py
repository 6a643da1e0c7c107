"""How long a user waits before anything happens: help, imports, and the first training step of the default run.

Each is measured from the start of a process of its own to its end, or to the moment when the step is done. The first
repetition on a machine may find its files not in memory yet; the median of some does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import vkd

LIMITS = {"help": 3.0, "first step": 8.0, "import vkd": 1.5}
"""Seconds that vkd means to stay under."""


def measure_startup(repetitions: int, words: Sequence[str] = ()) -> dict[str, list[float]]:
    """Seconds of each repetition, in turn.

    `help` is `python -m vkd.train --help`; `import torch` that alone; `import vkd` what `import vkd` takes beyond it;
    `first step` the time to the end of the first training step of `python -m vkd.train` with `words`, which decide
    where it runs; it goes to a temporary folder.

    Raises RuntimeError, with what the process said, when one of them fails.
    """
    taken: dict[str, list[float]] = {"help": [], "import torch": [], "import vkd": [], "first step": []}
    for _ in range(repetitions):
        taken["help"].append(_seconds_of("-m", "vkd.train", "--help"))
        taken["import torch"].append(_seconds_of("-c", "import torch"))
        taken["import vkd"].append(_seconds_of("-c", "import torch, vkd") - taken["import torch"][-1])
        taken["first step"].append(_seconds_to_first_step(words))
    return taken


def _seconds_of(*arguments: str) -> float:
    started = time.time()
    _run(*arguments)
    return time.time() - started


def _seconds_to_first_step(words: Sequence[str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        said = _run("-m", "vkd.speed.first_step", *words, f"runs_root={folder}")
    return float(said.splitlines()[-1]) - started


def _run(*arguments: str) -> str:
    """What the process prints."""
    # vkd as it is here, wherever the process looks first.
    path = os.pathsep.join([str(Path(vkd.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout
