"""Hydra's part: composing the config, looking at every job of a sweep before the first one starts, running them.

Hydra's and OmegaConf's own errors become one message each.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vkd.command import import_training
from vkd.config import OPEN_KEYS, Config, config_directory, explain_key, explain_value, parse
from vkd.errors import ConfigError, UserError, list_names, nearest
from vkd.recorded import FROM, RECORDED, register_recorded

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONFIG_NAME = "train"
_HYDRA_VERSION_BASE = "1.3"


@functools.cache
def register_schema() -> None:
    """Let `conf/train.yaml` name the typed schema in its defaults list.

    Below the open keys Hydra takes any word: what may stand there is checked by `parse`, which knows and says why.
    """
    schema = OmegaConf.structured(Config)
    for key in OPEN_KEYS:
        OmegaConf.set_struct(OmegaConf.select(schema, key), False)
    ConfigStore.instance().store(name="schema", node=schema)
    OmegaConf.register_new_resolver("by_pair", _by_pair, replace=True)
    from hydra_plugins.vkd_launchers.engines import name_launchers

    name_launchers()


def _by_pair(usual: float, others: DictConfig, *, _root_: DictConfig) -> float:
    """What `${by_pair:usual,{pair: value}}` stands for: the value of this teacher and student, where it has one."""
    archs = (OmegaConf.select(_root_, key, default=None) or "" for key in ("teacher.arch", "student.arch"))
    return others.get("_".join(arch.removeprefix("cifar_") for arch in archs), usual)


def group_choices() -> dict[str, list[str]]:
    """The choices of every config group, from the files in `conf/`; those in a folder of the group carry its name."""
    folder = config_directory()
    groups: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        if path.parent != folder:
            name = path.relative_to(folder).with_suffix("").as_posix()
            # Hydra's own groups have a slash in their names.
            group, _, choice = name.rpartition("/") if name.startswith("hydra/") else name.partition("/")
            groups.setdefault(group, []).append(choice)
    return groups


def compose_config(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Compose the config that the override words ask for.

    Args:
        overrides: words as on the command line, without sweeps.
        with_hydra: keep Hydra's own node in it.

    Raises ConfigError.
    """
    config_name, words = _choose_start(overrides)
    return _compose(config_name, words, with_hydra=with_hydra)


