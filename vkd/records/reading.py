"""Run directories, read as what they are: files that somebody else wrote.

`read_runs` walks a folder and yields a `Run` for each run directory, finished or not. A run that failed, that was cut
off or whose files are damaged is yielded as well, with its reason, so that a table can show the hole. Nothing in a run
directory is executed, unpickled or trusted to be small, and no name in it is trusted to be one: a result is of use only
where its names are plain words and its figures could be measured. A link to a folder is looked at, and never walked.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import yaml

MARKERS = frozenset({"config.yaml", "result.json", "status.json"})
MOST_BYTES = 4 * 2**20
MOST_CONFIG_BYTES = 2**18
"""Of a `config.yaml`: YAML takes fifty times longer to read than JSON does."""
MOST_VALUES = 50_000
MOST_LEVELS = 24
MOST_DIGITS = 1_000
"""Of a number: Python takes the square of their number of steps to read them."""
MOST_REMEMBERED = 200
"""Signs of a text that is cleaned once and remembered."""
LARGEST_FIGURE = 1e40
"""No loss in float32 is beyond it, and the squares that a spread adds up are still finite."""
FORMAT = 1

_PLAIN_NAME = re.compile(r"\w[\w.+-]{0,199}")  # of a data set, network, method or divergence: nothing reads it as code
_KEY = re.compile(r"\w[\w./+-]{0,199}")
_PERCENT = re.compile(r"(.*/)?(top\d+|agreement)(_.*)?")
_DOLLAR = re.compile(r"(?<!\\)\$")
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_NOT_PARAMETERS = frozenset({"format", "fingerprint", "group", "study", "seed", "metrics", "timing", "environment"})
_NOT_PARAMETERS |= {"reliability"}
_NEUTRAL = frozenset({"root", "device", "workers", "compile", "graphs", "folding", "cache", "caches", "launcher"})
_NEUTRAL |= {"memory_layout", "memory_format", "channels_last", "fold", "cache_dtype", "fused_optimizer"}
_NEUTRAL |= {"students_at_once", "keep_freed_memory"}
_NEUTRAL |= {"parameters", "macs"}  # counted, and decided by the architecture
_IN_CONFIG = frozenset({"dataset", "teacher", "student", "method", "divergence", "recipe"})
_IN_CONFIG |= {"cross_entropy_weight", "precision", "world_size"}
_RUN_NAME = re.compile(r".*-s(-?\d+)-([0-9a-f]{8})")


class Shared(dict):
    """A section that many runs have alike, held once.

    flat: its part of `Run.parameters`, once that has been asked for.
    """

    __slots__ = ("flat",)

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.flat: dict[str, Any] | None = None


class Damaged(Exception):
    """A file of a run directory that cannot be what it should be; the message is the reason."""


@dataclass(frozen=True)
class Run:
    """One run directory.

    path: the directory, relative to the folder of all runs where `read_runs` was told of it; with forward slashes.
    state: "done", "failed", "running", "interrupted", "unfinished" (no sign of its end) or "damaged".
    reason: why it is not done, in one line.
    content: `result.json` of a done run, otherwise `config.yaml`; empty where that cannot be read.
    """

    path: str
    state: str
    reason: str = ""
    content: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def done(self) -> bool:
        """Whether the run finished and its result could be read."""
        return self.state == "done"

    @property
    def why(self) -> str:
        """State and reason, as a table's footnote says them."""
        return f"{self.state}: {self.reason}" if self.reason else self.state

    @property
    def identified(self) -> bool:
        """Whether the content says, in plain names, which data set, student, method and seed this run belongs to."""
        names = bool(self.dataset and self.student and self.seed is not None and isinstance(self._method, dict))
        return names and not self.odd_name

    @property
    def odd_name(self) -> str:
        """The first of the names of data set, networks, method and divergence that is no plain word, with its key."""
        sections = [("dataset", "name"), ("student", "arch"), ("teacher", "arch"), ("divergence", "name")]
        named = [(".".join(keys), _get(self.content, *keys)) for keys in sections]
        named += [("method", name) for name in (self._method if isinstance(self._method, dict) else ())]
        for key, name in named:
            if name is not None and not (isinstance(name, str) and _PLAIN_NAME.fullmatch(name)):
                return f"{key} {clean(repr(name), 60)}"
        return ""

    @property
    def fingerprint(self) -> str:
        """What the run is, seed included; empty for a run that is not done."""
        return str(self.content.get("fingerprint", "")) if self.done else ""

    @property
    def group(self) -> str:
        """What the run is, but for its seed; empty for a run that is not done."""
        return str(self.content.get("group", "")) if self.done else ""

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return _text(self.content, "dataset", "name")

    @property
    def teacher(self) -> str:
        """Architecture of the teacher; empty for plain training."""
        return "" if self.plain else _text(self.content, "teacher", "arch")

    @property
    def student(self) -> str:
        """Architecture of the student."""
        return _text(self.content, "student", "arch")

    @property
    def seed(self) -> int | None:
        """Seed of the student; None where it is not an integer."""
        seed = self.content.get("seed")
        value = number(seed)
        return int(seed) if value is not None and value.is_integer() else None

    @property
    def _method(self) -> Any:
        """The method as a dict of its parts; another type where the content is wrong."""
        method = self.content.get("method", False)
        return {} if method in (None, "none") else method

    @property
    def plain(self) -> bool:
        """Whether this is plain training: no teacher, no method."""
        return isinstance(self._method, dict) and not self._method.keys() - {"none"}

    @property
    def method(self) -> str:
        """The method, a sum of methods as "kd+at", plain training as "none"."""
        if self.plain or not isinstance(self._method, dict):
            return "none"
        return "+".join(sorted((clean(str(name)) for name in self._method), key=lambda name: (name != "kd", name)))

    @property
    def divergence(self) -> str:
        """Name of the divergence; empty where the method has none."""
        return "" if self.plain else _text(self.content, "divergence", "name")

    @property
    def alpha(self) -> float | None:
        """alpha of the divergence; None where it has none."""
        return None if self.plain else number(_get(self.content, "divergence", "alpha"))

    @property
    def beta(self) -> float | None:
        """beta of the divergence; None where it has none."""
        return None if self.plain else number(_get(self.content, "divergence", "beta"))

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of a done run by name; empty otherwise."""
        metrics = self.content.get("metrics") if self.done else None
        return metrics if isinstance(metrics, dict) else {}

    def metric(self, name: str) -> float | None:
        """The metric `name` of a done run; None where it is null, missing or no finite number."""
        return number(self.metrics.get(name))

    @cached_property
    def environment(self) -> dict[str, str]:
        """Versions and device of a done run, as text."""
        environment = self.content.get("environment") if self.done else None
        return {clean(str(k)): clean(str(v)) for k, v in environment.items()} if isinstance(environment, dict) else {}

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Everything that may tell two runs of one method apart, by dotted name, seed and measurements left out.

        Values are comparable: numbers are floats, so that 1 is 1.0. Null is kept, and says as much as absence does in
        a result; in a config, absence says nothing.
        """
        flat: dict[str, Any] = {}
        for section, value in self.content.items():
            if section in _NOT_PARAMETERS or (not self.done and section not in _IN_CONFIG):
                continue
            if section in ("teacher", "divergence", "method") and self.plain:
                continue
            flat.update(_flat(clean(str(section)), value))
        return flat

    def teacher_accuracy(self, split: str) -> float | None:
        """The teacher's top-1 on "val" or "test" in percent; None where the run does not say."""
        return number(_get(self.content, "teacher", "accuracy", split)) if self.done and not self.plain else None

    def teacher_fact(self, name: str) -> Any:
        """An entry of the result's `teacher`, such as "sha256" or "saw_val"; None where there is none."""
        return _get(self.content, "teacher", name) if self.done and not self.plain else None


