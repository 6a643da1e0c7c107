"""Who is told about a run beside its own directory.

A tracker never stops a run: when one fails it says so once, and training goes on with the local files.

What W&B has of a run:

- config: the run's own, nested as it is, with the name of its `study`, its `row` in the tables ("kd abkd (0.8, 0.3)")
  and its `settings`, eight digits that runs have alike which differ in their seed alone.
- history: a line of metrics an epoch, drawn over `epoch`.
- summary: every metric of the last epoch under its own name; the best ones under names of their own
  (`val/top1_at_best_val`, `test/top1_max_over_epochs`); what the run is, flat, for panels that compare runs:
  `divergence/alpha`, `divergence/beta`, `seed`, ...; once it is done what `result.json` knows of teacher, student and
  time: `teacher/test_top1`, `student/parameters`, ...
"""

from __future__ import annotations

import dataclasses
import logging
import netrc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlparse

from vkd.config import TEACHERS_STUDY, Config, request_key
from vkd.records.alpha_beta import OWN_POINTS
from vkd.records.grouping import Key
from vkd.records.reading import Run, number, read_run
from vkd.registry import Registry

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger("vkd")

TRACKERS: Registry[Callable[..., Tracker]] = Registry("tracker")

_FACTS = {
    "teacher": ("parameters", "macs"),
    "student": ("parameters", "macs"),
    "timing": ("seconds", "images_per_second", "evaluation_images_per_second"),
}
"""Numbers of `result.json`, beside the metrics, that the summary has as `section/name`."""

_taken: set[str] = set()
"""Runs of W&B sweeps that a student of this process is already."""


class Tracker(Protocol):
    """What a run tells a tracker."""

    def log(self, line: dict[str, Any]) -> None:
        """One epoch's metrics; `line["epoch"]` counts from 1."""

    def finish(self, summary: dict[str, Any], *, failed: bool = False) -> None:
        """The run is over; `summary` holds its final metrics (empty when it failed).

        Where it has not failed, its directory holds all of its files by now.
        """


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

    Where a W&B agent has started the process, it is the run that the agent has opened for its sweep, with the agent's
    project and entity.

    Args:
        config: of the run; goes to W&B as a plain nested dict with numbers as numbers.
        directory: of the run; W&B's files lie below it.
        name: of the run in W&B.
        study: the W&B group.
        online: whether to contact W&B.
    """

    def __init__(self, config: Config, directory: Path, *, name: str, study: str, online: bool) -> None:
        self.run: wandb.Run | None = None
        self._directory = directory
        self._log_student = config.tracker.log_student
        # W&B reports its own crashes over the network unless told not to.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb

            self.run = wandb.init(
                **({} if _agent_sweep() else self._place(config, directory)),
                group=study,
                job_type="+".join(config.method) or "none",
                name=name,
                resume="allow" if online else None,
                # Absolute, since W&B's own process stays in the directory in which the first run started it.
                dir=str(directory.resolve()),
                mode="online" if online else "offline",
                config=config_in_wandb(config, study),
                tags=list(config.tracker.tags),
                reinit="create_new",
                settings=wandb.Settings(console="off", silent=True),
            )
            # Without a summary of their own, metrics are summarised by their last value.
            self.run.define_metric("epoch")
            self.run.define_metric("*", step_metric="epoch")
            self.run.summary.update(describe(config, study))
        except Exception as error:
            self._give_up(error)

    @classmethod
    def _place(cls, config: Config, directory: Path) -> dict[str, Any]:
        """Where the W&B run is: the project, and an id of its own."""
        tracker = config.tracker
        return {"project": tracker.project, "entity": tracker.entity, "id": cls._identifier(directory)}

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
        """Write the summary, log the student where that is asked for, and close the W&B run, as crashed when `failed`.

        What is known of the run beside its metrics is read from its directory.
        """
        if self.run is not None:
            try:
                done = None if failed else read_run(self._directory)
                figures = summary if done is None else {**summary, **facts(done)}
                self.run.summary.update({key: value for key, value in figures.items() if value is not None})
                if done is not None and done.done and self._log_student:
                    self._log_weights(done)
                self.run.finish(exit_code=1 if failed else 0)
            except Exception as error:
                self._give_up(error)
        self.run = None

    def _log_weights(self, done: Run) -> None:
        """Log the student as a model artifact that has the name of the run's directory."""
        weights = self._directory / "student.safetensors"
        try:
            import wandb

            model = wandb.Artifact(artifact_name(self._directory.name), type="model", metadata=card(done))
            # A finished run's file stays as it is: W&B needs neither a copy to send it from nor one to keep.
            model.add_file(str(weights.resolve()), policy="immutable", skip_cache=True)
            self.run.log_artifact(model)
        except Exception as error:
            reason = str(error).strip() or type(error).__name__
            logger.warning("W&B did not take the student (%s); it is in %s", reason, weights)

    def _give_up(self, error: Exception) -> None:
        logger.warning("W&B failed (%s); the run goes on with its local files alone", str(error).strip() or error)
        self.run = None


