"""Other people's figures, read from CSV files; `results/published/README.md` says what each column means.

The first line of a file decides what it holds: figures of classification, which stand beside ours in a table, or of
base-to-new generalisation. A cell that is empty is not known, and stays so. Anything malformed is one `UserError` with
the file, the line and the column.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vkd.config import DatasetConfig, RecipeConfig, config_directory
from vkd.errors import UserError, list_names, nearest
from vkd.records.reading import clean

DEFAULT = "results/published"
"""The folder of the figures that come with vkd, beside `conf/` in a checkout and in an installed wheel."""

TEACHER = "teacher"
"""The `method` of a figure that is the accuracy of the teacher itself."""

BEST_ON_TEST, LAST, UNKNOWN = "best on test", "last", "unknown"

SIZES = {
    "cifar100": {"train": 50_000, "test": 10_000, "classes": 100},
    "imagenet": {"train": 1_281_167, "test": 50_000, "classes": 1_000},
}
"""Images and classes behind published figures, by data set and by their names in a result's `dataset`.

`test` is what accuracies are published on: of ImageNet the 50,000 images that it calls its validation set. A data set
that is not here is not checked.
"""


@dataclass(frozen=True)
class ClassificationFigure:
    """A published top-1 accuracy of a student, or of a teacher (`method` is `TEACHER`).

    dataset, teacher, student: as vkd names them; teacher is empty for a student that has none.
    label: the method's name in the source.
    method, divergence, alpha, beta: the row of vkd that the figure belongs beside; `method` is "none" for plain
        training, a sum as `Run.method` has it and empty where vkd has no such method.
    settings: further keys of vkd with their published values, comparable with `Run.parameters`: with other values it
        is another row.
    recipe: the same for how the student was trained: with other values it is the same row and does not compare.
    top1: percent, of `split`; source: where it is printed.
    epochs: length of training; epoch_reported: `LAST`, `BEST_ON_TEST` or `UNKNOWN`.
    drop_last: whether the last, smaller batch of an epoch was left out; runs: how many runs the figure averages.
    """

    dataset: str
    student: str
    label: str
    top1: float
    source: str
    teacher: str = ""
    method: str = ""
    divergence: str = ""
    alpha: float | None = None
    beta: float | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    recipe: tuple[tuple[str, Any], ...] = ()
    epochs: int | None = None
    epoch_reported: str = UNKNOWN
    split: str = ""
    drop_last: bool | None = None
    runs: int | None = None


@dataclass(frozen=True)
class BaseToNewFigure:
    """Published top-1 accuracies on base classes, on new classes and their harmonic mean, in percent, as printed."""

    dataset: str
    label: str
    base: float
    new: float
    harmonic_mean: float
    source: str
    network: str = ""
    epochs: int | None = None
    epoch_reported: str = UNKNOWN
    split: str = ""
    runs: int | None = None


Figure = ClassificationFigure | BaseToNewFigure


def read_classification(words: str) -> list[ClassificationFigure]:
    """The figures of classification in the files and folders that `words` name, separated by commas.

    "none" and "null" name nothing. `DEFAULT` is taken from the working directory where it is there, else from beside
    `conf/`. Raises UserError.
    """
    if words.strip().lower() in ("none", "null"):
        return []
    found = []
    for name in map(str.strip, words.split(",")):
        path = Path(name)
        if not path.exists() and path == Path(DEFAULT):
            path = config_directory().parent / DEFAULT
        if not name or not path.exists():
            raise UserError(
                f"published={words}: there is no {name or 'file without a name'}",
                expected=f"CSV files or folders of them, such as {DEFAULT}",
                hint="published=none, for a table of our figures alone",
            )
        found += read_published(path)
    return [figure for figure in found if isinstance(figure, ClassificationFigure)]


def read_published(path: str | Path) -> list[Figure]:
    """The figures of one CSV file, or of all in a folder in the order of their names. Raises UserError."""
    path = Path(path)
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no CSV file", expected=f"files such as those of {DEFAULT}")
    return [figure for file in files for figure in _read_file(file)]


def _read_file(path: Path) -> list[Figure]:
    """The figures of one CSV file. Raises UserError."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise UserError(f"{path} is no plain file", expected="a CSV file")
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            kind = _kind(path, header)
            return [_figure(kind, f"{path}, line {lines.line_num}", header, line) for line in lines if any(line)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no CSV file in UTF-8: {error}") from None


def _kind(path: Path, header: list[str]) -> type[Figure]:
    """What the lines below `header` are. Raises UserError where it has unknown, missing or repeated columns."""
    kind = BaseToNewFigure if "harmonic_mean" in header else ClassificationFigure
    fields = dataclasses.fields(kind)
    names = [field.name for field in fields]
    for name in header:
        if name not in names:
            near = nearest(name, names)
            expected = list_names(names, most=40)
            raise UserError(
                f"{path} has an unknown column {clean(name, 60)!r}", expected=expected, hint=" or ".join(near)
            )
        if header.count(name) > 1:
            raise UserError(f"{path} has the column {name} more than once")
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in header]
    if missing:
        raise UserError(f"{path} lacks {list_names(missing)} in its first line", expected=list_names(names, most=40))
    return kind


