"""`python -m vkd.train`: distil a student, or a whole sweep of them.

Hydra composes the config and runs sweeps; everything else is vkd's. Input is checked before anything is written.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vkd.command import STOPPED, complain, logger, speaking
from vkd.composition import compose_jobs, read_command_line, run_hydra
from vkd.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console


class _Jobs:
    """Runs the jobs that Hydra hands out, one after the other, and remembers what became of each.

    A job never raises what would end the rest of a sweep: it reports, and the next one has its turn. Being asked to
    stop ends all of them.

    Args:
        console: where progress is shown.
        count: of the jobs; None where only a sweeper knows.
    """

    def __init__(self, console: Console, count: int | None) -> None:
        self.console = console
        self.count = count
        self.number = 0
        self.failures: list[str] = []

    def __call__(self, composed: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        from vkd.config import parse
        from vkd.training.interruption import Interrupted, stop_on_signals
        from vkd.training.run import run

        self.number += 1
        words = " ".join(HydraConfig.get().overrides.task)
        if self.count != 1:
            logger.info("")
            logger.info("job %d%s: %s", self.number, f" of {self.count}" if self.count else "", words)
        try:
            with stop_on_signals() as should_stop:
                run(parse(composed), console=self.console, should_stop=should_stop)
        except Interrupted as stop:
            logger.info("%s; the same command goes on from there", stop)
            raise
        except UserError as error:
            self._failed(words, str(error))
        except (Exception, SystemExit):
            self._failed(words, traceback.format_exc())
        # A signal that came when no step was left to stop after; it is meant for the jobs to come.
        if should_stop() and self.number != self.count:
            raise Interrupted(f"stopped after job {self.number}")

    def _failed(self, words: str, message: str) -> None:
        complain(message)
        lines = message.strip().splitlines()
        # A traceback says what happened in its last line, a message to the user in its first.
        headline = lines[-1] if lines[0].startswith("Traceback") else lines[0]
        self.failures.append(f"job {self.number} ({words}): {headline}")

    def summary(self) -> int:
        """Say which jobs failed, if there were several; the exit code."""
        if self.count != 1 and self.failures:
            complain("\n".join([f"{len(self.failures)} of {self.number} jobs failed:", *self.failures]))
        return 1 if self.failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 1 when a run failed, 2 for wrong input, 130 when asked to stop."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        from vkd.manual import train_page

        print(train_page())
        return 0
    with speaking() as console:
        try:
            flags, overrides = read_command_line(words)
            jobs = _Jobs(console, compose_jobs(flags, overrides))
            run_hydra(flags, overrides, jobs)
            return jobs.summary()
        except UserError as error:
            complain(error)
            return 2
        except KeyboardInterrupt:
            return STOPPED
        except SystemExit as done:  # Hydra has printed what one of its own switches asks for
            return int(done.code or 0)


if __name__ == "__main__":
    sys.exit(main())
