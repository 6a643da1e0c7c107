"""The jobs of a command line: run one by one or in groups, and what became of each."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vkd.command import complain, logger
from vkd.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from vkd.config import Config
    from vkd.training.assembly import Workplace


class Jobs:
    """Runs the jobs that Hydra hands out, one after the other or in groups, and remembers what became of each.

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
        self.failures: list[tuple[int, str, str]] = []
        self._workplace: Workplace | None = None

    def __call__(self, composed: DictConfig) -> None:
        """One job by itself: what Hydra and its launchers call."""
        from hydra.core.hydra_config import HydraConfig

        from vkd.config import parse

        self.number += 1
        words = list(HydraConfig.get().overrides.task)
        if self.count != 1:
            logger.info("")
            logger.info("job %d%s: %s", self.number, f" of {self.count}" if self.count else "", " ".join(words))
        with self._reported([(self.number, words)]):
            self._run([(self.number, words, parse(composed))], more=self.number != self.count)

    def together(self, jobs: Sequence[tuple[Sequence[str], DictConfig]]) -> None:
        """Jobs side by side, as far as they can be: what the fused launcher calls.

        Args:
            jobs: of each its words and its composed config.
        """
        from vkd.config import parse
        from vkd.training.run import shared_part

        groups: dict[str, list[tuple[int, Sequence[str], Config]]] = {}
        for words, composed in jobs:
            self.number += 1
            with self._reported([(self.number, words)]):
                config = parse(composed)
                groups.setdefault(repr(shared_part(config)), []).append((self.number, words, config))
        for number, group in enumerate(groups.values(), start=1):
            logger.info("")
            numbers = ", ".join(str(job) for job, _, _ in group)
            logger.info("group %d of %d: job%s %s", number, len(groups), "s" * (len(group) > 1), numbers)
            with self._reported([(job, words) for job, words, _ in group]):
                self._run(group, more=number != len(groups) or self.number != self.count)

    def _run(self, jobs: Sequence[tuple[int, Sequence[str], Config]], *, more: bool) -> None:
        """Run jobs that share everything but method and divergence; `more` are to come after them."""
        from vkd.training.assembly import Workplace
        from vkd.training.interruption import Interrupted, stop_on_signals
        from vkd.training.run import run_together

        self._workplace = self._workplace or Workplace()
        try:
            with stop_on_signals() as should_stop:
                run_together(
                    [config for _, _, config in jobs],
                    labels=_labels([words for _, words, _ in jobs]),
                    on_failure=lambda place, error: self._failed([jobs[place][:2]], error),
                    console=self.console,
                    should_stop=should_stop,
                    workplace=self._workplace,
                )
        except Interrupted as stop:
            logger.info("%s; the same command goes on from there", stop)
            raise
        # A signal that came when no step was left to stop after; it is meant for the jobs to come.
        if should_stop() and more:
            raise Interrupted(f"stopped after job {jobs[-1][0]}")

    @contextmanager
    def _reported(self, jobs: Sequence[tuple[int, Sequence[str]]]) -> Iterator[None]:
        """Report what goes wrong with all of these jobs."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self._failed(jobs, error)

    def _failed(self, jobs: Sequence[tuple[int, Sequence[str]]], error: BaseException) -> None:
        """Say that jobs failed, but for those of which that is known."""
        known = {number for number, _, _ in self.failures}
        jobs = [job for job in jobs if job[0] not in known]
        expected = isinstance(error, UserError)
        message = str(error) if expected else "".join(traceback.format_exception(error)).strip()
        alone = self.count == 1
        complain(message if alone else f"job {', '.join(str(number) for number, _ in jobs)} failed: {message}")
        lines = message.splitlines()
        # A traceback says what happened in its last line, a message to the user in its first.
        headline = lines[0] if expected else lines[-1]
        self.failures += [(number, " ".join(words), headline) for number, words in jobs]

    def summary(self) -> int:
        """Say which jobs failed, if there were several; the exit code."""
        if self.count != 1 and self.failures:
            lines = [f"job {number} ({words}): {headline}" for number, words, headline in sorted(self.failures)]
            complain("\n".join([f"{len(lines)} of {self.number} jobs failed:", *lines]))
        return 1 if self.failures else 0


def _labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What tells each of some jobs from the others: the words that not all of them have."""
    if len(jobs) == 1:
        return [""]
    return [" ".join(word for word in words if not all(word in other for other in jobs)) for words in jobs]
