"""Names that a config may use, mapped to what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vkd.errors import ConfigError, list_names, nearest

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """A table of named things of one kind; a wrong name is answered with the nearest right ones.

    Args:
        kind: what the things are, in words, for the error message ("divergence", "method", ...).
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """A decorator that files a function or class under `name`. Raises ValueError when the name is taken."""

        def file(entry: Entry) -> Entry:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return file

    def __getitem__(self, name: str) -> Entry:
        """The thing called `name`. Raises ConfigError, naming the nearest names, when there is none."""
        if name not in self._entries:
            near = nearest(str(name), self._entries)
            raise ConfigError(
                f"there is no {self.kind} {name!r}",
                expected=list_names(self._entries, most=40),
                hint=" or ".join(near),
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
