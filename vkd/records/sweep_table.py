"""A sweep as a table: how far each of its jobs is, what tells it from the others, and how long all of it will take.

The index says which jobs there are, and each run's own directory how it stands. Both are read as files that somebody
else writes meanwhile: what is missing or damaged is said in the row of its job.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from vkd.errors import ConfigError, nearest
from vkd.records.reading import MOST_BYTES, Damaged, clean, number
from vkd.records.run_directory import DONE, FAILED, INTERRUPTED, RUNNING, WAITING, RunDirectory
from vkd.records.sweep_index import FILE_NAME, FOLDER, STATES, Job, Sweep, read_sweep

STALE = "stale"
"""Of a job that says it is running, and whose process is gone from this machine."""

MOST_COLUMNS = 6
"""Keys of the command line beyond which they share one column."""

_TAIL_BYTES = 2**16
_STYLES = {RUNNING: "cyan", DONE: "green", FAILED: "red", STALE: "yellow", INTERRUPTED: "yellow", WAITING: "dim"}
_RIGHT = ("job", "epoch", "left", "test top-1")


@dataclass(frozen=True)
class Row:
    """A job as the table shows it; every text is one line without control characters.

    overrides: its words by their keys.
    state: one of the index's states, or STALE.
    epoch, epochs: done and to be done; None where that is not known.
    seconds: that the finished run took.
    seconds_left: of the running run.
    accuracy: test top-1 in percent, of a finished run.
    where: host and device.
    note: why it failed, and what is wrong with its files.
    """

    number: int
    overrides: dict[str, str]
    state: str
    epoch: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    seconds_left: float | None = field(default=None, compare=False)
    accuracy: float | None = None
    where: str = ""
    note: str = ""

    @property
    def share_left(self) -> float:
        """Share of its epochs that is still to be done; 1 where nothing is known."""
        return 1 - min(self.epoch / self.epochs, 1) if self.epoch and self.epochs else 1.0


@dataclass(frozen=True)
class SweepTable:
    """All jobs of a sweep at one moment. Equal tables differ in nothing but the time left.

    name: of its folder.
    command: that goes on with it.
    gone: the process of the command that started it, where that is known to have ended; None otherwise.
    """

    name: str
    command: str
    rows: list[Row]
    gone: int | None = None

    @property
    def ended(self) -> bool:
        """Whether no job runs, and none waits for a command that may still begin it."""
        return not self._has(RUNNING) and (self.gone is not None or not self._has(WAITING))

    @property
    def abandoned(self) -> bool:
        """Whether jobs wait, and the command that would have begun them is gone."""
        return self.ended and self._has(WAITING)

    @property
    def keys(self) -> list[str]:
        """The keys of the words that not all jobs share, in their order."""
        keys = dict.fromkeys(key for row in self.rows for key in row.overrides)
        return [key for key in keys if len({row.overrides.get(key) for row in self.rows}) > 1]

    @property
    def seconds_left(self) -> float | None:
        """Until the last job is done, if as many run at once as now and each takes as long as those that are done.

        None where nothing runs or nothing is known.
        """
        running = [row for row in self.rows if row.state == RUNNING]
        took = [row.seconds for row in self.rows if row.state == DONE and row.seconds is not None]
        if not took:
            took = [row.seconds_left / row.share_left for row in running if row.seconds_left and row.share_left]
        if not running or (not took and any(row.seconds_left is None for row in running)):
            return None
        usual = sum(took) / len(took) if took else 0.0
        left = [usual * row.share_left if row.seconds_left is None else row.seconds_left for row in running]
        waiting = sum(usual * row.share_left for row in self.rows if row.state == WAITING)
        if not took and self._has(WAITING):
            return None
        return max(*left, (sum(left) + waiting) / len(running))

    def summary(self) -> list[str]:
        """The lines below the table: how many jobs are in which state, the time left, the command that goes on."""
        counts = Counter(row.state for row in self.rows)
        order = (DONE, RUNNING, WAITING, INTERRUPTED, STALE, FAILED)
        parts = ", ".join(f"{counts[state]} {state}" for state in order if counts[state])
        total = f"{len(self.rows)} job{'s' * (len(self.rows) != 1)}: {parts or 'none'}"
        left = self.seconds_left
        lines = [total if left is None else f"{total}; about {show_seconds(left)} left"]
        if self.abandoned:
            lines[0] += f"; stopped: process {self.gone}, which began it, is gone and no job is running"
        if counts[DONE] < len(self.rows):
            lines.append(f"go on: {self.command}")
        return lines

    def _has(self, state: str) -> bool:
        return any(row.state == state for row in self.rows)


def find_sweep(name: str | None, runs_root: str) -> Path:
    """The folder of a sweep.

    Args:
        name: the folder, its index or its name among the sweeps of the runs root; None: the one that changed last.
        runs_root: below which sweeps are looked for.

    Raises ConfigError where there is none.
    """
    root = Path(runs_root, FOLDER)
    sweeps = _sweeps_in(root)
    if name is None:
        if sweeps:
            return sweeps[0]
        raise ConfigError(
            f"there is no sweep in {_text(root)}",
            expected="the runs root of a sweep",
            hint="runs_root=..., or python -m vkd.train -m ... to start one",
        )
    given = Path(name)
    for folder in (given, given.parent if given.name == FILE_NAME else given, root / given):
        if _facts(folder / FILE_NAME) is not None:
            return folder
    known = {path.name: path for path in [*_sweeps_in(given.parent), *sweeps]}
    near = [known[found] for found in nearest(given.name, known)] or sweeps[:3]
    what = "is not there" if _facts(given) is None else f"is no folder of a sweep: it has no {FILE_NAME}"
    raise ConfigError(
        f"{_text(name)} {what}",
        expected=f"the folder of a sweep, such as {_text(root)}/NAME",
        hint=" or ".join(f"dir={_text(path)}" for path in near),
    )


def _sweeps_in(root: Path) -> list[Path]:
    """The folders of the sweeps right below a folder, the one that changed last first."""
    try:
        indexes = [(_facts(path), path.parent) for path in root.glob(f"*/{FILE_NAME}")]
    except OSError:
        return []
    found = [(facts.st_mtime_ns, folder) for facts, folder in indexes if facts is not None]
    return [folder for _, folder in sorted(found, reverse=True)]


def _facts(path: Path) -> os.stat_result | None:
    """What the system says of a path; None where it leads nowhere, or not for us."""
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


class SweepReader:
    """Reads a sweep again and again; a file that has not changed is not read a second time.

    Args:
        folder: of the sweep.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._known: dict[Path, tuple[tuple[int, ...], Any]] = {}

    def read(self) -> SweepTable:
        """The table as it is now. Raises ConfigError where the index cannot be read."""
        table = self._read_once()
        # The command may have ended between the reading of its files and the look at its process.
        return self._read_once() if table.abandoned else table

    def _read_once(self) -> SweepTable:
        try:
            sweep = read_sweep(self.folder / FILE_NAME)
        except ConfigError as error:  # the names of files may hold anything
            raise ConfigError(clean(error.problem), expected=error.expected, hint=clean(error.hint)) from error
        now, host = time.time(), socket.gethostname()
        rows = [self._row(job, Path(sweep.directory), now, host) for job in sweep.jobs]
        gone = sweep.pid if _is_gone({"host": sweep.host, "pid": sweep.pid}, host) else None
        return SweepTable(_text(self.folder), _command(sweep), rows, gone)

    def _row(self, job: Job, directory: Path, now: float, host: str) -> Row:
        troubles: list[str] = []
        status: dict[str, Any] = {}
        result: dict[str, Any] = {}
        run = None
        if isinstance(job.directory, str) and job.directory:
            run = RunDirectory(directory / job.directory)
            facts = _facts(run.path)
            if facts is not None and stat.S_ISDIR(facts.st_mode):
                status = self._read(run.path / "status.json", _read_object, troubles)
            elif job.state != WAITING:
                troubles.append("its directory is missing")
        state, speaker = _judge(job, status, host)
        last: dict[str, Any] = {}
        if run is not None and state == DONE and "its directory is missing" not in troubles:
            result = self._read(run.result, _read_object, troubles)
            if not result and not troubles:
                troubles.append("result.json is missing")
        elif run is not None and state == RUNNING:
            last = self._read(run.metrics, _read_last_line, [])
        epoch, epochs = (_count(status.get(name)) for name in ("epoch", "epochs"))
        return Row(
            number=job.number,
            overrides=dict(_split(word) for word in job.overrides),
            state=state,
            epoch=epoch,
            epochs=epochs,
            seconds=number(_at(result, "timing", "seconds")),
            seconds_left=_seconds_left(last, epochs, now),
            accuracy=number(_at(result, "metrics", "test/top1")),
            where=_where(speaker),
            note="; ".join([*_reasons(job, state, status, speaker), *troubles]),
        )

    def _read(self, path: Path, read: Callable[[Path, os.stat_result], dict], troubles: list[str]) -> dict[str, Any]:
        """What `read` gives of a file; empty where there is none, or it is damaged, which `troubles` then tells."""
        try:
            facts = path.stat()
            signature = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            known = self._known.get(path)
            if known is None or known[0] != signature:
                if not stat.S_ISREG(facts.st_mode):  # opening a pipe would wait for ever
                    raise Damaged("is no plain file")
                known = self._known[path] = (signature, read(path, facts))
            return known[1]
        except FileNotFoundError:
            return {}
        except Damaged as error:
            troubles.append(f"{path.name} {error}")
        except (OSError, ValueError, RecursionError):
            troubles.append(f"{path.name} is damaged")
        return {}


