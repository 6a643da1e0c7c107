"""A run directory from elsewhere: what its config may say, and what following it may do.

The config names a data set, a folder and a teacher, and whoever measures the run looks there. That is all it decides:
nothing in it is resolved or called, and while it is followed nothing is fetched and no folder is made.
"""

from __future__ import annotations

import errno
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vkd.errors import ConfigError, UserError
from vkd.records.reading import Damaged, clean, read_config_file

MOST_VALUES = 2_000
"""Keys and values of a config, which has two hundred; OmegaConf takes milliseconds for each."""
_NETWORK = frozenset({"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"})
_FOLDERS = frozenset({"os.mkdir", "tempfile.mkdtemp"})


def read_foreign_config(folder: Path) -> dict[str, Any]:
    """What `read_foreign_file` gives of the `config.yaml` of a run directory. Raises ConfigError."""
    return read_foreign_file(folder / "config.yaml", expected="the directory of a run, with its config.yaml")


def read_foreign_file(file: Path, *, expected: str) -> dict[str, Any]:
    """The config of a run that somebody else may have written, as plain values.

    Args:
        file: with any name.
        expected: what the user should have named; part of the message where this is no config.

    Raises ConfigError where there is none, it is damaged, or it holds what no run leaves there: an interpolation, which
    would read the environment of whoever resolves it, or text that steers a terminal.
    """
    try:
        content = read_config_file(file)
    except Damaged as error:
        raise ConfigError(str(error), expected=expected) from None
    if content is None:
        raise ConfigError(f"{file} cannot be read: there is none", expected=expected)
    if not {"dataset", "student"} <= set(content):
        raise ConfigError(f"{file} is no run's config: it names no dataset and no student", expected=expected)
    pending: list[Any] = [content]
    seen = 0
    while pending:
        value = pending.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise ConfigError(f"{file} holds too many values to be a config", expected=expected)
        if isinstance(value, dict):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise _odd(file, f"the key {clean(repr(odd[0]), 60)}")
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and "${" in value:
            raise _odd(file, f"the interpolation {clean(repr(value), 60)}")
        elif isinstance(value, str) and not value.isprintable():
            raise _odd(file, f"the text {clean(repr(value), 60)}")
        elif not isinstance(value, (str, int, float, type(None))):
            raise _odd(file, f"the value {clean(repr(value), 60)}")
    return content


def _odd(file: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{file} holds {what}, which no run leaves there",
        expected="resolved values: text, numbers, true, false, null, lists and mappings of them",
        hint="look at who wrote this file before you use it",
    )


class _Confinement:
    """Whether something was refused while it lasted."""

    has_refused = False


_confinements: list[_Confinement] = []
_is_watching = False


@contextmanager
def confined(hint: str) -> Iterator[None]:
    """While it lasts, nothing in this process connects to another machine or makes a folder: a PermissionError instead.

    It is Python's own audit hook, so it holds for whatever a library does in Python, whichever it is.

    Args:
        hint: how to allow it; what a UserError that comes of a refusal tells the user to type.
    """
    global _is_watching
    if not _is_watching:
        sys.addaudithook(_watch)  # there for good, and idle outside
        _is_watching = True
    confinement = _Confinement()
    _confinements.append(confinement)
    try:
        yield
    except UserError as error:
        if not confinement.has_refused:
            raise
        raise type(error)(error.problem, expected=error.expected, hint=hint) from error
    finally:
        _confinements.remove(confinement)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what a confinement refuses. Raises PermissionError."""
    if not _confinements or event not in _NETWORK | _FOLDERS:
        return
    if event in _FOLDERS:
        path = Path(str(arguments[0]))
        # Where processes that decode images pass them on.
        if path.parent == Path(tempfile.gettempdir()) and path.name.startswith("pymp-"):
            return
    elif event in ("socket.connect", "socket.sendto") and not isinstance(arguments[1], tuple):
        return  # a socket of this machine
    for confinement in _confinements:
        confinement.has_refused = True
    raise PermissionError(errno.EACCES, "nothing is fetched because the config of a run from elsewhere says so")
