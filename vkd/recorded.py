"""A run's `config.yaml` as what a command starts from: `from=runs/.../config.yaml`.

The file is data that somebody may have sent: it is read as the config of any run from elsewhere is, holds no
interpolation, and every key of it is one of the schema's.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from vkd.command import import_training
from vkd.config import Config, TeacherConfig, as_typed, config_directory
from vkd.errors import ConfigError, nearest
from vkd.records.foreign import read_foreign_file

RECORDED = "recorded"
"""What the config is called among Hydra's, and its parts among the choices of their groups."""

FROM = "from="
"""What the word begins with that names such a config."""

_TEACHER = "recorded_teacher"
_GROUP = FROM.rstrip("=")
_CHOICES = {"method": [RECORDED], "recipe@teacher.recipe": _TEACHER}
_PLAIN = re.compile(r"[\w.+@%-]*/[\w./+@%-]*")
"""Paths that Hydra's grammar takes for a text as they are."""
_EXPECTED = "a run's directory or its config.yaml"


def register_recorded(path: str) -> str:
    """Make the config at `path` the one that Hydra knows as `recorded`, put together as `conf/train.yaml` is.

    Its parts are choices of their groups, so that `divergence=rkld` replaces the divergence as it always does, and
    `teacher.arch=...` a single value. What the file does not say, such as a key that its vkd did not have, has the
    schema's default.

    Args:
        path: of a run directory or of a file; may be quoted, as in the words that this returns.

    Returns the word `from=...` as Hydra reads it. For Hydra, `from` is a group without content that has this choice, so
    that it passes the word on to every job of a sweep, wherever that is composed.

    Raises ConfigError where it cannot be read, or is no config.
    """
    path = _unquote(path)
    config = read_recorded(path)
    values = dataclasses.asdict(config)
    if config.teacher is None:
        # Plain training names none; a word that adds a method may.
        values["teacher"] = dataclasses.asdict(TeacherConfig(arch="", recipe=config.recipe))
    teacher = values["teacher"]
    arch = {"teacher": {"arch": teacher.pop("arch")}, "student": values.pop("student")}
    store = ConfigStore.instance()
    store.store(group="pair", name=RECORDED, node=arch, package="_global_")
    store.store(group="recipe", name=RECORDED, node=values.pop("recipe"))
    store.store(group="recipe", name=_TEACHER, node=teacher.pop("recipe"))
    for group in ("dataset", "tracker"):
        store.store(group=group, name=RECORDED, node=values.pop(group))
    # Below these anything may stand, also what Hydra would take for a list of defaults.
    for group in ("method", "divergence"):
        store.store(group=group, name=RECORDED, node={group: values.pop(group)}, package="_global_")
    # With `..` in it Hydra would look for a file of that name near its own.
    choice = (Path(path).resolve() if ".." in Path(path).parts else Path(path)).as_posix()
    *folders, name = [part for part in choice.split("/") if part]
    store.store(group="/".join([_GROUP, *folders]), name=name, node={}, package="_global_")
    usual = yaml.safe_load((config_directory() / "train.yaml").read_text(encoding="utf-8"))
    defaults = [{_GROUP: None}, *_defaults(usual["defaults"])]
    store.store(name=RECORDED, node={**values, "defaults": defaults, "hydra": usual["hydra"]})
    return FROM + (choice if _PLAIN.fullmatch(choice) else _quote(choice))


def _quote(text: str) -> str:
    """The text as Hydra's grammar has it where it holds more than letters."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _unquote(text: str) -> str:
    """What `_quote` was given; any other text as it is."""
    inner = text[1:-1].replace("\\'", "'").replace("\\\\", "\\")
    return inner if text == _quote(inner) else text


def _defaults(usual: list[Any]) -> list[Any]:
    """The defaults list of `conf/train.yaml` with the recorded choice in every group of vkd's."""
    return [
        {group: choice if group.startswith("override ") else _CHOICES.get(group, RECORDED)}
        if isinstance(entry, dict)
        else entry
        for entry in usual
        for group, choice in (entry.items() if isinstance(entry, dict) else [("", "")])
    ]


def read_recorded(path: str) -> Config:
    """The config that a run recorded, with every key of the schema typed; what it means together is not checked yet.

    Where the weight of the cross-entropy is the literature's beside the method, it is null, so that it follows another
    method.

    Raises ConfigError.
    """
    file = _find(path)
    content = read_foreign_file(file, expected=_EXPECTED)
    try:
        config = as_typed(Config, {key: value for key, value in content.items() if key != "divergence" or value})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.problem}", expected=error.expected, hint=error.hint) from error
    import_training()
    from vkd.methods import METHODS

    # Plain training has 1, whatever is asked for.
    usual = max((METHODS[name].cross_entropy_weight for name in config.method if name in METHODS), default=1.0)
    if config.cross_entropy_weight == usual:
        config.cross_entropy_weight = None
    return config


def _find(path: str) -> Path:
    """The file that `from=path` means. Raises ConfigError where there is none."""
    given = Path(path)
    file = given / "config.yaml" if given.is_dir() else given
    if path and file.is_file():
        return file
    if not path:
        raise ConfigError("from= names no run", expected=_EXPECTED, hint="from=runs/STUDY/PAIR/RUN")
    what = f"{given} is no run's directory: it has no config.yaml" if given.is_dir() else f"there is no {given}"
    raise ConfigError(what, expected=_EXPECTED, hint=" or ".join(f"from={found}" for found in _near(given)))


def _near(given: Path) -> list[Path]:
    """Up to three paths that may have been meant: runs below a folder, else what is spelt like the part not found."""
    if given.is_dir():
        found = (entry.parent for depth in ("*", "*/*", "*/*/*") for entry in given.glob(f"{depth}/config.yaml"))
        return sorted(found)[:3]
    try:
        above = next(folder for folder in given.parents if folder.is_dir())
        missing, *rest = given.relative_to(above).parts
        return [above.joinpath(name, *rest) for name in nearest(missing, [entry.name for entry in above.iterdir()])]
    except (StopIteration, OSError):
        return []