def _read_object(path: Path, facts: os.stat_result) -> dict[str, Any]:
    """A JSON object. Raises Damaged, OSError, ValueError or RecursionError."""
    if facts.st_size > MOST_BYTES:
        raise Damaged(f"is larger than {MOST_BYTES // 2**20} MiB")
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise Damaged("is damaged")
    return content


def _read_last_line(path: Path, facts: os.stat_result) -> dict[str, Any]:
    """The last whole line of a file of JSON objects, with the time of its writing; empty where there is none."""
    with path.open("rb") as file:
        file.seek(max(0, facts.st_size - _TAIL_BYTES))
        lines = file.read(_TAIL_BYTES).splitlines()
    for line in reversed(lines):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return {**content, "written": facts.st_mtime}
    return {}


def _judge(job: Job, status: dict[str, Any], host: str) -> tuple[str, dict[str, Any]]:
    """The state of a job, and what says where it is: the later word of the index and the run's own."""
    own = {"host": job.host, "pid": job.pid, "device": job.device}
    said, state = status.get("state"), job.state
    is_later = not isinstance(job.updated, str) or str(status.get("updated")) >= job.updated
    if said not in STATES or not is_later:
        said = None
    speaker = own if said is None else {**own, "host": status.get("host"), "pid": status.get("pid")}
    if state == WAITING:
        # An earlier command may have left the run anywhere; this one gets there yet.
        state = said if said == DONE or (said == RUNNING and not _is_gone(speaker, host)) else WAITING
        speaker = own if state == WAITING else speaker
    elif state != DONE:
        state = said or state
    return (STALE if state == RUNNING and _is_gone(speaker, host) else state), speaker