def config_in_wandb(config: Config, study: str) -> dict[str, Any]:
    """The config that W&B gets: nested as it is, with what runs of a study are grouped by.

    Args:
        config: of the run.
        study: that it belongs to, also where the config leaves it to the data set's name.
    """
    values = config.as_dict()
    run = Run("", "running", "", values)
    row = Key(run.method, run.divergence, run.alpha, run.beta).label
    # The study's own name says nothing about the settings.
    settings = request_key(dataclasses.replace(config, seed=0, study=None))[:8]
    return {**values, "study": study, "row": row, "settings": settings}


def describe(config: Config, study: str) -> dict[str, Any]:
    """What a run is, flat, a word or a number each: what W&B's panels choose and colour runs by.

    Forward and reverse KL have the alpha and beta that make the alpha-beta divergence equal to them, so that one panel
    shows all of them; plain training and methods without a divergence have none.
    """
    divergence = dict(config.divergence)
    if point := OWN_POINTS.get(divergence.get("name", "")):
        divergence["alpha"], divergence["beta"] = point
    return {
        "study": study,
        "method": Run("", "running", "", config.as_dict()).method,
        "seed": config.seed,
        "dataset": config.dataset.name,
        "student/arch": config.student.arch,
        **({} if config.is_plain else {"teacher/arch": config.teacher.arch}),
        "cross_entropy_weight": config.cross_entropy_weight,
        **{f"divergence/{name}": value for name, value in divergence.items()},
    }


def facts(done: Run) -> dict[str, Any]:
    """What `result.json` of a finished run knows beside its metrics, flat; what an older one does not know is absent.

    Accuracies of the teacher are percent; `macs` are multiply-accumulates for one image.
    """
    found: dict[str, Any] = {}
    for section, names in _FACTS.items():
        values = done.content.get(section)
        for name in names if isinstance(values, dict) else ():
            found[f"{section}/{name}"] = number(values.get(name))
    for split in ("val", "test"):
        found[f"teacher/{split}_top1"] = done.teacher_accuracy(split)
    found.update(fingerprint=done.fingerprint or None, group=done.group or None)
    return {name: value for name, value in found.items() if value is not None}


def card(done: Run) -> dict[str, Any]:
    """What must be known of the student of a finished run to load and to judge it: the artifact's metadata."""
    dataset = done.content["dataset"]
    return {
        "arch": done.student,
        "classes": dataset.get("classes"),
        "dataset": done.dataset,
        "teacher": done.teacher or None,
        "method": done.content["method"],
        "divergence": done.content.get("divergence"),
        "seed": done.seed,
        "val/top1": done.metric("val/top1"),
        "test/top1": done.metric("test/top1"),
        "fingerprint": done.fingerprint,
        "group": done.group,
    }


def artifact_name(name: str) -> str:
    """`name` in the letters that W&B allows in the name of an artifact."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:128]


def _agent_sweep() -> str:
    """The sweep for which a W&B agent has started this process; empty where none has."""
    return os.environ.get("WANDB_SWEEP_ID", "")


def _follow(config: Config, directory: Path, *, name: str, study: str, contact: bool) -> Tracker:
    """The tracker of a run that is to be in W&B; `contact` is whether W&B is to be contacted where that is possible.

    A W&B agent opens one run for the command that it starts. It is that of the command's first student; a teacher that
    vkd trains before, and further students, would write into the same one.
    """
    if _agent_sweep():
        opened = os.environ.get("WANDB_RUN_ID", "")
        if study == TEACHERS_STUDY or opened in _taken:
            logger.info("%s is not in W&B: a sweep of W&B follows one student a command", directory)
            return NoTracker(config, directory, name=name, study=study)
        _taken.add(opened)
    online = contact and may_contact_wandb(directory)
    return WandbTracker(config, directory, name=name, study=study, online=online)


@TRACKERS.register("offline")
def offline_tracker(config: Config, directory: Path, *, name: str, study: str) -> Tracker:
    """W&B's offline files in the run directory; nobody is contacted."""
    return _follow(config, directory, name=name, study=study, contact=False)


@TRACKERS.register("wandb")
def wandb_tracker(config: Config, directory: Path, *, name: str, study: str) -> Tracker:
    """W&B online when a key is configured and WANDB_MODE does not say otherwise; else offline, saying how to sync."""
    return _follow(config, directory, name=name, study=study, contact=True)


def may_contact_wandb(directory: Path) -> bool:
    """Whether a key is configured and WANDB_MODE allows it; where not, say how to send what is left below `directory`.

    Args:
        directory: of which the folder `wandb` has the files.
    """
    mode, has_key = os.environ.get("WANDB_MODE", "online"), has_wandb_key()
    if has_key and mode == "online":
        return True
    reason = f"WANDB_MODE={mode}" if has_key else "no W&B key is configured"
    login = "" if has_key else "wandb login && "
    logger.info("%s: tracking offline; to send it: %swandb sync %s/wandb/offline-run-*", reason, login, directory)
    return False


def has_wandb_key() -> bool:
    """Whether W&B would find a key: in WANDB_API_KEY, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        entry = netrc.netrc(path).authenticators(host)
    except (OSError, ValueError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: the user has no home
        return False
    return entry is not None and bool(entry[2])