def read_runs(root: str | Path, relative_to: str | Path | None = None) -> Iterator[Run]:
    """Yield the runs below `root` in the order of their paths, one at a time.

    A run directory is one that holds `config.yaml`, `result.json` or `status.json`, or one at least two
    levels below `root` with nothing but the name of a run directory. A link to one counts. What may hide runs (a folder
    that cannot be read, a link to a folder that is no run, a file with the name of a run) is yielded as damaged. Names
    that begin with a dot are skipped.
    """
    base = str(relative_to if relative_to is not None else root)
    for path, fault in run_directories(root):
        name = os.path.relpath(path, base).replace(os.sep, "/")
        yield Run(clean(name), "damaged", fault) if fault else read_run(path, name=name)


def read_run(path: str | Path, name: str | None = None) -> Run:
    """The run in the directory `path`, called `name` in what is said about it. Never raises for what a file holds."""
    name = clean(name if name is not None else str(path))
    folder = str(path)
    config: dict[str, Any] = {}
    try:
        status = _read_json(folder, "status.json")
        result = _read_json(folder, "result.json")
        state, reason = _judge(status, result)
        if state == "done":
            _check_place(folder, result)
    except Damaged as error:
        result, state, reason = None, "damaged", str(error)
    if state == "done":
        return Run(name, state, reason, result)
    try:
        config = read_config(folder) or {}
        if not config:
            reason = f"{reason}; no config.yaml" if reason else "no config.yaml"
    except Damaged as error:
        reason = f"{reason}; {error}" if reason else str(error)
    return Run(name, state, reason, config)


