"""The index of a sweep: one file that lists every job, what became of it, and where its files are."""

from __future__ import annotations

import datetime
import json
import stat
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import filelock

from vkd.errors import ConfigError
from vkd.records.atomic import write_json_atomically
from vkd.records.run_directory import DONE, FAILED, INTERRUPTED, RUNNING, WAITING

FILE_NAME = "sweep.json"
FOLDER = ".sweeps"
"""Below the runs root, where the folders of sweeps are."""

MOST_BYTES = 64 * 2**20
"""More than an index of a hundred thousand jobs takes."""

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
    host, pid: the process of the command; None where that is not known.
    """

    command: list[str]
    directory: str
    jobs: list[Job]
    host: str | None = None
    pid: int | None = None


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
                if before is None:
                    continue
                if before.state == DONE:
                    for name in ("state", "host", "pid", "device", "updated"):
                        setattr(job, name, getattr(before, name))
                job.directory = before.directory
            self._write(sweep)

    def update(self, number: int, key: str, **changes: Any) -> None:
        """Change fields of a job.

        Args:
            number, key: of the job. Meanwhile a command with the same jobs in another order may have begun the index
                anew, so the key decides; the number does where several jobs have one key.
            changes: the fields.

        Raises OSError where the file cannot be written, ConfigError where it is no longer an index with this job.
        """
        with self._locked():
            sweep = read_sweep(self.path)
            same = [job for job in sweep.jobs if job.key == key]
            if not same:
                raise ConfigError(f"{self.path} has no job {number} any more")
            job = next((job for job in same if job.number == number), same[0])
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
    """The sweep whose index file is at `path`; only data is read, and no more than a plain file of reasonable size.

    Raises ConfigError where there is none, or it is damaged.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise _damaged(path, "it is no plain file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}",
            expected=f"the folder of a sweep, with its {FILE_NAME}",
            hint=f"dir=runs/{FOLDER}/...",
        ) from error
    if len(data) > MOST_BYTES:
        raise _damaged(path, f"it is larger than {MOST_BYTES // 2**20} MiB")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "it is no JSON") from error
    fault = _fault(content, Sweep)
    if fault is None:
        fault = next(
            (f"job {place}: {found}" for place, found in enumerate(map(_job_fault, content["jobs"]), 1) if found), None
        )
    if fault is not None:
        raise _damaged(path, fault)
    jobs = [Job(**{name: job[name] for name in Job.__dataclass_fields__ if name in job}) for job in content["jobs"]]
    return Sweep(content["command"], content["directory"], jobs, content.get("host"), content.get("pid"))


def _fault(content: Any, kind: type) -> str | None:
    """What is wrong with the JSON form of an instance of the dataclass `kind`; None where nothing is."""
    if not isinstance(content, dict):
        return "it is no object"
    for entry in fields(kind):
        if entry.name not in content:
            if entry.default is MISSING:
                return f"it has no {entry.name}"
            continue
        if not _TESTS[entry.type](content[entry.name]):
            return f"{entry.name} is not what belongs there"
    return None


def _job_fault(content: Any) -> str | None:
    fault = _fault(content, Job)
    return "its state is none" if fault is None and content.get("state", WAITING) not in STATES else fault


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_TESTS: dict[Any, Callable[[Any], bool]] = {
    "int": _is_whole,
    "int | None": lambda value: value is None or _is_whole(value),
    "str": _is_text,
    "str | None": lambda value: value is None or _is_text(value),
    "list[str]": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "list[Job]": lambda value: isinstance(value, list) and bool(value),
}
"""By the annotation of a field: whether a value of JSON belongs there."""


def _damaged(path: Path, fault: str) -> ConfigError:
    return ConfigError(f"{path} is damaged: {fault}", expected="the index of a sweep")
