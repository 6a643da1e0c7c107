"""The errors that a user's input can cause.

A `UserError` is shown as its message alone, without a traceback. It says what is wrong, what was expected and what to
type instead; anything else that is raised is a fault of vkd and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right. `str(error)` is the whole message.

    Args:
        problem: what is wrong, naming the key, file or value.
        expected: what would have been right.
        hint: what to type or do instead.
    """

    def __init__(self, problem: str, *, expected: str = "", hint: str = "") -> None:
        self.problem, self.expected, self.hint = problem, expected, hint
        lines = [problem]
        if expected:
            lines.append(f"  expected: {expected}")
        if hint:
            lines.append(f"  try: {hint}")
        super().__init__("\n".join(lines))


class ConfigError(UserError):
    """A key, a value or a combination of them is wrong."""


class DataError(UserError):
    """A data set is missing, damaged or not what the config says."""


class ModelError(UserError):
    """A network or a checkpoint is missing, damaged or does not fit."""


class TrainingError(UserError):
    """Training cannot go on, for instance because a loss is not finite."""


def require(condition: bool, problem: str, expected: str, hint: str = "") -> None:
    """Raise ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(problem, expected=expected, hint=hint)


def nearest(name: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The `choices` spelt most like `name`, best first; empty where nothing is near."""
    choices = sorted(choices)
    found = difflib.get_close_matches(name, choices, n=count, cutoff=0.5)
    contained = [choice for choice in choices if name and name.lower() in choice.lower() and choice not in found]
    return (found + contained)[:count]


def list_names(names: Iterable[str], most: int = 12) -> str:
    """The names as one comma-separated line, cut after `most`."""
    names = sorted(names)
    tail = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + tail