def read_config(path: str | Path) -> dict[str, Any] | None:
    """The `config.yaml` in the directory `path`, as plain data; None where there is none.

    Nothing in it is constructed, called or resolved: `_target_` and `${...}` are text like any other.

    Raises Damaged.
    """
    return _read_yaml(str(path), "config.yaml")


def read_config_file(file: str | Path) -> dict[str, Any] | None:
    """What `read_config` reads, of a file of any name; None where there is none.

    Raises Damaged, whose message begins with the path.
    """
    return _read_yaml("", str(file))


def number(value: Any) -> float | None:
    """`value` as a float; None where it is no finite number. A bool is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def clean(text: str, most: int = 300) -> str:
    """`text` as one line that is text wherever it is shown, cut after `most`.

    Nothing in it steers a terminal, changes the direction of writing, ends a code span or makes a link in Markdown, or
    is a formula to a plot: whatever cannot be printed is a space, a half of a surrogate pair its number, a backtick an
    apostrophe, a dollar sign has a backslash.
    """
    # Records repeat their names and settings, and rarely anything longer.
    text = _as_line(text) if len(text) <= MOST_REMEMBERED else _as_line.__wrapped__(text)
    return text if len(text) <= most else text[: most - 3] + "..."


@lru_cache(maxsize=2**15)
def _as_line(text: str) -> str:
    text = text.encode("utf-8", errors="backslashreplace").decode("utf-8")
    if not text.isprintable():
        text = "".join(sign if sign.isprintable() else " " for sign in text)
    text = " ".join(text.replace("`", "'").replace("](", "] (").split())
    return _DOLLAR.sub(r"\\$", text)


def printable(text: str) -> str:
    """A message of several lines that cannot steer the terminal it is shown on: such characters stand as escapes."""
    return "".join(
        sign if sign == "\n" or sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def run_directories(root: str | Path) -> Iterator[tuple[str, str]]:
    """The run directories below `root` in the order of their paths, and what may hide some, as `read_runs` finds them.

    Each with what is wrong; empty for a run directory.
    """
    return _below(str(root), level=0)


def _below(folder: str, level: int) -> Iterator[tuple[str, str]]:
    """The run directories at or below `folder`, which lies `level` levels below the root, and what may hide some.

    Each with what is wrong; empty for a run directory.
    """
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield folder, f"the folder cannot be read: {error.strerror}"
        return
    if level and any(entry.name in MARKERS for entry in entries):
        yield folder, ""
        return
    is_empty = True
    for entry in entries:
        if not entry.name.startswith("."):
            for found in _runs_of(entry, level + 1):
                is_empty = False
                yield found
    if is_empty and level >= 2 and _RUN_NAME.fullmatch(Path(folder).name):
        yield folder, ""


def _runs_of(entry: os.DirEntry[str], level: int) -> Iterator[tuple[str, str]]:
    """What `_below` yields of one entry of a folder, which lies `level` levels below the root."""
    if entry.is_dir(follow_symlinks=False):
        if level <= 4:
            yield from _below(entry.path, level)
    elif entry.is_symlink() and not Path(entry.path).is_file():
        # Walked, it could lead to the whole disk, or back here.
        if any(Path(entry.path, name).exists() for name in MARKERS):
            yield entry.path, ""
        else:
            yield entry.path, "a link to a folder that is no run, and such links are not followed"
    elif _RUN_NAME.fullmatch(entry.name):
        yield entry.path, "a file in place of a run's directory"


def _judge(status: dict[str, Any] | None, result: dict[str, Any] | None) -> tuple[str, str]:
    """State and reason of a run from its two JSON files, each None where it is missing. Raises Damaged."""
    if status is None and result is None:
        return "unfinished", "no result.json"
    state = status.get("state") if status is not None else "done"
    if state == "failed":
        trace = str(status.get("traceback") or "").strip().splitlines()
        return "failed", clean(str(status.get("reason") or (trace[-1] if trace else "no reason given")))
    if state in ("running", "interrupted"):
        progress = f"epoch {clean(str(status.get('epoch', '?')), 12)} of {clean(str(status.get('epochs', '?')), 12)}"
        heard = clean(str(status.get("updated") or "at an unknown time"), 40)
        return state, progress if state == "interrupted" else f"{progress}, last heard of {heard}"
    if state != "done":
        raise Damaged(f"status.json has the unknown state {clean(repr(state), 40)}")
    if result is None:
        raise Damaged("status.json says done, but there is no result.json")
    _check_result(result)
    return "done", ""


def _check_result(result: dict[str, Any]) -> None:
    """Raise Damaged where `result` lacks what a table stands on."""
    if result.get("format") != FORMAT:
        found = clean(repr(result.get("format")), 40)
        raise Damaged(f"result.json has format {found}; this version of vkd reads format {FORMAT}")
    for name in ("fingerprint", "group"):
        if not isinstance(result.get(name), str) or not result[name]:
            raise Damaged(f"result.json lacks {name}")
    if not isinstance(result.get("metrics"), dict):
        raise Damaged("result.json lacks metrics")
    run = Run("", "done", "", result)
    if run.odd_name:
        raise Damaged(f"result.json has {run.odd_name}, which is no plain name")
    if not run.identified:
        raise Damaged("result.json lacks one of dataset.name, student.arch, method and a whole-numbered seed")
    for name, pattern, kind in [
        *((result[name], _PLAIN_NAME, name) for name in ("fingerprint", "group")),
        *((name, _KEY, "the metric") for name in result["metrics"]),
        *((name, _PLAIN_NAME, "the key") for name in result),
    ]:
        if not pattern.fullmatch(name):
            raise Damaged(f"result.json has {kind} {clean(repr(name), 60)}, which is no plain name")
    for name, value in result["metrics"].items():
        _check_figure(f"metrics.{name}", value, is_percent=bool(_PERCENT.fullmatch(name)))
    for split in ("val", "test"):
        _check_figure(f"teacher.accuracy.{split}", _get(result, "teacher", "accuracy", split), is_percent=True)


def _check_figure(name: str, value: Any, *, is_percent: bool) -> None:
    """Raise Damaged where the figure `name` of a result is neither null nor a number that can have been measured."""
    if value is None:
        return
    found = number(value)
    if found is None:
        raise Damaged(f"result.json has {name} = {clean(repr(value), 40)}, which is no finite number")
    if abs(found) > LARGEST_FIGURE or (is_percent and not 0 <= found <= 100):
        raise Damaged(f"result.json has {name} = {found:g}, which {'is no percentage' if is_percent else 'is none'}")


def _check_place(folder: str, result: dict[str, Any]) -> None:
    """Raise Damaged where a result lies in a directory that is named for another run."""
    named = _RUN_NAME.fullmatch(Path(folder).absolute().name)
    run = Run("", "done", "", result)
    if named and (int(named[1]) != run.seed or not run.fingerprint.startswith(named[2])):
        found = f"seed {clean(str(run.seed), 24)} and the fingerprint {run.fingerprint[:8]}"
        raise Damaged(f"result.json is of another run than its directory's name says: it has {found}")


def read_bytes(folder: str, name: str, most: int = MOST_BYTES) -> bytes | None:
    """Content of a plain file of reasonable size; None where there is none. Raises Damaged."""
    path = Path(folder, name)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise Damaged(f"{name} is no plain file")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name is none"
        raise Damaged(f"{name} cannot be read: {reason}") from None
    if len(data) > most:
        raise Damaged(f"{name} is larger than {f'{most // 2**20} MiB' if most >= 2**20 else f'{most // 2**10} KiB'}")
    return data


def _read_json(folder: str, name: str) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file. Raises Damaged."""
    data = read_bytes(folder, name)
    if data is None:
        return None
    try:
        content = strict_json(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not whole JSON: {clean(str(error), 120)}") from None
    return _bounded(name, content)


def strict_json(data: bytes | str) -> Any:
    """What JSON says, and nothing that readers differ on or choke on: no key twice, no NaN, no endless number.

    Raises ValueError, or RecursionError where it is too deep.
    """
    return json.loads(
        data, object_pairs_hook=_without_twins, parse_int=_whole, parse_float=_finite, parse_constant=_finite
    )


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of JSON with these entries. Raises ValueError for a key that is there twice: readers differ on it."""
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the key {clean(name, 60)!r} is there twice")
        content[name] = value
    return content


def _whole(text: str) -> int:
    """An integer of JSON. Raises ValueError where it is endless."""
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    """A number of JSON. Raises ValueError for NaN and infinity, which JSON has not and vkd never writes."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{clean(text, 20)} is no number of JSON")
    return value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML's safe loader for what a config is written in: text, numbers, true, false, null, lists and mappings.

    It has no merge keys, with which a small file can ask for any amount of memory, no numbers of any length, with which
    it can ask for any amount of time, no other types, and no key twice.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave `<<` alone; the loader then refuses it as an unknown tag."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises ConstructorError for a key that is there twice."""
        content = super().construct_mapping(node, deep=deep)
        if len(content) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is there twice", node.start_mark)
        return content

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """The number of a node. Raises ConstructorError where it is endless."""
        if len(node.value) > MOST_DIGITS // 10:  # in base 60, each digit takes two signs and is a product
            raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
        is_whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
