"""Runs that were read before: what `read_runs` yields, without reading again what has not changed.

A study of ten thousand runs is forty thousand files. What was read of them is kept in a file of the user's own cache,
not beside the runs, which may come from elsewhere and are checked whenever they are read. A run is taken from there
where its files are still the same by inode, size and times of change; vkd replaces files and never writes into them.
Whatever is wrong with the cache, the runs are read as if there were none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from vkd.records.atomic import write_text_atomically
from vkd.records.reading import MARKERS, Run, Shared, clean, read_run, run_directories

_ALONE = frozenset({"metrics", "timing", "reliability"})
"""Sections of a result that no two runs have alike."""
_FILES = (*sorted(MARKERS), "metrics.jsonl")
_SETTLED = 2_000_000_000
"""Nanoseconds after which a file's time of change is sure to tell a later change from the last one."""


class RunMemory:
    """What was read of the runs below one folder, and what was made of them.

    Args:
        root: the folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.file = cache_file(self.root)
        self._known: dict[str, list[Any]] = {}
        self._sections: dict[tuple[str, str], int] = {}
        self._contents: list[Shared] = []
        self._made: dict[str, str] = {}
        self._stated: dict[str, list[Any]] = {}
        self._is_new = True
        self._is_sure = True
        self._load()

    def read(self, relative_to: str | Path | None = None) -> list[Run]:
        """What `read_runs` yields, in its order."""
        base = str(relative_to if relative_to is not None else self.root)
        runs, known = [], {}
        for path, fault in run_directories(self.root):
            name = clean(os.path.relpath(path, base).replace(os.sep, "/"))
            if fault:
                runs.append(Run(name, "damaged", fault))
                self._stated[path] = [fault]
                continue
            signature = _signature(path)
            own = os.path.relpath(path, self.root)
            self._stated[own] = signature
            run = self._recalled(own, signature, name)
            if run is None:
                run = read_run(path, name=name)
                # What could not be read may be readable in a moment, with the same files.
                is_sure = "cannot be read" not in run.reason and not _is_fresh(signature)
                self._is_sure = self._is_sure and is_sure
                packed = self._packed(run.content)
                self._known[own] = [signature if is_sure else None, run.state, run.reason, packed]
                self._is_new = True
                run = Run(name, run.state, run.reason, self._unpacked(packed))
            known[own] = self._known[own]
            runs.append(run)
        self._is_new = self._is_new or len(known) < len(self._known)
        self._known = known
        return runs

    def state(self, *others: Any) -> str:
        """A hash of the files of all runs as `read` found them, of this version of the code, and of `others`."""
        return _digest([_code(), sorted(self._stated.items()), others])

    def was_made(self, what: str, state: str) -> bool:
        """Whether `what` was made from this state the last time."""
        return self._made.get(what) == state

    def remember(self, what: str = "", state: str = "") -> None:
        """Keep what was read, and that `what` was made from `state`. A cache that cannot be written is done without."""
        if what and self._is_sure and self._made.get(what) != state:
            self._made[what] = state
            self._is_new = True
        if not self._is_new:
            return
        content = {"reader": _code(), "sections": [*zip(self._names(), self._contents, strict=True)]}
        content |= {"runs": self._known, "made": self._made}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.file, json.dumps(content, separators=(",", ":")))
        except OSError:
            return
        self._is_new = False

    def _names(self) -> list[str]:
        return [name for name, _ in self._sections]

    def _recalled(self, own: str, signature: list[Any], name: str) -> Run | None:
        """The run as it was read before; None where it was not, has changed, or what was kept makes no sense."""
        try:
            then, state, reason, packed = self._known[own]
            return Run(name, state, reason, self._unpacked(packed)) if then == signature else None
        except (LookupError, TypeError, ValueError, AttributeError):
            return None

    def _packed(self, content: dict[str, Any]) -> dict[str, Any]:
        """A run's content with the number of a section in place of each that others may have too."""
        packed: dict[str, Any] = {}
        for name, value in content.items():
            if name in _ALONE or not isinstance(value, dict):
                packed[name] = [value]
            elif name == "environment":
                packed[name] = [self._number(name, {k: v for k, v in value.items() if k != "command"})]
                packed[name].append(value.get("command"))
            else:
                packed[name] = self._number(name, value)
        return packed

    def _number(self, name: str, value: dict[str, Any]) -> int:
        number = self._sections.setdefault((name, json.dumps(value)), len(self._contents))
        if number == len(self._contents):
            self._contents.append(Shared(value))
        return number

    def _unpacked(self, packed: dict[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in packed.items():
            if isinstance(value, int):
                content[name] = self._contents[value]
            elif name == "environment" and len(value) == 2:
                content[name] = {**self._contents[value[0]], "command": value[1]}
            else:
                content[name] = value[0]
        return content

    def _load(self) -> None:
        try:
            content = json.loads(self.file.read_bytes())
            if content["reader"] != _code():
                return
            self._contents = [Shared(value) for _, value in content["sections"]]
            self._sections = {
                (name, json.dumps(value)): number for number, (name, value) in enumerate(content["sections"])
            }
            self._known, self._made = content["runs"], content["made"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self._known, self._sections, self._contents, self._made = {}, {}, [], {}
            return
        self._is_new = False


def cache_file(root: Path) -> Path:
    """Where what was read below a folder is kept: in VKD_CACHE, or vkd's folder in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("VKD_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vkd")
    name = hashlib.sha256(str(root.resolve()).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
    try:
        return Path(own).expanduser() / "collect" / f"{name}.json"
    except RuntimeError:  # the user has no home
        return Path(os.devnull, f"{name}.json")


def stamp(files: Iterable[Path]) -> list[Any]:
    """What tells whether any of these files has changed; for `RunMemory.state`."""
    return [[str(file), _stamp_of(str(file))] for file in files]


def _signature(folder: str) -> list[Any]:
    return [_stamp_of(f"{folder}{os.sep}{name}") for name in _FILES]


def _is_fresh(signature: list[Any]) -> bool:
    """Whether a file changed so lately that another change need not show in its time."""
    return any(stamp is not None and stamp[2] > time.time_ns() - _SETTLED for stamp in signature)


def _stamp_of(path: str) -> list[int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path of each file took a fifth of the time
    except OSError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_mode]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode("utf-8", errors="backslashreplace")).hexdigest()


@cache
def _code() -> str:
    """A hash of the source of this package, so that another version's cache is not believed."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.iterdir()):
        if file.suffix in (".py", ".jinja"):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
