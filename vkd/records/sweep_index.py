"""The index of a sweep: one file that lists every job, what became of it, and where its files are."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock

from vkd.errors import ConfigError, nearest
from vkd.records.atomic import write_json_atomically
from vkd.records.run_directory import DONE, FAILED, INTERRUPTED, RUNNING, WAITING

FILE_NAME = "sweep.json"
FOLDER = ".sweeps"
"""Below the runs root, where the folders of sweeps are."""

STATES = (WAITING, RUNNING, INTERRUPTED, DONE, FAILED)


@dataclass
class Job:
    """One job of a sweep.

    number: from 1, in the order of the command.
    key: what it is asked to do, as a hash; the same for the same job of another command.
    overrides: its words.
    state: waiting, running, interrupted, done or failed.
    directory: of its run, as the sweep's working directory has it; None until it is known.
    note: why it failed or was not done again; empty otherwise.
    traceback: of an error that is no mistake of the user.
    host, pid, device: where it runs or ran; None until it has begun.
    """

    number: int
    key: str
    overrides: list[str]
    state: str = WAITING
    directory: str | None = None
    note: str = ""
    traceback: str = ""
    host: str | None = None
    pid: int | None = None
    device: str | None = None
    updated: str | None = None


@dataclass
class Sweep:
    """A sweep as its index has it.

    command: the words behind `python -m vkd.train`.
    directory: the working directory of the command, which relative paths are relative to.
    """

    command: list[str]
    directory: str
    jobs: list[Job] = field(default_factory=list)


class SweepIndex:
    """The index file in `folder`. Several processes may write to it: each change is made under a lock, and atomically.

    Args:
        folder: of the sweep.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME

    def begin(self, sweep: Sweep) -> None:
        """Write the index of a sweep that starts, or starts again: what is known of its jobs is kept.

        Raises OSError where the folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            known = {job.key: job for job in self._read_jobs()}
            for job in sweep.jobs:
                before = known.get(job.key)
                if before is not None:
                    job.directory = before.directory
                    job.state = DONE if before.state == DONE else WAITING
            self._write(sweep)

    def update(self, number: int, **changes: Any) -> None:
        """Change fields of the job with this number. Raises OSError where the file cannot be written."""
        with self._locked():
            sweep = read_sweep(self.path)
            job = next(job for job in sweep.jobs if job.number == number)
            for name, value in changes.items():
                setattr(job, name, value)
            job.updated = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            self._write(sweep)

    def read(self) -> Sweep:
        """The sweep. Raises ConfigError where the file cannot be read or is none."""
        return read_sweep(self.path)

    def _locked(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self.folder / ".lock")

    def _read_jobs(self) -> Sequence[Job]:
        try:
            return read_sweep(self.path).jobs
        except ConfigError:  # none yet, or damaged: the runs' own directories say what is done
            return []

    def _write(self, sweep: Sweep) -> None:
        write_json_atomically(self.path, {"format": 1, **asdict(sweep)})


def read_sweep(path: str | Path) -> Sweep:
    """The sweep whose index file is at `path`; only data is read.

    Raises ConfigError where there is none, or it is damaged.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}",
            expected=f"the folder of a sweep, with its {FILE_NAME}",
            hint=f"dir=runs/{FOLDER}/...",
        ) from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: it is no JSON", expected="the index of a sweep") from error
    try:
        jobs = [Job(**{name: job[name] for name in Job.__dataclass_fields__ if name in job}) for job in content["jobs"]]
        sweep = Sweep([str(word) for word in content["command"]], str(content["directory"]), jobs)
        for job in jobs:
            if not isinstance(job.number, int) or job.state not in STATES:
                raise ValueError(f"job {job.number!r} is {job.state!r}, near {nearest(str(job.state), STATES)}")
            job.overrides = [str(word) for word in job.overrides]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}", expected="the index of a sweep") from error
    return sweep
