"""A student in training together with its history, its best epoch, its clock and its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from vkd.errors import TrainingError
from vkd.training.checkpoint import read_newest_checkpoint, require_entries, write_checkpoint
from vkd.training.learner import Learner


@dataclass
class Record:
    """What came out of a run.

    metrics: the last epoch's figures, and what selection on `val` and the maximum over epochs would have given.
    timing: seconds of the whole, images a second of the training steps alone and of the last measurement.
    history: one line an epoch.
    reliability: by split, what a reliability diagram shows of the last epoch; None where that was not kept.
    """

    metrics: dict[str, float | int | None]
    timing: dict[str, float | None]
    history: list[dict[str, Any]]
    reliability: dict[str, Any] | None = None


class Session:
    """Drives one learner from epoch to epoch. Of several processes the first one reads and writes the checkpoint.

    Args:
        learner: the student in training.
        evaluate: measures a network on `val` and `test`.
        details: what else the last call of `evaluate` saw, for the record (`Evaluator.details`).
        fingerprint: of the run; a checkpoint of another one is refused.
        checkpoint_path: where to keep what resuming needs; None keeps nothing.
        on_epoch: told every epoch's line of metrics, after the checkpoint is written.
        keep_snapshot: given the student as it is measured and the number of epochs it has behind it, before training
            and at the end of every epoch; before the checkpoint is written, so that what a kill leaves is complete.
        voice: the context in which what is said is said of this student.
    """

    def __init__(
        self,
        learner: Learner,
        evaluate: Callable[[nn.Module], dict[str, float | None]],
        *,
        fingerprint: str,
        details: Callable[[], dict[str, Any]] = dict,
        checkpoint_path: Path | None = None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda line: None,
        keep_snapshot: Callable[[nn.Module, int], None] = lambda model, epoch: None,
        voice: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.learner = learner
        self.evaluate = evaluate
        self.details = details
        self.fingerprint = fingerprint
        self.checkpoint_path = checkpoint_path
        self.on_epoch = on_epoch
        self.keep_snapshot = keep_snapshot
        self.voice = voice
        self.history: list[dict[str, Any]] = []
        self.position = (1, 0)
        self._last_details: dict[str, Any] = {}
        self._timed = {"seconds": 0.0, "training_seconds": 0.0, "training_images": 0}
        self._epoch_rate: float | None = None
        self._since = time.perf_counter()

    def restore(self) -> bool:
        """Go on from the newest checkpoint that can be read, if there is one; whether there was.

        Raises TrainingError when all there are are damaged, or it belongs to another run.
        """
        path = self.checkpoint_path
        state = None if path is None else self.learner.processes.first(lambda: read_newest_checkpoint(path))
        if state is None:
            return False
        found = str(state.get("fingerprint"))
        if found != self.fingerprint:
            raise TrainingError(
                f"{self.checkpoint_path} belongs to a run with another config",
                expected=f"the fingerprint {self.fingerprint[:8]}, found {found[:8]}",
                hint=f"remove {self.checkpoint_path.name} there to start this run again",
            )
        require_entries(self.checkpoint_path, state, ("history", "learner", "position", "timed"))
        self.history = state["history"]
        for line in self.history:
            self.learner.schedule.epoch_done(line["epoch"], line.get("val/top1"))
        self.learner.load_state_dict(state["learner"])
        self.position = tuple(state["position"])
        self._last_details = state.get("details", {})  # checkpoints of older versions have none
        self._timed = state["timed"]
        return True

    def save(self, epoch: int, step: int) -> None:
        """Write a checkpoint from which training goes on after `step` steps of `epoch`."""
        self.position = (epoch, step)
        self._count_seconds()
        if self.checkpoint_path is not None:
            state = {
                "fingerprint": self.fingerprint,
                "position": [epoch, step],
                "history": self.history,
                "timed": dict(self._timed),
                "details": self._last_details,
                "learner": self.learner.state_dict(),
            }
            self.learner.processes.first(partial(write_checkpoint, self.checkpoint_path, state))

    def add_training_time(self, seconds: float, images: int) -> None:
        """Count `seconds` in which training steps saw `images` images."""
        self._timed["training_seconds"] += seconds
        self._timed["training_images"] += images
        self._epoch_rate = images / seconds if images else None

    def finish_epoch(self, epoch: int) -> None:
        """Measure, set the next epoch's learning rate, write the line of metrics and the checkpoint.

        Raises TrainingError when what is measured is not finite: the last steps broke the weights.
        """
        recipe = self.learner.recipe
        self.learner.align()
        line: dict[str, Any] = {"epoch": epoch, "learning_rate": self.learner.schedule.learning_rate}
        line.update({f"train/{name}": value for name, value in self.learner.epoch_figures().items()})
        if epoch % recipe.evaluate_every == 0 or epoch == recipe.epochs:
            line.update(_finite(self.evaluate(self.learner.evaluated_model), epoch))
            self._last_details = self.details()
        self._count_seconds()
        line.update({"images_per_second": self._epoch_rate, "seconds": self._timed["seconds"]})
        self.history.append(line)
        self.learner.schedule.epoch_done(epoch, line.get("val/top1"))
        self.learner.start_epoch_sums()
        self.keep_snapshot(self.learner.evaluated_model, epoch)
        self.save(epoch + 1, 0)
        self.on_epoch(line)

    def record(self) -> Record:
        """The run's metrics and timing, once its last epoch is done."""
        last = self.history[-1]
        metrics = {name: value for name, value in last.items() if name.startswith(("train/", "val/", "test/"))}
        measured = [line for line in self.history if "test/top1" in line]
        selectable = [line for line in measured if line["val/top1"] is not None]
        # The first of equal epochs: max keeps the earliest.
        best = max(selectable, key=lambda line: line["val/top1"]) if selectable else None
        metrics["best_epoch"] = None if best is None else best["epoch"]
        metrics["val/top1_at_best_val"] = None if best is None else best["val/top1"]
        metrics["test/top1_at_best_val"] = None if best is None else best["test/top1"]
        metrics["test/top1_max_over_epochs"] = max(line["test/top1"] for line in measured)
        timed = self._timed
        rate = timed["training_images"] / timed["training_seconds"] if timed["training_images"] else None
        timing = {
            "seconds": timed["seconds"],
            "training_seconds": timed["training_seconds"],
            "images_per_second": rate,
            "evaluation_images_per_second": self._last_details.get("images_per_second"),
        }
        reliability = self._last_details.get("reliability")
        return Record(metrics=metrics, timing=timing, history=self.history, reliability=reliability)

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self._timed["seconds"] += now - self._since
        self._since = now


def _finite(figures: dict[str, float | None], epoch: int) -> dict[str, float | None]:
    bad = [name for name, value in figures.items() if value is not None and not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"the student's outputs are not finite after epoch {epoch}: {', '.join(bad)}",
            expected="finite figures",
            hint="a smaller recipe.learning_rate, recipe.clip_grad_norm=5, or precision=fp32 or bf16",
        )
    return figures
