"""Who is told about a run beside its own directory.

A tracker never stops a run: when one fails it says so once, and training goes on with the local files.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from vkd.config import Config
from vkd.registry import Registry

logger = logging.getLogger("vkd")

TRACKERS: Registry[Callable[..., Tracker]] = Registry("tracker")


class Tracker(Protocol):
    """What a run tells a tracker."""

    def log(self, line: dict[str, Any]) -> None:
        """One epoch's metrics; `line["epoch"]` counts from 1."""

    def finish(self, summary: dict[str, Any], *, failed: bool = False) -> None:
        """The run is over; `summary` holds its final metrics (empty when it failed)."""


@TRACKERS.register("none")
class NoTracker:
    """Local files alone."""

    def __init__(self, config: Config, directory: Path, *, name: str, study: str) -> None:
        pass

    def log(self, line: dict[str, Any]) -> None:
        """Nothing."""

    def finish(self, summary: dict[str, Any], *, failed: bool = False) -> None:
        """Nothing."""


class WandbTracker:
    """One W&B run a run, grouped by study, with the method as its job type.

    Args:
        config: of the run; goes to W&B as a plain nested dict with numbers as numbers.
        directory: of the run; W&B's files lie below it.
        name: of the run in W&B.
        study: the W&B group.
        online: whether to contact W&B.
    """

    def __init__(self, config: Config, directory: Path, *, name: str, study: str, online: bool) -> None:
        self.run = None
        # W&B reports its own crashes over the network unless told not to.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb

            self.run = wandb.init(
                project=config.tracker.project,
                entity=config.tracker.entity,
                group=study,
                job_type="+".join(config.method) or "none",
                name=name,
                id=self._identifier(directory),
                resume="allow" if online else None,
                # Absolute, since W&B's own process stays in the directory in which the first run started it.
                dir=str(directory.resolve()),
                mode="online" if online else "offline",
                config=config.as_dict(),
                tags=list(config.tracker.tags),
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:
            self._give_up(error)

    @staticmethod
    def _identifier(directory: Path) -> str:
        """The W&B id of the run in `directory`: the same when the run is resumed, another in another directory."""
        from vkd.records.atomic import write_text_atomically

        path = directory / ".wandb-id"
        if not path.exists():
            write_text_atomically(path, os.urandom(8).hex())
        return path.read_text()

    def log(self, line: dict[str, Any]) -> None:
        """One epoch's metrics, with the epoch as the step."""
        if self.run is not None:
            try:
                self.run.log({key: value for key, value in line.items() if value is not None}, step=line["epoch"])
            except Exception as error:
                self._give_up(error)

    def finish(self, summary: dict[str, Any], *, failed: bool = False) -> None:
        """Write the summary and close the W&B run, marked as crashed when `failed`."""
        if self.run is not None:
            try:
                self.run.summary.update({key: value for key, value in summary.items() if value is not None})
                self.run.finish(exit_code=1 if failed else 0)
            except Exception as error:
                self._give_up(error)
        self.run = None

    def _give_up(self, error: Exception) -> None:
        logger.warning("W&B failed (%s); the run goes on with its local files alone", str(error).strip() or error)
        self.run = None


@TRACKERS.register("offline")
def offline_tracker(config: Config, directory: Path, *, name: str, study: str) -> WandbTracker:
    """W&B's offline files in the run directory; nobody is contacted."""
    return WandbTracker(config, directory, name=name, study=study, online=False)


@TRACKERS.register("wandb")
def wandb_tracker(config: Config, directory: Path, *, name: str, study: str) -> WandbTracker:
    """W&B online when a key is configured and WANDB_MODE does not say otherwise; else offline, saying how to sync."""
    mode, has_key = os.environ.get("WANDB_MODE", "online"), has_wandb_key()
    online = has_key and mode == "online"
    if not online:
        reason = f"WANDB_MODE={mode}" if has_key else "no W&B key is configured"
        login = "" if has_key else "wandb login && "
        logger.info("%s: tracking offline; to send it: %swandb sync %s/wandb/offline-run-*", reason, login, directory)
    return WandbTracker(config, directory, name=name, study=study, online=online)


def has_wandb_key() -> bool:
    """Whether W&B would find a key: in WANDB_API_KEY, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        entry = netrc.netrc(path).authenticators(host)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return entry is not None and bool(entry[2])