def _figure(kind: type[Figure], where: str, header: list[str], line: list[str]) -> Figure:
    """The figure that a line states. Raises UserError."""
    if len(line) != len(header):
        raise UserError(f"{where} has {len(line)} cells", expected=f"{len(header)}, one a column of the first line")
    values = {}
    required = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    for name, cell in zip(header, line, strict=True):
        # Text is shown and may be cut; of pairs, the end of a value must not be lost.
        text = clean(cell, csv.field_size_limit()) if name in ("settings", "recipe") else clean(cell)
        if not text and name in required:
            raise UserError(f"{where}: {name} is empty", expected="a value: a figure without it cannot be placed")
        if text[:1] in _FORMULA and name not in _READERS:
            raise UserError(
                f"{where}: {name} = {clean(text, 60)!r} would be a formula in a spreadsheet",
                expected=f"text that does not begin with {' '.join(_FORMULA)}",
            )
        if text:
            read, expected = _READERS.get(name, (str, ""))
            try:
                values[name] = read(text)
            except ValueError:
                raise UserError(
                    f"{where}: {name} = {clean(text)!r} is not what this column takes", expected=expected
                ) from None
    figure = kind(**values)
    if isinstance(figure, ClassificationFigure):
        _check_place(figure, where)
        for name, _ in figure.settings:
            _check_key(name, f"{where}: settings", _KEYS | _LOSS_KEYS)
        for name, _ in figure.recipe:
            _check_key(name, f"{where}: recipe", _KEYS)
    return figure


def _check_place(figure: ClassificationFigure, where: str) -> None:
    """Raise UserError where the columns that place a figure contradict each other."""
    if not figure.teacher and figure.method != "none":
        raise UserError(f"{where}: teacher is empty", expected="a network, or method none for plain training")
    if figure.divergence and figure.method in ("", "none", TEACHER):
        raise UserError(f"{where}: divergence {figure.divergence} without a method", expected="both or neither")
    if (figure.alpha is None) != (figure.beta is None) or (figure.alpha is not None and not figure.divergence):
        raise UserError(f"{where}: alpha and beta belong to one divergence", expected="both beside it, or neither")


def _check_key(name: str, where: str, known: frozenset[str]) -> None:
    """Raise UserError where `name` is no key of vkd, since one that no run has would compare with everything.

    Args:
        where: the place and the column, for the message.
        known: the keys that the column takes, and beside those of losses `method.NAME.KEY`. Methods are not imported
            here, so that of their keys the form alone is checked.
    """
    takes_losses = known >= _LOSS_KEYS
    if name in known or name.startswith(_OPEN) or (takes_losses and _METHOD_KEY.fullmatch(name)):
        return
    if name == "recipe.epochs":
        raise UserError(f"{where}: epochs have a column of their own", expected="recipe.epochs in the column epochs")
    section, _, rest = name.partition(".")
    below = {key.removeprefix(f"{section}."): key for key in known if key.startswith(f"{section}.")}
    forms = ["recipe.KEY", "dataset.KEY"]
    forms += ["cross_entropy_weight", "divergence.KEY", "method.NAME.KEY"] * takes_losses
    near = [below[key] for key in nearest(rest, below)] if below else nearest(name, known)
    raise UserError(
        f"{where}: the column takes no key {clean(name, 60)!r}",
        expected=f"{section}. with {list_names(below, most=40)}" if below else f"keys such as {', '.join(forms)}",
        hint=" or ".join(f"{key}=..." for key in near),
    )


