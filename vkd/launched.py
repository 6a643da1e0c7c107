"""What a launcher such as torchrun told this process, in its environment: one of how many it is. Imports no torch."""

from __future__ import annotations

import os

from vkd.errors import ConfigError


def world_size() -> int:
    """How many processes were started for one run; 1 without a launcher. Raises ConfigError for an odd environment."""
    return _number("WORLD_SIZE", otherwise=1, least=1)


def rank() -> int:
    """Which of them this is, from 0. Raises ConfigError where the launcher has not said so."""
    if world_size() == 1:
        return 0
    found = _number("RANK", otherwise=-1, least=0)
    if found >= world_size():
        raise _odd("RANK")
    return found


def local_rank() -> int:
    """Which of those on this machine it is, from 0."""
    return _number("LOCAL_RANK", otherwise=rank(), least=0)


def is_on_one_machine() -> bool:
    """Whether all of them run on this machine."""
    return _number("LOCAL_WORLD_SIZE", otherwise=1, least=1) == world_size()


def is_first() -> bool:
    """Whether this is the process that speaks and writes; also where the environment makes no sense of that."""
    try:
        return rank() == 0
    except ConfigError:
        return True


def _number(name: str, *, otherwise: int, least: int) -> int:
    text = os.environ.get(name, "")
    if not text and otherwise >= least:
        return otherwise
    if not text.isdecimal() or int(text) < least:
        raise _odd(name)
    return int(text)


def _odd(name: str) -> ConfigError:
    found = ", ".join(f"{key}={os.environ.get(key, '')}" for key in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    return ConfigError(
        f"the environment speaks of several processes for one run, and its {name} makes no sense: {found}",
        expected="what torchrun sets, or none of these variables",
        hint="torchrun --nproc-per-node 2 -m vkd.train ..., or unset WORLD_SIZE",
    )
