"""What every command of vkd does alike: speak, read `key=value` words, and turn a user's mistake into one message."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import logging
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from vkd import launched
from vkd.config import as_typed
from vkd.errors import ConfigError, UserError
from vkd.records.reading import printable
from vkd.records.run_directory import spoken_label

logger = logging.getLogger("vkd")

STOPPED = 130
"""Exit code of a command that was asked to stop, as shells have it."""

_SECONDS_TO_SPEAK = 10.0
"""How long a process that fails early gives the first one to fail too, and to say why."""

OUTPUT_CLOSED = 141
"""Exit code of a command whose output nobody reads any more, as where SIGPIPE ends it."""


class _OutputClosed(KeyboardInterrupt):
    """Nobody reads what the command says. A KeyboardInterrupt, so that it leaves a run as being asked to stop does."""


class _Console(Console):
    """Ends the command when whoever read its output has gone."""

    is_closed = False

    def on_broken_pipe(self) -> None:
        """Stop writing, and raise what stops the work."""
        self.quiet = self.is_closed = True
        _discard(sys.stdout)
        raise _OutputClosed("nobody reads the output any more")


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar rather than through it."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        label = spoken_label()
        prefix = f"{label}: " if label else ""
        prefix += "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        self.console.print(prefix + record.getMessage(), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def speaking() -> Iterator[Console]:
    """A console on which everything that vkd logs from level INFO up appears, for as long as the context lasts.

    Of several processes that train together the first one alone speaks.

    Raises SystemExit at the end of it where the output was closed meanwhile, which stops the work like Ctrl-C.
    """
    console = _Console(file=sys.stdout) if launched.is_first() else Console(quiet=True, force_terminal=False)
    handler = _ConsoleHandler(console) if launched.is_first() else logging.NullHandler()
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
    if getattr(console, "is_closed", False):
        raise SystemExit(OUTPUT_CLOSED)


def quietly(main: Callable[[], int]) -> int:
    """The exit code of a command's `main`; OUTPUT_CLOSED, without a word, where nobody reads its output any more.

    For a process that does nothing else.
    """
    try:
        code = main()
    except BrokenPipeError:
        code = OUTPUT_CLOSED
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                # Python's own last flush would complain.
                stream.flush()
        except BrokenPipeError:
            _discard(stream)
            code = OUTPUT_CLOSED
    return code


def _discard(stream: TextIO) -> None:
    """Send what is still to be written to a standard stream nowhere, so that closing it cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def run_command(words: Sequence[str] | None, help_page: str, work: Callable[[list[str], Console], None]) -> int:
    """Do a command's `work` with its words and a console, and give its exit code.

    0; 2 for wrong input or files that cannot be read or written, with one message; 130 when asked to stop.

    Args:
        words: of the command; None for those of the command line.
        help_page: shown, in place of the work, where a word asks for it.
    """
    words = list(sys.argv[1:] if words is None else words)
    if {"-h", "--help", "help"} & set(words):
        print(help_page.rstrip())
        return 0
    with speaking() as console:
        try:
            work(words, console)
        except BrokenPipeError:
            raise  # nobody reads the output any more; see `quietly`
        except (UserError, OSError) as error:
            complain(printable(str(error)))
            return 2
        except KeyboardInterrupt:
            return STOPPED
    return 0


def complain(error: BaseException | str) -> None:
    """Print a message for the user to standard error; of several processes the first one alone."""
    if launched.is_first():
        print(f"vkd: {error}", file=sys.stderr, flush=True)


def own_exit_code(code: int) -> int:
    """The exit code of a command in one of several processes, whose launcher ends all of them when one has failed.

    The first one's code counts, and its message, which it must have had the time to print. Another one gives 0 where
    it is known that they did alike, which it is once they have been connected: one that fails by itself then ends in
    its own way (`vkd.training.distribution`).
    """
    if launched.is_first() or code == 0:
        return code
    torch = sys.modules.get("torch")
    connected = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if connected or code == STOPPED:
        return 0
    time.sleep(_SECONDS_TO_SPEAK)
    # Nobody has ended this process, so the first one is well.
    print(f"vkd: process {os.environ.get('RANK')} of this run failed, and the first did not", file=sys.stderr)
    return code


def parse_words(schema: type, words: Sequence[str]) -> object:
    """An instance of the dataclass `schema` from `key=value` words.

    A text is taken as it stands, so that a study may be called `on` or `1e3`; `null` is no text.

    Raises ConfigError for a word that is no `key=value`, an unknown key or a value of the wrong type.
    """
    texts = {name for name, kind in typing.get_type_hints(schema).items() if kind in (str, str | None)}
    values = OmegaConf.create()
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or word.startswith("-"):
            raise ConfigError(f"{word!r} is not a key=value word", expected="words such as study=quickstart, or --help")
        if key in texts:
            values[key] = None if value in ("", "null") else value.replace("${", "\\${")
            continue
        try:
            values = OmegaConf.merge(values, OmegaConf.from_dotlist([word]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{word} is not what this key takes", expected="key=value") from error
    return as_typed(schema, values)


@functools.cache
def import_training() -> None:
    """Import torch, timm and whatever else a run needs, which takes seconds, with Python's garbage collector off.

    What they bring stays until the process ends, and walking through it over and over took a quarter of the time to the
    first step; nor is it walked through later.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        importlib.import_module("vkd.training.run")
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
