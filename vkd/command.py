"""What every command of vkd does alike: speak, read `key=value` words, and turn a user's mistake into one message."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence

from omegaconf import OmegaConf
from rich.console import Console

from vkd.config import as_typed
from vkd.errors import ConfigError

logger = logging.getLogger("vkd")

STOPPED = 130
"""Exit code of a command that was asked to stop, as shells have it."""


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar rather than through it."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.console.print(prefix + record.getMessage(), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def speaking() -> Iterator[Console]:
    """A console on which everything that vkd logs from level INFO up appears, for as long as the context lasts."""
    console = Console(file=sys.stdout)
    handler = _ConsoleHandler(console)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield console
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def complain(error: BaseException | str) -> None:
    """Print a message for the user to standard error."""
    print(f"vkd: {error}", file=sys.stderr, flush=True)


def parse_words(schema: type, words: Sequence[str]) -> object:
    """An instance of the dataclass `schema` from `key=value` words.

    Raises ConfigError for a word that is no `key=value`, an unknown key or a value of the wrong type.
    """
    for word in words:
        if "=" not in word or word.startswith("-"):
            raise ConfigError(f"{word!r} is not a key=value word", expected="words such as study=quickstart, or --help")
    return as_typed(schema, OmegaConf.from_dotlist(list(words)))