def _compose(config_name: str, words: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """As `compose_config`, on top of the config that Hydra knows by this name."""
    parsed = _parse_words(words)
    _check_groups(parsed)
    with _errors_explained(words), _hydra_initialized():
        composed = compose(config_name, list(words), return_hydra_config=with_hydra)
    _check_methods(parsed, composed)
    if config_name == RECORDED and composed.method and composed.teacher is not None and not composed.teacher.arch:
        raise ConfigError(
            "from= names a run of plain training, which has no teacher, and a method was added",
            expected="a teacher beside the method",
            hint="pair=... or teacher.arch=...",
        )
    return composed


def _choose_start(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Hydra's name of the config that words are put on top of, and the words with `from=` as Hydra reads it.

    Raises ConfigError where `from=` names no config.
    """
    words = list(overrides)
    places = [place for place, word in enumerate(words) if word.startswith(FROM)]
    if not places:
        return CONFIG_NAME, words
    if len(places) > 1:
        given = " and ".join(words[place] for place in places)
        raise ConfigError(f"{given}: a command starts from one config", expected="from= once")
    words[places[0]] = register_recorded(words[places[0]].removeprefix(FROM))
    return RECORDED, words


@contextmanager
def _hydra_initialized() -> Iterator[None]:
    register_schema()
    with initialize_config_dir(str(config_directory()), version_base=_HYDRA_VERSION_BASE):
        yield


def read_command_line(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of a command line, with the values that they take, and its `key=value` words, each in its order.

    Hydra alone would understand them in this order only.

    Raises ConfigError for a flag that Hydra does not have.
    """
    parser = get_args_parser()
    parser.allow_abbrev = False

    def refuse(message: str) -> NoReturn:
        names = [name for action in parser._actions for name in action.option_strings]
        wrong = [word for word in words if word.startswith("-") and word.partition("=")[0] not in names]
        near = nearest(wrong[0], names) if wrong else []
        raise ConfigError(
            f"there is no switch {wrong[0]}" if wrong else f"the command line is wrong: {message}",
            expected="key=value words, -m for a sweep, or a switch that --help lists",
            hint=" or ".join(near) or "--help",
        )

    parser.error = refuse
    overrides = parser.parse_intermixed_args(list(words)).overrides
    left = list(overrides)
    flags = []
    for word in words:
        if left and word == left[0]:
            left.pop(0)
        else:
            flags.append(word)
    return flags, overrides


def compose_jobs(flags: Sequence[str], overrides: Sequence[str]) -> list[tuple[list[str], Config]] | None:
    """Compose and check every job that a command line asks for, before any of them starts or writes anything.

    Args:
        flags, overrides: the command line, as `read_command_line` gives it. Hydra's own flags other than `-m` switch
            this look ahead off.

    Returns the words and the config of each job, in their order; one job alone where the command is no sweep. None
    where a sweeper other than Hydra's basic one decides about them.

    Raises ConfigError when any job cannot be composed or makes no sense, naming the job.
    """
    if set(flags) - {"-m", "--multirun"}:
        return None
    config_name, words = _choose_start(overrides)
    parsed = _parse_words(words)
    fixed = [entry.input_line for entry in parsed if not entry.is_sweep_override()]
    # Nothing but these words and `-m` can make a command a sweep.
    outer = [word for word in fixed if re.match(r"[+~]*(experiment|hydra)\b", word)]
    hydra_node = _compose(config_name, outer, with_hydra=True).hydra if flags or outer else None
    if not flags and (hydra_node is None or str(hydra_node.mode) != "RunMode.MULTIRUN"):
        _check_single(parsed)
        _check_launcher(parsed)
        return [(words, _parse_job(config_name, words, alone=True, called=words))]
    from hydra_plugins.vkd_launchers.engines import require_engine

    require_engine(hydra_node.launcher._target_)
    if not hydra_node.sweeper._target_.endswith(".BasicSweeper"):
        return None
    params = [f"{key}={value}" for key, value in (hydra_node.sweeper.params or {}).items()]
    _check_sweeping_experiments(config_name, parsed)
    with _errors_explained(words):
        (jobs,) = BasicSweeper.split_arguments(_parse_words([*params, *words]), None)
    shared = set.intersection(*map(set, jobs))
    planned = []
    for job in jobs:
        distinct = [word for word in job if word not in shared]
        planned.append((list(job), _parse_job(config_name, job, alone=len(jobs) == 1, called=distinct or job)))
    return planned


def _check_sweeping_experiments(config_name: str, parsed: Sequence[Override]) -> None:
    """Refuse several experiments of which one is a sweep itself: Hydra would run it at one point, without a word."""
    for entry in parsed:
        if entry.key_or_group != "experiment" or not entry.is_sweep_override():
            continue
        for choice in sorted({str(value) for value in entry.sweep_string_iterator()}):
            if _compose(config_name, [f"+experiment={choice}"], with_hydra=True).hydra.sweeper.params:
                raise ConfigError(
                    f"{entry.input_line} would run {choice}, which is a sweep itself, at one point",
                    expected="a command for each experiment that sweeps",
                    hint=f"python -m vkd.train +experiment={choice}",
                )


def _parse_words(overrides: Sequence[str]) -> list[Override]:
    """The words as Hydra reads them. Raises ConfigError for one that cannot be read."""
    with _errors_explained(overrides), _hydra_initialized():
        # The loader knows what `glob(*)` stands for.
        loader = GlobalHydra.instance().config_loader()
        return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def _check_single(parsed: Sequence[Override]) -> None:
    """Refuse several values for one key in a command that is no sweep."""
    for entry in parsed:
        if entry.is_sweep_override():
            word = entry.input_line
            key, _, values = word.partition("=")
            raise ConfigError(
                f"{word} gives {key} several values, and this is not a sweep",
                expected="-m before the words of a sweep, or brackets round one value that is a list",
                hint=f"python -m vkd.train -m {word} ..., or '{key}=[{values}]'",
            )


def _check_launcher(parsed: Sequence[Override]) -> None:
    """Refuse a launcher in a command that is no sweep: Hydra would run it right here, without a word."""
    for entry in parsed:
        if entry.key_or_group == "hydra/launcher":
            raise ConfigError(
                f"{entry.input_line} launches the jobs of a sweep, and this is none",
                expected="-m before the words of a sweep",
                hint=f"python -m vkd.train -m {entry.input_line} ...",
            )


def _check_groups(parsed: Sequence[Override]) -> None:
    """Refuse what Hydra has no good word for: a group that is left out, or set to what cannot name a choice."""
    groups = group_choices()
    for entry in parsed:
        word, key = entry.input_line, entry.key_or_group
        if not key:
            raise ConfigError(f"{word!r} has no key", expected="key=value")
        if key not in groups or entry.is_sweep_override():
            continue
        if key == "method" and isinstance(entry.value(), list) and "none" in entry.value() and len(entry.value()) > 1:
            raise ConfigError(
                f"{word} adds plain training to a method", expected="method=none alone, or methods without it"
            )
        if entry.is_delete() or not isinstance(entry.value(), (str, list, dict)):
            raise ConfigError(
                f"{word} names no choice of {key}",
                expected=list_names(groups[key], most=40),
                hint="method=none, for plain training" if key == "method" else "",
            )


def _check_methods(parsed: Sequence[Override], composed: DictConfig) -> None:
    """Refuse a method beside an experiment that sets another one's keys: the two would silently be summed."""
    for entry in parsed:
        if entry.key_or_group != "method" or not isinstance(entry.value(), (str, list)):
            continue
        chosen = [entry.value()] if isinstance(entry.value(), str) else entry.value()
        others = sorted(set(composed.method) - set(chosen))
        if others:
            names = ",".join([*others, *(name for name in chosen if name != "none")])
            raise ConfigError(
                f"{entry.input_line} was asked for, and the experiment sets method.{others[0]}",
                expected="the experiment's own method, or no experiment",
                hint=f"the command without {entry.input_line}, or method=[{names}] for the sum",
            )


def _parse_job(config_name: str, overrides: Sequence[str], *, alone: bool, called: Sequence[str]) -> Config:
    try:
        composed = _compose(config_name, overrides)
        import_training()
        return parse(composed)
    except UserError as error:
        if alone:
            raise
        problem = f"no job was started, since one of them is impossible ({' '.join(called)}):\n  {error.problem}"
        raise ConfigError(problem, expected=error.expected, hint=error.hint) from error


def run_hydra(
    flags: Sequence[str],
    overrides: Sequence[str],
    job: Callable[[DictConfig], Any],
    *,
    sweep_folder: Path | None = None,
) -> None:
    """Hand the command line to Hydra, which calls `job` with each composed config.

    Args:
        flags, overrides: the command line, as `read_command_line` gives it.
        job: raises nothing but what ends all jobs.
        sweep_folder: where Hydra and its launchers keep files of their own, unless the words say otherwise.

    Raises ConfigError for what Hydra refuses; SystemExit where Hydra printed something of its own and is done.
    """
    register_schema()
    config_name, words = _choose_start(overrides)
    decorated = hydra.main(
        config_path=str(config_directory()), config_name=config_name, version_base=_HYDRA_VERSION_BASE
    )(job)
    # Hydra reads sys.argv, and prints errors and exits by itself unless this variable is set.
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Some of its switches give the root logger a handler and leave it there.
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    quoted = str(sweep_folder).replace("\\", "\\\\").replace("'", "\\'")
    folder = [] if sweep_folder is None else [f"hydra.sweep.dir='{quoted}'"]
    sys.argv = [argv[0], *flags, *folder, *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    validate = Sweeper.validate_batch_is_legal
    if sweep_folder is not None:
        # Every job has been composed and checked beforehand; Hydra would compose them all again, 0.2 s each.
        Sweeper.validate_batch_is_legal = lambda sweeper, batch: None
    try:
        with _errors_explained(overrides):
            decorated()
    except BrokenPipeError:  # nobody reads what one of Hydra's switches prints
        raise
    except OSError as error:  # no job raises one: it is the folder of the sweep
        raise ConfigError(
            f"the files of the sweep cannot be written: {error}",
            expected="a folder that you may write to",
            hint="runs_root=SOME_OTHER_FOLDER",
        ) from error
    finally:
        Sweeper.validate_batch_is_legal = validate
        sys.argv = argv
        root.handlers = handlers
        root.setLevel(level)
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


@contextmanager
def _errors_explained(overrides: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from error


def _explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """The same complaint in vkd's words."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        choices = group_choices()
        group, _, name = str(error.missing_cfg_file).partition("/")
        if group not in choices:  # one of Hydra's own
            group, _, name = str(error.missing_cfg_file).rpartition("/")
        known = None if group.startswith("hydra") else choices.get(group)
        options = known or [option for option in error.options or [] if option != "schema"]
        # As the user wrote it: +experiment, recipe@teacher.recipe.
        pattern = rf"\+*{re.escape(group)}(@[^=]*)?=.*{re.escape(name)}"
        written = [word.partition("=")[0] for word in overrides if re.match(pattern, word)]
        key = written[-1] if written else group
        hint = " or ".join(f"{key}={choice}" for choice in nearest(name, options))
        if group == "hydra/launcher" and name.startswith("submitit"):
            hint = "pip install 'vkd[slurm]', for that launcher"
        return ConfigError(
            f"there is no {group or 'config'} {name!r}", expected=list_names(options, most=40), hint=hint
        )
    if isinstance(error, OverrideParseException):
        if "=" not in error.override and not error.override.startswith("~"):
            return ConfigError(f"{error.override!r} is no key=value word", expected="words such as seed=1, or --help")
        return ConfigError(
            f"{error.override!r} cannot be read",
            expected="key=value with every bracket and quote closed; quote the whole word in the shell where it holds "
            "brackets or spaces",
            hint="'recipe.milestones=[150,180,210]'",
        )
    text = str(error)
    cause = error.__cause__
    quoted = re.search(r"override '?([^'\s]+)'?", text)
    if isinstance(error, ConfigCompositionException) and quoted:
        key, _, value = quoted.group(1).rstrip(".").lstrip("+~").partition("=")
        if "merging" in text or "onver" in str(cause):
            return explain_value(key, value)
        return explain_key(key, group_choices())
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        return ConfigError(f"{error.full_key}: {str(error.msg).splitlines()[0]}")
    return ConfigError(" ".join(line.strip() for line in text.splitlines()[:2] if line.strip()))
