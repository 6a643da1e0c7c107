"""The directory of one run: where it is, who holds it, and what state it is in."""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import filelock
import yaml

from vkd.errors import ConfigError, UserError
from vkd.records.atomic import write_json_atomically, write_text_atomically

WAITING, RUNNING, INTERRUPTED, DONE, FAILED = "waiting", "running", "interrupted", "done", "failed"

logger = logging.getLogger("vkd")

_speaker: ContextVar[RunDirectory | None] = ContextVar("speaker", default=None)
"""The run of which what is said is said; None for what concerns all."""


def spoken_label() -> str:
    """The label of the run that is being spoken of; empty where it needs none."""
    speaker = _speaker.get()
    return "" if speaker is None else speaker.label


def _safe(name: str) -> str:
    """`name` with everything but letters, digits, '.', '_' and '+' replaced, so that it is one short folder name."""
    return re.sub(r"[^A-Za-z0-9._+]", "_", name)


class InUse(UserError):
    """Another process is at work in a run's directory."""


class RunDirectory:
    """`runs/<study>/<teacher>-<student>/<method>-<divergence>-s<seed>-<hash8>/`; plain training names only its student.

    Args:
        path: of the directory, which need not exist.
        label: how the run is called among those that it is trained side by side with; empty where it is alone.
    """

    def __init__(self, path: str | Path, label: str = "") -> None:
        self.path = Path(path)
        self.label = label

    @classmethod
    def of(
        cls,
        *,
        runs_root: str,
        study: str,
        teacher: str | None,
        student: str,
        methods: list[str],
        divergence: str | None,
        seed: int,
        fingerprint: str,
    ) -> RunDirectory:
        """The directory that belongs to a run: the same for the same fingerprint in the same study.

        The study's folder is called as the study is, so that it is found again under that name.
        """
        pair = _safe(student) if teacher is None else f"{_safe(teacher)}-{_safe(student)}"
        method = "+".join(_safe(name) for name in methods) or "none"
        label = method if divergence is None else f"{method}-{_safe(divergence)}"
        return cls(Path(runs_root) / study / pair / f"{label}-s{seed}-{fingerprint[:8]}")

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object an epoch."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """What came out; there once the run is done."""
        return self.path / "result.json"

    @property
    def weights(self) -> Path:
        """The student after the last epoch."""
        return self.path / "student.safetensors"

    def snapshot(self, epoch: int) -> Path:
        """The student after `epoch` epochs; 0 is the untrained one."""
        return self.path / "snapshots" / f"epoch_{epoch:04d}.safetensors"

    def snapshots(self) -> dict[int, Path]:
        """The snapshots that there are, by epoch."""
        found = {}
        for path in self.path.glob("snapshots/epoch_*.safetensors"):
            if match := re.fullmatch(r"epoch_(\d{4,9})\.safetensors", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def remove_snapshots(self) -> None:
        """Remove the snapshots that there are."""
        for path in self.snapshots().values():
            path.unlink(missing_ok=True)

    @property
    def checkpoint(self) -> Path:
        """What resuming needs."""
        return self.path / "last.ckpt"

    @property
    def log(self) -> Path:
        """What was said while it ran."""
        return self.path / "train.log"

    def create(self) -> None:
        """Make the directory. Raises ConfigError where that is not allowed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigError(
                f"the run directory {self.path} cannot be written: {error.strerror or error}",
                expected="a folder that you may write to",
                hint="runs_root=SOME_OTHER_FOLDER",
            ) from error

    def write_config(self, config: dict[str, Any]) -> None:
        """Write the resolved config; for whoever holds the directory."""
        write_text_atomically(self.config, yaml.safe_dump(config, sort_keys=False))

    def state(self) -> str | None:
        """running, interrupted, done or failed; None where nothing is known."""
        try:
            return json.loads((self.path / "status.json").read_text())["state"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def is_done(self, *, with_weights: bool = False) -> bool:
        """Whether the run has ended well and its result is there, and its weights too where they are wanted."""
        return self.state() == DONE and self.result.is_file() and (not with_weights or self.weights.is_file())

    def write_state(
        self, state: str, *, epoch: int | None = None, epochs: int | None = None, reason: str = "", traceback: str = ""
    ) -> None:
        """Say how the run stands."""
        status = {
            "state": state,
            "reason": reason,
            "traceback": traceback,
            "epoch": epoch,
            "epochs": epochs,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "updated": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        write_json_atomically(self.path / "status.json", status)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Make `metrics.jsonl` hold exactly these lines: what a kill wrote after the last checkpoint is dropped."""
        write_text_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in history))

    @contextmanager
    def held(self, *, while_waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Keep every other process out of the directory. The system lets go by itself when this process dies.

        Args:
            while_waiting: wait for another holder to finish, and call this about once a second, which ends the waiting
                by raising; None: do not wait.

        Raises InUse where another process holds it and it is not to be waited for.
        """
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            if while_waiting is None:
                raise InUse(
                    f"another process is at work in {self.path}", expected="one process a run", hint="wait for it"
                ) from error
            logger.info("waiting for another process that is at work in %s", self.path)
            while not lock.is_locked:
                while_waiting()
                with suppress(filelock.Timeout):
                    lock.acquire(timeout=1)
        try:
            # What a kill left of a file that was being written; nobody else writes here now.
            for leftover in (*self.path.glob(".*.tmp"), *self.path.glob("snapshots/.*.tmp")):
                leftover.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Within it, what vkd says is said of this run, and goes into no other run's `train.log`."""
        token = _speaker.set(self)
        try:
            yield
        finally:
            _speaker.reset(token)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Copy what vkd says to `train.log` too, but for what is said of another run alone."""
        handler = logging.FileHandler(self.log, encoding="utf-8")
        handler.addFilter(lambda _record: _speaker.get() in (None, self))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            handler.close()