def _number(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _percent(text: str) -> float:
    """A number from 0 to 100."""
    value = _number(text)
    if not 0 <= value <= 100:
        raise ValueError
    return value


def _count(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _one_of(*words: str) -> Callable[[str], str]:
    """A reader of the words themselves."""

    def read(text: str) -> str:
        if text not in words:
            raise ValueError
        return text

    return read


def _switch(text: str) -> bool:
    """True or false."""
    return _one_of("true", "false")(text) == "true"


def _method(text: str) -> str:
    """A method, or the parts of a sum in the order in which `Run.method` names them: kd first, the others by name."""
    parts = [part.strip() for part in text.split("+")]
    if not all(parts) or len(set(parts)) < len(parts) or (len(parts) > 1 and {"none", TEACHER} & set(parts)):
        raise ValueError
    return "+".join(sorted(parts, key=lambda part: (part != "kd", part)))


def _settings(text: str) -> tuple[tuple[str, Any], ...]:
    """Pairs of a key and its value, in the form in which a run's parameters compare."""
    pairs = []
    for word in text.split():
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError
        pairs.append((name, _value(value)))
    if len(dict(pairs)) < len(pairs):
        raise ValueError
    return tuple(pairs)


def _value(text: str) -> Any:
    """A value as `Run.parameters` has it: a number is a float, null is None, [a,b] a tuple, the rest is text."""
    if text == "null":
        return None
    if text.startswith("[") and text.endswith("]"):
        return tuple(_value(part) for part in text[1:-1].split(",") if part)
    try:
        return _number(text)
    except ValueError:
        return text


def _below(section: str, schema: type) -> tuple[set[str], set[str]]:
    """The keys of a dataclass of the config below `section`, and the beginnings of those below its open groups."""
    fields = dataclasses.fields(schema)
    is_open = {f"{section}.{field.name}." for field in fields if str(field.type).startswith("dict[")}
    return {f"{section}.{field.name}" for field in fields}, is_open


_RECIPE_KEYS, _OPEN_RECIPE = _below("recipe", RecipeConfig)
_DATASET_KEYS, _OPEN_DATASET = _below("dataset", DatasetConfig)
_KEYS = frozenset((_RECIPE_KEYS | _DATASET_KEYS) - {"recipe.epochs"})
_OPEN = (*_OPEN_RECIPE, *_OPEN_DATASET)
_LOSS_KEYS = frozenset({"cross_entropy_weight"}) | {
    f"divergence.{name}" for name in ("name", "temperature", "alpha", "beta", "match_kl_scale", "skew")
}
_FORMULA = ("=", "+", "-", "@")
_METHOD_KEY = re.compile(r"method\.\w+\.\w+")
_PAIRS = "key=value pairs with spaces between, each key once, such as "
_PERCENT = (_percent, "percent, from 0 to 100")
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    **dict.fromkeys(("top1", "base", "new", "harmonic_mean"), _PERCENT),
    **dict.fromkeys(("alpha", "beta"), (_number, "a finite number, or nothing")),
    **dict.fromkeys(("epochs", "runs"), (_count, "a whole number from 1, or nothing")),
    "epoch_reported": (_one_of(LAST, BEST_ON_TEST, UNKNOWN), f"{LAST}, {BEST_ON_TEST} or {UNKNOWN}"),
    "split": (_one_of("test"), "test, or nothing where it is not known"),
    "drop_last": (_switch, "true, false, or nothing where it is not known"),
    "method": (_method, "a method, or different ones with + between, such as kd+at"),
    "settings": (_settings, f"{_PAIRS}divergence.temperature=4"),
    "recipe": (_settings, f"{_PAIRS}recipe.learning_rate=0.05"),
}