def _is_gone(speaker: dict[str, Any], host: str) -> bool:
    """Whether the process is known not to be there: on another machine nobody can tell."""
    pid = speaker["pid"]
    if speaker["host"] != host or isinstance(pid, bool) or not isinstance(pid, int) or pid <= 0 or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # somebody else's
        return False
    try:
        # One that has ended and whose parent has not asked for its exit code is still there, with state Z.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (OSError, ValueError, IndexError):
        return False


def _reasons(job: Job, state: str, status: dict[str, Any], speaker: dict[str, Any]) -> list[str]:
    """Why a job is in its state, in one line; none where there is nothing to say."""
    if state == STALE:
        return [f"process {speaker['pid']} is gone"]
    said = [job.note]
    if state in (FAILED, INTERRUPTED):
        trace = str(job.traceback or status.get("traceback") or "").strip().splitlines()
        said += [status.get("reason"), trace[-1] if trace else None]
    return [_text(reason) for reason in said if isinstance(reason, str) and reason.strip()][:1]


def _seconds_left(last: dict[str, Any], epochs: int | None, now: float) -> float | None:
    """Of a run, from the last line of its metrics: each epoch to come takes as long as those that are done."""
    seconds, epoch = number(last.get("seconds")), _count(last.get("epoch"))
    if not seconds or not epoch or epochs is None:
        return None
    an_epoch = seconds / epoch
    # Some of the next epoch is done by now, but not all of it.
    since = min(max(now - last["written"], 0.0), an_epoch)
    return max((epochs - epoch) * an_epoch - since, 0.0)


def _where(speaker: dict[str, Any]) -> str:
    """`host cuda:0`; the rest of a device's description tells no job from another."""
    device = _text(speaker["device"] or "").partition(" (")[0]
    return " ".join(part for part in (_text(speaker["host"] or ""), device) if part)