for _kind in ("binary", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", yaml.SafeLoader.construct_undefined)

_YAML_FAULTS = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What YAML's loader raises: its constructors do not expect `!!int ""`, `!!bool x` and the like."""


def _read_yaml(folder: str, name: str) -> dict[str, Any] | None:
    """The YAML mapping in a file; None where there is no file. Raises Damaged; constructs nothing but plain data."""
    data = read_bytes(folder, name, MOST_CONFIG_BYTES)
    if data is None:
        return None
    try:
        content = yaml.load(data, Loader=_Loader)
    except _YAML_FAULTS as error:
        raise Damaged(f"{name} is not plain YAML: {clean(str(error) or type(error).__name__, 120)}") from None
    return _bounded(name, content)


def _bounded(name: str, content: Any) -> dict[str, Any]:
    """`content`, where it is a mapping of reasonable extent (aliases of YAML unfolded). Raises Damaged."""
    if not isinstance(content, dict):
        raise Damaged(f"{name} holds {type(content).__name__}, not a mapping")
    pending, seen = [(content, 0)], 0
    while pending:
        value, level = pending.pop()
        children = list(value.values()) if isinstance(value, dict) else list(value)
        seen += len(children)
        if seen > MOST_VALUES or level > MOST_LEVELS:
            raise Damaged(f"{name} holds too many values or levels")
        pending += [(child, level + 1) for child in children if isinstance(child, (dict, list, set, tuple))]
    return content


def _get(content: Any, *names: str) -> Any:
    """The value at the end of a path of keys; None where the path ends early."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def _text(content: Any, *names: str) -> str:
    """The text at the end of a path of keys, cleaned; empty where there is none."""
    value = _get(content, *names)
    return clean(value, 100) if isinstance(value, str) else ""


def _flat(name: str, value: Any) -> dict[str, Any]:
    """The leaves of a section by dotted name, but for those that decide nothing."""
    if isinstance(value, Shared) and value.flat is not None:
        return value.flat
    leaves: dict[str, Any] = {}
    _flatten(name, value, leaves)
    leaves = {
        name: leaf
        for name, leaf in leaves.items()
        if name.rpartition(".")[2] not in _NEUTRAL and not name.startswith("teacher.accuracy")
    }
    if isinstance(value, Shared):
        value.flat = leaves
    return leaves


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    """Put the leaves of `value` into `into`, each under its dotted name, in a comparable form."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            _flatten(f"{name}.{clean(str(key), 80)}", child, into)
    else:
        into[name] = _comparable(value)


def _comparable(value: Any) -> Any:
    """A hashable form of a leaf in which equal settings are equal: 1 is 1.0, but true is not 1."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return number(value) if number(value) is not None else clean(str(value)[:300])
    if isinstance(value, str):  # YAML reads 5e-4 as text
        return _comparable(float(value)) if len(value) < 40 and _EXPONENT.fullmatch(value) else clean(value)
    if isinstance(value, (list, tuple)):
        return tuple(_comparable(child) for child in value)
    return value if value is None else clean(str(value))
