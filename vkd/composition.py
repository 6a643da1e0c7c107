"""Hydra's part: composing the config, looking at every job of a sweep before the first one starts, running them.

Hydra's and OmegaConf's own errors become one message each.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException

from vkd.config import Config, config_directory, explain_key, explain_value, parse
from vkd.errors import ConfigError, UserError, list_names, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG_NAME = "train"
_HYDRA_VERSION_BASE = "1.3"


def register_schema() -> None:
    """Let `conf/train.yaml` name the typed schema in its defaults list."""
    ConfigStore.instance().store(name="schema", node=Config)


def group_choices() -> dict[str, list[str]]:
    """The choices of every config group, from the files in `conf/`."""
    folder = config_directory()
    groups: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        if path.parent != folder:
            groups.setdefault(path.parent.relative_to(folder).as_posix(), []).append(path.stem)
    return groups


def compose_config(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose the config that the override words ask for.

    Args:
        overrides: words as on the command line, without sweeps.
        with_hydra: keep Hydra's own node in it.

    Raises ConfigError.
    """
    register_schema()
    with _errors_explained(), initialize_config_dir(str(config_directory()), version_base=_HYDRA_VERSION_BASE):
        return compose(CONFIG_NAME, list(overrides), return_hydra_config=with_hydra)


def compose_jobs(words: Sequence[str]) -> int | None:
    """Compose and check every job that a command line asks for, before any of them starts or writes anything.

    Args:
        words: the command line. Hydra's own flags other than `-m` switch this look ahead off.

    Returns the number of jobs; None where a sweeper other than Hydra's basic one decides it.

    Raises ConfigError when any job cannot be composed or makes no sense, naming the job.
    """
    flags = {word for word in words if word.startswith("-")}
    if flags - {"-m", "--multirun"}:
        return None
    overrides = [word for word in words if not word.startswith("-")]
    with _errors_explained():
        parsed = OverridesParser.create().parse_overrides(overrides)
        fixed = [entry.input_line for entry in parsed if not entry.is_sweep_override()]
        outer = [word for word in fixed if re.match(r"[+~]*(experiment|hydra)\b", word)]
        hydra_node = compose_config(outer, with_hydra=True).hydra
        if not flags and str(hydra_node.mode) != "RunMode.MULTIRUN":
            _parse_job(overrides, alone=True)
            return 1
        if not hydra_node.sweeper._target_.endswith(".BasicSweeper"):
            return None
        params = [f"{key}={value}" for key, value in (hydra_node.sweeper.params or {}).items()]
        (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides([*params, *overrides]), None)
    for job in jobs:
        _parse_job(job, alone=len(jobs) == 1)
    return len(jobs)


def _parse_job(overrides: Sequence[str], *, alone: bool) -> None:
    try:
        parse(compose_config(overrides))
    except UserError as error:
        if alone:
            raise
        problem = f"no job was started, since one of them is impossible ({' '.join(overrides)}):\n  {error.problem}"
        raise ConfigError(problem, expected=error.expected, hint=error.hint) from error


def run_hydra(words: Sequence[str], job: Callable[[DictConfig], Any]) -> None:
    """Hand the command line to Hydra, which calls `job` with each composed config.

    Raises ConfigError for what Hydra refuses; SystemExit where Hydra printed something of its own and is done.
    """
    register_schema()
    decorated = hydra.main(
        config_path=str(config_directory()), config_name=CONFIG_NAME, version_base=_HYDRA_VERSION_BASE
    )(job)
    # Hydra reads sys.argv, and prints errors and exits by itself unless this variable is set.
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with _errors_explained():
            decorated()
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


@contextmanager
def _errors_explained() -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error) from error


def _explain(error: Exception) -> ConfigError:
    """The same complaint in vkd's words."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options or [] if option != "schema"]
        near = nearest(name, options)
        return ConfigError(
            f"there is no {group or 'config'} {name!r}",
            expected=list_names(options, most=40),
            hint=" or ".join(f"{group}={choice}" for choice in near),
        )
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"{error.override!r} cannot be read: {error.message.splitlines()[0]}",
            expected="key=value; quote the word where it holds brackets, commas or spaces",
            hint="'recipe.milestones=[150,180,210]'",
        )
    text = str(error)
    cause = error.__cause__
    quoted = re.search(r"override '?([^'\s]+)'?", text)
    if isinstance(error, ConfigCompositionException) and quoted:
        key, _, value = quoted.group(1).rstrip(".").lstrip("+~").partition("=")
        if "merging" in text or "onver" in str(cause):
            return explain_value(key, value)
        return explain_key(key, list(group_choices()))
    return ConfigError(" ".join(line.strip() for line in text.splitlines()[:2] if line.strip()))