def _command(sweep: Sweep) -> str:
    """The command that goes on with a sweep from where this one is called."""
    command = shlex.join(["python", "-m", "vkd.train", *sweep.command])
    there = sweep.directory
    if there != str(Path.cwd()):
        command = f"cd {shlex.quote(there)} && {command}"
    return _text(command, most=100_000)


def _split(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return _text(key), _text(value)


def _text(value: Any, most: int = 300) -> str:
    """One line that any terminal can show."""
    return clean(str(value), most)


def _count(value: Any) -> int | None:
    found = number(value)
    return int(found) if found is not None and 0 <= found < 10**9 else None


def _at(content: Any, *names: str) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content


def show_seconds(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def grid(table: SweepTable, rows: Sequence[Row] | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table as text; `rows` are those to show, all by default.

    A column that would be empty is left out.
    """
    rows = table.rows if rows is None else rows
    keys = table.keys
    lines = []
    for row in rows:
        words = [row.overrides.get(key, "") for key in keys]
        if len(keys) > MOST_COLUMNS:
            words = [" ".join(f"{key}={value}" for key, value in row.overrides.items() if key in keys)]
        progress = "" if row.epoch is None and row.epochs is None else f"{row.epoch or 0}/{row.epochs or '?'}"
        left = "" if row.seconds_left is None else show_seconds(row.seconds_left)
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.2f}"
        lines.append([str(row.number), *words, row.state, progress, left, accuracy, row.where, row.note])
    titles = _titles(keys) if len(keys) <= MOST_COLUMNS else ["words"]
    header = ["job", *titles, "state", "epoch", "left", "test top-1", "where", "note"]
    used = [index for index in range(len(header)) if header[index] in ("job", "state") or any(x[index] for x in lines)]
    return [header[index] for index in used], [[line[index] for index in used] for line in lines]


def _titles(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or all of it where another has the same."""
    short = Counter(key.rpartition(".")[2] for key in keys)
    return [key.rpartition(".")[2] if short[key.rpartition(".")[2]] == 1 else key for key in keys]


def to_text(table: SweepTable) -> str:
    """The whole table with its lines below, in columns of spaces, for a file or another program."""
    header, lines = grid(table)
    widths = [max(map(cell_len, column)) for column in zip(header, *lines, strict=True)]
    shown = []
    for line in [header, *lines]:
        gaps = [" " * (width - cell_len(text)) for text, width in zip(line, widths, strict=True)]
        cells = [
            gap + text if name in _RIGHT else text + gap for name, text, gap in zip(header, line, gaps, strict=True)
        ]
        shown.append("  ".join(cells).rstrip())
    return "\n".join([f"sweep {table.name}", "", *shown, "", *table.summary()])


def to_rich(table: SweepTable, height: int | None = None) -> Group:
    """The table for a terminal: every job, or as many as `height` lines hold, those at work or in trouble first."""
    rows = table.rows if height is None else choose_rows(table.rows, height - 6 - len(table.summary()))
    header, lines = grid(table, rows)
    made = RichTable(box=box.SIMPLE_HEAD, title=Text(f"sweep {table.name}"), title_justify="left", title_style="bold")
    for name in header:
        is_word = name not in ("where", "note")
        made.add_column(
            Text(name), justify="right" if name in _RIGHT else "left", no_wrap=height is not None or is_word,
            overflow="ellipsis" if height is not None or is_word else "fold",
        )  # fmt: skip
    for row, line in zip(rows, lines, strict=True):
        made.add_row(*(Text(text) for text in line), style=_STYLES[row.state])
    hidden = len(table.rows) - len(rows)
    more = [Text(f"... and {hidden} more job{'s' * (hidden != 1)}")] if hidden else []
    below = [Text(line, no_wrap=height is not None, overflow="ellipsis") for line in table.summary()]
    return Group(made, *more, *below)


def choose_rows(rows: Sequence[Row], room: int) -> list[Row]:
    """At most `room` rows, at least one: those at work or in trouble, then the last done and the next to come."""
    room = max(room, 1)
    if len(rows) <= room:
        return list(rows)
    order = (RUNNING, STALE, FAILED, INTERRUPTED)
    chosen = sorted((row for row in rows if row.state in order), key=lambda row: order.index(row.state))[:room]
    room -= len(chosen)
    done, waiting = ([row for row in rows if row.state == state] for state in (DONE, WAITING))
    last = max(room // 2, room - len(waiting))
    done = done[max(len(done) - last, 0) :]
    return sorted([*chosen, *done, *waiting[: room - len(done)]], key=lambda row: row.number)
