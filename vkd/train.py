"""`python -m vkd.train`: distil a student, or a whole sweep of them.

Hydra composes the config and runs sweeps; everything else is vkd's. Input is checked before anything is written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vkd.command import STOPPED, complain, own_exit_code, quietly, speaking
from vkd.composition import compose_jobs, read_command_line, run_hydra
from vkd.errors import UserError
from vkd.jobs import Jobs, require_no_launcher


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 1 when a run failed, 2 for wrong input, 130 when asked to stop.

    Of several processes that torchrun started the first one's code counts, and the others' is 0 where theirs is alike.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        from vkd.manual import train_page

        print(train_page())
        return 0
    return own_exit_code(_run(words))


def _run(words: Sequence[str]) -> int:
    with speaking() as console:
        try:
            flags, overrides = read_command_line(words)
            for word in overrides:
                if word.lstrip("+").startswith("hydra/launcher=") and not word.endswith("=basic"):
                    require_no_launcher(word)
            jobs = Jobs(console, compose_jobs(flags, overrides), words)
            try:
                run_hydra(flags, overrides, jobs, sweep_folder=jobs.folder)
            except UserError:  # a launcher that cannot start
                jobs.abandon()
                raise
            return jobs.summary()
        except UserError as error:
            complain(error)
            return 2
        except KeyboardInterrupt:
            return STOPPED
        except SystemExit as done:  # Hydra has printed what one of its own switches asks for
            return int(done.code or 0)


if __name__ == "__main__":
    sys.exit(quietly(main))
