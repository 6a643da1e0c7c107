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
from vkd.records.reading import Damaged, clean, read_config

MOST_VALUES = 2_000
"""Keys and values of a config, which has two hundred; OmegaConf takes milliseconds for each."""
_EXPECTED = "the directory of a run, with its config.yaml"
_NETWORK = frozenset({"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"})
_FOLDERS = frozenset({"os.mkdir", "tempfile.mkdtemp"})


def read_foreign_config(folder: Path) -> dict[str, Any]:
    """The `config.yaml` of a run directory that somebody else may have written, as plain values.

    Raises ConfigError where there is none, it is damaged, or it holds what no run leaves there: an interpolation, which
    would read the environment of whoever resolves it, or text that steers a terminal.
    """
    try:
        content = read_config(folder)
    except Damaged as error:
        raise ConfigError(f"{folder}/{error}", expected=_EXPECTED) from None
    if content is None:
        raise ConfigError(f"{folder / 'config.yaml'} cannot be read: there is none", expected=_EXPECTED)
    if not {"dataset", "student"} <= set(content):
        raise ConfigError(f"{folder} is not the directory of a run: its config.yaml names no dataset and no student")
    pending: list[Any] = [content]
    seen = 0
    while pending:
        value = pending.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise ConfigError(f"{folder / 'config.yaml'} holds too many values to be a config", expected=_EXPECTED)
        if isinstance(value, dict):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise _odd(folder, f"the key {clean(repr(odd[0]), 60)}")
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str) and "${" in value:
            raise _odd(folder, f"the interpolation {clean(repr(value), 60)}")
        elif isinstance(value, str) and not value.isprintable():
            raise _odd(folder, f"the text {clean(repr(value), 60)}")
        elif not isinstance(value, (str, int, float, type(None))):
            raise _odd(folder, f"the value {clean(repr(value), 60)}")
    return content


def _odd(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder / 'config.yaml'} holds {what}, which no run leaves there",
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
